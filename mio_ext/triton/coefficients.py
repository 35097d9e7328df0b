# SPDX-License-Identifier: Apache-2.0
"""Triton device functions of the six numbers that all kernels share, scaled: the coefficients.

In memory: 0-2 scales of the positive and the negative logit, and bias, all base 2; 3-5 what σ weighs in the
gradient of a positive and of a negative pair, and what a positive pair weighs beside it, eq. (7)-(8), over the
*unit*; 6 the unit, by which a finished gradient is multiplied; 7-9 w_p, w_n, w_l as they came. The unit is the
largest of the weights, so that 1/N² flushes nothing.
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
from typing import NamedTuple

import triton
import triton.language as tl

from .terms import LN2

COEFFICIENTS = 10


class Coefficients(NamedTuple):
    """What the loops need of them."""

    scale_p: tl.tensor
    scale_n: tl.tensor
    bias: tl.tensor
    grad_p: tl.tensor
    grad_n: tl.tensor
    grad_l: tl.tensor


@triton.jit
def store_coefficients(
    coefficients_ptr, a_p, a_n, b, w_p, w_n, w_l, COEFFICIENT_LIFT: tl.constexpr, GRADIENT_TIMES: tl.constexpr
):  # fmt: skip
    """COEFFICIENT_LIFT lifts float16 from its floor. A scale that is not positive and finite becomes NaN, and the
    loss with it."""
    a_p = tl.where((a_p > 0) & (a_p < float("inf")), a_p, float("nan"))
    a_n = tl.where((a_n > 0) & (a_n < float("inf")), a_n, float("nan"))
    weight_p = w_p * a_p
    weight_n = w_n * a_n
    unit = tl.maximum(tl.abs(weight_p) + tl.abs(w_l), tl.abs(weight_n))
    over = tl.where(unit == 0.0, 0.0, COEFFICIENT_LIFT / tl.where(unit == 0.0, 1.0, unit))
    tl.store(coefficients_ptr + 0, a_p / LN2)
    tl.store(coefficients_ptr + 1, a_n / LN2)
    tl.store(coefficients_ptr + 2, b / LN2)
    tl.store(coefficients_ptr + 3, -weight_p * over)
    tl.store(coefficients_ptr + 4, weight_n * over)
    tl.store(coefficients_ptr + 5, -w_l * over)
    tl.store(coefficients_ptr + 6, unit * (GRADIENT_TIMES / COEFFICIENT_LIFT))
    tl.store(coefficients_ptr + 7, w_p)
    tl.store(coefficients_ptr + 8, w_n)
    tl.store(coefficients_ptr + 9, w_l)


@triton.jit
def load_coefficients(coefficients_ptr):
    return Coefficients(
        tl.load(coefficients_ptr), tl.load(coefficients_ptr + 1), tl.load(coefficients_ptr + 2),
        tl.load(coefficients_ptr + 3), tl.load(coefficients_ptr + 4), tl.load(coefficients_ptr + 5),
    )  # fmt: skip
