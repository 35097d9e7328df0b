# SPDX-License-Identifier: Apache-2.0
"""One wheel beside every torch: installed into an environment of each, where it must give the reference's numbers.

    make wheel && .venv/bin/python benchmarks/every_torch.py 3.11:2.10.0 3.12:2.12.1 3.13:2.15.0

PYTHON:TORCH makes an environment with pip and deletes it; a path is the Python of an environment that has torch. Writes
benchmarks/results/<machine>/every-torch.json: versions, seconds that the wheel took to install, that mio_ext took to
import beyond torch, and from then to the first loss and gradient; the largest error; what was loaded.
Exit status 1 if anything differs from what is due.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from benchmarks.harness.paths import ROOT

#: Losses and gradients of both against the float64 reference, in a process that has the wheel alone.
PARITY = """
import json, platform, sys, time
import torch
begin = time.perf_counter()
import mio_ext
imported = time.perf_counter()
from mio_ext import library, mio_loss, siglip_loss
def run(loss, dtype, backend, *inputs):
    z = [t.to(dtype).requires_grad_() for t in inputs]
    value = loss(*z, backend=backend)
    return value, torch.cat([g.double() for g in torch.autograd.grad(value * 2.0**12, z)])
def siglip(x, y, backend): return siglip_loss(x, y, 10.0, -5.0, normalize=True, backend=backend)
def labelled(x, y, backend): return mio_loss(x, y, labels=torch.arange(len(x)) % 7, backend=backend)
views = torch.randn(2, 300, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
run(mio_loss, torch.float32, "cpu", *views)
first = time.perf_counter()
limits = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 4e-3, "float16": 2e-3}
worst = 0.0
for name, limit in limits.items():
    dtype = getattr(torch, name)
    inputs = views.to(dtype).double()
    for loss in (mio_loss, siglip, labelled):
        pairs = zip(run(loss, dtype, "cpu", *inputs), run(loss, torch.float64, "reference", *inputs))
        worst = max([worst, *(float((a.double() - b).norm() / b.norm()) / limit for a, b in pairs)])
x, y = views.float()
grad = torch.func.grad(lambda x: mio_loss(x, y))(x)
x = x.requires_grad_()
same = torch.equal(grad, torch.autograd.grad(mio_loss(x, y), x)[0])
try:
    torch.autograd.grad(torch.autograd.grad(mio_loss(x, y), x, create_graph=True)[0].sum(), x)
    refused = False
except RuntimeError as error:
    refused = "no second derivative" in str(error)
cuda = library.cuda_failure or torch.ops.mio_ext.cuda_versions()
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "file": mio_ext.__file__,
    "import_s": round(imported - begin, 3), "first_loss_s": round(first - imported, 3), "cuda": cuda,
    "error_of_limit": round(worst, 3), "torch_func": same, "second_derivative_refused": refused}))
"""


def python_of(item: str, folder: Path) -> str:
    """The Python of an environment with torch: the item's own, or one made in ``folder``."""
    if "/" in item:
        return item
    python, torch = item.split(":")
    subprocess.run([shutil.which(f"python{python}") or f"python{python}", "-m", "venv", str(folder)], check=True)
    made = str(folder / "bin" / "python")
    subprocess.run([made, "-m", "pip", "install", "--quiet", f"torch=={torch}"], check=True)
    return made


def try_one(item: str, wheel: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        python = python_of(item, Path(name) / "environment")
        target = Path(name) / "installed"
        begin = time.perf_counter()
        # --no-deps: torch is there, and no other is to come; numpy is not needed here.
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begin
        script = f"import sys; sys.path.insert(0, {str(target)!r})\n{PARITY}"
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=name)
        if done.returncode != 0:
            return {"environment": Path(item).name, "ok": False, "why": done.stderr.strip().splitlines()[-1]}
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        inside = row.pop("file").startswith(name)
        good = inside and row["error_of_limit"] <= 1 and row["torch_func"] and row["second_derivative_refused"]
        return {"ok": good, "install_s": round(seconds, 1), **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="+", metavar="PYTHON:TORCH or path")
    parser.add_argument("--wheel", type=Path, help="default: the one in dist/")
    parser.add_argument("--output", type=Path, help="default: in the machine's folder of results")
    args = parser.parse_args()
    wheel = args.wheel or next(iter(sorted(ROOT.glob("dist/*-py3-none-manylinux*.whl"))), None)
    if wheel is None:
        sys.exit("every_torch.py: there is no wheel in dist/; run: make wheel")
    rows = []
    for item in args.environments:
        rows.append(try_one(item, wheel.resolve()))
        print(json.dumps(rows[-1]), flush=True)
    head = machine.facts("cpu")
    head |= {"command": "python benchmarks/every_torch.py PYTHON:TORCH ...", "wheel_mb": wheel.stat().st_size / 1e6}
    path = machine.output_path(parser, args, head, "every-torch.json")
    machine.save(path, head, rows, as_csv=False)
    sys.exit(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    main()
