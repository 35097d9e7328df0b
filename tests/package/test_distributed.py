# SPDX-License-Identifier: Apache-2.0
"""The losses over a process group: four processes against the one-process reference on the whole batch."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import TOLERANCE, relative_error
from process_pool import WORLD, groups

import mio_ext
from mio_ext import MIOLoss, SigLIPLoss, distributed, exchange, mio_loss, reference


def whole_batch(batch: int, dim: int, seed: int = 0):
    """Two correlated float64 matrices [batch, dim], one row of norm 0, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    b = a + 0.5 * torch.randn(batch, dim, generator=generator, dtype=torch.float64)
    b[-1] = 0
    return a, b


def scalars(options: dict, dtype) -> dict[str, torch.Tensor]:
    """Numbers to learn, as tensors of their own in every process."""
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: torch.tensor([value], dtype=dtype, requires_grad=True) for name, value in options.items()}


# ------------------------------------------------------------------------------------------------ MIO


def mio_on_a_rank(world, batch, dim, dtype, numbers, labels, backend, seed):
    """(loss, gradients of own z1, z2 and of the numbers, statistics) of one process."""
    rank = dist.get_rank()
    z1, z2 = (z.to(dtype).chunk(world)[rank].clone().requires_grad_() for z in whole_batch(batch, dim, seed))
    learnt = scalars(numbers, dtype)
    own_labels = None if labels is None else labels.chunk(world)[rank]
    loss, stats = distributed.mio_loss(
        z1, z2, group=groups[world], labels=own_labels, backend=backend, return_stats=True, **learnt
    )
    grads = torch.autograd.grad(8 * loss, [z1, z2, *learnt.values()])
    return loss.detach(), [g.clone() for g in grads], [float(s) for s in stats]


def mio_whole(batch, dim, dtype, numbers, labels, seed, function=reference.mio_loss, **options):
    """The same from one process, in float64 on the rounded features."""
    z1, z2 = (z.to(dtype).double().requires_grad_() for z in whole_batch(batch, dim, seed))
    learnt = scalars(numbers, torch.float64)
    loss = function(z1, z2, labels=labels, **learnt, **options)
    return loss.detach(), torch.autograd.grad(8 * loss, [z1, z2, *learnt.values()])


ALL_NUMBERS = {
    "temperature": 0.3,
    "negative_temperature": 0.7,
    "regularizer": 1.5,
    "bias": -0.4,
    "negative_weight": 2.5,
}


SHAPES = [(2, 2, 3, "cpu"), (2, 34, 20, "cpu"), (3, 99, 33, "cpu"), (4, 260, 64, "cpu"), (3, 12, 5, "reference")]


@pytest.mark.parametrize(
    "world, batch, dim, backend, supervised",
    [(*shape, False) for shape in SHAPES] + [(*shape, True) for shape in SHAPES[2:]],
)
def test_mio_is_the_loss_of_the_whole_batch(world, batch, dim, backend, supervised, dtype, pool):
    """Value on every process, gradient after the mean over processes: rows, temperatures, weight and bias."""
    labels = torch.arange(batch) % 5 if supervised else None
    results = pool.run(mio_on_a_rank, world, batch, dim, dtype, ALL_NUMBERS, labels, backend, 1, ranks=world)
    loss, grads = mio_whole(batch, dim, dtype, ALL_NUMBERS, labels, 1)
    loss_limit, grad_limit = TOLERANCE[dtype]
    number_limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert len({float(value) for value, _, _ in results}) == 1
    assert relative_error(results[0][0], loss) < loss_limit
    # The parameters behind z get the mean of every process's gradient, of which the rows of others are zero.
    for view in (0, 1):
        ours = torch.cat([g[view] for _, g, _ in results])
        assert ours.dtype == dtype
        assert relative_error(ours.double() / world, grads[view]) < grad_limit
    for number in range(2, 6):
        mean = torch.stack([g[number] for _, g, _ in results]).mean(0)
        assert mean.shape == (1,)
        assert relative_error(mean, grads[number]) < number_limit


def test_statistics_are_those_of_the_whole_batch(pool):
    labels = torch.arange(24) % 7
    for own in (None, labels, torch.zeros(24, dtype=torch.int32)):  # at last: no negatives at all
        results = pool.run(mio_on_a_rank, 3, 24, 8, torch.float64, {}, own, "cpu", 2, ranks=3)
        _, expected = mio_ext.mio_loss(*whole_batch(24, 8, 2), labels=own, return_stats=True)
        for _, _, stats in results:
            assert stats == pytest.approx([float(s) for s in expected], rel=1e-12, nan_ok=True)


def modules_on_a_rank():
    """MIOLoss with and without the batches of the others, on a batch that differs from process to process."""
    z1, z2 = (z.chunk(WORLD)[dist.get_rank()] for z in whole_batch(WORLD * 5, 6, 0))
    return (
        float(MIOLoss(0.3, gather_distributed=True)(z1, z2)),
        float(MIOLoss(0.3)(z1, z2)),
        float(mio_loss(z1, z2, temperature=0.3)),
    )


def test_the_module_gathers_if_asked(pool):
    whole = float(mio_loss(*whole_batch(WORLD * 5, 6, 0), temperature=0.3))
    for gathered, alone, own in pool.run(modules_on_a_rank):
        assert gathered == pytest.approx(whole, rel=1e-12) and alone == own != pytest.approx(whole, rel=1e-3)


def test_one_process_is_the_plain_loss(pool):
    """Without a group, and in a group of one."""
    z1, z2 = whole_batch(6, 4)
    expected = mio_ext.mio_loss(z1, z2, temperature=0.2)
    assert torch.equal(distributed.mio_loss(z1, z2, temperature=0.2), expected)
    assert torch.equal(distributed.siglip_loss(z1, z2, 3.0, -1.0), mio_ext.siglip_loss(z1, z2, 3.0, -1.0))
    (alone,) = pool.run(mio_on_a_rank, 1, 6, 4, torch.float64, {"temperature": 0.2}, None, "cpu", 0, ranks=1)
    assert torch.equal(alone[0], expected)


def gathered_dtypes(dtype):
    seen = []
    gather = exchange.all_gather
    exchange.all_gather = lambda out, own, group: seen.append(own.dtype) or gather(out, own, group=group)
    try:
        z1, z2 = (z.to(dtype).requires_grad_() for z in whole_batch(4, 8))
        distributed.mio_loss(z1, z2).backward()
        distributed.siglip_loss(z1, z2, 1.0).backward()
        with torch.no_grad():
            assert not distributed.mio_loss(z1, z2).requires_grad
    finally:
        exchange.all_gather = gather
    return [d for d in seen if d.is_floating_point]


def test_features_travel_in_their_own_16_bits(pool):
    for dtype in (torch.bfloat16, torch.float16):
        assert pool.run(gathered_dtypes, dtype) == [[dtype] * 3] * WORLD


