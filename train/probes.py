# SPDX-License-Identifier: Apache-2.0
"""Evaluation on frozen features: k-NN, linear probes with few and with all labels.

Nothing is chosen on the test split: few labels have a fixed regularisation, all labels choose theirs on a
hold-out of the train split, and the test split is scored once. Everything runs on the device of the
features, whose values are read back once per result; the random choices are drawn on the CPU, so they are
the same on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.features import Features
from train.progress import counting

NEIGHBOURS = 20  #: k and temperature of Wu et al. 2018 (arXiv 1805.01978) scaled to small data sets
KNN_TEMPERATURE = 0.07
KNN_SIMILARITIES = 2**25  #: formed at a time: 128 MB
DRAWS, DRAWS_OF_MANY, MANY_LABELS = 20, 5, 20  #: random label draws up to 20 labels a class, and above
FEW_LABEL_C = 1.0  #: fixed a priori: choosing it would need more labels than there are
LEARNING_RATES = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  #: for features of mean squared norm 1
WEIGHT_DECAYS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
PROBE_EPOCHS, PROBE_STEPS = 30, 2000  #: the longer of the two: small sets need more epochs
HOLD_OUT = 0.1
FIT_NUMBERS = 2**28  #: of the features that are fitted together: 1 GB


class LinearResult(NamedTuple):
    """What :func:`linear_probe` found; accuracies are shares in [0, 1]."""

    accuracy: float  #: on the test split
    learning_rate: float  #: chosen, for features of mean squared norm 1
    weight_decay: float  #: chosen, same scale
    holdout_accuracy: float  #: of the chosen setting, before it was retrained on the whole train split
    at_edge: bool  #: the chosen setting has a neighbour outside the grid: a wider grid may do better


def correct_share(logits: Tensor, labels: Tensor) -> Tensor:
    """Top-1 accuracy in [0, 1] of ``logits`` [..., n, C], [...] float64 on their device."""
    return (logits.argmax(-1) == labels).double().mean(-1)


def knn_accuracy(features: Features, k: int = NEIGHBOURS, temperature: float = KNN_TEMPERATURE) -> float:
    """Share of test samples that their k nearest train samples (cosine s) classify correctly.

    Neighbours vote with exp(s / temperature), as Wu et al. 2018 (arXiv 1805.01978, section 3.4). ``k`` is
    at most the number of train samples; the similarities are formed for some test rows at a time.
    """
    train, labels = F.normalize(features.train, dim=1), features.train_labels
    k, classes = min(k, len(train)), features.classes
    correct = torch.zeros((), dtype=torch.long, device=train.device)
    rows = max(1, KNN_SIMILARITIES // len(train))
    with counting("k-NN", len(features.test), "images") as advance:
        for test, expected in zip(features.test.split(rows), features.test_labels.split(rows), strict=True):
            similarity, neighbour = (F.normalize(test, dim=1) @ train.T).topk(k, dim=1)
            votes = torch.zeros(len(test), classes, device=train.device)
            votes.scatter_add_(1, labels[neighbour], (similarity / temperature).exp())
            correct += (votes.argmax(1) == expected).sum()
            advance(len(test))
    return int(correct) / len(features.test)


def scaled(features: Features) -> tuple[Tensor, Tensor]:
    """Train and test features, centred, with one common scale for all of them, from the train split.

    A scale per feature would blow up pixels that are nearly always empty, which handicaps raw pixels.
    """
    mean = features.train.mean(0)
    train = features.train - mean
    scale = train.square().mean().sqrt().clamp_min(torch.finfo(train.dtype).tiny)
    return train.div_(scale), (features.test - mean).div_(scale)


def stratified_split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (chosen, rest) of ``labels`` [n]: ``share`` of every class, rounded down but at least one.

    In random order, on the device of the labels; drawn on the CPU, so equal on every device.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    chosen = torch.zeros(len(order), dtype=torch.bool)
    for c in shuffled.unique():
        members = (shuffled == c).nonzero().flatten()
        chosen[members[: max(1, int(share * len(members) + 1e-9))]] = True  # 0.29 * 100 is 28.999…
    return order[chosen].to(labels.device), order[~chosen].to(labels.device)


def train_probes(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    classes: int,
    settings: Sequence[tuple[float, float]],
    epochs: int,
    batch: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """One linear classifier per (learning rate, weight decay), all trained at once; their weights and biases.

    SGD with momentum 0.9, the learning rate falling to 0 along half a cosine, from zero weights, on the
    ``rows`` of ``x`` [n, F] and ``y`` [n]. The minibatches are shared, so all H classifiers are one matrix
    product and each is what it would be alone. Returns [H, F, C] and [H, C].
    """
    heads, width = len(settings), x.shape[1]
    rate, decay = (x.new_tensor(column)[:, None] for column in zip(*settings, strict=True))
    # Classes first and samples last: a softmax over the first dimension runs along whole rows of memory.
    weight, bias = x.new_zeros(classes, heads, width), x.new_zeros(classes, heads, 1)
    velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    label = torch.arange(classes, device=y.device)[:, None]
    batch = min(batch, len(rows))
    total, step = epochs * (len(rows) // batch), 0
    generator = torch.Generator().manual_seed(seed)
    with counting(f"linear probe, {heads} at once" if heads > 1 else "linear probe", total, "steps") as advance:
        for _ in range(epochs):
            order = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
            for index in order[: len(rows) // batch * batch].split(batch):
                inputs = x.index_select(0, index)
                logits = torch.addmm(bias.view(-1, 1), weight.view(-1, width), inputs.T).view(classes, heads, batch)
                error = logits.softmax(0)
                error.sub_((y.index_select(0, index) == label)[:, None].to(x.dtype)).div_(batch)  # dL/d logits
                velocity.view(-1, width).addmm_(error.flatten(0, 1), inputs, beta=0.9)
                velocity.addcmul_(weight, decay)
                bias_velocity.mul_(0.9).add_(error.sum(2, keepdim=True))
                now = rate * (0.5 + 0.5 * math.cos(math.pi * step / total))
                weight.addcmul_(velocity, now, value=-1)
                bias.addcmul_(bias_velocity, now, value=-1)
                step += 1
                advance(1)
    return weight.permute(1, 2, 0), bias[..., 0].T


def linear_probe(
    features: Features,
    *,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int = 256,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
) -> LinearResult:
    """Linear classifier on the whole train split, its learning rate and weight decay chosen on a tenth of it.

    All settings of the grid are trained at once on the other nine tenths (stratified). The one with the best
    hold-out accuracy (on a tie: the lowest hold-out loss) is trained again on the whole train split, and
    only that classifier meets the test split. The same for features of any scale and offset. ``epochs``:
    30, or as many as make 2,000 steps if that is more. Raises ValueError if no class has two samples.
    """
    train, test = scaled(features)
    for split in (train, test):
        split.div_(math.sqrt(train.shape[1]))  # mean squared norm 1: the same learning rates for every width
    y, grid = features.train_labels, [(lr, decay) for lr in learning_rates for decay in weight_decays]
    fit, hold_out = stratified_split(y, 1 - HOLD_OUT, seed)
    if not len(hold_out):
        raise ValueError("linear_probe: no class has two samples, so there is nothing to choose the settings on")
    batch = min(batch_size, max(1, len(fit) // 8))
    epochs = epochs or max(PROBE_EPOCHS, math.ceil(PROBE_STEPS / (len(fit) // batch)))

    weight, bias = train_probes(train, y, fit, features.classes, grid, epochs, batch, seed)
    held_out, expected = train[hold_out], y[hold_out]
    found = []
    for head_weight, head_bias in zip(weight, bias, strict=True):
        logits = torch.addmm(head_bias, held_out, head_weight)
        found.append(torch.stack([correct_share(logits, expected), F.cross_entropy(logits, expected).double()]))
    scores = [(share, -loss if math.isfinite(loss) else -math.inf) for share, loss in torch.stack(found).tolist()]
    best = max(range(len(grid)), key=lambda h: scores[h])
    lr, decay = grid[best]
    everything = torch.arange(len(y), device=y.device)
    weight, bias = train_probes(train, y, everything, features.classes, [grid[best]], epochs, batch, seed)
    accuracy = float(correct_share(torch.addmm(bias[0], test, weight[0]), features.test_labels))
    # No weight decay at all is the natural end of its range, not an edge.
    edge = lr in (min(learning_rates), max(learning_rates)) or decay == max(weight_decays) > 0
    return LinearResult(accuracy, lr, decay, scores[best][0], edge)


def can_choose(labels: Tensor) -> bool:
    """Whether some class has two samples, one of them to choose the linear probe's settings on."""
    return int(labels.bincount().max()) > 1


