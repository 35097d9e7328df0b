# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own logic: contenders, floor, budgets, errors. No times; what they write: test_benchmark_data.py."""

import math

import pytest
import torch
from conftest import relative_error

from benchmarks import accuracy, loss
from benchmarks import step as step_benchmark
from benchmarks.harness import contenders, floor, machine, plan

CASE = plan.Case("mio", 4096, 128)
LIMITS = plan.Limits(seconds=1, step=8, memory=8e9)


# --- contenders


@pytest.mark.parametrize("name", ["mio", "siglip"])
def test_contenders_compute_the_same_loss(name, monkeypatch):
    """All but torch.compile, which is one of them compiled, and the NT-Xent, which is another loss."""
    monkeypatch.setattr(contenders, "CHUNK", 16)  # several blocks, the last one short
    functions, skipped = contenders.contenders(name, "cpu")
    x, y = (t.requires_grad_() for t in contenders.features(name, 40, 12, torch.float64, "cpu"))
    exact = contenders.step(contenders.own(name, "reference"), (x, y), 3.0, gradient=True)
    gradients = [x.grad, y.grad]
    assert {"mio_ext cpu", "eager", "torch.compile", "checkpointed chunks", "paper"} <= set(functions)
    assert all(reason for reason in skipped.values())
    for other in set(functions) - {"torch.compile", contenders.NT_XENT}:
        value = contenders.step(functions[other], (x, y), 3.0, gradient=True)
        room = 1e-6 if other == "open_clip" else 1e-9  # its scale and bias are float32
        assert relative_error(value, exact) < room, other
        assert max(map(relative_error, (x.grad, y.grad), gradients)) < room, other


def test_a_wrong_contender_is_not_timed(monkeypatch):
    functions = {"eager": lambda x, y, scale: 1.02 * contenders.mio_eager(x, y, scale)}
    monkeypatch.setattr(loss, "contenders", lambda *_: (functions, {}))
    found = loss.guarded_probe("eager", plan.Case("mio", 64, 8), "cpu")
    assert found["status"] == "wrong" and found["loss_error"] == pytest.approx(0.02, rel=1e-3)
    assert "seconds" not in found


def test_a_failing_contender_is_written_down(monkeypatch):
    def broken(*_):
        raise ValueError("no\nsuch thing")

    monkeypatch.setattr(loss, "contenders", lambda *_: ({"eager": broken}, {}))
    found = loss.guarded_probe("eager", plan.Case("mio", 64, 8), "cpu")
    assert found == {"status": "failed", "reason": "ValueError: no such thing"}


@pytest.mark.parametrize("largest", [1e-4, 3.0])
def test_float16_is_judged_with_the_loss_scale_that_fits(largest):
    """Gradients of 1e-9 flush to zero unscaled; those that overflow at 2^16 are halved until they do not."""
    case = plan.Case("mio", 8, 4, "float16")
    x, y = (t.requires_grad_() for t in contenders.features("mio", 8, 4, torch.float16, "cpu"))
    weights = torch.linspace(largest / 1e5, largest, 16, dtype=torch.float64).view(4, 4)

    def function(a, b, scale):
        return ((a.double() + b.double()) * weights).sum()

    def run(loss_scale):
        return (x, y), contenders.step(function, (x, y), 1.0, True, loss_scale)

    loss_scale, leaves, value = loss.scaled(case, run)
    assert loss_scale == (2.0**16 if largest < 1 else 2.0**14)
    wide = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    true = contenders.step(function, wide, 1.0, True)
    found = loss.distance(value, leaves, true, wide, loss_scale)
    assert found["gradient_error"] < 1e-3 and found["loss_error"] < 1e-6
    for other in (case._replace(dtype="bfloat16"), case._replace(direction="forward")):
        assert loss.scaled(other, run)[0] == 1


def test_float16_of_many_rows_is_right_with_a_loss_scale():
    """The case the unscaled gradient of which is lost: N²·softplus' is below float16's smallest number."""
    case = plan.Case("mio", 2048, 16, "float16")
    found = loss.guarded_probe("mio_ext cpu", case, "cpu")
    assert found["status"] == "ok" and found["loss_scale"] == 2.0**16 and found["gradient_error"] < 2e-3
    leaves = loss.leaves_of(case, "cpu")
    value = contenders.step(contenders.own("mio", "cpu"), leaves, contenders.SCALE["mio"], True)
    assert loss.check_all_rows(value, leaves, case, "cpu", 1.0)["gradient_error"] > 2 * found["gradient_error"]


