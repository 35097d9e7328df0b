# SPDX-License-Identifier: Apache-2.0
"""ops.pairwise_bce on problems that nobody thought of: against float64, and the same bits twice."""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import TOLERANCE, run_python

from mio_ext import ops

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from fuzzing import (
    BIASES,
    EVERYWHERE,
    INTERPRETED,
    MATRICES,
    SCALES,
    SIZES,
    WEIGHTS,
    WIDTHS,
    Matrix,
    assert_close,
    fuzzed,
    magnitudes,
    on_threads,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st


class Problem(NamedTuple):
    """One call of ops.pairwise_bce, in few words: what a failure prints."""

    place: tuple[str, str]
    dtype: torch.dtype
    rows: int
    columns: int | None  # None: y = x
    dim: int
    x: Matrix
    y: Matrix
    alike: bool  # y is near x
    ids: tuple[int, int] | None  # (classes, seed)
    options: dict
    wants: tuple[bool, bool, bool]  # a gradient for x, y, the numbers
    factor: float
    threads: int

    def make(self):
        """(x, y or None, keywords of ops.pairwise_bce)"""
        _, device = self.place
        x = self.x.make(self.rows, self.dim, self.dtype, device)
        y = self.columns and self.y.make(self.columns, self.dim, self.dtype, device, x if self.alike else None)
        keywords = dict(self.options)
        if self.ids:
            classes, seed = self.ids
            generator = torch.Generator().manual_seed(seed)
            names = {"x_ids": self.rows} | ({"y_ids": self.columns} if self.columns else {})
            keywords |= {k: torch.randint(classes, (n,), generator=generator).to(device) for k, n in names.items()}
        if not keywords["normalize"]:  # logits stay what a loss can see
            largest = max(float(z.double().norm(dim=1).max()) for z in (x, x if y is None else y))
            keywords["scale"] = tuple(a / max(1.0, largest) ** 2 for a in keywords["scale"])
        return x, y, keywords


@st.composite
def problems(draw):
    rows, columns, normalize, ids = draw(SIZES), draw(st.none() | SIZES), draw(st.booleans()), draw(st.booleans())
    if columns is None:  # positives are mutual
        shift, offset = (draw(st.sampled_from([0, rows // 2])) if rows % 2 == 0 else 0), 0
    else:
        shift, offset = draw(st.integers(0, rows - 1)), draw(st.sampled_from([0, 1, columns // 2, columns, 10**6]))
    return Problem(
        place=draw(st.sampled_from(EVERYWHERE)),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        rows=rows,
        columns=columns,
        dim=draw(WIDTHS),
        x=draw(MATRICES),
        y=draw(MATRICES),
        alike=draw(st.booleans()),
        ids=draw(st.tuples(st.sampled_from([1, 2, 5, 1000]), st.integers(0, 99))) if ids else None,
        options={
            "scale": (draw(SCALES), draw(SCALES)),
            "bias": draw(BIASES),
            "weights": (draw(WEIGHTS), draw(WEIGHTS), draw(WEIGHTS) if normalize else 0.0),
            "shift": shift,
            "offset": offset,
            "exclude_self": draw(st.booleans()),
            "normalize": normalize,
        },
        wants=(draw(st.booleans()), columns is not None and draw(st.booleans()), draw(st.booleans())),
        factor=draw(st.sampled_from([1.0, -3.0, 2.0**12])),
        threads=draw(st.sampled_from([1, 1, 1, 2, 3])),
    )


def op_step(backend, x, y, keywords, wants, factor, to=None):
    """(loss, statistics, gradient of each of x, y and (a_p, a_n, b) or None)"""
    x, y = (None if z is None else z.detach().to(to or z.dtype) for z in (x, y))
    for z, wanted in zip((x, y), wants[:2], strict=True):
        if z is not None:
            z.requires_grad_(wanted)
    device, dtype = x.device, torch.float64 if x.dtype == torch.float64 else torch.float32
    numbers = [
        torch.tensor(n, dtype=dtype, device=device, requires_grad=wants[2])
        for n in (*keywords["scale"], keywords["bias"])
    ]
    if wants[2]:
        keywords = {**keywords, "scale": tuple(numbers[:2]), "bias": numbers[2]}
    loss, stats = ops.pairwise_bce(x, y, backend=backend, **keywords)
    if any(wants):
        (loss * factor).backward()
    of_numbers = torch.stack([n.grad for n in numbers]) if wants[2] else None
    return loss.detach(), stats, *(None if z is None else z.grad for z in (x, y)), of_numbers


def check_op(problem):
    (backend, _), wants, factor = problem.place, problem.wants, problem.factor
    x, y, keywords = problem.make()

    def step(backend=backend, to=None):
        return op_step(backend, x, y, keywords, wants, factor, to)

    ours = step()
    if backend != "reference":
        again = on_threads(problem.threads, step)
        assert same_bits(ours, again), f"other bits the second time, on {problem.threads} threads"
    exact = step("reference", torch.float64)
    size = magnitudes(x, y, **keywords)
    loss_limit, grad_limit = TOLERANCE[x.dtype]
    assert_close("loss", ours[0], exact[0], x.dtype, loss_limit, size["loss"])
    assert torch.equal(ours[1][:2], exact[1][:2])
    torch.testing.assert_close(ours[1], exact[1], rtol=1e-4, atol=1e-4, equal_nan=True)
    for name, gradient, expected, magnitude in zip(("dx", "dy"), ours[2:4], exact[2:4], size["sides"], strict=True):
        assert (gradient is None) == (expected is None)
        if gradient is not None and float(expected.abs().max()) < 6e4:  # of float16
            assert_close(name, gradient, expected, x.dtype, grad_limit, abs(factor) * magnitude)
    if wants[2]:
        for i, name in enumerate(("a_p", "a_n", "bias")):
            magnitude = abs(factor) * size["numbers"][i]
            assert_close(name, ours[4][i], exact[4][i], x.dtype, max(loss_limit, 1e-12), magnitude)


@pytest.mark.skipif(INTERPRETED, reason="test_triton_op is for it")
@fuzzed(500)
@given(problems())
def test_op(one_thread, problem):
    check_op(problem)


@pytest.mark.skipif(not INTERPRETED, reason="runs in test_in_the_interpreter's process")
@fuzzed(6)
@given(problems())
def test_triton_op(one_thread, problem):
    check_op(problem)


@pytest.mark.skipif(INTERPRETED, reason="it starts the process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter():
    files = [str(Path(__file__).with_name(f"test_fuzz_{part}.py")) for part in ("op", "losses")]
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, env={"TRITON_INTERPRET": "1"})
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-5000:]
