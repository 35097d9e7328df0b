# SPDX-License-Identifier: Apache-2.0
"""Host side of the Triton backend: check, allocate, choose a path, launch.

Up to D = 256 everything is in one kernel, swept once a wanted gradient. Wider rows do not fit in
registers next to a useful tile, and tensor cores that take float64 are few: there a library product
makes the logits of a chunk of rows, a fused kernel turns them in place into the gradient's
coefficients, and library products finish.

Nothing here reads a device value: the launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import library
from ..ops import Call, add_product
from .chunked import finish_kernel, results_kernel, terms_kernel
from .coefficients import COEFFICIENTS
from .prepare import prepare_kernel
from .project import project_kernel
from .sweep import sweep_kernel
from .terms import SUMS
from .tiles import SLICE_WIDTH, Tile, terms_tile, tile_for

#: How every kernel is compiled. Triton 3.10 is to make separate multiplications and additions unless asked.
OPTIONS = {"enable_fp_fusion": True}
#: Widest row of the fused kernel.
FUSED_WIDTH = 256
#: Bytes of a chunk's float32 logits on the wide path, which bound its memory.
CHUNK_BYTES = 512 * 2**20
#: Up to this many rows the sweep also finishes the gradient: launches weigh more than registers.
FINISH_ROWS = 1024
#: Bytes the partial gradients of column splits may take.
SPLIT_BYTES = 16 * 2**20
#: Rows of prepared features are padded to a multiple of this; every tile divides it.
ROW_MULTIPLE = 128
#: Lifts coefficients ≤ 1 in magnitude from float16's floor, short of its ceiling.
FLOAT16_LIFT = 2.0**15

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Prepared(NamedTuple):
    """Features as prepare_kernel leaves them."""

    z: Tensor  # [n_pad, width]; fp16x3: float16 [4, n_pad, width], two halves and, in the rest, float32_copy
    factors: Tensor  # [3, n_pad]
    counters: Tensor  # zeros, int32
    ids: Tensor | None  # [n]
    n: int
    d: int

    @property
    def n_pad(self) -> int:
        return self.z.shape[-2]

    @property
    def width(self) -> int:
        return self.z.shape[-1]


class Pairs(NamedTuple):
    """Which pairs are what, from the point of view of a sweep's rows; see pair_columns."""

    diag_self: int
    diag_positive: int
    diag_wrap: int
    own_first: int
    own_end: int

    def transposed(self) -> Pairs:
        return self._replace(diag_self=-self.diag_self, diag_positive=-self.diag_positive, diag_wrap=-self.diag_wrap)


