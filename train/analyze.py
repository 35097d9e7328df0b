# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""Draw what docs/theory.md derives, for a run: a page of figures and the numbers behind them.

    .venv/bin/python train/analyze.py RUN

Writes analysis.md (the page), its figures analysis-*.png and analysis.json into the run folder. The norms of
attraction and repulsion come from the run's log, everything else from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from train.packages import require_packages

require_packages("analyze.py")

import torch
import torch.nn.functional as F
from torch import Tensor

import mio_ext
from mio_ext import analysis
from train.assemble import Setup, load_run
from train.command_line import OneLineParser
from train.config import Config, load_config
from train.device import is_out_of_memory, versions
from train.displacement import Batch, last_layer_displacements, network_displacements
from train.errors import UserError
from train.features import PairCosines, extract_features, pair_cosines
from train.model import PretrainModel, build_model
from train.run_folder import ANALYSIS_DATA, ANALYSIS_PAGE, LOG, read_log, write_atomically

NORMS = ("attraction_norm", "repulsion_norm", "regularizer_norm", "gradient_norm")
FRACTIONS = tuple(10.0**-k for k in range(7))  #: of the run's learning rate: the steps whose displacement is measured
LAST_LAYER = "last layer"
NETWORK = "whole network"


def best_affine_critic(cosines: PairCosines) -> tuple[float, float]:
    """(a, b) of the critic a·s + b with the lowest L_pos + L_neg on these pairs; a convex problem in two numbers."""
    positive, negative = cosines.positive.double(), cosines.negative.double()
    critic = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([critic], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        a, b = critic
        value = F.softplus(-(a * positive + b)).mean() + F.softplus(a * negative + b).mean()
        value.backward()
        return value

    optimizer.step(loss)
    a, b = critic.tolist()
    return a, b


def information(cosines: PairCosines, scale: float, bias: float) -> float:
    """Eq. (18) for the critic scale·s + bias, in nats."""
    positive, negative = cosines.positive.double(), cosines.negative.double()
    terms = F.softplus(-(scale * positive + bias)).mean() + F.softplus(scale * negative + bias).mean()
    return math.log(2) - float(terms) / 2


def view_cosines(setup: Setup, model: PretrainModel, images: Tensor) -> PairCosines:
    """Of two random views of at most 1,000 images, batch norm in eval mode."""
    generator = torch.Generator(setup.device).manual_seed(0)
    z1, z2 = (
        extract_features(model, images[:1000], lambda x: setup.preprocess.views(x, generator), setup.device)
        for _ in range(2)
    )
    return pair_cosines(z1, z2)


def measured_information(config: Config, setup: Setup, loss: Mapping[str, float]) -> tuple[dict[str, Any], PairCosines]:
    """How much the run's critic finds on held-out pairs, how much the best critic of a cosine, and the ceiling."""
    scale, bias = 1 / loss["temperature"], loss["bias"]
    if weight := loss.get("negative_weight"):
        bias += math.log(weight)  # the critic of the fair coin, eq. (36)
    a, b = best_affine_critic(view_cosines(setup, setup.model, setup.data.pretrain))
    held_out = setup.data.pretrain if setup.data.test is None else setup.data.test.images
    if len(held_out) < 2:
        raise UserError(f"{setup.data.name} has a single test image, and information is that of pairs")
    cosines = view_cosines(setup, setup.model, held_out)
    values = {
        "images": len(cosines.positive),
        "split": "training images" if setup.data.test is None else "test images",
        "critic": {"scale": scale, "bias": bias, "js_estimate": information(cosines, scale, bias)},
        "best_affine": {"scale": a, "bias": b, "js_estimate": information(cosines, a, b)},
        "ceiling": analysis.js_ceiling(loss["temperature"], bias, len(cosines.positive)),
        "training_ceiling": analysis.js_ceiling(loss["temperature"], bias, config.batch_size),
        "log_2": math.log(2),
    }
    return values, cosines


def untrained_like(config: Config, setup: Setup) -> PretrainModel:
    """The network that the run started from."""
    torch.manual_seed(config.seed)
    about = setup.architecture
    shape = config.stem_padding, about["image_size"], config.width
    return build_model(config.backbone, about["channels"], about["stem"], config.projector, *shape).to(setup.device)


def at_step_0(batch: Batch, model: PretrainModel) -> dict[str, float]:
    """What the log holds for later steps, of the untrained network."""
    z = batch.embed(model)
    parts = batch.gradient_parts(z)
    _, stats = mio_ext.mio_loss(*z.chunk(2), **batch.loss, return_stats=True)
    values = [*(float(part.norm()) for part in parts), float(parts.total.norm())]
    return {"step": 0, "js_estimate": float(analysis.js_estimate(stats)), **dict(zip(NORMS, values, strict=True))}


def history(run: Path, first: dict[str, float]) -> dict[str, list[float]]:
    """Step, norms and JS estimate over training."""
    entries = [entry for entry in read_log(run / LOG) if entry["event"] == "train"]
    if not entries or any(name not in entries[0] for name in NORMS):
        raise UserError(f"{run / LOG} holds no norms of attraction and repulsion: the run is older than this script")
    return {name: [entry[name] for entry in (first, *entries)] for name in first}


def at_the_end(batch: Batch, model: PretrainModel) -> dict[str, float]:
    """How the parts of the gradient compare once trained, on the same batch."""
    attraction, repulsion, regularizer = parts = batch.gradient_parts(batch.embed(model))
    pull = attraction + regularizer
    return {
        "regularizer_to_attraction": float(regularizer.norm() / attraction.norm()),
        "total_to_attraction": float(parts.total.norm() / attraction.norm()),
        "cosine_of_pull_and_repulsion": float((pull * repulsion).sum() / (pull.norm() * repulsion.norm())),
    }


def load_loss(config: Config, setup: Setup, run: Path) -> dict[str, float]:
    """The arguments of ``mio_loss``, learnt ones as they are at the checkpoint."""
    if config.objective != "mio":
        raise UserError(f"{run} minimised {config.objective}: the closed forms of docs/theory.md are those of mio")
    if config.views > 2 or config.negative_temperature is not None:
        raise UserError(
            f"{run} had more views or temperatures than one critic of two views, which the closed forms are of"
        )
    temperature, bias = (float(value) for value in setup.objective.critic())
    numbers = {"temperature": temperature, "bias": bias, "regularizer": config.regularizer}
    return numbers | ({"negative_weight": config.negative_weight} if config.negative_weight != 1 else {})


def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="analyze.py", description="Draw the closed forms of docs/theory.md for a run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--data", help="where a folder of images is now, as folder:PATH; default: as in the run")
    parser.add_argument("--data-root", help="where the data set is; default: as in the run")
    parser.add_argument("--images", type=int, default=256, help="batch whose displacement is measured, at most (256)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    if args.images < 2:
        raise UserError(f"--images must be at least 2, got {args.images}")
    try:
        from train import analysis_plots
    except ImportError as error:
        raise UserError(f"{error} (pip install matplotlib)") from error
    config = load_config(args.run)
    setup = load_run(args.run, args.device, args.data, args.data_root)
    loss = load_loss(config, setup, args.run)
    batch, model = Batch(config, setup, loss, min(args.images, config.batch_size)), setup.model
    series = history(args.run, at_step_0(batch, untrained_like(config, setup)))
    found, cosines = measured_information(config, setup, loss)
    rates = [config.learning_rate * fraction for fraction in FRACTIONS]
    moves = {
        LAST_LAYER: last_layer_displacements(batch, model, rates),
        NETWORK: network_displacements(batch, model, rates),
    }
    values = {
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions(setup.device),
        "batch": len(batch.views) // 2,
        "loss": loss,
        "end": at_the_end(batch, model),
        "information": found,
        "displacement": {
            name: [{"rate": m.rate, "r2": m.r2, "relative_error": m.relative_error} for m in several]
            for name, several in moves.items()
        },
        "history": series,
    }
    page = analysis_plots.draw_page(args.run, values, cosines, moves)
    write_atomically(args.run / ANALYSIS_DATA, lambda path: path.write_text(json.dumps(values, indent=1) + "\n"))
    write_atomically(args.run / ANALYSIS_PAGE, lambda path: path.write_text(page, encoding="utf-8"))
    print(page.split("![")[0].strip())
    print(f"\nfigures and numbers: {args.run / ANALYSIS_PAGE}")


def run(argv: Sequence[str] | None = None) -> int:
    try:
        main(argv)
    except UserError as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("analyze.py: out of memory: try fewer --images", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
