# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the pairwise_bce family; the host side is triton_backend.py.

Fused: a program owns BLOCK_M rows and walks over column tiles. Logits, sigmoids and the rows' gradient
never leave registers; two matrix products a tile share one load of the columns. What happens to a logit is
in triton_terms.py; rows too wide for this are left to triton_chunked.py.

``prepare_kernel`` first turns whatever came (strides, odd widths, rows of any norm) into a dense,
aligned, zero-padded copy whose rows are scaled by a power of two to a largest element in [1, 2). That is
exact, it makes the range of the norms a matter of one float32 factor a row instead of the 16-bit
products, and it leaves the main loop without a mask. What the tensor cores multiply is in triton_products.py.
Per row there are three factors:

    inverse    ẑ = z' inverse, for the copy z'; eq. (1)
    back       dL/dz = (I − ẑẑᵀ) dL/dẑ · back; eq. (10)
    half_norm  ‖ẑ‖²/2, for the distance in eq. (12)
"""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from .triton_products import (
    LIFT,
    float32_copy,
    halves,
    load_operand,
    load_rows,
    power_of_two,
    row_gradient,
    row_offsets,
    row_products,
)
from .triton_terms import (
    LN2,
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
    terms,
    total,
    write_results,
)

EPS: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def touches(diagonal, row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Does the diagonal col − row = diagonal cross the tile?"""
    return (diagonal > col0 - row0 - BLOCK_M) & (diagonal < col0 - row0 + BLOCK_N)


