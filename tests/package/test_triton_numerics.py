# SPDX-License-Identifier: Apache-2.0
"""What the Triton backend's numbers must withstand, in the interpreter: tensor cores that cut sums off, views that
agree, NaN of any bits, and numbers of any size. test_triton.py starts these tests in a process of their own."""

import functools

import numpy as np
import pytest
import torch
from conftest import assert_no_worse_than, relative_error, views
from test_pairwise_bce import assert_matches_reference, features, run
from test_triton import TRITON, interpreted, tf32  # noqa: F401  the fixture

from mio_ext import mio_loss, ops, reference, siglip_loss

pytestmark = interpreted


def tensor_core_product(a, b, c):
    """a b + c as an H100's tensor cores are found to make it, 16 products at a time: what is added is cut off two
    bits below float32's last place in the largest of it, and every sum is cut off to a float32."""
    a, b, c = (np.asarray(t, np.float64) for t in (a, b, c))
    for k in range(0, a.shape[1], 16):
        parts = np.concatenate([a[:, None, k : k + 16] * b[k : k + 16].T, c[:, :, None]], 2)
        place = np.ldexp(1.0, np.frexp(np.abs(parts).max(2))[1] - 26)
        mantissa, exponent = np.frexp((np.trunc(parts / place[:, :, None]) * place[:, :, None]).sum(2))
        c = np.ldexp(np.trunc(mantissa * 2**24), exponent - 24)
    return c.astype(np.float32)


def patch_dot(monkeypatch, product):
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return TensorHandle(product(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def test_the_model_of_tensor_cores_drifts():
    """Towards zero, by about half of a last place for every 16 products."""
    a, b = (
        np.abs(np.random.default_rng(0).standard_normal(shape)).astype(np.float16) for shape in ((8, 784), (784, 8))
    )
    a, b = a.astype(np.float64), b.astype(np.float64)
    exact = a @ b
    off = (tensor_core_product(a, b, np.zeros((8, 8))) - exact) / exact
    assert (off < 0).all() and 1e-6 < -off.mean() < 1e-5
    one_step = tensor_core_product(a[:, :16], b[:16], np.zeros((8, 8)))
    np.testing.assert_allclose(one_step, a[:, :16] @ b[:16], rtol=1e-6)


def test_float32_over_tensor_cores_that_cut_sums_off(monkeypatch):
    """Some rows of what an H100 ran: it measured 5.8e-7 when one sum went through both slices of the features."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(n, 256, generator=generator)) for n in (3000, 1000))
    x = x[:64]
    results = []
    patch_dot(monkeypatch, tensor_core_product)
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        a = x.to(dtype).requires_grad_()
        loss = siglip_loss(a, y.to(dtype), torch.tensor(10.0), torch.tensor(-10.0), backend=backend, negative_only=True)
        results.append((loss, *torch.autograd.grad(loss * 2.0**16, a)))
    (loss, grad), (plain, plain_grad), (exact, exact_grad) = results
    assert_no_worse_than(loss, plain, exact, 1e-6)
    assert_no_worse_than(grad, plain_grad, exact_grad, 1e-5)
    assert relative_error(grad, exact_grad) < 1.7 * relative_error(plain_grad, exact_grad)


def test_float16_in_chunks_over_tensor_cores_that_cut_sums_off(monkeypatch):
    """An H100's library was 9.5e-7 off the loss with the positive pairs among its products."""
    from mio_ext.triton import pairwise_bce as backend

    calls = []

    def product_into(out, a, b, accumulate=False):
        calls.append(a.shape)
        start = out.numpy() if accumulate else np.zeros(out.shape)
        out.copy_(torch.from_numpy(tensor_core_product(a.numpy(), b.numpy(), start)))

    z1, z2 = (z.detach() for z in views(100, 770, torch.float16))
    exact = mio_loss(z1.double(), z2.double(), backend="reference")
    monkeypatch.setattr(backend, "product_into", product_into)
    assert relative_error(mio_loss(z1, z2, backend="triton"), exact) < 2.4e-7
    assert len(calls) == 1


@pytest.mark.parametrize("dim", [7, 128, 256, 300])
@pytest.mark.parametrize("regularizer", [0.0, 1.0, 50.0, 100.0])
@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3])
def test_views_that_agree(dim, regularizer, noise):
    """The gradient of the linear term is their difference: it must not be what two large numbers leave."""
    z1, z2 = views(40, dim, noise=noise)
    results = []
    for loss, dtype in (
        (functools.partial(mio_loss, backend="triton"), torch.float32),
        (reference.mio_loss, torch.float32),
        (reference.mio_loss, torch.float64),
    ):
        leaves = [z.detach().to(dtype).requires_grad_() for z in (z1, z2)]
        value = loss(*leaves, temperature=8.0, regularizer=regularizer)
        results.append((value, torch.cat(torch.autograd.grad(value, leaves))))
    (loss, grad), (plain, plain_grad), (exact, exact_grad) = results
    assert_no_worse_than(loss, plain, exact, 1e-6)
    error, allowed = relative_error(grad, exact_grad), 2 * relative_error(plain_grad, exact_grad)
    assert error <= allowed, f"{error:.2e}, plain PyTorch {allowed / 2:.2e}"


