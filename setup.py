# SPDX-License-Identifier: Apache-2.0
"""Builds mio_ext._C: `python setup.py build_ext` (in place), in any environment that has torch."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
SOURCES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
HEADERS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))

setup(
    ext_modules=[
        CppExtension(
            "mio_ext._C",
            SOURCES,
            depends=HEADERS,
            # OpenMP is torch's thread pool; no -march: the kernel picks its instruction set at run time.
            extra_compile_args=["-O3", "-fopenmp", "-Wall", "-Wno-psabi"],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"build_ext": {"inplace": True}},
)
