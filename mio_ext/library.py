# SPDX-License-Identifier: Apache-2.0
"""Loads the ops: ``libmio_ext.so``, and where torch has CUDA ``libmio_ext_cuda.so``, both without Python symbols.

They are built on torch's stable ABI, so one file serves every torch from :data:`OLDEST_TORCH` on. What keeps them from
loading is said in a sentence, with what to install, when a backend is asked for that needs them.
"""

from __future__ import annotations

import functools
import importlib
import platform
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .version import __version__

try:  # Hugging Face's kernel-builder makes this module, with a namespace for each build, and loads the ops
    _hub: Any = importlib.import_module(f"{__package__}._ops")
except ModuleNotFoundError:
    _hub = None

OLDEST_TORCH = (2, 10)
FOLDER = Path(__file__).parent
#: The namespace of the ops in ``torch.ops``.
NAMESPACE: str = "mio_ext" if _hub is None else _hub.add_op_namespace_prefix("").removesuffix("::")
REINSTALL = "run: pip install --force-reinstall mio_ext, or in a clone: python setup.py build_ext --force"


def ops() -> Any:
    return getattr(torch.ops, NAMESPACE)


def check_torch(version: str) -> None:
    """Raises ImportError where torch is older than its stable ABI."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"mio_ext needs torch {oldest} or later, this is torch {version}; run: pip install 'torch>={oldest}'"
        )


def _load(name: str) -> str | None:
    """Why the library does not load; None once it has."""
    file = FOLDER / f"{name}.so"
    if not file.exists():
        return "the extension is not built ({}); run: python setup.py build_ext".format(f"there is no {file}")
    try:
        torch.ops.load_library(file)
    except OSError as error:
        system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()) or 'no glibc'}"
        return (
            f"{name}.so does not load on this system, {system} ({error}): wheels are for Linux on x86-64 with glibc "
            "2.28 or later; elsewhere build it: pip install --no-binary mio_ext mio_ext"
        )
    return None


def _mismatch(name: str, version: str) -> str | None:
    return None if version == __version__ else f"{name}.so is of mio_ext {version}, this is {__version__}; {REINSTALL}"


def _load_ops() -> str | None:
    if _hub is not None:
        return None
    failure = _load("libmio_ext")
    if failure is not None:
        return failure
    version = ops().version() if hasattr(ops(), "version") else "an earlier version"
    return _mismatch("libmio_ext", version)


def _load_cuda() -> str | None:
    if _hub is not None:
        return None if hasattr(ops(), "cuda_versions") else "this build has no CUDA kernels"
    if failure is not None:
        return failure
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not (FOLDER / "libmio_ext_cuda.so").exists():
        return "the extension was built without CUDA; FORCE_CUDA=1 python setup.py build_ext does it or says why"
    return _load("libmio_ext_cuda")


def _import_diagnostics() -> ModuleType | None:
    try:
        return importlib.import_module(f"{__package__}._C")
    except ImportError:
        return None


check_torch(torch.__version__)
#: Why there are no ops here; None: there are. And why none for CUDA.
failure: str | None = _load_ops()
cuda_failure: str | None = _load_cuda()
#: ``mio_ext._C``, what a build for this very Python can tell of itself; None in a wheel.
diagnostics: Any = _import_diagnostics()


@functools.cache
def cuda_mismatch() -> str | None:
    """Why the CUDA kernels that were loaded cannot run on this machine's driver; None if they can."""
    version, runtime, driver = ops().cuda_versions()
    if driver < runtime // 1000 * 1000:
        of = [f"{v // 1000}.{v % 1000 // 10}" for v in (driver, runtime)]
        return f"the driver is for CUDA {of[0]} and the kernels need one for {of[1]}; install a later driver"
    return None if _hub is not None else _mismatch("libmio_ext_cuda", version)
