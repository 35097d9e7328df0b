# SPDX-License-Identifier: Apache-2.0
"""Problems that nobody thought of, for test_fuzz_op.py and test_fuzz_losses.py, and how their results are judged.

`make test` runs the same examples every time; `make fuzz SECONDS=600` (MIO_FUZZ=1) looks for new ones. An error is held
to what a float32 evaluation can promise: a part of the result (the tolerance table), and a few roundings of the sum of
the terms' magnitudes, where they cancel.
"""

import math
import os
from typing import NamedTuple

import torch
from conftest import FUSED_BACKENDS
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mio_ext import available_backends, backends, reference

INTERPRETED = backends.interpreted()
LONG = os.environ.get("MIO_FUZZ") == "1"
#: (backend, device) of all that can run here.
EVERYWHERE = [("triton", "cpu")] if INTERPRETED else [*FUSED_BACKENDS, ("reference", "cpu")]
if torch.cuda.is_available() and not INTERPRETED:
    EVERYWHERE += [(name, "cuda") for name in available_backends() if name != "cpu"]


def fuzzed(examples):
    """Settings: so many examples, the same every time but in a search."""
    return settings(
        max_examples=4 * examples if LONG else examples,
        derandomize=not LONG,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


# ------------------------------------------------------------------------------------------------- problems

SIZES = st.integers(1, 33) | st.sampled_from([65] if INTERPRETED else [63, 64, 65, 127, 129, 200, 257, 300])
WIDTHS = st.integers(1, 33) | st.sampled_from(
    [64, 130, 260] if INTERPRETED else [64, 127, 128, 129, 256, 257, 300, 520]
)
LAYOUTS = ["dense", "rows apart", "columns apart", "transposed", "at an offset", "one row over and over"]


class Matrix(NamedTuple):
    """How a side of a problem comes about."""

    seed: int
    layout: str
    norm: float
    zero_rows: int
    equal_rows: int

    def make(self, rows, dim, dtype, device, like=None):
        generator = torch.Generator().manual_seed(self.seed)
        z = torch.randn(rows, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
        if like is not None:
            z = z * 0.3 + like.cpu().double().repeat(-(-rows // len(like)), 1)[:rows]
        z *= self.norm
        z[: self.equal_rows] = z[-1].clone()
        z[len(z) // 2 :][: self.zero_rows] = 0
        return laid_out(z.to(device, dtype), self.layout)


def laid_out(z, layout):
    """The same numbers (or, of one row, its copies) with other strides."""
    rows, dim = z.shape
    if layout == "rows apart":
        return z.new_full((rows, 3, dim), math.nan).index_copy_(
            1, torch.ones(1, dtype=torch.long, device=z.device), z[:, None]
        )[:, 1]
    if layout == "columns apart":
        return z.new_full((rows, dim, 2), math.nan).index_copy_(
            2, torch.zeros(1, dtype=torch.long, device=z.device), z[..., None]
        )[..., 0]
    if layout == "transposed":
        return z.T.contiguous().T
    if layout == "at an offset":
        return torch.cat([z.new_full((5,), math.nan), z.flatten()])[5:].view(rows, dim)
    return z[:1].expand(rows, dim) if layout == "one row over and over" else z


MATRICES = st.builds(
    Matrix,
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(LAYOUTS),
    norm=st.sampled_from([1.0, 1.0, 1e-2, 30.0]),
    zero_rows=st.sampled_from([0, 0, 0, 1, 3]),
    equal_rows=st.sampled_from([0, 0, 2, 7]),
)
SCALES = st.floats(-1.5, 2.0).map(lambda e: 10.0**e)  # of logits
BIASES = st.sampled_from([0.0, -10.0, 10.0]) | st.floats(-8, 8)
WEIGHTS = st.sampled_from([0.0, 1.0]) | st.floats(-4, 1).map(lambda e: 10.0**e)


# ------------------------------------------------------------------------------------------------- judgement


def magnitudes(x, y, *, scale, bias, weights, shift, offset, exclude_self, normalize, x_ids=None, y_ids=None):
    """Σ of |terms| in float64: of the loss, the gradients of both sides (norms) and those of (a_p, a_n, b)."""
    symmetric = y is None
    x = x.detach().double()
    y, y_ids = (x, x_ids) if y is None else (y.detach().double(), y_ids)
    size = [z.norm(dim=1).clamp(min=1e-12) if normalize else z.new_ones(len(z)) for z in (x, y)]
    x, y = x / size[0][:, None], y / size[1][:, None]
    row, col = torch.arange(len(x), device=x.device)[:, None], torch.arange(len(y), device=x.device)
    keep = (col != offset + row) | torch.tensor(not exclude_self)
    positive = keep & ((col == offset + (row + shift) % len(x)) if x_ids is None else x_ids[:, None] == y_ids)
    negative = keep & ~positive
    s = x @ y.T
    (a_p, a_n), (w_p, w_n, w_l) = scale, weights
    t_p, t_n = -(a_p * s + bias), a_n * s + bias
    softplus = w_p * reference.softplus(t_p) * positive + w_n * reference.softplus(t_n) * negative
    g_p, g_n = w_p * t_p.sigmoid() * positive, w_n * t_n.sigmoid() * negative
    # A logit's rounding goes into its sigma; the linear term is a difference of rows.
    slope = a_p * g_p * (1 + a_p * s.abs() + abs(bias)) + a_n * g_n * (1 + a_n * s.abs() + abs(bias))
    of_x, of_y, linear = x.norm(dim=1), y.norm(dim=1), w_l * positive.double()
    dx = (slope @ of_y + linear @ of_y + linear.sum(1) * of_x) / size[0]
    dy = (slope.T @ of_x + linear.T @ of_x + linear.sum(0) * of_y) / size[1]
    numbers = (g_p * s).abs().sum(), (g_n * s).abs().sum(), g_p.sum() + g_n.sum()
    grow = 1 + abs(bias) + max(a_p, a_n) * float(s.abs().max())
    return {
        "loss": (softplus.sum() + w_l * (positive * 2).sum()),
        "sides": [(dx + dy).norm(), None] if symmetric else [dx.norm(), dy.norm()],
        "numbers": torch.stack(numbers) * grow,
    }


def assert_close(what, actual, exact, dtype, limit, magnitude):
    """Within ``limit`` of the result and eight roundings of what it is the sum of."""
    # sigma may be rounded to the features' 16 bits before it is multiplied.
    unit = {torch.float64: 2.0**-52, torch.float32: 2.0**-23}.get(dtype, 2.0**-23)
    floor = 2.0**-25 * math.sqrt(exact.numel()) if actual.dtype == torch.float16 else 1e-30  # subnormal numbers
    error = float((actual.double() - exact.double()).norm())
    allowed = limit * float(exact.norm()) + 8 * unit * float(magnitude) + floor
    assert error <= allowed, f"{what}: off by {error:.2e}, allowed {allowed:.2e}, is {float(exact.norm()):.2e}"


def on_threads(count, step):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return step()
    finally:
        torch.set_num_threads(before)


def same_bits(first, second):
    return all(
        a is None if b is None else torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for a, b in zip(first, second, strict=True)
    )
