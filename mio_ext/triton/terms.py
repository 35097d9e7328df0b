# SPDX-License-Identifier: Apache-2.0
"""Triton device functions of a logit and of the sums over logits, for the fused and the chunked kernels.

Logits are base 2 (log2 e is in the scales). The softplus of many logits costs one logarithm: with
e = 2^−|t| it is Σ max(t, 0) + log2 Π(1 + e), and Π(1 + e) − 1 is kept, which is exact for tiny e.
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
from typing import NamedTuple

import triton
import triton.language as tl

INTERPRET: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# A program's sums, in this order; t is minus the logit on positive pairs, the logit on negative ones.
#   0, 1  number of positive, negative pairs    6, 7  Σ σ(t)
#   2, 3  Σ softplus(t) / ln 2                  8, 9  Σ σ(t) x·y
#   4, 5  Σ x·y                                 10    Σ ‖x − y‖²/2 over positive pairs
SUMS: tl.constexpr = tl.constexpr(16)

# What the host gives as plain integers changes with the batch: specialising on it would recompile. Not so for m_pad,
# k_pad and n_pad: that they are multiples of 16 is what lets a load take several columns.
SIZES = ["m", "k", "d", "diag_self", "diag_positive", "diag_wrap", "own_first", "own_end"]


@triton.jit
def reciprocal(v):
    """One special function for float32; the division operator would guard against ranges that 1 + e never has."""
    if INTERPRET or v.dtype == tl.float64:
        return 1.0 / v
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [v], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """v in ``dtype``, rounded to nearest even. The interpreter would cut bfloat16 off."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        v = tl.where(v == v, rounded, float("nan"))
    return v.to(dtype)


@triton.jit
def log2_1p(v):
    """log2(1 + v) for v ≥ 0, to the last bits where v is tiny: the rounding of 1 + v cancels."""
    w = 1.0 + v
    return tl.where(w == 1.0, v / LN2, tl.log2(w) * (v / tl.where(w == 1.0, 1.0, w - 1.0)))


class Softplus(NamedTuple):
    """Σ softplus(t) / ln 2 = log2 + log2(1 + p), in lanes [R, 4]; see add_logs."""

    p: tl.tensor
    log2: tl.tensor


class LaneSums(NamedTuple):
    """Sums over negative pairs, in lanes [R, 4]; products are short of the rows' ``inverse``."""

    softplus: Softplus
    product: tl.tensor
    sigma: tl.tensor
    sigma_product: tl.tensor


# In the accumulator of a matrix product a thread holds columns 2q, 2q + 1 of every eight, q its place in
# a group of four. So [R, C] as [R, C / 8, 4, 2] reduces to four lanes a row without leaving the thread.


