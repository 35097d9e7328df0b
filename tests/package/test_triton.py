# SPDX-License-Identifier: Apache-2.0
"""The Triton backend without a GPU: its kernels in Triton's interpreter, its machine code ahead of time.

The interpreter is chosen when Triton is imported, for a whole process. So these tests run in a process of
their own, which test_in_the_interpreter starts: `pytest tests` needs no environment variable, and no other
test sees an interpreted kernel. To run one by hand: TRITON_INTERPRET=1 pytest tests/package/test_triton.py -k name
"""

import importlib.metadata
import importlib.util
import os

import pytest
import torch
from conftest import ROOT, TOLERANCE, assert_no_worse_than, relative_error, run_python, views
from test_mio_loss import both
from test_pairwise_bce import BAD_ARGUMENTS, FORMS, assert_matches_reference, features, op_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from mio_ext import mio_loss

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in test_in_the_interpreter's process")
plain = pytest.mark.skipif(INTERPRETED, reason="runs outside the interpreter")
TRITON = ("triton", "cpu")


def before(package, *version):
    """Is ``package`` older than this version, (major, minor)?"""
    if importlib.util.find_spec(package) is None:
        return False
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2])) < version


@pytest.fixture
def tf32():
    """Lets TF32 into float32 products. The interpreter has none: products stay float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@plain
@pytest.mark.skipif(
    before("triton", 3, 7) and not before("numpy", 2, 4), reason="Triton 3.6 cannot interpret with NumPy 2.4 or later"
)
@pytest.mark.parametrize(
    "file, part",
    [
        ("test_triton.py", "matches"),
        ("test_triton.py", "not matches"),
        ("test_triton_numerics.py", "nan"),
        ("test_triton_numerics.py", "not nan"),
    ],
)
def test_in_the_interpreter(file, part):
    result = run_python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "package" / file), "-k", part,
        env={"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout, result.stdout


@plain
@pytest.mark.skipif(before("triton", 3, 7), reason="three tiles spill with Triton 3.6: docs/journal/triton.md")
def test_resources_of_every_large_tile():
    """No spill, matrix instructions, two special functions a logit: see the script for all variants."""
    result = run_python("benchmarks/triton_resources.py", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr


@plain
def test_the_check_of_resources_can_fail():
    from benchmarks.triton_resources import Entry, Resources, compile_entry, faults, sweep_constants
    from mio_ext.triton.tiles import Tile

    def entry(block_m, capability=90):
        constants = sweep_constants(Tile(block_m, 32, 4, 2), "16-bit", 64)
        return Entry("sweep_kernel", capability, "bf16", constants, 4, 2, "")

    assert faults(entry(32), compile_entry(entry(32))) == ["HMMA where HGMMA is due"]
    good = Resources(registers=128, shared=2**15, spills=0, matrix={"HGMMA": 8}, special=2.0)
    assert faults(entry(64), good) == []
    assert faults(entry(64, capability=100), good) == ["HGMMA where UTCHMMA is due"]
    for change, fault in (
        ({"spills": 3}, "3 spills"),
        ({"shared": 2**18}, "too much shared memory"),
        ({"matrix": {}}, "no matrix instruction where HGMMA is due"),
        ({"matrix": {"HGMMA": 8, "HMMA": 4}}, "HGMMA and HMMA where HGMMA is due"),
        ({"special": 0.0}, "no main loop"),
        ({"special": 2.5}, "more than two special functions per logit"),
    ):
        assert faults(entry(64), good._replace(**change)) == [fault]


@plain
@pytest.mark.parametrize("capability, tiles_of", [(75, 80), (80, 80), (89, 80), (90, 90), (103, 100), (120, 80)])
def test_which_tiles_a_gpu_takes(capability, tiles_of):
    from mio_ext.triton.tiles import table_capability

    assert table_capability(capability) == tiles_of


@plain
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_it_cannot_run():
    z = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="mio_loss: backend 'triton' cannot run: there is no CUDA GPU"):
        mio_loss(z, z, backend="triton")


@plain
def test_triton_is_imported_only_when_asked_for():
    code = "import sys, torch, mio_ext; mio_ext.mio_loss(torch.ones(2, 2), torch.ones(2, 2)); "
    result = run_python("-c", code + "print(sorted(m for m in sys.modules if m.startswith('mio_ext.triton')))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@interpreted
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m, k, d", [(1, 1, 1), (3, 7, 5), (65, 31, 32), (140, 200, 24), (20, 16, 300)])
def test_matches_rows_against_columns(m, k, d, form):
    kwargs = {**FORMS[form], "shift": min(m - 1, FORMS[form].get("shift", 0))}
    assert_matches_reference(TRITON, *features(m, k, d, torch.float32), **kwargs)


@interpreted
@pytest.mark.parametrize("form", ["normalised", "diagonal"])
def test_matches_tf32(form, tf32):
    assert_matches_reference(TRITON, *features(65, 31, 33, torch.float32), **FORMS[form])


@interpreted
@pytest.mark.parametrize("d", [33, 270])
@pytest.mark.parametrize("form", ["diagonal", "normalised"])
def test_matches_in_every_dtype(form, d, dtype):
    assert_matches_reference(TRITON, *features(65, 31, d, dtype), **FORMS[form])


@interpreted
@pytest.mark.parametrize("m", [2, 3, 34])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_matches_rows_against_themselves(m, exclude_self):
    x, _ = features(m, 1, 20, torch.float32)
    assert_matches_reference(TRITON, x, None, shift=m // 2 if m % 2 == 0 else 0, exclude_self=exclude_self)


@interpreted
@pytest.mark.parametrize("m, k, d", [(3, 7, 5), (65, 31, 32), (33, 20, 140), (20, 40, 300)])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_matches_with_ids(m, k, d, exclude_self):
    x, y = features(m, k, d, torch.float32)
    generator = torch.Generator().manual_seed(5)
    x_ids, y_ids = (torch.randint(-4, 5, (n,), generator=generator) * 2**33 for n in (m, k))
    assert_matches_reference(TRITON, x, y, x_ids=x_ids, y_ids=y_ids, exclude_self=exclude_self, offset=1)
    assert_matches_reference(TRITON, x, None, x_ids=x_ids, exclude_self=exclude_self)


@interpreted
@pytest.mark.parametrize("batch, dim", [(2, 3), (17, 129), (100, 40), (33, 300)])
def test_mio_loss(batch, dim, dtype):
    z1, z2 = views(batch, dim, dtype)
    scale = 3 * 2.0**12 if dtype == torch.float16 else 3.0
    (loss, grad), (plain_loss, plain_grad), (exact_loss, exact_grad) = both(z1, z2, *TRITON, scale=scale)
    assert grad.dtype == dtype
    loss_limit, grad_limit = TOLERANCE[dtype]
    assert_no_worse_than(loss, plain_loss, exact_loss, loss_limit)
    assert_no_worse_than(grad, plain_grad, exact_grad, grad_limit)


@interpreted
@pytest.mark.parametrize("changes, message", BAD_ARGUMENTS)
def test_message_matches_the_cpu_backend(changes, message):
    said = []
    for op in (torch.ops.mio_ext.pairwise_bce, torch.ops.mio_ext.pairwise_bce_triton):
        with pytest.raises((ValueError, TypeError), match="pairwise_bce: .*" + message) as error:
            op(*op_arguments(**changes))
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


@interpreted
@pytest.mark.parametrize("d", [20, 260])
def test_zero_rows_get_no_gradient_and_nan_shows(d):
    z1, z2 = (z.detach() for z in views(20, d))
    z1[3], z2[0] = 0, 1e-14
    for z in (z1, z2):
        z.requires_grad_()
    (_, grad), _, (_, exact) = both(z1, z2, *TRITON)
    assert grad[3].abs().max() == 0 and grad[20].abs().max() == 0
    assert relative_error(grad, exact) < 1e-5
    with torch.no_grad():
        z1[5, 1] = torch.nan
    assert mio_loss(z1, z2, backend="triton").isnan()


@interpreted
@pytest.mark.parametrize("precision, product", [("ieee", "fp16x3"), ("tf32", "tf32")])
def test_precision_set_through_the_newer_switch(precision, product):
    """PyTorch's older getter raises once someone has used it."""
    from mio_ext.triton.pairwise_bce import product_of

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        assert product_of(torch.float32, 20) == product
        assert mio_loss(*views(4, 20), backend="triton").isfinite()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@interpreted
