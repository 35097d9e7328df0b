# SPDX-License-Identifier: Apache-2.0
"""The figures of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits
from torch import Tensor

from train.features import PairCosines

POSITIVE, NEGATIVE = "#0072b2", "#d55e00"  # distinct in print and for colour-blind readers
INK = "#333333"


def new_axes(figure: Figure, *position: int) -> Axes:
    axes = figure.add_subplot(*position)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=9)
    return axes


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=200, bbox_inches="tight", facecolor="white")


def plot_loss(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss and its two pair terms, and the mean cosines, over the steps."""
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    step = [entry["step"] for entry in history]
    axes = new_axes(figure, 1, 2, 1)
    for key, label, colour in (
        ("loss", "loss", INK),
        ("positive_loss", "positive pairs", POSITIVE),
        ("negative_loss", "negative pairs", NEGATIVE),
    ):
        axes.plot(step, [entry[key] for entry in history], color=colour, lw=1.5, label=label)
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(frameon=False, fontsize=9)
    axes = new_axes(figure, 1, 2, 2)
    for key, label, colour in (
        ("positive_cosine", "positive pairs", POSITIVE),
        ("negative_cosine", "negative pairs", NEGATIVE),
    ):
        axes.plot(step, [entry[key] for entry in history], color=colour, lw=1.5, label=label)
    axes.set(xlabel="step", ylabel="mean cosine")
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


def plot_cosines(before: PairCosines, after: PairCosines, path: Path) -> None:
    """Histograms of the cosines of positive and negative pairs, before and after training."""
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    first: Axes | None = None
    for column, (title, cosines) in enumerate((("untrained", before), ("pre-trained", after)), start=1):
        axes = new_axes(figure, 1, 2, column)
        for values, label, colour in (
            (cosines.negative, "negative pairs", NEGATIVE),
            (cosines.positive, "positive pairs", POSITIVE),
        ):
            axes.hist(values.numpy(), bins=80, range=(-1, 1), density=True, color=colour, alpha=0.6, label=label)
        axes.set(title=title, xlabel="cosine of two views (test split)", xlim=(-1, 1))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        if first is None:
            first = axes
            axes.set_ylabel("density")
            axes.legend(frameon=False, fontsize=9, loc="upper left")
    save(figure, path)


def plot_embedding(features: Tensor, labels: Tensor, path: Path) -> None:
    """t-SNE of the test split's features, coloured by class."""
    centred = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    perplexity = min(30, (len(features) - 1) / 3)
    with threadpool_limits(1):  # as for the probes: too small to share
        xy = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=0).fit_transform(centred.numpy())
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.add_subplot()
    for index, label in enumerate(labels.unique().tolist()):
        points = xy[(labels == label).numpy()]
        axes.scatter(points[:, 0], points[:, 1], s=16, color=f"C{index}", lw=0, label=str(label))
    axes.set(xticks=[], yticks=[], title="t-SNE of the encoder's features, test split")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.legend(title="class", frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.1)
    save(figure, path)
