# SPDX-License-Identifier: Apache-2.0
"""How good the encoder of a run is, before and after training: the table, the results file, the plots."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from train.assemble import Setup
from train.config import Config
from train.features import Features, PairCosines, extract_features, labelled_features, pair_cosines, pixel_features
from train.probes import evaluate_features, format_table, label_budgets
from train.run_folder import COSINE_PLOT, EMBEDDING_PLOT, LOSS_PLOT, RESULTS, RunLog, first_line, write_atomically


class Snapshot(NamedTuple):
    """What is compared before and after training, all with batch norm in eval mode."""

    features: Features  #: of the backbone, before the projector
    cosines: PairCosines  #: of the embeddings of two views of test images


def take_snapshot(setup: Setup) -> Snapshot:
    """Needs labels. The views are the same before and after."""
    data, model, preprocess = setup.data, setup.model, setup.preprocess
    assert data.train is not None and data.test is not None
    generator = torch.Generator(setup.device).manual_seed(0)
    features = labelled_features(model.backbone, data.train, data.test, preprocess.plain, setup.device, setup.bfloat16)
    images = data.test.images[:1000]
    z1, z2 = (extract_features(model, images, lambda x: preprocess.views(x, generator), setup.device) for _ in range(2))
    return Snapshot(features, pair_cosines(z1, z2))


def save_plots(history: list[dict[str, Any]], before: Snapshot, after: Snapshot, folder: Path) -> None:
    """A picture is a comfort: where matplotlib is missing or cannot draw, a line says so."""
    try:
        draw_plots(history, before, after, folder)
    except ImportError as error:
        print(f"no plots: {error} (pip install matplotlib)", file=sys.stderr)
    except Exception as error:  # a backend that is none, LaTeX that is missing
        print(f"not all plots could be drawn: {first_line(error)}", file=sys.stderr)


def draw_plots(history: list[dict[str, Any]], before: Snapshot, after: Snapshot, folder: Path) -> None:
    from train import plots

    if history:
        plots.plot_loss(history, folder / LOSS_PLOT)
    if len(after.features.test) < 3:
        return  # no pairs of images, or nothing to arrange
    plots.plot_cosines(before.cosines, after.cosines, folder / COSINE_PLOT)
    features, labels = after.features.test[:2000].cpu(), after.features.test_labels[:2000].cpu()
    plots.plot_embedding(features, labels, folder / EMBEDDING_PLOT)


def finish(
    config: Config, setup: Setup, folder: Path, log: RunLog, before: Snapshot, times: dict[str, float], epoch: int
) -> None:
    """Score the encoder beside raw pixels and itself untrained, and draw the plots."""
    data = setup.data
    assert data.train is not None and data.test is not None
    print("scoring raw pixels, the untrained and the pre-trained encoder", flush=True)
    after = take_snapshot(setup)
    labels = after.features.train_labels
    budgets = label_budgets(len(labels), len(labels.unique()))
    rows = {}
    rows["raw pixels"] = evaluate_features(
        pixel_features(data.train, data.test, setup.preprocess.size, setup.device), budgets=budgets
    )
    rows["untrained encoder"] = evaluate_features(before.features.to(labels.device), budgets=budgets)
    rows["pre-trained encoder"] = evaluate_features(after.features, budgets=budgets)
    log.write("results", rows=rows, **times)
    results = json.dumps({"rows": rows, **times, "config": asdict(config)}, indent=2)
    write_atomically(folder / RESULTS, lambda path: path.write_text(results + "\n"))
    n = len(after.features.test)
    print(format_table(rows, f"accuracy in % on {n} held-out test images, after epoch {epoch}"), flush=True)
    save_plots(log.history, before, after, folder)
