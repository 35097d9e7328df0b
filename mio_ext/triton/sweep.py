# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the *sweep*, fused: a program owns BLOCK_M rows and walks over column tiles.

Logits, sigmoids and the rows' gradient never leave registers; two matrix products a tile share one load of the
columns. What happens to a logit is in terms.py; rows too wide for this are left to chunked.py.
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from .coefficients import load_coefficients
from .pairs import count_negatives, pair_columns, positive_pairs, touches
from .products import load_operand, load_rows, row_gradient, row_offsets, row_products
from .project import project
from .terms import (
    SIZES,
    SUMS,
    labelled_tile,
    log2_of,
    negative_tile,
    no_lanes,
    put,
    store_lanes,
    total,
    write_results,
)


@triton.jit(do_not_specialize=[*SIZES, "tiles_per_split", "splits"])
def sweep_kernel(
    x_ptr,  # [m_pad, WIDTH] rows, prepared
    y_ptr,  # [k_pad, WIDTH] columns, prepared
    x_rows_ptr,  # [3, m_pad] factors of the rows
    y_rows_ptr,  # [3, k_pad]
    x_ids_ptr,  # [m], int64, or unused
    y_ids_ptr,  # [k]
    coefficients_ptr,  # [10], see coefficients.py
    dx_ptr,  # [m, d], float32
    partial_ptr,  # [splits, m_pad, WIDTH], float32
    sums_ptr,  # [programs, SUMS], float64
    counter_ptr,  # [1 + row blocks], int32, zero
    loss_ptr, stats_ptr, dparams_ptr,
    m, k, d, m_pad, k_pad, diag_self, diag_positive, diag_wrap, own_first, own_end, tiles_per_split, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, TRANSPOSED: tl.constexpr,
    GRAD: tl.constexpr, LOSS: tl.constexpr, DPARAMS: tl.constexpr, FINISH: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows against one range of columns: their share of the loss and of dx, eq. (9).

    The program that is last to finish adds up what the others left, in a fixed order: the same bits every
    time. With FINISH that goes for the gradient too: a small batch waits for launches, a large one for
    registers, and leaves the sum over splits and eq. (10) to project_kernel.

    Of WIDTH features this is the gradient of [SLICE, SLICE + BLOCK_D), all of them or one half; logits need all.
    """
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    SLICED: tl.constexpr = WIDTH > BLOCK_D
    depth = SLICE + tl.arange(0, BLOCK_D)
    rest = BLOCK_D - SLICE + tl.arange(0, BLOCK_D)  # of two slices, the other
    SPLIT: tl.constexpr = PRODUCT == "fp16x3"
    SCALED: tl.constexpr = NORMALIZE or SPLIT  # the columns were
    # Addresses are 64 bits for the tile and 32 in it: what is needed again after the loop stays in registers.
    block = row0.to(tl.int64) * WIDTH
    row_at = tl.arange(0, BLOCK_M)[:, None] * WIDTH
    at = row_at + depth[None, :]
    x, x_low = load_operand(x_ptr + block, at, m_pad, WIDTH, PRODUCT)
    if SLICED:
        x_rest, x_rest_low = load_operand(x_ptr + block, row_at + rest[None, :], m_pad, WIDTH, PRODUCT)
    inverse = tl.load(x_rows_ptr + rows)
    half_norm = tl.load(x_rows_ptr + 2 * m_pad + rows)
    c = load_coefficients(coefficients_ptr)
    first = tl.program_id(1) * tiles_per_split * BLOCK_N
    end = tl.minimum(first + tiles_per_split * BLOCK_N, k)
    pairs = pair_columns(
        rows, m, k, diag_self, diag_positive, diag_wrap, own_first, own_end, HAS_IDS, EXCLUDE_SELF, TRANSPOSED
    )

    sums = no_lanes(BLOCK_M, tl.float32)
    positives = sums.softplus
    pos = tl.zeros([SUMS], tl.float64)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    programs = tl.num_programs(0) * tl.num_programs(1)
    record = sums_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * SUMS
    if HAS_IDS:
        row_ids = tl.load(x_ids_ptr + rows, mask=rows < m, other=0)
    else:
        there = tl.where(tl.program_id(1) == 0, pairs.positive, -1) >= 0  # of the column splits, the first has them
        pos, acc = positive_pairs(
            x_ptr, rows, m_pad, inverse, half_norm, y_ptr, y_rows_ptr, k_pad, pairs.positive, there, c,
            BLOCK_D, WIDTH, SLICE, NORMALIZE, PRODUCT,
        )  # fmt: skip
        if LOSS:  # stored at once: nothing of it stays in a register through the loop
            negatives = count_negatives(rows, m, first, end, pairs)
            tl.store(record + tl.arange(0, SUMS), put(pos, 1, negatives))
            tl.debug_barrier()

    row_scale = inverse * c.scale_n
    for col0 in range(first, end, BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        y, y_low = load_operand(y_ptr, row_offsets(cols, WIDTH) + depth[None, :], k_pad, WIDTH, PRODUCT)
        col_inverse = tl.load(y_rows_ptr + cols)
        s = row_products(x, x_low, y, y_low, PRODUCT)  # (2), but for the norms, in float32
        if SLICED:
            y_rest, y_rest_low = load_operand(y_ptr, row_offsets(cols, WIDTH) + rest[None, :], k_pad, WIDTH, PRODUCT)
            s += row_products(x_rest, x_rest_low, y_rest, y_rest_low, PRODUCT)
        if SCALED:
            s = s * col_inverse[None, :]
        if HAS_IDS:
            col_ids = tl.load(y_ids_ptr + cols, mask=cols < k, other=0)
            keep = (rows < m)[:, None] & (cols < k)[None, :] & (cols[None, :] != pairs.own[:, None])
            positive = keep & (row_ids[:, None] == col_ids[None, :])
            negative = keep & (row_ids[:, None] != col_ids[None, :])
            col_half_norm = tl.load(y_rows_ptr + 2 * k_pad + cols)
            g, sums, positives, pos = labelled_tile(
                s, inverse, half_norm, col_half_norm, positive, negative, c, sums, positives, pos, LOSS, DPARAMS
            )
        else:
            t = s * row_scale[:, None] + c.bias
            # Tiles that hold something else than negative pairs are few: -inf takes it out of every sum.
            ragged = col0 + BLOCK_N > k
            if EXCLUDE_SELF:
                ragged = ragged | touches(diag_self, row0, col0, BLOCK_M, BLOCK_N)
            crossed = touches(diag_positive, row0, col0, BLOCK_M, BLOCK_N)
            if ragged | crossed | touches(diag_wrap, row0, col0, BLOCK_M, BLOCK_N):
                col = cols[None, :]
                out = (col == pairs.positive[:, None]) | (col == pairs.own[:, None]) | (col >= k)
                t = tl.where(out, float("-inf"), t)
                s = tl.where(out, 0.0, s)
            sigma, sums = negative_tile(s, t, sums, LOSS, DPARAMS)
            g = sigma * c.grad_n  # (8)
        if GRAD:
            if SCALED:
                g = g * col_inverse[None, :]
            acc = row_gradient(g, y, y_low, acc, PRODUCT)

    inverse = tl.load(x_rows_ptr + rows)
    if LOSS:
        if HAS_IDS:
            tl.store(record + tl.arange(0, SUMS), put(pos, 2, total(log2_of(positives).to(tl.float64))))
            tl.debug_barrier()
        store_lanes(record, sums, inverse, rows < m)
    stride = m_pad.to(tl.int64) * WIDTH
    if GRAD:
        tl.store(partial_ptr + tl.program_id(1) * stride + block + at, acc)
    tl.debug_barrier()  # all of this program's stores come before its tickets
    if LOSS:  # before the gradient, whose end wants all registers
        ticket = tl.atomic_add(counter_ptr, 1)
        if ticket == programs - 1:
            write_results(sums_ptr, programs, coefficients_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS)
    if GRAD and FINISH:
        ticket = tl.atomic_add(counter_ptr + 1 + tl.program_id(0), 1)
        if ticket == splits - 1:
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for split in range(0, splits):
                acc += tl.load(partial_ptr + split * stride + block + at, cache_modifier=".cg")
            back = tl.load(x_rows_ptr + m_pad + rows)
            z = load_rows(x_ptr, block, at, (rows < m_pad)[:, None], m_pad, WIDTH, PRODUCT)
            dx = project(acc, z, inverse, back, tl.load(coefficients_ptr + 6), NORMALIZE)
            dx_at = tl.arange(0, BLOCK_M)[:, None] * d + depth[None, :]
            tl.store(dx_ptr + row0.to(tl.int64) * d + dx_at, dx, mask=(rows[:, None] < m) & (depth[None, :] < d))
