# SPDX-License-Identifier: Apache-2.0
"""What mio_loss takes and what it refuses, and in which words."""

import math

import pytest
import torch
from conftest import TOLERANCE, relative_error, views

from mio_ext import MIOLoss, mio_loss, reference

Z = torch.randn(4, 3)


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((Z[0], Z), {}, ValueError, r"mio_loss: z1 must be two-dimensional, \[B, D\], got \[3\]"),
        ((Z, torch.randn(4, 2)), {}, ValueError, r"z2 must be \[B, D\] like z1 \(\[4, 3\]\), got \[4, 2\]"),
        ((Z, torch.randn(5, 3)), {}, ValueError, r"z2 must be \[B, D\] like z1 \(\[4, 3\]\), got \[5, 3\]"),
        ((Z[:1], Z[:1]), {}, ValueError, r"z1 must have at least 2 rows.*got \[1, 3\]"),
        ((Z[:0], Z[:0]), {}, ValueError, r"z1 must have at least 2 rows.*got \[0, 3\]"),
        ((Z[:, :0], Z[:, :0]), {}, ValueError, r"z1 must have at least one feature, got \[4, 0\]"),
        ((Z.long(), Z.long()), {}, TypeError, r"z1 must be float32.*got torch.int64"),
        ((Z.cfloat(), Z.cfloat()), {}, TypeError, r"z1 must be float32.*got torch.complex64"),
        ((Z, Z.to("meta")), {}, ValueError, r"z2 must be on cpu like z1, got meta"),
        ((Z.to_sparse(), Z), {}, TypeError, r"z1 must be a dense tensor, got torch.sparse_coo"),
        ((Z.numpy(), Z), {}, TypeError, r"z1 must be a tensor, got ndarray"),
        ((Z, Z), {"temperature": 0.0}, ValueError, r"temperature must be positive and finite, got 0.0"),
        (
            (Z, Z),
            {"temperature": 5e-324},
            ValueError,
            r"temperature must be from 1e-30 to 1e\+30 in torch.float32, got",
        ),
        ((Z, Z), {"temperature": 1e-39}, ValueError, r"temperature must be from 1e-30 to 1e\+30 .* got 1e-39"),
        ((Z, Z), {"negative_temperature": 1e31}, ValueError, r"negative_temperature must be from 1e-30 to 1e\+30"),
        ((Z.double(), Z), {"temperature": 1e-310}, ValueError, r"must be from 1e-300 to 1e\+300 in torch.float64"),
        ((Z, Z), {"regularizer": -1e31}, ValueError, r"regularizer must be from -1e\+30 to 1e\+30 .* got -1e\+31"),
        ((Z, Z), {"temperature": -1}, ValueError, r"temperature must be positive and finite, got -1"),
        ((Z, Z), {"temperature": math.nan}, ValueError, r"temperature must be positive and finite, got nan"),
        ((Z, Z), {"negative_temperature": math.inf}, ValueError, r"negative_temperature must be .* got inf"),
        ((Z, Z), {"temperature": "hot"}, TypeError, r"temperature must be a float or .* got str"),
        ((Z, Z), {"temperature": True}, TypeError, r"temperature must be a float or .* got bool"),
        ((Z, Z), {"temperature": torch.ones(2)}, ValueError, r"temperature must be .* one element, got \[2\]"),
        ((Z, Z), {"temperature": torch.tensor(1)}, TypeError, r"temperature must be a floating.* got torch.int64"),
        ((Z, Z), {"bias": torch.zeros(1, device="meta")}, ValueError, r"bias must be on cpu .* got meta"),
        ((Z, Z), {"bias": math.inf}, ValueError, r"bias must be finite, got inf"),
        ((Z, Z), {"regularizer": math.nan}, ValueError, r"regularizer must be finite, got nan"),
        ((Z, Z), {"labels": torch.zeros(3).long()}, ValueError, r"labels must be \[4\], .* got \[3\]"),
        ((Z, Z), {"labels": torch.zeros(4).bool()}, TypeError, r"labels must be integers, got torch.bool"),
        ((Z, Z), {"labels": torch.zeros(4)}, TypeError, r"labels must be integers, got torch.float32"),
        ((Z, Z), {"labels": [0, 1, 2, 3]}, TypeError, r"labels must be a tensor of integers, got list"),
        ((Z, Z), {"backend": "gpu"}, ValueError, r"backend must be one of auto, cpu, .* got 'gpu'"),
        ((Z, Z), {"backend": "cuda"}, RuntimeError, r"backend 'cuda' cannot run: "),
        (
            (Z, Z),
            {"backend": "triton"},
            (RuntimeError, ValueError),
            r"backend 'triton' (cannot run: |needs features on)",
        ),
        ((Z.to("meta"), Z.to("meta")), {"backend": "cpu"}, ValueError, r"'cpu' needs features on the CPU, got meta"),
    ],
)
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        mio_loss(*args, **kwargs)
    assert str(caught.value).startswith("mio_loss: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fused", "reference"])
