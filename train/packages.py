# SPDX-License-Identifier: Apache-2.0
"""What the scripts need, and what is said where it is missing; imports nothing of it itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

REQUIRED = {  # module: package
    "torch": "torch",
    "numpy": "numpy",
    "torchvision": "torchvision",
    "sklearn": "scikit-learn",
    "safetensors": "safetensors",
}
VENV = Path(__file__).resolve().parent.parent / ".venv"


def require_packages(script: str) -> None:
    """Ends the program, with one line, where packages are missing."""
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return
    if os.environ.get("RANK", "0") == "0":  # else torchrun's other processes say it again
        print(f"{script}: {', '.join(missing)} missing: {way_out(missing)}", file=sys.stderr)
    sys.exit(2)


def way_out(missing: list[str]) -> str:
    python = VENV / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != VENV.resolve():
        return f"this is {sys.executable}; what make has set up is {os.path.relpath(python)} {sys.argv[0]}"
    return f"make build sets up .venv with all of it; here: {sys.executable} -m pip install {' '.join(missing)}"
