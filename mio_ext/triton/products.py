# SPDX-License-Identifier: Apache-2.0
"""Triton device functions of the fused kernels' matrix products: what the tensor cores are given. By PRODUCT:

16-bit    the features as they are; σ rounded to their type
tf32      float32 features and σ, which they cut to 11 bits
fp16x3    float32 at full accuracy: numbers in two float16 of together 22 bits and a sign, low · low left out
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from .terms import INTERPRET, narrow

# fp16x3: the largest element of a row is in [2^LIFT, 2^(LIFT + 1)), so that float16, which ends at 2^-24, cuts
# the low halves off some 2^-37 below it. Products of two rows stay far from float32's ceiling.
LIFT: tl.constexpr = tl.constexpr(13)


@triton.jit
def matmul(a, b, acc):
    """a b + acc in float32. The interpreter would multiply the bits of bfloat16 numbers."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="tf32")


@triton.jit
def power_of_two(largest, exponent: tl.constexpr):
    """The power of two p with largest · p in [2^exponent, 2^(exponent + 1)), if neither is out of range; and 1/p."""
    field = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    field = tl.minimum(tl.maximum(-field + (254 + exponent), 1), 253)  # Triton 3.8 cannot interpret constant - tensor
    return (field << 23).to(tl.float32, bitcast=True), ((254 - field) << 23).to(tl.float32, bitcast=True)


@triton.jit
def halves(v):
    """(high, low) in float16, high + low = v but for the 23rd bit."""
    high = v.to(tl.float16)
    return high, (v - high.to(tl.float32)).to(tl.float16)


@triton.jit
def row_gradient(g, y, y_low, acc, PRODUCT: tl.constexpr):
    """acc + g y, eq. (9)."""
    if PRODUCT == "fp16x3":
        # However small a row's coefficients are, float16 holds them relative to the largest. Tensor cores cut
        # sums off instead of rounding them, so a tile's sum is added to the others outside.
        up, down = power_of_two(tl.max(tl.abs(g), 1), LIFT)
        high, low = halves(g * up[:, None])
        tile = matmul(low, y, tl.zeros(acc.shape, tl.float32))
        tile = matmul(high, y_low, tile)
        tile = matmul(high, y, tile)
        return acc + tile * down[:, None]
    else:
        return matmul(narrow(g, y.dtype), y, acc)


@triton.jit
def row_offsets(rows, WIDTH: tl.constexpr):
    """[R, 1], where rows of WIDTH elements begin; in 64 bits."""
    return rows[:, None].to(tl.int64) * WIDTH


@triton.jit
def load_operand(ptr, at, n_pad, WIDTH: tl.constexpr, PRODUCT: tl.constexpr):
    """What the tensor cores multiply: (rows, rows) or, in two halves, (high, low)."""
    z = tl.load(ptr + at)
    if PRODUCT == "fp16x3":
        return z, tl.load(ptr + n_pad.to(tl.int64) * WIDTH + at)
    else:
        return z, z


@triton.jit
def row_products(x, x_low, y, y_low, PRODUCT: tl.constexpr):
    """x yᵀ, the smallest products first."""
    s = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
    if PRODUCT == "fp16x3":
        s = matmul(x_low, tl.trans(y), s)
        s = matmul(x, tl.trans(y_low), s)
    return matmul(x, tl.trans(y), s)


@triton.jit
def float32_copy(ptr, n_pad, WIDTH: tl.constexpr):
    """Where fp16x3's prepared rows are once more, behind their halves: these lose a float32's last bit."""
    return (ptr + 2 * n_pad.to(tl.int64) * WIDTH).to(tl.pointer_type(tl.float32))


@triton.jit
def load_rows(ptr, first, at, mask, n_pad, WIDTH: tl.constexpr, PRODUCT: tl.constexpr):
    """Prepared rows as they are, from element ``first`` on."""
    if PRODUCT == "fp16x3":
        return tl.load(float32_copy(ptr, n_pad, WIDTH) + first + at, mask=mask, other=0.0)
    else:
        return tl.load(ptr + first + at, mask=mask, other=0.0)