@functools.cache
def _device(index: int | None) -> tuple[int, int]:
    """(compute capability, multiprocessors)."""
    if index is None:
        return 90, 4  # the interpreter; few enough that small tests split columns
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def column_splits(row_blocks: int, col_tiles: int, slots: int, bytes_a_split: int) -> int:
    """In how many ranges the columns are cut so that the last wave of programs leaves few slots idle."""
    most = min(col_tiles, max(1, SPLIT_BYTES // bytes_a_split), max(1, 2 * slots // row_blocks))
    # The time of a wave is its share of the columns; a split costs its partial gradient, a few tiles' worth.
    return min(range(1, most + 1), key=lambda s: triton.cdiv(row_blocks * s, slots) * (col_tiles / s + 4))


def rows_at_once(width: int, itemsize: int = 4) -> int:
    """Of a program that reads whole rows."""
    return max(1, min(16, 16384 // itemsize // int(triton.next_power_of_2(width))))


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants, **OPTIONS)


def pairwise_bce(*arguments: Any) -> Outputs:
    """The op."""
    library.ops().check_inputs(*arguments)
    call = Call(*arguments)
    if call.x2 is not None:
        call = call._replace(x=torch.cat([call.x, call.x2]))
    x = call.x
    with torch.cuda.device(x.device if x.is_cuda else -1), torch.autocast(x.device.type, enabled=False):
        job = Job(call)
        job.fused() if job.product else job.chunked()
        return job.loss, job.stats, job.dx, job.dy, job.dparams


def product_of(dtype: torch.dtype, d: int) -> str | None:
    """What the fused kernel multiplies, see products.py; None: the chunked path is to be taken."""
    if dtype == torch.float64 or d > FUSED_WIDTH:
        return None
    # What torch.set_float32_matmul_precision() sets too; its getter fails once someone has set this one.
    exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "16-bit" if dtype.itemsize == 2 else "fp16x3" if exact else "tf32"


class Job:
    """One call: its outputs, its prepared features and the numbers its kernels share."""

    def __init__(self, call: Call) -> None:
        x, y, params = call.x, call.y, call.params
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        m, offset = x.shape[0], call.offset
        self.call = call
        self.product = product_of(x.dtype, x.shape[1])
        self.has_ids = call.x_ids is not None
        self.pairs = Pairs(offset, offset + call.shift, offset + call.shift - m, offset, offset + m)
        self.loss = x.new_empty((), dtype=dtype)
        self.stats = x.new_empty(8, dtype=torch.float64)
        self.dx = x.new_empty(x.shape if call.needs_grad[0] else 0, dtype=dtype)
        self.dy = x.new_empty(y.shape if y is not None and call.needs_grad[1] else 0, dtype=dtype)
        self.dparams = x.new_empty(6 if call.needs_grad[2] else 0, dtype=dtype)
        if params is not None:
            params = params.contiguous()
        elif dtype == torch.float64:
            # A kernel's float argument is float32.
            params = torch.stack([torch.full((), c, dtype=dtype, device=x.device) for c in call.constants])
        self.coefficients = x.new_empty(COEFFICIENTS, dtype=dtype)
        self.x = self._prepare(x, call.x_ids, params, call.constants)
        self.y = self.x if y is None else self._prepare(y, call.y_ids, None, None)

    def _prepare(self, z: Tensor, ids: Tensor | None, params: Tensor | None, constants: list[float] | None) -> Prepared:
        n, d = z.shape
        n_pad = triton.cdiv(n, ROW_MULTIPLE) * ROW_MULTIPLE
        width = triton.next_power_of_2(max(d, 16)) if self.product else triton.cdiv(d, 16) * 16
        halves = self.product == "fp16x3"
        out = z.new_empty((4, n_pad, width), dtype=torch.float16) if halves else z.new_empty(n_pad, width)
        factors = self.coefficients.new_empty(3, n_pad)
        counters = z.new_empty(1 + n_pad // 16, dtype=torch.int32)
        rows = rows_at_once(width)
        launch(
            prepare_kernel, (n_pad // rows,),
            z, out, factors, counters, params if params is not None else self.coefficients, self.coefficients,
            *(constants or [0.0] * 6), n, d, z.stride(0), z.stride(1), n_pad, counters.numel(),
            WIDTH=width, BLOCK_D=triton.next_power_of_2(width), ROWS=rows, NORMALIZE=self.call.normalize,
            FIRST=params is not None or constants is not None, HAS_PARAMS=params is not None,
            COEFFICIENT_LIFT=FLOAT16_LIFT if z.dtype == torch.float16 else 1.0,
            GRADIENT_TIMES=2.0 if self.call.y is None else 1.0,  # G is symmetric, eq. (9)
            PRODUCT=self.product, num_warps=4,
        )  # fmt: skip
        return Prepared(out, factors, counters, None if ids is None else ids.contiguous(), n, d)

    # ---------------------------------------------------------------- D <= 256

    def fused(self) -> None:
        dx, dy, _ = self.call.needs_grad
        self._sweep(self.x, self.y, self.pairs, self.dx if dx else None, loss=True)
        if dy:
            self._sweep(self.y, self.x, self.pairs.transposed(), self.dy, loss=False)

    def _sweep(self, rows: Prepared, cols: Prepared, pairs: Pairs, grad: Tensor | None, loss: bool) -> None:
        assert self.product is not None
        capability, slots = _device(rows.z.device.index)
        width = rows.width
        block_d = min(width, SLICE_WIDTH[self.product])
        finish = rows.n <= FINISH_ROWS and block_d == width
        tile = tile_for(capability, self.product, width, small=finish, has_ids=self.has_ids)
        plan = sweep_plan(rows.n, cols.n, rows.n_pad * width * 4, tile, slots)
        sums = self.stats.new_empty(plan.row_blocks * plan.splits if loss else 0, SUMS.value)
        in_place = plan.splits == 1 and not finish and grad is not None and width == rows.d and rows.n_pad == rows.n
        parts = 0 if grad is None or in_place else plan.splits
        partial = grad if grad is not None and in_place else self.coefficients.new_empty(parts, rows.n_pad, width)
        for at in range(0, width if grad is not None else block_d, block_d):
            first = loss and at == 0
            launch(
                sweep_kernel, (plan.row_blocks, plan.splits),
                rows.z, cols.z, rows.factors, cols.factors, *self._ids(rows, cols), self.coefficients,
                self.coefficients if grad is None else grad, partial, sums, rows.counters,
                self.loss, self.stats, self.dparams, rows.n, cols.n, rows.d, rows.n_pad, cols.n_pad,
                *pairs, plan.tiles_per_split, plan.splits,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, WIDTH=width, SLICE=at,
                NORMALIZE=self.call.normalize, HAS_IDS=self.has_ids, EXCLUDE_SELF=self.call.exclude_self,
                TRANSPOSED=not loss, GRAD=grad is not None, LOSS=first, DPARAMS=first and self.call.needs_grad[2],
                FINISH=finish, PRODUCT=self.product, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
        if grad is not None and not finish:
            self._project(partial, rows, grad, plan.splits)

    def _project(self, g: Tensor, rows: Prepared, out: Tensor, splits: int) -> None:
        block = rows_at_once(rows.width)
        launch(
            project_kernel, (triton.cdiv(rows.n, block),),
            g, rows.z, rows.factors, self.coefficients, out, rows.n, rows.n_pad, rows.d, splits,
            WIDTH=rows.width, BLOCK_D=triton.next_power_of_2(rows.width), ROWS=block, NORMALIZE=self.call.normalize,
            PRODUCT=self.product, num_warps=4,
        )  # fmt: skip

    def _ids(self, rows: Prepared, cols: Prepared) -> tuple[Tensor, Tensor]:
        if rows.ids is None:
            return rows.counters, rows.counters  # not read
        return rows.ids, rows.ids if cols.ids is None else cols.ids

    # ---------------------------------------------------------------- D > 256, or float64

    def chunked(self) -> None:
        x, y = self.x, self.y
        want_dx, want_dy, want_dparams = self.call.needs_grad
        tile = terms_tile(self.coefficients.element_size())
        fit = CHUNK_BYTES // (y.n_pad * self.coefficients.element_size()) // ROW_MULTIPLE * ROW_MULTIPLE
        chunk = min(max(ROW_MULTIPLE, fit), x.n_pad)
        products = self.coefficients.new_empty(chunk, y.n_pad)
        g = products.view(x.z.dtype)[:, : y.n_pad]
        terms = x.n_pad // tile.block_m
        finishing = 0 if self.has_ids else triton.cdiv(x.n, rows_at_once(x.width, self.loss.element_size()))
        sums = self.stats.new_empty(terms + finishing, SUMS.value)
        # The gradients are made where they are returned, unless padding is in the way.
        dx = self.dx if x.z.shape == self.dx.shape else self.coefficients.new_empty(x.z.shape if want_dx else 0)
        dy = self.dy if y.z.shape == self.dy.shape else self.coefficients.new_empty(y.z.shape if want_dy else 0)
        for row0 in range(0, x.n_pad, chunk):
            n_rows = min(chunk, x.n_pad - row0)
            rows = x.z[row0 : row0 + n_rows]
            product_into(products[:n_rows], rows, y.z.T)  # (2), but for the norms
            launch(
                terms_kernel, (n_rows // tile.block_m,),
                products, g, x.factors, y.factors, *self._ids(x, y), self.coefficients, sums,
                row0, n_rows, row0 // tile.block_m, x.n, y.n, x.n_pad, y.n_pad, g.stride(0), *self.pairs,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, HAS_IDS=self.has_ids,
                EXCLUDE_SELF=self.call.exclude_self, GRAD=want_dx or want_dy, DPARAMS=want_dparams,
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            if want_dx:
                product_into(dx[row0 : row0 + n_rows], g[:n_rows], y.z)  # (9)
            if want_dy:
                product_into(dy, g[:n_rows].T, rows, accumulate=row0 > 0)
        if want_dx or not self.has_ids:
            self._finish(dx, x, y, self.pairs, self.dx if want_dx else None, (sums, terms))
        if want_dy:
            self._finish(dy, y, x, self.pairs.transposed(), self.dy, None)
        launch(
            results_kernel, (1,),
            sums, sums.shape[0], self.coefficients, self.loss, self.stats, self.dparams, DPARAMS=want_dparams,
        )  # fmt: skip

    def _finish(
        self,
        g: Tensor,
        rows: Prepared,
        cols: Prepared,
        pairs: Pairs,
        out: Tensor | None,
        loss: tuple[Tensor, int] | None,
    ) -> None:
        """``loss``: (sums, the first of the records that are for the positive pairs)."""
        sums, record = loss or (self.stats, 0)
        block = rows_at_once(rows.width, self.loss.element_size())
        launch(
            finish_kernel, (triton.cdiv(rows.n, block),),
            g, rows.z, rows.factors, cols.z, cols.factors, self.coefficients, g if out is None else out,
            sums, record, rows.n, cols.n, rows.d, rows.n_pad, cols.n_pad, *pairs,
            WIDTH=rows.width, BLOCK_D=triton.next_power_of_2(rows.width), ROWS=block, NORMALIZE=self.call.normalize,
            HAS_IDS=self.has_ids, EXCLUDE_SELF=self.call.exclude_self, TRANSPOSED=loss is None,
            GRAD=out is not None, LOSS=loss is not None, num_warps=4,
        )  # fmt: skip


class Plan(NamedTuple):
    row_blocks: int
    splits: int
    tiles_per_split: int


def sweep_plan(m: int, k: int, bytes_a_split: int, tile: Tile, slots: int) -> Plan:
    """How many programs sweep m rows over k columns: (row blocks, column splits, column tiles of a split)."""
    row_blocks, col_tiles = triton.cdiv(m, tile.block_m), triton.cdiv(k, tile.block_n)
    tiles_per_split = triton.cdiv(col_tiles, column_splits(row_blocks, col_tiles, slots, bytes_a_split))
    return Plan(row_blocks, triton.cdiv(col_tiles, tiles_per_split), tiles_per_split)


def product_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out (+)= a b, in out's type, which for 16-bit operands is float32."""
    if accumulate:
        add_product(out, a, b)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the interpreter's machine has no such product
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
