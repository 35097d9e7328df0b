# SPDX-License-Identifier: Apache-2.0
"""What PyTorch does to a function of ours: torch.func, torch.compile, torch.export, tracing, fake and meta tensors.

A gradient is the right one or an error; never zeros, never None.
"""

from functools import partial

import pytest
import torch
from conftest import relative_error, views
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mio_ext import MIOLoss, mio_loss, reference, siglip_loss

LOSSES = {"mio": mio_loss, "siglip": partial(siglip_loss, logit_scale=10.0, logit_bias=-3.0, normalize=True)}
SECOND = "no second derivative; pass backend='reference'"


@pytest.fixture(params=list(LOSSES))
def loss(request, backend):
    """A loss of two matrices."""
    return partial(LOSSES[request.param], backend=backend[0])


@pytest.fixture
def pair(backend):
    return tuple(z.detach() for z in views(6, 5, device=backend[1]))


def gradients(loss, *inputs):
    """The usual way."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(loss(*inputs), inputs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_func_grad(loss, pair, dtype, compiled):
    pair = [z.to(dtype) for z in pair]
    made = torch.func.grad(loss, argnums=(0, 1))
    if compiled:
        torch.compiler.reset()
        made = torch.compile(made, fullgraph=True)
    for ours, expected in zip(made(*pair), gradients(loss, *pair), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-8)


def test_func_vjp(loss, pair):
    value, pull_back = torch.func.vjp(loss, *pair)
    torch.testing.assert_close(value, loss(*pair))
    for ours, expected in zip(pull_back(torch.full_like(value, 3)), gradients(loss, *pair), strict=True):
        torch.testing.assert_close(ours, 3 * expected)


def test_gradients_of_numbers_by_func_grad(backend, pair):
    tau = torch.tensor(0.3, device=backend[1])

    def of_tau(tau):
        return mio_loss(*pair, temperature=tau, backend=backend[0])

    torch.testing.assert_close(torch.func.grad(of_tau)(tau), gradients(of_tau, tau)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_func_vmap(loss, pair, compiled):
    """Samples of their own, and gradients of each."""
    z1, z2 = torch.stack([pair[0], pair[1], 2 * pair[0]]), torch.stack([pair[1], pair[0], pair[1]])
    made = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, 1))
    if compiled:
        torch.compiler.reset()
        made = torch.compile(made, fullgraph=True)
    grads, values = made(z1, z2.transpose(0, 1))
    for i in range(3):
        torch.testing.assert_close(values[i], loss(z1[i], z2[i]))
        torch.testing.assert_close(grads[i], gradients(loss, z1[i], z2[i])[0])


def test_gradient_of_a_vmap(loss, pair):
    """Here the one that differentiates is outside: within vmap no tensor says that it requires a gradient."""
    z1 = torch.stack([pair[0], pair[1] + 1])
    ours = torch.func.grad(lambda z: torch.func.vmap(loss, in_dims=(0, None))(z, pair[1]).sum())(z1)
    for i in range(2):
        torch.testing.assert_close(ours[i], gradients(loss, z1[i], pair[1])[0])


def test_vmap_over_ids(backend, pair):
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2]], device=backend[1])
    values = torch.func.vmap(lambda i: siglip_loss(*pair, 10.0, image_ids=i, text_ids=i, backend=backend[0]))(ids)
    labelled = torch.func.vmap(lambda i: mio_loss(*pair, labels=i, backend=backend[0]))(ids)
    for i in range(2):
        torch.testing.assert_close(values[i], siglip_loss(*pair, 10.0, image_ids=ids[i], text_ids=ids[i]))
        torch.testing.assert_close(labelled[i], mio_loss(*pair, labels=ids[i]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_gradients(backend, pair, dtype):
    z1, z2 = (z.to(dtype).requires_grad_() for z in pair)
    losses = torch.stack([mio_loss(z1, z2, temperature=tau, backend=backend[0]) for tau in (0.2, 0.5, 1.0)])
    rows = torch.eye(3, device=backend[1])
    batched = torch.autograd.grad(losses, z1, rows, is_grads_batched=True, retain_graph=True)[0]
    for row, ours in zip(rows, batched, strict=True):
        assert torch.equal(ours, torch.autograd.grad(losses, z1, row, retain_graph=True)[0])


def test_second_derivatives_are_refused(loss, pair):
    """Each of these would be zeros, if the op's gradient had no history."""
    twice = {
        "grad of grad": torch.func.grad(lambda z: torch.func.grad(loss)(z, pair[1]).square().sum()),
        "jacrev of grad": torch.func.jacrev(torch.func.grad(lambda z: loss(z, pair[1]))),
        "grad of vjp": torch.func.grad(
            lambda z: torch.func.vjp(lambda a: loss(a, pair[1]), z)[1](torch.ones(()))[0].sum()
        ),
    }
    for name, second in twice.items():
        with pytest.raises(RuntimeError, match=SECOND):
            print(name, second(pair[0]))


def test_forward_mode_is_refused(loss, pair):
    forward = {
        "jvp": lambda z: torch.func.jvp(lambda a: loss(a, pair[1]), (z,), (z,)),
        "jacfwd": torch.func.jacfwd(lambda a: loss(pair[0], a)),
        "hessian": torch.func.hessian(lambda a: loss(a, pair[1])),
    }
    for name, tangent in forward.items():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative; pass backend='reference'"):
            print(name, tangent(pair[0]))


def test_the_reference_has_them(pair):
    def loss(z):
        return mio_loss(z, pair[1], backend="reference")

    _, tangent = torch.func.jvp(loss, (pair[0],), (pair[1],))
    torch.testing.assert_close(tangent.float(), (gradients(loss, pair[0])[0] * pair[1]).sum())
    assert torch.func.hessian(loss)(pair[0]).norm() > 0.01


