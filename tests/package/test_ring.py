# SPDX-License-Identifier: Apache-2.0
"""Batches that differ from process to process, gathered or passed round a ring: value, gradient, memory, failures."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import relative_error
from process_pool import WORLD, Pool, groups

from mio_ext import SigLIPLoss, distributed, exchange, reference, ring

#: dtype -> relative error of values and gradients against one process in float64.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6}
#: Rows of each process: even, odd, uneven, a single row, more processes than a machine has cores.
SIZES = {
    2: [(2, 2), (33, 33), (40, 7), (1, 3)],
    3: [(24, 24, 24), (9, 1, 30)],
    4: [(17, 17, 17, 17), (5, 40, 1, 12)],
    8: [(6,) * 8, (3, 9, 1, 4, 4, 12, 2, 5)],
}
CASES = [(form, sizes) for form in ("gather", "ring") for world in SIZES for sizes in SIZES[world]]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight processes, of which a test may take the first few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        pool = Pool(8, tmp_path_factory.mktemp("group") / "rendezvous")
    yield pool
    pool.close()


def whole(sizes, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(sum(sizes), dim, generator=generator, dtype=torch.float64)
    return a, a + 0.5 * torch.randn(sum(sizes), dim, generator=generator, dtype=torch.float64)


def own(tensor, sizes):
    return tensor.split(list(sizes))[dist.get_rank()].clone()


NUMBERS = {
    "mio": {"temperature": 0.3, "negative_temperature": 0.7, "regularizer": 1.5, "bias": -0.4, "negative_weight": 2.5},
    "siglip": {"logit_scale": 9.0, "logit_bias": -6.0},
}


def learnt(name, dtype):
    return {key: torch.tensor([value], dtype=dtype, requires_grad=True) for key, value in NUMBERS[name].items()}


def on_a_rank(name, sizes, dtype, ids, form, backend="cpu", frozen=False, dim=12):
    """(loss, gradients of both own sides and of the numbers, statistics) of one process, twice for equal bits."""
    results = []
    for _ in range(2):
        x, y = (own(z.to(dtype), sizes).requires_grad_() for z in whole(sizes, dim))
        y.requires_grad_(not frozen)
        numbers, kinds = learnt(name, dtype), {}
        options = {"group": groups[len(sizes)], "exchange": form, "backend": backend, "return_stats": True}
        if name == "mio":
            kinds = {} if ids is None else {"labels": own(ids, sizes)}
            loss, stats = distributed.mio_loss(x, y, **numbers, **kinds, **options)
        else:
            if ids is not None:
                kinds = {side: own(ids, sizes) for side in ("image_ids", "text_ids")}
            loss, stats = distributed.siglip_loss(x, y, **numbers, normalize=True, **kinds, **options)
        wanted = [t for t in (x, y, *numbers.values()) if t.requires_grad]
        results.append([loss.detach(), *torch.autograd.grad(4 * loss, wanted), torch.stack(list(stats))])
    assert all(torch.equal(a, b) or (a.isnan() == b.isnan()).all() for a, b in zip(*results, strict=True))
    loss, *gradients, stats = results[0]
    return loss, gradients, stats


def in_one(name, sizes, dtype, ids, frozen=False, dim=12):
    x, y = (z.to(dtype).double().requires_grad_() for z in whole(sizes, dim))
    y.requires_grad_(not frozen)
    numbers = learnt(name, torch.float64)
    if name == "mio":
        loss = reference.mio_loss(x, y, **numbers, labels=ids)
    else:
        loss = reference.siglip_loss(
            reference.normalized(x), reference.normalized(y), **numbers, image_ids=ids, text_ids=ids
        )
    wanted = [t for t in (x, y, *numbers.values()) if t.requires_grad]
    return loss.detach(), torch.autograd.grad(4 * loss, wanted)


def assert_is_the_whole_batch(name, results, expected, world, limit, sides=2):
    """The mean over processes, of values and of what a parameter behind the rows or a number would get."""
    loss, gradients = expected
    values = torch.stack([value for value, _, _ in results]).double()
    assert relative_error(values.mean(), loss) < limit
    if name == "mio":
        assert len(set(values.tolist())) == 1
    for side in range(sides):
        ours = torch.cat([g[side] for _, g, _ in results]).double() / world
        assert relative_error(ours, gradients[side]) < limit
    for number in range(sides, len(gradients)):
        mean = torch.stack([g[number] for _, g, _ in results]).double().mean(0)
        assert relative_error(mean, gradients[number]) < 10 * limit  # a sum that cancels


@pytest.mark.parametrize("form, sizes", CASES)
@pytest.mark.parametrize("name", ["mio", "siglip"])
def test_any_sizes_are_one_batch(name, form, sizes, eight):
    world = len(sizes)
    for dtype, supervised in itertools.product(LIMITS, (False, True)):
        ids = torch.arange(sum(sizes)) * 7 % 5 if supervised else None
        results = eight.run(on_a_rank, name, sizes, dtype, ids, form, ranks=world)
        assert_is_the_whole_batch(name, results, in_one(name, sizes, dtype, ids), world, LIMITS[dtype])


@pytest.mark.parametrize("name", ["mio", "siglip"])
def test_the_dense_reference_goes_round_as_well(name, eight):
    for ids in (None, torch.arange(22) % 4):
        results = eight.run(on_a_rank, name, (9, 1, 12), torch.float64, ids, "ring", "reference", ranks=3)
        assert_is_the_whole_batch(name, results, in_one(name, (9, 1, 12), torch.float64, ids), 3, 1e-12)


def test_frozen_texts_send_no_gradient(eight):
    for form in ("gather", "ring"):
        results = eight.run(on_a_rank, "siglip", (5, 2, 9), torch.float64, None, form, "cpu", True, ranks=3)
        expected = in_one("siglip", (5, 2, 9), torch.float64, None, frozen=True)
        assert_is_the_whole_batch("siglip", results, expected, 3, 1e-12, sides=1)


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 4e-3), (torch.float16, 2e-3)])
@pytest.mark.parametrize("name", ["mio", "siglip"])
def test_16_bits_are_rounded_once(name, dtype, limit, eight):
    """After the sum over blocks: the limits of one pass hold."""
    results = eight.run(on_a_rank_16, name, dtype, ranks=4)
    expected = in_one(name, (8, 8, 8, 8), dtype, None)[1]
    for side in (0, 1):
        assert relative_error(torch.cat([r[side] for r in results]).double() / 4, expected[side]) < limit


def on_a_rank_16(name, dtype):
    x, y = (own(z.to(dtype), (8,) * 4).requires_grad_() for z in whole((8,) * 4))
    if name == "mio":
        loss = distributed.mio_loss(x, y, **NUMBERS["mio"], group=groups[4], exchange="ring")
    else:
        loss = distributed.siglip_loss(x, y, **NUMBERS["siglip"], normalize=True, group=groups[4], exchange="ring")
    (4 * loss).backward()
    assert x.grad.dtype == dtype
    return x.grad.clone(), y.grad.clone()


@pytest.mark.parametrize("name", ["mio", "siglip"])
def test_both_forms_have_the_same_statistics(name, eight):
    labels = torch.arange(19) % 3
    for ids in (None, labels):
        gathered, passed = (
            eight.run(on_a_rank, name, (4, 8, 7), torch.float64, ids, form, ranks=3) for form in ("gather", "ring")
        )
        for (_, _, a), (_, _, b) in zip(gathered, passed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0, equal_nan=True)


def test_images_of_an_id_that_no_process_has_are_refused(eight):
    for message in eight.run(lonely_image, ranks=3):
        assert message == "siglip_loss: every image needs a text of its id, but image 0 (id 7) has none"


def lonely_image():
    z = torch.eye(3)
    for form in ("gather", "ring"):
        with pytest.raises(ValueError) as caught:
            distributed.siglip_loss(
                z, z, 1.0, group=groups[3], exchange=form, image_ids=torch.tensor([7, 0, 1]), text_ids=torch.arange(3)
            )
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what auto takes


def forms_taken(share):
    """Which form ``auto`` takes for both losses, and as a drop-in for open_clip."""
    seen, keep, go_round = [], exchange.RING_SHARE, ring._go_round
    exchange.RING_SHARE = share if dist.get_rank() == 1 else 1.0  # one process that is short of memory is enough
    ring._go_round = lambda *arguments: seen.append(1) or go_round(*arguments)
    try:
        z = torch.randn(3, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
        for call in (
            lambda: distributed.mio_loss(z, z.flip(0)),
            lambda: distributed.siglip_loss(z, z, 1.0),
            *(
                lambda way=way: SigLIPLoss(rank=dist.get_rank(), world_size=8, dist_impl=way)(z, z, 1.0)
                for way in (None, "bidir", "shift", "reduce", "gather")
            ),
        ):
            seen.append(0)
            call()
    finally:
        exchange.RING_SHARE, ring._go_round = keep, go_round
    return "".join(map(str, seen))


def test_auto_is_the_ring_where_gathered_rows_are_large(eight):
    assert set(eight.run(forms_taken, 1.0)) == {"00" + "0" + "0101" + "00"}
    assert set(eight.run(forms_taken, 0.0)) == {"0101" + "01" + "0101" + "00"}


# ------------------------------------------------------------------------------------------------ memory


def peak_of_a_step(name, form, world, rows, dim):
    """Bytes of tensors alive at the peak of a forward and backward pass, beyond those of before it."""
    if dist.get_rank() >= world:
        return 0
    from torch.profiler import ProfilerActivity, profile

    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = (torch.randn(rows, dim, generator=generator).requires_grad_() for _ in range(2))
    if name == "mio":

        def step():
            distributed.mio_loss(x, y, group=groups[world], exchange=form).backward()
    elif form == "open_clip":
        from open_clip.loss import SigLipLoss

        loss = SigLipLoss(rank=dist.get_rank(), world_size=world, dist_impl="bidir")

        def step():
            loss(F.normalize(x), F.normalize(y), torch.tensor(5.0), torch.tensor(-5.0)).backward()
    else:

        def step():
            distributed.siglip_loss(
                F.normalize(x), F.normalize(y), 5.0, -5.0, group=groups[world], exchange=form
            ).backward()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(alive)


@pytest.mark.parametrize("name", ["mio", "siglip"])
def test_memory_of_a_process_is_flat_in_the_number_of_processes(name, eight):
    """Within 5 % from 3 to 8 processes, where gathered rows grow with them."""

    def peaks(form):
        return [max(eight.run(peak_of_a_step, name, form, world, 128, 64, ranks=world)) for world in (3, 8)]

    few, many = peaks("ring")
    assert few > 2 * 128 * 64 * 4  # at least the gradients: the measurement works
    assert many < 1.05 * few
    few_gathered, many_gathered = peaks("gather")
    assert many_gathered > 1.5 * few_gathered and many < many_gathered


def test_open_clips_loss_grows_where_ours_is_flat(eight):
    pytest.importorskip("open_clip.loss", reason="open_clip_torch is not installed")
    theirs = max(eight.run(peak_of_a_step, "siglip", "open_clip", 8, 128, 64))
    ours = max(eight.run(peak_of_a_step, "siglip", "ring", 8, 128, 64))
    assert ours < theirs / 2


# ------------------------------------------------------------------------------------------------ failures


def fails_on_the_second_block(name):
    """One process's sweep fails on the way round. The next call of the group is undisturbed."""
    rank, sweep, count = dist.get_rank(), ring._sweep, itertools.count(1)

    def failing(call, backend):
        if rank == 1 and next(count) == 2:
            raise MemoryError("no memory left")
        return sweep(call, backend)

    x, y = (own(z, (4, 4, 4)).requires_grad_() for z in whole((4, 4, 4)))

    def loss():
        if name == "mio":
            return distributed.mio_loss(x, y, group=groups[3], exchange="ring")
        return distributed.siglip_loss(x, y, 1.0, group=groups[3], exchange="ring")

    ring._sweep = failing
    try:
        value = loss()
        first = torch.autograd.grad(value, y)[0] if name == "siglip" else value
        first = "nan" if bool(first.detach().isnan().any()) else "numbers"
    except MemoryError as error:
        first = str(error)
    finally:
        ring._sweep = sweep
    return first, float(loss())