@pytest.mark.parametrize("bad", [math.nan, 0.0, -0.5, math.inf, -math.inf])
def test_a_bad_temperature_in_a_tensor_shows_as_nan(bad, name, backend):
    fused, device = backend
    z1, z2 = views(6, 4, device=device)
    tau = torch.tensor(bad, device=device)
    name = fused if name == "fused" else name
    assert mio_loss(z1, z2, temperature=tau, backend=name).isnan()
    assert mio_loss(z1, z2, negative_temperature=tau, backend=name).isnan()


@pytest.mark.parametrize("name", ["fused", "reference"])
@pytest.mark.parametrize("number_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_numbers_of_another_dtype(number_dtype, name, backend):
    """They are converted before anything is computed with them, and the loss keeps its dtype and shape."""
    fused, device = backend
    z1, z2 = views(700, 100, device=device)  # B·D beyond float16
    numbers = {"temperature": 0.07, "bias": -1.0, "regularizer": 1.0}
    numbers = {k: torch.tensor([v], dtype=number_dtype, device=device) for k, v in numbers.items()}
    loss = mio_loss(z1, z2, backend=fused if name == "fused" else name, **numbers)
    exact = reference.mio_loss(z1.double(), z2.double(), **{k: v.double() for k, v in numbers.items()})
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert relative_error(loss, exact) < 1e-6


@pytest.mark.parametrize("dtype, extreme", [(torch.float32, 30), (torch.float64, 300)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_most_extreme_floats_that_are_taken(sign, dtype, extreme, backend):
    name, device = backend
    z1, z2 = views(20, 6, dtype, device)
    for numbers in ({"temperature": 10.0 ** (sign * extreme)}, {"bias": sign * 10.0**extreme}):
        loss = mio_loss(z1, z2, backend=name, **numbers)
        gradients = torch.autograd.grad(loss, [z1, z2])
        assert relative_error(loss, reference.mio_loss(z1.double(), z2.double(), **numbers)) < 1e-5
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("name", ["fused", "reference"])
def test_views_of_two_dtypes(name, module, backend):
    """The wider type holds both; each gradient is of its view's."""
    fused, device = backend
    name = fused if name == "fused" else name
    wide, other = views(20, 6, torch.float32, device)
    tau = torch.tensor(0.3, dtype=torch.float64, device=device)
    for narrow in (torch.bfloat16, torch.float16, torch.float64):
        z1, z2 = wide.detach().requires_grad_(), other.detach().to(narrow).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = MIOLoss(tau, backend=name)(z1, z2) if module else mio_loss(z1, z2, temperature=tau, backend=name)
        loss.backward()
        exact = [z.detach().double().requires_grad_() for z in (z1, z2)]
        expected = reference.mio_loss(*exact, temperature=tau)
        expected.backward()
        assert loss.dtype == (torch.float64 if narrow == torch.float64 else torch.float32)
        assert relative_error(loss, expected) < TOLERANCE[loss.dtype][0]
        for ours, theirs in zip((z1, z2), exact, strict=True):
            assert ours.grad.dtype == ours.dtype
            assert relative_error(ours.grad, theirs.grad) < TOLERANCE[ours.dtype][1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels(dtype, backend):
    name, device = backend
    z1, z2 = views(9, 4, device=device)
    labels = torch.arange(9, device=device) // 2
    expected = mio_loss(z1, z2, labels=labels, backend=name)
    assert torch.equal(mio_loss(z1, z2, labels=labels.to(dtype), backend=name), expected)
    torch.testing.assert_close(reference.mio_loss(z1, z2, labels=labels.to(dtype)), expected)
