# SPDX-License-Identifier: Apache-2.0
"""Docs/performance.md's table of the torches that one wheel was tried beside."""

from __future__ import annotations

import json

from benchmarks.harness.tables import data_files, lines_of_table, machine_line, source_line

HEAD = [
    "torch",
    "Python",
    "CUDA kernels",
    "right",
    "wheel installed in",
    "import beyond torch",
    "first loss and gradient",
]


def every_torch() -> str:
    texts = []
    for path in data_files("every-torch"):
        data = json.loads(path.read_text())
        rows = []
        for r in sorted(data["results"], key=lambda r: [int(n) for n in r["torch"].split("+")[0].split(".")]):
            cuda = "loaded" if isinstance(r["cuda"], list) else "none in this torch"
            seconds = [
                f"{r[key]:.{digits}f} s" for key, digits in (("install_s", 1), ("import_s", 2), ("first_loss_s", 2))
            ]
            rows.append([r["torch"], r["python"], cuda, "yes" if r["ok"] else "**no**", *seconds])
        head = f"{machine_line(data)}. One wheel of {data['wheel_mb']:.1f} MB. {source_line(path, data)}."
        texts.append("\n".join([head, "", *lines_of_table(HEAD, rows)]))
    return "\n\n".join(texts) or "No data yet."