@triton.jit
def positive_pairs(
    x_ptr, rows, m_pad, inverse, half_norm, y_ptr, y_rows_ptr, k_pad, positive_col, there,
    scale_p, bias, grad_p, grad_l,
    BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr, NORMALIZE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """(sums, gradient [R, BLOCK_D] over the unit) of the rows' positive pairs, eq. (7).

    At most one a row, so a dot product in float32 costs next to nothing, keeps labels out of the main
    loop, and the largest weight in a row's gradient is never rounded to 16 bits. Nor does the product
    pass through tensor cores, which cut sums off: all positive pairs' errors would have one sign.
    """
    dtype: tl.constexpr = inverse.dtype
    SLICES: tl.constexpr = 2 if WIDTH > BLOCK_D else 1
    col_inverse = tl.load(y_rows_ptr + positive_col, mask=there, other=1.0)
    # Exactly 1 where rows are equal, so that their difference is 0; a fast division does not promise that.
    ratio = tl.where(col_inverse == inverse, 1.0, col_inverse / inverse)
    product = tl.zeros(rows.shape, dtype)
    distance = tl.zeros(rows.shape, dtype)
    for own in tl.static_range(2 - SLICES, 2):  # the program's own slice last: the gradient is made of it
        depth = (SLICE if own else BLOCK_D - SLICE) + tl.arange(0, BLOCK_D)[None, :]
        x_mask, y_mask = (rows < m_pad)[:, None] & (depth < WIDTH), there[:, None] & (depth < WIDTH)
        x = load_rows(x_ptr, 0, row_offsets(rows, WIDTH) + depth, x_mask, m_pad, WIDTH, PRODUCT).to(dtype)
        y = load_rows(y_ptr, 0, row_offsets(positive_col, WIDTH) + depth, y_mask, k_pad, WIDTH, PRODUCT).to(dtype)
        product += tl.sum(x * y, 1)
        if NORMALIZE:
            difference = (x - y * ratio[:, None]) * inverse[:, None]  # x̂ − ŷ
            distance += 0.5 * tl.sum(difference * difference, 1)
    product = product * (col_inverse * inverse)
    if not NORMALIZE:
        distance = half_norm + tl.load(y_rows_ptr + 2 * k_pad + positive_col, mask=there, other=0.0) - product
    e, relu, sigma = terms(-(product * scale_p + bias))
    pos = tl.zeros([SUMS], tl.float64)
    pos = put(pos, 0, tl.sum(there.to(tl.int32), 0))
    pos = put(pos, 2, tl.sum(tl.where(there, relu + log2_1p(e), 0.0), 0))
    pos = put(pos, 4, tl.sum(tl.where(there, product, 0.0), 0))
    pos = put(pos, 6, tl.sum(tl.where(there, sigma, 0.0), 0))
    pos = put(pos, 8, tl.sum(tl.where(there, sigma * product, 0.0), 0))
    pos = put(pos, 10, tl.sum(tl.where(there, distance, 0.0), 0))
    if NORMALIZE:  # Read again, for two rows do not fit in registers until here; the barrier makes it happen.
        tl.debug_barrier()
        x = load_rows(x_ptr, 0, row_offsets(rows, WIDTH) + depth, x_mask, m_pad, WIDTH, PRODUCT).to(dtype)
        y = load_rows(y_ptr, 0, row_offsets(positive_col, WIDTH) + depth, y_mask, k_pad, WIDTH, PRODUCT).to(dtype)
    g = (sigma * grad_p * col_inverse)[:, None] * y
    if NORMALIZE:  # w_l (x̂ − ŷ), not −w_l ŷ, of which eq. (10) would leave rounding errors where x̂ ≈ ŷ
        g -= (grad_l * inverse)[:, None] * (x - y * ratio[:, None])
    return pos, tl.where(there[:, None], g, 0.0)


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


@triton.jit(do_not_specialize=["n", "d", "counters", "a_p", "a_n", "b", "w_p", "w_n", "w_l"])
def prepare_kernel(
    z_ptr,  # [n, d], any strides
    out_ptr,  # [n_pad, WIDTH]; fp16x3: [2, n_pad, WIDTH], high and low halves, then float32_copy
    rows_ptr,  # [3, n_pad]: inverse, back, half_norm
    counter_ptr,  # [counters], int32, to be zeroed
    params_ptr,  # [6] or unused
    coef_ptr,  # [10], see store_coef
    a_p, a_n, b, w_p, w_n, w_l,
    n, d, stride_n, stride_d, n_pad, counters,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr, FIRST: tl.constexpr, HAS_PARAMS: tl.constexpr,
    COEF_SCALE: tl.constexpr, GRADIENT_TIMES: tl.constexpr, PRODUCT: tl.constexpr,
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
                store_coef(
                    coef_ptr, tl.load(params_ptr), tl.load(params_ptr + 1), tl.load(params_ptr + 2),
                    tl.load(params_ptr + 3), tl.load(params_ptr + 4), tl.load(params_ptr + 5),
                    COEF_SCALE, GRADIENT_TIMES,
                )  # fmt: skip
            else:
                store_coef(coef_ptr, a_p, a_n, b, w_p, w_n, w_l, COEF_SCALE, GRADIENT_TIMES)


@triton.jit(do_not_specialize=[*SIZES, "tiles_per_split", "splits"])
def sweep_kernel(
    x_ptr,  # [m_pad, WIDTH] rows, prepared
    y_ptr,  # [k_pad, WIDTH] columns, prepared
    x_rows_ptr,  # [3, m_pad] factors of the rows
    y_rows_ptr,  # [3, k_pad]
    x_ids_ptr,  # [m], int64, or unused
    y_ids_ptr,  # [k]
    coef_ptr,  # [10], see store_coef
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
    scale_p, scale_n, bias, grad_p, grad_n, grad_l = load_coef(coef_ptr)
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
        there = tl.where(tl.program_id(1) == 0, positive_col, -1) >= 0  # of the column splits, the first has them
        pos, acc = positive_pairs(
            x_ptr, rows, m_pad, inverse, half_norm, y_ptr, y_rows_ptr, k_pad, positive_col, there,
            scale_p, bias, grad_p, grad_l, BLOCK_D, WIDTH, SLICE, NORMALIZE, PRODUCT,
        )  # fmt: skip
        if LOSS:  # stored at once: nothing of it stays in a register through the loop
            negatives = count_negatives(rows, m, first, end, positive_col, own_col)
            tl.store(record + tl.arange(0, SUMS), put(pos, 1, negatives))
            tl.debug_barrier()

    row_scale = inverse * scale_n
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
            sigma, p, log2_sum, products, sigmas, sigma_products = negative_tile(
                s, t, p, log2_sum, products, sigmas, sigma_products, LOSS, DPARAMS
            )
            g = sigma * grad_n  # (8)
        if GRAD:
            if SCALED:
                g = g * col_inverse[None, :]
            acc = row_gradient(g, y, y_low, acc, PRODUCT)

    inverse = tl.load(x_rows_ptr + rows)
    if LOSS:
        if HAS_IDS:
            tl.store(record + tl.arange(0, SUMS), put(pos, 2, total((pos_log2 + log2_1p(pos_p)).to(tl.float64))))
            tl.debug_barrier()
        store_lanes(record, p, log2_sum, products, sigmas, sigma_products, inverse, rows < m)
    stride = m_pad.to(tl.int64) * WIDTH
    if GRAD:
        tl.store(partial_ptr + tl.program_id(1) * stride + block + at, acc)
    tl.debug_barrier()  # all of this program's stores come before its tickets
    if LOSS:  # before the gradient, whose end wants all registers
        ticket = tl.atomic_add(counter_ptr, 1)
        if ticket == programs - 1:
            write_results(sums_ptr, programs, coef_ptr, loss_ptr, stats_ptr, dparams_ptr, DPARAMS)
    if GRAD and FINISH:
        ticket = tl.atomic_add(counter_ptr + 1 + tl.program_id(0), 1)
        if ticket == splits - 1:
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for split in range(0, splits):
                acc += tl.load(partial_ptr + split * stride + block + at, cache_modifier=".cg")
            back = tl.load(x_rows_ptr + m_pad + rows)
            z = load_rows(x_ptr, block, at, (rows < m_pad)[:, None], m_pad, WIDTH, PRODUCT)
            dx = project(acc, z, inverse, back, tl.load(coef_ptr + 6), NORMALIZE)
            dx_at = tl.arange(0, BLOCK_M)[:, None] * d + depth[None, :]
            tl.store(dx_ptr + row0.to(tl.int64) * d + dx_at, dx, mask=(rows[:, None] < m) & (depth[None, :] < d))


@triton.jit(do_not_specialize=["n", "d", "splits"])
def project_kernel(
    g_ptr,  # [splits, n_pad, WIDTH] the rows' gradient over the unit, in parts; may be dz_ptr's memory
    z_ptr,  # [n_pad, WIDTH], prepared
    rows_ptr,  # [3, n_pad]
    coef_ptr,
    dz_ptr,  # [n, d]
    n, n_pad, d, splits,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NORMALIZE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Eq. (10) for what the sweeps left, where they did not finish themselves."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    mask = (column < WIDTH)[None, :]
    inverse = tl.load(rows_ptr + row)
    back = tl.load(rows_ptr + n_pad + row)
    g = tl.load(g_ptr + at, mask=mask, other=0.0)
    for split in range(1, splits):
        g += tl.load(g_ptr + split * n_pad.to(tl.int64) * WIDTH + at, mask=mask, other=0.0)
    z = load_rows(z_ptr, 0, at, mask, n_pad, WIDTH, PRODUCT)
    dz = project(g, z, inverse, back, tl.load(coef_ptr + 6), NORMALIZE)
    tl.debug_barrier()
    dz_at = dz_ptr + row[:, None].to(tl.int64) * d + column[None, :]
    tl.store(dz_at, dz, mask=(row[:, None] < n) & (column[None, :] < d))
