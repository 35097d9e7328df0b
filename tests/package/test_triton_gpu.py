# SPDX-License-Identifier: Apache-2.0
"""What only the Triton backend has to show on a GPU; test_backends_gpu.py has the rest."""

import pytest
import torch
from conftest import views
from test_backends_gpu import step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_a_smaller_batch_compiles_nothing():
    from mio_ext.triton.prepare import prepare_kernel
    from mio_ext.triton.sweep import sweep_kernel

    def compilations():
        caches = sweep_kernel.device_caches, prepare_kernel.device_caches
        return sum(len(entry[0]) for cache in caches for entry in cache.values())

    for batch in (3000, 2000):
        step(*views(batch, 128, torch.bfloat16, "cuda"), "triton")
    before = compilations()
    assert before > 0
    for batch in (2999, 1777, 1024, 2048):
        step(*views(batch, 128, torch.bfloat16, "cuda"), "triton")
    assert compilations() == before
