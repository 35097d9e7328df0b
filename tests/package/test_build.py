# SPDX-License-Identifier: Apache-2.0
"""What building says where something is missing or stale, and what a wheel offers."""

import re
import tomllib

import pytest
from conftest import ROOT, run_python

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


def test_an_extension_of_another_torch_is_to_be_built_again():
    """A missing one is built by build_ext; one that is there and does not load only with --force."""
    script = (
        "import importlib.abc, sys\n"
        "class Stale(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'mio_ext._C':\n"
        "            raise ImportError('undefined symbol: _ZN3c10')\n"
        "sys.meta_path.insert(0, Stale())\n"
        "import mio_ext\n"
        "print(mio_ext.backends.unavailable_reason('cpu'))\n"
    )
    done = run_python("-c", script)
    reason = "the extension was built with another torch or Python and does not load (undefined symbol: _ZN3c10)"
    assert done.stdout == f"{reason}; run: python setup.py build_ext --force\n", done.stderr


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


def test_the_extra_is_the_group():
    """A group cannot refer to an extra of its own project, so the list stands twice."""
    assert PROJECT["project"]["optional-dependencies"]["train"] == PROJECT["dependency-groups"]["train"]
