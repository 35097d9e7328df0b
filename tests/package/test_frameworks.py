# SPDX-License-Identifier: Apache-2.0
"""The losses over processes inside what people train with: two processes on Gloo are one process on the whole batch."""

import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, relative_error
from process_pool import groups
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mio_ext import MIOLoss, distributed, mio_loss

BATCH, DIM = 24, 6


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, 8))


def views():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, DIM, generator=generator)
    return x, x + 0.3 * torch.randn(BATCH, DIM, generator=generator)


def whole(dtype=torch.float32):
    net = network()
    loss = mio_loss(*(net(z).to(dtype) for z in views()))
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]


def step(net, form, dtype=torch.float32):
    """Value and gradients of one process's share of the step."""
    own = (z.chunk(2)[dist.get_rank()] for z in views())
    loss = distributed.mio_loss(*(net(z).to(dtype) for z in own), group=groups[2], exchange=form)
    loss.backward()
    return loss.detach(), [p.grad for p in net.parameters()]


def data_parallel(form, dtype, options):
    net = DistributedDataParallel(network(), process_group=groups[2], **options)
    for _ in range(2):  # a static graph is recorded by the first step
        net.zero_grad()
        result = step(net, form, dtype)
    return result


def fully_sharded(form):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    net = network()
    mesh = DeviceMesh.from_group(groups[2], "cpu")
    for layer in (*net, net):
        fully_shard(layer, mesh=mesh)
    loss, gradients = step(net, form)
    return loss, [g.full_tensor() for g in gradients]


def assert_is(result, expected, limit):
    loss, gradients = expected
    assert relative_error(result[0], loss) < limit
    ours, theirs = (torch.cat([g.flatten() for g in grads]) for grads in (result[1], gradients))
    assert relative_error(ours, theirs) < limit


@pytest.mark.parametrize("form", ["gather", "ring"])
@pytest.mark.parametrize(
    "options", [{}, {"static_graph": True}, {"bucket_cap_mb": 1e-4}], ids=["", "static graph", "small buckets"]
)
def test_data_parallel(form, options, pool):
    for result in pool.run(data_parallel, form, torch.float32, options, ranks=2):
        assert_is(result, whole(), 1e-6)


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_data_parallel_with_16_bit_features(form, pool):
    for result in pool.run(data_parallel, form, torch.bfloat16, {}, ranks=2):
        assert_is(result, whole(torch.bfloat16), 4e-3)


@pytest.mark.parametrize("form", ["gather", "ring"])
def test_fully_sharded(form, pool):
    for result in pool.run(fully_sharded, form, ranks=2):
        assert_is(result, whole(), 1e-6)


def under_autocast():
    """A network that autocast runs in bfloat16, as in training; the loss itself stays exact."""
    net = DistributedDataParallel(network(), process_group=groups[2])
    results = []
    for form in ("gather", "ring"):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss, gradients = step(net, form)
        results.append((loss, [g.clone() for g in gradients]))
    return results


def test_autocast_is_the_same_in_both_forms(pool):
    for gathered, passed in pool.run(under_autocast, ranks=2):
        assert_is(passed, gathered, 4e-3)


def write_script(script, tmp_path):
    """A file that has ``folder`` and this file's names."""
    path = tmp_path / "script.py"
    path.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}, {str(ROOT / 'tests/package')!r}]\n"
        f"folder = {str(tmp_path)!r}\nimport torch\nfrom test_frameworks import *\n{script}"
    )
    return str(path)


def torchrun(script, tmp_path):
    """What process 0 of two saved."""
    path = write_script(script, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(tmp_path / "result.pt", weights_only=True)


ACCELERATE = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
loss_of = MIOLoss(gather_distributed=True)
net, optimizer = accelerator.prepare(network(), torch.optim.SGD(network().parameters(), lr=0.0))
own = (z.chunk(2)[accelerator.process_index] for z in views())
loss = loss_of(*(net(z) for z in own))
accelerator.backward(loss)
if accelerator.is_main_process:
    torch.save([loss.detach(), [p.grad for p in net.parameters()]], folder + "/result.pt")
accelerator.end_training()
"""

LIGHTNING = """
import lightning
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.loss_of = network(), MIOLoss(gather_distributed=True)
    def training_step(self, batch, index):
        self.loss = self.loss_of(*(self.net(z) for z in batch))
        return self.loss
    def on_after_backward(self):
        if self.global_rank == 0:
            torch.save([self.loss.detach(), [p.grad for p in self.net.parameters()]], folder + "/result.pt")
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*views()), batch_size=BATCH // 2)
lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False).fit(Module(), data)
"""


@pytest.mark.parametrize("package, script", [("accelerate", ACCELERATE), ("lightning", LIGHTNING)])
def test_packages(package, script, tmp_path):
    pytest.importorskip(package)
    assert MIOLoss  # the scripts take it from here
    expected = whole()
    loss, gradients = torchrun(script, tmp_path)
    assert_is((loss, gradients), expected, 1e-6)


NODE = """
torch.distributed.init_process_group("gloo")
results = {}
for form in ("gather", "ring"):
    net = DistributedDataParallel(network())
    own = (z.chunk(2)[dist.get_rank()] for z in views())
    loss = distributed.mio_loss(*(net(z) for z in own), exchange=form)
    loss.backward()
    results[form] = [loss.detach(), [p.grad for p in net.parameters()]]
if dist.get_rank() == 0:
    torch.save(results, folder + "/result.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_nodes(tmp_path):
    """As on two machines: a torchrun for each, which meet at one address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"localhost:{port}",
    ]
    path = write_script(NODE, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--rdzv-id", "two", path]
    nodes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for _ in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=200)
        assert node.returncode == 0, errors[-3000:]
    for result in torch.load(tmp_path / "result.pt", weights_only=True).values():
        assert_is(result, whole(), 1e-6)
