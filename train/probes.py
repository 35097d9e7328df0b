# SPDX-License-Identifier: Apache-2.0
"""Evaluation on frozen features: linear probe with few and with all labels, and k-NN.

Nothing is chosen on the test split: the probe's regularisation is fixed for few labels; for all labels its
learning rate and weight decay are chosen on a hold-out of the train split. The test split is scored once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch import Tensor, nn

SMALL_SET = 5000  #: below, few labels are 2 and 10 a class; from here on 1 % and 10 % of the train split
KNN_TEMPERATURE = 0.07
FEW_LABEL_C = 1.0  #: fixed a priori: choosing it would need more labels than there are
LEARNING_RATES, WEIGHT_DECAYS = (0.01, 0.03, 0.1, 0.3, 1.0), (0.0, 1e-5, 1e-4, 1e-3)
PROBE_STEPS, PROBE_BATCH = 3000, 256
PAIR_IMAGES = 1000  #: whose pairs the cosine plot shows


class Features(NamedTuple):
    """Frozen features of both splits with their labels, on the CPU."""

    train: Tensor  #: [n, F] float32
    train_labels: Tensor  #: [n]
    test: Tensor  #: [m, F] float32
    test_labels: Tensor  #: [m]


class PairCosines(NamedTuple):
    """Cosines of all positive pairs and all negative pairs of a set of views, 1-dim."""

    positive: Tensor
    negative: Tensor


def pair_cosines(z1: Tensor, z2: Tensor) -> PairCosines:
    """Positive pairs are (z1_i, z2_i), negative pairs all others; each unordered pair once, of the first
    images only where there are many."""
    z1, z2 = z1[:PAIR_IMAGES], z2[:PAIR_IMAGES]
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    cosine = z @ z.T
    row, column = torch.triu_indices(len(z), len(z), offset=1)
    positive = column - row == len(z1)
    values = cosine[row, column]
    return PairCosines(values[positive], values[~positive])


@torch.inference_mode()
def extract_features(
    network: nn.Module,
    images: Tensor,
    preprocess: Callable[[Tensor], Tensor],
    device: torch.device | None = None,
    bfloat16: bool = False,
) -> Tensor:
    """Output [n, F] for uint8 images [n, C, H, W], float32 on the CPU, batch norm in eval mode.

    Images are preprocessed chunk by chunk on ``device`` (None: where they are). The network's mode is
    restored: nobody else has to know that it was looked at.
    """
    device = device or images.device
    was_training = network.training
    network.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            chunks = [network(preprocess(chunk.to(device))).float().cpu() for chunk in images.split(512)]
    finally:
        network.train(was_training)
    return torch.cat(chunks)


def neighbours(n: int) -> int:
    return 5 if n < SMALL_SET else 20


def knn_accuracy(features: Features, k: int | None = None, temperature: float = KNN_TEMPERATURE) -> float:
    """Share of test samples that their k nearest train samples classify correctly.

    Neighbours vote with exp(cosine / temperature), as in InstDisc (arXiv 1805.01978). k is 5 for small
    train splits, else 20.
    """
    k = neighbours(len(features.train)) if k is None else k
    train = F.normalize(features.train, dim=1)
    classes, k, right = int(features.train_labels.max()) + 1, min(k, len(train)), 0
    for test, labels in zip(features.test.split(1024), features.test_labels.split(1024), strict=True):
        cosine, neighbour = (F.normalize(test, dim=1) @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(test), classes)
        votes.scatter_add_(1, features.train_labels[neighbour], (cosine / temperature).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(features.test)


def label_budgets(features: Features) -> tuple[int, ...]:
    """Labels per class behind the few-label columns."""
    n, classes = len(features.train), len(features.train_labels.unique())
    if n < SMALL_SET:
        return (2, 10)
    return tuple(max(1, min(round(share * n / classes), n)) for share in (0.01, 0.1))


def draws_of(per_class: int) -> int:
    """Random label draws behind each few-label number; more labels vary less."""
    return 20 if per_class <= 20 else 5


def label_draws(labels: Tensor, per_class: int, draws: int) -> list[np.ndarray]:
    """Indices of ``per_class`` samples of every class, ``draws`` times; the same for every encoder."""
    rng = np.random.default_rng(0)
    classes = [np.flatnonzero(labels.numpy() == c) for c in np.unique(labels.numpy())]
    return [np.concatenate([rng.choice(c, size=per_class, replace=False) for c in classes]) for _ in range(draws)]


def scaled(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Centred, with one common scale for all features, both taken from the train split.

    A scale per feature would blow up pixels that are nearly always empty, which handicaps raw pixels.
    """
    mean = features.train.mean(0)
    scale = (features.train - mean).square().mean().sqrt()
    return ((features.train - mean) / scale).numpy(), ((features.test - mean) / scale).numpy()


class LinearResult(NamedTuple):
    accuracy: float  #: on the test split
    learning_rate: float
    weight_decay: float
    holdout_accuracy: float  #: what the two were chosen by
    at_edge: bool  #: the learning rate is the smallest or the largest of the grid


