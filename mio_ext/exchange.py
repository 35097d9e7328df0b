# SPDX-License-Identifier: Apache-2.0
"""What processes of a group send each other: what they agree on, gathered rows, and blocks that go round a ring."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import DTYPES

Group = Any  #: a torch.distributed process group, None: the default one

FORMS = ("auto", "gather", "ring")  #: ways to meet the rows of the others
#: ``auto`` is the ring where gathered rows and their gradient would take more than this share of a device's memory.
RING_SHARE = 1 / 16

# torch 2.14 gave these their names and deprecated the old ones; a torch built without distribution has none.
all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
reduce_scatter: Any = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))

_OPS = ("mio_loss", "siglip_loss", "gather_rows")
#: Field of a :class:`Call` -> what it is called in an error.
_SAME = {
    "dim": "the width D of the features",
    "dtype": "the dtype of the features",
    "ids": "labels or ids, given or not,",
    "gradient": "requires_grad of text_features",
    "form": "exchange",
}
_WORDS: dict[str, Sequence[object]] = {"dtype": DTYPES, "ids": (False, True), "gradient": (False, True), "form": FORMS}


class Call(NamedTuple):
    """What every process tells the others before anything else travels; numbers, so that one message does."""

    op: int
    rows: int  #: that travel
    own: int  #: rows that stay
    dim: int
    dtype: int
    ids: int
    gradient: int  #: whether the rows that travel want one
    form: int
    large: int  #: whether gathered rows are beyond RING_SHARE here


class Plan(NamedTuple):
    """What came of it, the same on every process."""

    rank: int
    rows: list[int]  #: of each process's rows that travel
    own: list[int]  #: of each process's rows that stay
    ring: bool

    @property
    def world(self) -> int:
        return len(self.rows)

    @property
    def start(self) -> int:
        """Of the own rows among those of all."""
        return sum(self.rows[: self.rank])

    @property
    def even(self) -> bool:
        return len(set(self.rows)) == 1 == len(set(self.own))


def place(op: str, group: Group) -> tuple[int, int]:
    """(rank, number of processes) in the group; (0, 1) where there is no default process group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: group must be one that this process belongs to")
    return rank, dist.get_world_size(group)


def agree(
    op: str, group: Group, travels: Tensor, own: int, *, ids: bool = False, gradient: bool = False, form: str = "gather"
) -> Plan:
    """See to it that all processes want the same, before one waits for what another never sends.

    One message of a few integers between hosts, which no GPU waits for. Inside ``torch.compile`` nothing can be
    asked: there every process must have as many rows, and rows are gathered.

    Args:
        travels: the own rows that the others need.
        own: how many rows meet them.
        ids, gradient: whether pairs go by ids, and whether the rows that travel want a gradient.
    """
    rank, world = place(op, group)
    if form not in FORMS:
        raise ValueError(f"{op}: exchange must be {', '.join(FORMS)}, got {form!r}")
    rows, dim = travels.shape
    if torch.compiler.is_compiling():
        if form == "ring":
            raise ValueError(f"{op}: exchange='ring' does not compile; pass 'gather', or leave the loss outside")
        return Plan(rank, [rows] * world, [own] * world, False)
    bytes_gathered = world * rows * dim * (travels.dtype.itemsize + (max(4, travels.dtype.itemsize) if gradient else 0))
    call = Call(
        op=_OPS.index(op),
        rows=rows,
        own=own,
        dim=dim,
        dtype=DTYPES.index(travels.dtype),
        ids=int(ids),
        gradient=int(gradient),
        form=FORMS.index(form),
        large=int(bytes_gathered > RING_SHARE * _memory(travels.device)),
    )
    said = torch.empty(world, len(call), dtype=torch.int64)
    with answered(op):
        all_gather(said.view(-1), torch.tensor(call), group=_hosts(group))
    calls = [Call(*numbers) for numbers in said.tolist()]
    for process, other in enumerate(calls):
        if other.op != call.op:
            raise ValueError(f"{op}: every process must call it, process {process} called {_OPS[other.op]}")
    for field, what in _SAME.items():
        values = {getattr(other, field) for other in calls}
        if len(values) > 1:
            words = _WORDS.get(field, range(1 << 31))
            elsewhere = ", ".join(str(words[v]) for v in sorted(values - {getattr(call, field)}))
            mine = words[getattr(call, field)]
            raise ValueError(
                f"{op}: {what} must be the same on every process, got {mine} here and {elsewhere} elsewhere"
            )
    ring = form == "ring" or (form == "auto" and any(c.large for c in calls))
    return Plan(rank, [c.rows for c in calls], [c.own for c in calls], ring and world > 1)


