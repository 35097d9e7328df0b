# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA backend has to show on a GPU; test_backends_gpu.py has the rest."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TOLERANCE, assert_no_worse_than, relative_error, views
from test_cuda import agreeing

from mio_ext import mio_loss, siglip_loss
from mio_ext.backends import unavailable_reason
from mio_ext.library import diagnostics

REASON = unavailable_reason("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}")]


def kernels(function) -> list[str]:
    """The names of all kernels, PyTorch's own too, that ``function`` launches."""
    function()  # what is lazily made once is made now
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    return names


@pytest.mark.parametrize(
    "batch, dim, dtype, launches",
    [
        (128, 128, torch.bfloat16, 3),
        (512, 64, torch.float32, 3),
        (2, 3, torch.float16, 3),
        (2048, 128, torch.bfloat16, 4),
    ],
)
def test_launches_of_a_step(batch, dim, dtype, launches):
    z1, z2 = views(batch, dim, dtype, "cuda")
    grad_output = torch.ones((), device="cuda")  # loss.backward() would make it, in a launch of its own

    def step():
        torch.autograd.grad(mio_loss(z1, z2, backend="cuda"), (z1, z2), grad_output)

    names = kernels(step)
    assert len(names) == launches, names
    hopper = torch.cuda.get_device_capability() == (9, 0) and "9.0a" in diagnostics.cuda and 2 * batch > 1024
    assert any("sweep_hopper" in name for name in names) == hopper, names


@pytest.mark.skipif(
    REASON is None and (torch.cuda.get_device_capability() != (9, 0) or "9.0a" not in diagnostics.cuda),
    reason="of capability 9.0 alone",
)
def test_wide_rows_make_no_logits_in_memory():
    x, y = (torch.randn(1500, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "xy")
    names = kernels(lambda: siglip_loss(x, y, 10.0, -10.0, backend="cuda").backward())
    assert any("chunk_hopper" in name for name in names) and not any("terms_kernel" in name for name in names), names


# Every pass of every path: one launch and several, both products of float32, ids, two gradients, chunked. racecheck
# does not know that a copy counted by an mbarrier is awaited there and calls every read of its data a hazard, so it
# gets portable kernels only: 16-bit problems of so few rows and features that capability 9.0 has no kernel of its own
# for them.
SANITIZED = """
import sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import views
from mio_ext import mio_loss, siglip_loss
for dtype in (torch.float32, torch.bfloat16):
    few = {portable} and dtype == torch.bfloat16
    for batch, dim in ((33, 40), (500 if few else 600, 70), (70, 200), (80, 256 if few else 300)):
        z1, z2 = views(batch, dim, dtype, "cuda")
        labels = torch.arange(batch, device="cuda") % 7
        for loss in (
            mio_loss(z1, z2, backend="cuda"),
            mio_loss(z1, z2, backend="cuda", labels=labels),
            siglip_loss(z1, torch.cat([z2, z1]), 5.0, -5.0, backend="cuda", normalize=True),
        ):
            loss.backward()
            assert loss.isfinite() and z1.grad.isfinite().all()
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    script = SANITIZED.format(root=str(ROOT), portable=tool == "racecheck")
    result = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", sys.executable, "-c", script],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # every buffer has an end to run past
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "not supported" in result.stdout + result.stderr and result.returncode not in (0, 99):
        pytest.skip("compute-sanitizer does not support this machine")
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3), (torch.float16, 2e-3)], ids=str
)
def test_more_rows_than_a_chunk(dtype, limit):
    """Chunks are of 10880 rows, or 6784 in 16 bits on capability 9.0: the last one is short, and dy is summed over
    both, in float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, y = (torch.randn(12_288, 320, device="cuda", generator=generator) for _ in "xy")
    x, y = (torch.nn.functional.normalize(z).to(dtype) for z in (x, y))
    results = []
    for backend, to in (("cuda", dtype), ("reference", torch.float64)):
        a, b = (t.to(to).requires_grad_() for t in (x, y))
        loss = siglip_loss(a, b, 10.0, -10.0, backend=backend)
        results.append((loss, *torch.autograd.grad(loss * 2.0**16, (a, b))))  # float16 has no smaller gradients
    (loss, *grads), (exact, *exact_grads) = results
    assert relative_error(loss, exact) < 1e-5
    for actual, expected in zip(grads, exact_grads, strict=True):
        assert relative_error(actual, expected) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [7, 128, 256, 300])
@pytest.mark.parametrize("noise", [0, 1e-6, 1e-3])
def test_views_that_agree(noise, dim, dtype):
    """As in test_cuda.py, with products that the compiler may join to sums."""
    for batch, regularizer in ((60, 0), (60, 1), (60, 100), (1000, 50)):
        (loss, grad), (plain, plain_grad), (exact, exact_grad) = agreeing(
            batch, dim, dtype, noise, regularizer, "cuda", "cuda"
        )
        assert_no_worse_than(loss, plain, exact, TOLERANCE[dtype][0])
        assert_no_worse_than(grad, plain_grad, exact_grad, TOLERANCE[dtype][1] if dtype.itemsize == 2 else 1)
