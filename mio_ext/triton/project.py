# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of *project*: a row's gradient on its way back through the norm."""

# Triton reads annotations and closures of these functions: no `from __future__ import annotations` here.
import triton
import triton.language as tl

from .products import load_rows


@triton.jit
def project(g, z, inverse, back, unit, NORMALIZE: tl.constexpr):
    """Eq. (10) for rows g = dL/dẑ / unit of [R, D]."""
    if NORMALIZE:
        z_hat = z.to(g.dtype) * inverse[:, None]
        g = g - tl.sum(g * z_hat, 1)[:, None] * z_hat
        return g * (back * unit)[:, None]
    else:
        return g * unit


@triton.jit(do_not_specialize=["n", "d", "splits"])
def project_kernel(
    g_ptr,  # [splits, n_pad, WIDTH] the rows' gradient over the unit, in parts; may be dz_ptr's memory
    z_ptr,  # [n_pad, WIDTH], prepared
    rows_ptr,  # [3, n_pad]
    coefficients_ptr,
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
    dz = project(g, z, inverse, back, tl.load(coefficients_ptr + 6), NORMALIZE)
    tl.debug_barrier()
    dz_at = dz_ptr + row[:, None].to(tl.int64) * d + column[None, :]
    tl.store(dz_at, dz, mask=(row[:, None] < n) & (column[None, :] < d))