def label_budgets(n: int, classes: int) -> tuple[int, ...]:
    """Labels per class of the few-label columns: 1 % and 10 % of ``n`` samples, or 2 and 10 below 5,000."""
    if n < 5000:
        return (2, 10)
    return tuple(max(1, round(share * n / classes)) for share in (0.01, 0.1))


def label_draws(labels: Tensor, per_class: int, draws: int) -> Tensor:
    """Indices [draws, classes · per_class] of ``per_class`` samples of every class, class by class; the same for
    every encoder, on the device of ``labels`` [n].

    Raises ValueError where a class has fewer than ``per_class`` samples.
    """
    on_host = labels.cpu()
    counts = on_host.bincount()
    if (least := int(counts[counts > 0].min())) < per_class:
        raise ValueError(f"label_draws: {per_class} labels a class asked for, but a class has only {least} samples")
    generator = torch.Generator().manual_seed(0)
    members = [(on_host == c).nonzero().flatten() for c in counts.nonzero().flatten()]
    chosen = [
        torch.cat([m[torch.randperm(len(m), generator=generator)[:per_class]] for m in members]) for _ in range(draws)
    ]
    return torch.stack(chosen).to(labels.device)


def fit_logistic(x: Tensor, y: Tensor, c: float, classes: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regressions by full-batch L-BFGS, one for each of the samples ``x`` [N, n, F] with the
    labels ``y`` [N, n]; weights [N, F, classes] and biases [N, 1, classes].

    The objective is scikit-learn's, C Σ cross-entropy + ‖W‖² / 2 with a free bias, divided by C n. The fits are
    independent: their sum has its minimum where each of them has its own.
    """
    count, n, width = x.shape
    decay, root = 1 / (c * n), None
    if n > width:  # in coordinates in which the curvature at W = 0 is 1, a tenth of the steps will do
        curvature = torch.bmm(x.mT, x) / (n * classes)
        curvature.diagonal(dim1=1, dim2=2).add_(decay)
        root = torch.linalg.cholesky(curvature, upper=True)
    free = x.new_zeros(count, width, classes, requires_grad=True)
    bias = x.new_zeros(count, 1, classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [free, bias], max_iter=500, tolerance_grad=1e-5, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def weight() -> Tensor:
        return free if root is None else torch.linalg.solve_triangular(root, free, upper=True)

    with counting(f"logistic regression, {count} at once", None, "evaluations") as advance:

        def closure() -> Tensor:
            optimizer.zero_grad()
            now = weight()
            loss = F.cross_entropy(torch.baddbmm(bias, x, now).flatten(0, 1), y.flatten(), reduction="sum") / n
            loss = loss + decay / 2 * now.square().sum()
            loss.backward()
            advance(1)
            return loss

        optimizer.step(closure)
    return weight().detach(), bias.detach()


def draws_for(per_class: int) -> int:
    """Random draws behind a few-label number: fewer labels vary more."""
    return DRAWS if per_class <= MANY_LABELS else DRAWS_OF_MANY


def few_label_accuracy(features: Features, per_class: int, draws: int) -> tuple[float, float]:
    """Mean and standard deviation of the test accuracy over random draws of ``per_class`` labels per class."""
    train, test = scaled(features)
    y, classes = features.train_labels, features.classes
    chosen = label_draws(y, per_class, draws)
    scores = []
    for index in chosen.split(max(1, FIT_NUMBERS // (chosen.shape[1] * train.shape[1]))):
        for weight, bias in zip(*fit_logistic(train[index], y[index], FEW_LABEL_C, classes), strict=True):
            scores.append(correct_share(torch.addmm(bias, test, weight), features.test_labels))
    values = torch.stack(scores)
    return float(values.mean()), float(values.std()) if draws > 1 else 0.0


def evaluate_features(features: Features, *, budgets: Sequence[int], draws: int | None = None) -> dict[str, float]:
    """One row of the table, in percent: linear_<n> and linear_<n>_std per budget, linear_all, knn.

    A budget that the smallest class cannot meet has no column, nor has linear_all without
    :func:`can_choose`. ``draws`` overrides :func:`draws_for`.
    """
    counts = features.train_labels.bincount()
    row: dict[str, float] = {}
    for per_class in budgets:
        if per_class <= int(counts[counts > 0].min()):
            mean, std = few_label_accuracy(features, per_class, draws or draws_for(per_class))
            row[f"linear_{per_class}"], row[f"linear_{per_class}_std"] = 100 * mean, 100 * std
    if can_choose(features.train_labels):
        row["linear_all"] = 100 * linear_probe(features).accuracy
    row["knn"] = 100 * knn_accuracy(features)
    return row


def format_table(rows: dict[str, dict[str, float]], title: str, draws: int | None = None) -> str:
    """The rows of :func:`evaluate_features` as plain text, one line per encoder; columns follow their keys.

    ``draws`` is what :func:`evaluate_features` was given.
    """
    keys = list(dict.fromkeys(key for row in rows.values() for key in row if not key.endswith("_std")))
    names = {"linear_all": "linear, all", "knn": f"{NEIGHBOURS}-NN", "finetune": "fine-tuned", "v1": "linear, v1"}
    header = ["", *(names.get(key) or f"linear, {key.removeprefix('linear_')}/class" for key in keys)]

    def cell(row: dict[str, float], key: str) -> str:
        if key not in row:
            return "–"
        return f"{row[key]:.1f}" + (f" ± {row[f'{key}_std']:.1f}" if f"{key}_std" in row else "")

    body = [header, *([name, *(cell(row, key) for key in keys)] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in body) for i in range(len(header))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in body
    ]
    table = [title, lines[0], "-" * len(lines[0]), *lines[1:]]
    counts = [draws or draws_for(int(key.removeprefix("linear_"))) for key in keys if key not in names]
    if counts:
        number = " and ".join(dict.fromkeys(map(str, counts)))
        table.append(f"n/class: mean ± std over {number} random draws of labels, the same draws for every encoder")
    return "\n".join(table)
