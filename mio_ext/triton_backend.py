# SPDX-License-Identifier: Apache-2.0
"""Host side of the Triton backend: check, allocate, choose a path, launch.

Up to D = 256 everything is in one kernel, swept once a wanted gradient. Wider rows do not fit in
registers next to a useful tile, and float32 without TF32 has no tensor core: there a library product
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

from . import triton_kernels
from .triton_tiles import Tile, tile_for

#: Launches are untyped.
kernels: Any = triton_kernels

#: Widest row, padded to a power of two, of the fused kernel.
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
FLOAT16_SCALE = 2.0**15

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Rows(NamedTuple):
    """Features as prepare_kernel leaves them."""

    z: Tensor  # [n_pad, width]
    factors: Tensor  # [3, n_pad]
    counters: Tensor  # zeros, int32
    ids: Tensor | None  # [n]
    n: int
    d: int

    @property
    def n_pad(self) -> int:
        return self.z.shape[0]


class Pairs(NamedTuple):
    """Which pairs are what, from the point of view of a sweep's rows; see special_columns."""

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


def pairwise_bce(
    x: Tensor,
    y: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    params: Tensor | None,
    constants: list[float],
    shift: int,
    offset: int,
    exclude_self: bool,
    normalize: bool,
    needs_grad: list[bool],
) -> Outputs:
    """The op; contract in csrc/ops.cpp."""
    _check_inputs(x, y, x_ids, y_ids, params, constants, shift, offset, normalize, needs_grad)
    fused = x.shape[1] <= FUSED_WIDTH and tensor_core_type(x.dtype)
    with torch.cuda.device(x.device if x.is_cuda else -1), torch.autocast(x.device.type, enabled=False):
        job = Job(x, y, x_ids, y_ids, params, constants, shift, offset, exclude_self, normalize, needs_grad, fused)
        job.fused() if fused else job.chunked()
        return job.loss, job.stats, job.dx, job.dy, job.dparams