@contextmanager
def answered(op: str) -> Iterator[None]:
    """A sentence where the others are gone."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(f"{op}: another process of the group has ended or does not answer ({why})") from error


#: Groups of GPUs alone -> a group of the same processes for words between hosts.
_companions: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _hosts(group: Group) -> Group:
    """A group of the same processes that takes tensors on the CPU."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    key = dist.group.WORLD if group is None else group
    if key not in _companions:
        ranks = dist.get_process_group_ranks(group)
        _companions[key] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _companions[key]


def _memory(device: torch.device) -> int:
    """Bytes of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---------------------------------------------------------------------------------------------- gathered rows


def gather(rows: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """[ΣM, ...] of every process's [M, ...], rank by rank, without gradient; ``sizes`` are their M."""
    most, world = max(sizes), len(sizes)
    gathered = rows.new_empty(world * most, *rows.shape[1:])
    all_gather(gathered, _padded(rows, most), group=group)
    if len(set(sizes)) == 1:
        return gathered
    return torch.cat([part[:size] for part, size in zip(gathered.chunk(world), sizes, strict=True)])


def scatter_sum(gradient: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """The way back: of [ΣM, ...] summed over all processes, the own [M, ...]."""
    rank, most = dist.get_rank(group), max(sizes)
    if len(set(sizes)) > 1:
        gradient = torch.cat([_padded(part, most) for part in gradient.split(list(sizes))])
    own = gradient.new_empty(most, *gradient.shape[1:])
    reduce_scatter(own, gradient.contiguous(), group=group)
    return own[: sizes[rank]]


def _padded(rows: Tensor, size: int) -> Tensor:
    if len(rows) == size:
        return rows.contiguous()
    padded = rows.new_zeros(size, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded


# ---------------------------------------------------------------------------------------------- a ring


class Ring:
    """Every process hands what it holds to the next one, and takes what the one before it held."""

    def __init__(self, op: str, group: Group, plan: Plan) -> None:
        self.op, self.group, self.plan = op, group, plan
        key: Any = dist.group.WORLD if group is None else group
        self.next, self.before = (
            dist.get_global_rank(key, (plan.rank + step) % plan.world) for step in (1, plan.world - 1)
        )

    def pass_on(self, held: Sequence[Tensor], size: int, tag: int) -> Sending:
        """Start to hand on ``held``, and to take as many tensors of ``size`` rows; ``tag`` tells two at once apart."""
        coming = [t.new_empty(size, *t.shape[1:]) for t in held]
        messages = []
        for number, (out, into) in enumerate(zip(held, coming, strict=True)):
            messages.append(dist.P2POp(dist.isend, out.contiguous(), self.next, self.group, 2 * tag + number))
            messages.append(dist.P2POp(dist.irecv, into, self.before, self.group, 2 * tag + number))
        with answered(self.op):
            return Sending(self.op, coming, messages, dist.batch_isend_irecv(messages))

    def blocks(self, own: Sequence[Tensor], tag: int = 0) -> Iterator[tuple[int, Sequence[Tensor]]]:
        """(process, its tensors) for every process, one's own first; the next come while these are used."""
        rank, world = self.plan.rank, self.plan.world
        held = own
        for step in range(world):
            process, last = (rank - step) % world, step + 1 == world
            sending = None if last else self.pass_on(held, self.plan.rows[(process - 1) % world], tag)
            yield process, held
            if sending is not None:
                held, sending = sending.wait(), None  # what has left is let go before more comes


class Sending(NamedTuple):
    """Tensors on their way. It holds those that leave, whose memory must last until they have."""

    op: str
    coming: list[Tensor]
    messages: list[Any]
    works: list[Any]

    def wait(self) -> list[Tensor]:
        with answered(self.op):
            for work in self.works:
                work.wait()
        return self.coming
