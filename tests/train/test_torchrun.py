# SPDX-License-Identifier: Apache-2.0
"""Pre-training in several processes: the run of one process with the same batch, and how it ends."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, relative_error
from process_pool import WORLD

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

from train import pretrain, scoring, trainer
from train.device import choose_device
from train.errors import Interrupted, UserError
from train.processes import Processes
from train.sync_batch_norm import SyncBatchNorm, synchronize_batch_norm

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--device", "cpu", "--batch-size", "16", "--precision", "float32", "--projector", "32", "16"]
SMALL += ["--learning-rate", "0.1", "--warmup-epochs", "0", "--log-every", "1", "--no-evaluate"]


def read_log(folder: Path, event: str = "train") -> list[dict]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["event"] == event]


def processes_of_the_pool() -> Processes:
    return Processes(dist.get_rank(), WORLD, dist.get_rank(), dist.HashStore())


@contextlib.contextmanager
def in_float64():
    """Runs in float64. In float32 a ReLU that rounding switches changes single gradients by a percent, in one
    process as in several; here whatever is not rounding stands out."""
    build = pretrain.assemble

    def assemble(*arguments, **options):
        setup = build(*arguments, **options)
        setup.model.double()
        setup.objective.double()
        normalize = setup.preprocess.normalize
        setup.preprocess.normalize = lambda images: normalize(images).double()
        return setup

    pretrain.assemble = assemble
    try:
        yield
    finally:
        pretrain.assemble = build


def train_on_a_rank(arguments, signalled_rank=None, precise=True):
    """What the run of this process says, and how it ended; a signal may arrive within step 2."""
    processes, spoken = processes_of_the_pool(), io.StringIO()
    backward = trainer.Trainer.backward

    def signalled(self, images, step):
        if step == 1 and processes.rank == signalled_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, images, step)

    trainer.Trainer.backward = signalled
    scoring.evaluate_features = lambda features, budgets: FIXED_ROW  # probes take long, and are tested elsewhere
    scoring.save_plots = lambda *arguments: None
    try:
        with contextlib.redirect_stdout(spoken), in_float64() if precise else contextlib.nullcontext():
            pretrain.main(arguments, processes)
        return spoken.getvalue(), "done"
    except (UserError, Interrupted) as error:
        return spoken.getvalue(), error.args
    finally:
        trainer.Trainer.backward = backward


FIXED_ROW = {"linear_2": 1.0, "linear_2_std": 0.1, "linear_10": 2.0, "linear_10_std": 0.2}
FIXED_ROW |= {"linear_all": 3.0, "knn": 4.0}


def train_alone(*arguments) -> None:
    with in_float64():
        pretrain.main(list(map(str, arguments)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    parts = {part: checkpoint[part] for part in ("backbone", "projector", "objective")}
    return {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}


def assert_same_training(folder: Path, expected: Path) -> None:
    """Weights, statistics of batch norm and log agree to float64's rounding."""
    ours, theirs = weights(folder), weights(expected)
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-9 * max(1, float(value.abs().max())))
    for entry, other in zip(read_log(folder), read_log(expected), strict=True):
        for name in other.keys() - {"event", "images_per_second"}:
            precision = 1e-5 if name in ("spread", "rankme") else 1e-9  # those are computed in float32
            assert entry[name] == pytest.approx(other[name], rel=precision, abs=precision), name


KINDS = [
    ["--objective", "mio"],
    ["--objective", "mio", "--forward", "separate", "--learn-scale"],
    ["--objective", "simclr"],
    ["--objective", "siglip", "--learn-scale", "--temperature", "0.1", "--bias", "-5"],
]


@pytest.mark.parametrize("options", KINDS, ids=lambda o: " ".join(o[1:4]))
def test_four_processes_train_as_one(options, pool, tmp_path, capsys):
    """Same images, same views, same batch norm, same loss, same weights after three steps."""
    common = [*SMALL, *options, "--limit-steps", "3"]
    train_alone(*common, "--output", tmp_path / "alone")
    results = pool.run(train_on_a_rank, [*common, "--output", str(tmp_path / "several")])
    assert [ended for _, ended in results] == ["done"] * WORLD
    assert_same_training(tmp_path / "several", tmp_path / "alone")


