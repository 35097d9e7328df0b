# SPDX-License-Identifier: Apache-2.0
"""MIOLoss and SigLIPLoss as modules: what they print, copies, files, other processes, export, help()."""

import copy
import io
import pickle
import pydoc
import re
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOLERANCE, relative_error, run_python, views
from torch import nn

import mio_ext
from mio_ext import MIOLoss, SigLIPLoss, mio_loss


def learnt():
    return MIOLoss(nn.Parameter(torch.tensor(0.3)), bias=nn.Parameter(torch.tensor([-0.5])))


def value(loss):
    x, y = views(6, 5)
    return loss(x, y) if isinstance(loss, MIOLoss) else loss(x, y, 10.0, -10.0)


LOSSES = {
    "MIO": lambda: MIOLoss(temperature=0.2, negative_temperature=0.4),
    "learnt MIO": learnt,
    "MIO of a tensor": lambda: MIOLoss(torch.tensor(0.3)),
    "SigLIP": SigLIPLoss,
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]()


@pytest.mark.parametrize(
    "module, text",
    [
        (
            MIOLoss(0.2, bias=-1.0, gather_distributed=True),
            "MIOLoss(temperature=0.2, negative_temperature=None, negative_weight=1.0, regularizer=1.0, bias=-1.0, "
            "backend='auto', gather_distributed=True)",
        ),
        (
            learnt(),
            "MIOLoss(temperature=0.3 (learnt), negative_temperature=None, negative_weight=1.0, regularizer=1.0, "
            "bias=-0.5 (learnt), backend='auto', gather_distributed=False)",
        ),
        (SigLIPLoss(backend="cpu"), "SigLIPLoss(backend='cpu')"),
        (
            SigLIPLoss(rank=1, world_size=2, dist_impl="shift"),
            "SigLIPLoss(rank=1, world_size=2, exchange='ring', backend='auto')",
        ),
    ],
)
def test_repr(module, text):
    assert repr(module) == text
    # A value that is not at hand, on a GPU say, is not waited for.
    assert repr(module.to("meta")) == re.sub(r"=[-\d.]+ \(learnt\)", "=tensor on meta (learnt)", text)


def test_copies_and_pickles_are_the_same_loss(loss):
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for other in (
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        torch.load(file, weights_only=False),
    ):
        assert repr(other) == repr(loss) and torch.equal(value(other), value(loss))
        for mine, theirs in zip(loss.parameters(), other.parameters(), strict=True):
            assert mine is not theirs


def test_a_copied_model_learns_the_number_it_shares_with_its_loss():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(0.3))
            self.loss = MIOLoss(temperature=self.temperature)

    model = copy.deepcopy(Model())
    assert model.loss.temperature is model.temperature
    value(model.loss).backward()
    assert model.temperature.grad != 0


def test_pickled_into_another_process(tmp_path):
    with open(tmp_path / "loss.pickle", "wb") as file:
        pickle.dump((learnt(), SigLIPLoss(), views(6, 5)), file)
    script = (
        "import pickle, sys\n"
        "mio, siglip, (x, y) = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(repr(mio), mio(x, y).item(), siglip(x, y, 10.0, -10.0).item(), sep='\\n')\n"
    )
    result = run_python("-c", script, str(tmp_path / "loss.pickle"))
    assert result.returncode == 0, result.stderr
    text, mio, siglip = result.stdout.splitlines()
    assert text == repr(learnt())
    # Another process may have another number of threads, which changes no bit.
    assert float(mio) == value(learnt()).item() and float(siglip) == value(SigLIPLoss()).item()


def test_state_dict_is_what_is_learnt_and_nothing_else():
    assert {name: loss().state_dict().keys() for name, loss in LOSSES.items()} == {
        "MIO": set(),
        "learnt MIO": {"temperature", "bias"},
        "MIO of a tensor": set(),  # as before such tensors moved with the module: old checkpoints load
        "SigLIP": set(),
    }
    other = learnt()
    with torch.no_grad():
        other.temperature.fill_(0.7)
    assert not torch.equal(value(other), value(learnt()))
    mine = learnt()
    assert mine.load_state_dict(other.state_dict(), strict=True) and torch.equal(value(mine), value(other))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"temperature\", \"bias\""):
        learnt().load_state_dict({})