def test_numbers_in_a_tensor_that_is_not_contiguous():
    x, y = features(9, 8, 5, torch.float32)
    numbers = torch.tensor([5.0, 4.0, -0.5, 0.5, 0.02, 0.3])
    args = ([], 0, 0, False, True, [True] * 3)
    op = torch.ops.mio_ext.pairwise_bce_triton
    spread = op(x, y, None, None, numbers.repeat_interleave(2)[::2], *args)
    for a, b in zip(spread, op(x, y, None, None, numbers, *args), strict=True):
        assert torch.equal(a, b)


@interpreted
@pytest.mark.parametrize("d", [10, 130, 260])
@pytest.mark.parametrize("needs", [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]])
def test_makes_only_the_gradients_asked_for(needs, d):
    x, y = features(30, 25, d, torch.float32)
    numbers = [5.0, 4.0, -0.5, 0.5, 0.02, 0.3]
    args = (x, y, None, None, torch.tensor(numbers), [], 0, 0, False, True, [bool(n) for n in needs])
    actual = torch.ops.mio_ext.pairwise_bce_triton(*args)
    exact = torch.ops.mio_ext.pairwise_bce(*args)
    for a, e in zip(actual, exact, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize("d", [10, 260])
@pytest.mark.parametrize("bad", [float("nan"), 0.0, -0.5, float("inf")])
def test_a_bad_temperature_in_a_tensor_shows_as_nan(bad, d):
    z1, z2 = views(6, d)
    assert mio_loss(z1, z2, temperature=torch.tensor(bad), backend="triton").isnan()
    assert mio_loss(z1, z2, negative_temperature=torch.tensor(bad), backend="triton").isnan()


@interpreted
def test_rows_that_are_not_contiguous():
    z1 = views(20, 24)[0].detach()
    spread = torch.zeros(20, 48)
    spread[:, ::2] = z1
    args = (None, None, None, None, [1.0, 2.0, 0.0, 0.1, 0.1, 0.1], 0, 0, False, True, [True, False, False])
    for odd in (spread[:, ::2], z1.T.contiguous().T):
        for a, e in zip(
            torch.ops.mio_ext.pairwise_bce_triton(odd, *args),
            torch.ops.mio_ext.pairwise_bce_triton(z1, *args),
            strict=True,
        ):
            assert torch.equal(a, e)


@interpreted
def test_same_bits_whatever_the_order_of_arrival(monkeypatch):
    from mio_ext.triton import pairwise_bce as backend

    z1, z2 = views(70, 20)
    first, second = (both(z1, z2, *TRITON)[0] for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    plans = []
    for splits in (1, 2, 5):
        plan = lambda m, k, size, tile, slots, splits=splits: backend.Plan(  # noqa: E731
            -(-m // tile.block_m), splits, -(-k // tile.block_n // splits)
        )
        monkeypatch.setattr(backend, "sweep_plan", plan)
        plans.append(both(z1, z2, *TRITON)[0])
    for loss, grad in plans:
        assert relative_error(loss, first[0]) < 1e-6 and relative_error(grad, first[1]) < 1e-5


@interpreted
@pytest.mark.parametrize("d", [32, 256])
def test_large_batches_finish_in_a_second_launch(monkeypatch, d):
    from mio_ext.triton import pairwise_bce as backend

    monkeypatch.setattr(backend, "FINISH_ROWS", 0)
    for batch in (64, 70):  # in place, and not
        (loss, grad), (plain_loss, plain_grad), (exact_loss, exact_grad) = both(*views(batch, d), *TRITON)
        assert_no_worse_than(loss, plain_loss, exact_loss, 1e-6)
        assert_no_worse_than(grad, plain_grad, exact_grad, 1e-5)


@interpreted
def test_several_chunks(monkeypatch):
    from mio_ext.triton import pairwise_bce as backend

    monkeypatch.setattr(backend, "CHUNK_BYTES", 1)
    assert_matches_reference(TRITON, *features(140, 20, 260, torch.float32), normalize=True)


class Launches(TorchDispatchMode):
    """Everything under it that would start a kernel on a GPU: PyTorch's ops, but for views and empty tensors,
    and ours; ``names`` has them in order."""

    def __init__(self, monkeypatch):
        super().__init__()
        from triton.runtime.interpreter import InterpretedFunction

        self.names, run, cat = [], InterpretedFunction.run, torch.cat

        def counted(function, *args, **kwargs):
            if function.__name__.endswith("_kernel"):
                self.names.append(function.__name__)
            return run(function, *args, **kwargs)

        def counted_cat(tensors):  # the mode does not see inside our op
            self.names.append("cat")
            return cat(tensors)

        monkeypatch.setattr(InterpretedFunction, "run", counted)
        monkeypatch.setattr(torch, "cat", counted_cat)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if op.namespace == "aten" and not op.is_view and "empty" not in name and name != "detach":
            self.names.append(name)
        return op(*args, **(kwargs or {}))


@interpreted
@pytest.mark.parametrize("d", [128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_launches_of_a_small_mio_step(monkeypatch, dtype, d):
    """Five, but for float32 rows whose gradient is made in two slices. ones_like is PyTorch's own grad_output."""
    sliced = dtype == torch.float32 and d > 128
    z1, z2 = views(128, d, dtype)
    with Launches(monkeypatch) as launches:
        mio_loss(z1, z2, backend="triton").backward()
    sweeps = ["sweep_kernel"] * 2 + ["project_kernel"] if sliced else ["sweep_kernel"]
    assert launches.names == ["cat", "prepare_kernel", *sweeps, "ones_like", "mul", "mul"]


def test_every_split_of_columns_covers_them_once():
    pytest.importorskip("triton")
    from mio_ext.triton.pairwise_bce import sweep_plan
    from mio_ext.triton.tiles import Tile

    for m in (1, 256, 1000, 16384, 65536, 10**6):
        for k in (1, 31, 256, 4097, 65536):
            tile = Tile(128, 64, 8, 3)
            plan = sweep_plan(m, k, m * 512, tile, 132)
            tiles = -(-k // 64)
            assert plan.row_blocks == -(-m // 128)
            assert (plan.splits - 1) * plan.tiles_per_split < tiles <= plan.splits * plan.tiles_per_split
            assert plan.splits == 1 or plan.splits * m * 512 <= 16 * 2**20


@interpreted
@pytest.mark.filterwarnings("ignore")
def test_traces_without_a_graph_break():
    z1, z2 = views(8, 12)
    expected = torch.autograd.grad(mio_loss(z1, z2, backend="triton"), [z1, z2])
    compiled = torch.compile(mio_loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(z1, z2, backend="triton"), [z1, z2])
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
