# SPDX-License-Identifier: Apache-2.0
"""Puts the figures of the committed data files into README.md, between its markers.

python benchmarks/report.py            # rewrite the tables
python benchmarks/report.py --check    # exit 1 if README.md says anything else than the data
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ORDER = ["mio_ext", "eager", "torch.compile", "open_clip"]


def milliseconds(value: float) -> str:
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB" if value < 1e7 else f"{value / 1e6:.0f} MB"


def loss_table(path: Path) -> str:
    """One row per case: time and peak memory of every contender, and how many times slower it is."""
    data = json.loads(path.read_text())
    cases: dict[tuple, dict] = {}
    for row in data["results"]:
        cases.setdefault((row["loss"], row["rows"], row["dim"]), {})[row["contender"]] = row
    lines = [
        f"{data['device']}, {data['threads']} threads, {data['instruction_set']}, torch {data['torch']}, "
        f"{data['date']}. float32, forward + backward, medians; `{data['command']}`, "
        f"data in `{path.relative_to(ROOT)}`.",
        "",
        "| loss | size | " + " | ".join(ORDER) + " |",
        "|---|---|" + "---|" * len(ORDER),
    ]
    for (loss, rows, dim), contenders in cases.items():
        ours = contenders["mio_ext"]["median_ms"]
        cells = []
        for name in ORDER:
            row = contenders.get(name)
            if row is None:
                cells.append("–")
                continue
            ratio = "" if name == "mio_ext" else f" ({row['median_ms'] / ours:.1f}×)"
            cells.append(f"{milliseconds(row['median_ms'])}{ratio}, {megabytes(row['peak_memory_bytes'])}")
        size = f"{'N' if loss == 'mio' else 'B'} = {rows:,}, D = {dim}"
        lines.append(f"| {'MIO' if loss == 'mio' else 'SigLIP'} | {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def digits_table(path: Path) -> str:
    """What the default pre-training run learnt."""
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


def rendered(text: str) -> str:
    tables = {
        "loss": "\n\n".join(loss_table(p) for p in sorted(RESULTS.glob("*/loss.json"))),
        "digits": "\n\n".join(digits_table(p) for p in sorted(RESULTS.glob("*/digits.json"))),
    }
    for name, table in tables.items():
        pattern = rf"(<!-- {name}: benchmarks/report.py -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(pattern, lambda m, t=table: m[1] + t + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md needs exactly one place for the table {name!r}")
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = rendered(text)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md and the data differ; run: python benchmarks/report.py" if new != text else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
