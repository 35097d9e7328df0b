# SPDX-License-Identifier: Apache-2.0
"""What mio_loss takes and what it refuses, and in which words."""

import math

import pytest
import torch
from conftest import relative_error, views

from mio_ext import mio_loss, reference

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
        ((Z, Z.double()), {}, TypeError, r"z2 must be torch.float32 like z1, got torch.float64"),
        ((Z, Z.to("meta")), {}, ValueError, r"z2 must be on cpu like z1, got meta"),
        ((Z.to_sparse(), Z), {}, TypeError, r"z1 must be a dense tensor, got torch.sparse_coo"),
        ((Z.numpy(), Z), {}, TypeError, r"z1 must be a tensor, got ndarray"),
        ((Z, Z), {"temperature": 0.0}, ValueError, r"temperature must be positive and finite, got 0.0"),
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
