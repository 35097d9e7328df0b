# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of *prepare*: the copy of the features that the other kernels read.

It turns whatever came (strides, odd widths, rows of any norm) into a dense, aligned, zero-padded copy whose rows
are scaled by a power of two to a largest element in [1, 2). That is exact, it makes the range of the norms a matter
of one float32 factor a row instead of the 16-bit products, and it leaves the main loop without a mask. What the
tensor cores multiply is in products.py. Per row there are three factors:

    inverse    ẑ = z' inverse, for the copy z'; eq. (1)
    back       dL/dz = (I − ẑẑᵀ) dL/dẑ · back; eq. (10)
    half_norm  ‖ẑ‖²/2, for the distance in eq. (12)
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from .coefficients import store_coefficients
from .products import LIFT, float32_copy, halves, power_of_two
from .terms import narrow

EPS: tl.constexpr = tl.constexpr(1e-12)


@triton.jit(do_not_specialize=["n", "d", "counters", "a_p", "a_n", "b", "w_p", "w_n", "w_l"])
def prepare_kernel(
    z_ptr,  # [n, d], any strides
    out_ptr,  # [n_pad, WIDTH]; fp16x3: [2, n_pad, WIDTH], high and low halves, then float32_copy
    rows_ptr,  # [3, n_pad]: inverse, back, half_norm
    counter_ptr,  # [counters], int32, to be zeroed
    params_ptr,  # [6] or unused
    coefficients_ptr,  # [10], see coefficients.py
    a_p, a_n, b, w_p, w_n, w_l,
    n, d, stride_n, stride_d, n_pad, counters,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr, FIRST: tl.constexpr, HAS_PARAMS: tl.constexpr,
    COEFFICIENT_LIFT: tl.constexpr, GRADIENT_TIMES: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """The padded copy and the factors of its rows. The FIRST call also sets up the numbers all kernels share."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (row[:, None] < n) & (column[None, :] < d)
    at = z_ptr + row[:, None].to(tl.int64) * stride_n + column[None, :].to(tl.int64) * stride_d
    raw = tl.load(at, mask=mask, other=0.0)
    if raw.dtype == tl.float64:
        z = raw
        power = tl.zeros([ROWS], tl.float64) + 1.0
    else:
        z = raw.to(tl.float32)
        power = tl.zeros([ROWS], tl.float32) + 1.0
    inverse = power
    back = power
    if (NORMALIZE or PRODUCT == "fp16x3") and raw.dtype != tl.float64:
        power, inverse = power_of_two(tl.max(tl.abs(z), 1), LIFT if PRODUCT == "fp16x3" else 0)
        z = z * power[:, None]
    z = tl.where(z == z, z, float("nan"))  # this NaN's bits outlive TF32, which cuts others down to infinity
    norm = tl.sqrt(tl.sum(z * z, 1))
    if NORMALIZE:
        inverse = 1.0 / tl.where(norm <= power * EPS, power * EPS, norm)  # a maximum would lose NaN
        back = tl.where(norm <= power * EPS, 0.0, power / norm)
    half_norm = 0.5 * (norm * inverse) * (norm * inverse)
    out = out_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :]
    inside = (row[:, None] < n_pad) & (column[None, :] < WIDTH)
    if PRODUCT == "fp16x3":
        high, low = halves(z)
        tl.store(out, high, mask=inside)
        tl.store(out + n_pad.to(tl.int64) * WIDTH, low, mask=inside)
        copy = float32_copy(out_ptr, n_pad, WIDTH) + row[:, None].to(tl.int64) * WIDTH + column[None, :]
        tl.store(copy, z, mask=inside)
    else:
        tl.store(out, narrow(z, raw.dtype), mask=inside)
    tl.store(rows_ptr + row, inverse, mask=row < n_pad)
    tl.store(rows_ptr + n_pad + row, back, mask=row < n_pad)
    tl.store(rows_ptr + 2 * n_pad + row, half_norm, mask=row < n_pad)
    if tl.program_id(0) == 0:
        for first in range(0, counters, 1024):
            index = first + tl.arange(0, 1024)
            tl.store(counter_ptr + index, tl.zeros([1024], tl.int32), mask=index < counters)
        if FIRST:
            if HAS_PARAMS:
                store_coefficients(
                    coefficients_ptr, tl.load(params_ptr), tl.load(params_ptr + 1), tl.load(params_ptr + 2),
                    tl.load(params_ptr + 3), tl.load(params_ptr + 4), tl.load(params_ptr + 5),
                    COEFFICIENT_LIFT, GRADIENT_TIMES,
                )  # fmt: skip
            else:
                store_coefficients(coefficients_ptr, a_p, a_n, b, w_p, w_n, w_l, COEFFICIENT_LIFT, GRADIENT_TIMES)
