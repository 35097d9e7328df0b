# SPDX-License-Identifier: Apache-2.0
"""Builds libmio_ext.so, libmio_ext_cuda.so and mio_ext._C: `python setup.py build_ext` (in place), in any environment
that has torch.

The libraries hold the ops, on torch's stable ABI and without Python symbols: they serve every torch from 2.10 on. The
module _C tells `python -m mio_ext` more of the build and is left out where MIO_WHEEL=1 (make wheel) makes one wheel for
every Python.

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

from setuptools.command.bdist_wheel import bdist_wheel
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).parent
HEADERS = sorted(str(p.relative_to(ROOT)) for pattern in ("**/*.h", "**/*.cuh") for p in ROOT.glob(f"csrc/{pattern}"))
#: What the extension was last built from; written when that changes, and then all of it is compiled again.
CONFIGURATION = ROOT / "build" / "configuration.json"
#: Machine code for these, and PTX of the first for whatever comes later. 9.0a has instructions that nothing else has.
ARCHITECTURES = "8.0+PTX;9.0a"
#: The oldest torch whose stable ABI the libraries may use, as torch/csrc/stable/version.h writes it.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
#: One wheel for every Python and torch; packaging/manylinux.py has it link against symbols as old as its tag says.
WHEEL = os.environ.get("MIO_WHEEL") == "1"
WHEEL_TAG = ("py3", "none", "manylinux_2_28_x86_64")


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


class Build(BuildExtension):
    """Libraries are no Python modules: their names carry no Python version."""

    def get_ext_filename(self, name: str) -> str:
        if name.split(".")[-1].startswith("lib"):
            return name.replace(".", "/") + ".so"
        return str(super().get_ext_filename(name))


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return WHEEL_TAG if WHEEL else super().get_tag()


# No -march: the kernel picks its instruction set at run time; -g0: Python's own flags ask for debug symbols, nine
# tenths of the file. Nothing is visible: what is registered is found through torch.
version = (ROOT / "mio_ext" / "version.py").read_text().split('"')[1]
cxx = ["-O3", "-g0", "-Wall", "-Wno-psabi", "-fvisibility=hidden", TARGET, f'-DMIO_VERSION="{version}"']
link = ["-Wl,--as-needed", "-Wl,--exclude-libs,ALL"]
if WHEEL:
    sys.path.insert(0, str(ROOT / "packaging"))
    from manylinux import stubs

    link += stubs(ROOT / "build" / "old")
obstacle = without_cuda()
if obstacle is None:
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    cxx += [f'-DMIO_WITH_CUDA="{architectures}"', "-DUSE_CUDA"]
nvcc = ["-O3", "-Xcompiler", "-fvisibility=hidden", *(["-DMIO_HOPPER"] if "9.0a" in str(cxx) else [])]


def library(name: str, files: list[str], **options: object) -> setuptools.Extension:
    """Without Python: py_limited_api keeps torch_python out of what is linked."""
    return CppExtension(
        f"mio_ext.{name}",
        files,
        depends=[*HEADERS, str(CONFIGURATION.relative_to(ROOT))],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        py_limited_api=True,
        **options,
    )


extensions = [library("libmio_ext", sources("ops.cpp", "old_symbols.cpp", "cpu/*.cpp"))]
if obstacle is None:
    # Its own CUDA runtime, so that it runs beside torch's of any version.
    cuda = {
        "include_dirs": [p for p in include_paths("cuda") if p not in include_paths()],
        "library_dirs": [f"{CUDA_HOME}/lib64"],
        "libraries": ["torch_cuda", "cudart_static", "dl", "rt", "pthread"],
    }
    files = sources("old_symbols.cpp", "cuda/*.cpp", "cuda/**/*.cu")
    extensions.append(library("libmio_ext_cuda", files, **cuda))
if not WHEEL:
    diagnostics = CppExtension("mio_ext._C", ["csrc/bindings.cpp", "csrc/cpu/machine.cpp"])
    diagnostics.depends, diagnostics.extra_link_args = HEADERS, link
    diagnostics.extra_compile_args = {"cxx": [flag for flag in cxx if flag != TARGET]}  # it names torch's version
    extensions.append(diagnostics)

configuration = {"python": sys.version, "torch": torch.__version__, "cxx": cxx}
configuration |= {"nvcc": nvcc} if obstacle is None else {}
if configuration != last_configuration():
    if obstacle:
        print(f"mio_ext: building without the CUDA kernels: {obstacle}", file=sys.stderr)
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(json.dumps(configuration, indent=1) + "\n")

setuptools.setup(
    version=version,
    ext_modules=extensions,
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    options={"build_ext": {"inplace": not WHEEL}, **({"build": {"build_lib": "build/wheel"}} if WHEEL else {})},
)
