# SPDX-License-Identifier: Apache-2.0
"""mio_loss and siglip_loss as users call them, against their equations in float64."""

from typing import NamedTuple

import pytest
import torch
from conftest import TOLERANCE

from mio_ext import mio_loss, reference, siglip_loss

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from fuzzing import BIASES, EVERYWHERE, INTERPRETED, MATRICES, SIZES, WIDTHS, Matrix, assert_close, fuzzed, magnitudes
from hypothesis import given
from hypothesis import strategies as st


class Step(NamedTuple):
    """One call of mio_loss or siglip_loss on sides of any two dtypes."""

    loss: str
    place: tuple[str, str]
    dtypes: tuple[torch.dtype, torch.dtype]
    rows: int
    columns: int  # siglip: of which texts beyond the images
    dim: int
    x: Matrix
    y: Matrix
    ids: tuple[int, int, torch.dtype] | None  # (classes, seed, dtype)
    numbers: tuple[float, float, float]  # (temperature or 1/scale, bias, regularizer)
    learnt: bool
    frozen: int | None  # side
    option: str | None

    def make(self):
        """(sides, keywords of the loss)"""
        _, device = self.place
        x = self.x.make(self.rows, self.dim, self.dtypes[0], device)
        texts = self.rows + (self.columns if self.loss == "siglip" and not self.ids else 0)
        y = self.y.make(texts, self.dim, self.dtypes[1], device, x)
        tau, bias, regularizer = self.numbers
        values = {"temperature": tau, "bias": bias, "regularizer": regularizer}
        if self.loss == "siglip":
            values = {"logit_scale": 1 / tau, "logit_bias": bias}
        keywords = dict(values)
        if self.learnt:
            keywords = {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in values.items()}
        if self.ids:
            classes, seed, dtype = self.ids
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(classes, (self.rows,), generator=generator).to(device, dtype)
            keywords |= {"labels": ids} if self.loss == "mio" else {"image_ids": ids, "text_ids": ids}
        elif self.loss == "siglip":
            keywords |= {"negative_only": True} if self.option == "negatives" else {"text_offset": texts - self.rows}
        if self.loss == "siglip":
            keywords["normalize"] = True
        return (x, y), keywords


@st.composite
def steps(draw):
    loss = draw(st.sampled_from(["mio", "siglip"]))
    ids = draw(st.booleans())
    kind = st.sampled_from([torch.int64, torch.int16, torch.uint8, torch.uint16, torch.uint32])
    return Step(
        loss=loss,
        place=draw(st.sampled_from(EVERYWHERE)),
        dtypes=draw(st.sampled_from([(d, d) for d in TOLERANCE] + [(a, b) for a in TOLERANCE for b in TOLERANCE])),
        rows=min(
            draw(SIZES.filter(lambda n: n >= 2 or loss == "siglip")), 65 if ids else 1000
        ),  # eq. (13) takes [N, N, D]
        columns=draw(st.integers(0, 9)),
        dim=draw(WIDTHS),
        x=draw(MATRICES),
        y=draw(MATRICES),
        ids=draw(st.tuples(st.sampled_from([1, 2, 5, 200]), st.integers(0, 99), kind)) if ids else None,
        numbers=(draw(st.floats(-2, 1).map(lambda e: 10.0**e)), draw(BIASES), draw(st.sampled_from([0.0, 1.0, 30.0]))),
        learnt=draw(st.booleans()),
        frozen=draw(st.sampled_from([None, None, 0, 1])),
        option=draw(st.sampled_from([None, None, "negatives"])),
    )


def as_rows_and_columns(step, sides, keywords):
    """What magnitudes() asks for."""
    n = step.rows
    tau, bias, regularizer = step.numbers
    options = {"scale": (1 / tau, 1 / tau), "bias": bias, "normalize": True, "shift": 0, "offset": 0}
    ids = next((keywords[k].long() for k in ("labels", "image_ids") if k in keywords), None)
    if step.loss == "siglip":
        offset = 10**6 if keywords.get("negative_only") else keywords.get("text_offset", 0)
        options |= {"weights": (1 / n, 1 / n, 0.0), "offset": offset, "exclude_self": False}
        return *(z.double() for z in sides), options | ({} if ids is None else {"x_ids": ids, "y_ids": ids})
    pairs = 2 * n if ids is None else int((ids[:, None] == ids).sum()) * 4 - 2 * n
    others = max(1, 2 * n * (2 * n - 1) - pairs)
    weights = 1 / pairs, 1 / others, 2 * regularizer / (pairs * step.dim)
    options |= {"weights": weights, "exclude_self": True, "shift": n}
    if ids is not None:
        options["x_ids"] = torch.cat([ids, ids])
    return torch.cat([z.double() for z in sides]), None, options


def check_step(step):
    sides, keywords = step.make()
    factor = 2.0**10

    def run(exact):
        """(loss, gradients of what has one)"""
        inputs = [z.detach().to(torch.float64 if exact else z.dtype) for z in sides]
        values = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in keywords.items()}
        wanted = [z for i, z in enumerate(inputs) if i != step.frozen]
        wanted += [v for v in values.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        for tensor in wanted:
            tensor.requires_grad_()
        if exact:
            loss = (reference.mio_loss if step.loss == "mio" else reference.siglip_loss)(*inputs, **values)
        else:
            loss = (mio_loss if step.loss == "mio" else siglip_loss)(*inputs, **values, backend=step.place[0])
        return loss.detach(), torch.autograd.grad(loss * factor, wanted)

    (loss, ours), (exact_loss, exact) = run(False), run(True)
    dtype = torch.promote_types(*step.dtypes)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x, y, options = as_rows_and_columns(step, sides, keywords)
    size = magnitudes(x, y, **options)
    assert_close("loss", loss, exact_loss, dtype, TOLERANCE[dtype][0], size["loss"])
    for i, gradient, expected in zip([i for i in (0, 1) if i != step.frozen], ours, exact, strict=False):
        assert gradient.dtype == step.dtypes[i]
        if float(expected.abs().max()) < 6e4:  # of float16
            limit = max(TOLERANCE[dtype][1], TOLERANCE[step.dtypes[i]][1])
            magnitude = size["sides"][0 if y is None else i]
            assert_close(f"gradient of side {i}", gradient, expected, dtype, limit, factor * magnitude)
    if step.learnt:
        a_p, a_n, bias = size["numbers"]
        scale, tau = a_p + a_n, step.numbers[0]
        learnt = {"temperature": scale / tau**2, "logit_scale": scale, "bias": bias, "logit_bias": bias}
        names = [k for k, v in keywords.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        for name, gradient, expected in zip(reversed(names), reversed(ours), reversed(exact), strict=False):
            magnitude = learnt.get(name, size["loss"])
            assert_close(name, gradient, expected, dtype, max(TOLERANCE[dtype][0], 1e-12), factor * magnitude)


@pytest.mark.skipif(INTERPRETED, reason="test_triton_loss is for it")
@fuzzed(300)
@given(steps())
def test_loss(one_thread, step):
    check_step(step)


@pytest.mark.skipif(not INTERPRETED, reason="runs in test_in_the_interpreter's process")
@fuzzed(6)
@given(steps())
def test_triton_loss(one_thread, step):
    check_step(step)
