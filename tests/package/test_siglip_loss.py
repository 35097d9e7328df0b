# SPDX-License-Identifier: Apache-2.0
"""siglip_loss and SigLIPLoss: against the reference, and against the two libraries people use today."""

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TOLERANCE, GradientsAskedFor, assert_no_worse_than, relative_error
from process_pool import groups
from torch import nn

from mio_ext import SigLIPLoss, distributed, mio_loss, reference, siglip_loss


def towers(m, k, dim, dtype=torch.float32, device="cpu", seed=0):
    """Normalised, correlated features that require grad."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (m, k))
    common = min(m, k)
    y[:common] += 0.7 * x[:common]
    return tuple(F.normalize(t).to(device, dtype).requires_grad_() for t in (x, y))


def numbers(scale, bias, shape=(), dtype=torch.float32, device="cpu"):
    return [torch.full(shape, v, dtype=dtype, device=device, requires_grad=True) for v in (scale, bias)]


@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (100.0, -10.0), (100.0, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("batch, dim", [(9, 4), (33, 20), (300, 512), (64, 1152)])
def test_loss_and_gradients(batch, dim, scale, bias, dtype, backend):
    name, device = backend
    x, y = towers(batch, batch, dim, dtype, device)
    number_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def run(backend, to, number_dtype):
        inputs = [t.detach().to(to).requires_grad_() for t in (x, y)]
        inputs += numbers(scale, bias, dtype=number_dtype, device=device)
        loss = siglip_loss(*inputs, backend=backend)
        return loss, torch.autograd.grad(loss * 64, inputs)

    loss, grads = run(name, dtype, number_dtype)
    plain_loss, plain_grads = run("reference", dtype, number_dtype)
    exact_loss, exact_grads = run("reference", torch.float64, torch.float64)
    loss_limit, grad_limit = TOLERANCE[dtype]
    assert_no_worse_than(loss, plain_loss, exact_loss, loss_limit)
    for ours, plain, exact in zip(grads[:2], plain_grads, exact_grads, strict=False):
        assert ours.dtype == dtype
        assert_no_worse_than(ours, plain, exact, grad_limit)
    for ours, exact in zip(grads[2:], exact_grads[2:], strict=True):
        assert relative_error(ours, exact) < max(1e-5, TOLERANCE[dtype][0])


def test_equals_equation_14(backend):
    name, device = backend
    x, y = towers(20, 50, 16, device=device)
    ids = torch.arange(50, device=device) // 2
    for options in (
        {},
        {"text_offset": 30},
        {"negative_only": True},
        {"image_ids": ids[:20], "text_ids": ids},
        {"normalize": True},
    ):
        ours = siglip_loss(3 * x, y, 10.0, -5.0, backend=name, **options)
        exact = reference.siglip_loss(3 * x.double(), y.double(), 10.0, -5.0, **options)
        assert relative_error(ours, exact) < 1e-6, options


def test_blocks_of_texts_add_up(backend):
    """What a process group does: own images against every rank's texts, positives in one block only."""
    name, device = backend
    x, y = towers(24, 24, 16, device=device)
    own, texts = x[8:16], y.split(8)
    whole = siglip_loss(own, y, 10.0, -5.0, text_offset=8, backend=name)
    parts = [siglip_loss(own, t, 10.0, -5.0, negative_only=i != 1, backend=name) for i, t in enumerate(texts)]
    torch.testing.assert_close(whole, sum(parts))
    whole_grad = torch.autograd.grad(whole, [x, y])
    for a, b in zip(whole_grad, torch.autograd.grad(sum(parts), [x, y]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("frozen", ["image", "text", "both"])
def test_frozen_towers(frozen, backend):
    name, device = backend
    x, y = towers(30, 30, 16, device=device)
    scale, bias = numbers(10.0, -5.0, device=device)
    full = torch.autograd.grad(siglip_loss(x, y, scale, bias, backend=name), [x, y, scale, bias])
    a = x.detach() if frozen in ("image", "both") else x
    b = y.detach() if frozen in ("text", "both") else y
    with GradientsAskedFor() as calls:
        loss = siglip_loss(a, b, scale, bias, backend=name)
    assert calls.seen == [[a is x, b is y, True]]
    wanted = [t for t in (a, b, scale, bias) if t.requires_grad]
    expected = [g for t, g in zip((a, b, scale, bias), full, strict=True) if t.requires_grad]
    for ours, whole in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        assert torch.equal(ours, whole)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_gradcheck_on_every_input(shape, backend):
    name, device = backend
    x, y = towers(5, 5, 4, torch.float64, device)
    scale, bias = numbers(3.0, -1.0, shape, torch.float64, device)
    assert torch.autograd.gradcheck(lambda *a: siglip_loss(*a, backend=name), (x, y, scale, bias))
    assert siglip_loss(x, y, scale, bias, backend=name).shape == ()


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk_size", [0, 16])
def test_drop_in_for_open_clip(shape, with_bias, chunk_size, backend):
    open_clip = pytest.importorskip("open_clip.loss", reason="open_clip_torch is not installed")
    name, device = backend
    results = []
    for loss in (
        open_clip.SigLipLoss(cache_labels=True, rank=0, world_size=1),
        SigLIPLoss(cache_labels=True, rank=0, world_size=1, chunk_size=chunk_size, backend=name),
    ):
        x, y = towers(48, 48, 32, device=device)
        scale, bias = numbers(12.0, -8.0, shape, device=device)
        inputs = [x, y, scale] + [bias] * with_bias
        logit_bias = bias if with_bias else None
        value = loss(image_features=x, text_features=y, logit_scale=scale, logit_bias=logit_bias, output_dict=True)
        assert list(value) == ["contrastive_loss"]
        value = value["contrastive_loss"]
        assert value.shape == ()
        results.append((value, *torch.autograd.grad(value, inputs)))
    for theirs, ours in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images, texts):
        return {
            "image_features": F.normalize(self.image(images)),
            "text_features": F.normalize(self.text(texts)),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def test_fifty_steps_beside_open_clip():
    open_clip = pytest.importorskip("open_clip.loss", reason="open_clip_torch is not installed")
    histories = []
    for loss in (open_clip.SigLipLoss(), SigLIPLoss()):
        torch.manual_seed(0)
        model = TwoTowers()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        history = []
        for _ in range(50):
            images = torch.randn(64, 24)
            texts = images.roll(1, dims=1) + 0.1 * torch.randn(64, 24)
            value = loss(**model(images, texts), output_dict=True)["contrastive_loss"]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            history.append(value.item())
        histories.append(torch.tensor(history, dtype=torch.float64))
    theirs, ours = histories
    assert theirs[-1] < 0.7 * theirs[0]  # it did train
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_fifty_steps_beside_hugging_face():
    """The adapter documented in the README: ask the model for its outputs, hand them over."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**small, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 32},
        vision_config={**small, "image_size": 16, "patch_size": 8},
    )

    def their_loss(model, **batch):
        return model(**batch, return_loss=True).loss

    def our_loss(model, **batch):
        out = model(**batch)
        return siglip_loss(out.image_embeds, out.text_embeds, model.logit_scale.exp(), model.logit_bias)

    histories = []
    for loss in (their_loss, our_loss):
        torch.manual_seed(0)
        model = transformers.SiglipModel(config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        history = []
        for _ in range(50):
            batch = {"pixel_values": torch.randn(16, 3, 16, 16), "input_ids": torch.randint(50, (16, 8))}
            value = loss(model, **batch)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            history.append(value.item())
        histories.append(torch.tensor(history, dtype=torch.float64))
    theirs, ours = histories
    assert theirs[-1] < 0.9 * theirs[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_compiles_as_one_graph(backend):
    name, device = backend

    def step(x, y, scale, bias):
        return siglip_loss(F.normalize(x), F.normalize(y), scale.exp(), bias, backend=name)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    for batch in range(8, 56, 4):  # more sizes than PyTorch is willing to compile anew
        x, y = towers(batch, batch, 10, device=device)
        inputs = [x, y, *numbers(2.0, -5.0, (1,), device=device)]
        expected, loss = step(*inputs), compiled(*inputs)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_second_derivative_is_refused(backend):
    name, device = backend
    x, y = towers(6, 6, 4, device=device)
    for inputs in ((x, y), (x.detach(), y)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(siglip_loss(*inputs, 10.0, backend=name), y, create_graph=True)


def test_stats_find_the_positives(backend):
    name, device = backend
    x, y = towers(20, 50, 16, device=device)
    _, stats = siglip_loss(x, y, 10.0, -5.0, text_offset=30, backend=name, return_stats=True)
    assert (stats.positives, stats.negatives) == (20, 20 * 49)
    torch.testing.assert_close(stats.positive_cosine.float(), (x * y[30:]).sum(1).mean().detach())
    _, stats = siglip_loss(x, y, 10.0, -5.0, negative_only=True, backend=name, return_stats=True)
    assert stats.positives == 0 and stats.positive_cosine.isnan()


X = F.normalize(torch.randn(4, 3))
IDS = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((X, X[0], 10.0), {}, ValueError, r"text_features must be two-dimensional, \[B, D\], got \[3\]"),
        ((X, X[:, :2], 10.0), {}, ValueError, r"text_features must be \[K, D\].* got \[4, 3\] and \[4, 2\]"),
        ((X[:0], X[:0], 10.0), {}, ValueError, r"no side empty, got \[0, 3\] and \[0, 3\]"),
        ((X, X.int(), 10.0), {}, TypeError, r"text_features must be float32.* got torch.int32"),
        ((X, X.to("meta"), 10.0), {}, ValueError, r"text_features must be on cpu like image_features, got meta"),
        ((X, X, 0.0), {}, ValueError, r"logit_scale must be positive and finite, got 0.0"),
        ((X, X, 1e-310), {}, ValueError, r"logit_scale must be from 1e-30 to 1e\+30 in torch.float32, got 1e-310"),
        ((X, X, 10.0, -2e30), {}, ValueError, r"logit_bias must be from -1e\+30 to 1e\+30 in torch.float32"),
        ((X, X, -3.0), {}, ValueError, r"logit_scale must be positive and finite, got -3.0"),
        ((X, X, None), {}, TypeError, r"logit_scale must be a float or .* got NoneType"),
        ((X, X, torch.ones(4)), {}, ValueError, r"logit_scale must be .* one element, got \[4\]"),
        ((X, X, 10.0, math.nan), {}, ValueError, r"logit_bias must be finite, got nan"),
        ((X, X[:2], 10.0), {}, ValueError, r"text_offset must be in .* for 4 images and 2 texts, got 0"),
        ((X, X, 10.0), {"text_offset": 1.5}, TypeError, r"text_offset must be an int, got float"),
        ((X, X, 10.0), {"text_offset": torch.tensor(0)}, TypeError, r"text_offset must be an int, got Tensor"),
        ((X, X, 10.0), {"text_offset": 1}, ValueError, r"text_offset must be in \[0, 0\].* got 1"),
        ((X, X, 10.0), {"image_ids": IDS}, ValueError, r"image_ids and text_ids must be given together"),
        ((X, X, 10.0), {"image_ids": IDS, "text_ids": IDS[:3]}, ValueError, r"text_ids must be \[4\].* got \[3\]"),
        ((X, X, 10.0), {"image_ids": IDS, "text_ids": IDS.float()}, TypeError, r"text_ids must be integers"),
        ((X, X, 10.0), {"image_ids": IDS, "text_ids": IDS // 2}, ValueError, r"image 2 \(id 2\) has none"),
        ((X, X, 10.0), {"image_ids": IDS, "text_ids": IDS, "negative_only": True}, ValueError, r"ids already say"),
        ((X, X, 10.0), {"backend": "numpy"}, ValueError, r"backend must be one of auto.* got 'numpy'"),
    ],
)
def test_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        siglip_loss(*args, **kwargs)
    assert str(caught.value).startswith("siglip_loss: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["fused", "reference"])
@pytest.mark.parametrize("bad", [math.nan, 0.0, -0.5, math.inf])
def test_a_bad_scale_in_a_tensor_shows_as_nan(bad, name, backend):
    fused, device = backend
    x, y = towers(6, 6, 4, device=device)
    loss = siglip_loss(x, y, torch.tensor(bad, device=device), backend=fused if name == "fused" else name)
    assert loss.isnan()


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_sides_of_two_dtypes(narrow, module, backend):
    """Under autocast one tower may come out in 16 bits: what open_clip's loss takes, ours does."""
    name, device = backend
    x, y = towers(20, 20, 16, device=device)
    for a, b in ((x.detach().to(narrow), y), (x, y.detach().to(narrow)), (x.detach().double(), y)):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = SigLIPLoss(backend=name)(a, b, 10.0) if module else siglip_loss(a, b, 10.0, backend=name)
        loss.backward()
        exact = [t.detach().double().requires_grad_() for t in (a, b)]
        expected = reference.siglip_loss(*exact, 10.0)
        expected.backward()
        assert loss.dtype == (torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32)
        assert relative_error(loss, expected) < 1e-6
        for ours, theirs in zip((a, b), exact, strict=True):
            assert ours.grad.dtype == ours.dtype
            assert relative_error(ours.grad, theirs.grad) < TOLERANCE[ours.dtype][1] + 1e-5


def two_dtypes_on_a_rank():
    """(both losses, dtypes of the gradients) of one of two processes."""
    x, y = (t.detach().chunk(2)[dist.get_rank()] for t in towers(8, 8, 4))
    x, y = x.bfloat16().requires_grad_(), y.clone().requires_grad_()
    losses = partial(distributed.siglip_loss, logit_scale=10.0), distributed.mio_loss
    values = [loss(x, y, group=groups[2]) for loss in losses]
    sum(values).backward()
    return [float(v.detach()) for v in values], (x.grad.dtype, y.grad.dtype)


def test_sides_of_two_dtypes_over_processes(pool):
    x, y = (t.detach() for t in towers(8, 8, 4))
    results = pool.run(two_dtypes_on_a_rank, ranks=2)
    means = torch.tensor([values for values, _ in results]).mean(0)
    whole = torch.stack([siglip_loss(x.bfloat16(), y, 10.0), mio_loss(x.bfloat16(), y)])
    torch.testing.assert_close(means, whole)
    assert {dtypes for _, dtypes in results} == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_ids(dtype, backend):
    name, device = backend
    x, y = towers(8, 8, 4, device=device)
    ids = torch.arange(8, device=device) // 2
    expected = siglip_loss(x, y, 10.0, image_ids=ids, text_ids=ids, backend=name)
    loss = siglip_loss(x, y, 10.0, image_ids=ids.to(dtype), text_ids=ids.to(torch.int16), backend=name)
    assert torch.equal(loss, expected)


def test_numbers_of_numpy(backend):
    name, device = backend
    x, y = towers(5, 9, 4, device=device)
    expected = siglip_loss(x, y, 10.0, -1.0, text_offset=3, backend=name)
    loss = siglip_loss(x, y, np.float32(10), np.int64(-1), text_offset=np.int64(3), backend=name)
    assert torch.equal(loss, expected)
