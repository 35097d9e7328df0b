# SPDX-License-Identifier: Apache-2.0
"""``python -m mio_ext``: versions, what was built, what can run here and why the rest cannot, what "auto" takes.

``python -m mio_ext check`` tries the fused backends out and keeps the result; see :mod:`mio_ext.selfcheck`.
"""

import importlib.util
import os
import platform
import sys

import torch

from . import __version__, backends, library, selfcheck


def report() -> None:
    triton = "present" if importlib.util.find_spec("triton") else "not installed"
    print(f"mio_ext {__version__}, torch {torch.__version__}, triton {triton}, Python {platform.python_version()}")
    known = library.diagnostics
    if library.failure is not None:
        print("extension: not built")
    elif known is None:  # a wheel's
        print(f"extension: loaded, no more is known; {torch.get_num_threads()} threads")
    else:
        sets = known.cpu_instruction_sets()
        print(f"extension: built with {known.compiler}")
        print(f"CPU kernel: {known.cpu_instruction_set()} of {', '.join(sets)}; {torch.get_num_threads()} threads")
        print(f"CUDA kernels: {known.cuda or 'not built'}")
    print("backends:")
    for backend in backends.BACKENDS:
        print(f"  {backend:<10} {backends.unavailable_reason(backend) or 'available'}")
    print("backend='auto' takes:")
    print(f"  cpu        {'cpu' if library.failure is None else 'nothing: build the extension'}")
    for i in range(torch.cuda.device_count()):
        found: dict[backends.Choice, list[str]] = {}
        for cell in backends.CELLS:
            found.setdefault(backends.auto_on_gpu(i, cell), []).append(str(cell))
        told = "; ".join(f"{c.backend} for {', '.join(cells)} ({c.why})" for c, cells in found.items())
        print(f"  cuda:{i:<5} {torch.cuda.get_device_name(i)}: {told}")
    print("  elsewhere  reference, dense PyTorch")


def main(arguments: list[str]) -> None:
    if not arguments:
        report()
    elif arguments[0] == "check":
        selfcheck.main(arguments[1:])
    else:
        sys.exit(f"python -m mio_ext: the only command is check, got {arguments[0]!r}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RuntimeError as error:  # MIO_CPU_ISA names what the machine cannot run
        sys.exit(str(error))
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
