# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  (the repository root goes on the path before the imports that need it)
"""The pre-training script: a short run end to end, repeatability, monitors, a user's mistakes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train" / "pretrain.py"
sys.path.insert(0, str(ROOT))
from mio_ext.reference import PairStats
from train import pretrain
from train.data import load_digits
from train.model import build_model, parameter_groups
from train.monitor import StepMetrics
from train.run_folder import UserError, write_atomically

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--batch-size", "16", "--device", "cpu", "--log-every", "2"]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def run_script(*arguments, prelude="pass", cwd=None) -> subprocess.CompletedProcess:
    """The script in a process of its own; ``prelude`` is Python that runs before it."""
    code = f"import runpy, sys; del sys.argv[0]; {prelude}; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=ONE_THREAD)


@pytest.fixture(autouse=True)
def one_thread():
    """As many runs as cores may be testing at once, and OpenMP threads that share a core spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fast_probes(monkeypatch):
    """The table and the plots are of no interest: skip the slow parts."""
    row = {
        "linear_2": 1.0,
        "linear_2_std": 0.1,
        "linear_10": 2.0,
        "linear_10_std": 0.2,
        "linear_all": 3.0,
        "knn": 4.0,
    }
    monkeypatch.setattr(pretrain, "evaluate", lambda features: row)
    monkeypatch.setattr("train.plots.plot_embedding", lambda *arguments: None)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """(folder, finished process) of five steps, in a folder of the script's own choice."""
    cwd = tmp_path_factory.mktemp("run")
    done = run_script(*SMALL, "--limit-steps", "5", "--seed", "3", cwd=cwd)
    assert done.returncode == 0, done.stderr
    (folder,) = (cwd / "runs").iterdir()
    return folder, done


def test_a_run_leaves_log_results_and_plots(short_run):
    folder, done = short_run
    start, *entries, results = read_log(folder)
    assert start["event"] == "start"
    assert shlex.split(start["command"])[2:] == [*SMALL, "--limit-steps", "5", "--seed", "3"]
    assert start["config"]["seed"] == 3
    assert start["config"]["temperature"] == 0.5
    assert start["versions"]["torch"] == torch.__version__
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    for entry in entries:  # eq. (6): the loss is its two pair terms plus the regulariser, (2 - 2 s+) / D
        regularizer = 2 * (1 - entry["positive_cosine"]) / 128
        assert entry["loss"] == pytest.approx(entry["positive_loss"] + entry["negative_loss"] + regularizer, abs=1e-5)
        assert entry["images_per_second"] > 0

    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert rows == results["rows"]
    assert list(rows) == ["raw pixels", "untrained encoder", "pre-trained encoder"]
    # Raw pixels do not depend on the run: what any correct probe and 5-NN give on this split.
    assert 70 < rows["raw pixels"]["linear_2"] < 80
    assert 95 < rows["raw pixels"]["linear_all"] < 98
    assert 97 < rows["raw pixels"]["knn"] < 99.5
    for name, row in rows.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert re.findall(r"\d+\.\d", line) == [f"{value:.1f}" for value in row.values()]
    for name in ("loss.png", "cosines.png", "embedding.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "images/s" in done.stdout  # plain lines, since this is no terminal
    assert not list(folder.glob("*.tmp"))


def test_the_checkpoint_loads_strictly_without_pickled_code(short_run):
    folder, _ = short_run
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 5
    assert checkpoint["config"] == read_log(folder)[0]["config"]
    torch.manual_seed(3)
    model = build_model(1, 512, 128)
    before = model.backbone.conv1.weight.clone()
    model.backbone.load_state_dict(checkpoint["backbone"], strict=True)
    model.projector.load_state_dict(checkpoint["projector"], strict=True)
    assert not torch.equal(model.backbone.conv1.weight, before)  # five steps from the same start
    torchvision_keys = set(torchvision.models.resnet18().state_dict())
    assert torchvision_keys - set(checkpoint["backbone"]) == {"fc.weight", "fc.bias"}


def test_same_seed_same_run_and_another_seed_another(tmp_path, fast_probes, capsys):
    def loss_and_weights(name: str, seed: int):
        folder = tmp_path / name
        arguments = [*SMALL, "--limit-steps", "4", "--seed", str(seed), "--output", str(folder)]
        assert pretrain.run(arguments) == 0
        losses = [entry["loss"] for entry in read_log(folder) if entry["event"] == "train"]
        return losses, torch.load(folder / "checkpoint.pt", weights_only=True)["backbone"]

    losses, weights = loss_and_weights("a", 0)
    same_losses, same_weights = loss_and_weights("b", 0)
    assert same_losses == losses
    assert all(torch.equal(same_weights[key], value) for key, value in weights.items())
    other_losses, _ = loss_and_weights("c", 1)
    assert other_losses != losses


def test_the_fused_loss_trains_like_the_reference(tmp_path, fast_probes, capsys):
    losses = {}
    for backend in ("cpu", "reference"):
        arguments = [*SMALL, "--limit-steps", "3", "--log-every", "1", "--precision", "float32"]
        assert pretrain.run([*arguments, "--loss-backend", backend, "--output", str(tmp_path / backend)]) == 0
        losses[backend] = [e["loss"] for e in read_log(tmp_path / backend) if e["event"] == "train"]
    assert losses["cpu"] == pytest.approx(losses["reference"], rel=1e-3)


MISTAKES = [
    (["--batch-size", "1"], "--batch-size must be at least 2, got 1"),
    (["--batch-size", "1438"], "--batch-size 1438 is more than the 1437 training images"),
    (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    (["--image-size", "4"], "--image-size must be at least 8, got 4"),
    (["--epochs", "ten"], "--epochs: invalid int value: 'ten'"),
    (["--limit-steps", "0"], "--limit-steps must be at least 1"),
    (["--temperature", "0"], "--temperature must be greater than 0, got 0.0"),
    (["--temperature", "nan"], "--temperature must be greater than 0, got nan"),
    (["--learning-rate", "-1"], "--learning-rate must be greater than 0"),
    (["--regularizer", "inf"], "--regularizer must be at least 0"),
    (["--loss-backend", "fast"], "--loss-backend: invalid choice: 'fast'"),
    (["--loss-backend", "cuda"], r"--loss-backend cuda: .*--loss-backend reference runs everywhere"),
    (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    (["--device", "meta"], "--device must be auto, cpu, cuda or cuda:N, got 'meta'"),
    (["--device", "cuda:99"], r"--device cuda:99: torch sees \d+ CUDA device\(s\); pass --device cpu"),
    (["--dataset", "x"], r"unrecognized arguments: --dataset x \(--help lists the options\)"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda value: None if isinstance(value, str) else " ".join(value)
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    if arguments == ["--loss-backend", "cuda"]:
        monkeypatch.setattr("mio_ext.ops.unavailable_reason", lambda backend: "not built")
    output = tmp_path / "run"
    assert pretrain.run(["--device", "cpu", "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.match("pretrain.py: .*" + message, error)
    assert error.count("\n") == 1
    assert not output.exists(), "a refused run must not leave a folder"


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path, fast_probes, capsys):
    (tmp_path / "log.jsonl").write_text("precious")
    (tmp_path / "results.json").write_text("stale")
    assert pretrain.run([*SMALL, "--output", str(tmp_path)]) == 2
    assert re.search(r"is not empty: .* --overwrite\n$", capsys.readouterr().err)
    assert (tmp_path / "log.jsonl").read_text() == "precious"
    assert pretrain.run([*SMALL, "--limit-steps", "1", "--output", str(tmp_path), "--overwrite"]) == 0
    assert read_log(tmp_path)[0]["event"] == "start"
    assert "stale" not in (tmp_path / "results.json").read_text()
    blocked = tmp_path / "log.jsonl" / "below-a-file"
    assert pretrain.run([*SMALL, "--output", str(blocked)]) == 2
    assert "cannot use the run folder" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("torchvision", "torchvision")])
def test_a_missing_package_is_named(module, package, tmp_path):
    done = run_script(prelude=f"sys.modules[{module!r}] = None", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"pretrain.py: {package} missing: pip install {package}\n"


def test_an_extension_that_is_not_built_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mio_ext.ops.extension", None)
    monkeypatch.setattr("mio_ext.ops._build_error", "no module named mio_ext._C", raising=False)
    assert pretrain.run(["--device", "cpu", "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert re.match(r"pretrain.py: --loss-backend auto: .*not built.*setup.py build_ext.*", error)
    assert error.count("\n") == 1


def test_without_matplotlib_everything_but_the_plots(tmp_path, fast_probes, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "train.plots", raising=False)
    monkeypatch.delattr("train.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert pretrain.run([*SMALL, "--limit-steps", "1", "--output", str(tmp_path)]) == 0
    assert re.search(r"^no plots: .*matplotlib.*pip install matplotlib", capsys.readouterr().err)
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "checkpoint.pt", "results.json"}


def test_a_loss_that_is_not_finite_names_the_step(tmp_path, monkeypatch, capsys):
    real, calls = pretrain.mio_ext.mio_loss, []

    def loss_of_step(z1, z2, **options):
        calls.append(1)
        return real(z1 * float("nan") if len(calls) == 5 else z1, z2, **options)

    monkeypatch.setattr(pretrain, "check_loss_backend", lambda *arguments: None)
    monkeypatch.setattr(pretrain.mio_ext, "mio_loss", loss_of_step)
    arguments = [*SMALL, "--limit-steps", "8", "--log-every", "4", "--output", str(tmp_path)]
    assert pretrain.run(arguments) == 2
    assert "the loss is not finite at step 5: try a lower --learning-rate" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint.pt").exists(), "broken weights must not be saved"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_suggests_a_smaller_batch(error, monkeypatch, capsys):
    def raise_it(argv):
        raise error

    monkeypatch.setattr(pretrain, "main", raise_it)
    assert pretrain.run([]) == 2
    assert capsys.readouterr().err == "pretrain.py: out of memory: try a smaller --batch-size\n"
    error.args = ("a bug",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="a bug"):
            pretrain.run([])


def test_ctrl_c_saves_the_checkpoint_and_exits_130(tmp_path):
    command = [sys.executable, "-u", str(SCRIPT), *SMALL, "--log-every", "1", "--output", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    for line in process.stdout:
        if line.startswith("epoch"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    step = int(re.fullmatch(r"pretrain.py: interrupted: checkpoint of step (\d+) saved in .*\n", error)[1])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step >= 1


def test_collapse_is_reported_in_words(capsys):
    """Embeddings that are all the same warn; embeddings on the whole sphere do not."""

    class Log(list):
        def write(self, event, **fields):
            self.append((event, fields))

    def events(z: torch.Tensor) -> list[str]:
        metrics, log = StepMetrics(), Log()
        loss, stats = pretrain.mio_ext.mio_loss(*z.chunk(2), backend="reference", return_stats=True)
        assert isinstance(stats, PairStats)
        metrics.add(loss, stats, z)
        with pretrain.Progress(100) as progress:
            progress.advance(50)
            pretrain.report(metrics, 1, 1, 0.1, progress, log)
        return [event for event, _ in log]

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 32, generator=generator)
    assert events(noise) == ["train"]
    assert "collapse" not in capsys.readouterr().err
    assert events(torch.ones(32) + 0.01 * noise) == ["train", "warning"]
    assert re.search(r"warning: collapse: all embeddings are nearly the same .*try", capsys.readouterr().err)


def test_metrics_of_a_known_batch():
    """Four orthogonal pairs of equal views: s+ = 1, s- = 0."""
    z = torch.eye(4).repeat(2, 1)
    loss, stats = pretrain.mio_ext.mio_loss(*z.chunk(2), regularizer=1.0, backend="reference", return_stats=True)
    metrics = StepMetrics()
    metrics.add(loss, stats, z)
    row = dict(zip(pretrain.METRICS, metrics.read()[0].tolist(), strict=True))
    softplus = torch.nn.functional.softplus
    positive, negative = softplus(torch.tensor(-2.0)).item(), softplus(torch.tensor(0.0)).item()
    expected = {"positive_loss": positive, "negative_loss": negative, "loss": positive + negative}
    expected |= {"positive_cosine": 1.0, "negative_cosine": 0.0, "spread": 2 * (8 * 3 / 16 / 7) ** 0.5}
    assert row == pytest.approx(expected, abs=1e-6)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [pretrain.learning_rate(step, 100, 10, 0.5) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] == pytest.approx(0.5 / 11)
    assert max(rates) == rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0.0)


def test_batches_cover_an_epoch_once_and_are_shuffled():
    batches = list(pretrain.random_batches(10, 3, 2, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [3] * 6
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert first.unique().numel() == second.unique().numel() == 9
    assert not torch.equal(first, second)


def test_weight_decay_spares_biases_and_batch_norm():
    model = build_model(1, 16, 8)
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    batch_norm = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    expected = {id(parameter) for module in batch_norm for parameter in module.parameters()}
    assert {id(parameter) for parameter in spared["params"]} == expected  # no layer here has a bias


def test_digits_are_split_once_and_for_all():
    data = load_digits()
    assert (len(data.train), len(data.test)) == (1437, 360)
    flat = [split.images.flatten(1) for split in (data.train, data.test)]
    assert data.train.images.max() == 255
    # Disjoint: an image of the test split is not in the train split.
    assert (torch.cdist(flat[1].float(), flat[0].float()).min() > 0).item()
    share = [split.labels.bincount() / len(split) for split in (data.train, data.test)]
    torch.testing.assert_close(share[0], share[1], rtol=0, atol=0.003)
    assert torch.equal(load_digits().test.images, data.test.images)


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


def test_arguments_out_of_range_raise_the_one_error_class():
    with pytest.raises(UserError, match="--hidden must be at least 1"):
        pretrain.parse_arguments(["--hidden", "0"])
