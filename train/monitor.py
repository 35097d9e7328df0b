# SPDX-License-Identifier: Apache-2.0
"""What is watched during training: numbers per step, collapse, progress, a request to stop."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.errors import UserError
from train.features import rankme
from train.run_folder import RunLog

try:
    from tqdm import tqdm
except ImportError:  # a progress bar is a comfort: without tqdm, plain lines
    tqdm = None

GLANCE = 1.0  #: seconds
METRICS = ("loss", "positive_loss", "negative_loss", "positive_cosine", "negative_cosine")


def spread(z: Tensor) -> Tensor:
    """Standard deviation of the normalised embeddings over the batch, times sqrt(D): 1 when they fill
    the sphere evenly, 0 when all are the same."""
    return F.normalize(z.detach().float(), dim=1).std(0).mean() * math.sqrt(z.shape[1])


class StepMetrics:
    """The numbers of each step, kept on the device; ``read`` is the only point that waits for it."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, loss: Tensor, stats: Any) -> None:
        pairs = (stats.positive_loss, stats.negative_loss, stats.positive_cosine, stats.negative_cosine)
        self.rows.append(torch.stack([value.detach().double() for value in (loss, *pairs)]))

    def read(self) -> Tensor:
        """[steps since the last call, len(METRICS)] on the CPU."""
        rows, self.rows = torch.stack(self.rows).cpu(), []
        return rows


def collapse_warning(metrics: dict[str, float]) -> str | None:
    """A sentence if the embeddings have collapsed, from the means over one log interval."""
    if metrics["spread"] < 0.1 or metrics["negative_cosine"] > 0.95:
        return (
            "collapse: all embeddings are nearly the same "
            f"(spread {metrics['spread']:.3f}, mean negative cosine {metrics['negative_cosine']:.3f}); "
            "try a lower --learning-rate or --regularizer, or a larger --batch-size"
        )
    return None


class Stopwatch:
    """Time of the clock and of this process's processors, on top of what earlier processes took."""

    def __init__(self, seconds: float, cpu_seconds: float) -> None:
        self.start, self.cpu_start = time.perf_counter() - seconds, time.process_time() - cpu_seconds

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.start, "cpu_seconds": time.process_time() - self.cpu_start}


class Progress:
    """A bar with epoch, loss, cosines, images/s and time left on a terminal, plain lines elsewhere.

    Progress goes to stderr on a terminal and to stdout as lines, like any other output of the script.
    """

    def __init__(self, total_images: int, done: int, epochs: int) -> None:
        self.total, self.first, self.done, self.start = total_images, done, done, time.perf_counter()
        self.epochs, self.glanced = epochs, -math.inf
        self.bar = None
        if tqdm is not None and sys.stderr.isatty():
            self.bar = tqdm(total=total_images, initial=done, unit=" images", unit_scale=True, dynamic_ncols=True)

    def advance(self, images: int) -> None:
        self.done += images
        if self.bar is not None:
            self.bar.update(images)

    @property
    def rate(self) -> float:
        """Images per second since the start; an image counts once, though it is seen as two views."""
        return (self.done - self.first) / (time.perf_counter() - self.start)

    def glance(self, epoch: int, loss: Tensor, stats: Any) -> None:
        """The last step's numbers on the bar, once a second at most: reading them waits for the device."""
        if self.bar is None or (now := time.perf_counter()) < self.glanced + GLANCE:
            return
        self.glanced = now
        self.bar.set_description(f"epoch {epoch}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(
            f"loss {float(loss):.4f}, s+ {float(stats.positive_cosine):+.3f}, s- {float(stats.negative_cosine):+.3f}"
        )

    def report(self, epoch: int, step: int, metrics: dict[str, float]) -> None:
        if self.bar is not None:
            return
        print(
            f"epoch {epoch:>{len(str(self.epochs))}}/{self.epochs}  step {step:6d}  loss {metrics['loss']:.4f}  "
            f"s+ {metrics['positive_cosine']:+.3f}  s- {metrics['negative_cosine']:+.3f}  "
            f"spread {metrics['spread']:.2f}  {self.rate:6.0f} images/s  "
            f"{(self.total - self.done) / self.rate:5.0f} s left",
            flush=True,
        )

    def say(self, line: str) -> None:
        """A line of text that does not tear the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()


def report(
    metrics: StepMetrics,
    epoch: int,
    step: int,
    lr: float,
    z: Tensor,
    progress: Progress,
    log: RunLog,
    norms: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Read the metrics of one interval and log their means; stop the run where the loss is not finite.

    ``z``, what is computed from it and the ``norms`` of its gradient are those of the interval's last step.
    """
    rows = metrics.read()
    finite = rows[:, METRICS.index("loss")].isfinite()
    if not finite.all():
        first = step - len(rows) + 1 + int(finite.logical_not().nonzero()[0])
        raise UserError(f"the loss is not finite at step {first}: try a lower --learning-rate; log in {log.file.name}")
    means = dict(zip(METRICS, rows.mean(0).tolist(), strict=True)) | {"spread": float(spread(z))}
    # Eq. (6) at one temperature: a lower bound of the Jensen-Shannon divergence of the two kinds of pairs.
    information = math.log(2) - (means["positive_loss"] + means["negative_loss"]) / 2
    entry = {"epoch": epoch, "step": step, "lr": lr, **means, "js_estimate": information}
    entry |= {"rankme": float(rankme(z.detach())), "images_per_second": progress.rate}
    entry |= norms or {}
    log.write("train", **entry)
    progress.report(epoch, step, means)
    if warning := collapse_warning(means):
        log.write("warning", step=step, message=warning)
        progress.say(f"warning: {warning}")
    return entry


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or closed terminal (SIGHUP, unless ignored: nohup) into a number that the
    loop reads between steps; a second one acts at once.

    Stopping in the middle of an optimizer step would save a model that never existed.
    """

    def __init__(self) -> None:
        self.requested = 0  #: number of the signal

    def __enter__(self) -> StopRequest:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self.handle) for number in heard}
        return self

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = signum
        self.restore()

    def restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self.restore()
