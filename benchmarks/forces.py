# SPDX-License-Identifier: Apache-2.0
"""How MIO and NT-Xent pull and push the same embeddings, pair by pair, for docs/theory.md.

    python benchmarks/forces.py RUN       # embeddings of a run of train/pretrain.py; writes the data and the figure
    python benchmarks/forces.py           # the figure anew from the data

Everything is measured on batches of the run's own size, two fresh views of training images, batch norm in train mode.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness.paths import RESULTS  # noqa: E402
from mio_ext.reference import normalized, softplus  # noqa: E402

DATA = RESULTS / "amd-epyc-2-threads" / "forces.json"
FIGURE = ROOT / "docs" / "figures" / "forces.png"
EDGES = torch.linspace(-0.6, 1.0, 33, dtype=torch.float64)  #: of the bins of cosines
BATCHES = 16
HARDEST = 0.05  #: share of a row's negatives


def nt_xent(tau: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        logits = torch.where(positive | negative, s / tau, -math.inf)
        return F.cross_entropy(logits, positive.int().argmax(1))

    return loss


def mio(tau: float, weight: float, bias: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Eq. (3), (4) and (6) without the regulariser."""

    def loss(s: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        logits = s / tau + bias
        return softplus(-logits[positive]).mean() + weight * softplus(logits[negative]).mean()

    return loss


def losses(n: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What is compared, for batches of n rows."""
    return {
        "NT-Xent, τ = 0.2": nt_xent(0.2),
        "MIO, τ = 0.5 (the paper's)": mio(0.5, 1.0, 0.0),
        "MIO, τ = 0.2": mio(0.2, 1.0, 0.0),
        "MIO, τ = 0.2, ω = 20, b = −log ω": mio(0.2, 20.0, -math.log(20.0)),
        "MIO, τ = 0.2, ω = N − 2, b = −log ω": mio(0.2, n - 2.0, -math.log(n - 2.0)),
    }


def measure(run: Path) -> dict[str, Any]:
    from train.assemble import load_run
    from train.config import load_config
    from train.data import generator_for

    config = load_config(run)
    setup = load_run(run, "cpu", None, None)
    setup.model.train()
    assert setup.data.train is not None
    images, batch = setup.data.train.images, config.batch_size
    n = 2 * batch
    index = torch.arange(n)
    positive = (index[:, None] + batch) % n == index
    negative = ~positive & ~torch.eye(n, dtype=torch.bool)
    sums: dict[str, dict[str, Any]] = {}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    for step in range(BATCHES):
        rows = images[order[step * batch : (step + 1) * batch]]
        with torch.no_grad():
            views = setup.preprocess.views(torch.cat([rows, rows]), generator_for(setup.device, 1, step))
            z = setup.model(views).double()
        gradients = {}
        for name, loss in losses(n).items():
            leaf = z.clone().requires_grad_()
            unit = normalized(leaf)
            s = unit @ unit.T
            s.retain_grad()
            loss(s, positive, negative).backward()
            assert leaf.grad is not None and s.grad is not None
            gradients[name] = leaf.grad
            force = (s.grad + s.grad.T) / 2  # every pair stands twice in the sums
            add(sums.setdefault(name, {}), s.detach(), force, positive, negative, leaf.grad)
        base = gradients[next(iter(gradients))]
        for name, gradient in gradients.items():
            cosine = F.cosine_similarity(gradient.flatten(), base.flatten(), dim=0)
            sums[name]["cosine"] = sums[name].get("cosine", 0.0) + float(cosine)
    return {
        "command": "python benchmarks/forces.py RUN",
        "run": {k: getattr(config, k) for k in ("objective", "temperature", "epochs", "batch_size", "width", "seed")},
        "batches": BATCHES,
        "rows": n,
        "cosines": ((EDGES[1:] + EDGES[:-1]) / 2).tolist(),
        "losses": {name: means(values, n) for name, values in sums.items()},
    }


def add(sums: dict[str, Any], s: Tensor, force: Tensor, positive: Tensor, negative: Tensor, gradient: Tensor) -> None:
    """Into ``sums``: pull and push by cosine, the share of the hardest negatives, the length of the gradient."""
    for name, pairs in (("pull", positive), ("push", negative)):
        place = torch.bucketize(s[pairs], EDGES) - 1
        inside = (place >= 0) & (place < len(EDGES) - 1)
        total = torch.zeros(len(EDGES) - 1, dtype=torch.float64)
        count = total.clone()
        total.index_add_(0, place[inside], force[pairs].abs()[inside])
        count.index_add_(0, place[inside], torch.ones_like(force[pairs][inside]))
        sums[name] = sums.get(name, 0) + total
        sums[f"{name} pairs"] = sums.get(f"{name} pairs", 0) + count
    push = (force.abs() * negative).sum(1)
    hardest = torch.where(negative, s, -math.inf).topk(round(HARDEST * len(s)), dim=1).indices
    share = force.abs().gather(1, hardest).sum(1) / push
    sums["hardest"] = sums.get("hardest", 0.0) + float(share.mean())
    sums["push spread"] = sums.get("push spread", 0.0) + float(push.std() / push.mean())
    sums["norm"] = sums.get("norm", 0.0) + float(gradient.norm())


def means(sums: dict[str, Any], n: int) -> dict[str, Any]:
    """Forces as multiples of a pair's even share: 1/N of a positive one, 1/(N(N − 2)) of a negative one."""

    def per_pair(name: str, share: float) -> list[float | None]:
        count = sums[f"{name} pairs"]
        values = (sums[name] / count.clamp(min=1) / share).tolist()
        return [round(v, 5) if c >= 30 else None for v, c in zip(values, count.tolist(), strict=True)]

    single = {name: round(sums[name] / BATCHES, 5) for name in ("hardest", "push spread", "norm", "cosine")}
    return {"pull": per_pair("pull", 1 / n), "push": per_pair("push", 1 / (n * (n - 2))), **single}


def draw(data: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, values in data["losses"].items():
        style = {"color": "black", "linewidth": 2.5} if name.startswith("NT") else {"linewidth": 1.6}
        for axis, key in zip(axes, ("push", "pull"), strict=True):
            points = [(c, v) for c, v in zip(data["cosines"], values[key], strict=True) if v is not None]
            axis.plot(*zip(*points, strict=True), label=name, **style)
    axes[0].set(title="push of a negative pair, N(N − 2) times", xlabel="its cosine", yscale="log")
    axes[1].set(title="pull of a positive pair, N times", xlabel="its cosine", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="run folder whose embeddings are looked at")
    args = parser.parse_args()
    if args.run is not None:
        DATA.write_text(json.dumps(measure(args.run), indent=1) + "\n")
    data = json.loads(DATA.read_text())
    draw(data, FIGURE)
    for name, values in data["losses"].items():
        print(name, {key: values[key] for key in ("norm", "cosine", "hardest", "push spread")})


if __name__ == "__main__":
    main()
