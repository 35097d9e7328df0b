# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""Score the encoder of a run on the labels of its data set.

    python train/evaluate.py RUN --protocol knn|linear|finetune|v1

The encoder is that of the run's last checkpoint. ``knn`` and ``linear`` look at frozen features, batch norm
in eval mode; ``finetune`` trains encoder and head together; ``v1`` is the linear evaluation of the paper's
public code. The test split is scored once.
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

from train import classifier, probes
from train.assemble import Setup, load_run
from train.augment import Preprocess
from train.card import write_card
from train.config import OneLineParser
from train.errors import UserError
from train.features import Features, labelled_features
from train.run_folder import CARD, ENCODER, LOG, write_atomically


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="evaluate.py", description="Score the encoder of a run on held-out images.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--protocol", choices=("knn", "linear", "finetune", "v1"), default="linear")
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


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    setup = load_run(args.run, args.device, args.data_root)
    if setup.data.train is None:
        raise UserError(f"{setup.data.name} has no labels to evaluate on")
    if args.protocol == "knn":
        result = {"knn": 100 * probes.knn_accuracy(frozen_features(setup))}
    elif args.protocol == "linear":
        features = frozen_features(setup)
        n, classes = len(features.train_labels), len(features.train_labels.unique())
        result = probes.evaluate_features(features, budgets=probes.label_budgets(n, classes))
        print(probes.format_table({str(args.run): result}, f"accuracy in % on {len(features.test)} test images"))
    else:
        result = classify(setup, args)
    path = args.run / f"evaluation-{args.protocol}.json"
    content = json.dumps({"protocol": args.protocol, "labels": args.labels, **result}, indent=2) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(content))
    if missing := [name for name in (LOG, ENCODER) if not (args.run / name).is_file()]:
        print(f"{args.run / CARD} is not written anew: {' and '.join(missing)} missing")
    elif (args.run / CARD).exists():  # the run has ended
        write_card(args.run)
    if args.protocol != "linear":
        print(f"{args.protocol}: {next(iter(result.values())):.2f} % of the test images")
    print(f"written to {path}")


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
