# SPDX-License-Identifier: Apache-2.0
"""How exact are the backends and their peers, over temperature, logit scale and type?

    python benchmarks/accuracy.py                # CPU or GPU, whatever is there

Relative errors of the loss and of its gradient (both inputs, as one vector) against the float64 reference on the very
same features. Writes benchmarks/results/<device>/accuracy.json and .csv; with any option it writes to
build/benchmarks/ instead, unless told by --output.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.contenders import LOSSES, NT_XENT, Loss, backends, contenders, features, own, step
from benchmarks.harness.machine import device_type, facts, output_path, save
from benchmarks.harness.report_steps import accuracy_tables
from benchmarks.harness.tables import text_table

SCALES = {"mio": [1 / t for t in (0.01, 0.03, 0.1, 0.3, 1.0)], "siglip": [1.0, 3.0, 10.0, 30.0, 100.0]}
DTYPES = ["float64", "float32", "bfloat16", "float16"]


def errors(function: Loss, leaves: Any, scale: float, true: torch.Tensor, gradient: torch.Tensor) -> dict[str, Any]:
    try:
        value = step(function, leaves, scale, gradient=True).double()
        found = torch.cat([leaf.grad.double().flatten() for leaf in leaves])
    except Exception as error:
        return {"status": "failed", "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    result = {
        "loss_error": (abs(value - true) / abs(true)).item(),
        "gradient_error": ((found - gradient).norm() / gradient.norm()).item(),
    }
    if not all(map(math.isfinite, result.values())):
        return {"status": "not finite", "reason": f"loss {value.item()}, gradient norm {found.norm().item()}"}
    return {"status": "ok"} | {k: float(f"{v:.3g}") for k, v in result.items()}


def measure(loss: str, dtype: str, rows: int, dim: int, device: str) -> list[dict[str, Any]]:
    torch.compiler.reset()
    functions = {name: f for name, f in contenders(loss, device)[0].items() if name != NT_XENT}
    functions["mio_ext reference"] = own(loss, "reference")
    if dtype == "float64":  # the reference is what is exact; peers are not made for it
        functions = {f"mio_ext {backend}": own(loss, backend) for backend in backends(device)}
    out = []
    for scale in SCALES[loss]:
        x, y = features(loss, rows, dim, getattr(torch, dtype), device)
        wide = (x.double().requires_grad_(), y.double().requires_grad_())
        true = step(own(loss, "reference"), wide, scale, gradient=True)
        gradient = torch.cat([leaf.grad.flatten() for leaf in wide if leaf.grad is not None])
        for name, function in functions.items():
            leaves = (x.detach().clone().requires_grad_(), y.detach().clone().requires_grad_())
            row = {"loss": loss, "scale": round(scale, 4), "rows": rows, "dim": dim, "dtype": dtype, "contender": name}
            out.append(row | errors(function, leaves, scale, true, gradient))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="N of MIO, B of SigLIP (default 512)")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--budget", type=float, default=180, help="seconds for everything (default 180)")
    parser.add_argument("--output", type=Path, help="data file (default as above)")
    args = parser.parse_args()
    device = device_type()
    head = facts(device) | {"budget_seconds": args.budget}
    deadline = time.monotonic() + args.budget
    rows, late = [], []
    for dtype in DTYPES:
        for loss in LOSSES:
            if time.monotonic() > deadline:
                late.append(f"{loss}, {dtype}")
                continue
            found = measure(loss, dtype, args.rows, args.dim, device)
            rows += found
            for row in found:
                print(*(f"{row.get(k, '')!s:<20}" for k in ("loss", "scale", "dtype", "contender", "status")), end=" ")
                print(row.get("loss_error"), row.get("gradient_error"), row.get("reason", ""), flush=True)
    head["over_budget"] = late
    save(output_path(parser, args, head, "accuracy"), head, rows)
    print("\nrelative error of the loss / of the gradient")
    for table in accuracy_tables(rows):
        print(f"\n{text_table(*table)}")


if __name__ == "__main__":
    main()
