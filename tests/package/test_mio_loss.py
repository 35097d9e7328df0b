# SPDX-License-Identifier: Apache-2.0
"""mio_loss and MIOLoss: every backend against the float64 reference, and everything a user may do to them."""

import math

import pytest
import torch
from conftest import TOLERANCE, GradientsAskedFor, assert_no_worse_than, relative_error, run_python, views
from torch._dynamo.testing import CompileCounterWithBackend

from mio_ext import MIOLoss, mio_loss, reference

# (B, D): the smallest, odd ones around every tile and vector width, the paper's batch, several blocks.
SHAPES = [(2, 3), (2, 8), (3, 100), (17, 129), (31, 16), (64, 64), (128, 128), (257, 33), (700, 17), (33, 1000)]


def both(z1, z2, backend, device, scale=1.0, **kwargs):
    """(loss, gradient of both views) of the backend, the float32 and the float64 reference.

    Both references see exactly the features that the backend sees.
    """
    results = []
    for name, to in ((backend, None), ("reference", None), ("reference", torch.float64)):
        a, b = (z.detach().to(device, to or z.dtype).requires_grad_() for z in (z1, z2))
        loss = mio_loss(a, b, backend=name, **kwargs)
        grad = torch.autograd.grad(loss * scale, [a, b])
        results.append((loss, torch.cat(grad)))
    return results


@pytest.mark.parametrize("batch, dim", SHAPES)
def test_loss_and_gradient(batch, dim, dtype, backend):
    z1, z2 = views(batch, dim, dtype)
    # grad_output is not 1: a backward that ignores it, or applies it twice, shows. Float16 gets a usual loss
    # scale, else its gradients are mostly subnormal numbers.
    scale = 3 * 2.0**12 if dtype == torch.float16 else 3.0
    (loss, grad), (plain_loss, plain_grad), (exact_loss, exact_grad) = both(z1, z2, *backend, scale=scale)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    loss_limit, grad_limit = TOLERANCE[dtype]
    assert_no_worse_than(loss, plain_loss, exact_loss, loss_limit)
    assert_no_worse_than(grad, plain_grad, exact_grad, grad_limit)


@pytest.mark.parametrize("batch, dim", [(2049, 129), (2050, 260)])
def test_many_blocks(batch, dim, backend):
    """The two larger block sizes of the CPU kernel, and a ragged last one."""
    (loss, grad), (plain_loss, plain_grad), (exact_loss, exact_grad) = both(*views(batch, dim), *backend)
    assert_no_worse_than(loss, plain_loss, exact_loss, 1e-6)
    assert_no_worse_than(grad, plain_grad, exact_grad, 1e-5)


@pytest.mark.parametrize("batch", [2, 50])
def test_one_feature(batch, backend):
    """D = 1: every cosine is ±1 and eq. (10) leaves no gradient at all."""
    z1, z2 = views(batch, 1)
    (loss, grad), _, (exact_loss, _) = both(z1, z2, *backend)
    assert relative_error(loss, exact_loss) < 1e-6
    assert grad.abs().max() < 1e-5 / min(z1.abs().min(), z2.abs().min())


@pytest.mark.parametrize("tau", [0.01, 0.05, 5.0])
@pytest.mark.parametrize("bias", [-10.0, 0.0, 10.0])
def test_extreme_logits(tau, bias, backend):
    z1, z2 = views(40, 12)
    (loss, grad), (plain_loss, plain_grad), (exact_loss, exact_grad) = both(
        z1, z2, *backend, temperature=tau, bias=bias
    )
    assert_no_worse_than(loss, plain_loss, exact_loss, 1e-5)
    # The rounding of the cosines, times 1/tau, is in every float32 implementation.
    assert_no_worse_than(grad, plain_grad, exact_grad, max(1e-5, 3e-7 / tau))


def test_float16_survives_a_loss_scale(backend):
    """Gradients far below float16's smallest number are scaled before they are rounded."""
    z1, z2 = views(300, 16, torch.float16)
    (_, grad), _, (_, exact) = both(z1, z2, *backend, scale=2.0**16)
    assert relative_error(grad, exact) < 2e-3


def test_zero_row(backend):
    z1, z2 = views(20, 8)
    with torch.no_grad():
        z1[3] = 0
        z2[0] = 1e-13
    (loss, grad), _, (exact_loss, exact_grad) = both(z1, z2, *backend)
    assert relative_error(loss, exact_loss) < 1e-6
    assert (grad[3] == 0).all() and (grad[20] == 0).all()
    assert relative_error(grad, exact_grad) < 1e-5


def test_norms_that_overflow_float32(backend):
    """Rows of 1e25 and 1e-11 have norms whose squares float32 cannot hold, or not well."""
    z1, z2 = views(20, 8)
    with torch.no_grad():
        z1[3] *= 1e25
        z2[5] *= 1e-11
    name, device = backend
    loss = mio_loss(z1.to(device), z2.to(device), backend=name)
    assert relative_error(loss, reference.mio_loss(z1.double(), z2.double())) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("batch", [4, 300])
