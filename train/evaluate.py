# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""Score the encoder of a run on the labels of its data set.

    .venv/bin/python train/evaluate.py RUN [RUN ...] --protocol knn|linear|finetune|v1

The encoder is that of the run's last checkpoint; --help says what the protocols do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from train.packages import require_packages

require_packages("evaluate.py")

from train import classifier, probes
from train.assemble import Setup, load_run
from train.augment import Preprocess
from train.card import write_card
from train.command_line import OneLineParser
from train.errors import UserError
from train.features import Features, labelled_features
from train.run_folder import CARD, ENCODER, LOG, write_atomically

PROTOCOLS = """protocols:
  knn       the 20 nearest training images by cosine vote; nothing is trained; seconds
  linear    frozen features: linear classifiers on few and on all labels, settings chosen on held-out training
            images, and knn
  finetune  encoder and a linear head trained together, 50 epochs; --labels 0.1 for a tenth of the labels
  v1        the linear evaluation of the paper's public code: frozen encoder, augmented images, 100 epochs, the
            epoch chosen on a fifth of the training images
The test images are scored once. Each run folder gets evaluation-<protocol>.json, and its card a line.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="evaluate.py",
        description="Score the encoders of runs on held-out images.",
        epilog=PROTOCOLS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; of several, one table")
    parser.add_argument("--protocol", choices=("knn", "linear", "finetune", "v1"), default="linear", help="(linear)")
    parser.add_argument("--data", help="where a folder of images is now, as folder:PATH; default: as in the run")
    parser.add_argument("--data-root", help="where the data set is; default: as in the run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--labels", type=float, default=1.0, help="share of the labels that finetune uses (1)")
    parser.add_argument("--epochs", type=int, help="of finetune and v1; default: as in the protocol")
    parser.add_argument("--eval-batch-norm", action="store_true", help="v1 with the encoder's batch norm in eval mode")
    args = parser.parse_args(argv)
    if not 0 < args.labels <= 1:
        raise UserError(f"--labels must be in (0, 1], got {args.labels}")
    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs must be at least 1, got {args.epochs}")
    return args


def frozen_features(setup: Setup) -> Features:
    data = setup.data
    assert data.train is not None and data.test is not None
    return labelled_features(
        setup.model.backbone, data.train, data.test, setup.preprocess.plain, setup.device, setup.bfloat16
    )


def classify(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    """The protocols that run images through the encoder."""
    data, plain = setup.data, setup.preprocess
    assert data.train is not None and data.test is not None
    finetune = args.protocol == "finetune"
    settings = classifier.FINETUNE if finetune else classifier.V1
    changes: dict[str, Any] = {"bfloat16": setup.bfloat16 and finetune}
    if args.epochs is not None:
        changes["epochs"] = args.epochs
    if finetune:
        changes["label_fraction"] = args.labels
    elif args.eval_batch_norm:
        changes["batch_norm_train"] = False
    views = classifier.FINETUNE_VIEWS if finetune else classifier.V1_VIEWS
    try:
        result = classifier.train_classifier(
            setup.model.backbone,
            data.train,
            data.test,
            plain,
            settings=dataclasses.replace(settings, **changes),
            device=setup.device,
            augmented=Preprocess(plain.mean, plain.std, plain.size, views),
            progress=lambda line: print(line, flush=True),
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return {"accuracy": 100 * result.accuracy, "epochs": result.epochs_run}


def evaluate(run: Path, args: argparse.Namespace) -> dict[str, float]:
    """A row of the table, which is also left in the run folder."""
    setup = load_run(run, args.device, args.data, args.data_root)
    if setup.data.train is None:
        raise UserError(f"{setup.data.name} has no labels to evaluate on")
    if args.protocol == "knn":
        result = {"knn": 100 * probes.knn_accuracy(frozen_features(setup))}
    elif args.protocol == "linear":
        features = frozen_features(setup)
        n, classes = len(features.train_labels), len(features.train_labels.unique())
        result = probes.evaluate_features(features, budgets=probes.label_budgets(n, classes))
    else:
        result = classify(setup, args)
    content = json.dumps({"protocol": args.protocol, "labels": args.labels, **result}, indent=2) + "\n"
    write_atomically(run / f"evaluation-{args.protocol}.json", lambda temporary: temporary.write_text(content))
    if missing := [name for name in (LOG, ENCODER) if not (run / name).is_file()]:
        print(f"{run / CARD} is not written anew: {' and '.join(missing)} missing")
    elif (run / CARD).exists():  # the run has ended
        write_card(run)
    return {args.protocol: result["accuracy"]} if "accuracy" in result else result


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    rows = {}
    for run in args.runs:
        if len(args.runs) > 1:
            print(f"evaluating {run}", flush=True)
        rows[str(run)] = evaluate(run, args)
    print(probes.format_table(rows, "accuracy in % on the test images"))
    print(f"written to evaluation-{args.protocol}.json in {', '.join(rows)}")


def run(argv: Sequence[str] | None = None) -> int:
    try:
        main(argv)
    except UserError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaluate.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
