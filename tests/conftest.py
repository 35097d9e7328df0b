# SPDX-License-Identifier: Apache-2.0
"""The tolerance table and what all tests share. A new backend adds itself to FUSED_BACKENDS."""

import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from tests.process_pool import Pool

ROOT = Path(__file__).resolve().parents[1]

#: Backends held to the float64 reference, with the device they run on.
FUSED_BACKENDS = [("cpu", "cpu")]

#: dtype of the features -> (relative error of the loss, relative L2 error of the gradients), both against
#: the float64 reference on the same features. For 16 bits the second is the rounding of the gradient itself.
TOLERANCE = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (1e-6, 4e-3),
    torch.float16: (1e-6, 2e-3),
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where MIO_TEST_LINES names a file, a JSON line of every test as it ends: if one hangs, the others are known.

    After an error of CUDA's a process is of no use any more: a worker of pytest-xdist ends itself and is replaced.
    """
    report = yield
    path = os.environ.get("MIO_TEST_LINES")
    if path and (report.when == "call" or not report.passed):
        line = {"test": item.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if not report.passed:
            line["why"] = report.longreprtext[-2000:]
        with open(path, "a") as lines:
            lines.write(json.dumps(line) + "\n")
    if report.failed and "CUDA error" in report.longreprtext and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    return report


@pytest.fixture(params=FUSED_BACKENDS, ids=lambda p: p[0])
def backend(request: pytest.FixtureRequest) -> Any:
    """(backend, device) of every fused backend that can run here."""
    return request.param


@pytest.fixture(params=list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many runs as cores may be testing at once, and OpenMP threads that share a core spin. Until the file's end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fast_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table and the plots are of no interest: skip the slow parts."""
    row = {
        "linear_2": 1.0,
        "linear_2_std": 0.1,
        "linear_10": 2.0,
        "linear_10_std": 0.2,
        "linear_all": 3.0,
        "knn": 4.0,
    }
    monkeypatch.setattr("train.scoring.evaluate_features", lambda features, budgets: row)
    monkeypatch.setattr("train.plots.plot_embedding", lambda *arguments: None)


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Pool]":
    """Four processes that run what a test hands them."""
    from process_pool import WORLD, Pool  # type: ignore[import-not-found]  # pytest puts its folder on the path

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as torchrun: threads of several processes on a core only spin
        pool = Pool(WORLD, tmp_path_factory.mktemp("group") / "rendezvous")
    yield pool
    pool.close()


class GradientsAskedFor(TorchDispatchMode):
    """Within it, ``seen`` gets the needs_grad that every implementation of the op is called with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("mio_ext::pairwise_bce"):
            self.seen.append(args[10])
        return func(*args, **(kwargs or {}))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance, in float64; gradients are judged as vectors."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_no_worse_than(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, limit: float) -> None:
    """``actual`` is within ``limit`` of ``exact`` and no more than twice as far from it as ``plain`` is.

    On a handful of numbers plain PyTorch may land on the exact value by luck: four roundings are granted.
    """
    error = relative_error(actual, exact)
    assert error <= limit, f"{error:.2e} > {limit:.0e}"
    allowed = max(2 * relative_error(plain, exact), 4 * torch.finfo(torch.float32).eps)
    assert error <= allowed, f"{error:.2e}, plain PyTorch {allowed / 2:.2e}"


def views(
    batch: int, dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu", noise: float = 0.5, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Two correlated views that require grad, the same values for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    other = base + noise * torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    return tuple(z.to(device, dtype).requires_grad_() for z in (base, other))


def run_python(*args: str, env: dict[str, str] | None = None, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository root."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )
