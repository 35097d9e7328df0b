# SPDX-License-Identifier: Apache-2.0
"""The op in its general form, eq. (11)-(12), and its contract with PyTorch."""

import pytest
import torch
from conftest import TOLERANCE, assert_no_worse_than, relative_error, run_python

from mio_ext import library, ops, reference

# (M, K, D): smaller than any tile, ragged on either side, several blocks, long and thin.
SHAPES = [(1, 1, 1), (3, 7, 5), (20, 16, 130), (65, 31, 32), (200, 333, 24), (7, 900, 40), (900, 7, 40), (700, 610, 48)]

# What a loss can ask of the op; each is a keyword set for ops.pairwise_bce.
FORMS = {
    "diagonal": {},
    "offset": {"offset": 2},
    "negatives only": {"offset": 10_000},
    "shifted": {"shift": 1},
    "own rows of a longer batch": {"shift": 1, "offset": 1, "exclude_self": True},
    "normalised": {"normalize": True, "weights": (0.3, 0.01, 0.2)},
    "no negatives count": {"weights": (1.0, 0.0, 0.0)},
}


def features(m, k, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) / d**0.5 for n in (m, k))
    return x.to(dtype), y.to(dtype)


def run(backend, x, y, to=None, **kwargs):
    """(loss, gradients of what there is, stats) on copies of x and y, in dtype ``to`` if given."""
    x, y = (None if t is None else t.to(to or t.dtype).requires_grad_() for t in (x, y))
    loss, stats = ops.pairwise_bce(x, y, backend=backend, **kwargs)
    grads = torch.autograd.grad(loss * 256, [t for t in (x, y) if t is not None])
    return loss, grads, torch.stack(list(stats))