def test_all_processes_stop_after_the_same_step_and_go_on(pool, tmp_path, capsys):
    """A signal to one of them stops all; resumed it is the run that never stopped.

    Not to the bit: DDP groups the gradients anew after its first step, and sums over four have an order.
    """
    whole, parts, alone = tmp_path / "whole", tmp_path / "parts", tmp_path / "alone"
    common = [*SMALL, "--limit-steps", "4", "--log-every", "2"]
    results = pool.run(train_on_a_rank, [*common, "--output", str(parts)], 2)
    for _, ended in results:
        assert ended == (signal.SIGTERM, f"checkpoint of step 2 saved in {parts}; --resume {parts} goes on")
    assert torch.load(parts / "checkpoint.pt", weights_only=True)["step"] == 2
    pool.run(train_on_a_rank, ["--resume", str(parts)])
    pool.run(train_on_a_rank, [*common, "--output", str(whole)])
    assert_same_training(parts, whole)
    (resumed,) = read_log(parts, "resume")
    assert resumed["versions"]["processes"] == WORLD

    # Another number of processes may go on: only the order of sums is another.
    pool.run(train_on_a_rank, [*common, "--limit-steps", "2", "--output", str(alone)])
    train_alone("--resume", alone, "--limit-steps", "4")
    assert_same_training(alone, whole)


def test_one_process_speaks_and_writes(pool, tmp_path):
    """k-NN and evaluation included; the others wait, then leave."""
    arguments = [*SMALL, "--subset", "0.02", "--epochs", "1", "--knn-every", "1", "--evaluate"]
    results = pool.run(train_on_a_rank, [*arguments, "--output", str(tmp_path / "run")], None, False)
    (spoken, ended), *others = results
    assert ended == "done"
    assert f"29 training images on cpu in each of {WORLD} processes" in spoken
    assert "pre-trained encoder" in spoken and "trained in" in spoken
    assert all("trained in" not in other for other, _ in others)
    (knn,) = read_log(tmp_path / "run", "knn")
    assert 0 <= knn["accuracy"] <= 100
    assert all(ended == "done" for _, ended in others)
    assert len(read_log(tmp_path / "run")) == len(read_log(tmp_path / "run", "results")) == 1


def test_a_batch_that_does_not_divide_is_refused(pool, tmp_path):
    arguments = [*SMALL, "--batch-size", "18", "--output", str(tmp_path / "run")]
    for _, ended in pool.run(train_on_a_rank, arguments):
        assert re.search("--batch-size 18 is that of all processes .* a multiple of their number, 4", ended[0])
    assert not (tmp_path / "run").exists()


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"--device cuda:0: 2 processes need a GPU each; pass --device cuda"):
        choose_device("cuda:0", Processes(1, 2, 1))
    with pytest.raises(UserError, match=r"--device cuda: torch sees 1 CUDA device\(s\), and process 1 needs one of"):
        choose_device("cuda", Processes(1, 2, 1))


# ------------------------------------------------------------------------------------------ batch norm


def batch_norm_on_a_rank(shape, dtype, training, compiled=False):
    """Output, gradients and buffers of this process's share of a batch."""
    norm, x, grad = batch_norm_case(shape, dtype, training)
    synchronize_batch_norm(norm, torch.device("cpu"))
    assert type(norm[0]) is SyncBatchNorm
    x, grad = (t.chunk(WORLD)[dist.get_rank()].clone() for t in (x.detach(), grad))
    forward = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
    y = forward(x.requires_grad_())
    grads = torch.autograd.grad(y, [x, norm[0].weight, norm[0].bias], grad)
    return [t.detach().clone() for t in (y, *grads)], dict(norm.state_dict())


