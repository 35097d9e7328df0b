# SPDX-License-Identifier: Apache-2.0
"""What building says where something is missing or stale, and what a wheel offers."""

import re
import shutil
import tomllib

import pytest
from conftest import ROOT, run_python

from mio_ext import library

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_an_old_setuptools_is_one_sentence(tmp_path):
    """As in a fresh environment of Python 3.11; it stumbled over the license in pyproject.toml."""
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"\n')
    done = run_python("setup.py", "build_ext", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    message = r"mio_ext: building needs setuptools 77 or later, this is 65.5.0; run: .* -m pip install '.*'.*\n"
    assert re.fullmatch(message, done.stderr)


def test_torch_that_is_missing_is_one_sentence(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    done = run_python("setup.py", "build_ext", env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert re.fullmatch(r"mio_ext: building needs torch 2.10 or later; run: .* -m pip install '.*'\n", done.stderr)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package in Python alone, for tests to put libraries into; what it says of the backend "cpu"."""
    folder = tmp_path / "mio_ext"
    shutil.copytree(ROOT / "mio_ext", folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))

    def reason():
        script = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport mio_ext\n"
        done = run_python("-c", script + "print(mio_ext.backends.unavailable_reason('cpu'))\n")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return folder, reason


def test_a_library_that_is_missing_is_to_be_built(copy):
    folder, reason = copy
    file = re.escape(str(folder / "libmio_ext.so"))
    assert re.fullmatch(
        rf"the extension is not built \(there is no {file}\); run: python setup.py build_ext\n", reason()
    )


def test_a_library_of_another_platform_is_told(copy):
    """What the loader says of an ELF file of another machine, it says of any that is not its own."""
    folder, reason = copy
    (folder / "libmio_ext.so").write_bytes(b"\xcf\xfa\xed\xfe" + bytes(200))  # as on macOS
    message = (
        r"libmio_ext.so does not load on this system, Linux \S+, glibc \S+ \(.*\): wheels are for Linux on x86-64 with "
        r"glibc 2.28 or later; elsewhere build it: pip install --no-binary mio_ext mio_ext\n"
    )
    assert re.fullmatch(message, reason())


def test_a_library_of_another_version_is_told(copy):
    folder, reason = copy
    shutil.copy(ROOT / "mio_ext" / "libmio_ext.so", folder)
    assert reason() == "None\n"
    (folder / "version.py").write_text('__version__ = "99.0"\n')
    message = (
        r"libmio_ext.so is of mio_ext \S+, this is 99.0; run: pip install --force-reinstall mio_ext, or .* --force\n"
    )
    assert re.fullmatch(message, reason())


@pytest.mark.parametrize("version", ["2.9.1", "2.9.0+cu128", "1.13.1"])
def test_torch_that_is_too_old_is_one_sentence(version):
    script = f"import torch; torch.__version__ = {version!r}\nimport mio_ext"
    done = run_python("-c", script)
    message = f"ImportError: mio_ext needs torch 2.10 or later, this is torch {version}; run: pip install 'torch>=2.10'"
    assert done.stderr.splitlines()[-1] == message
    library.check_torch("2.10.0"), library.check_torch("2.15.0.dev20261101+cpu"), library.check_torch("3.0")


def test_the_report_names_compiler_and_torch():
    pytest.importorskip("mio_ext._C")
    line = run_python("-m", "mio_ext").stdout.splitlines()[1]
    assert re.fullmatch(r"extension: built with (GCC \d|\S*[Cc]lang).*, torch \d+\.\d+\.\d+.*", line)


def test_an_installed_command_is_its_script():
    commands = [entry.split(":") for entry in PROJECT["project"]["scripts"].values()]
    script = "import importlib, sys\nsys.argv[1:] = ['--help']\n"
    for module, function in commands:
        script += f"try: importlib.import_module({module!r}).{function}()\n"
        script += "except SystemExit as end: assert not end.code\n"
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^usage: (\w+)\.py ", done.stdout, re.M) == [function for _, function in commands]


def test_kernel_builder_is_given_every_source():
    build = tomllib.loads((ROOT / "build.toml").read_text())
    told = {*build["torch"]["src"], *build["kernel"]["mio_ext_cuda"]["src"]}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*")}
    assert ours - told == {"csrc/bindings.cpp", "csrc/old_symbols.cpp"} and told <= ours
    assert (ROOT / "torch-ext" / build["general"]["name"] / "__init__.py").exists()


def test_the_extra_is_the_group():
    """A group cannot refer to an extra of its own project, so the list stands twice."""
    assert PROJECT["project"]["optional-dependencies"]["train"] == PROJECT["dependency-groups"]["train"]