def assert_matches_reference(backend, x, y, **kwargs):
    name, device = backend
    x, y = (None if t is None else t.to(device) for t in (x, y))
    kwargs = {"scale": (5.0, 4.0), "bias": -0.5, "weights": (0.5, 0.02, 0.0)} | kwargs
    loss, grads, stats = run(name, x, y, **kwargs)
    plain_loss, plain_grads, _ = run("reference", x, y, **kwargs)
    exact_loss, exact_grads, exact_stats = run("reference", x, y, torch.float64, **kwargs)
    loss_limit, grad_limit = TOLERANCE[x.dtype]
    assert_no_worse_than(loss, plain_loss, exact_loss, loss_limit)
    for grad, plain, exact in zip(grads, plain_grads, exact_grads, strict=True):
        assert grad.dtype == x.dtype
        if exact.norm() < 1e-12:
            assert grad.norm() < 1e-5
        else:
            assert_no_worse_than(grad, plain, exact, grad_limit)
    torch.testing.assert_close(stats, exact_stats, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m, k, d", SHAPES)
def test_rows_against_columns(m, k, d, form, backend):
    assert_matches_reference(
        backend, *features(m, k, d, torch.float32), **{**FORMS[form], "shift": min(m - 1, FORMS[form].get("shift", 0))}
    )


@pytest.mark.parametrize("form", ["diagonal", "normalised"])
@pytest.mark.parametrize("m, k, d", [(65, 31, 33), (200, 333, 24)])
def test_dtypes(m, k, d, form, dtype, backend):
    assert_matches_reference(backend, *features(m, k, d, dtype), **FORMS[form])


@pytest.mark.parametrize("d", [20, 128, 300])
def test_16_bit_rows_that_sum_to_nothing(d, backend):
    """What pushes rows apart makes their sum vanish: then a sigma rounded to 16 bits shows in the gradient."""
    x, _ = features(1026, 1, d, torch.float32)
    for _ in range(20):
        x = torch.nn.functional.normalize(x - x.mean(0))
    kwargs = {"shift": 513, "exclude_self": True, "normalize": True, "weights": (1 / 1026, 1 / 1026 / 1024, 0.0)}
    assert_matches_reference(backend, x.bfloat16(), None, scale=(2.0, 2.0), bias=0.0, **kwargs)


@pytest.mark.parametrize("norm", [1e-9, 1e-3, 1e4, 1e25])
def test_bfloat16_rows_of_any_norm(norm, backend):
    """Products of the rows as they are would leave float32's range; their cosines do not."""
    x, y = (norm * t for t in features(65, 90, 33, torch.float64))
    x[3], y[5], y[6] = 0, 0, 1e-30
    x, y = (t.bfloat16().to(backend[1]) for t in (x, y))
    kwargs = {"scale": (5.0, 4.0), "normalize": True, "weights": (0.3, 0.01, 0.2)}
    loss, grads, _ = run(backend[0], x, y, **kwargs)
    exact, exact_grads, _ = run("reference", x, y, torch.float64, **kwargs)
    assert relative_error(loss, exact) < TOLERANCE[torch.bfloat16][0]
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert exact_grad.norm() > 0 and relative_error(grad, exact_grad) < TOLERANCE[torch.bfloat16][1]


@pytest.mark.parametrize("m", [2, 3, 31, 33, 250, 1026])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_rows_against_themselves(m, exclude_self, backend):
    x, _ = features(m, 1, 20, torch.float32)
    shift = m // 2 if m % 2 == 0 else 0
    assert_matches_reference(backend, x, None, shift=shift, exclude_self=exclude_self)


@pytest.mark.parametrize("m, k, d", [(3, 7, 5), (65, 31, 32), (200, 333, 24), (7, 900, 40)])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_ids(m, k, d, exclude_self, backend):
    x, y = features(m, k, d, torch.float32)
    generator = torch.Generator().manual_seed(5)
    # Beyond 2^32 and equal in their low 32 bits: a kernel that cuts ids short sees positives everywhere.
    x_ids, y_ids = (torch.randint(-4, 5, (n,), generator=generator) * 2**33 for n in (m, k))
    x_ids, y_ids = x_ids.to(backend[1]), y_ids.to(backend[1])
    assert_matches_reference(backend, x, y, x_ids=x_ids, y_ids=y_ids, exclude_self=exclude_self, offset=1)
    assert_matches_reference(backend, x, None, x_ids=x_ids, exclude_self=exclude_self)


@pytest.mark.parametrize("d", [256, 512, 768, 1152])
def test_many_features(d, backend):
    assert_matches_reference(backend, *features(150, 140, d, torch.float32), scale=(30.0, 30.0), bias=-10.0)


@pytest.mark.parametrize("scale, bias", [(100.0, -10.0), (100.0, 0.0), (1.0, -10.0), (1.0, 50.0)])
def test_extreme_logits(scale, bias, backend):
    x, y = (torch.nn.functional.normalize(t) for t in features(150, 140, 64, torch.float32))
    y[:140] = torch.nn.functional.normalize(y[:140] + 2 * x[:140])
    kwargs = {"scale": (scale, scale), "bias": bias, "weights": (1 / 150, 1 / 150, 0.0)}
    assert_matches_reference(backend, x, y, **kwargs)


def test_gradients_of_all_six_numbers(backend):
    name, device = backend
    x, y = (t.to(device) for t in features(60, 45, 10, torch.float32))
    values = [5.0, 4.0, -0.5, 0.5, 0.02, 0.3]

    def grads(backend, dtype):
        n = [torch.tensor(v, dtype=dtype, device=device, requires_grad=True) for v in values]
        loss, _ = ops.pairwise_bce(
            x.to(dtype),
            y.to(dtype),
            scale=(n[0], n[1]),
            bias=n[2],
            weights=(n[3], n[4], n[5]),
            normalize=True,
            backend=backend,
        )
        return torch.autograd.grad(loss, n)

    for ours, exact in zip(grads(name, torch.float32), grads("reference", torch.float64), strict=True):
        assert relative_error(ours, exact) < 1e-5


def test_gradcheck_on_every_input(backend):
    name, device = backend
    x, y = (t.to(device).requires_grad_() for t in features(6, 5, 4, torch.float64))
    numbers = [torch.tensor(v, dtype=torch.float64, device=device, requires_grad=True) for v in (3.0, 2.0, -0.5)]

    def loss(x, y, a_p, a_n, b):
        return ops.pairwise_bce(x, y, scale=(a_p, a_n), bias=b, weights=(0.5, 0.1, 0.0), backend=name)[0]

    assert torch.autograd.gradcheck(loss, (x, y, *numbers))


def op_arguments(device="cpu", **changes):
    x, y = (t.to(device) for t in features(12, 9, 5, torch.float32))
    arguments = {
        "x": x,
        "y": y,
        "x_ids": None,
        "y_ids": None,
        "params": None,
        "constants": [2.0, 2.0, 0.0, 0.1, 0.1, 0.0],
        "shift": 0,
        "offset": 0,
        "exclude_self": False,
        "normalize": False,
        "needs_grad": [True, True, True],
    } | changes
    return tuple(arguments.values())


IDS = torch.arange(12) % 4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"needs_grad": [False, True, False]},
        {"needs_grad": [False, False, False]},
        {"y": None, "needs_grad": [True, False, True], "shift": 6, "exclude_self": True, "normalize": True},
        {"x_ids": IDS, "y_ids": IDS[:9]},
        {"params": torch.tensor([2.0, 2.0, 0.0, 0.1, 0.1, 0.0]), "constants": []},
        {"x": torch.randn(12, 5, dtype=torch.bfloat16), "y": torch.randn(9, 5, dtype=torch.bfloat16)},
        {"x": torch.randn(5, 12).T},
    ],
)
def test_opcheck(changes):
    torch.library.opcheck(torch.ops.mio_ext.pairwise_bce.default, op_arguments(**changes))


