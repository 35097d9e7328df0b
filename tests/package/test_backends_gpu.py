# SPDX-License-Identifier: Apache-2.0
"""The fused backends on a GPU: `pytest -m gpu`. Nothing here has a meaning without one."""

import pytest
import torch
from conftest import TOLERANCE, assert_no_worse_than, relative_error, views
from test_mio_loss import both

from mio_ext import mio_loss, siglip_loss
from mio_ext.backends import unavailable_reason

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"])
def gpu(request):
    reason = unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def step(z1, z2, backend, **kwargs):
    loss = mio_loss(z1, z2, backend=backend, **kwargs)
    return loss.detach(), *torch.autograd.grad(loss, (z1, z2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, dim", [(2, 1), (128, 128), (129, 100), (700, 17), (1100, 128), (2049, 129), (1500, 256), (1000, 770)]
)
def test_mio_loss(batch, dim, dtype, gpu):
    z1, z2 = views(batch, dim, dtype, "cuda")
    scale = 3 * 2.0**12 if dtype == torch.float16 else 3.0
    (loss, grad), (plain, plain_grad), (exact, exact_grad) = both(z1, z2, gpu, "cuda", scale=scale)
    assert_no_worse_than(loss, plain, exact, TOLERANCE[dtype][0])
    if dim > 1:  # of one feature eq. (10) leaves nothing
        assert_no_worse_than(grad, plain_grad, exact_grad, TOLERANCE[dtype][1])


@pytest.mark.parametrize("dim", [128, 256])
def test_tf32_when_it_is_let_in(dim, gpu):
    torch.set_float32_matmul_precision("high")
    try:
        (loss, grad), _, (exact, exact_grad) = both(*views(900, dim, device="cuda"), gpu, "cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert relative_error(loss, exact) < 1e-4
    assert relative_error(grad, exact_grad) < 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k, dim", [(300, 500, 64), (3000, 1000, 256), (2000, 4100, 768)])
def test_siglip_loss(m, k, dim, dtype, gpu):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(n, dim, generator=generator)) for n in (m, k))
    results = []
    for backend, to in ((gpu, dtype), ("reference", dtype), ("reference", torch.float64)):
        a, b = (t.to("cuda", dtype).to(to).requires_grad_() for t in (x, y))
        scale, bias = (torch.tensor(v, device="cuda", requires_grad=True) for v in (10.0, -10.0))
        offset = {"negative_only": True} if m > k else {"text_offset": (k - m) // 2}
        loss = siglip_loss(a, b, scale, bias, backend=backend, **offset)
        results.append((loss, torch.autograd.grad(loss * 2.0**16, (a, b, scale, bias))))
    (loss, grads), (plain, plain_grads), (exact, exact_grads) = results
    assert_no_worse_than(loss, plain, exact, 1e-5)
    for g, p, e in zip(grads[:2], plain_grads[:2], exact_grads[:2], strict=True):
        assert_no_worse_than(g, p, e, TOLERANCE[dtype][1])
    for g, e in zip(grads[2:], exact_grads[2:], strict=True):
        assert relative_error(g, e) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, dim", [(100, 64), (900, 128), (700, 256), (600, 300)])
def test_labels_with_strided_rows_and_learnt_parameters(batch, dim, dtype, gpu):
    """What test_mio_loss leaves out, at once: ids, every other feature of a row, tensors for numbers, statistics."""
    wide = views(batch, 2 * dim, dtype, "cuda")
    labels = torch.arange(batch, device="cuda") % 7
    found = []
    for backend, to in ((gpu, dtype), ("reference", dtype), ("reference", torch.float64)):
        z1, z2 = (z.detach().to(to)[:, ::2].requires_grad_() for z in wide)
        assert not z1.is_contiguous()
        tau, bias = (torch.tensor(value, device="cuda", requires_grad=True) for value in (0.5, -1.0))
        loss, stats = mio_loss(z1, z2, temperature=tau, bias=bias, labels=labels, backend=backend, return_stats=True)
        d1, d2, dtau, dbias = torch.autograd.grad(loss * 2.0**12, (z1, z2, tau, bias))
        found.append((loss, torch.cat([d1, d2]), torch.stack([dtau, dbias]), torch.stack(list(stats))))
    (loss, grad, learnt, stats), (plain, plain_grad, _, _), (exact, exact_grad, exact_learnt, exact_stats) = found
    assert_no_worse_than(loss, plain, exact, TOLERANCE[dtype][0])
    assert_no_worse_than(grad, plain_grad, exact_grad, TOLERANCE[dtype][1])
    assert relative_error(learnt, exact_learnt) < 1e-4
    torch.testing.assert_close(stats, exact_stats, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("dim", [128, 768])
@pytest.mark.parametrize("batch", [128, 4096])
def test_same_bits_every_time(batch, dim, gpu):
    z1, z2 = views(batch, dim, torch.bfloat16, "cuda")
    first = step(z1, z2, gpu)
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(step(z1, z2, gpu), first, strict=True))


@pytest.mark.parametrize("dim", [128, 768])
def test_cuda_graph(dim, gpu):
    z1, z2 = views(256, dim, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles outside the capture, on a stream that is not the default
        step(z1, z2, gpu)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(z1, z2, gpu)
    with torch.no_grad():
        z1.copy_(z1.flip(0))
    expected = step(z1, z2, gpu)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_non_default_stream(gpu):
    z1, z2 = views(2048, 128, torch.bfloat16, "cuda")
    expected = step(z1, z2, gpu)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # inputs change late on this stream: a launch elsewhere would miss it
        z1.detach().mul_(2)  # the loss does not depend on the norm
        actual = step(z1, z2, gpu)
    torch.cuda.synchronize()
    assert relative_error(actual[0], expected[0]) < 1e-6
    assert relative_error(actual[1] * 2, expected[1]) < 1e-2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("dim", [128, 768])
def test_features_on_another_device_than_the_current(dim, gpu):
    z1, z2 = views(300, dim, torch.bfloat16, "cuda:1")
    expected = step(*views(300, dim, torch.bfloat16, "cuda:0"), gpu)
    with torch.cuda.device(0):
        actual = step(z1, z2, gpu)
    assert all(a.device.index == 1 and torch.equal(a.to("cuda:0"), e) for a, e in zip(actual, expected, strict=True))


def test_compiles_into_one_graph(gpu):
    z1, z2 = views(256, 128, torch.bfloat16, "cuda")
    compiled = torch.compile(lambda a, b: mio_loss(a * 1.5, b, backend=gpu), fullgraph=True)
    actual = torch.autograd.grad(compiled(z1, z2), (z1, z2))
    expected = torch.autograd.grad(mio_loss(z1 * 1.5, z2, backend=gpu), (z1, z2))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-2


@pytest.mark.parametrize("dim", [128, 768])
def test_autocast_changes_nothing(dim, gpu):
    z1, z2 = views(256, dim, torch.float32, "cuda")
    expected = step(z1, z2, gpu)
    with torch.autocast("cuda", torch.bfloat16):
        actual = step(z1, z2, gpu)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_grad_scaler_float16(gpu):
    z1, z2 = views(512, 64, torch.float16, "cuda")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    scaler.scale(mio_loss(z1, z2, backend=gpu)).backward()
    a, b = (z.detach().double().requires_grad_() for z in (z1, z2))
    exact = torch.autograd.grad(mio_loss(a, b, backend="reference") * 2.0**16, (a, b))
    for z, e in zip((z1, z2), exact, strict=True):
        assert z.grad.isfinite().all()
        assert relative_error(z.grad, e) < 2e-3


@pytest.mark.parametrize("batch", [4096, 32768])
def test_peak_memory(batch, gpu):
    z1, z2 = views(batch, 128, torch.bfloat16, "cuda")
    step(z1, z2, gpu)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(z1, z2, gpu)
    inputs = 2 * z1.numel() * z1.element_size()
    assert torch.cuda.max_memory_allocated() - before <= 6 * inputs + 32 * 2**20