#: The bits that NaN may have: quiet, a GPU's own, signalling, negative.
NANS = {
    torch.float32: [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFF800001, 0xFFFFFFFF],
    torch.bfloat16: [0x7FC0, 0x7FFF, 0x7F81, 0xFFFF],
    torch.float16: [0x7E00, 0x7FFF, 0x7C01, 0xFFFF],
    torch.float64: [0x7FF8000000000000, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001],
}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def put_bits(t, at, bits):
    size = 8 * t.element_size()
    t.view(INTEGERS[t.element_size()])[at] = bits - (1 << size) if bits >> (size - 1) else bits


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "dtype, d, product",
    [
        (torch.bfloat16, 20, "16-bit"),
        (torch.float16, 20, "16-bit"),
        (torch.float32, 20, "tf32"),
        (torch.float32, 20, "fp16x3"),
        (torch.float32, 150, "fp16x3"),
        *((dtype, 260, None) for dtype in (torch.bfloat16, torch.float32, torch.float64)),
    ],
    ids=str,
)
def test_nan_and_infinity_reach_the_loss(dtype, d, product, normalize, with_ids, monkeypatch, request):
    if product == "tf32":  # of which tensor cores see 19 bits
        request.getfixturevalue("tf32")
        cut = lambda t: (t.view(np.uint32) & 0xFFFFE000).view(np.float32)  # noqa: E731
        patch_dot(monkeypatch, lambda a, b, c: np.matmul(cut(a), cut(b)) + c)
    clean = features(5, 4, d, dtype)
    ids = dict(zip(("x_ids", "y_ids"), (torch.arange(5), torch.arange(7, 11)), strict=True)) if with_ids else {}
    # No positive pairs: these are made apart, and would show by themselves.
    kwargs = {"normalize": normalize, "offset": 10, "scale": (5.0, 4.0), "weights": (0.5, 0.02, 0.0), **ids}
    assert ops.pairwise_bce(*clean, backend="triton", **kwargs)[0].isfinite()
    infinity = torch.tensor(torch.inf, dtype=dtype).view(INTEGERS[dtype.itemsize]).item()
    # Of the bits a few, where another case has them all: the interpreter is slow.
    patterns = NANS[dtype] if product and not (normalize or with_ids) else NANS[dtype][1:2]
    for bits in (*patterns, infinity):
        for side in range(2):
            pair = [t.clone() for t in clean]
            put_bits(pair[side], (2, 1), bits)
            pair[side].requires_grad_()
            nan_is_due = bits != infinity or normalize  # else a sigmoid may well be 0 or 1
            loss, _ = ops.pairwise_bce(*pair, backend="triton", **kwargs)
            (grad,) = torch.autograd.grad(loss, pair[side])
            assert not loss.isfinite(), (hex(bits), side)
            assert not (nan_is_due and grad[2].isfinite().all()), (hex(bits), side)