@triton.jit
def sum_lanes(v):
    """[R, C] -> [R, 4], sums of columns."""
    R: tl.constexpr = v.shape[0]
    C: tl.constexpr = v.shape[1]
    return tl.sum(tl.sum(tl.reshape(v, [R, C // 8, 4, 2]), 3), 1)


@triton.jit
def multiply_lanes(e):
    """[R, C] -> [R, 4], Π(1 + e) − 1 of columns."""
    R: tl.constexpr = e.shape[0]
    C: tl.constexpr = e.shape[1]
    a, b = tl.split(tl.reshape(e, [R, C // 2, 2]))
    q = tl.permute(tl.reshape(a * b + (a + b), [R, C // 8, 4]), (0, 2, 1))
    for step in tl.static_range(1, 8):
        if (C // 8) >> step > 0:
            a, b = tl.split(tl.reshape(q, [R, 4, (C // 8) >> step, 2]))
            q = a * b + (a + b)
    return tl.reshape(q, [R, 4])


@triton.jit
def add_logs(sum, relus, e):
    """A Softplus and more columns: the relus' lanes, and of e the factors 1 + e.

    At most 64 columns a lane, else the product overflows. No logarithm: that waits for the end; whole powers of
    two leave p as they come, so it stays below 1.
    """
    q = multiply_lanes(e)
    p = sum.p * q + (sum.p + q)
    log2_sum = sum.log2 + relus
    if p.dtype == tl.float64:
        log2_sum += log2_1p(p)
        p = tl.zeros_like(p)
    else:
        bits = (1.0 + p).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 127
        mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        log2_sum += exponent.to(tl.float32)
        p = tl.where(exponent > 0, mantissa - 1.0, p)
    return Softplus(p, log2_sum)


@triton.jit
def log2_of(softplus):
    return softplus.log2 + log2_1p(softplus.p)


@triton.jit
def no_lanes(R: tl.constexpr, dtype: tl.constexpr):
    zero = tl.zeros([R, 4], dtype)
    return LaneSums(Softplus(zero, zero), zero, zero, zero)


@triton.jit
def terms(t):
    """(e, max(t, 0), σ(t)) of base-2 logits from one exponential and one reciprocal; NaN stays NaN."""
    e = tl.exp2(-tl.abs(t))
    below = t < 0
    sigma = tl.where(below, e, 1.0) * reciprocal(1.0 + e)
    return e, tl.where(below, 0.0, t), sigma


@triton.jit
def total(v):
    return tl.sum(tl.sum(v, 1), 0)


@triton.jit
def put(sums, at: tl.constexpr, value):
    """Adds to one of the [SUMS] sums."""
    return sums + tl.where(tl.arange(0, SUMS) == at, value.to(tl.float64), 0.0)


@triton.jit
def pick(sums, at: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, SUMS) == at, sums, 0.0), 0)


@triton.jit
def negative_tile(s, t, sums, LOSS: tl.constexpr, DPARAMS: tl.constexpr):
    """(σ(t), sums) with a tile of negative pairs; t = −∞ and s = 0: no pair."""
    e, relu, sigma = terms(t)
    if LOSS:
        sigma_product = sums.sigma_product
        softplus = add_logs(sums.softplus, sum_lanes(relu), e)
        product = sums.product + sum_lanes(s)
        sigmas = sums.sigma + sum_lanes(sigma)
        if DPARAMS:
            sigma_product += sum_lanes(sigma * s)
        sums = LaneSums(softplus, product, sigmas, sigma_product)
    return sigma, sums


@triton.jit
def labelled_tile(
    s, inverse, half_norm, col_half_norm, positive, negative, c, sums, positives, pos,
    LOSS: tl.constexpr, DPARAMS: tl.constexpr,
):  # fmt: skip
    """(coefficients of eq. (7)-(8) over the unit, sums) with a tile of pairs of both classes.

    s: x·y short of the rows' ``inverse``. positives: their Softplus; pos: the [SUMS] vector of everything that is
    not kept in lanes.
    """
    product = s * inverse[:, None]
    t = tl.where(positive, -(product * c.scale_p + c.bias), product * c.scale_n + c.bias)
    e, relu, sigma = terms(t)
    if LOSS:
        sigma_product = sums.sigma_product
        softplus = add_logs(sums.softplus, sum_lanes(tl.where(negative, relu, 0.0)), tl.where(negative, e, 0.0))
        products = sums.product + sum_lanes(tl.where(negative, s, 0.0))
        sigmas = sums.sigma + sum_lanes(tl.where(negative, sigma, 0.0))
        positives = add_logs(positives, sum_lanes(tl.where(positive, relu, 0.0)), tl.where(positive, e, 0.0))
        half_norms = half_norm[:, None] + col_half_norm[None, :]
        pos = put(pos, 0, total(positive.to(tl.int32)))
        pos = put(pos, 1, total(negative.to(tl.int32)))
        pos = put(pos, 4, total(tl.where(positive, product, 0.0)))
        pos = put(pos, 6, total(tl.where(positive, sigma, 0.0)))
        pos = put(pos, 10, total(tl.where(positive, half_norms - product, 0.0)))
        if DPARAMS:
            sigma_product += sum_lanes(tl.where(negative, sigma * s, 0.0))
            pos = put(pos, 8, total(tl.where(positive, sigma * product, 0.0)))
        sums = LaneSums(softplus, products, sigmas, sigma_product)
    g = tl.where(positive, sigma * c.grad_p + c.grad_l, tl.where(negative, sigma * c.grad_n, 0.0))
    return g, sums, positives, pos


@triton.jit
def store_lanes(sums_ptr, sums, inverse, row_mask):
    """Rounds off a program's negative pairs and stores them in its record of sums."""
    keep = row_mask[:, None]
    row = inverse[:, None]
    tl.store(sums_ptr + 3, total(tl.where(keep, log2_of(sums.softplus), 0.0).to(tl.float64)))
    tl.store(sums_ptr + 5, total(tl.where(keep, sums.product * row, 0.0).to(tl.float64)))
    tl.store(sums_ptr + 7, total(tl.where(keep, sums.sigma, 0.0).to(tl.float64)))
    tl.store(sums_ptr + 9, total(tl.where(keep, sums.sigma_product * row, 0.0).to(tl.float64)))


@triton.jit
def write_results(sums_ptr, programs, coefficients_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS: tl.constexpr):
    """Eq. (12), the statistics and d loss / d (a_p, a_n, b, w_p, w_n, w_l) from all programs' sums, in order."""
    BLOCK: tl.constexpr = 32
    column = tl.arange(0, SUMS)
    sums = tl.zeros([SUMS], tl.float64)
    for first in range(0, programs, BLOCK):
        row = first + tl.arange(0, BLOCK)
        mask = (row[:, None] < programs) & (column[None, :] < SUMS)
        at = sums_ptr + row[:, None].to(tl.int64) * SUMS + column[None, :]
        sums += tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    n_p, n_n = pick(sums, 0), pick(sums, 1)
    softplus_p, softplus_n = pick(sums, 2) * LN2, pick(sums, 3) * LN2
    sigma_p, sigma_n = pick(sums, 6), pick(sums, 7)
    distance = pick(sums, 10)
    w_p = tl.load(coefficients_ptr + 7).to(tl.float64)
    w_n = tl.load(coefficients_ptr + 8).to(tl.float64)
    w_l = tl.load(coefficients_ptr + 9).to(tl.float64)
    tl.store(loss_ptr, w_p * softplus_p + w_n * softplus_n + w_l * distance)
    tl.store(stats_ptr + 0, n_p)
    tl.store(stats_ptr + 1, n_n)
    tl.store(stats_ptr + 2, softplus_p / n_p)
    tl.store(stats_ptr + 3, softplus_n / n_n)
    tl.store(stats_ptr + 4, pick(sums, 4) / n_p)
    tl.store(stats_ptr + 5, pick(sums, 5) / n_n)
    tl.store(stats_ptr + 6, 1.0 - sigma_p / n_p)
    tl.store(stats_ptr + 7, sigma_n / n_n)
    if DPARAMS:
        tl.store(dparams_ptr + 0, -w_p * pick(sums, 8))
        tl.store(dparams_ptr + 1, w_n * pick(sums, 9))
        tl.store(dparams_ptr + 2, w_n * sigma_n - w_p * sigma_p)
        tl.store(dparams_ptr + 3, softplus_p)
        tl.store(dparams_ptr + 4, softplus_n)
        tl.store(dparams_ptr + 5, distance)
