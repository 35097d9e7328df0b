# SPDX-License-Identifier: Apache-2.0
"""Several processes that train as one, started by ``torchrun``: Gloo on CPUs, NCCL on GPUs.

Every process holds an equal share of each batch; rank 0 alone writes files and speaks. A process that
fails says so, once for all, and leaves; the others notice at their next collective, and leave in silence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
#: torch 2.14 renamed the option and warns of the old name.
NO_BROADCAST = next(
    n for n in ("forward_sync_buffers", "broadcast_buffers") if n in signature(DistributedDataParallel).parameters
)
WAIT = timedelta(days=7)  #: for rank 0, which scores and saves while the others wait; a death ends the wait at once


class Processes:
    """The processes of this run; a single one unless ``torchrun`` started more."""

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, failures: Any = None) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self.failures = failures  #: a store that lives as long as ``torchrun``
        self.control: Any = None  #: a Gloo group for words between hosts, which no GPU has to wait for

    @staticmethod
    def start() -> Processes:
        """Join the process group of ``torchrun``, if that is what started this process."""
        if not (dist.is_available() and dist.is_torchelastic_launched()) or os.environ["WORLD_SIZE"] == "1":
            return ALONE
        store, rank, count = next(rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count)
        processes = Processes(rank, count, int(os.environ["LOCAL_RANK"]), store)
        processes.control = dist.new_group(backend="gloo", timeout=WAIT)
        if rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        return processes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def fail(self, message: str) -> None:
        """Say what ended the run, unless another process has said it: its end is what ended this one."""
        if self.count > 1 and self.failures.add("failures", 1) > 1:
            return
        print(message, file=sys.__stderr__ if self.rank else sys.stderr, flush=True)

    def share(self, rows: int) -> slice:
        """The rows of this process among those of all."""
        own = rows // self.count
        return slice(self.rank * own, (self.rank + 1) * own)

    def maximum(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        box = torch.tensor(number)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return int(box)

    def wait(self) -> None:
        """Until all processes are here."""
        self.maximum(0)

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in rank 0, where alone it is called."""
        box = [make() if self.first else None]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]  # type: ignore[return-value]

    @contextmanager
    def one_before_the_others(self) -> Iterator[None]:
        """Downloads and caches: one process of a machine makes them, then the others find them made."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, with its gradients averaged over the processes as backward makes them."""
        if self.count == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        # The statistics of synchronised batch norm are the same everywhere: nothing to broadcast.
        return DistributedDataParallel(module, **{NO_BROADCAST: False})  # type: ignore[arg-type]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, without gradient."""
        if self.count == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.count)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)


ALONE = Processes()
