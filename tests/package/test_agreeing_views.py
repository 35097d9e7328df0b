# SPDX-License-Identifier: Apache-2.0
"""The linear term where training goes: views that agree, or nearly do, and any weight of the regulariser.

Its gradient is a difference of rows there. A backend that adds −w_l ŷ and leaves the rest to the projection of
eq. (10) is a hundred times as far off as plain PyTorch.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error

from mio_ext import mio_loss, ops, reference, siglip_loss

REGULARIZERS, APART = (0.0, 1.0, 50.0, 100.0), (0.0, 1e-6, 1e-3)
#: (B, D, temperature, λ, how far the views are apart)
CASES = [
    *((*shape, w, apart) for shape in [(160, 7, 8.0), (33, 100, 0.5)] for w in REGULARIZERS for apart in APART),
    *((2048, 128, 0.5, w, 0.0) for w in REGULARIZERS),
    (2048, 128, 0.5, 1.0, 1e-3),
]


def agreeing_views(batch, dim, apart, dtype=torch.float32):
    generator = torch.Generator().manual_seed(batch)
    z1 = torch.randn(batch, dim, generator=generator)
    return tuple(z.to(dtype) for z in (z1, z1 + apart * torch.randn(batch, dim, generator=generator)))


def gradient(loss, views, device, dtype, **kwargs):
    leaves = [z.to(device, dtype).requires_grad_() for z in views]
    return torch.cat(torch.autograd.grad(loss(*leaves, **kwargs), leaves))


@pytest.mark.parametrize("batch, dim, temperature, regularizer, apart", CASES)
def test_gradient_is_as_exact_as_plain_pytorch(batch, dim, temperature, regularizer, apart, backend):
    name, device = backend
    views = agreeing_views(batch, dim, apart)
    numbers = {"temperature": temperature, "regularizer": regularizer}
    grad = gradient(mio_loss, views, device, torch.float32, backend=name, **numbers)
    plain = gradient(reference.mio_loss, views, device, torch.float32, **numbers)
    exact = gradient(reference.mio_loss, views, device, torch.float64, **numbers)
    assert relative_error(grad, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("regularizer", [0.0, 1.0, 100.0])
def test_labels_of_rows_that_agree(regularizer, backend):
    """Rows of one label are one vector, up to 1e-6: the classes have collapsed."""
    name, device = backend
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (150,), generator=generator)
    rows = torch.randn(20, 12, generator=generator)[labels]
    views = [rows + 1e-6 * torch.randn(150, 12, generator=generator) for _ in range(2)]
    numbers = {"temperature": 2.0, "regularizer": regularizer, "labels": labels.to(device)}
    grad = gradient(mio_loss, views, device, torch.float32, backend=name, **numbers)
    plain = gradient(reference.mio_loss, views, device, torch.float32, **numbers)
    exact = gradient(reference.mio_loss, views, device, torch.float64, **numbers)
    assert relative_error(grad, exact) <= 2 * relative_error(plain, exact)


@pytest.mark.parametrize("apart", [0.0, 1e-6])
@pytest.mark.parametrize("with_ids", [False, True])
def test_distance_and_gradients_of_both_sides(with_ids, apart, backend):
    """The op with columns of its own, as a process of a group calls it: the linear term alone."""
    name, device = backend
    x, y = (z.to(device) for z in agreeing_views(130, 24, apart))
    ids = (torch.arange(130, device=device),) * 2 if with_ids else (None, None)

    def run(backend, dtype):
        leaves = [z.to(dtype).requires_grad_() for z in (x, y)]
        loss, _ = ops.pairwise_bce(
            *leaves, weights=(0.0, 0.0, 3.0), x_ids=ids[0], y_ids=ids[1], normalize=True, backend=backend
        )
        return loss, torch.cat(torch.autograd.grad(loss, leaves))

    (loss, grad), (exact_loss, exact_grad) = run(name, torch.float32), run("reference", torch.float64)
    if apart == 0:
        assert loss == 0 and (grad == 0).all()
    else:  # the rounding of the rows, 6e-8, beside differences of 1e-6
        assert relative_error(loss, exact_loss) < 0.05
        assert relative_error(grad, exact_grad) < 0.1


@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dim, scale, bias", [(17, 5.27, -5.68), (17, 8.0, -7.0), (128, 5.27, -5.27)])
def test_bfloat16_where_positives_and_negatives_balance(dim, scale, bias, seed, with_ids, backend):
    """Texts that agree with their images, at a bias where all that is left of the gradient is a small difference."""
    name, device = backend
    rows = torch.randn(255, dim, generator=torch.Generator().manual_seed(seed))
    x = F.normalize(rows).to(device, torch.bfloat16)
    ids = {n: torch.arange(255, device=device) for n in ("image_ids", "text_ids")} if with_ids else {}

    def run(backend, dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for _ in range(2)]
        return torch.cat(torch.autograd.grad(siglip_loss(*leaves, scale, bias, backend=backend, **ids), leaves))

    exact = run("reference", torch.float64)
    assert relative_error(run(name, torch.bfloat16), exact) <= 2 * relative_error(exact.bfloat16(), exact)