def compiled_equals_eager():
    z1, z2 = (z.float().chunk(2)[dist.get_rank()].clone().requires_grad_() for z in whole_batch(12, 8))
    scale = torch.tensor(3.0, requires_grad=True)

    def both(z1, z2, scale):
        mio = distributed.mio_loss(z1, z2, group=groups[2], temperature=1 / scale)
        return mio + distributed.siglip_loss(z1, z2, scale, -2.0, group=groups[2], normalize=True)

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend="aot_eager")):
        loss = function(z1, z2, scale)
        results.append([loss, *torch.autograd.grad(loss, [z1, z2, scale])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_compiles_in_one_graph(pool):
    pool.run(compiled_equals_eager, ranks=2)


# --------------------------------------------------------------------------------------------- SigLIP


def siglip_on_a_rank(world, batch, dim, dtype, ids, backend, weight_of_rank):
    rank = dist.get_rank()
    x, y = (F.normalize(z).to(dtype).chunk(world)[rank].clone().requires_grad_() for z in whole_batch(batch, dim))
    learnt = scalars({"logit_scale": 9.0, "logit_bias": -6.0}, dtype)
    own_ids = {} if ids is None else {name: ids.chunk(world)[rank] for name in ("image_ids", "text_ids")}
    loss = distributed.siglip_loss(x, y, *learnt.values(), group=groups[world], backend=backend, **own_ids)
    weight = 1 + rank if weight_of_rank else 1
    return loss.detach(), [g.clone() for g in torch.autograd.grad(weight * loss, [x, y, *learnt.values()])]


@pytest.mark.parametrize("world, batch, dim, backend", [(2, 2, 3, "cpu"), (3, 99, 33, "cpu"), (4, 12, 5, "reference")])
@pytest.mark.parametrize("with_ids", [False, True], ids=["", "ids"])
def test_siglip_is_the_loss_of_the_whole_batch(world, batch, dim, backend, with_ids, dtype, pool):
    """Values average to the global loss, and so do the gradients of images, texts, scale and bias."""
    ids = torch.arange(batch) * 7 % 5 if with_ids else None  # equal ids meet across processes
    results = pool.run(siglip_on_a_rank, world, batch, dim, dtype, ids, backend, False, ranks=world)
    x, y = (F.normalize(z).to(dtype).double().requires_grad_() for z in whole_batch(batch, dim))
    learnt = list(scalars({"logit_scale": 9.0, "logit_bias": -6.0}, torch.float64).values())
    loss = reference.siglip_loss(x, y, *learnt, image_ids=ids, text_ids=ids)
    grads = torch.autograd.grad(loss, [x, y, *learnt])
    loss_limit, grad_limit = TOLERANCE[dtype]
    number_limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(torch.stack([value for value, _ in results]).double().mean(), loss) < loss_limit
    for view in (0, 1):
        ours = torch.cat([g[view] for _, g in results]).double() / world
        assert relative_error(ours, grads[view]) < grad_limit
    for number in (2, 3):
        mean = torch.stack([g[number] for _, g in results]).double().mean(0)
        assert relative_error(mean, grads[number]) < number_limit


def test_a_texts_gradient_follows_each_process_own_weight(pool):
    """Losses that processes weigh differently: what a mirrored sweep would get wrong."""
    world, batch, dim = 3, 9, 4
    results = pool.run(siglip_on_a_rank, world, batch, dim, torch.float64, None, "cpu", True, ranks=world)
    x, y = (F.normalize(z).requires_grad_() for z in whole_batch(batch, dim))
    own = x.chunk(world)
    loss = sum((1 + r) * reference.siglip_loss(own[r], y, 9.0, -6.0, text_offset=3 * r) for r in range(world))
    for view, grad in enumerate(torch.autograd.grad(loss, [x, y])):
        assert relative_error(torch.cat([g[view] for _, g in results]), grad) < 1e-12


def as_open_clip(world, dist_impl, shape, with_bias, frozen_texts):
    """Loss and gradients of open_clip's loss and of ours, on one process."""
    from open_clip.loss import SigLipLoss

    rank, results = dist.get_rank(), []
    arguments = {"cache_labels": True, "rank": rank, "world_size": world, "dist_impl": dist_impl}
    for loss in (SigLipLoss(**arguments), SigLIPLoss(**arguments)):
        x, y = (F.normalize(z).float().chunk(world)[rank].clone().requires_grad_() for z in whole_batch(64, 16))
        y.requires_grad_(not frozen_texts)
        scale, bias = (torch.full(shape, value, requires_grad=True) for value in (12.0, -8.0))
        inputs = {
            "image_features": x,
            "text_features": y,
            "logit_scale": scale,
            "logit_bias": bias if with_bias else None,
        }
        value = loss(**inputs, output_dict=True)["contrastive_loss"]
        learnt = [t for t in inputs.values() if t is not None and t.requires_grad]
        results.append([value, *torch.autograd.grad(value, learnt)])
    for theirs, ours in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    return float(results[1][0])


WAYS = [(way, (), True, False) for way in (None, "bidir", "shift", "reduce", "gather")]
WAYS += [("shift", (1,), False, True)]


@pytest.mark.parametrize("dist_impl, shape, with_bias, frozen_texts", WAYS)
def test_drop_in_for_open_clip(dist_impl, shape, with_bias, frozen_texts, pool):
    """On every process: its own value and gradients, none of them averaged, for all of open_clip's ways."""
    pytest.importorskip("open_clip.loss", reason="open_clip_torch is not installed")
    values = pool.run(as_open_clip, WORLD, dist_impl, shape, with_bias, frozen_texts)
    assert len(set(values)) == WORLD


# ------------------------------------------------------------------------------------- building blocks


def softmax_on_a_rank(world):
    """A loss of another kind on the two building blocks: not symmetric, so columns get gradients too."""
    rank = dist.get_rank()
    rows = whole_batch(12, 6)[0].chunk(world)[rank].clone().requires_grad_()
    logits = rows @ distributed.gather_rows(rows, groups[world]).T
    target = torch.arange(len(rows)) + rank * len(rows)
    loss = distributed.global_sum(F.cross_entropy(logits, target, reduction="sum"), groups[world])
    return loss.detach(), torch.autograd.grad(loss, rows)[0].clone()


def test_gather_rows_and_global_sum(pool):
    results = pool.run(softmax_on_a_rank, 3, ranks=3)
    rows = whole_batch(12, 6)[0].requires_grad_()
    loss = F.cross_entropy(rows @ rows.T, torch.arange(12), reduction="sum")
    (grad,) = torch.autograd.grad(loss, rows)
    for value, _ in results:
        torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(torch.cat([g for _, g in results]) / 3, grad)
    assert distributed.gather_rows(rows) is rows
    assert distributed.global_sum(loss) is loss


# ------------------------------------------------------------------------------------------ bad input


def message_of(case):
    """What an exception says on this process."""
    rank = dist.get_rank()
    z = torch.eye(6)[: 3 + (rank == 1)].clone().requires_grad_()
    try:
        CASES[case](rank, z)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def second_derivative(rank, z):
    even = torch.eye(6)[:3].clone().requires_grad_()
    loss = distributed.mio_loss(even, even.roll(1, 0), backend="reference")
    torch.autograd.grad(loss, even, create_graph=True)


def second_derivative_of_texts(rank, z):
    even = torch.eye(6)[:3].clone().requires_grad_()
    loss = distributed.siglip_loss(even.detach(), even, 1.0, backend="reference")
    torch.autograd.grad(loss, even, create_graph=True)


CASES = {
    "a width of one's own": lambda rank, z: distributed.mio_loss(z[:, rank == 1 :], z[:, rank == 1 :]),
    "a type of one's own": lambda rank, z: distributed.siglip_loss(*2 * (z.double() if rank == 1 else z,), 1.0),
    "labels of one's own": lambda rank, z: distributed.mio_loss(
        z, z, labels=None if rank == 1 else torch.arange(len(z))
    ),
    "frozen texts of one's own": lambda rank, z: distributed.siglip_loss(z, z.detach() if rank == 1 else z, 1.0),
    "a form of one's own": lambda rank, z: distributed.mio_loss(z, z, exchange="ring" if rank == 1 else "gather"),
    "another loss": lambda rank, z: distributed.siglip_loss(z, z, 1.0) if rank == 1 else distributed.mio_loss(z, z),
    "no form": lambda rank, z: distributed.mio_loss(z, z, exchange="shift"),
    "no rows": lambda rank, z: distributed.mio_loss(z[:0], z[:0]),
    "too few texts": lambda rank, z: distributed.siglip_loss(z[:3], z[:2], 1.0),
    "width": lambda rank, z: distributed.mio_loss(z, z[:, :2]),
    "type": lambda rank, z: distributed.siglip_loss(z, z.int(), 1.0),
    "temperature": lambda rank, z: distributed.mio_loss(z, z, temperature=0.0),
    "labels": lambda rank, z: distributed.mio_loss(z, z, labels=torch.ones(2)),
    "one sort of ids": lambda rank, z: distributed.siglip_loss(z[:3], z[:3], 1.0, text_ids=torch.arange(3)),
    "group": lambda rank, z: rank < 2 or distributed.mio_loss(z, z, group=groups[2]),
    "size": lambda rank, z: SigLIPLoss(rank=rank, world_size=3 + rank // 3)(z, z, 1.0) if rank < 3 else 0,
    "second": second_derivative,
    "second of texts": second_derivative_of_texts,
}
SENTENCES = {
    "a width of one's own": r"ValueError: mio_loss: the width D of the features must be the same on every process, "
    r"got [56] here and [56] elsewhere",
    "a type of one's own": r"ValueError: siglip_loss: the dtype of the features must be the same on every process, "
    r"got torch.float(32|64) here and torch.float(32|64) elsewhere",
    "labels of one's own": r"ValueError: mio_loss: labels or ids, given or not, must be the same on every process, "
    r"got (False|True) here and (False|True) elsewhere",
    "frozen texts of one's own": r"ValueError: siglip_loss: requires_grad of text_features must be the same .*",
    "a form of one's own": r"ValueError: mio_loss: exchange must be the same on every process, got .*",
    "another loss": r"ValueError: (mio|siglip)_loss: every process must call it, process [01] called (mio|siglip)_loss",
    "no form": r"ValueError: mio_loss: exchange must be auto, gather, ring, got 'shift'",
    "no rows": r"ValueError: mio_loss: z1 must have at least 1 row, got \[0, 6\]",
    "too few texts": r"ValueError: siglip_loss: text_features must have a text for each of 3 images, got 2",
    "width": r"ValueError: mio_loss: z2 must be \[B, D\] like z1 .*",
    "type": r"TypeError: siglip_loss: text_features must be float32, .* got torch.int32",
    "temperature": r"ValueError: mio_loss: temperature must be positive and finite, got 0.0",
    "labels": r"TypeError: mio_loss: labels must be integers, got torch.float32",
    "one sort of ids": r"ValueError: siglip_loss: image_ids and text_ids must be given together",
    "second": r"RuntimeError: a loss over a process group has no second derivative; drop create_graph=True",
}
SENTENCES["second of texts"] = SENTENCES["second"]


@pytest.mark.parametrize("case", SENTENCES)
def test_bad_input_is_a_sentence_on_every_process(case, pool):
    for message in pool.run(message_of, case):
        assert re.fullmatch(SENTENCES[case], message), message


def test_a_foreign_group_and_a_wrong_world_are_named(pool):
    messages = pool.run(message_of, "group")
    assert messages[:2] == ["nothing", "nothing"]
    assert messages[2:] == ["ValueError: mio_loss: group must be one that this process belongs to"] * 2
    for rank, message in enumerate(pool.run(message_of, "size")[:3]):
        assert message.startswith(f"RuntimeError: SigLIPLoss: this process must be rank {rank} of 3 in the default")
        assert f"got rank {rank} of 4" in message
    with pytest.raises(RuntimeError, match=r"rank 1 of 4 in the default process group, got rank 0 of 1"):
        SigLIPLoss(rank=1, world_size=4)(torch.eye(2), torch.eye(2), 1.0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size\), got 4 of 4"):
        SigLIPLoss(rank=4, world_size=4)
    with pytest.raises(ValueError, match=r"dist_impl must be bidir, shift, reduce or gather, got 'ring'"):
        SigLIPLoss(world_size=2, dist_impl="ring")
