# SPDX-License-Identifier: Apache-2.0
"""Builds mio_ext._C: `python setup.py build_ext` (in place), in any environment that has torch.

CUDA kernels are built where there is a CUDA toolkit of torch's version, with a GPU or without; FORCE_CUDA=0 leaves
them out, FORCE_CUDA=1 fails where they cannot be built. TORCH_CUDA_ARCH_LIST changes what they are built for.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

if "CUDA_HOME" not in os.environ:  # an nvcc on PATH may be a script far from its toolkit
    nvcc = shutil.which("nvcc")
    if nvcc is None or not (Path(nvcc).resolve().parents[1] / "include" / "cuda_runtime.h").exists():
        os.environ.update({"CUDA_HOME": "/usr/local/cuda"} if Path("/usr/local/cuda/bin/nvcc").exists() else {})

from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
HEADERS = sorted(str(p.relative_to(ROOT)) for pattern in ("**/*.h", "**/*.cuh") for p in ROOT.glob(f"csrc/{pattern}"))
#: Machine code for these, and PTX of the first for whatever comes later. 9.0a has instructions that nothing else has.
ARCHITECTURES = "8.0+PTX;9.0a"


def sources(*patterns: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(f"csrc/{pattern}"))


def with_cuda() -> bool:
    """Whether to build the CUDA kernels; exits where FORCE_CUDA=1 asks for what cannot be."""
    force = os.environ.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        sys.exit(f"mio_ext: FORCE_CUDA must be 0 or 1, got {force!r}")
    reason = None
    if CUDA_HOME is None:
        reason = "there is no CUDA toolkit (set CUDA_HOME)"
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    elif (version := toolkit_version()) != torch.version.cuda.split(".")[0]:
        reason = f"the CUDA toolkit is version {version}, but torch was built with {torch.version.cuda}"
    if reason and force == "1":
        sys.exit(f"mio_ext: FORCE_CUDA=1, but {reason}")
    if reason and force == "":
        print(f"mio_ext: building without the CUDA kernels: {reason}", file=sys.stderr)
    return reason is None and force != "0"


def toolkit_version() -> str:
    """Major version of nvcc; torch refuses one that is not its own."""
    try:
        text = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    found = re.search(r"release (\d+)", text)
    return found[1] if found else "unknown"


# OpenMP is torch's thread pool; no -march: the kernel picks its instruction set at run time.
cxx = ["-O3", "-fopenmp", "-Wall", "-Wno-psabi"]
if with_cuda():
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    hopper = ["-DMIO_HOPPER"] if "9.0a" in architectures else []
    extension = CUDAExtension(
        "mio_ext._C",
        sources("*.cpp", "cpu/*.cpp", "cuda/*.cpp", "cuda/**/*.cu"),
        depends=HEADERS,
        extra_compile_args={"cxx": [*cxx, f'-DMIO_WITH_CUDA="{architectures}"'], "nvcc": ["-O3", *hopper]},
    )
else:
    extension = CppExtension("mio_ext._C", sources("*.cpp", "cpu/*.cpp"), depends=HEADERS, extra_compile_args=cxx)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension}, options={"build_ext": {"inplace": True}})
