# SPDX-License-Identifier: Apache-2.0
"""Triton device functions of pairs: which is what, and the positive ones of rows that have one each."""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
from typing import NamedTuple

import triton
import triton.language as tl

from .products import load_rows, row_offsets
from .terms import SUMS, log2_1p, put, terms


class PairColumns(NamedTuple):
    """Of each row; -1: none."""

    positive: tl.tensor
    own: tl.tensor  # if it does not count


@triton.jit
def pair_columns(
    rows, m, k, diag_self, diag_positive, diag_wrap, own_first, own_end,
    HAS_IDS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """In (i, j) of the op, the positive column offset + (i + shift) mod M is the two diagonals
    j − i = offset + shift (− M) inside offset ≤ j < offset + M. TRANSPOSED sweeps have j for rows.
    """
    own = tl.full(rows.shape, -1, tl.int32)
    if EXCLUDE_SELF:
        column = rows + diag_self
        own = tl.where((rows < m) & (column >= 0) & (column < k), column, -1).to(tl.int32)
    positive = tl.full(rows.shape, -1, tl.int32)
    if not HAS_IDS:
        for wrapped in tl.static_range(2):
            column = rows + (diag_wrap if wrapped else diag_positive)
            j = rows if TRANSPOSED else column
            there = (rows < m) & (column >= 0) & (column < k) & (j >= own_first) & (j < own_end)
            positive = tl.where(there & (column != own), column, positive).to(tl.int32)
    return PairColumns(positive, own)


@triton.jit
def touches(diagonal, row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Does the diagonal col − row = diagonal cross the tile?"""
    return (diagonal > col0 - row0 - BLOCK_M) & (diagonal < col0 - row0 + BLOCK_N)


@triton.jit
def count_negatives(rows, m, first, end, pairs):
    """How many negative pairs the rows have in columns [first, end), without ids."""
    count = tl.where(rows < m, end - first, 0)
    count -= ((pairs.positive >= first) & (pairs.positive < end)).to(tl.int32)
    count -= ((pairs.own >= first) & (pairs.own < end)).to(tl.int32)
    return tl.sum(count.to(tl.int64), 0)


@triton.jit
def positive_pairs(
    x_ptr, rows, m_pad, inverse, half_norm, y_ptr, y_rows_ptr, k_pad, positive_col, there, c,
    BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, NORMALIZE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """(sums, gradient [R, BLOCK_D] over the unit) of the rows' positive pairs, eq. (7).

    At most one a row, so a dot product in float32 costs next to nothing, keeps labels out of the main
    loop, and the largest weight in a row's gradient is never rounded to 16 bits. Nor does the product
    pass through tensor cores, which cut sums off: all positive pairs' errors would have one sign.
    """
    dtype: tl.constexpr = inverse.dtype
    # Two whole rows would not fit in registers.
    DEPTH: tl.constexpr = BLOCK_D if rows.shape[0] * BLOCK_D <= 4096 else 64
    x_at, y_at = row_offsets(rows, WIDTH), row_offsets(positive_col, WIDTH)
    x_there, y_there = (rows < m_pad)[:, None], there[:, None]
    col_inverse = tl.load(y_rows_ptr + positive_col, mask=there, other=1.0)
    # Exactly 1 where rows are equal, so that their difference is 0; a fast division does not promise that.
    ratio = tl.where(col_inverse == inverse, 1.0, col_inverse / inverse)
    product = tl.zeros(rows.shape, dtype)
    distance = tl.zeros(rows.shape, dtype)
    for depth0 in range(0, WIDTH, DEPTH):
        depth = depth0 + tl.arange(0, DEPTH)[None, :]
        x = load_rows(x_ptr, 0, x_at + depth, x_there & (depth < WIDTH), m_pad, WIDTH, PRODUCT).to(dtype)
        y = load_rows(y_ptr, 0, y_at + depth, y_there & (depth < WIDTH), k_pad, WIDTH, PRODUCT).to(dtype)
        product += tl.sum(x * y, 1)
        if NORMALIZE:
            difference = (x - y * ratio[:, None]) * inverse[:, None]  # x̂ − ŷ
            distance += 0.5 * tl.sum(difference * difference, 1)
    product = product * (col_inverse * inverse)
    if not NORMALIZE:
        distance = half_norm + tl.load(y_rows_ptr + 2 * k_pad + positive_col, mask=there, other=0.0) - product
    e, relu, sigma = terms(-(product * c.scale_p + c.bias))
    pos = tl.zeros([SUMS], tl.float64)
    pos = put(pos, 0, tl.sum(there.to(tl.int32), 0))
    pos = put(pos, 2, tl.sum(tl.where(there, relu + log2_1p(e), 0.0), 0))
    pos = put(pos, 4, tl.sum(tl.where(there, product, 0.0), 0))
    pos = put(pos, 6, tl.sum(tl.where(there, sigma, 0.0), 0))
    pos = put(pos, 8, tl.sum(tl.where(there, sigma * product, 0.0), 0))
    pos = put(pos, 10, tl.sum(tl.where(there, distance, 0.0), 0))
    depth = SLICE + tl.arange(0, BLOCK_D)[None, :]
    y = load_rows(y_ptr, 0, y_at + depth, y_there & (depth < WIDTH), k_pad, WIDTH, PRODUCT).to(dtype)
    g = (sigma * c.grad_p * col_inverse)[:, None] * y
    if NORMALIZE:  # w_l (x̂ − ŷ), not −w_l ŷ, of which eq. (10) would leave rounding errors where x̂ ≈ ŷ
        x = load_rows(x_ptr, 0, x_at + depth, x_there & (depth < WIDTH), m_pad, WIDTH, PRODUCT).to(dtype)
        g -= (c.grad_l * inverse)[:, None] * (x - y * ratio[:, None])
    return pos, tl.where(y_there, g, 0.0)
