# SPDX-License-Identifier: Apache-2.0
"""The reference against the paper's formulas written another way, and against its own equations."""

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, views

from mio_ext import reference


def mio_by_cosine_similarity(z1, z2, tau, regularizer):
    """The way the paper's public code goes about it: every pair's cosine by broadcasting."""
    z = torch.cat([z1, z2])
    n, batch = len(z), len(z1)
    s = F.cosine_similarity(z[:, None], z[None], dim=-1)
    target = torch.zeros(n, n, dtype=z.dtype)
    for i in range(n):
        target[i, (i + batch) % n] = 1
    bce = F.binary_cross_entropy_with_logits(s / tau, target, reduction="none")
    positive = bce[target == 1].mean()
    negative = bce[(target == 0) & ~torch.eye(n, dtype=torch.bool)].mean()
    return positive + negative + regularizer * F.mse_loss(F.normalize(z1), F.normalize(z2))


@pytest.mark.parametrize("batch, dim", [(2, 1), (5, 3), (32, 20)])
def test_mio_is_mean_binary_cross_entropy_over_pairs(batch, dim):
    z1, z2 = views(batch, dim, torch.float64)
    expected = mio_by_cosine_similarity(z1, z2, 0.3, 0.7)
    actual = reference.mio_loss(z1, z2, temperature=0.3, regularizer=0.7)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_general_form_equals_mio():
    z1, z2 = views(9, 4, torch.float64)
    batch, dim, n = 9, 4, 18
    general, stats = reference.pairwise_bce(
        torch.cat([z1, z2]),
        scale=(1 / 0.3, 1 / 0.2),
        bias=-0.4,
        weights=(1 / n, 1.7 / (n * (n - 2)), 2.5 / (batch * dim)),
        shift=batch,
        exclude_self=True,
        normalize=True,
    )
    numbers = {"temperature": 0.3, "negative_temperature": 0.2, "regularizer": 2.5, "bias": -0.4}
    mio = reference.mio_loss(z1, z2, negative_weight=1.7, **numbers)
    torch.testing.assert_close(general, mio, rtol=1e-13, atol=0)
    assert (stats.positives, stats.negatives) == (n, n * (n - 2))


def test_labels_of_their_own_change_nothing():
    z1, z2 = views(7, 5, torch.float64)
    torch.testing.assert_close(
        reference.mio_loss(z1, z2, labels=torch.arange(7) * 3), reference.mio_loss(z1, z2), rtol=1e-13, atol=0
    )


def test_weighted_by_the_number_of_negatives_it_is_sigclr():
    z1, z2 = views(6, 5, torch.float64)
    n, tau, b = 12, 0.2, -3.0
    logits = F.cosine_similarity((z := torch.cat([z1, z2]))[:, None], z[None], dim=-1) / tau + b
    row = torch.arange(n)
    target = F.one_hot((row + 6) % n, n).double()
    per_row = F.binary_cross_entropy_with_logits(logits, target, weight=1 - torch.eye(n), reduction="sum") / n
    actual = reference.mio_loss(z1, z2, temperature=tau, bias=b, negative_weight=n - 2.0, regularizer=0.0)
    torch.testing.assert_close(actual, per_row, rtol=1e-12, atol=0)


def test_gradient_is_equations_7_to_10():
    batch, dim, tau_p, tau_n, weight, lam, b = 6, 5, 0.3, 0.7, 3.0, 1.3, -0.2
    z1, z2 = views(batch, dim, torch.float64)
    n = 2 * batch
    numbers = {"temperature": tau_p, "negative_temperature": tau_n, "negative_weight": weight}
    loss = reference.mio_loss(z1, z2, **numbers, regularizer=lam, bias=b)
    grad = torch.cat(torch.autograd.grad(loss, [z1, z2]))

    z = torch.cat([z1, z2]).detach()
    norm = z.norm(dim=1, keepdim=True)
    unit = z / norm
    s = unit @ unit.T
    g = weight * torch.sigmoid(s / tau_n + b) / (n * (n - 2) * tau_n)  # (8)
    i = torch.arange(n)
    p = (i + batch) % n
    g[i, p] = -torch.sigmoid(-s[i, p] / tau_p - b) / (n * tau_p)  # (7)
    g[i, i] = 0
    d_unit = 2 * g @ unit + 2 * lam / (batch * dim) * (unit - unit[p])  # (9)
    expected = (d_unit - unit * (unit * d_unit).sum(1, keepdim=True)) / norm  # (10)
    assert relative_error(grad, expected) < 1e-13


def test_zero_row_has_cosine_zero_and_gradient_zero():
    z1, z2 = views(4, 3, torch.float64)
    with torch.no_grad():
        z1[2] = 0
    loss, stats = reference.pairwise_bce(torch.cat([z1, z2]), shift=4, exclude_self=True, normalize=True)
    cosines = F.normalize(torch.cat([z1, z2])) @ F.normalize(torch.cat([z1, z2])).T
    torch.testing.assert_close(stats.positive_cosine, cosines.diagonal(4).mean(), rtol=1e-12, atol=0)
    grad1, _ = torch.autograd.grad(loss, [z1, z2])
    assert loss.isfinite()
    assert (grad1[2] == 0).all()
    assert (grad1[[0, 1, 3]].norm(dim=1) > 1e-6).all()


def test_second_derivatives():
    z1, z2 = views(3, 4, torch.float64)
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *a: reference.mio_loss(a[0], a[1], temperature=a[2], bias=a[3]), (z1, z2, tau, b)
    )


def test_siglip_by_its_published_algorithm():
    x, y = (F.normalize(v.detach()) for v in views(6, 8, torch.float64))
    t, b = 10.0, -10.0
    labels = 2 * torch.eye(6, dtype=torch.float64) - 1
    expected = -F.logsigmoid(labels * (t * x @ y.T + b)).sum() / 6
    torch.testing.assert_close(reference.siglip_loss(x, y, t, b), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        reference.siglip_loss(x, y, t, b, image_ids=torch.arange(6), text_ids=torch.arange(6)), expected
    )
    everything = -F.logsigmoid(-(t * x @ y.T + b)).sum() / 6
    torch.testing.assert_close(reference.siglip_loss(x, y, t, b, negative_only=True), everything)
