# SPDX-License-Identifier: Apache-2.0
"""The loss's knobs in the script: weight of the negatives, SigCLR, learnt numbers' own rate, several views, width."""

import json
import math

import pytest
import torch
from conftest import relative_error

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("safetensors.torch")

from mio_ext import reference
from mio_ext.encoder import load_encoder
from train import pretrain
from train.assemble import assemble
from train.config import Config
from train.errors import UserError
from train.objective import Objective
from train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def embeddings(rows, seed=1):
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_negative_temperature_and_weight_reach_the_loss_and_its_monitor():
    objective = Objective(Config(negative_temperature=0.2, negative_weight=3.0, bias=-1.0, batch_size=5))
    z1, z2 = embeddings(5), embeddings(5, 2)
    numbers = {"temperature": 0.5, "negative_temperature": 0.2, "negative_weight": 3.0, "bias": -1.0}
    assert relative_error(objective(z1, z2)[0], reference.mio_loss(z1, z2, **numbers)) < 1e-12
    z = torch.cat([z1, z2]).requires_grad_()
    (gradient,) = torch.autograd.grad(reference.mio_loss(*z.chunk(2), **numbers), z)
    assert objective.gradient_norms(z)["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-9)


def test_sigclr_sums_the_negatives_of_a_row():
    objective = Objective(Config(objective="sigclr", bias=-4.0, batch_size=5, regularizer=0.0))
    z1, z2 = embeddings(5), embeddings(5, 2)
    expected = reference.mio_loss(z1, z2, negative_weight=8.0, bias=-4.0, regularizer=0.0)
    assert relative_error(objective(z1, z2)[0], expected) < 1e-12


@pytest.mark.parametrize("objective", ["mio", "sigclr"])
def test_every_view_of_an_image_is_positive(objective):
    config = Config(objective=objective, views=4, batch_size=5, temperature=0.3, regularizer=0.5)
    z = embeddings(20)
    image = torch.arange(20) % 5
    unit = reference.normalized(z)
    logits = unit @ unit.T / 0.3
    same, other = image[:, None] == image, ~torch.eye(20, dtype=torch.bool)
    negatives = torch.nn.functional.softplus(logits[~same]).mean() * (16 if objective == "sigclr" else 1)
    squares = (unit[:, None] - unit).square().mean(-1)[same & other].mean()
    expected = torch.nn.functional.softplus(-logits[same & other]).mean() + negatives + 0.5 * squares
    assert relative_error(Objective(config)(*z.chunk(2))[0], expected) < 1e-12


@pytest.mark.parametrize("forward", ["fused", "separate"])
def test_a_step_of_four_views(forward):
    """Four different views of every image, in the order that the objective takes them for."""
    config = Config(device="cpu", precision="float32", batch_size=6, views=4, forward=forward, width=8)
    made = Trainer(config, assemble(config), None, None)
    made.network.eval()
    loss, stats, z = made.backward(made.batch_of(0), 0)
    assert (int(stats.positives), int(stats.negatives)) == (24 * 3, 24 * 20)
    assert torch.pdist(z).min() > 0 and z.isfinite().all()
    again = Trainer(config, assemble(config), None, None)
    again.network.eval()
    images = again.batch_of(0)
    view = again.views_of(images, 0)(torch.arange(24))
    assert relative_error(again.encode(view).detach(), z.detach()) < 1e-5
    expected = reference.mio_loss(*z.detach().chunk(2), labels=torch.arange(6).repeat(2))
    assert relative_error(loss.detach(), expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 3}, "--views must be even"),
        ({"objective": "simclr", "views": 4}, "--views belongs to mio and sigclr"),
        ({"objective": "siglip", "negative_weight": 2.0}, "--negative-weight belongs to mio and sigclr"),
        ({"learn_scale": True, "negative_temperature": 0.1}, "drop --negative-temperature"),
        ({"scale_learning_rate": 0.1}, "--scale-learning-rate needs --learn-scale or --learn-bias"),
        ({"objective": "simclr", "learn_bias": True}, "not for --objective simclr"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Config(**options)


def test_learnt_numbers_have_their_own_rate_and_a_narrow_encoder_comes_back(tmp_path):
    """One step of plain SGD moves the bias by its own rate times its gradient; a fixed temperature stays fixed."""
    folder = tmp_path / "run"
    options = ["--preset", "sigclr", "--scale-learning-rate", "0.01", "--warmup-epochs", "0", "--momentum", "0"]
    options += ["--batch-size", "16", "--width", "8", "--device", "cpu", "--limit-steps", "1", "--no-evaluate"]
    assert pretrain.run([*options, "--precision", "float32", "--output", str(folder)]) == 0
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert list(checkpoint["objective"]) == ["learnt_bias"]
    entry = json.loads((folder / "log.jsonl").read_text().splitlines()[1])
    assert entry["lr"] == pytest.approx(0.5)
    moved = float(checkpoint["objective"]["learnt_bias"]) + 10
    # dL/db = -mean σ(-l) over positives + mean over rows of the sum of σ(l), each within its bounds
    assert 0 < moved <= 0.01
    assert moved == pytest.approx(0.01 * (1 / (1 + math.exp(entry["positive_cosine"] / 0.2 - 10))), rel=0.1)
    encoder = load_encoder(folder)
    assert encoder.features(torch.zeros(2, 1, 8, 8)).shape == (2, 64)
    assert "torchvision.models" not in (folder / "README.md").read_text()