@pytest.mark.parametrize("compiled", [False, True])
def test_one_tensor_as_both_sides(loss, pair, compiled):
    z = pair[0].clone().requires_grad_()
    torch.compiler.reset()
    call = torch.compile(loss, fullgraph=True) if compiled else loss
    (ours,) = torch.autograd.grad(call(z, z), z)
    torch.testing.assert_close(ours, sum(gradients(loss, z, z)), rtol=1e-5, atol=1e-7)


class Net(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.layer, self.loss = nn.Linear(5, 7), loss

    def forward(self, *inputs):
        return self.loss(*(self.layer(t) if t.is_floating_point() else t for t in inputs))


def with_ids(x, y, ids, backend):
    return siglip_loss(x, y, 10.0, image_ids=ids, text_ids=ids, backend=backend)


EXPORTED = {
    "mio": (mio_loss, 2),
    "labels": (lambda z1, z2, ids, backend: mio_loss(z1, z2, labels=ids, backend=backend), 3),
    "siglip": (partial(siglip_loss, logit_scale=10.0), 2),
    "ids": (with_ids, 3),
}


@pytest.mark.parametrize("name", ["fused", "reference"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_export_with_any_batch(kind, name, backend):
    """The exported program runs with another batch, and its gradients are ours."""
    fused, device = backend
    function, count = EXPORTED[kind]
    net = Net(partial(function, backend=fused if name == "fused" else name)).to(device)

    def inputs(batch):
        return (*(z.detach() for z in views(batch, 5, device=device)), torch.arange(batch, device=device) // 2)[:count]

    batch = torch.export.Dim("batch", min=2)
    shapes = {"inputs": tuple({0: batch} for _ in range(count))}
    module = torch.export.export(net, inputs(6), dynamic_shapes=shapes).module()
    for rows in (6, 11):
        value, expected = module(*inputs(rows)), net(*inputs(rows))
        torch.testing.assert_close(value, expected)
        ours = torch.autograd.grad(value, list(module.parameters()))
        for a, b in zip(ours, torch.autograd.grad(expected, list(net.parameters())), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_reference_as_written_exports_with_any_batch():
    batch = torch.export.Dim("batch", min=2)
    ids = torch.arange(6) // 2
    programs = {
        "mio": (lambda a, b, i: reference.mio_loss(a, b), ids),
        "labels": (lambda a, b, i: reference.mio_loss(a, b, labels=i), ids),
        "siglip": (lambda a, b, i: reference.siglip_loss(a, b, 10.0), ids),
    }
    for name, (function, _) in programs.items():
        net, (z1, z2) = Net(function), views(6, 5)
        program = torch.export.export(
            net, (z1.detach(), z2.detach(), ids), dynamic_shapes={"inputs": ({0: batch}, {0: batch}, {0: batch})}
        )
        z1, z2 = views(9, 5)
        (
            torch.testing.assert_close(
                program.module()(z1, z2, torch.arange(9) // 2), net(z1, z2, torch.arange(9) // 2)
            ),
            name,
        )


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_graphs_with_ids(mode, pair, backend):
    ids = torch.arange(6, device=backend[1]) // 2
    graph = make_fx(partial(with_ids, backend=backend[0]), tracing_mode=mode)(*pair, ids)
    torch.testing.assert_close(graph(*pair, ids), with_ids(*pair, ids, backend[0]))


def test_fake_tensors(backend):
    name, device = backend
    with FakeTensorMode():
        z1, z2 = (torch.randn(6, 5, device=device, requires_grad=True) for _ in range(2))
        ids = torch.arange(6, device=device)
        for value in (mio_loss(z1, z2, labels=ids, backend=name), with_ids(z1, z2, ids, name)):
            value.backward()
            assert value.shape == () and z1.grad.shape == z2.grad.shape == (6, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_tensors(dtype):
    """Shapes without memory, as for a model that is only planned."""
    z1, z2 = (torch.empty(6, 5, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
    ids = torch.empty(6, dtype=torch.int64, device="meta")
    values = [MIOLoss()(z1, z2), mio_loss(z1, z2, labels=ids), siglip_loss(z1, z2, 10.0), with_ids(z1, z2, ids, "auto")]
    for value in (*values, reference.mio_loss(z1, z2), reference.mio_loss(z1, z2, labels=ids)):
        value.backward()
        assert value.is_meta and value.shape == () and z1.grad.shape == z2.grad.shape == (6, 5)


def test_jit_trace_says_what_to_do(pair, backend):
    net = Net(partial(mio_loss, backend=backend[0])).to(backend[1])
    with pytest.raises(RuntimeError, match=r"mio_loss: torch\.jit\.trace, and so TensorBoard's add_graph, "):
        torch.jit.trace(net, pair)
    net.loss = partial(mio_loss, backend="reference")
    torch.testing.assert_close(torch.jit.trace(net, pair)(*pair), net(*pair))


def test_compiled_autograd(loss, pair):
    z1, z2 = (z.requires_grad_() for z in pair)
    expected = torch.autograd.grad(loss(z1, z2), [z1, z2])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss(z1, z2).backward()
    for z, gradient in zip((z1, z2), expected, strict=True):
        assert relative_error(z.grad, gradient) < 1e-6


def test_saved_tensor_hooks_see_the_gradient(loss, pair):
    """Activation offloading moves what the backward pass needs, and brings it back."""
    z1, z2 = (z.requires_grad_() for z in pair)
    expected = torch.autograd.grad(loss(z1, z2), [z1, z2])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        ours = torch.autograd.grad(loss(z1, z2), [z1, z2])
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