@pytest.mark.parametrize("name", ["mio", "siglip"])
def test_on_a_gpu_all_rows_are_judged_by_plain_pytorch(name, monkeypatch):
    """A backend that is wrong on all rows, but not on the first few, is not its own judge."""
    case = plan.Case(name, 40, 8)
    leaves = loss.leaves_of(case, "cpu")
    value = contenders.step(contenders.own(name, "reference"), leaves, contenders.SCALE[name], True)
    monkeypatch.setattr(loss, "own", lambda *_: pytest.fail("asked our own backend"))
    found = loss.check_all_rows(value, leaves, case, "cuda", 1.0)
    assert max(found.values()) < 1e-5
    assert loss.check_all_rows(1.1 * value, leaves, case, "cuda", 1.0)["loss_error"] == pytest.approx(0.1, rel=1e-3)


# --- floor


@pytest.mark.parametrize(
    "loss_name, gradient, device, units, special",
    [("mio", True, "cpu", 1.5, 0.5), ("mio", True, "cuda", 2, 1.5), ("mio", False, "cpu", 0.5, 0.5),
     ("mio", False, "cuda", 0.5, 0.5), ("siglip", True, "cpu", 3, 1), ("siglip", True, "cuda", 3, 1.5),
     ("siglip", False, "cuda", 1, 1)],
)  # fmt: skip
def test_work_is_that_of_the_cost_model(loss_name, gradient, device, units, special):
    rows, dim = 1000, 64
    asked = floor.work(loss_name, rows, dim, 2, gradient, device)
    assert asked.operations == units * 2 * rows**2 * dim
    assert asked.special == special * rows**2
    assert asked.bytes == (1 if loss_name == "mio" else 2) * (2 if gradient else 1) * rows * dim * 2


def test_floor_is_the_scarcest():
    rates = floor.Rates(matrix=100.0, library=50.0, multiply_add=100.0, special=10.0, bandwidth=20.0)
    assert floor.floor(floor.Work(1000, 10, 10), rates) == (10.0, "matrix")
    assert floor.floor(floor.Work(100, 100, 10), rates) == (10.0, "special functions")
    assert floor.floor(floor.Work(100, 10, 200), rates) == (10.0, "bandwidth")


def test_measured_rates_are_of_this_world(monkeypatch):
    monkeypatch.setattr(floor, "CPU_LIBRARY_SIZE", 128)
    monkeypatch.setattr(floor, "CPU_COPY_BYTES", 2**20)
    rates = floor.cpu_rates(torch.float32)
    assert rates.matrix == max(rates.library, rates.multiply_add or 0)
    for rate in (rates.library, rates.multiply_add, rates.special, rates.bandwidth):
        assert rate is None or 1e6 < rate < 1e15


def test_quantiles_stay_within_what_was_measured():
    rates = floor.Rates(matrix=1e12, library=1e12, multiply_add=None, special=1e9, bandwidth=1e10)
    found = {"status": "ok", "seconds": 9.0, "peak_bytes": 1, "loss_error": 0.0}
    few = loss.report_row(CASE, "eager", found, [1.0, 5.0, 2.0], rates, "cpu")
    assert 1000 <= few["p20_ms"] <= few["median_ms"] == 2000 <= few["p80_ms"] <= 5000 and few["steps"] == 3
    bound = floor.floor(floor.work("mio", CASE.rows, CASE.dim, 4, True, "cpu"), rates).seconds
    assert few["share"] == pytest.approx(bound / 2.0, rel=1e-4)
    one = loss.report_row(CASE, "eager", found, None, rates, "cpu")  # too long for more than the first
    assert one["p20_ms"] == one["median_ms"] == one["p80_ms"] == 9000 and one["steps"] == 1


# --- budget


def test_history_foretells_larger_steps():
    history = plan.History()
    assert history.expected("eager", CASE) is None
    history.add("eager", CASE._replace(rows=1024), 0.1, 1e8)
    history.add("eager", CASE._replace(rows=2048), 0.5, 5e8)
    seconds, memory = history.expected("eager", CASE)  # from the nearer one
    assert seconds == pytest.approx(2.0) and memory == pytest.approx(2e9)
    assert history.expected("eager", CASE._replace(dim=256))[0] == pytest.approx(4.0)
    assert history.expected("eager", CASE._replace(direction="forward")) is None
    assert history.expected("eager", CASE._replace(rows=256))[1] == pytest.approx(1e8)  # never less than was seen


def test_slow_and_large_peers_are_refused_unheard():
    history = plan.History()
    for name in ("eager", "mio_ext cpu"):
        history.add(name, CASE._replace(rows=8192), 2.0, 6e9)

    def status(name, rows, left=1e9):
        refused = history.refusal(name, CASE._replace(rows=rows), LIMITS, left)
        return refused and refused["status"]

    assert status("eager", 8192) is None
    assert status("eager", 10_000) == "out of memory"
    assert status("eager", 32_768) == "over budget"
    assert status("mio_ext cpu", 32_768) is None  # 32 s, and memory is not held against ours
    assert status("mio_ext cpu", 32_768, left=30) == "over budget"
    assert status("torch.compile", 1 << 18) is None  # nothing known: it is tried, under limits


