# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""Self-supervised pre-training of a ResNet-18 with the fused MIO loss (arXiv 2111.12664).

    python train/pretrain.py

Without arguments: scikit-learn's handwritten digits, CPU or GPU, about two minutes on two cores, then a
linear probe and k-NN on the held-out test split. Labels are used by the evaluation only, and the test
split is scored once, after the last epoch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the script runs without an installed mio_ext

REQUIRED = {"torch": "torch", "torchvision": "torchvision", "sklearn": "scikit-learn"}
if missing := [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]:
    print(f"pretrain.py: {', '.join(missing)} missing: pip install {' '.join(missing)}", file=sys.stderr)
    sys.exit(2)

import sklearn
import torch
import torchvision
from torch import Tensor

import mio_ext
from train.augment import Preprocess, ViewRanges
from train.data import ImageData, load_digits
from train.model import PretrainModel, build_model, parameter_groups
from train.monitor import METRICS, Progress, StepMetrics, StopRequest, collapse_warning
from train.probes import Features, PairCosines, evaluate, extract_features, format_table, pair_cosines
from train.run_folder import (
    CHECKPOINT,
    COSINE_PLOT,
    EMBEDDING_PLOT,
    LOG,
    LOSS_PLOT,
    RESULTS,
    JsonLinesLog,
    UserError,
    create_run_folder,
    save_checkpoint,
    write_atomically,
)

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument in one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the options)")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="pretrain.py",
        description="Self-supervised pre-training of a ResNet-18 with the fused MIO loss, then a linear "
        "probe and k-NN on held-out data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--output", help="run folder; None: runs/digits-<date>-<time>")
    run.add_argument("--overwrite", action="store_true", help="write into an --output that is not empty")
    run.add_argument("--seed", type=int, default=0, help="same seed, same machine: same result on CPU")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    run.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="steps between log lines")
    run.add_argument("--save-every", type=int, default=10, metavar="EPOCHS", help="epochs between checkpoints")
    schedule = parser.add_argument_group("optimisation")
    schedule.add_argument("--epochs", type=int, default=30, help="passes over the train split")
    schedule.add_argument("--batch-size", type=int, default=256, help="images per step; each gives two views")
    schedule.add_argument("--limit-steps", type=int, help="stop after this many steps (for smoke tests)")
    schedule.add_argument("--learning-rate", type=float, default=0.5, help="peak, after the warm-up")
    schedule.add_argument("--warmup-epochs", type=float, default=2.0, help="linear warm-up, then cosine to 0")
    schedule.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    schedule.add_argument("--weight-decay", type=float, default=5e-4, help="not on biases and batch norm")
    schedule.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 autocast on CUDA and on CPUs with bfloat16 instructions",
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument("--loss-backend", choices=BACKENDS, default="auto", help="what computes the MIO loss")
    loss.add_argument("--temperature", type=float, default=0.5, help="tau of positive and negative pairs")
    loss.add_argument("--regularizer", type=float, default=1.0, help="lambda, weight of the squared distance")
    model = parser.add_argument_group("model and views")
    model.add_argument("--image-size", type=int, default=8, help="pixels per side that the network sees")
    model.add_argument("--hidden", type=int, default=512, help="width of the projector's hidden layer")
    model.add_argument("--embedding", type=int, default=128, help="width of the embedding in the loss")
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def check_arguments(args: argparse.Namespace) -> None:
    """Ranges that argparse does not know; NaN fails every comparison, so it is refused too."""
    least = {"epochs": 1, "batch_size": 2, "limit_steps": 1, "log_every": 1, "save_every": 1, "seed": 0}
    # Below 8 pixels the ResNet puts a 3x3 filter of stride 2 on a 1x1 map, whose weight gradient in
    # bfloat16 on the CPU holds uninitialised memory (seen in torch 2.14.1).
    least |= {"image_size": 8, "hidden": 1, "embedding": 1, "warmup_epochs": 0, "weight_decay": 0}
    least |= {"momentum": 0, "regularizer": 0}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    for name in ("learning_rate", "temperature"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be greater than 0, got {value}")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {name}: torch sees {count} CUDA device(s); pass --device cpu")
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """auto: where the hardware multiplies bfloat16; emulation is slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # private, hence the getattr
    return supported is not None and supported()


def check_loss_backend(backend: str, device: torch.device) -> None:
    """Find out on four numbers, before anything is set up or written."""
    z = torch.eye(2, device=device)
    try:
        mio_ext.mio_loss(z, z, backend=backend)
    except (RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--loss-backend {backend}: {reason} (--loss-backend reference runs everywhere)") from error


def learning_rate(step: int, total: int, warmup: float, peak: float) -> float:
    """Linear warm-up, then half a cosine that reaches 0 after the last step."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def random_batches(n: int, batch_size: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of all steps, shuffled on the device; the incomplete last batch of an epoch is dropped,
    because the number of negatives is part of the loss."""
    for _ in range(epochs):
        permutation = torch.randperm(n, generator=generator, device=generator.device)
        yield from permutation[: n - n % batch_size].split(batch_size)


def train(
    args: argparse.Namespace,
    model: PretrainModel,
    images: Tensor,
    preprocess: Preprocess,
    generator: torch.Generator,
    log: JsonLinesLog,
    folder: Path,
) -> list[dict[str, Any]]:
    """Pre-train on ``images`` [n, C, H, W]; returns the logged intervals."""
    steps_per_epoch = len(images) // args.batch_size
    total, warmup = args.epochs * steps_per_epoch, args.warmup_epochs * steps_per_epoch
    last = min(total, args.limit_steps or total)
    optimizer = torch.optim.SGD(parameter_groups(model, args.weight_decay), lr=0.0, momentum=args.momentum)
    bfloat16 = use_bfloat16(args.precision, images.device)
    metrics, history = StepMetrics(), []
    model.train()
    with StopRequest() as stop, Progress(last * args.batch_size) as progress:
        batches = random_batches(len(images), args.batch_size, args.epochs, generator)
        for step, batch in enumerate(islice(batches, last), start=1):
            lr = learning_rate(step - 1, total, warmup, args.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = lr

            views = preprocess.views(images[batch].repeat(2, 1, 1, 1), generator)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
                z = model(views).float()  # both views in one forward: batch norm sees 2B images
            loss, stats = mio_ext.mio_loss(
                *z.chunk(2),
                temperature=args.temperature,
                regularizer=args.regularizer,
                backend=args.loss_backend,
                return_stats=True,
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            metrics.add(loss, stats, z)
            progress.advance(args.batch_size)
            epoch = math.ceil(step / steps_per_epoch)
            if step % args.log_every == 0 or step == last:
                history.append(report(metrics, epoch, step, lr, progress, log))
            if step % (args.save_every * steps_per_epoch) == 0 or step == last or stop.requested:
                save_checkpoint(folder / CHECKPOINT, model, optimizer, step, vars(args))
            if stop.requested:
                raise KeyboardInterrupt(f"checkpoint of step {step} saved in {folder}")
    return history


def report(
    metrics: StepMetrics, epoch: int, step: int, lr: float, progress: Progress, log: JsonLinesLog
) -> dict[str, Any]:
    """Read the metrics of one interval and log their means; stop the run where the loss is not finite."""
    rows = metrics.read()
    finite = rows[:, METRICS.index("loss")].isfinite()
    if not finite.all():
        first = step - len(rows) + 1 + int(finite.logical_not().nonzero()[0])
        raise UserError(f"the loss is not finite at step {first}: try a lower --learning-rate")
    means = dict(zip(METRICS, rows.mean(0).tolist(), strict=True))
    entry = {"epoch": epoch, "step": step, "lr": lr, **means, "images_per_second": progress.rate}
    log.write("train", **entry)
    progress.report(epoch, step, means)
    if warning := collapse_warning(means):
        log.write("warning", step=step, message=warning)
        progress.say(f"warning: {warning}")
    return entry


class Snapshot(NamedTuple):
    """What is compared before and after training, all with batch norm in eval mode."""

    features: Features  #: of the backbone, before the projector
    cosines: PairCosines  #: of the embeddings of two views of every test image


def take_snapshot(model: PretrainModel, data: ImageData, preprocess: Preprocess) -> Snapshot:
    device = data.test.images.device
    generator = torch.Generator(device).manual_seed(0)  # the same views before and after
    views = [preprocess.views(data.test.images, generator) for _ in range(2)]
    train, test = (extract_features(model.backbone, preprocess.plain(s.images)) for s in (data.train, data.test))
    return Snapshot(
        Features(train, data.train.labels.cpu(), test, data.test.labels.cpu()),
        pair_cosines(*(extract_features(model, view) for view in views)),
    )


def raw_pixels(data: ImageData) -> Features:
    train, test = ((s.images.flatten(1).float().cpu() / 255, s.labels.cpu()) for s in (data.train, data.test))
    return Features(*train, *test)


def versions(device: torch.device) -> dict[str, Any]:
    """What a number in this log depends on beside the configuration."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (mio_ext, torch, torchvision, sklearn)},
        "device": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def save_plots(history: list[dict[str, Any]], before: Snapshot, after: Snapshot, folder: Path) -> None:
    try:
        from train import plots
    except ImportError as error:
        print(f"no plots: {error} (pip install matplotlib)", file=sys.stderr)
        return
    plots.plot_loss(history, folder / LOSS_PLOT)
    plots.plot_cosines(before.cosines, after.cosines, folder / COSINE_PLOT)
    plots.plot_embedding(after.features.test, after.features.test_labels, folder / EMBEDDING_PLOT)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = choose_device(args.device)
    check_loss_backend(args.loss_backend, device)
    data = load_digits().to(device)
    if args.batch_size > len(data.train):
        raise UserError(f"--batch-size {args.batch_size} is more than the {len(data.train)} training images")

    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)  # of batches and views
    model = build_model(data.channels, args.hidden, args.embedding).to(device)
    preprocess = Preprocess(*data.mean_std(), args.image_size, ViewRanges())

    folder = create_run_folder(args.output, data.name, args.overwrite)
    log = JsonLinesLog(folder / LOG)
    log.write("start", command=shlex.join(["python", *sys.argv]), config=vars(args), versions=versions(device))
    print(f"{data.name}: {len(data.train)} training images on {device}, run folder {folder}", flush=True)

    before = take_snapshot(model, data, preprocess)
    start, cpu_start = time.perf_counter(), time.process_time()
    history = train(args, model, data.train.images, preprocess, generator, log, folder)
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    after = take_snapshot(model, data, preprocess)

    rows = {
        "raw pixels": evaluate(raw_pixels(data)),
        "untrained encoder": evaluate(before.features),
        "pre-trained encoder": evaluate(after.features),
    }
    log.write("results", rows=rows, **times)
    results = json.dumps({"rows": rows, **times, "config": vars(args)}, indent=2)
    write_atomically(folder / RESULTS, lambda path: path.write_text(results + "\n"))
    epoch = history[-1]["epoch"]
    print(format_table(rows, f"accuracy in % on {len(data.test)} held-out test images, after epoch {epoch}"))
    save_plots(history, before, after, folder)
    print(f"trained in {times['seconds']:.0f} s; log, checkpoint, results and plots are in {folder}")


def run(argv: Sequence[str] | None = None) -> int:
    """``main`` with a user's mistakes as one line and an exit code."""
    try:
        main(argv)
    except UserError as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"pretrain.py: interrupted{': ' if interrupt.args else ''}{interrupt}", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("pretrain.py: out of memory: try a smaller --batch-size", file=sys.stderr)
        return 2
    return 0


def is_out_of_memory(error: Exception) -> bool:
    """CUDA has a class for it; the CPU allocator only a message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "allocate memory" in str(error) or "not enough memory" in str(error)


if __name__ == "__main__":
    sys.exit(run())
