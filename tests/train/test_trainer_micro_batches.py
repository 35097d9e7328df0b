# SPDX-License-Identifier: Apache-2.0
"""--micro-batch-size: the same step in the memory of a smaller one."""

import itertools

import pytest
import torch
from conftest import relative_error
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
from train import pretrain
from train.assemble import assemble
from train.config import Config
from train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(**options):
    config = Config(device="cpu", precision="float32", **options)
    return Trainer(config, assemble(config), None, None)


def step(made):
    """(loss, embeddings, gradients) of the first step; batch norm is no obstacle to equality in evaluation mode."""
    made.network.eval()
    loss, _, z = made.backward(made.batch_of(0), 0)
    return loss.detach(), z.detach(), torch.cat([p.grad.flatten() for p in made.network.parameters()])


@pytest.mark.parametrize("forward", ["fused", "separate"])
def test_a_step_is_that_of_the_whole_batch(forward):
    whole = step(trainer(batch_size=22, forward=forward))
    for size in (8, 11):
        for ours, theirs in zip(
            step(trainer(batch_size=22, forward=forward, micro_batch_size=size)), whole, strict=True
        ):
            assert relative_error(ours, theirs) < 2e-6


def test_batch_norm_sees_a_micro_batch():
    one, many = trainer(batch_size=8), trainer(batch_size=24, micro_batch_size=8)
    for made in (one, many):
        made.setup.model.train()
        made.backward(made.batch_of(0), 0)
    counts = [int(b) for name, b in many.setup.model.named_buffers() if name.endswith("num_batches_tracked")]
    assert set(counts) == {3}  # once a micro-batch, not twice
    assert {int(b) for name, b in one.setup.model.named_buffers() if name.endswith("num_batches_tracked")} == {1}


def test_resume_is_exact(tmp_path, fast_probes):
    options = ["--batch-size", "24", "--micro-batch-size", "9", "--device", "cpu", "--log-every", "2", "--no-evaluate"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert pretrain.run([*options, "--limit-steps", "4", "--output", str(whole)]) == 0
    assert pretrain.run([*options, "--limit-steps", "2", "--output", str(parts)]) == 0
    assert pretrain.run(["--resume", str(parts), "--limit-steps", "4"]) == 0
    ours, theirs = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (parts, whole))
    for part in ("backbone", "projector"):
        for key, value in theirs[part].items():
            assert torch.equal(ours[part][key], value), key


def test_the_memory_is_that_of_a_micro_batch():
    def peak(**options):
        made = trainer(**options)
        images = made.batch_of(0)
        made.backward(images, 0)  # what is kept from step to step is there before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            made.backward(images, 0)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))

    small = peak(batch_size=32)
    assert peak(batch_size=256, micro_batch_size=32) < 1.1 * small
    assert peak(batch_size=256) > 3 * small  # the measurement works