@pytest.mark.parametrize(
    "d, bits", [*((20, bits) for bits in NANS[torch.float32]), (20, 0x7F800000), (260, 0x7FFFFFFF)]
)
@pytest.mark.parametrize("number", ["temperature", "negative_temperature", "bias", "regularizer"])
def test_nan_and_infinity_in_a_number_reach_the_loss(number, bits, d):
    value = torch.zeros(())
    put_bits(value, (), bits)
    z1, z2 = views(6, d)
    assert not mio_loss(z1, z2, backend="triton", **{number: value}).isfinite()
    labels = torch.arange(6) % 3
    assert not mio_loss(z1, z2, backend="triton", labels=labels, **{number: value}).isfinite()


@pytest.mark.parametrize("d", [64, 150])
@pytest.mark.parametrize("scale, bias", [(100.0, -10.0), (1.0, -10.0), (1.0, 50.0)])
def test_extreme_logits(scale, bias, d):
    x, y = (torch.nn.functional.normalize(t) for t in features(50, 40, d, torch.float32))
    y[:40] = torch.nn.functional.normalize(y[:40] + 2 * x[:40])
    weights = (1 / 50, 1 / 50, 0.0)
    assert_matches_reference(TRITON, x, y, scale=(scale, scale), bias=bias, weights=weights)


@pytest.mark.parametrize("norm", [1e-4, 1.0, 3e4])
@pytest.mark.parametrize("d", [20, 260])
def test_float16_rows_of_any_norm(norm, d):
    """1/‖z‖ in float16 would overflow, or flush: prepare_kernel takes the power of two out first."""
    x, y = (torch.nn.functional.normalize(t.float()) * norm for t in features(40, 40, d, torch.float32))
    (loss, grads), (exact_loss, exact_grads) = (
        _run(backend, x.half(), y.half(), dtype) for backend, dtype in (("triton", None), ("reference", torch.float64))
    )
    assert relative_error(loss, exact_loss) < 1e-6
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert relative_error(grad, exact) < 2e-3


def _run(backend, x, y, dtype):
    """The op's float32 gradients: at a norm of 1e-4 float16 could not hold them."""
    numbers = [5.0, 4.0, -0.5, 0.1, 0.01, 0.0]
    if backend == "triton":
        op = torch.ops.mio_ext.pairwise_bce_triton
        loss, _, dx, dy, _ = op(x, y, None, None, None, numbers, 0, 0, False, True, [True, True, False])
        return loss, (dx, dy)
    x, y = (t.to(dtype).requires_grad_() for t in (x, y))
    loss, _ = ops.pairwise_bce(
        x, y, scale=(5.0, 4.0), bias=-0.5, weights=(0.1, 0.01, 0.0), normalize=True, backend=backend
    )
    return loss, torch.autograd.grad(loss, (x, y))


@pytest.mark.parametrize("normalize", [False, True])
def test_float32_rows_of_any_norm(normalize):
    """Two float16 hold 22 bits of them whatever their exponent, and of their columns' σ too."""
    x, y = features(40, 50, 20, torch.float32)
    x = x * 2.0 ** torch.linspace(-60, 60, 40)[:, None]
    y = y * 2.0 ** torch.linspace(60, -60, 50)[:, None]
    scale = 4.0 if normalize else 2.0**-110
    assert_matches_reference(TRITON, x, y, scale=(scale, scale), normalize=normalize)


def test_sigmoids_far_below_float16():
    """Every σ is near e^-40, and still a float32 gradient is due."""
    x, y = features(40, 30, 8, torch.float32)
    kwargs = {"bias": -40.0, "offset": 30, "weights": (1.0, 1.0, 0.0)}
    _, grads, _ = run("triton", x, y, **kwargs)
    _, exact, _ = run("reference", x, y, torch.float64, **kwargs)
    for g, e in zip(grads, exact, strict=True):
        assert relative_error(g, e) < 2e-6
