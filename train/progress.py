# SPDX-License-Identifier: Apache-2.0
"""How far something has come: a bar on a terminal, plain lines elsewhere, and nothing of what is over at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

try:
    from tqdm import tqdm
except ImportError:  # a progress bar is a comfort: without tqdm, plain lines
    tqdm = None

PATIENCE = 2.0  #: seconds without a word
BETWEEN_LINES = 10.0  #: seconds


@contextmanager
def counting(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Yields what is called with the number of ``unit`` done since the last call; ``total`` of them, if that is known.

    A task of less than two seconds stays silent. Nothing is read from a device: what is counted is what
    the host has queued there.
    """
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(
            total=total, desc=what, unit=f" {unit}", unit_scale=True, dynamic_ncols=True, delay=PATIENCE, leave=False
        ) as bar:
            yield bar.update
        return
    done, speak_at = 0, time.perf_counter() + PATIENCE

    def advance(count: int) -> None:
        nonlocal done, speak_at
        done += count
        if time.perf_counter() > speak_at:
            speak_at = time.perf_counter() + BETWEEN_LINES
            print(f"{what}: {done}{'' if total is None else f' of {total}'} {unit}", flush=True)

    yield advance