def test_the_papers_form_is_refused_by_its_size_alone():
    assert plan.History().refusal("paper", CASE, LIMITS, 1e9)["status"] == "out of memory"
    assert plan.History().refusal("paper", CASE._replace(rows=512), LIMITS, 1e9) is None
    assert plan.History().refusal("paper", CASE._replace(loss="siglip"), LIMITS, 1e9) is None


def test_probe_in_a_child_keeps_to_its_limits():
    case = plan.Case("mio", 512, 64)  # one tensor of the paper's form: 67 MB
    fine = loss.isolated_probe("mio_ext cpu", case, LIMITS, 100)
    assert fine["status"] == "ok" and fine["seconds"] > 0 and fine["loss_error"] < 1e-5
    large = loss.isolated_probe("paper", case, LIMITS._replace(memory=5e7, step=60), 100)
    assert large["status"] == "out of memory"
    slow = loss.isolated_probe("paper", case, LIMITS._replace(step=-5), 100)
    assert slow["status"] == "over budget"


def test_peak_memory_sees_what_was_there_for_a_moment():
    with machine.PeakMemory("cpu") as peak:
        torch.ones(25_000_000)
    assert 0.99e8 < peak.bytes < 1.2e8


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_the_whole_grid_the_usual_first(device):
    cases = plan.all_cases(device)
    assert len(cases) == len(set(cases)) == 2 * 9 * 6 * 3 * 2
    first = cases[:4]
    assert {c.loss for c in first} == {"mio", "siglip"} and all(c.gradient for c in first)
    if device == "cpu":  # the cheapest first; a GPU's time is short, and the ends of the range say most
        assert all(c.rows <= 1024 for c in first)
    else:
        assert {c.rows for c in first if c.loss == "mio"} == {256, 8192, 65_536}
    assert all(plan.parse_case(str(c)) == c for c in cases)


@pytest.mark.parametrize("text", ["mio:256", "clip:256:64", "mio:255:64", "mio:256:64:int8", "mio:256:64:float32:x"])
def test_case_that_is_none(text):
    with pytest.raises(ValueError):
        plan.parse_case(text)


# --- step and accuracy


def test_a_step_with_the_loss_timed_apart_is_the_whole_step():
    """The network gets the gradient that one backward through everything gives it."""
    case = step_benchmark.Case("resnet18", 8, 4)
    apart, whole = (step_benchmark.Trainer(case, "cpu") for _ in range(2))
    whole.images = apart.images
    ours = contenders.own("mio", "cpu")
    rest, times = apart.step({"eager": contenders.mio_eager, "mio_ext cpu": ours})
    assert rest > 0 and list(times) == ["eager", "mio_ext cpu"] and min(times.values()) > 0
    views = whole.preprocess.views(whole.images.repeat(2, 1, 1, 1), whole.generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=whole.bfloat16):
        z = whole.model(views)
    ours(*z.float().chunk(2), contenders.SCALE["mio"]).backward()
    whole.optimizer.step()
    for a, b in zip(apart.model.parameters(), whole.model.parameters(), strict=True):
        found, expected = (t.optimizer.state[p]["momentum_buffer"] for t, p in ((apart, a), (whole, b)))
        assert relative_error(found, expected) < 1e-6


def test_step_leaves_out_what_cannot_be_and_says_why():
    case = step_benchmark.Case("resnet18", 8, 256)  # six tensors of 512 × 512 × 128 floats: 805 MB
    shown, left_out = step_benchmark.losses_for(case, "cpu", memory=8e8, compile_too=False)
    assert list(shown) == ["eager", "mio_ext cpu"]
    assert left_out["paper"] == "out of memory: about 0.8 GB of 0.8 GB"
    assert set(left_out) == {"paper", "torch.compile"}
    assert "paper" in step_benchmark.losses_for(case, "cpu", memory=9e8, compile_too=False)[0]


def test_accuracy_tells_rounding_from_failure(monkeypatch):
    functions = {"eager": contenders.mio_eager, "broken": lambda x, y, scale: ((x + y) * math.inf).sum()}
    monkeypatch.setattr(accuracy, "contenders", lambda *_: (functions, {}))
    rows = accuracy.measure("mio", "float32", 32, 8, "cpu")
    assert len(rows) == 3 * len(accuracy.SCALES["mio"])
    for r in rows:
        if r["contender"] == "broken":
            assert r["status"] == "not finite"
        else:
            assert r["loss_error"] < 1e-5 and r["gradient_error"] < 1e-3
    rows = accuracy.measure("mio", "float64", 32, 8, "cpu")
    assert {r["contender"] for r in rows} == {"mio_ext cpu"}
    assert max(r["gradient_error"] for r in rows) < 1e-11