@pytest.mark.parametrize("name", ["mio", "siglip"])
def test_a_failed_sweep_leaves_no_message_and_no_half_result(name, eight):
    results = eight.run(fails_on_the_second_block, name, ranks=3)
    assert results[1][0] == "no memory left"
    # At the second block process 1 adds to the texts of process 0; MIO's value is everybody's.
    assert results[0][0] == "nan" and (name == "siglip" or results[2][0] == "nan")
    assert not any(math.isnan(value) for _, value in results)


def loss_without_the_last(form):
    rank = dist.get_rank()
    z = torch.randn(4, 8)
    if rank == 2:
        import os

        os._exit(0)
    try:
        distributed.mio_loss(z, z.flip(0), exchange=form)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_a_process_that_dies_ends_the_others_with_a_sentence(form, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pool = Pool(3, tmp_path / "rendezvous")
    try:
        for connection in pool.connections:
            connection.send((loss_without_the_last, (form,)))
        for connection in pool.connections[:2]:
            assert connection.poll(60), "a process hangs"
            (message,) = connection.recv()
            assert message.startswith("mio_loss: another process of the group has ended or does not answer (")
            assert "\n" not in message
    finally:
        pool.close()


def test_a_ring_does_not_compile(pool):
    for message in pool.run(compiled_ring):
        assert "exchange='ring' does not compile; pass 'gather', or leave the loss outside" in message


def compiled_ring():
    z = torch.randn(4, 8)
    try:
        torch.compile(
            lambda z: distributed.mio_loss(z, z.flip(0), exchange="ring"), fullgraph=True, backend="aot_eager"
        )(z)
    except Exception as error:
        return str(error)
    return "nothing"


assert WORLD == 4  # `pool` of conftest.py
