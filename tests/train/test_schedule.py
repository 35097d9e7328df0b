# SPDX-License-Identifier: Apache-2.0
"""What a step is made of: the order of the images, the learning rate, the weight decay."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from train.config import Config
from train.data import random_batches
from train.model import build_model
from train.optimizer import learning_rate, parameter_groups


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [learning_rate(step, 100, 10, 0.5) for step in range(101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] == pytest.approx(0.5 / 11)
    assert max(rates) == rates[10] == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0.0)


def test_batches_cover_an_epoch_once_and_are_shuffled():
    cpu = torch.device("cpu")
    batches = list(random_batches(10, 3, 0, 0, 6, cpu))
    assert [len(batch) for batch in batches] == [3] * 6  # 10 = 3 * 3 + 1: the incomplete batch is dropped
    epochs = [torch.cat(batches[:3]).tolist(), torch.cat(batches[3:]).tolist()]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    for start in (1, 3, 4):  # a resumed run goes on with the same batches
        rest = list(random_batches(10, 3, 0, start, 6, cpu))
        assert all(torch.equal(a, b) for a, b in zip(rest, batches[start:], strict=True))
    other = next(random_batches(10, 3, 1, 0, 1, cpu))
    assert other.tolist() != batches[0].tolist()


def test_weight_decay_spares_biases_and_batch_norm():
    model = build_model("resnet18", 1, "3x3", (16, 8))
    decayed, spared = parameter_groups(model, Config(weight_decay=0.1))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    batch_norm = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)]
    expected = {id(parameter) for module in batch_norm for parameter in module.parameters()}
    assert {id(parameter) for parameter in spared["params"]} == expected  # no layer here has a bias
