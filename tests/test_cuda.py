# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend without a GPU: what it says. Its values are tested in C++, tests/pairwise_bce_cuda_test.cpp."""

import pytest
import torch

from mio_ext import mio_loss, ops


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_it_cannot_run():
    z = torch.randn(4, 3)
    why = "there is no CUDA GPU" if ops.extension.cuda else "the extension was built without CUDA"
    with pytest.raises(RuntimeError, match=f"mio_loss: backend 'cuda' cannot run: {why}"):
        mio_loss(z, z, backend="cuda")


def test_build_without_cuda_says_so(monkeypatch):
    monkeypatch.setattr(ops.extension, "cuda", None)
    reason = ops.unavailable_reason("cuda")
    assert reason == "the extension was built without CUDA; FORCE_CUDA=1 python setup.py build_ext builds it"