def test_nan_and_inf_reach_the_loss(bad, batch, backend):
    name, device = backend
    z1, z2 = views(batch, 9)
    with torch.no_grad():
        z2[batch // 2, 5] = bad
    z1, z2 = z1.detach().to(device).requires_grad_(), z2.detach().to(device).requires_grad_()
    loss = mio_loss(z1, z2, backend=name)
    loss.backward()
    assert not loss.isfinite()
    assert not z2.grad[batch // 2].isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradients_of_numbers(shape, backend):
    name, device = backend
    z1, z2 = views(33, 7, device=device)
    values = {"temperature": 0.3, "negative_temperature": 0.6, "bias": -1.2, "regularizer": 0.8, "negative_weight": 2.5}
    numbers = {k: torch.full(shape, v, device=device, requires_grad=True) for k, v in values.items()}
    exact = {k: torch.full(shape, v, dtype=torch.float64, device=device, requires_grad=True) for k, v in values.items()}
    mio_loss(z1, z2, backend=name, **numbers).mul(0.5).backward()
    reference.mio_loss(z1.detach().double(), z2.detach().double(), **exact).mul(0.5).sum().backward()
    for k in values:
        assert numbers[k].grad.shape == shape
        assert relative_error(numbers[k].grad, exact[k].grad) < 1e-5, k


def test_one_temperature_for_both_kinds_of_pairs(backend):
    name, device = backend
    z1, z2 = views(33, 7, device=device)
    tau = torch.tensor(0.3, device=device, requires_grad=True)
    exact = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    mio_loss(z1, z2, backend=name, temperature=tau).backward()
    reference.mio_loss(z1.detach().double(), z2.detach().double(), temperature=exact).backward()
    assert relative_error(tau.grad, exact.grad) < 1e-5


def test_gradcheck(backend):
    name, device = backend
    z1, z2 = views(5, 4, torch.float64, device)
    tau, b = (torch.tensor(v, dtype=torch.float64, device=device, requires_grad=True) for v in (0.4, -0.3))
    assert torch.autograd.gradcheck(
        lambda *a: mio_loss(a[0], a[1], temperature=a[2], bias=a[3], backend=name), (z1, z2, tau, b)
    )


@pytest.mark.parametrize("classes", [1, 4, 1000])
def test_labels(classes, backend, dtype):
    name, device = backend
    z1, z2 = views(150, 20, dtype, device)
    labels = torch.randint(classes, (150,), generator=torch.Generator().manual_seed(1)).to(device, torch.int32)
    (loss, grad), (_, plain), (exact_loss, exact_grad) = both(z1, z2, name, device, scale=2.0**10, labels=labels)
    written_out = reference.mio_loss(z1.detach().double(), z2.detach().double(), labels=labels)
    assert relative_error(loss, written_out) < TOLERANCE[dtype][0]
    assert relative_error(loss, exact_loss) < TOLERANCE[dtype][0]
    assert_no_worse_than(grad, plain, exact_grad, TOLERANCE[dtype][1])


def test_stats(backend):
    name, device = backend
    z1, z2 = views(300, 10, device=device)
    loss, stats = mio_loss(z1, z2, bias=0.5, backend=name, return_stats=True)
    _, exact = mio_loss(z1.double(), z2.double(), bias=0.5, backend="reference", return_stats=True)
    assert stats._fields == exact._fields
    assert stats.positives == 600 and stats.negatives == 600 * 598
    for field in stats._fields:
        torch.testing.assert_close(getattr(stats, field), getattr(exact, field), rtol=1e-5, atol=1e-7, msg=field)
        assert not getattr(stats, field).requires_grad
    regularizer = (torch.nn.functional.normalize(z1) - torch.nn.functional.normalize(z2)).square().mean()
    torch.testing.assert_close(loss.double(), stats.positive_loss + stats.negative_loss + regularizer.double())


def test_same_bits_every_time_and_for_any_number_of_threads():
    z1, z2 = views(1300, 40)
    threads = torch.get_num_threads()

    def run():
        loss, stats = mio_loss(z1, z2, backend="cpu", return_stats=True)
        return loss, *torch.autograd.grad(loss, [z1, z2]), torch.stack(list(stats))

    try:
        torch.set_num_threads(max(threads, 4))
        runs = [run() for _ in range(4)]
        torch.set_num_threads(1)
        runs.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_non_contiguous_and_shared_memory(backend):
    name, device = backend
    wide = torch.randn(40, 30, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    z1, z2 = wide.T[::2, 1:39:2], wide.T[1::2, 1:39:2]
    loss = mio_loss(z1, z2, backend=name)
    (grad,) = torch.autograd.grad(loss, wide)
    exact_wide = wide.detach().double().requires_grad_()
    exact = reference.mio_loss(exact_wide.T[::2, 1:39:2], exact_wide.T[1::2, 1:39:2])
    (exact_grad,) = torch.autograd.grad(exact, exact_wide)
    assert relative_error(loss, exact) < 1e-6
    assert relative_error(grad, exact_grad) < 1e-5


def test_inputs_are_not_changed(backend):
    z1, z2 = views(20, 6, device=backend[1])
    before = z1.detach().clone(), z2.detach().clone()
    mio_loss(z1, z2, backend=backend[0]).backward()
    assert torch.equal(z1, before[0]) and torch.equal(z2, before[1])


def test_each_view_gets_a_gradient_of_its_own(backend, dtype):
    """Whoever keeps or saves z1.grad must not keep z2.grad too."""
    z1, z2 = views(20, 6, dtype, backend[1])
    mio_loss(z1, z2, backend=backend[0]).backward()
    for z in (z1, z2):
        assert z.grad.untyped_storage().nbytes() < 1.5 * z.grad.numel() * z.element_size()


def test_one_frozen_view(backend):
    name, device = backend
    z1, z2 = views(20, 6, device=device)
    full = torch.autograd.grad(mio_loss(z1, z2, backend=name), [z1, z2])
    (one,) = torch.autograd.grad(mio_loss(z1, z2.detach(), backend=name), [z1])
    (other,) = torch.autograd.grad(mio_loss(z1.detach(), z2, backend=name), [z2])
    assert torch.equal(one, full[0]) and torch.equal(other, full[1])


def test_no_gradient_work_when_none_is_needed(backend):
    name, device = backend
    z1, z2 = views(20, 6, device=device)
    with torch.no_grad():
        loss = mio_loss(z1, z2, backend=name)
    assert not loss.requires_grad
    with GradientsAskedFor() as calls:
        with torch.no_grad():
            mio_loss(z1, z2, backend=name)
        mio_loss(z1.detach(), z2.detach(), backend=name)
        mio_loss(z1, z2, backend=name)
    assert calls.seen == [[False] * 3, [False] * 3, [True, False, False]]


def test_second_derivative_is_refused(backend):
    name, device = backend
    z1, z2 = views(6, 4, device=device)
    with pytest.raises(RuntimeError, match="no second derivative; pass backend='reference'"):
        torch.autograd.grad(mio_loss(z1, z2, backend=name), z1, create_graph=True)
    loss = mio_loss(z1, z2, backend="reference")
    (grad,) = torch.autograd.grad(loss, z1, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), z1)
    assert second.norm() > 0


def test_backward_twice(backend):
    z1, z2 = views(6, 4, device=backend[1])
    loss = mio_loss(z1, z2, backend=backend[0])
    first = torch.autograd.grad(loss, z1, retain_graph=True)[0]
    second = torch.autograd.grad(loss, z1, grad_outputs=torch.tensor(2.0, device=backend[1]))[0]
    torch.testing.assert_close(second, 2 * first, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fused", "reference"])
def test_autocast_changes_nothing(name, backend):
    fused, device = backend
    name = fused if name == "fused" else name
    z1, z2 = views(50, 16, device=device)
    plain = mio_loss(z1, z2, backend=name)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = mio_loss(z1, z2, backend=name)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("learnable", [False, True])
def test_compiles_as_one_graph(learnable, dynamic, backend):
    name, device = backend
    tau = torch.tensor(0.4, device=device, requires_grad=True) if learnable else 0.4

    def step(z1, z2):
        loss, stats = mio_loss(z1 * 2, z2 + 1, temperature=tau, backend=name, return_stats=True)
        return loss * 3, stats.positive_cosine

    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in range(8, 56, 4):  # more sizes than PyTorch is willing to compile anew
        z1, z2 = views(batch, 10, device=device)
        inputs = [z1, z2] + ([tau] if learnable else [])
        expected, cosine = step(z1, z2)
        expected_grad = torch.autograd.grad(expected, inputs)
        loss, compiled_cosine = compiled(z1, z2)
        grad = torch.autograd.grad(loss, inputs)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(compiled_cosine, cosine)
        for a, b in zip(grad, expected_grad, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert counter.frame_count <= 2


def test_module(backend):
    name, device = backend
    z1, z2 = views(20, 6, device=device)
    module = MIOLoss(temperature=torch.nn.Parameter(torch.tensor(0.3)), regularizer=2.0, bias=-1.0, backend=name).to(
        device
    )
    loss = module(z1, z2)
    expected = mio_loss(z1, z2, temperature=0.3, regularizer=2.0, bias=-1.0, backend=name)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    assert [n for n, _ in module.named_parameters()] == ["temperature"]
    assert module.temperature.grad is not None


def test_memory_stays_linear():
    """N = 32,768, D = 128: under 160 MB more at the peak, where the logits alone would take 4.3 GB."""
    script = """
import torch, mio_ext
from pathlib import Path

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

z1, z2 = torch.randn(16384, 128, requires_grad=True), torch.randn(16384, 128, requires_grad=True)
small = torch.randn(64, 128, requires_grad=True)
mio_ext.mio_loss(small, small * 2).backward()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; a child inherits its parent's
before = peak()
mio_ext.mio_loss(z1, z2).backward()
print(peak() - before)
"""
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    assert 16e6 < int(result.stdout) < 160e6  # at least the gradients: the measurement works
