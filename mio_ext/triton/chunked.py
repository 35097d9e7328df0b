# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the chunked path: library products, and a fused epilogue between them.

For rows too wide to keep their gradient in registers: pairwise_bce.py has the library make the products
of a chunk of rows with all columns, ``terms_kernel`` turns them in place into the gradient's coefficients,
library products follow, and ``finish_kernel`` adds the positive pairs and eq. (10).
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from .coefficients import load_coefficients
from .pairs import count_negatives, pair_columns, positive_pairs
from .project import project
from .terms import (
    SIZES,
    SUMS,
    labelled_tile,
    log2_of,
    narrow,
    negative_tile,
    no_lanes,
    put,
    store_lanes,
    total,
    write_results,
)


@triton.jit(do_not_specialize=[*SIZES, "row0", "n_rows", "record0"])
def terms_kernel(
    s_ptr,  # [n_rows, k_pad] products of the chunk's rows with all columns
    g_ptr,  # [n_rows, k_pad] the gradient's coefficients in the features' type, over the same memory
    x_rows_ptr, y_rows_ptr, x_ids_ptr, y_ids_ptr, coefficients_ptr, sums_ptr,
    row0, n_rows, record0, m, k, m_pad, k_pad, stride_g, diag_self, diag_positive, diag_wrap, own_first, own_end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_IDS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, GRAD: tl.constexpr, DPARAMS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of a chunk of products: their sums, and their coefficients of eq. (7)-(8) in place.

    Without ids a positive pair has no part in it: finish_kernel adds it in float32.

    A 16-bit row begins where its float32 row does and is half as long: a tile is read before anything is
    written to its place, and no row has a second program.
    """
    dtype = s_ptr.dtype.element_ty
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row0 + local
    inverse = tl.load(x_rows_ptr + rows)
    half_norm = tl.load(x_rows_ptr + 2 * m_pad + rows)
    c = load_coefficients(coefficients_ptr)
    pairs = pair_columns(
        rows, m, k, diag_self, diag_positive, diag_wrap, own_first, own_end, HAS_IDS, EXCLUDE_SELF, False
    )
    row_ids = rows
    if HAS_IDS:
        row_ids = tl.load(x_ids_ptr + rows, mask=rows < m, other=0)
    sums = no_lanes(BLOCK_M, dtype)
    positives = sums.softplus
    pos = tl.zeros([SUMS], tl.float64)
    row_at = local[:, None].to(tl.int64)
    for col0 in range(0, k_pad, BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        s = tl.load(s_ptr + row_at * k_pad + cols[None, :])
        tl.debug_barrier()  # all of the tile is read before any of it is overwritten
        col_inverse = tl.load(y_rows_ptr + cols)
        keep = (rows < m)[:, None] & (cols < k)[None, :] & (cols[None, :] != pairs.own[:, None])
        s = s * col_inverse[None, :]
        if HAS_IDS:
            col_half_norm = tl.load(y_rows_ptr + 2 * k_pad + cols)
            col_ids = tl.load(y_ids_ptr + cols, mask=cols < k, other=0)
            same = row_ids[:, None] == col_ids[None, :]
            g, sums, positives, pos = labelled_tile(
                s, inverse, half_norm, col_half_norm, keep & same, keep & (same == 0), c, sums, positives, pos,
                True, DPARAMS,
            )  # fmt: skip
        else:
            keep = keep & (cols[None, :] != pairs.positive[:, None])
            t = tl.where(keep, s * (inverse * c.scale_n)[:, None] + c.bias, float("-inf"))
            s = tl.where(keep, s, 0.0)
            sigma, sums = negative_tile(s, t, sums, True, DPARAMS)
            g = sigma * c.grad_n
        if GRAD:
            # Both sides' norms, so that one matrix serves dx and dy; finish_kernel takes the row's own back out.
            g = narrow(g * inverse[:, None] * col_inverse[None, :], g_ptr.dtype.element_ty)
            tl.store(g_ptr + row_at * stride_g + cols[None, :], g)
    record = sums_ptr + (record0 + tl.program_id(0)).to(tl.int64) * SUMS
    if HAS_IDS:
        pos = put(pos, 2, total(log2_of(positives).to(tl.float64)))
    else:
        pos = put(pos, 1, count_negatives(rows, m, 0, k, pairs))
    tl.store(record + tl.arange(0, SUMS), pos)
    tl.debug_barrier()
    store_lanes(record, sums, inverse, rows < m)


@triton.jit(do_not_specialize=[*SIZES, "record0"])
def finish_kernel(
    g_ptr,  # [m_pad, WIDTH] the library's product of coefficients and columns; may be dx_ptr's memory
    x_ptr, x_rows_ptr, y_ptr, y_rows_ptr, coefficients_ptr,
    dx_ptr,  # [m, d]
    sums_ptr,
    record0, m, k, d, m_pad, k_pad, diag_self, diag_positive, diag_wrap, own_first, own_end,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, TRANSPOSED: tl.constexpr, GRAD: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """ROWS rows' positive pairs, their sums if LOSS, and, if GRAD, the gradient's end, eq. (10)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, BLOCK_D)[None, :]
    inverse = tl.load(x_rows_ptr + rows)
    if GRAD:
        at = rows[:, None].to(tl.int64) * WIDTH + depth
        mask = (rows < m_pad)[:, None] & (depth < WIDTH)
        g = tl.load(g_ptr + at, mask=mask, other=0.0)
        if NORMALIZE:
            g = g / inverse[:, None]
    if not HAS_IDS:
        c = load_coefficients(coefficients_ptr)
        half_norm = tl.load(x_rows_ptr + 2 * m_pad + rows)
        pairs = pair_columns(
            rows, m, k, diag_self, diag_positive, diag_wrap, own_first, own_end, False, EXCLUDE_SELF, TRANSPOSED
        )
        pos, g_positive = positive_pairs(
            x_ptr, rows, m_pad, inverse, half_norm, y_ptr, y_rows_ptr, k_pad, pairs.positive, pairs.positive >= 0,
            c, BLOCK_D, WIDTH, 0, NORMALIZE, None,
        )  # fmt: skip
        if LOSS:
            tl.store(sums_ptr + (record0 + tl.program_id(0)).to(tl.int64) * SUMS + tl.arange(0, SUMS), pos)
        if GRAD:
            g += g_positive
    if GRAD:
        back = tl.load(x_rows_ptr + m_pad + rows)
        z = tl.load(x_ptr + at, mask=mask, other=0.0)
        dx = project(g, z, inverse, back, tl.load(coefficients_ptr + 6), NORMALIZE)
        tl.debug_barrier()
        dx_at = dx_ptr + rows[:, None].to(tl.int64) * d + depth
        tl.store(dx_at, dx, mask=(rows[:, None] < m) & (depth < d))


@triton.jit(do_not_specialize=["records"])
def results_kernel(sums_ptr, records, coefficients_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS: tl.constexpr):
    write_results(sums_ptr, records, coefficients_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS)
