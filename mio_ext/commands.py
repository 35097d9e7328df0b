# SPDX-License-Identifier: Apache-2.0
"""The scripts of train/ as installed commands: mio-pretrain, mio-evaluate, mio-analyze, mio-export (extra [train]).

Scripts and commands are the same files: a wheel holds the folder train/ below mio_ext/scripts/, where it is in nobody's
way, and a clone has it beside mio_ext/.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(name: str) -> int:
    installed = HERE / "scripts"
    sys.path.insert(0, str(installed if installed.is_dir() else HERE.parent))
    code: int = importlib.import_module(f"train.{name}").run()
    return code


def pretrain() -> int:
    return run("pretrain")


def evaluate() -> int:
    return run("evaluate")


def analyze() -> int:
    return run("analyze")


def export() -> int:
    return run("export")
