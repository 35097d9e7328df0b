# SPDX-License-Identifier: Apache-2.0
"""``python -m mio_ext``: versions, what was built, what can run here and why the rest cannot."""

import importlib.util
import platform
import sys

import torch

from . import __version__, ops


def main() -> None:
    triton = "present" if importlib.util.find_spec("triton") else "not installed"
    print(f"mio_ext {__version__}, torch {torch.__version__}, triton {triton}, Python {platform.python_version()}")
    if ops.extension is None:
        print("extension: not built")
    else:
        sets = ops.extension.cpu_instruction_sets()
        print(f"extension: built with {ops.extension.compiler}")
        print(
            f"CPU kernel: {ops.extension.cpu_instruction_set()} of {', '.join(sets)}; {torch.get_num_threads()} threads"
        )
        print(f"CUDA kernels: {ops.extension.cuda or 'not built'}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(gpus) or 'none'}")
    print("backends:")
    for backend in ops.BACKENDS:
        print(f"  {backend:<10} {ops.unavailable_reason(backend) or 'available'}")
    table = ", ".join(f"{device}: {backend}" for device, backend in ops.AUTO.items())
    print(f"backend='auto': {table}, any other device: reference")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # MIO_CPU_ISA names what the machine cannot run
        sys.exit(str(error))
