# SPDX-License-Identifier: Apache-2.0
"""Builds mio_ext._C: `python setup.py build_ext` (in place), in any environment that has torch.

CUDA kernels are built where there is a CUDA toolkit of torch's version, with a GPU or without; FORCE_CUDA=0 leaves
them out, FORCE_CUDA=1 fails where they cannot be built, FORCE_CUDA=gpu builds them where a GPU is visible or an
earlier build had them. TORCH_CUDA_ARCH_LIST changes what they are built for.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # which stumble over the license in pyproject.toml
    sys.exit(
        f"mio_ext: building needs setuptools 77 or later, this is {setuptools.__version__}; "
        f"run: {sys.executable} -m pip install 'setuptools>=77' wheel pybind11 ninja"
    )
try:
    import torch
except ImportError:
    sys.exit(f"mio_ext: building needs torch 2.10 or later; run: {sys.executable} -m pip install 'torch>=2.10'")

if "CUDA_HOME" not in os.environ:  # an nvcc on PATH may be a script far from its toolkit
    nvcc = shutil.which("nvcc")
    if nvcc is None or not (Path(nvcc).resolve().parents[1] / "include" / "cuda_runtime.h").exists():
        os.environ.update({"CUDA_HOME": "/usr/local/cuda"} if Path("/usr/local/cuda/bin/nvcc").exists() else {})

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
HEADERS = sorted(str(p.relative_to(ROOT)) for pattern in ("**/*.h", "**/*.cuh") for p in ROOT.glob(f"csrc/{pattern}"))
#: What the extension was last built from; written when that changes, and then all of it is compiled again.
CONFIGURATION = ROOT / "build" / "configuration.json"
#: Machine code for these, and PTX of the first for whatever comes later. 9.0a has instructions that nothing else has.
ARCHITECTURES = "8.0+PTX;9.0a"


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(f"csrc/{pattern}"))


def without_cuda() -> str | None:
    """Why the CUDA kernels are not built, None if they are; exits where FORCE_CUDA=1 asks for what cannot be."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1", "gpu"):
        sys.exit(f"mio_ext: FORCE_CUDA must be 0, 1 or gpu, got {force!r}")
    if force == "0":
        return "FORCE_CUDA=0"
    reason = None
    if CUDA_HOME is None:
        reason = "there is no CUDA toolkit (set CUDA_HOME)"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif (version := toolkit_version()) != torch.version.cuda.split(".")[0]:
        reason = f"the CUDA toolkit is version {version}, but torch was built with {torch.version.cuda}"
    elif force == "gpu" and not torch.cuda.is_available() and "nvcc" not in last_configuration():
        reason = "no GPU is visible (FORCE_CUDA=1 builds them all the same)"
    if reason and force == "1":
        sys.exit(f"mio_ext: FORCE_CUDA=1, but {reason}")
    return reason


def toolkit_version() -> str:
    """Major version of nvcc; torch refuses one that is not its own."""
    try:
        text = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    found = re.search(r"release (\d+)", text)
    return found[1] if found else "unknown"


def last_configuration() -> dict[str, object]:
    try:
        content: dict[str, object] = json.loads(CONFIGURATION.read_text())
    except (OSError, ValueError):
        return {}
    return content


# OpenMP is torch's thread pool; no -march: the kernel picks its instruction set at run time; -g0: Python's own flags
# ask for debug symbols, nine tenths of the file.
flags = {"cxx": ["-O3", "-g0", "-fopenmp", "-Wall", "-Wno-psabi"]}
obstacle = without_cuda()
if obstacle is None:
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    flags["cxx"].append(f'-DMIO_WITH_CUDA="{architectures}"')
    flags["nvcc"] = ["-O3", *(["-DMIO_HOPPER"] if "9.0a" in architectures else [])]
    kind, files = CUDAExtension, sources("*.cpp", "cpu/*.cpp", "cuda/*.cpp", "cuda/**/*.cu")
else:
    kind, files = CppExtension, sources("*.cpp", "cpu/*.cpp")

configuration = {"python": sys.version, "torch": torch.__version__, "sources": files, **flags}
if configuration != last_configuration():
    if obstacle:
        print(f"mio_ext: building without the CUDA kernels: {obstacle}", file=sys.stderr)
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(json.dumps(configuration, indent=1) + "\n")

setuptools.setup(
    ext_modules=[
        kind(
            "mio_ext._C",
            files,
            depends=[*HEADERS, str(CONFIGURATION.relative_to(ROOT))],
            extra_compile_args=flags,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"build_ext": {"inplace": True}},
)
