# SPDX-License-Identifier: Apache-2.0
"""A few kills of the fifty of `make kill`, and that nothing of ours is read as code."""

import re

import pytest
from conftest import ROOT, run_python

pytest.importorskip("torchvision")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")


def test_a_killed_run_loses_nothing():
    done = run_python("tests/train/kill.py", "--kills", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed 4 times" in done.stdout
    assert done.stdout.endswith("in the end the bits of the undisturbed run\n")


def test_nothing_is_unpickled():
    """A checkpoint or a cache from elsewhere must not run code."""
    for path in [*(ROOT / "train").glob("*.py"), *(ROOT / "mio_ext").rglob("*.py")]:
        text = path.read_text()
        assert "pickle" not in re.sub(r'""".*?"""|#.*', "", text, flags=re.DOTALL), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\(.*?\)", text)), path
