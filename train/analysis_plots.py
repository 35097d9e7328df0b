# SPDX-License-Identifier: Apache-2.0
"""The figures of train/analyze.py and the page that shows them, one caption each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import LogLocator
from torch import Tensor

from mio_ext import analysis
from train.displacement import Displacement
from train.features import PairCosines
from train.plots import INK, NEGATIVE, POSITIVE, new_axes, save
from train.run_folder import ANALYSIS_PLOTS

SUBTLE = "#888888"
LINEAR = 0.1  #: relative error up to which a step counts as first order
POINTS = 3000  #: of a scatter plot: more only make the file larger
TICKS = (-1, -0.5, 0, 0.5, 1)
SMALL: dict[str, Any] = {"frameon": False, "fontsize": 9}


def draw_page(
    folder: Path, values: Mapping[str, Any], cosines: PairCosines, moves: Mapping[str, Sequence[Displacement]]
) -> str:
    """Draw all figures into ``folder``; returns the page, Markdown."""
    training, pairs, displacement, toy = (folder / name for name in ANALYSIS_PLOTS)
    plot_training(values["history"], values["information"], training)
    plot_cosines(cosines, values["information"], pairs)
    plot_displacement(moves, displacement)
    plot_toy(toy)
    captions = (training_caption(), cosines_caption(values), displacement_caption(values), toy_caption())
    figures = (f"![]({name})\n\n*{caption}*" for name, caption in zip(ANALYSIS_PLOTS, captions, strict=True))
    title = f"# Closed forms of the MIO loss, measured on this run\n\n`{values['command']}`"
    return "\n\n".join([title, table(values), *figures]) + "\n"


def table(values: Mapping[str, Any]) -> str:
    """The numbers of the page, in docs/theory.md as well."""
    found, end = values["information"], values["end"]
    fixed, affine = found["critic"], found["best_affine"]
    rows = [
        ("Jensen-Shannon estimate, eq. (18), " + found["split"], f"{fixed['js_estimate']:.3f} nats"),
        ("largest estimate that this critic allows, eq. (22)", f"{found['ceiling']:.3f} nats"),
        (
            f"estimate of the best critic a·s + b (a = {affine['scale']:.1f}, b = {affine['bias']:.1f})",
            f"{affine['js_estimate']:.3f} nats",
        ),
        ("upper limit log 2", f"{found['log_2']:.3f} nats"),
        ("regulariser / attraction, norms of the gradient's parts", f"{100 * end['regularizer_to_attraction']:.1f} %"),
        ("whole gradient / attraction", f"{100 * end['total_to_attraction']:.0f} %"),
        ("cosine of pull (attraction + regulariser) and repulsion", f"{end['cosine_of_pull_and_repulsion']:.2f}"),
    ]
    for name, several in values["displacement"].items():
        move = several[0]
        rows.append((f"R² of the predicted displacement, {name}, η = {move['rate']:g}", r_squared(move["r2"])))
    for name, several in values["displacement"].items():
        rows.append((f"relative error of that prediction, {name}", f"{100 * several[0]['relative_error']:.2g} %"))
    return "\n".join(["| quantity | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def r_squared(value: float) -> str:
    """Never a 1 that is none."""
    return f"{value:.1f}" if value < 0 else f"{math.floor(value * 1e4) / 1e4:.4f}"


def plot_training(history: Mapping[str, Sequence[float]], found: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = new_axes(figure, 1, 2, 1)
    for key, label, colour, style, width in (
        ("attraction_norm", "attraction", POSITIVE, "-", 2.5),
        ("repulsion_norm", "repulsion", NEGATIVE, "-", 1.5),
        ("gradient_norm", "whole gradient", INK, "--", 1),
        ("regularizer_norm", "regulariser", SUBTLE, "-", 1.5),
    ):
        axes.plot(history["step"], history[key], style, color=colour, lw=width, label=label)
    axes.set(xlabel="step", ylabel="norm of its part of ∂L/∂z", yscale="log")
    low = min(min(history[key]) for key in history if key.endswith("_norm"))
    high = max(max(history[key]) for key in history if key.endswith("_norm"))
    axes.set_ylim(low / 1.5, 4 * high)  # room for the legend
    axes.legend(**SMALL, ncols=2, loc="upper right", bbox_to_anchor=(1.02, 1.08))
    axes = new_axes(figure, 1, 2, 2)
    axes.plot(history["step"], history["js_estimate"], color=INK, lw=1.5)
    level_line(axes, found["training_ceiling"], "largest estimate this critic allows")
    level_line(axes, found["log_2"], "log 2")
    axes.set(xlabel="step", ylabel="JS estimate (nats)", ylim=(min(0, *history["js_estimate"]), 0.75))
    save(figure, path)


def level_line(axes: Axes, level: float, label: str) -> None:
    axes.axhline(level, color=SUBTLE, lw=1, ls=":")
    axes.annotate(
        label, (1, level), (0, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", va="bottom", fontsize=9, color=INK,
    )  # fmt: skip


def training_caption() -> str:
    return (
        "Left: norms of attraction, repulsion and regulariser, eq. (23)-(25), and of their sum, the gradient, on the "
        "training batch of each logged step (step 0: the untrained network). Right: the running Jensen-Shannon "
        "estimate, eq. (18), mean of the steps since the last one logged; dotted, its ceiling for a cosine critic, "
        "eq. (22), and that of the divergence."
    )


def plot_cosines(cosines: PairCosines, found: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = new_axes(figure, 1, 2, 1)
    for values, label, colour in (
        (cosines.negative, "negative pairs", NEGATIVE),
        (cosines.positive, "positive pairs", POSITIVE),
    ):
        axes.hist(values.numpy(), bins=60, range=(-1, 1), density=True, color=colour, alpha=0.6, label=label)
    axes.set(xlabel=f"cosine of two views ({found['split']})", ylabel="density", xlim=(-1, 1), xticks=TICKS, yticks=[])
    axes.spines["left"].set_visible(False)
    axes.legend(**SMALL, loc="upper left")
    axes = new_axes(figure, 1, 2, 2)
    s = torch.linspace(-1, 1, 201)
    fixed, affine = found["critic"], found["best_affine"]
    centres, share = positive_share(cosines)
    axes.plot(centres, share, "o", color=POSITIVE, ms=4, mec="none", label="share of positives found")
    for critic, label, style in ((fixed, "critic of the loss", "-"), (affine, "best critic a·s + b", "--")):
        probability = torch.sigmoid(critic["scale"] * s + critic["bias"])
        axes.plot(s, probability, style, color=INK, lw=1.5, label=f"{label}: {critic['js_estimate']:.3f} nats")
    axes.set(xlabel="cosine", ylabel="probability of a positive pair", xlim=(-1, 1), ylim=(-0.03, 1.03), xticks=TICKS)
    axes.legend(**SMALL, loc="upper left")
    save(figure, path)


def positive_share(cosines: PairCosines, bins: int = 40) -> tuple[Tensor, Tensor]:
    """Where a bin of cosines has at least 10 pairs: its centre and p/(p + q), both kinds being equally likely."""
    (p, edges), (q, _) = (torch.histogram(c.float().clamp(-1, 1), bins, range=(-1.0, 1.0)) for c in cosines)
    enough = p + q >= 10
    p, q = p / p.sum(), q / q.sum()
    return ((edges[1:] + edges[:-1]) / 2)[enough], (p / (p + q))[enough]


def cosines_caption(values: Mapping[str, Any]) -> str:
    found = values["information"]
    return (
        f"Left: cosines of positive and negative pairs, two views of {found['images']} {found['split']}, batch norm in "
        "eval mode. Right: how likely a pair of a given cosine is positive if both kinds are as frequent; dots, "
        "the pairs themselves; lines, the loss's critic σ(s/τ + b) and the best one of the form σ(a·s + b), fitted on "
        "training images. Their estimates, eq. (18), differ by what the fixed critic leaves on the table."
    )


def plot_displacement(moves: Mapping[str, Sequence[Displacement]], path: Path) -> None:
    figure = Figure(figsize=(8.5, 3.0), layout="constrained")
    colours = dict(zip(moves, (POSITIVE, NEGATIVE), strict=True))
    for column, (name, several) in enumerate(moves.items(), start=1):
        move = next((m for m in several if m.relative_error < LINEAR), several[-1])
        axes = new_axes(figure, 1, 3, column)
        chosen = torch.randperm(move.measured.numel(), generator=torch.Generator().manual_seed(0))[:POINTS]
        predicted, measured = (t.flatten().cpu()[chosen] for t in (move.predicted, move.measured))
        limit = float(torch.cat([predicted, measured]).abs().max())
        exponent = math.floor(math.log10(limit))
        predicted, measured, limit = (value / 10**exponent for value in (predicted, measured, limit))
        axes.plot([-limit, limit], [-limit, limit], color=SUBTLE, lw=0.8)
        axes.scatter(predicted, measured, s=3, color=colours[name], lw=0, alpha=0.4)
        axes.set_title(f"{name}, η = {power(move.rate)}", fontsize=10)
        axes.set(xlabel=rf"predicted Δz ($10^{{{exponent}}}$)", ylabel=rf"measured Δz ($10^{{{exponent}}}$)")
        axes.set(aspect="equal", adjustable="box")
        axes.annotate(f"R² = {r_squared(move.r2)}", (0.05, 0.95), xycoords="axes fraction", va="top", fontsize=9)
    axes = new_axes(figure, 1, 3, 3)
    for (name, several), place, side in zip(moves.items(), ((4, -4), (-4, 4)), ("left", "right"), strict=True):
        rates, errors = [m.rate for m in several], [m.relative_error for m in several]
        axes.loglog(rates, errors, "o-", color=colours[name], lw=1.2, ms=3.5)
        middle = len(rates) // 2
        axes.annotate(
            name, (rates[middle], errors[middle]), place, textcoords="offset points",
            ha=side, va="top" if side == "left" else "bottom", color=colours[name], fontsize=9,
        )  # fmt: skip
    axes.axvline(several[0].rate, color=SUBTLE, lw=1, ls=":")
    axes.set_title("relative error", fontsize=10)
    axes.set(xlabel="learning rate η", box_aspect=1)
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=5))
    save(figure, path)


def power(value: float) -> str:
    """0.5, or 5 · 10^-5 as mathematics."""
    if value >= 1e-3:
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return rf"${mantissa} \cdot 10^{{{int(exponent)}}}$"


def displacement_caption(values: Mapping[str, Any]) -> str:
    return (
        "Displacement of the features by one step of plain gradient descent from the checkpoint, "
        f"{values['batch']} training images in float64: eq. (34) for the projector's last layer, eq. (32) for all "
        "parameters, against the step itself. Left and middle: a sample of the coordinates, at the longest step with "
        "a relative error below 10 %. Right: relative error against the length of the step; a slope of 1 is an "
        "absolute error that falls as η², down to rounding; where ReLUs switch, it falls slower, as η^1.5. Dotted: the "
        "run's learning rate."
    )


def toy_batch() -> tuple[Tensor, Tensor]:
    """Four samples, two views each, on the unit circle."""
    angle = torch.deg2rad(torch.tensor([30.0, 118.0, 205.0, 295.0], dtype=torch.float64))
    shift = torch.deg2rad(torch.tensor([30.0, 22.0, -34.0, 26.0], dtype=torch.float64))
    z1, z2 = (torch.stack([a.cos(), a.sin()], 1) for a in (angle - shift, angle + shift))
    return z1, z2


def plot_toy(path: Path) -> None:
    figure = Figure(figsize=(8.5, 3.1), layout="constrained")
    z1, z2 = toy_batch()
    panels = (("one batch", draw_forces), ("one row free", draw_field), ("after descent", draw_paths))
    for column, (title, draw) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 3, column)
        axes.set_title(title, fontsize=10)
        axes.set(aspect="equal", xlim=(-1.65, 1.65), ylim=(-1.65, 1.65))
        axes.axis("off")
        axes.add_patch(Circle((0, 0), 1, fill=False, color="#cccccc", lw=0.8))
        draw(axes, z1, z2)
    save(figure, path)


def draw_forces(axes: Axes, z1: Tensor, z2: Tensor) -> None:
    """Attraction outside of the circle and repulsion inside, so that they can be told apart."""
    parts = analysis.gradient_parts(z1, z2)
    z = torch.cat([z1, z2])
    for part, colour, radius in ((parts.attraction, POSITIVE, 1.15), (parts.repulsion, NEGATIVE, 0.85)):
        axes.quiver(*(radius * z).T, *(-part).T, color=colour, **ARROW, scale=0.25, scale_units="xy")
    draw_pairs(axes, z1, z2)
    for label, colour, height in (("attraction", POSITIVE, 0.12), ("repulsion", NEGATIVE, -0.12)):
        axes.text(0, height, label, color=colour, ha="center", va="center", fontsize=9)


ARROW: dict[str, Any] = {
    "angles": "xy",
    "width": 0.013,
    "headwidth": 3.5,
    "headlength": 3.5,
    "headaxislength": 3,
    "minlength": 0.5,
}


def draw_pairs(axes: Axes, z1: Tensor, z2: Tensor, **style: Any) -> None:
    for b, (first, second) in enumerate(zip(z1, z2, strict=True)):
        pair = torch.stack([first, second])
        axes.plot(*pair.T, "o", color=f"C{b}", ms=5, mec="white", mew=0.6, **style)


def draw_field(axes: Axes, z1: Tensor, z2: Tensor) -> None:
    """−∂L/∂z of the first row wherever it is, all others fixed."""
    angle = torch.linspace(0, 2 * math.pi, 25, dtype=torch.float64)[:-1]
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    grid = torch.cat([radius * ring[:: 2 if radius < 1 else 1] for radius in (0.6, 1.0, 1.4)])
    force = []
    for place in grid:
        moved = z1.clone()
        moved[0] = place
        force.append(-analysis.gradient_parts(moved, z2).total[0])
    axes.quiver(*grid.T, *torch.stack(force).T, color=INK, **(ARROW | {"width": 0.009}), scale=1.25, scale_units="xy")
    axes.plot(*torch.cat([z1[1:], z2[1:]]).T, "o", color=NEGATIVE, ms=5, mec="white", mew=0.6)
    axes.plot(*z2[0], "o", color=POSITIVE, ms=7, mec="white", mew=0.6)


def draw_paths(axes: Axes, z1: Tensor, z2: Tensor, rate: float = 0.5, steps: int = 400) -> None:
    path = [torch.cat([z1, z2])]
    for _ in range(steps):
        path.append(path[-1] - rate * analysis.gradient_parts(*path[-1].chunk(2)).total)
    track = torch.stack(path)
    for row in range(track.shape[1]):
        axes.plot(*track[:, row].T, color=f"C{row % len(z1)}", lw=1)
        axes.plot(*track[0, row], "o", mfc="white", mec=f"C{row % len(z1)}", ms=4)
    draw_pairs(axes, *track[-1].chunk(2))


def toy_caption() -> str:
    return (
        "Eight free rows in the plane (four samples, two views each; K = I). Left: descent along attraction and "
        "repulsion, which pull views of a sample together and push all other rows apart. Middle: −∂L/∂z of one row "
        "wherever it is, its other view in blue and six negatives in orange; it turns about the origin and falls as "
        "1/‖z‖. Right: paths of descent from hollow to filled; each step is tangent, so rows drift outward."
    )
