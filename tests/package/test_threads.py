# SPDX-License-Identifier: Apache-2.0
"""The CPU backend among other threads and processes: nothing hangs, and the bits stay."""

import threading

import pytest
import torch
from conftest import run_python, views

from mio_ext import mio_loss

pytestmark = pytest.mark.usefixtures("four_threads")
BATCH = 1100  # enough work for several threads, several blocks each


@pytest.fixture
def four_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


def gradient(seed=0):
    z1, z2 = views(BATCH, 70, seed=seed)
    return torch.cat(torch.autograd.grad(mio_loss(z1, z2, backend="cpu"), [z1, z2]))


def test_calls_from_several_python_threads():
    expected = [gradient(seed) for seed in range(4)]
    got = [[] for _ in expected]
    threads = [
        threading.Thread(target=lambda s=seed: got[s].extend(gradient(s) for _ in range(5))) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a call hangs"
    for one, many in zip(expected, got, strict=True):
        assert len(many) == 5 and all(torch.equal(one, other) for other in many)


def test_number_of_threads_may_change_between_calls():
    expected = gradient()
    for threads in (1, 3, 2, 7, 1, 4):
        torch.set_num_threads(threads)
        assert torch.equal(gradient(), expected)


def test_data_loader_workers_forked_after_use():
    """A forked child has none of its parent's threads. torch gives a worker one; nothing of ours waits for more."""
    result = run_python(
        "-c",
        """
import torch
from torch.utils.data import DataLoader, Dataset
from mio_ext import mio_loss
torch.set_num_threads(4)

class Losses(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        z = torch.randn(2, 1100, 70, generator=torch.Generator().manual_seed(i)).requires_grad_()
        loss = mio_loss(z[0], z[1], backend="cpu")
        return loss.detach(), torch.autograd.grad(loss, z)[0]

data = Losses()
expected = [data[i] for i in range(4)]
for i, (loss, grad) in enumerate(DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")):
    assert torch.equal(loss, expected[i][0]) and torch.equal(grad, expected[i][1])
assert torch.equal(data[0][1], expected[0][1])
print("done")
""",
    )
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr
