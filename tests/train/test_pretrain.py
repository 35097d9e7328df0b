# SPDX-License-Identifier: Apache-2.0
"""The pre-training script: a short run end to end, repeatability, monitors, a user's mistakes."""

import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from conftest import ROOT

pytest.importorskip("torchvision")
import torchvision

pytest.importorskip("safetensors.torch")
import safetensors.torch as safetensors

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import mio_ext
from mio_ext import distributed, library
from mio_ext.encoder import build_backbone, load_encoder
from mio_ext.reference import PairStats
from train import plots, pretrain
from train.errors import UserError
from train.model import build_model
from train.monitor import METRICS, Progress, StepMetrics, report, spread
from train.run_folder import TENSORBOARD

SCRIPT = ROOT / "train" / "pretrain.py"

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--batch-size", "16", "--device", "cpu", "--log-every", "2"]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def run_script(*arguments, prelude="pass", cwd=None) -> subprocess.CompletedProcess:
    """The script in a process of its own; ``prelude`` is Python that runs before it."""
    code = f"import runpy, sys; del sys.argv[0]; {prelude}; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=ONE_THREAD)


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
    table = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(int(row["step"]), float(row["loss"])) for row in table] == [(e["step"], e["loss"]) for e in entries]
    for entry in entries:  # eq. (6): the loss is its two pair terms plus the regulariser, (2 - 2 s+) / D
        regularizer = 2 * (1 - entry["positive_cosine"]) / 128
        assert entry["loss"] == pytest.approx(entry["positive_loss"] + entry["negative_loss"] + regularizer, abs=1e-5)
        assert entry["images_per_second"] > 0
        bound = math.log(2) - (entry["positive_loss"] + entry["negative_loss"]) / 2
        assert entry["js_estimate"] == pytest.approx(bound, abs=1e-9)
        assert 1 <= entry["rankme"] <= 32  # 2 x 16 rows of 128 numbers

    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert rows == results["rows"]
    assert list(rows) == ["raw pixels", "untrained encoder", "pre-trained encoder"]
    # Raw pixels do not depend on the run: what any correct probe and 5-NN give on this split.
    assert 70 < rows["raw pixels"]["linear_2"] < 80
    assert 94 < rows["raw pixels"]["linear_all"] < 98
    assert 97 < rows["raw pixels"]["knn"] < 99.5
    for name, row in rows.items():
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert re.findall(r"\d+\.\d", line) == [f"{value:.1f}" for value in row.values()]
    for name in ("loss.png", "cosines.png", "embedding.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "images/s" in done.stdout  # plain lines, since this is no terminal
    assert not list(folder.glob("*.tmp"))


def test_a_handful_of_test_images_can_be_drawn(tmp_path):
    """As a small folder of photos has them: t-SNE refuses a perplexity that is not below their number."""
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    plots.plot_embedding(features, torch.tensor([0, 0, 1, 1]), tmp_path / "embedding.png")
    assert (tmp_path / "embedding.png").read_bytes().startswith(b"\x89PNG")


def test_the_checkpoint_loads_strictly_without_pickled_code(short_run):
    folder, _ = short_run
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 5
    config = read_log(folder)[0]["config"]
    assert {**checkpoint["config"], "projector": None, "crop_area": None} == {
        **config,
        "projector": None,
        "crop_area": None,
    }  # JSON has lists where the checkpoint has tuples
    torch.manual_seed(3)
    model = build_model("resnet18", 1, "3x3", (512, 128))
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
    (["--epochs", "ten"], "argument --epochs: invalid int value: 'ten'"),
    (["--accumulate-steps", "2"], "unrecognized arguments: --accumulate-steps 2"),
    (["--crop-area", "0.9", "0.2"], r"--crop-area must be the smaller share, then the larger, got \[0.9, 0.2\]"),
    (["--flip", "1.5"], "--flip must be at most 1, got 1.5"),
    (
        ["--objective", "simclr", "--learn-scale"],
        "--bias, --learn-bias and --learn-scale are not for --objective simclr",
    ),
    (["--preset", "moco"], "--preset must be one of mio, mio-v1, sigclr, siglip-ssl, simclr, got 'moco'"),
    (["--data", "imagenet"], "--data must be digits, cifar10, .*, got 'imagenet'"),
    (["--data", "folder:/nowhere/at/all"], "--data folder:/nowhere/at/all: no such folder"),
    (
        ["--data", "cifar10", "--data-root", "/nowhere"],
        "no CIFAR-10 under /nowhere: pass --data-root DIR, or --download",
    ),
    (["--resume", "/nowhere"], "--resume /nowhere goes on in that folder: drop --output"),
    (["--limit-steps", "0"], "--limit-steps must be at least 1"),
    (["--temperature", "0"], "--temperature must be greater than 0, got 0.0"),
    (["--temperature", "nan"], "--temperature must be greater than 0, got nan"),
    (["--learning-rate", "-1"], "--learning-rate must be greater than 0"),
    (["--regularizer", "inf"], "--regularizer must be finite"),
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
        monkeypatch.setattr("mio_ext.backends.unavailable_reason", lambda backend: "not built")
    output = tmp_path / "run"
    assert pretrain.run(["--device", "cpu", "--output", str(output), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.match("pretrain.py: .*" + message, error)
    assert error.count("\n") == 1
    assert not output.exists(), "a refused run must not leave a folder"


def test_knn_without_labels_is_refused(tmp_path, capsys):
    photos, output = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for i in range(4):
        PIL.Image.new("RGB", (8, 8), (60 * i, 0, 90)).save(photos / f"{i}.png")
    arguments = ["--data", f"folder:{photos}", "--data-root", str(tmp_path / "root"), "--batch-size", "2"]
    arguments += ["--device", "cpu", "--image-size", "8", "--limit-steps", "1", "--output", str(output)]
    assert pretrain.run([*arguments, "--knn-every", "5"]) == 2
    said = f"pretrain.py: --knn-every 5: folder:{photos} has no labels; pass --knn-every 0\n"
    assert capsys.readouterr().err.endswith(said)
    assert not output.exists()
    assert pretrain.run([*arguments, "--knn-every", "0"]) == 0


def test_compiling_leaves_batch_norm_as_it_was(tmp_path, monkeypatch, capsys):
    """The batch that runs the compiler must not count, or a resumed run would see it twice."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    arguments = [*SMALL, "--limit-steps", "2", "--no-evaluate"]
    statistics = []
    for compile in ("on", "off"):
        folder = tmp_path / compile
        assert pretrain.run([*arguments, "--compile", compile, "--output", str(folder)]) == 0
        statistics.append(torch.load(folder / "checkpoint.pt", weights_only=True)["backbone"])
    assert all(torch.equal(statistics[1][key], value) for key, value in statistics[0].items())


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
    assert done.stderr.startswith(f"pretrain.py: {package} missing: ")
    assert done.stderr.endswith(f"{sys.executable} -m pip install {package}\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["pretrain.py", "evaluate.py", "analyze.py", "export.py"])
def test_a_python_without_the_packages_is_told_of_the_one_with_them(script):
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("no .venv beside the scripts")
    command = [sys.executable, "-S", "-I", f"train/{script}"]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{script}: torch, numpy, torchvision, scikit-learn, safetensors missing: this is ")
    assert done.stderr.endswith(f"; what make has set up is .venv/bin/python train/{script}\n")


def test_an_extension_that_is_not_built_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mio_ext.library.FOLDER", tmp_path)
    monkeypatch.setattr("mio_ext.library.failure", library._load("libmio_ext"))
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
    names = {path.name for path in tmp_path.iterdir() if not path.match(TENSORBOARD)}
    assert names == {
        "README.md",
        "log.jsonl",
        "metrics.csv",
        "config.toml",
        "checkpoint.pt",
        "results.json",
        "encoder.safetensors",
    }


def test_a_loss_that_is_not_finite_names_the_step(tmp_path, monkeypatch, capsys):
    real, calls = distributed.mio_loss, []

    def loss_of_step(z1, z2, **options):
        calls.append(1)
        return real(z1 * float("nan") if len(calls) == 5 else z1, z2, **options)

    monkeypatch.setattr("train.assemble.check_loss_backend", lambda *arguments: None)
    monkeypatch.setattr(distributed, "mio_loss", loss_of_step)
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
    def raise_it(*arguments, **options):
        raise error

    monkeypatch.setattr(pretrain, "assemble", raise_it)
    assert pretrain.run(["--batch-size", "96"]) == 2
    assert capsys.readouterr().err == "pretrain.py: out of memory: try --batch-size 48\n"
    error.args = ("a bug",)
    if type(error) is RuntimeError:
        with pytest.raises(RuntimeError, match="a bug"):
            pretrain.run([])


def test_collapse_is_reported_in_words(capsys):
    """Embeddings that are all the same warn; embeddings on the whole sphere do not."""

    class Log(list):
        def write(self, event, **fields):
            self.append((event, fields))

    def events(z: torch.Tensor) -> list[str]:
        metrics, log = StepMetrics(), Log()
        loss, stats = mio_ext.mio_loss(*z.chunk(2), backend="reference", return_stats=True)
        assert isinstance(stats, PairStats)
        metrics.add(loss, stats)
        with Progress(100, 0, 1) as progress:
            progress.advance(50)
            report(metrics, 1, 1, 0.1, z, progress, log)
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
    loss, stats = mio_ext.mio_loss(*z.chunk(2), regularizer=1.0, backend="reference", return_stats=True)
    metrics = StepMetrics()
    metrics.add(loss, stats)
    row = dict(zip(METRICS, metrics.read()[0].tolist(), strict=True))
    softplus = torch.nn.functional.softplus
    positive, negative = softplus(torch.tensor(-2.0)).item(), softplus(torch.tensor(0.0)).item()
    expected = {"positive_loss": positive, "negative_loss": negative, "loss": positive + negative}
    expected |= {"positive_cosine": 1.0, "negative_cosine": 0.0}
    assert row == pytest.approx(expected, abs=1e-6)
    assert float(spread(z)) == pytest.approx(2 * (8 * 3 / 16 / 7) ** 0.5, abs=1e-6)


def test_schedule_by_epoch_holds_the_rate_within_an_epoch(tmp_path):
    """As the paper's code: two epochs of warm-up to 0.6, then half a cosine over the other two."""
    options = ["--subset", "0.05", "--epochs", "4", "--warmup-epochs", "2", "--log-every", "1", "--no-evaluate"]
    arguments = [*SMALL, *options, "--learning-rate", "0.6", "--schedule-by", "epoch", "--output", str(tmp_path / "r")]
    assert pretrain.run(arguments) == 0
    rates = [entry["lr"] for entry in read_log(tmp_path / "r") if entry["event"] == "train"]
    assert rates == pytest.approx([0.2] * 4 + [0.4] * 4 + [0.6] * 4 + [0.3] * 4)  # 72 images: 4 steps an epoch


def test_the_exported_encoder_is_torchvisions(short_run, tmp_path):
    """load_encoder and a plain torchvision ResNet-18 give the features of the checkpoint's backbone."""
    folder, _ = short_run
    encoder = load_encoder(folder)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    backbone, _ = build_backbone("resnet18", 1, "3x3")
    backbone.load_state_dict(checkpoint["backbone"], strict=True)
    images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = backbone.eval()((images - encoder.mean) / encoder.std)
    assert torch.equal(encoder.features(images), expected)
    assert torch.equal(encoder.features((images * 255).to(torch.uint8)), encoder.features((images * 255).floor() / 255))

    plain, about = torchvision.models.resnet18(), checkpoint["architecture"]
    plain.fc = torch.nn.Identity()
    colour, _ = build_backbone("resnet18", 3, "7x7")
    pretrain.export_encoder(colour, {**about, "channels": 3, "stem": "7x7"}, tmp_path / "encoder.safetensors")
    loaded = load_encoder(tmp_path / "encoder.safetensors").network
    plain.load_state_dict(safetensors.load_file(tmp_path / "encoder.safetensors"), strict=True)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(plain.eval()(images), loaded(images))

    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"other.safetensors holds no encoder of the pre-training script"):
        load_encoder(tmp_path / "other.safetensors")


def test_arguments_out_of_range_raise_the_one_error_class():
    with pytest.raises(UserError, match="--projector must be at least 1"):
        pretrain.parse_arguments(["--projector", "0"], "pretrain.py", "")
