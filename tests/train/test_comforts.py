# SPDX-License-Identifier: Apache-2.0
"""What is only nice to have never ends a run, and what will be missing is said before."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("torchvision")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from PIL import Image

from train import probes
from train.features import Features

SHORT = ["--batch-size", "512", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu", "--knn-every", "0"]
PATCH = """
import runpy, sys
sys.path.insert(0, {root!r})
import train.scoring
train.scoring.evaluate_features = lambda features, budgets: {{"linear_2": 1.0, "linear_2_std": 0.1, "knn": 2.0}}
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(folder: Path, before: str = "", shell: str = "{}", **environment: str) -> subprocess.CompletedProcess:
    code = folder.with_suffix(".py")
    code.write_text(before + PATCH.format(root=str(ROOT), script=str(ROOT / "train" / "pretrain.py")))
    command = shell.format(f"{sys.executable} {code} {' '.join(SHORT)} --output {folder}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=environment, timeout=300
    )


def assert_ended_well(folder: Path, done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stderr
    assert (folder / "README.md").exists()
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_broken_matplotlib_costs_the_plots(tmp_path):
    done = start(tmp_path / "run", MPLBACKEND="nonsense")
    assert_ended_well(tmp_path / "run", done)
    assert done.stderr.count("not all plots could be drawn: ") == 1


def test_latex_that_is_missing_costs_the_plots(tmp_path):
    """A matplotlibrc may ask for it; here its programs are not on the path."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "bash").symlink_to(str(shutil.which("bash")))
    done = start(tmp_path / "run", MATPLOTLIBRC=str(tmp_path), PATH=str(bare), MPLCONFIGDIR=str(tmp_path))
    assert_ended_well(tmp_path / "run", done)
    assert done.stderr.count("not all plots could be drawn: ") == 1


def test_nohup_goes_on_when_the_terminal_is_closed(tmp_path):
    """Whoever ignores SIGHUP for us wants the run to its end; heard, it would leave a checkpoint and exit code 129."""
    hang_up = f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom train.monitor import Progress\n"
    hang_up += "Progress.glance = lambda *all: os.kill(os.getpid(), signal.SIGHUP)\n"
    assert_ended_well(tmp_path / "run", start(tmp_path / "run", before=hang_up, shell="nohup {}"))


def test_a_broken_tensorboard_costs_its_file(tmp_path):
    broken = "import importlib.abc, sys\nclass Broken(importlib.abc.MetaPathFinder):\n"
    broken += "    def find_spec(self, name, path, target=None):\n        if name == 'tensorboard':\n"
    broken += "            raise TypeError('Descriptors cannot be created directly')\n"
    broken += "sys.meta_path.insert(0, Broken())\n"
    done = start(tmp_path / "run", before=broken)
    assert_ended_well(tmp_path / "run", done)
    assert "nothing for TensorBoard: Descriptors cannot be created directly" in done.stderr


@pytest.mark.parametrize("shell", ["{} | head -1", "{} 2>&-", "{} >&- 2>&-"], ids=["head", "stderr", "both"])
def test_nobody_has_to_listen(tmp_path, shell):
    assert_ended_well(tmp_path / "run", start(tmp_path / "run", shell=shell))


def test_an_ascii_terminal_is_enough(tmp_path):
    done = start(tmp_path / "run", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert_ended_well(tmp_path / "run", done)
    assert r"1.0 \xb1 0.1" in done.stdout


def test_two_images_a_class_have_no_linear_probe(tmp_path):
    """One of each is held out, and none is left to choose the probe's settings on."""
    for number in range(10):
        for copy in range(2):
            path = tmp_path / "pets" / str(number) / f"{copy}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 12), (20 * number, 100 * copy, 0)).save(path)
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *SHORT, "--batch-size", "4", "--output", str(run)]
    command += ["--data", f"folder:{tmp_path / 'pets'}", "--data-root", str(tmp_path / "root"), "--projector", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert_ended_well(run, done)
    assert done.stdout.index("no class has two training images") < done.stdout.index("epoch")
    assert "20-NN" in done.stdout and "linear, all" not in done.stdout


def test_a_row_without_the_probe_that_cannot_choose():
    x, y = torch.eye(4), torch.arange(4)
    row = probes.evaluate_features(Features(x, y, x, y), budgets=(2,))
    assert set(row) == {"knn"}


def test_a_warm_up_longer_than_the_run_is_said(tmp_path, capsys):
    from train import pretrain

    arguments = ["--batch-size", "512", "--device", "cpu", "--epochs", "2", "--warmup-epochs", "5", "--dry-run"]
    assert pretrain.run(arguments) == 0
    out = capsys.readouterr().out
    assert "the warm-up of 5 epochs outlasts the run of 2: the learning rate ends near 0.2 instead of 0.5" in out