class Job:
    """One call: its outputs, its prepared features and the numbers its kernels share."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        x_ids: Tensor | None,
        y_ids: Tensor | None,
        params: Tensor | None,
        constants: list[float],
        shift: int,
        offset: int,
        exclude_self: bool,
        normalize: bool,
        needs_grad: list[bool],
        fused: bool,
    ) -> None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        m = x.shape[0]
        self.symmetric = y is None
        self.normalize, self.exclude_self, self.has_ids = normalize, exclude_self, x_ids is not None
        self.needs_grad = needs_grad
        self.pairs = Pairs(offset, offset + shift, offset + shift - m, offset, offset + m)
        self.loss = x.new_empty((), dtype=dtype)
        self.stats = x.new_empty(8, dtype=torch.float64)
        self.dx = x.new_empty(x.shape if needs_grad[0] else 0, dtype=dtype)
        self.dy = x.new_empty(y.shape if y is not None and needs_grad[1] else 0, dtype=dtype)
        self.dparams = x.new_empty(6 if needs_grad[2] else 0, dtype=dtype)
        if dtype == torch.float64 and params is None:
            # A kernel's float argument is float32.
            params = torch.stack([torch.full((), c, dtype=dtype, device=x.device) for c in constants])
        self.coef = x.new_empty(10, dtype=dtype)
        width = triton.next_power_of_2(max(x.shape[1], 16)) if fused else triton.cdiv(x.shape[1], 16) * 16
        self.x = self._prepare(x, x_ids, width, params, constants)
        self.y = self.x if y is None else self._prepare(y, y_ids, width, None, None)
        self.dtype = dtype

    def _prepare(
        self, z: Tensor, ids: Tensor | None, width: int, params: Tensor | None, constants: list[float] | None
    ) -> Rows:
        n, d = z.shape
        n_pad = triton.cdiv(n, ROW_MULTIPLE) * ROW_MULTIPLE
        out = z.new_empty(n_pad, width)
        factors = self.coef.new_empty(3, n_pad)
        counters = z.new_empty(1 + n_pad // 16, dtype=torch.int32)
        block_d = triton.next_power_of_2(width)
        rows = max(1, min(16, 4096 // block_d))
        kernels.prepare_kernel[(n_pad // rows,)](
            z, out, factors, counters, params if params is not None else self.coef, self.coef,
            *(constants or [0.0] * 6), n, d, z.stride(0), z.stride(1), n_pad, counters.numel(),
            WIDTH=width, BLOCK_D=block_d, ROWS=rows, NORMALIZE=self.normalize,
            FIRST=params is not None or constants is not None, HAS_PARAMS=params is not None,
            COEF_SCALE=FLOAT16_SCALE if z.dtype == torch.float16 else 1.0,
            GRADIENT_TIMES=2.0 if self.symmetric else 1.0,  # G is symmetric, eq. (9)
            num_warps=4,
        )  # fmt: skip
        return Rows(out, factors, counters, None if ids is None else ids.contiguous(), n, d)

    # ---------------------------------------------------------------- D <= 256

    def fused(self) -> None:
        dx, dy, _ = self.needs_grad
        self._sweep(self.x, self.y, self.pairs, self.dx if dx else None, loss=True)
        if dy:
            self._sweep(self.y, self.x, self.pairs.transposed(), self.dy, loss=False)

    def _sweep(self, rows: Rows, cols: Rows, pairs: Pairs, grad: Tensor | None, loss: bool) -> None:
        capability, slots = _device(rows.z.device.index)
        width = rows.z.shape[1]
        finish = rows.n <= FINISH_ROWS
        tile = tile_for(capability, rows.z.element_size(), width, small=finish, has_ids=self.has_ids)
        plan = sweep_plan(rows.n, cols.n, rows.n_pad * width * 4, tile, slots)
        sums = self.stats.new_empty(plan.row_blocks * plan.splits if loss else 0, kernels.SUMS.value)
        in_place = plan.splits == 1 and not finish and grad is not None and width == rows.d and rows.n_pad == rows.n
        partial = self.coef.new_empty((plan.splits, rows.n_pad, width) if grad is not None and not in_place else 0)
        if in_place and grad is not None:
            partial = grad
        kernels.sweep_kernel[(plan.row_blocks, plan.splits)](
            rows.z, cols.z, rows.factors, cols.factors, *self._ids(rows, cols), self.coef,
            self.coef if grad is None else grad, partial, sums, rows.counters, self.loss, self.stats, self.dparams,
            rows.n, cols.n, rows.d, rows.n_pad, cols.n_pad, *pairs, plan.tiles_per_split, plan.splits,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=width,
            NORMALIZE=self.normalize, HAS_IDS=self.has_ids, EXCLUDE_SELF=self.exclude_self, TRANSPOSED=not loss,
            GRAD=grad is not None, LOSS=loss, DPARAMS=loss and self.needs_grad[2], FINISH=finish,
            PRECISION="tf32", num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if grad is not None and not finish:
            self._project(partial, rows, grad, plan.splits, both_norms=False)

    def _ids(self, rows: Rows, cols: Rows) -> tuple[Tensor, Tensor]:
        if rows.ids is None:
            return rows.counters, rows.counters  # not read
        return rows.ids, rows.ids if cols.ids is None else cols.ids

    # ---------------------------------------------------------------- D > 256, or float64

    def chunked(self) -> None:
        x, y = self.x, self.y
        want_dx, want_dy, want_dparams = self.needs_grad
        block_m = 4
        fit = CHUNK_BYTES // (y.n_pad * self.coef.element_size()) // ROW_MULTIPLE * ROW_MULTIPLE
        chunk = min(max(ROW_MULTIPLE, fit), x.n_pad)
        products = self.coef.new_empty(chunk, y.n_pad)
        g = products.view(x.z.dtype)[:, : y.n_pad]
        sums = self.stats.new_empty(x.n_pad // block_m, kernels.SUMS.value)
        # The gradients are made where they are returned, unless padding is in the way.
        dx = self.dx if x.z.shape == self.dx.shape else self.coef.new_empty(x.z.shape if want_dx else 0)
        dy = self.dy if y.z.shape == self.dy.shape else self.coef.new_empty(y.z.shape if want_dy else 0)
        dy.zero_()
        for row0 in range(0, x.n_pad, chunk):
            n_rows = min(chunk, x.n_pad - row0)
            rows = x.z[row0 : row0 + n_rows]
            product_into(products[:n_rows], rows, y.z.T)  # (2), but for the norms
            kernels.terms_kernel[(n_rows // block_m,)](
                products, g, x.factors, y.factors, *self._ids(x, y), self.coef, sums,
                row0, n_rows, row0 // block_m, x.n, y.n, x.n_pad, y.n_pad, g.stride(0), *self.pairs,
                BLOCK_M=block_m, BLOCK_N=ROW_MULTIPLE, HAS_IDS=self.has_ids,
                EXCLUDE_SELF=self.exclude_self, GRAD=want_dx or want_dy, DPARAMS=want_dparams, num_warps=4,
            )  # fmt: skip
            if want_dx:
                product_into(dx[row0 : row0 + n_rows], g[:n_rows], y.z)  # (9)
            if want_dy:
                product_into(dy, g[:n_rows].T, rows, accumulate=True)
        kernels.results_kernel[(1,)](
            sums, sums.shape[0], self.coef, self.loss, self.stats, self.dparams, DPARAMS=want_dparams
        )
        if want_dx:
            self._project(dx, x, self.dx, 1, both_norms=True)
        if want_dy:
            self._project(dy, y, self.dy, 1, both_norms=True)

    def _project(self, g: Tensor, rows: Rows, out: Tensor, splits: int, both_norms: bool) -> None:
        width = rows.z.shape[1]
        block_d = triton.next_power_of_2(width)
        block = max(1, min(16, 4096 // block_d))
        kernels.project_kernel[(triton.cdiv(rows.n, block),)](
            g, rows.z, rows.factors, self.coef, out, rows.n, rows.n_pad, rows.d, splits,
            WIDTH=width, BLOCK_D=block_d, ROWS=block, NORMALIZE=self.normalize,
            BOTH_NORMS=both_norms and self.normalize, num_warps=4,
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


def tensor_core_type(dtype: torch.dtype) -> bool:
    """Do tensor cores take it? float32 only as far as torch.set_float32_matmul_precision() lets TF32 in."""
    if dtype == torch.float32:
        return torch.get_float32_matmul_precision() != "highest"
    return dtype.itemsize == 2


def product_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out (+)= a b, in out's type, which for 16-bit operands is float32."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the interpreter's machine has no such product
        product_into(out, a.to(out.dtype), b.to(out.dtype), accumulate)


def _check_inputs(
    x: Tensor,
    y: Tensor | None,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    params: Tensor | None,
    constants: list[float],
    shift: int,
    offset: int,
    normalize: bool,
    needs_grad: list[bool],
) -> None:
    """csrc/check_inputs.h, for where there is no C++; the same messages."""

    def check(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
        if not condition:
            raise error("pairwise_bce: " + message)

    check(x.dim() == 2 and x.numel() > 0, f"x must be [M, D], got {list(x.shape)}")
    types = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    check(x.dtype in types, f"x must be float32, float64, float16 or bfloat16, got {x.dtype}", TypeError)
    m, d = x.shape
    if y is not None:
        fits = y.dim() == 2 and y.shape[0] > 0 and y.shape[1] == d
        check(fits, f"y must be [K, {d}] like x, got {list(y.shape)}")
        check(y.dtype == x.dtype, f"y must be {x.dtype} like x, got {y.dtype}", TypeError)
        check(y.device == x.device, f"y must be on {x.device} like x, got {y.device}")
    for name, ids, features in (("x_ids", x_ids, x), ("y_ids", y_ids, y)):
        if ids is not None and features is not None:
            check(ids.dtype == torch.int64, f"{name} must be int64, got {ids.dtype}", TypeError)
            check(ids.shape == features.shape[:1], f"{name} must be [{features.shape[0]}], got {list(ids.shape)}")
            check(ids.device == x.device, f"{name} must be on {x.device} like x, got {ids.device}")
    needs_y_ids = y is not None and x_ids is not None
    check((y_ids is not None) == needs_y_ids, "y_ids must be given with x_ids and y, and only then")
    wrong = f"give six constants, or params and no constants; got {len(constants)}"
    check(len(constants) == (6 if params is None else 0), f"{wrong} with{'out' if params is None else ''} params")
    if params is not None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        fits = params.shape == (6,) and params.dtype == dtype and params.device == x.device
        got = f"{list(params.shape)}, {params.dtype}, on {params.device}"
        check(fits, f"params must be [6], {dtype}, on {x.device}; got {got}")
    check(0 <= shift < m, f"shift must be in [0, {m}), got {shift}")
    check(y is not None or offset == 0, f"offset must be 0 without y, got {offset}")
    check(offset >= 0, f"offset must be at least 0, got {offset}")
    mutual = y is not None or x_ids is not None or shift * 2 % m == 0
    check(mutual, f"without y and ids the positives must be mutual, shift 0 or M/2; got shift {shift} with M = {m}")
    check(y is not None or not needs_grad[1], "there is no gradient for y = None")
    linear = normalize or params is not None or constants[5] == 0
    check(linear, f"the linear weight needs normalize, got {'' if linear else constants[5]} without")
