# SPDX-License-Identifier: Apache-2.0
"""The record of what ``python -m mio_ext check`` has verified on this machine.

A file in the user's cache folder, ``MIO_CACHE_DIR``, ``XDG_CACHE_HOME/mio_ext`` or ``~/.cache/mio_ext``. Its name
holds a hash of everything that could change the answer: device, driver, torch, Triton, our own code.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from importlib import metadata
from pathlib import Path

import torch

from . import backends
from .backends import Cell

_memory: dict[str, dict[str, str | None]] = {}  # by key: records that no file could be written for, or was read


def key(device: torch.device) -> dict[str, str]:
    """Everything on this machine that could change what is verified."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        driver = Path("/proc/driver/nvidia/version")
        version = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
    else:
        name, capability, version = "cpu", "none", "none"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return {
        "device": name,
        "capability": capability,
        "driver": version,
        "torch": torch.__version__,
        "triton": triton,
        "code": _hash_of_the_code(),
    }


def _hash_of_the_code() -> str:
    """Of the extension and everything of ours in Python."""
    here = Path(__file__).parent
    files = sorted({*here.rglob("*.py"), *here.glob("*.so")})
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def record_path(device: torch.device) -> Path | None:
    """Where the record of this device is or will be; None where there is no folder for it."""
    name = hashlib.sha256(json.dumps(key(device)).encode()).hexdigest()[:16] + ".json"
    if folder := os.environ.get("MIO_CACHE_DIR"):
        return Path(folder) / name
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "mio_ext" / name
    try:
        return Path.home() / ".cache" / "mio_ext" / name
    except RuntimeError:
        return None


def record(device: torch.device) -> dict[str, str | None]:
    """Cell -> verified backend, or None where it was looked for in vain; empty if nothing was checked yet."""
    name = json.dumps(key(device))
    if name not in _memory:
        _memory[name] = {}
        path = record_path(device)
        try:
            if path is not None and path.exists():
                cells = json.loads(path.read_text())["cells"]
                _memory[name] = {str(c): b for c, b in cells.items() if b is None or b in backends.BACKENDS}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            warnings.warn(f"mio_ext: the record {path} cannot be read ({error}); check again", stacklevel=2)
    return _memory[name]


def remember(device: torch.device, cells: dict[str, str | None]) -> None:
    """Add to the record, in a file where one can be written: whole or not at all. Else in memory, said once."""
    cells = {**record(device), **cells}
    _memory[json.dumps(key(device))] = cells
    backends.forget_choices()
    path = record_path(device)
    try:
        if path is None:
            raise OSError("no home folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        try:
            made = {"key": key(device), "made": time.strftime("%Y-%m-%d"), "cells": cells}
            part.write_text(json.dumps(made, indent=1) + "\n")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f"mio_ext: the record of the check is kept for this process only ({error})", stacklevel=2)


def known() -> dict[str, dict[str, str | None]]:
    """The records this process knows, for others that are to :func:`adopt` them."""
    return dict(_memory)


def adopt(records: dict[str, dict[str, str | None]]) -> None:
    """Take another process's records as one's own; those of another kind of device do no harm."""
    _memory.update(records)
    backends.forget_choices()


def backend_for(index: int | None, cell: Cell) -> str | None:
    """The backend the record has for the cell on GPU ``index``."""
    return record(torch.device("cuda", torch.cuda.current_device() if index is None else index)).get(str(cell))