def test_the_op_has_a_gradient_of_its_own():
    """Whatever calls it, without our Python: what requires a gradient gets one, however the call asks."""
    torch.library.opcheck(
        torch.ops.mio_ext.pairwise_bce.default,
        op_arguments(x=torch.randn(12, 5, requires_grad=True), needs_grad=[False] * 3),
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
    )
    numbers = torch.tensor([2.0, 2.0, 0.0, 0.1, 0.1, 0.0])
    made = torch.ops.mio_ext.pairwise_bce(*op_arguments(params=numbers, constants=[]))
    x, y, *_ = op_arguments()
    inputs = [t.requires_grad_() for t in (x, y, numbers)]
    changes = {"x": x, "y": y, "params": numbers, "constants": [], "needs_grad": [False] * 3}
    loss, stats, *outputs = torch.ops.mio_ext.pairwise_bce(*op_arguments(**changes))
    assert not stats.requires_grad
    for gradient, expected in zip(torch.autograd.grad(loss, inputs, retain_graph=True), made[2:], strict=True):
        assert torch.equal(gradient, expected)
    for output in outputs:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(output.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("needs", [[True, False, False], [False, True, False], [False, False, True], [False] * 3])
def test_only_what_is_needed_is_computed(needs):
    loss, stats, *grads = torch.ops.mio_ext.pairwise_bce(*op_arguments())
    partial_loss, partial_stats, *partial = torch.ops.mio_ext.pairwise_bce(*op_arguments(needs_grad=needs))
    assert torch.equal(loss, partial_loss) and torch.equal(stats, partial_stats)
    for need, full, part in zip(needs, grads, partial, strict=True):
        assert torch.equal(part, full) if need else part.numel() == 0


# What the op refuses, as changes of op_arguments(), and what it says.
BAD_ARGUMENTS = [
    ({"x": torch.randn(3)}, r"x must be \[M, D\]"),
    ({"x": torch.randn(0, 5)}, r"x must be \[M, D\]"),
    ({"x": torch.ones(12, 5).int()}, r"x must be float32"),
    ({"y": torch.randn(9, 4)}, r"y must be \[K, 5\]"),
    ({"y": torch.randn(9, 5).double()}, r"y must be Float like x"),
    ({"x_ids": IDS}, r"y_ids must be given with x_ids"),
    ({"x_ids": IDS[:3], "y_ids": IDS[:9]}, r"x_ids must be \[12\]"),
    ({"x_ids": IDS, "y_ids": IDS[:9].int()}, r"y_ids must be int64"),
    ({"constants": [1.0]}, r"give six constants"),
    ({"params": torch.ones(6)}, r"give six constants"),
    ({"params": torch.ones(6).double(), "constants": []}, r"params must be \[6\], Float"),
    ({"shift": 12}, r"shift must be in \[0, 12\)"),
    ({"offset": -1}, r"offset must be at least 0"),
    ({"y": None, "needs_grad": [True] * 3}, r"no gradient for y = None"),
    ({"y": None, "needs_grad": [True, False, False], "shift": 1}, r"must be mutual"),
    ({"constants": [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]}, r"linear weight needs normalize"),
]


@pytest.mark.parametrize("changes, message", BAD_ARGUMENTS)
def test_the_op_checks_its_arguments(changes, message):
    with pytest.raises((ValueError, TypeError), match="pairwise_bce: .*" + message):
        torch.ops.mio_ext.pairwise_bce(*op_arguments(**changes))


def other_instruction_sets():
    return library.diagnostics.cpu_instruction_sets()[1:] if library.diagnostics else []


@pytest.mark.parametrize("isa", other_instruction_sets())
def test_other_instruction_sets(isa):
    """The best one is what every other test runs on."""
    select = "test_dtypes or test_16 or test_bfloat16 or test_rows or test_ids or test_extreme or test_many"
    result = run_python("-m", "pytest", "-q", "-x", __file__, "-k", select, env={"MIO_CPU_ISA": isa})
    assert result.returncode == 0, result.stdout[-3000:]
    report = run_python("-m", "mio_ext", env={"MIO_CPU_ISA": isa})
    assert f"CPU kernel: {isa} of" in report.stdout


def test_unknown_instruction_set():
    script = "import torch, mio_ext; mio_ext.mio_loss(torch.randn(4, 3), torch.randn(4, 3))"
    result = run_python("-c", script, env={"MIO_CPU_ISA": "vax"})
    assert 'MIO_CPU_ISA: this machine cannot run "vax"' in result.stderr


def test_softplus_far_below_zero(backend):
    """Every term is e^-40: what a plain sum of max(t, 0) + log(1 + e) would call nothing."""
    x, y = features(40, 30, 8, torch.float32)
    x, y = x.to(backend[1]), y.to(backend[1])
    kwargs = {"bias": -40.0, "offset": 30, "weights": (1.0, 1.0, 0.0)}
    loss, grads, _ = run(backend[0], x, y, **kwargs)
    exact, exact_grads, _ = run("reference", x, y, torch.float64, **kwargs)
    assert relative_error(loss, exact) < 1e-5
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert relative_error(grad, exact_grad) < 1e-5


def test_same_bits_for_any_number_of_threads():
    x, y = features(1300, 1000, 24, torch.float32)
    threads = torch.get_num_threads()

    def run_with(count):
        torch.set_num_threads(count)
        loss, grads, stats = run("cpu", x, y, scale=(5.0, 5.0), bias=-1.0)
        return loss, *grads, stats

    try:
        runs = [run_with(count) for count in (1, 2, 7, 7, 7)]
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("linear", [0.3, torch.tensor(0.3)])
def test_linear_weight_needs_normalised_rows(linear, backend):
    x, y = features(4, 4, 3, torch.float32)
    with pytest.raises(ValueError, match="linear weight needs normalize=True"):
        ops.pairwise_bce(x, y, weights=(1.0, 1.0, linear), backend=backend[0])


def test_reference_is_the_definition():
    """The general reference against a double loop over pairs."""
    x, y = (t.double() for t in features(5, 6, 3, torch.float64))
    loss, stats = reference.pairwise_bce(
        x, y, scale=(3.0, 2.0), bias=-0.5, weights=(0.5, 0.1, 0.7), shift=2, offset=1, exclude_self=True
    )
    total, positives = 0.0, 0
    for i in range(5):
        for j in range(6):
            if j == 1 + i:
                continue
            s = float(x[i] @ y[j])
            if j == 1 + (i + 2) % 5:
                positives += 1
                total += 0.5 * torch.tensor(-(3 * s - 0.5)).exp().log1p().item()
                total += 0.7 / 2 * float((x[i] - y[j]).square().sum())
            else:
                total += 0.1 * torch.tensor(2 * s - 0.5).exp().log1p().item()
    assert positives == 5 == stats.positives
    assert abs(float(loss) - total) < 1e-6
