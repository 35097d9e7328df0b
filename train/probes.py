# SPDX-License-Identifier: Apache-2.0
"""Evaluation on frozen features: linear probe with few and with all labels, and k-NN.

Nothing is chosen on the test split: the probe's regularisation is fixed for few labels and chosen on a
hold-out of the train split for all labels; the test split is scored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch import Tensor, nn

LABELS_PER_CLASS = (2, 10)
DRAWS = 20  #: random label draws behind each few-label number
NEIGHBOURS = 5
FEW_LABEL_C = 1.0  #: fixed a priori: choosing it would need more labels than there are
ALL_LABEL_C = (0.01, 0.1, 1.0)


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
    """Positive pairs are (z1_i, z2_i), negative pairs all others; each unordered pair once."""
    z = F.normalize(torch.cat([z1, z2]).float(), dim=1)
    cosine = z @ z.T
    row, column = torch.triu_indices(len(z), len(z), offset=1)
    positive = column - row == len(z1)
    values = cosine[row, column]
    return PairCosines(values[positive], values[~positive])


@torch.inference_mode()
def extract_features(network: nn.Module, images: Tensor) -> Tensor:
    """Output [n, F] for preprocessed images, float32 on the CPU, batch norm in eval mode.

    The network's mode is restored: nobody else has to know that it was looked at.
    """
    was_training = network.training
    network.eval()
    features = [network(chunk).float().cpu() for chunk in images.split(512)]
    network.train(was_training)
    return torch.cat(features)


def knn_accuracy(features: Features, k: int = NEIGHBOURS) -> float:
    """Share of test samples that their k nearest train samples (cosine) classify correctly.

    Neighbours vote with their similarity, so ties are rare.
    """
    similarity = F.normalize(features.test, dim=1) @ F.normalize(features.train, dim=1).T
    weight, neighbour = similarity.topk(k, dim=1)
    votes = torch.zeros(len(features.test), int(features.train_labels.max()) + 1)
    votes.scatter_add_(1, features.train_labels[neighbour], weight)
    return float((votes.argmax(1) == features.test_labels).double().mean())


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


def fit_probe(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000).fit(x, y)


def linear_accuracy(features: Features) -> float:
    """Logistic regression on all labels of the train split, C chosen on a fifth of it."""
    train, test = scaled(features)
    y, y_test = features.train_labels.numpy(), features.test_labels.numpy()
    fit, hold_out = train_test_split(np.arange(len(y)), test_size=0.2, stratify=y, random_state=0)
    score = {c: fit_probe(train[fit], y[fit], c).score(train[hold_out], y[hold_out]) for c in ALL_LABEL_C}
    best = max(ALL_LABEL_C, key=lambda c: score[c])  # the first, most regularised one on a tie
    return float(fit_probe(train, y, best).score(test, y_test))


def few_label_accuracy(features: Features, per_class: int, draws: int = DRAWS) -> tuple[float, float]:
    """Mean and standard deviation over random draws of ``per_class`` labels per class."""
    train, test = scaled(features)
    y, y_test = features.train_labels.numpy(), features.test_labels.numpy()
    scores = [
        fit_probe(train[index], y[index], FEW_LABEL_C).score(test, y_test)
        for index in label_draws(features.train_labels, per_class, draws)
    ]
    return float(np.mean(scores)), float(np.std(scores, ddof=1))


def evaluate(features: Features) -> dict[str, float]:
    """One row of the table, in percent.

    One thread: the fits are so small that more of them only wait for each other.
    """
    row: dict[str, float] = {}
    with threadpool_limits(1):
        for per_class in LABELS_PER_CLASS:
            mean, std = few_label_accuracy(features, per_class)
            row[f"linear_{per_class}"], row[f"linear_{per_class}_std"] = 100 * mean, 100 * std
        row["linear_all"] = 100 * linear_accuracy(features)
        row["knn"] = 100 * knn_accuracy(features)
    return row


def format_table(rows: dict[str, dict[str, float]], title: str) -> str:
    """The results as plain text, one line per encoder."""
    header = ["", *(f"linear, {n}/class" for n in LABELS_PER_CLASS), "linear, all", f"{NEIGHBOURS}-NN"]
    body: list[Sequence[str]] = [header]
    for name, row in rows.items():
        few = [f"{row[f'linear_{n}']:.1f} ± {row[f'linear_{n}_std']:.1f}" for n in LABELS_PER_CLASS]
        body.append([name, *few, f"{row['linear_all']:.1f}", f"{row['knn']:.1f}"])
    widths = [max(len(line[i]) for line in body) for i in range(len(header))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in body
    ]
    note = f"n/class: mean ± std over {DRAWS} random draws of labels, the same draws for every encoder"
    return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:], note])
