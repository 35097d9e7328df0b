# SPDX-License-Identifier: Apache-2.0
"""Triton device code of the pairwise_bce family; the host side is triton_backend.py.

Fused: a program owns BLOCK_M rows and walks over column tiles. Logits, sigmoids and the rows' gradient
never leave registers; two matrix products a tile share one load of the columns.

``prepare_kernel`` first turns whatever came (strides, odd widths, rows of any norm) into a dense,
aligned, zero-padded copy whose rows are scaled by a power of two to a largest element in [1, 2). That is
exact, it makes the range of the norms a matter of one float32 factor a row instead of the 16-bit
products, and it leaves the main loop without a mask. Per row there are three factors:

    inverse    ẑ = z' inverse, for the copy z'; eq. (1)
    back       dL/dz = (I − ẑẑᵀ) dL/dẑ · back; eq. (10)
    half_norm  ‖ẑ‖²/2, for the distance in eq. (12)

Logits are base 2 (log2 e is in the scales). The softplus of many logits costs one logarithm: with
e = 2^−|t| it is Σ max(t, 0) + log2 Π(1 + e), and Π(1 + e) − 1 is kept, which is exact for tiny e.
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
import triton
import triton.language as tl

INTERPRET: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
EPS: tl.constexpr = tl.constexpr(1e-12)

# A program's sums, in this order; t is minus the logit on positive pairs, the logit on negative ones.
#   0, 1  number of positive, negative pairs    6, 7  Σ σ(t)
#   2, 3  Σ softplus(t) / ln 2                  8, 9  Σ σ(t) x·y
#   4, 5  Σ x·y                                 10    Σ ‖x − y‖²/2 over positive pairs
SUMS: tl.constexpr = tl.constexpr(16)

# What the host gives as plain integers changes with the batch: specialising on it would recompile.
_SIZES = ["m", "k", "d", "m_pad", "k_pad", "diag_self", "diag_positive", "diag_wrap", "own_first", "own_end"]


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
        v = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return v.to(dtype)


@triton.jit
def matmul(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc in float32. The interpreter would multiply the bits of bfloat16 numbers."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def log2_1p(v):
    """log2(1 + v) for v ≥ 0, to the last bits where v is tiny: the rounding of 1 + v cancels."""
    w = 1.0 + v
    return tl.where(w == 1.0, v / LN2, tl.log2(w) * (v / tl.where(w == 1.0, 1.0, w - 1.0)))


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
def add_logs(p, log2_sum, e):
    """Multiplies the columns' 1 + e into 1 + p [R, 4]; whole powers of two go to log2_sum, so p < 1.

    At most 64 columns a lane, else the product overflows. No logarithm: that waits for the end.
    """
    q = multiply_lanes(e)
    p = p * q + (p + q)
    if p.dtype == tl.float64:
        log2_sum += log2_1p(p)
        p = tl.zeros_like(p)
    else:
        bits = (1.0 + p).to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - 127
        mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        log2_sum += exponent.to(tl.float32)
        p = tl.where(exponent > 0, mantissa - 1.0, p)
    return p, log2_sum


@triton.jit
def terms(t):
    """(e, max(t, 0), σ(t)) of base-2 logits from one exponential and one reciprocal; NaN stays NaN."""
    e = tl.exp2(-tl.abs(t))
    below = t < 0
    sigma = tl.where(below, e, 1.0) * reciprocal(1.0 + e)
    return e, tl.where(below, 0.0, t), sigma


@triton.jit
def touches(diagonal, row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Does the diagonal col − row = diagonal cross the tile?"""
    return (diagonal > col0 - row0 - BLOCK_M) & (diagonal < col0 - row0 + BLOCK_N)


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
def special_columns(
    rows, m, k, diag_self, diag_positive, diag_wrap, own_first, own_end,
    HAS_IDS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(positive column, own column if it does not count) of each row; -1: none.

    In (i, j) of the op, the positive column offset + (i + shift) mod M is the two diagonals
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
    return positive, own


@triton.jit
def labelled_tile(
    s, inverse, half_norm, col_half_norm, positive, negative, scale_p, scale_n, bias, grad_p, grad_n, grad_l,
    p, log2_sum, products, sigmas, sigma_products, pos_p, pos_log2, pos, LOSS: tl.constexpr, DPARAMS: tl.constexpr,
):  # fmt: skip
    """A tile with pairs of both classes: eq. (7)-(8) over the unit, and the sums.

    s: x·y short of the rows' ``inverse``. pos_p, pos_log2: add_logs of the positives; pos: the [SUMS]
    vector of everything that is not kept in lanes.
    """
    product = s * inverse[:, None]
    t = tl.where(positive, -(product * scale_p + bias), product * scale_n + bias)
    e, relu, sigma = terms(t)
    if LOSS:
        p, log2_sum = add_logs(p, log2_sum + sum_lanes(tl.where(negative, relu, 0.0)), tl.where(negative, e, 0.0))
        products += sum_lanes(tl.where(negative, s, 0.0))
        sigmas += sum_lanes(tl.where(negative, sigma, 0.0))
        relus = sum_lanes(tl.where(positive, relu, 0.0))
        pos_p, pos_log2 = add_logs(pos_p, pos_log2 + relus, tl.where(positive, e, 0.0))
        half_norms = half_norm[:, None] + col_half_norm[None, :]
        pos = put(pos, 0, total(positive.to(tl.int32)))
        pos = put(pos, 1, total(negative.to(tl.int32)))
        pos = put(pos, 4, total(tl.where(positive, product, 0.0)))
        pos = put(pos, 6, total(tl.where(positive, sigma, 0.0)))
        pos = put(pos, 10, total(tl.where(positive, half_norms - product, 0.0)))
        if DPARAMS:
            sigma_products += sum_lanes(tl.where(negative, sigma * s, 0.0))
            pos = put(pos, 8, total(tl.where(positive, sigma * product, 0.0)))
    g = tl.where(positive, sigma * grad_p + grad_l, tl.where(negative, sigma * grad_n, 0.0))
    return g, p, log2_sum, products, sigmas, sigma_products, pos_p, pos_log2, pos


@triton.jit
def positive_pairs(
    x, inverse, half_norm, y_ptr, y_rows_ptr, k_pad, positive_col, there, scale_p, bias, grad_p, grad_l, pos,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    """(sums, gradient [R, D] over the unit) of the rows' positive pairs, eq. (7).

    At most one a row, so a dot product in float32 costs next to nothing, keeps labels out of the main
    loop, and the largest weight in a row's gradient is never rounded to 16 bits.
    """
    depth = tl.arange(0, x.shape[1])
    at = y_ptr + positive_col[:, None].to(tl.int64) * x.shape[1] + depth[None, :]
    partner = tl.load(at, mask=there[:, None], other=0.0).to(tl.float32)
    if NORMALIZE:
        partner = partner * tl.load(y_rows_ptr + positive_col, mask=there, other=0.0)[:, None]
    product = tl.sum(x.to(tl.float32) * partner, 1) * inverse
    e, relu, sigma = terms(-(product * scale_p + bias))
    half_norms = half_norm + tl.load(y_rows_ptr + 2 * k_pad + positive_col, mask=there, other=0.0)
    pos = put(pos, 0, tl.sum(there.to(tl.int32), 0))
    pos = put(pos, 2, tl.sum(tl.where(there, relu + log2_1p(e), 0.0), 0))
    pos = put(pos, 4, tl.sum(tl.where(there, product, 0.0), 0))
    pos = put(pos, 6, tl.sum(tl.where(there, sigma, 0.0), 0))
    pos = put(pos, 8, tl.sum(tl.where(there, sigma * product, 0.0), 0))
    pos = put(pos, 10, tl.sum(tl.where(there, half_norms - product, 0.0), 0))
    return pos, tl.where(there, sigma * grad_p + grad_l, 0.0)[:, None] * partner


@triton.jit
def store_lanes(sums_ptr, p, log2_sum, products, sigmas, sigma_products, inverse, row_mask):
    """Rounds off a program's negative pairs, lanes [R, 4], and stores them in its record of sums."""
    keep = row_mask[:, None]
    row = inverse[:, None]
    tl.store(sums_ptr + 3, total(tl.where(keep, log2_sum + log2_1p(p), 0.0).to(tl.float64)))
    tl.store(sums_ptr + 5, total(tl.where(keep, products * row, 0.0).to(tl.float64)))
    tl.store(sums_ptr + 7, total(tl.where(keep, sigmas, 0.0).to(tl.float64)))
    tl.store(sums_ptr + 9, total(tl.where(keep, sigma_products * row, 0.0).to(tl.float64)))


@triton.jit
def write_results(sums_ptr, programs, coef_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS: tl.constexpr):
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
    w_p = tl.load(coef_ptr + 7).to(tl.float64)
    w_n = tl.load(coef_ptr + 8).to(tl.float64)
    w_l = tl.load(coef_ptr + 9).to(tl.float64)
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


@triton.jit
def project(g, z, inverse, back, unit, NORMALIZE: tl.constexpr):
    """Eq. (10) for rows g = dL/dẑ / unit of [R, D]."""
    if NORMALIZE:
        z_hat = z.to(g.dtype) * inverse[:, None]
        g = g - tl.sum(g * z_hat, 1)[:, None] * z_hat
        return g * (back * unit)[:, None]
    else:
        return g * unit


@triton.jit
def store_coef(
    coef_ptr, a_p, a_n, b, w_p, w_n, w_l, COEF_SCALE: tl.constexpr, GRADIENT_TIMES: tl.constexpr
):  # fmt: skip
    """The numbers all kernels share.

    Scales of the positive and negative logit and bias, base 2; weights of σ on positive and negative
    pairs and the constant on positive ones, eq. (7)-(8), over ``unit``; unit; w_p, w_n, w_l. The unit is
    the largest weight, so 1/N² flushes nothing; COEF_SCALE lifts float16 further from its floor.
    A scale that is not positive and finite becomes NaN, and the loss with it.
    """
    a_p = tl.where((a_p > 0) & (a_p < float("inf")), a_p, float("nan"))
    a_n = tl.where((a_n > 0) & (a_n < float("inf")), a_n, float("nan"))
    weight_p = w_p * a_p
    weight_n = w_n * a_n
    unit = tl.maximum(tl.abs(weight_p) + tl.abs(w_l), tl.abs(weight_n))
    over = tl.where(unit == 0.0, 0.0, COEF_SCALE / tl.where(unit == 0.0, 1.0, unit))
    tl.store(coef_ptr + 0, a_p / LN2)
    tl.store(coef_ptr + 1, a_n / LN2)
    tl.store(coef_ptr + 2, b / LN2)
    tl.store(coef_ptr + 3, -weight_p * over)
    tl.store(coef_ptr + 4, weight_n * over)
    tl.store(coef_ptr + 5, -w_l * over)
    tl.store(coef_ptr + 6, unit * (GRADIENT_TIMES / COEF_SCALE))
    tl.store(coef_ptr + 7, w_p)
    tl.store(coef_ptr + 8, w_n)
    tl.store(coef_ptr + 9, w_l)


@triton.jit(do_not_specialize=["n", "d", "n_pad", "counters", "a_p", "a_n", "b", "w_p", "w_n", "w_l"])
def prepare_kernel(
    z_ptr,  # [n, d], any strides
    out_ptr,  # [n_pad, WIDTH]
    rows_ptr,  # [3, n_pad]: inverse, back, half_norm
    counter_ptr,  # [counters], int32, to be zeroed
    params_ptr,  # [6] or unused
    coef_ptr,  # [10], see store_coef
    a_p, a_n, b, w_p, w_n, w_l,
    n, d, stride_n, stride_d, n_pad, counters,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr, FIRST: tl.constexpr, HAS_PARAMS: tl.constexpr,
    COEF_SCALE: tl.constexpr, GRADIENT_TIMES: tl.constexpr,
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
    if NORMALIZE and raw.dtype != tl.float64:
        exponent = (tl.max(tl.abs(z), 1).to(tl.int32, bitcast=True) >> 23) & 0xFF
        power = (tl.minimum(tl.maximum(254 - exponent, 1), 253) << 23).to(tl.float32, bitcast=True)
        z = z * power[:, None]
    norm2 = tl.sum(z * z, 1)
    inverse = tl.zeros_like(norm2) + 1.0
    back = inverse
    half_norm = 0.5 * norm2
    if NORMALIZE:
        norm = tl.sqrt(norm2)
        inverse = 1.0 / tl.maximum(norm, power * EPS)
        back = tl.where(norm <= power * EPS, 0.0, power / norm)
        half_norm = 0.5 * (norm * inverse) * (norm * inverse)
    out = out_ptr + row[:, None].to(tl.int64) * WIDTH + column[None, :]
    tl.store(out, narrow(z, raw.dtype), mask=(row[:, None] < n_pad) & (column[None, :] < WIDTH))
    tl.store(rows_ptr + row, inverse, mask=row < n_pad)
    tl.store(rows_ptr + n_pad + row, back, mask=row < n_pad)
    tl.store(rows_ptr + 2 * n_pad + row, half_norm, mask=row < n_pad)
    if tl.program_id(0) == 0:
        for first in range(0, counters, 1024):
            index = first + tl.arange(0, 1024)
            tl.store(counter_ptr + index, tl.zeros([1024], tl.int32), mask=index < counters)
        if FIRST:
            if HAS_PARAMS:
                store_coef(
                    coef_ptr, tl.load(params_ptr), tl.load(params_ptr + 1), tl.load(params_ptr + 2),
                    tl.load(params_ptr + 3), tl.load(params_ptr + 4), tl.load(params_ptr + 5),
                    COEF_SCALE, GRADIENT_TIMES,
                )  # fmt: skip
            else:
                store_coef(coef_ptr, a_p, a_n, b, w_p, w_n, w_l, COEF_SCALE, GRADIENT_TIMES)


@triton.jit(do_not_specialize=[*_SIZES, "tiles_per_split", "splits"])
def sweep_kernel(
    x_ptr,  # [m_pad, BLOCK_D] rows, prepared
    y_ptr,  # [k_pad, BLOCK_D] columns, prepared
    x_rows_ptr,  # [3, m_pad] factors of the rows
    y_rows_ptr,  # [3, k_pad]
    x_ids_ptr,  # [m], int64, or unused
    y_ids_ptr,  # [k]
    coef_ptr,  # [10], see store_coef
    dx_ptr,  # [m, d], float32
    partial_ptr,  # [splits, m_pad, BLOCK_D], float32
    sums_ptr,  # [programs, SUMS], float64
    counter_ptr,  # [1 + row blocks], int32, zero
    loss_ptr, stats_ptr, dparams_ptr,
    m, k, d, m_pad, k_pad, diag_self, diag_positive, diag_wrap, own_first, own_end, tiles_per_split, splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, TRANSPOSED: tl.constexpr,
    GRAD: tl.constexpr, LOSS: tl.constexpr, DPARAMS: tl.constexpr, FINISH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows against one range of columns: their share of the loss and of dx, eq. (9).

    The program that is last to finish adds up what the others left, in a fixed order: the same bits every
    time. With FINISH that goes for the gradient too: a small batch waits for launches, a large one for
    registers, and leaves the sum over splits and eq. (10) to project_kernel.
    """
    row0 = tl.program_id(0) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * BLOCK_D + depth[None, :])
    inverse = tl.load(x_rows_ptr + rows)
    half_norm = tl.load(x_rows_ptr + 2 * m_pad + rows)
    scale_p = tl.load(coef_ptr)
    scale_n = tl.load(coef_ptr + 1)
    bias = tl.load(coef_ptr + 2)
    grad_p = tl.load(coef_ptr + 3)
    grad_n = tl.load(coef_ptr + 4)
    grad_l = tl.load(coef_ptr + 5)
    first = tl.program_id(1) * tiles_per_split * BLOCK_N
    end = tl.minimum(first + tiles_per_split * BLOCK_N, k)
    positive_col, own_col = special_columns(
        rows, m, k, diag_self, diag_positive, diag_wrap, own_first, own_end, HAS_IDS, EXCLUDE_SELF, TRANSPOSED
    )

    p = tl.zeros([BLOCK_M, 4], tl.float32)
    log2_sum = tl.zeros([BLOCK_M, 4], tl.float32)
    products = tl.zeros([BLOCK_M, 4], tl.float32)
    sigmas = tl.zeros([BLOCK_M, 4], tl.float32)
    sigma_products = tl.zeros([BLOCK_M, 4], tl.float32)
    pos_p = tl.zeros([BLOCK_M, 4], tl.float32)
    pos_log2 = tl.zeros([BLOCK_M, 4], tl.float32)
    pos = tl.zeros([SUMS], tl.float64)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    programs = tl.num_programs(0) * tl.num_programs(1)
    record = sums_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * SUMS
    if HAS_IDS:
        row_ids = tl.load(x_ids_ptr + rows, mask=rows < m, other=0)
    else:
        there = (positive_col >= 0) & (tl.program_id(1) == 0)  # of the column splits, the first has them
        pos, acc = positive_pairs(
            x, inverse, half_norm, y_ptr, y_rows_ptr, k_pad, positive_col, there,
            scale_p, bias, grad_p, grad_l, pos, NORMALIZE,
        )  # fmt: skip
        if LOSS:  # stored at once: nothing of it stays in a register through the loop
            present = tl.where(rows < m, end - first, 0)
            present -= ((positive_col >= first) & (positive_col < end)).to(tl.int32)
            present -= ((own_col >= first) & (own_col < end)).to(tl.int32)
            tl.store(record + tl.arange(0, SUMS), put(pos, 1, tl.sum(present.to(tl.int64), 0)))
            tl.debug_barrier()

    row_scale = inverse * scale_n
    for col0 in range(first, end, BLOCK_N):
        cols = col0 + tl.arange(0, BLOCK_N)
        y = tl.load(y_ptr + cols[:, None].to(tl.int64) * BLOCK_D + depth[None, :])
        col_inverse = tl.load(y_rows_ptr + cols)
        s = matmul(
            x, tl.trans(y), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION
        )  # (2), but for the norms, in float32
        if NORMALIZE:
            s = s * col_inverse[None, :]
        if HAS_IDS:
            col_ids = tl.load(y_ids_ptr + cols, mask=cols < k, other=0)
            keep = (rows < m)[:, None] & (cols < k)[None, :] & (cols[None, :] != own_col[:, None])
            positive = keep & (row_ids[:, None] == col_ids[None, :])
            negative = keep & (row_ids[:, None] != col_ids[None, :])
            col_half_norm = tl.load(y_rows_ptr + 2 * k_pad + cols)
            g, p, log2_sum, products, sigmas, sigma_products, pos_p, pos_log2, pos = labelled_tile(
                s, inverse, half_norm, col_half_norm, positive, negative, scale_p, scale_n, bias, grad_p, grad_n,
                grad_l, p, log2_sum, products, sigmas, sigma_products, pos_p, pos_log2, pos, LOSS, DPARAMS,
            )  # fmt: skip
        else:
            t = s * row_scale[:, None] + bias
            # Tiles that hold something else than negative pairs are few: -inf takes it out of every sum.
            ragged = col0 + BLOCK_N > k
            if EXCLUDE_SELF:
                ragged = ragged | touches(diag_self, row0, col0, BLOCK_M, BLOCK_N)
            crossed = touches(diag_positive, row0, col0, BLOCK_M, BLOCK_N)
            if ragged | crossed | touches(diag_wrap, row0, col0, BLOCK_M, BLOCK_N):
                c = cols[None, :]
                out = (c == positive_col[:, None]) | (c == own_col[:, None]) | (c >= k)
                t = tl.where(out, float("-inf"), t)
                s = tl.where(out, 0.0, s)
            e, relu, sigma = terms(t)
            if LOSS:
                p, log2_sum = add_logs(p, log2_sum + sum_lanes(relu), e)
                products += sum_lanes(s)
                sigmas += sum_lanes(sigma)
                if DPARAMS:
                    sigma_products += sum_lanes(sigma * s)
            g = sigma * grad_n  # (8)
        if GRAD:
            if NORMALIZE:
                g = g * col_inverse[None, :]
            acc = matmul(narrow(g, x.dtype), y, acc, PRECISION)  # (9)

    inverse = tl.load(x_rows_ptr + rows)
    if LOSS:
        if HAS_IDS:
            tl.store(record + tl.arange(0, SUMS), put(pos, 2, total((pos_log2 + log2_1p(pos_p)).to(tl.float64))))
            tl.debug_barrier()
        store_lanes(record, p, log2_sum, products, sigmas, sigma_products, inverse, rows < m)
    if GRAD:
        at = rows[:, None].to(tl.int64) * BLOCK_D + depth[None, :]
        stride = m_pad.to(tl.int64) * BLOCK_D
        tl.store(partial_ptr + tl.program_id(1) * stride + at, acc)
        if FINISH:
            tl.debug_barrier()  # all of this program's stores come before its ticket
            if tl.atomic_add(counter_ptr + 1 + tl.program_id(0), 1) == splits - 1:
                acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                for split in range(0, splits):
                    acc += tl.load(partial_ptr + split * stride + at, cache_modifier=".cg")
                back = tl.load(x_rows_ptr + m_pad + rows)
                dx = project(acc, tl.load(x_ptr + at), inverse, back, tl.load(coef_ptr + 6), NORMALIZE)
                dx_at = dx_ptr + rows[:, None].to(tl.int64) * d + depth[None, :]
                tl.store(dx_at, dx, mask=(rows[:, None] < m) & (depth[None, :] < d))
    if LOSS:
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr, 1) == programs - 1:
            write_results(sums_ptr, programs, coef_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS)


# ---------------------------------------------------------------- wide rows: library products, fused epilogue


@triton.jit(do_not_specialize=[*_SIZES, "row0", "n_rows", "record0"])
def terms_kernel(
    s_ptr,  # [n_rows, k_pad] products of the chunk's rows with all columns
    g_ptr,  # [n_rows, k_pad] the gradient's coefficients in the features' type, over the same memory
    x_rows_ptr, y_rows_ptr, x_ids_ptr, y_ids_ptr, coef_ptr, sums_ptr,
    row0, n_rows, record0, m, k, m_pad, k_pad, stride_g, diag_self, diag_positive, diag_wrap, own_first, own_end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_IDS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, GRAD: tl.constexpr, DPARAMS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of a chunk of products: their sums, and their coefficients of eq. (7)-(8) in place.

    A 16-bit row begins where its float32 row does and is half as long: a tile is read before anything is
    written to its place, and no row has a second program.
    """
    dtype = s_ptr.dtype.element_ty
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = row0 + local
    inverse = tl.load(x_rows_ptr + rows)
    half_norm = tl.load(x_rows_ptr + 2 * m_pad + rows)
    scale_p = tl.load(coef_ptr)
    scale_n = tl.load(coef_ptr + 1)
    bias = tl.load(coef_ptr + 2)
    grad_p = tl.load(coef_ptr + 3)
    grad_n = tl.load(coef_ptr + 4)
    grad_l = tl.load(coef_ptr + 5)
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
        col_half_norm = tl.load(y_rows_ptr + 2 * k_pad + cols)
        keep = (rows < m)[:, None] & (cols < k)[None, :] & (cols[None, :] != own_col[:, None])
        if HAS_IDS:
            col_ids = tl.load(y_ids_ptr + cols, mask=cols < k, other=0)
            same = row_ids[:, None] == col_ids[None, :]
        else:
            same = cols[None, :] == positive_col[:, None]
        g, p, log2_sum, products, sigmas, sigma_products, pos_p, pos_log2, pos = labelled_tile(
            s * col_inverse[None, :], inverse, half_norm, col_half_norm, keep & same, keep & (same == 0),
            scale_p, scale_n, bias, grad_p, grad_n, grad_l,
            p, log2_sum, products, sigmas, sigma_products, pos_p, pos_log2, pos, True, DPARAMS,
        )  # fmt: skip
        if GRAD:
            # Both sides' norms, so that one matrix serves dx and dy; project_kernel takes the row's own back out.
            g = narrow(g * inverse[:, None] * col_inverse[None, :], g_ptr.dtype.element_ty)
            tl.store(g_ptr + row_at * stride_g + cols[None, :], g)
    record = sums_ptr + (record0 + tl.program_id(0)).to(tl.int64) * SUMS
    tl.store(record + tl.arange(0, SUMS), put(pos, 2, total((pos_log2 + log2_1p(pos_p)).to(tl.float64))))
    tl.debug_barrier()
    store_lanes(record, p, log2_sum, products, sigmas, sigma_products, inverse, rows < m)


@triton.jit(do_not_specialize=["n", "n_pad", "d", "splits"])
def project_kernel(
    g_ptr,  # [splits, n_pad, WIDTH] the rows' gradient over the unit, in parts; may be dz_ptr's memory
    z_ptr,  # [n_pad, WIDTH], prepared
    rows_ptr,  # [3, n_pad]
    coef_ptr,
    dz_ptr,  # [n, d]
    n, n_pad, d, splits,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORMALIZE: tl.constexpr, BOTH_NORMS: tl.constexpr,
):  # fmt: skip
    """Eq. (10). BOTH_NORMS: the coefficients were terms_kernel's, with the row's own norm in them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    mask = (column < WIDTH)[None, :]
    inverse = tl.load(rows_ptr + row)
    back = tl.load(rows_ptr + n_pad + row)
    g = tl.load(g_ptr + at, mask=mask, other=0.0)
    for split in range(1, splits):
        g += tl.load(g_ptr + split * n_pad.to(tl.int64) * WIDTH + at, mask=mask, other=0.0)
    if BOTH_NORMS:
        g = g / inverse[:, None]
    dz = project(g, tl.load(z_ptr + at, mask=mask, other=0.0), inverse, back, tl.load(coef_ptr + 6), NORMALIZE)
    tl.debug_barrier()
    dz_at = dz_ptr + row[:, None].to(tl.int64) * d + column[None, :]
    tl.store(dz_at, dz, mask=(row[:, None] < n) & (column[None, :] < d))


@triton.jit(do_not_specialize=["records"])
def results_kernel(sums_ptr, records, coef_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS: tl.constexpr):
    write_results(sums_ptr, records, coef_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS)
