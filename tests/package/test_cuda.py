# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend without a GPU: what it says, and its host code on CPU tensors, with the kernels in an emulator.

The kernels' own test is tests/native/pairwise_bce_cuda_test.cpp.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TOLERANCE, assert_no_worse_than, relative_error, run_python, views
from test_mio_loss import both
from torch.utils import cpp_extension

from mio_ext import __version__, gradient, library, mio_loss, ops, siglip_loss


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_it_cannot_run():
    z = torch.randn(4, 3)
    why = library.cuda_failure or "there is no CUDA GPU"
    with pytest.raises(RuntimeError, match=re.escape(f"mio_loss: backend 'cuda' cannot run: {why}")):
        mio_loss(z, z, backend="cuda")


def test_build_without_cuda_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert library._load_cuda() == (
        "the extension was built without CUDA; FORCE_CUDA=1 python setup.py build_ext does it or says why"
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert re.fullmatch(r"torch \S+ was built without CUDA", library._load_cuda())


@pytest.mark.parametrize(
    "versions, reason",
    [
        (("0.0.1", 13000, 13000), r"libmio_ext_cuda.so is of mio_ext 0.0.1, this is .*; run: pip install .*"),
        ((__version__, 13000, 12040), "the driver is for CUDA 12.4 and the kernels need one for 13.0; .* later driver"),
        ((__version__, 13020, 13000), None),  # of one major version, any driver runs any code
        ((__version__, 12080, 13000), None),
    ],
)
def test_a_library_or_driver_that_does_not_fit_is_told(versions, reason, monkeypatch):
    monkeypatch.setattr(library, "ops", lambda: SimpleNamespace(cuda_versions=lambda: versions))
    told = library.cuda_mismatch.__wrapped__()
    assert told is None if reason is None else re.fullmatch(reason, told)


def test_machine_code():
    """No spills, the matrix instructions that are due, all exponentials: in the objects of this build."""
    if library.diagnostics.cuda is None:
        pytest.skip("the extension was built without CUDA")
    pytest.importorskip("triton", reason="cuobjdump and nvdisasm come with Triton")
    result = run_python("benchmarks/cuda_resources.py")
    assert result.returncode == 0, result.stdout + result.stderr
    for architecture in re.findall(r"\d+\.\d+a?", library.diagnostics.cuda):
        assert f"sm_{architecture.replace('.', '')} " in result.stdout


@pytest.fixture(scope="module")
def emulated_ops():
    """The op in the emulator, with each of its kernels; chunks are of 256 rows."""
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [ROOT / "tests" / "native" / "cuda_emulated_op.cpp"]
    for kernel in sorted((ROOT / "csrc" / "cuda").rglob("*.cu")):
        source = folder / f"{kernel.stem}.cpp"
        text = f'#include "{kernel.relative_to(ROOT / "csrc")}"\n'
        if not source.exists() or source.read_text() != text:
            source.write_text(text)
        sources.append(source)
    cpp_extension.load(
        "mio_ext_emulated",
        [str(source) for source in sources],
        # The emulator's fibers jump between stacks, which _FORTIFY_SOURCE takes for an attack.
        extra_cflags=[
            *("-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"),
            *("-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        ],
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests" / "native")],
        build_directory=str(folder),
        is_python_module=False,
    )
    made = torch.library.Library("mio_ext_emulated", "IMPL")
    for name in ("portable", "hopper"):
        gradient.register(made, name)
    yield torch.ops.mio_ext_emulated
    made._destroy()


def agreeing(batch, dim, dtype, noise, regularizer, backend="cpu", device="cpu"):
    """As both(), of views that agree, where training goes: the regularizer's gradient is a small difference, beside
    little else at a high temperature. It is written out here, for the float32 reference to lose no digits."""
    z1, z2 = views(batch, dim, dtype, device, noise)
    results = []
    for name, to in ((backend, dtype), ("reference", dtype), ("reference", torch.float64)):
        a, b = (z.detach().to(to).requires_grad_() for z in (z1, z2))
        loss = mio_loss(a, b, temperature=8.0, regularizer=regularizer if name == backend else 0.0, backend=name)
        if name != backend:
            wide = (torch.nn.functional.normalize(z if to == torch.float64 else z.float()) for z in (a, b))
            loss = loss + regularizer * torch.sub(*wide).square().mean()
        results.append((loss, torch.cat(torch.autograd.grad(loss * 2.0**12, (a, b)))))
    return results


@pytest.fixture
def emulated(emulated_ops, monkeypatch, request):
    """backend="cpu" is the emulator's."""
    kernel = getattr(request, "param", "portable")
    monkeypatch.setattr(torch.ops.mio_ext, "pairwise_bce", getattr(emulated_ops, kernel))
    monkeypatch.setattr(ops, "_takes_tf32", lambda backend: torch.get_float32_matmul_precision() == "high")


@pytest.mark.parametrize(
    "emulated, dtype, precision",
    [
        ("portable", torch.float32, "highest"),
        ("portable", torch.float32, "high"),
        ("portable", torch.bfloat16, "highest"),
        ("portable", torch.float16, "highest"),
        ("hopper", torch.bfloat16, "highest"),
        ("hopper", torch.float16, "highest"),
    ],
    indirect=["emulated"],
    ids=str,
)
@pytest.mark.parametrize("batch, dim", [(2, 3), (75, 40), (40, 130), (100, 300)])
def test_mio_loss(batch, dim, dtype, precision, emulated):
    torch.set_float32_matmul_precision(precision)
    try:
        (loss, grad), (plain, plain_grad), (exact, exact_grad) = both(
            *views(batch, dim, dtype), "cpu", "cpu", scale=3 * 2.0**12
        )
    finally:
        torch.set_float32_matmul_precision("highest")
    if precision == "high" and dim <= 256:
        assert relative_error(loss, exact) < 1e-4
        assert relative_error(grad, exact_grad) < 2e-3
        return
    assert_no_worse_than(loss, plain, exact, TOLERANCE[dtype][0])
    assert_no_worse_than(grad, plain_grad, exact_grad, TOLERANCE[dtype][1])


def step(x, y, backend, **kwargs):
    scale, bias = (torch.tensor(v, requires_grad=True, dtype=x.dtype) for v in (10.0, -5.0))
    inputs = [t for t in (x, y, scale, bias) if t.requires_grad]
    loss, stats = siglip_loss(x, y, scale, bias, backend=backend, return_stats=True, **kwargs)
    return loss, torch.stack(list(stats)), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("form, frozen", [("offset", ""), ("ids", "x"), ("negatives", "y"), ("normalized", "xy")])
@pytest.mark.parametrize("m, k, dim", [(20, 70, 30), (140, 290, 270), (290, 140, 270)])
def test_siglip_loss(m, k, dim, frozen, form, emulated):
    if form == "offset" and k < m:
        pytest.skip("every image needs a text")
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.nn.functional.normalize(torch.randn(n, dim, generator=generator)) for n in (m, k))
    # Ids with no text are none of the CPU's check; a stride that is not 1.
    options = {
        "offset": {"text_offset": max(0, k - m) // 2},
        "ids": {"image_ids": torch.arange(m) % 10 << 40, "text_ids": torch.arange(k) * 3 % 10 << 40},
        "negatives": {"negative_only": True},
        "normalized": {"normalize": True, "negative_only": k < m},
    }[form]
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        a, b = (t.to(dtype).T.contiguous().T.requires_grad_(name not in frozen) for name, t in (("x", x), ("y", y)))
        results.append(step(a, b, backend, **options))
    for actual, expected in zip(*results, strict=True):
        keep = ~expected.isnan()  # statistics of no pair
        assert torch.equal(keep, ~actual.isnan())
        assert relative_error(actual[keep], expected[keep]) < 1e-5


@pytest.mark.parametrize("dim", [40, 200, 300])
def test_sigmas_far_below_the_range_of_float16(dim, emulated):
    x, y = (torch.nn.functional.normalize(z).detach() for z in views(70, dim))
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        a, b = (t.to(dtype).requires_grad_() for t in (x, y))
        loss = siglip_loss(a, b, 10.0, -40.0, negative_only=True, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (a, b))))
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("dim", [64, 300])
def test_nothing_but_the_loss(dim, emulated):
    z1, z2 = views(150, dim)
    with torch.no_grad():
        loss = mio_loss(z1, z2)
    assert relative_error(loss, mio_loss(z1.double(), z2.double(), backend="reference")) < 1e-6


def test_chunked_takes_norms_far_apart(emulated):
    z1, z2 = views(100, 300)
    with torch.no_grad():
        z1.mul_(torch.logspace(-30, 15, 100)[:, None])
        z1[7] = 0
    (loss, grad), _, (exact, exact_grad) = both(z1, z2, "cpu", "cpu")
    assert relative_error(loss, exact) < 1e-6
    assert grad.isfinite().all()
    # Row by row: the small rows have the large gradients.
    error = (grad.double() - exact_grad).norm(dim=1)
    assert (error <= 1e-5 * exact_grad.norm(dim=1)).all()


NOT_FINITE = {
    torch.float32: (0x7FFFFFFF, 0x7FC00000, 0x7F800001, -0x00000001, 0x7F800000, -0x00800000),
    torch.bfloat16: (0x7FFF, 0x7FC0, 0x7F81, -0x0001, 0x7F80, -0x0080),
    torch.float16: (0x7FFF, 0x7E00, 0x7C01, -0x0001, 0x7C00, -0x0400),
}


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize(
    "emulated, dtype",
    [*(("portable", dtype) for dtype in NOT_FINITE), ("hopper", torch.bfloat16), ("hopper", torch.float16)],
    indirect=["emulated"],
    ids=str,
)
def test_not_finite_features_reach_the_loss_of_wide_rows(dtype, labelled, emulated):
    """NaN of several bit patterns and Inf, chunked; pairwise_bce_cuda_test.cpp has the fused kernels."""
    labels = torch.arange(40) % 3 if labelled else None
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    for bits in NOT_FINITE[dtype]:
        for which, row in ((0, 3), (1, 39)):
            zs = views(40, 300, dtype)
            with torch.no_grad():
                zs[which][row, 271] = torch.tensor(bits, dtype=integers).view(dtype)
            loss = mio_loss(*zs, labels=labels, backend="cpu")
            loss.backward()
            assert loss.isnan() and zs[which].grad[row].isnan().any() and zs[0].grad[7].isnan().any(), hex(bits)


@pytest.mark.parametrize("dim", [64, 300])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", ["temperature", "negative_temperature", "bias", "regularizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_numbers_reach_the_loss(value, name, labelled, dim, emulated):
    """An infinite temperature is none: NaN; bias and regularizer may be infinite, and so is the loss then."""
    number = torch.tensor(value, requires_grad=True)
    labels = torch.arange(20) % 3 if labelled else None
    loss = mio_loss(*views(20, dim), labels=labels, backend="cpu", **{name: number})
    assert not loss.isfinite()


@pytest.mark.parametrize(
    "emulated, dtype, precision",
    [
        ("portable", torch.float32, "highest"),
        ("portable", torch.float32, "high"),
        ("portable", torch.bfloat16, "highest"),
        ("hopper", torch.bfloat16, "highest"),
    ],
    indirect=["emulated"],
    ids=str,
)
@pytest.mark.parametrize("dim", [7, 64, 128, 256, 300])
@pytest.mark.parametrize("noise", [0, 1e-6, 1e-3])
def test_views_that_agree(noise, dim, dtype, precision, emulated):
    torch.set_float32_matmul_precision(precision)
    try:
        for regularizer in (0, 1, 50, 100):
            (loss, grad), (plain, plain_grad), (exact, exact_grad) = agreeing(60, dim, dtype, noise, regularizer)
            if precision == "high" and dim <= 256:  # what 11 bits leave of D = 7, with a regularizer or without
                assert relative_error(loss, exact) < 1e-4
                assert relative_error(grad, exact_grad) < 3e-3
            else:
                assert_no_worse_than(loss, plain, exact, TOLERANCE[dtype][0])
                assert_no_worse_than(grad, plain_grad, exact_grad, TOLERANCE[dtype][1] if dtype.itemsize == 2 else 1)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("emulated", ["portable", "hopper"], indirect=True)
@pytest.mark.parametrize("m, k, dim", [(140, 290, 272), (290, 140, 270)])
@pytest.mark.parametrize("form", ["plain", "ids", "strided"])
@pytest.mark.parametrize("frozen", ["", "x", "y", "xy"])
def test_siglip_loss_of_wide_rows_in_16_bits(frozen, form, m, k, dim, emulated):
    """Chunks of 256 rows. Plain rows of 272 features the library takes as they are, the others from a copy."""
    x, y = (torch.nn.functional.normalize(z).bfloat16() for z in views(290, dim))
    x, y = x[:m], y[:k]
    if form == "strided":
        x, y = (t.T.contiguous().T for t in (x, y))
    ids = {"image_ids": torch.arange(m) % 10, "text_ids": torch.arange(k) * 3 % 10} if form == "ids" else {}
    results = []
    for backend, dtype in (("cpu", torch.bfloat16), ("reference", torch.float64)):
        a, b = (t.detach().to(dtype).requires_grad_(name not in frozen) for name, t in (("x", x), ("y", y)))
        loss = siglip_loss(a, b, 10.0, -5.0, backend=backend, negative_only=k < m and not ids, **ids)
        wanted = [t for t in (a, b) if t.requires_grad]
        results.append((loss, *(torch.autograd.grad(loss * 2.0**12, wanted) if wanted else ())))
    (loss, *grads), (exact, *exact_grads) = results
    loss_limit, grad_limit = TOLERANCE[torch.bfloat16]
    assert relative_error(loss, exact) < loss_limit
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert relative_error(grad, exact_grad) < grad_limit


def test_op_takes_wide_features_that_require_grad(emulated_ops):
    """A library gets them as they are; its products with an `out` would refuse."""
    x, y = (torch.nn.functional.normalize(z.detach()).bfloat16().requires_grad_() for z in views(9, 264))
    arguments = [[10.0, 10.0, -5.0, 1.0, 1.0, 0.0], 0, 0, False, False, [True, True, False]]
    for op in (emulated_ops.portable, emulated_ops.hopper):
        dx = op(x, y, None, None, None, *arguments)[2]
        assert dx.shape == x.shape and dx.isfinite().all()
