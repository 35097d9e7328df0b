# SPDX-License-Identifier: Apache-2.0
"""The search of MIO's and SimCLR's settings on the CPU, and their forces, as tables in Markdown, for report.py."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

from benchmarks.harness import tables
from benchmarks.harness.paths import RESULTS, ROOT

FOLDER = RESULTS / "amd-epyc-2-threads"
NAMES = {"mio": "MIO", "simclr": "SimCLR"}


def lines_of(name: str) -> list[dict[str, Any]]:
    path = FOLDER / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def by_setting(name: str) -> dict[str, list[dict[str, Any]]]:
    settings: dict[str, list[dict[str, Any]]] = {}
    for line in lines_of(name):
        settings.setdefault(line["setting"], []).append(line)
    return settings


def label(options: dict[str, Any]) -> list[str]:
    weight = f"{options['negative_weight']:g}, {options['bias']:g}" if options["objective"] == "mio" else "–"
    return [NAMES[options["objective"]], f"{options['temperature']:g}", weight, f"{options['learning_rate']:g}"]


def mean_error(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {standard_error(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def search() -> str:
    """The tries, one seed each, and the chosen ones again with fresh seeds."""
    head = ["loss", "τ", "ω, b", "learning rate", "20-NN", "linear"]
    tries = sorted(lines_of("search-grid"), key=lambda line: -line["knn"])
    common = tries[0]["options"]
    parts = [
        f"CIFAR-10 (JPEG), {round(50_000 * common['subset']):,} training images, ResNet-18 at a quarter of its width, "
        f"7x7 stem, {common['epochs']} epochs, batch {common['batch_size']}; accuracy in % on 10,000 "
        "held-out *training* images with the labels of 5,000 others. One seed a try, "
        "`python train/sweep.py train/sweeps/cpu-grid.toml`, data in "
        f"`{(FOLDER / 'search-grid.jsonl').relative_to(ROOT)}`:",
        "\n".join(
            tables.lines_of_table(
                head, [[*label(t["options"]), f"{t['knn']:.1f}", f"{t['linear']:.1f}"] for t in tries]
            )
        ),
    ]
    if fresh := by_setting("search-seeds"):
        rows = []
        for group in sorted(fresh.values(), key=lambda g: -statistics.fmean(line["knn"] for line in g)):
            scores = [mean_error([line[key] for line in group]) for key in ("knn", "linear")]
            rows.append([*label(group[0]["options"]), str(len(group)), *scores])
        head.insert(4, "seeds")
        parts += [
            "And with seeds that chose nothing, mean ± standard error over them, "
            "`python train/sweep.py train/sweeps/cpu-seeds.toml`:",
            "\n".join(tables.lines_of_table(head, rows)),
            *difference(fresh),
        ]
    return "\n\n".join([*parts, *digits()])


def readme_search() -> str:
    """The difference alone."""
    return (
        "Pre-training's default on photos, MIO with a weight on the negatives, beside SimCLR in a small search on the "
        f"CPU ([docs](docs/training.md#which-weight-of-the-negatives)): {difference(by_setting('search-seeds'))[0]}"
    )


def digits() -> list[str]:
    """The paper's weight of the negatives and the other on the test images of digits."""
    keys = ("linear_2", "linear_10", "linear_all", "knn")
    rows = [
        [*label({"learning_rate": 0.5} | group[0]["options"])[:3], str(len(group))]
        + [mean_error([line["test"][key] for line in group]) for key in keys]
        for group in by_setting("search-digits").values()
    ]
    head = ["loss", "τ", "ω, b", "seeds", "linear, 2 labels a class", "10 labels a class", "all labels", "20-NN"]
    text = "On digits, `python train/sweep.py train/sweeps/digits.toml`, accuracy in % on the test split:"
    return [text, "\n".join(tables.lines_of_table(head, rows))] if rows else []


def difference(fresh: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The best MIO against the best SimCLR, seed by seed."""
    best: dict[str, list[dict[str, Any]]] = {}
    for group in fresh.values():
        name = group[0]["options"]["objective"]
        if name not in best or statistics.fmean(x["knn"] for x in group) > statistics.fmean(
            x["knn"] for x in best[name]
        ):
            best[name] = group
    if len(best) < 2:
        return []
    ours, theirs = ({line["seed"]: line for line in best[name]} for name in ("mio", "simclr"))
    both = sorted(set(ours) & set(theirs))
    found = [
        f"{mean_error([ours[seed][key] - theirs[seed][key] for seed in both])} by {name}"
        for key, name in (("knn", "20-NN"), ("linear", "linear probe"))
    ]
    return [f"MIO minus SimCLR, seed by seed (n = {len(both)}): {' and '.join(found)}."] if both else []


def forces() -> str:
    """Two losses at equal embeddings."""
    data = json.loads((FOLDER / "forces.json").read_text())
    first = next(iter(data["losses"].values()))["norm"]
    rows = [
        [
            name,
            f"{values['norm'] / first:.2f}",
            f"{values['cosine']:.2f}",
            f"{100 * values['hardest']:.0f} %",
            f"{100 * values['push spread']:.0f} %",
        ]
        for name, values in data["losses"].items()
    ]
    head = [
        "loss",
        "length of the gradient, NT-Xent = 1",
        "its cosine with NT-Xent's",
        "of the push, from a row's hardest 5 %",
        "spread of the push over rows",
    ]
    return "\n".join(tables.lines_of_table(head, rows))
