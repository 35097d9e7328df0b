# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the chunked path: library products, and a fused epilogue between them.

For rows too wide to keep their gradient in registers: triton_backend.py has the library make the products
of a chunk of rows with all columns, ``terms_kernel`` turns them in place into the gradient's coefficients,
library products follow, and ``finish_kernel`` adds the positive pairs and eq. (10).
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from .triton_kernels import positive_pairs, project
from .triton_terms import (
    SIZES,
    SUMS,
    count_negatives,
    labelled_tile,
    load_coef,
    log2_1p,
    narrow,
    negative_tile,
    put,
    special_columns,
    store_lanes,
    total,
    write_results,
)


@triton.jit(do_not_specialize=[*SIZES, "row0", "n_rows", "record0"])
def terms_kernel(
    s_ptr,  # [n_rows, k_pad] products of the chunk's rows with all columns
    g_ptr,  # [n_rows, k_pad] the gradient's coefficients in the features' type, over the same memory
    x_rows_ptr, y_rows_ptr, x_ids_ptr, y_ids_ptr, coef_ptr, sums_ptr,
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
    scale_p, scale_n, bias, grad_p, grad_n, grad_l = load_coef(coef_ptr)
    positive_col, own_col = special_columns(
        rows, m, k, diag_self, diag_positive, diag_wrap, own_first, own_end, HAS_IDS, EXCLUDE_SELF, False
    )
    row_ids = rows
    if HAS_IDS:
        row_ids = tl.load(x_ids_ptr + rows, mask=rows < m, other=0)
    p = tl.zeros([BLOCK_M, 4], dtype)
    log2_sum = tl.zeros([BLOCK_M, 4], dtype)
    products = tl.zeros([BLOCK_M, 4], dtype)
    sigmas = tl.zeros([BLOCK_M, 4], dtype)
    sigma_products = tl.zeros([BLOCK_M, 4], dtype)
    pos_p = tl.zeros([BLOCK_M, 4], dtype)
    pos_log2 = tl.zeros([BLOCK_M, 4], dtype)
    pos = tl.zeros([SUMS], tl.float64)
    row_at = local[:, None].to(tl.int64)
    for col0 in range(0, k_pad, BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        s = tl.load(s_ptr + row_at * k_pad + cols[None, :])
        tl.debug_barrier()  # all of the tile is read before any of it is overwritten
        col_inverse = tl.load(y_rows_ptr + cols)
        keep = (rows < m)[:, None] & (cols < k)[None, :] & (cols[None, :] != own_col[:, None])
        s = s * col_inverse[None, :]
        if HAS_IDS:
            col_half_norm = tl.load(y_rows_ptr + 2 * k_pad + cols)
            col_ids = tl.load(y_ids_ptr + cols, mask=cols < k, other=0)
            same = row_ids[:, None] == col_ids[None, :]
            g, p, log2_sum, products, sigmas, sigma_products, pos_p, pos_log2, pos = labelled_tile(
                s, inverse, half_norm, col_half_norm, keep & same, keep & (same == 0),
                scale_p, scale_n, bias, grad_p, grad_n, grad_l,
                p, log2_sum, products, sigmas, sigma_products, pos_p, pos_log2, pos, True, DPARAMS,
            )  # fmt: skip
        else:
            keep = keep & (cols[None, :] != positive_col[:, None])
            t = tl.where(keep, s * (inverse * scale_n)[:, None] + bias, float("-inf"))
            s = tl.where(keep, s, 0.0)
            sigma, p, log2_sum, products, sigmas, sigma_products = negative_tile(
                s, t, p, log2_sum, products, sigmas, sigma_products, True, DPARAMS
            )
            g = sigma * grad_n
        if GRAD:
            # Both sides' norms, so that one matrix serves dx and dy; finish_kernel takes the row's own back out.
            g = narrow(g * inverse[:, None] * col_inverse[None, :], g_ptr.dtype.element_ty)
            tl.store(g_ptr + row_at * stride_g + cols[None, :], g)
    record = sums_ptr + (record0 + tl.program_id(0)).to(tl.int64) * SUMS
    if HAS_IDS:
        pos = put(pos, 2, total((pos_log2 + log2_1p(pos_p)).to(tl.float64)))
    else:
        pos = put(pos, 1, count_negatives(rows, m, 0, k, positive_col, own_col))
    tl.store(record + tl.arange(0, SUMS), pos)
    tl.debug_barrier()
    store_lanes(record, p, log2_sum, products, sigmas, sigma_products, inverse, rows < m)


@triton.jit(do_not_specialize=[*SIZES, "record0"])
def finish_kernel(
    g_ptr,  # [m_pad, WIDTH] the library's product of coefficients and columns; may be dx_ptr's memory
    x_ptr, x_rows_ptr, y_ptr, y_rows_ptr, coef_ptr,
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
        scale_p, _scale_n, bias, grad_p, _grad_n, grad_l = load_coef(coef_ptr)
        half_norm = tl.load(x_rows_ptr + 2 * m_pad + rows)
        positive_col, _own_col = special_columns(
            rows, m, k, diag_self, diag_positive, diag_wrap, own_first, own_end, False, EXCLUDE_SELF, TRANSPOSED
        )
        pos, g_positive = positive_pairs(
            x_ptr, rows, m_pad, inverse, half_norm, y_ptr, y_rows_ptr, k_pad, positive_col, positive_col >= 0,
            scale_p, bias, grad_p, grad_l, BLOCK_D, WIDTH, 0, NORMALIZE, None,
        )  # fmt: skip
        if LOSS:
            tl.store(sums_ptr + (record0 + tl.program_id(0)).to(tl.int64) * SUMS + tl.arange(0, SUMS), pos)
        if GRAD:
            g += g_positive
    if GRAD:
        back = tl.load(x_rows_ptr + m_pad + rows)
        z = tl.load(x_ptr + at, mask=mask, other=0.0)
        dx = project(g, z, inverse, back, tl.load(coef_ptr + 6), NORMALIZE)
        tl.debug_barrier()
        dx_at = dx_ptr + rows[:, None].to(tl.int64) * d + depth
        tl.store(dx_at, dx, mask=(rows[:, None] < m) & (depth < d))


@triton.jit(do_not_specialize=["records"])
def results_kernel(sums_ptr, records, coef_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS: tl.constexpr):
    write_results(sums_ptr, records, coef_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS)