def train_probes(x: Tensor, y: Tensor, classes: int, grid: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Linear classifiers [H, F, C] and [H, C], one for each (learning rate, weight decay), trained at once.

    Minibatch SGD with momentum and a cosine to 0 on the softmax cross-entropy; all see the same batches.
    """
    rate, decay = (torch.tensor(values, dtype=x.dtype).view(-1, 1, 1) for values in zip(*grid, strict=True))
    weight = torch.zeros(len(grid), x.shape[1] + 1, classes, dtype=x.dtype)  # the last row is the bias
    velocity, ones = torch.zeros_like(weight), torch.ones(len(x), 1, dtype=x.dtype)
    x, batch, generator = torch.cat([x, ones], dim=1), min(PROBE_BATCH, len(x)), torch.Generator().manual_seed(0)
    for step in range(PROBE_STEPS):
        index = torch.randint(len(x), (batch,), generator=generator)
        rows, target = x[index], F.one_hot(y[index], classes)
        error = (torch.einsum("bf,hfc->hbc", rows, weight).softmax(2) - target) / batch
        gradient = torch.einsum("bf,hbc->hfc", rows, error)
        gradient[:, :-1] += (decay * weight)[:, :-1]
        velocity.mul_(0.9).add_(gradient)
        weight -= rate * 0.5 * (1 + np.cos(np.pi * step / PROBE_STEPS)) * velocity
    return weight[:, :-1], weight[:, -1]


def linear_probe(features: Features) -> LinearResult:
    """All labels of the train split; learning rate and weight decay chosen on a tenth of it, then refitted."""
    x, x_test = (torch.from_numpy(values) for values in scaled(features))
    y, classes = features.train_labels, int(features.train_labels.max()) + 1
    grid = list(itertools.product(LEARNING_RATES, WEIGHT_DECAYS))
    fit, hold_out = train_test_split(np.arange(len(y)), test_size=0.1, stratify=y.numpy(), random_state=0)
    weight, bias = train_probes(x[fit], y[fit], classes, grid)
    right = (torch.einsum("bf,hfc->hbc", x[hold_out], weight) + bias[:, None]).argmax(2) == y[hold_out]
    accuracy = right.double().mean(1)
    best = int(accuracy.argmax())  # the first, most regularised one on a tie
    weight, bias = train_probes(x, y, classes, [grid[best]])
    test_accuracy = ((x_test @ weight[0] + bias[0]).argmax(1) == features.test_labels).double().mean()
    at_edge = grid[best][0] in (min(LEARNING_RATES), max(LEARNING_RATES))
    return LinearResult(float(test_accuracy), *grid[best], float(accuracy[best]), at_edge)


def few_label_accuracy(features: Features, per_class: int, draws: int | None = None) -> tuple[float, float]:
    """Mean and standard deviation over random draws of ``per_class`` labels per class."""
    train, test = scaled(features)
    y, y_test = features.train_labels.numpy(), features.test_labels.numpy()
    scores = [
        LogisticRegression(C=FEW_LABEL_C, max_iter=1000).fit(train[index], y[index]).score(test, y_test)
        for index in label_draws(features.train_labels, per_class, draws or draws_of(per_class))
    ]
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


def evaluate(features: Features) -> dict[str, float]:
    """One row of the table, in percent.

    One thread for scikit-learn: its fits are so small that more of them only wait for each other.
    """
    row: dict[str, float] = {}
    with threadpool_limits(1):
        for per_class in label_budgets(features):
            mean, std = few_label_accuracy(features, per_class)
            row[f"linear_{per_class}"], row[f"linear_{per_class}_std"] = 100 * mean, 100 * std
    row["linear_all"] = 100 * linear_probe(features).accuracy
    row["knn"] = 100 * knn_accuracy(features)
    return row


def format_table(rows: dict[str, dict[str, float]], title: str) -> str:
    """The results as plain text, one line per encoder; rows as :func:`evaluate` gives them."""
    first = next(iter(rows.values()))
    budgets = [int(key.split("_")[1]) for key in first if key.endswith("_std")]
    header = ["", *(f"linear, {n}/class" for n in budgets), "linear, all", "k-NN"]
    body: list[Sequence[str]] = [header]
    for name, row in rows.items():
        few = [f"{row[f'linear_{n}']:.1f} ± {row[f'linear_{n}_std']:.1f}" for n in budgets]
        body.append([name, *few, f"{row['linear_all']:.1f}", f"{row['knn']:.1f}"])
    widths = [max(len(line[i]) for line in body) for i in range(len(header))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in body
    ]
    draws = ", ".join(str(draws_of(n)) for n in budgets)
    note = f"n/class: mean ± std over {draws} random draws of labels, the same draws for every encoder"
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:], note])


def rankme(z: Tensor) -> Tensor:
    """Effective rank of embeddings [n, D], between 1 and D: exp of the entropy of the singular values.

    0-dim on the embeddings' device. Source: Garrido et al., arXiv 2210.02885, eq. (1).
    """
    squares = torch.linalg.eigvalsh(z.double().T @ z.double()).clamp(min=0)
    share = squares.sqrt() / squares.sqrt().sum()
    return torch.special.entr(share).sum().exp()
