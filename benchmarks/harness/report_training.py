# SPDX-License-Identifier: Apache-2.0
"""What pre-training runs learnt, as tables in Markdown, for report.py."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness import tables
from benchmarks.harness.paths import ROOT


def readme_digits() -> str:
    """What the default pre-training run learnt."""
    return "\n\n".join(digits_table(path) for path in tables.data_files("digits"))


def digits_table(path: Path) -> str:
    data = json.loads(path.read_text())
    lines = [
        f"`python train/pretrain.py`: ResNet-18 on scikit-learn's digits, {data['config']['epochs']} epochs, "
        f"seed {data['config']['seed']}; accuracy in % on the held-out test split, "
        f"few-label columns mean ± std over the same random draws; data in `{path.relative_to(ROOT)}`.",
        "",
        "| encoder | linear, 2 labels a class | 10 labels a class | all labels | 20-NN |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["rows"].items():
        few = [f"{row[f'linear_{n}']:.1f} ± {row[f'linear_{n}_std']:.1f}" for n in (2, 10)]
        lines.append(f"| {name} | {few[0]} | {few[1]} | {row['linear_all']:.1f} | {row['knn']:.1f} |")
    return "\n".join(lines)


def readme_cifar() -> str:
    """MIO beside SimCLR on real photos."""
    parts = [sweep_table(path) for path in tables.data_files("training")]
    return "\n\n".join([*parts, *(cifar_table(path) for path in tables.data_files("cifar10-jpeg"))])


def cifar_table(path: Path) -> str:
    data = json.loads(path.read_text())
    mio, simclr = data["mio"], data["simclr"]
    lines = [
        f"CIFAR-10 (JPEG): the {mio['images']:,} training images re-encoded as JPEG, {mio['config']['epochs']} epochs "
        f"at a setting small enough for a CPU ({mio['cpu_seconds'] / 60:.0f} minutes of one core), one run each, "
        f"seed {mio['config']['seed']} (n = 1), SimCLR with the same views, network and schedule; accuracy in % on "
        # The preset has a weight on the negatives by now, which the objective alone has not.
        f"10,000 test images. `{mio['command'].replace('--preset mio ', '--objective mio ')}`, data in "
        f"`{path.relative_to(ROOT)}`.",
        "",
        "| encoder | linear, 1 % of the labels | 10 % | all labels | 20-NN |",
        "|---|---|---|---|---|",
    ]
    rows = {name: mio["rows"][name] for name in ("raw pixels", "untrained encoder")}
    rows |= {name: run["rows"]["pre-trained encoder"] for name, run in (("MIO", mio), ("SimCLR", simclr))}
    for name, row in rows.items():
        few = [f"{row[f'linear_{n}']:.1f} ± {row[f'linear_{n}_std']:.1f}" for n in (50, 500)]
        lines.append(f"| {name} | {few[0]} | {few[1]} | {row['linear_all']:.1f} | {row['knn']:.1f} |")
    return "\n".join(lines)


def sweep_table(path: Path) -> str:
    """Several losses with one network, schedule and number of epochs, side by side on one card."""
    data = json.loads(path.read_text())
    runs, alone = data["results"], data["alone"]["images_per_second"]
    rows = []
    for r in runs:
        temperature = f"{r['temperature']:g}" + (" at first, learnt" if r["learn_scale"] else "")
        name = {"mio": "MIO", "simclr": "SimCLR"}[r["objective"]]
        rows.append([name, temperature, f"{r['knn']:.1f}", f"{r['rankme']:.0f}", f"{r['images_per_second']:,.0f}"])
    together = sum(r["images_per_second"] for r in runs)
    text = (
        f"{tables.machine_line(data)}. ResNet-18 on CIFAR-10 (JPEG), {runs[0]['epochs']} epochs, batch "
        f"{runs[0]['batch_size']}, seed {runs[0]['seed']}, one run each (n = {data['n']}); 20-NN: accuracy in % on "
        f"10,000 test images. A run alone takes {min(alone):,.0f} to {max(alone):,.0f} images/s, the "
        f"{len(runs)} side by side {together:,.0f}; {tables.source_line(path, data)}, with `--objective` and "
        "`--temperature` of the row, one log each beside it."
    )
    head = ["loss", "temperature", "20-NN", "RankMe at the end", "images/s, side by side"]
    return "\n".join([text, "", *tables.lines_of_table(head, rows)])