def test_numbers_move_with_the_module():
    """To a device, meta standing for a GPU, and to another precision."""
    for loss in (learnt(), MIOLoss(torch.tensor(0.3))):
        assert loss.to("meta").temperature.device.type == "meta"
        z = torch.randn(6, 5, device="meta")
        assert loss(z, z).device.type == "meta"
    double = MIOLoss(torch.tensor(0.25)).double()
    z = views(6, 5, torch.float64)
    assert double.temperature.dtype is torch.float64
    assert relative_error(double(*z), mio_loss(*z, temperature=0.25)) < 1e-15


class Network(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.linear, self.loss = nn.Linear(5, 3), loss

    def forward(self, x, y):
        x, y = self.linear(x), self.linear(y)
        return self.loss(x, y) if isinstance(self.loss, MIOLoss) else self.loss(x, y, 10.0, -10.0)


def test_exported_with_its_model_saved_loaded_and_run_on_another_batch(loss):
    network, batch = Network(loss), torch.export.Dim("batch", min=2)
    example = tuple(z.detach() for z in views(6, 5))
    program = torch.export.export(network, example, dynamic_shapes=({0: batch}, {0: batch}))
    assert program.state_dict.keys() == network.state_dict().keys()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other = views(11, 5, seed=1)
    values = loaded(*other), network(*other)
    of_loss, of_gradient = TOLERANCE[torch.float32]  # not to the bit: autograd adds up in the order of the graph
    assert relative_error(*values) < of_loss
    for value in values:
        value.backward()
    gradients = {name: p.grad for name, p in loaded.named_parameters()}
    assert gradients.keys() == dict(network.named_parameters()).keys()
    for name, parameter in network.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < of_gradient, name


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("module", [MIOLoss(), SigLIPLoss(), Network(MIOLoss())])
def test_scripting_is_refused_in_a_sentence(module):
    with pytest.raises(RuntimeError, match=r"^(MIO|SigLIP)Loss: torch.jit.script cannot compile it; use torch.compile"):
        torch.jit.script(module)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"temperature": -1.0}, ValueError, "MIOLoss: temperature must be positive and finite, got -1.0"),
        ({"temperature": None}, TypeError, "MIOLoss: temperature must be a float or a tensor of one element"),
        ({"negative_temperature": 0.0}, ValueError, "MIOLoss: negative_temperature must be positive and finite"),
        ({"regularizer": float("nan")}, ValueError, "MIOLoss: regularizer must be finite, got nan"),
        ({"bias": "none"}, TypeError, "MIOLoss: bias must be a float or a tensor of one element, got str"),
        (
            {"backend": "gpu"},
            ValueError,
            "MIOLoss: backend must be one of auto, cpu, cuda, triton, reference, got 'gpu'",
        ),
    ],
)
def test_what_no_call_could_take_is_refused_where_it_is_given(arguments, error, message):
    with pytest.raises(error, match=message):
        MIOLoss(**arguments)
    if "backend" in arguments:
        with pytest.raises(error, match="SigLIPLoss: backend must be one of auto, "):
            SigLIPLoss(**arguments)


@pytest.mark.parametrize(
    "thing", [MIOLoss, SigLIPLoss, MIOLoss.forward, SigLIPLoss.forward, mio_loss, mio_ext.siglip_loss]
)
def test_help_says_the_shapes(thing):
    text = pydoc.render_doc(thing, renderer=pydoc.plaintext)
    own = text.split("Methods inherited")[0]
    assert "[B, D]" in own or ("[M, D]" in own and "[K, D]" in own)
    assert "Define the computation performed at every call" not in own  # nn.Module's, which says nothing of ours
    assert "Initialize internal Module state" not in own


def test_the_version_and_the_types_are_the_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]  # of mio_ext/version.py, which setup.py reads
    assert mio_ext.__version__ == torch.ops.mio_ext.version()  # compiled in
    assert (Path(mio_ext.__file__).parent / "py.typed").is_file()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["mio_ext"]