def batch_norm_case(shape, dtype, training):
    generator = torch.Generator().manual_seed(0)
    kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
    norm = torch.nn.Sequential(kind(shape[1])).train(training)
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2, generator=generator)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    x = (
        (30 + 2 * x)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.preserve_format)
    )
    return norm, x.requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize("shape", [(8, 5, 3, 4), (12, 7)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("training", [True, False])
def test_synchronised_batch_norm(shape, dtype, limit, training, pool):
    results = pool.run(batch_norm_on_a_rank, shape, dtype, training)
    norm, x, grad = batch_norm_case(shape, dtype, training)
    exact = x.detach().float().requires_grad_()
    y = norm(exact)
    grads = torch.autograd.grad(y, [exact, norm[0].weight, norm[0].bias], grad.float())
    for i, expected in enumerate([y, grads[0]]):
        assert relative_error(torch.cat([tensors[i] for tensors, _ in results]), expected) < limit
    for i in (2, 3):  # DDP averages these
        total = torch.stack([tensors[i] for tensors, _ in results]).sum(0)
        assert relative_error(total, grads[i - 1]) < limit
    for _, state in results:
        assert list(state) == list(norm.state_dict())
        for key, value in norm.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 5, 3, 4), (12, 7)])
def test_synchronised_batch_norm_leaves_a_graph_whole(shape, pool):
    """Compiled it is one graph, collectives included, and gives what it gives eagerly.

    A whole run takes a minute or two to compile, so it is left to a person: the loss of step 1 is the same to 1e-6 by
    torchrun --nproc-per-node 2 train/pretrain.py --device cpu --precision float32 --batch-size 16 --projector 32 16
    --limit-steps 3 --log-every 1 --no-evaluate --compile on, and with --compile off.
    """
    results = pool.run(batch_norm_on_a_rank, shape, torch.float32, True, True)
    for compiled, eager in zip(results, pool.run(batch_norm_on_a_rank, shape, torch.float32, True), strict=True):
        torch.testing.assert_close(compiled, eager)


# --------------------------------------------------------------------------------------------- torchrun


def torchrun(*arguments, script=ROOT / "train" / "pretrain.py", **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*command, str(script), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT, **options
    )


def said_by_us(stderr: str) -> list[str]:
    """The lines that are not torchrun's own."""
    return [line for line in stderr.splitlines() if line.startswith("pretrain.py:")]


def test_torchrun_stops_at_a_signal_and_resumes(tmp_path, capsys):
    run, alone = tmp_path / "run", tmp_path / "alone"
    process = torchrun(*SMALL, "--output", run)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    _, stderr = process.communicate(timeout=120)
    (line,) = said_by_us(stderr)
    step = int(re.fullmatch(r"pretrain.py: interrupted: checkpoint of step (\d+) saved in .*", line)[1])
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] == step >= 1

    process = torchrun("--resume", run, "--limit-steps", step + 2)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stdout.count(f"going on after step {step}") == 1
    assert stdout.count("trained in") == 1
    assert "Warning" not in stderr
    assert [entry["step"] for entry in read_log(run)] == list(range(1, step + 3))
    assert pretrain.run([*SMALL, "--limit-steps", str(step + 2), "--output", str(alone)]) == 0
    ours, theirs = ([entry["loss"] for entry in read_log(folder)] for folder in (run, alone))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)  # float32 drifts apart from here on: see in_float64


FAILING = """
import os, runpy, sys
sys.path.insert(0, {root!r})
sys.argv[0] = {script!r}
from train import assemble
build = assemble.build_model
def fail(*arguments):
    if os.environ["RANK"] == "1":
        raise {error}
    return build(*arguments)
assemble.build_model = fail
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("MemoryError('cannot allocate memory')", "pretrain.py: out of memory: try --batch-size 8"),
        ("KeyError('a bug')", "KeyError: 'a bug'"),
    ],
)
def test_what_ends_one_process_ends_all_and_is_said_once(error, said, tmp_path):
    """The other process is waiting in a collective by then."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(root=str(ROOT), script=str(ROOT / "train" / "pretrain.py"), error=error))
    process = torchrun(*SMALL, "--output", tmp_path / "run", script=script)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert stderr.count(said) == 1
    assert "Connection" not in stderr
    assert "epoch" not in stdout
