# SPDX-License-Identifier: Apache-2.0
"""backward_in_micro_batches: the gradient of one pass, in the memory of a small one."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
from conftest import relative_error
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from mio_ext import MIOLoss, backward_in_micro_batches, distributed, mio_loss, siglip_loss


def network(*extra, seed=0, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), *extra, nn.GELU(), nn.Linear(width, 5))


def inputs(batch=23):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 6, generator=generator)
    return x, x + 0.3 * torch.randn(batch, 6, generator=generator)


def gradients(*modules):
    return torch.cat([p.grad.flatten() for module in modules for p in module.parameters()])


@pytest.mark.parametrize("size", [1, 8, 23, 100])
def test_it_is_one_pass_without_batch_norm(size):
    micro, plain = network(), network()
    loss = MIOLoss(nn.Parameter(torch.tensor(0.4)))
    value = backward_in_micro_batches(micro, inputs(), loss, size)
    learnt, loss.temperature.grad = loss.temperature.grad, None
    expected = loss(*(plain(z) for z in inputs()))
    expected.backward()
    assert not value.requires_grad and relative_error(value, expected) < 1e-6
    assert relative_error(gradients(micro), gradients(plain)) < 1e-6
    assert relative_error(learnt, loss.temperature.grad) < 1e-6


def test_gradients_add_up_as_backward_has_it():
    net = network()
    backward_in_micro_batches(net, inputs(), mio_loss, 7)
    once = gradients(net)
    backward_in_micro_batches(net, inputs(), mio_loss, 7)
    torch.testing.assert_close(gradients(net), 2 * once)


def test_two_encoders_and_a_loss_scale():
    image, text = network(seed=1), network(seed=2)
    siglip = lambda x, y: siglip_loss(x, y, 5.0, -2.0, normalize=True)  # noqa: E731
    backward_in_micro_batches([image, text], inputs(), siglip, 5, backward=lambda loss: (64 * loss).backward())
    scaled = gradients(image, text)
    plain = copy.deepcopy((image, text))
    for module in plain:
        module.zero_grad()
    siglip(*(module(z) for module, z in zip(plain, inputs(), strict=True))).backward()
    assert relative_error(scaled / 64, gradients(*plain)) < 1e-6


def test_autocast_around_all_of_it_costs_no_gradient():
    """Autocast keeps a weight's 16-bit copy; one that was made without gradient must not serve the second run."""
    micro, plain = network(), network()
    with torch.autocast("cpu", torch.bfloat16):
        backward_in_micro_batches(micro, inputs(), mio_loss, 8)
        mio_loss(*(plain(z) for z in inputs())).backward()
    assert relative_error(gradients(micro), gradients(plain)) < 1e-2


def in_pieces(net, size):
    """What the docstring promises for batch norm and dropout: one graph over micro-batches."""
    return mio_loss(*(torch.cat([net(piece) for piece in z.split(size)]) for z in inputs()))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(16), nn.Dropout(0.5)], ids=["batch norm", "dropout"])
def test_batch_norm_and_random_numbers_are_those_of_the_micro_batches(layer):
    micro, plain = network(copy.deepcopy(layer)), network(copy.deepcopy(layer))
    torch.manual_seed(3)
    value = backward_in_micro_batches(micro, inputs(), mio_loss, 8)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    expected = in_pieces(plain, 8)
    expected.backward()
    assert torch.equal(value, expected.detach()) and relative_error(gradients(micro), gradients(plain)) < 1e-6
    assert torch.equal(state, torch.get_rng_state()), "what is drawn next is what one pass would draw"
    for ours, theirs in zip(micro.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_activations_of_a_micro_batch_at_a_time():
    """Eight times the samples in less than twice the memory; in one pass nearly eight times."""

    def peak(step):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))

    wide = network(width=4096)
    wide.requires_grad_(False)[0].bias.requires_grad_()  # what the parameters take does not matter here
    one, many = inputs(16), inputs(128)
    small = peak(lambda: backward_in_micro_batches(wide, one, mio_loss, 16))
    assert peak(lambda: backward_in_micro_batches(wide, many, mio_loss, 16)) < 2 * small
    assert peak(lambda: mio_loss(*(wide(z) for z in many)).backward()) > 6 * small


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((network(), inputs(), mio_loss, 0), "micro_batch_size must be at least 1, got 0"),
        ((network(), (), mio_loss, 2), r"inputs must be tensors of one length, got \[\]"),
        ((network(), (torch.ones(3, 6), torch.ones(4, 6)), mio_loss, 2), r"of one length, got \[3, 4\]"),
        (([network()], inputs(), mio_loss, 2), "encoders must be one, or one for each of 2 inputs, got 1"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        backward_in_micro_batches(*arguments)


def over_processes(form):
    """Gradients after a step of DistributedDataParallel, and how often it averaged them."""
    rank, count = dist.get_rank(), itertools.count()
    net = DistributedDataParallel(network())

    def counting(state, bucket):
        next(count)
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    net.register_comm_hook(None, counting)
    own = [z.chunk(4)[rank] for z in inputs(24)]
    value = backward_in_micro_batches(net, own, lambda a, b: distributed.mio_loss(a, b, exchange=form), 4)
    return value, gradients(net.module), next(count)


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_over_processes_gradients_are_averaged_once(form, pool):
    plain = network()
    expected = mio_loss(*(plain(z) for z in inputs(24)))
    expected.backward()
    for value, gradient, averaged in pool.run(over_processes, form):
        assert averaged == 1  # all parameters are one bucket
        assert relative_error(value, expected) < 1e-6
        assert relative_error(gradient, gradients(plain)) < 1e-6
