# SPDX-License-Identifier: Apache-2.0
"""What surrounds the losses: the report of `python -m mio_ext`, missing pieces, README and its figures."""

import re
import shutil

import torch
import torch.nn.functional as F
from conftest import ROOT, relative_error, run_python, views

import mio_ext

README = (ROOT / "README.md").read_text()


def without(module: str) -> str:
    """Code that makes importing ``module`` fail as if it were not there."""
    return f"import sys; sys.modules[{module!r}] = None\n"


def test_report():
    result = run_python("-m", "mio_ext")
    assert result.returncode == 0, result.stderr
    assert f"mio_ext {mio_ext.__version__}, torch {torch.__version__}" in result.stdout
    assert re.search(r"CPU kernel: \w+ of .*portable; \d+ threads", result.stdout)
    for backend in mio_ext.backends.BACKENDS:
        assert re.search(rf"^  {backend} +\S", result.stdout, re.MULTILINE)
    assert tuple(b for b in mio_ext.available_backends() if b in ("cpu", "reference")) == ("cpu", "reference")


def test_without_the_extension(tmp_path):
    """A copy of the package without its libraries."""
    shutil.copytree(ROOT / "mio_ext", tmp_path / "mio_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, mio_ext\n"
        "z = torch.randn(4, 3)\n"
        "print(mio_ext.mio_loss(z, z, backend='reference').item())\n"
        "print(mio_ext.available_backends())\n"
        "mio_ext.mio_loss(z, z)\n"
    )
    result = run_python("-c", script)
    assert "cpu" not in result.stdout and "reference" in result.stdout
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: mio_loss: backend 'cpu' cannot run: the extension is not built")
    assert error.endswith("run: python setup.py build_ext")


def test_without_the_diagnostic_module():
    """As in a wheel: nothing is missing but details of the report."""
    script = without("mio_ext._C") + (
        "import runpy, torch, mio_ext\n"
        "z = torch.randn(4, 3, requires_grad=True)\n"
        "mio_ext.mio_loss(z, 2 * z).backward()\n"
        "runpy.run_module('mio_ext', run_name='__main__')\n"
    )
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    assert "extension: loaded" in result.stdout and re.search("^  cpu +available$", result.stdout, re.M)


def test_without_triton():
    script = without("triton") + (
        "import torch, mio_ext\n"
        "print(mio_ext.available_backends())\n"
        "z = torch.randn(4, 3)\n"
        "mio_ext.mio_loss(z, z, backend='triton')\n"
    )
    result = run_python("-c", script)
    assert "'cpu'" in result.stdout and "'triton'" not in result.stdout
    error = result.stderr.strip().splitlines()[-1]
    assert error == "RuntimeError: mio_loss: backend 'triton' cannot run: Triton is not installed"


def test_needs_only_torch():
    """The losses import neither Triton nor torchvision nor anything of the training script."""
    missing = ("triton", "torchvision", "sklearn", "matplotlib", "tqdm", "open_clip", "transformers")
    script = "".join(map(without, missing)) + (
        "import torch, mio_ext\n"
        "z = torch.randn(4, 3, requires_grad=True)\n"
        "mio_ext.mio_loss(z, z * 2).backward()\n"
        "print('fine', z.grad.shape)\n"
    )
    result = run_python("-c", script)
    assert "fine" in result.stdout, result.stderr


def test_importing_takes_no_compiler_along():
    """It takes a second and a half; we take a fiftieth of that."""
    script = "import torch, sys; before = set(sys.modules); import mio_ext; print(*set(sys.modules) - before)"
    loaded = run_python("-c", script).stdout.split()
    assert "mio_ext.losses" in loaded
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "triton"))]


def test_types_in_a_users_file(tmp_path):
    """mypy finds our types, and knows a loss from a loss with statistics."""
    (tmp_path / "user.py").write_text(
        "import torch\n"
        "from mio_ext import MIOLoss, PairStats, SigLIPLoss, __version__, distributed, mio_loss, siglip_loss\n"
        "z = torch.randn(4, 3)\n"
        "a: torch.Tensor = mio_loss(z, z, temperature=0.2)\n"
        "b: tuple[torch.Tensor, PairStats] = mio_loss(z, z, return_stats=True)\n"
        "c: torch.Tensor = siglip_loss(z, z, 10.0, torch.zeros(()), text_offset=0)\n"
        "d: tuple[torch.Tensor, PairStats] = siglip_loss(z, z, 10.0, return_stats=True)\n"
        "e: torch.Tensor = MIOLoss()(z, z)\n"
        "f: str = mio_loss(z, z)  # wrong\n"
        "g = mio_loss(z, z, temprature=0.5)  # wrong\n"
        "from typing import assert_type\n"  # what a call gives, not only what it may be assigned to
        "assert_type(MIOLoss(temperature=torch.nn.Parameter(z[0, 0]))(z, z, labels=z[:, 0].long()), torch.Tensor)\n"
        "assert_type(SigLIPLoss(rank=0)(z, z, 10.0, z[0, 0]), torch.Tensor)\n"
        "assert_type(SigLIPLoss()(z, z, 10.0, output_dict=True), dict[str, torch.Tensor])\n"
        "assert_type(distributed.mio_loss(z, z), torch.Tensor)\n"
        "assert_type(mio_loss(z, z, return_stats=True)[1].positive_cosine, torch.Tensor)\n"
        "assert_type(__version__, str)\n"
        "MIOLoss()(z)  # wrong\n"
        "MIOLoss(temperature='warm')  # wrong\n"
        "SigLIPLoss()(z, z)  # wrong\n"
    )
    result = run_python("-m", "mypy", str(tmp_path / "user.py"), env={"MYPYPATH": str(ROOT)})
    errors = [line for line in result.stdout.splitlines() if "error:" in line and "user.py" in line]
    assert ":9: error: Incompatible types" in errors[0], result
    assert {int(error.split(":")[1]) for error in errors} == {9, 10, 18, 19, 20}, result


def test_readme_names_the_two_commands_first():
    commands = re.findall(r"^    (make \w+|python \S+|pip \S+)", README, re.MULTILINE)
    assert commands[:2] == ["make pretrain", "make test"]


def test_readme_equivalence():
    block = re.search(r"## Equivalence.*?```python\n(.*?)```", README, re.DOTALL)[1]
    z1, z2 = views(7, 5, torch.float64)
    index = torch.arange(14)
    names = {
        "torch": torch,
        "F": F,
        "z1": z1,
        "z2": z2,
        "B": 7,
        "tau": 0.3,
        "lam": 0.6,
        # The diagonal of positives there is the upper one; by symmetry it stands for both.
        "neither_self_nor_partner": (index[:, None] != index) & ((index[:, None] + 7) % 14 != index),
    }
    exec(block, names)
    assert relative_error(mio_ext.mio_loss(z1, z2, temperature=0.3, regularizer=0.6), names["loss"]) < 1e-12


def test_readme_figures_are_the_data():
    result = run_python("benchmarks/report.py", "--check")
    assert result.returncode == 0, result.stderr


def test_the_api_page_is_the_docstrings():
    """And so no public name is missing."""
    result = run_python("docs/api.py", "--check")
    assert result.returncode == 0, result.stderr


def test_what_looks_public_is():
    for module in (mio_ext.distributed, mio_ext.reference, mio_ext.analysis):
        own = [n for n, t in vars(module).items() if callable(t) and getattr(t, "__module__", "") == module.__name__]
        assert [n for n in own if not n.startswith("_") and n not in module.__all__] == []


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
