# SPDX-License-Identifier: Apache-2.0
"""mio_ext.analysis: every closed form of docs/theory.md against autograd, a real step, or a known divergence."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, run_python, views
from torch import nn

import mio_ext
from mio_ext import analysis, reference
from mio_ext.analysis import BatchNorm

TERMS = {"temperature": 0.3, "negative_temperature": 0.7, "regularizer": 1.3, "bias": -0.4, "negative_weight": 2.5}


def three_terms(z1, z2, temperature, negative_temperature, regularizer, bias, negative_weight):
    """L_pos, L_neg and L_reg of eq. (3)-(5), each with its own graph."""
    n, batch = 2 * len(z1), len(z1)
    z = reference.normalized(torch.cat([z1, z2]))
    s = z @ z.T
    index = torch.arange(n)
    partner = (index + batch) % n
    negative = (index[:, None] != index) & (partner[:, None] != index)
    return (
        reference.softplus(-(s[index, partner] / temperature + bias)).mean(),
        negative_weight * reference.softplus(s[negative] / negative_temperature + bias).mean(),
        regularizer * (z[:batch] - z[batch:]).square().mean(),
    )


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["cpu", "reference"])
def name(request):
    return request.param


class TestGradientParts:
    @pytest.mark.parametrize("shape", [(2, 2), (5, 3), (33, 17), (64, 128)], ids=str)
    def test_against_autograd(self, name, shape):
        z1, z2 = views(*shape, torch.float64)
        parts = analysis.gradient_parts(z1, z2, **TERMS, backend=name)
        for part, term in zip(parts, three_terms(z1, z2, **TERMS), strict=True):
            exact = torch.cat(torch.autograd.grad(term, [z1, z2], retain_graph=True))
            assert relative_error(part, exact) < 1e-10
        whole = torch.cat(torch.autograd.grad(reference.mio_loss(z1, z2, **TERMS), [z1, z2]))
        assert relative_error(parts.total, whole) < 1e-10

    def test_equations_23_to_25(self):
        """Pair by pair, as docs/theory.md writes them."""
        z1, z2 = (z.detach() for z in views(6, 5, torch.float64))
        batch, dim, n = 6, 5, 12
        z = torch.cat([z1, z2])
        norm = z.norm(dim=1)
        unit = z / norm[:, None]
        expected = torch.zeros(3, n, dim, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                s = float(unit[i] @ unit[j])
                tangent = (unit[j] - s * unit[i]) / norm[i]
                if j == (i + batch) % n:
                    sigma = 1 / (1 + math.exp(s / 0.3 - 0.4))
                    expected[0, i] -= 2 * sigma / (n * 0.3) * tangent
                    expected[2, i] -= 2 * 1.3 / (batch * dim) * tangent
                elif j != i:
                    sigma = 1 / (1 + math.exp(-s / 0.7 + 0.4))
                    expected[1, i] += 2.5 * 2 * sigma / (n * (n - 2) * 0.7) * tangent
        for part, exact in zip(analysis.gradient_parts(z1, z2, **TERMS), expected, strict=True):
            assert relative_error(part, exact) < 1e-10
            assert (part * z).sum(1).abs().max() < 1e-15  # tangent: a step cannot shorten a row

    def test_16_bits_give_float32_and_lose_no_pair(self, name):
        z1, z2 = views(300, 8, torch.float16)
        parts = analysis.gradient_parts(z1, z2, backend=name)
        exact = analysis.gradient_parts(z1.double(), z2.double(), backend="reference")
        for part, expected in zip(parts, exact, strict=True):
            assert part.dtype == torch.float32
            assert relative_error(part, expected) < 1e-5

    def test_a_zero_row_has_none_and_nothing_is_attached_to_a_graph(self, name):
        z1, z2 = views(4, 3, torch.float64)
        with torch.no_grad():
            z1[1] = 0
        parts = analysis.gradient_parts(z1, z2, backend=name)
        assert all((part[1] == 0).all() and part.isfinite().all() for part in parts)
        assert not any(part.requires_grad for part in parts)
        assert z1.grad is None
        with torch.no_grad():
            assert torch.equal(analysis.gradient_parts(z1, z2, backend=name).total, parts.total)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            (
                (torch.ones(4, 3), torch.ones(5, 3)),
                ValueError,
                r"gradient_parts: z2 must be \[B, D\] like z1 \(\[4, 3\]\), got \[5, 3\]",
            ),
            (
                (torch.ones(1, 3), torch.ones(1, 3)),
                ValueError,
                r"gradient_parts: z1 must have at least 2 rows, .*, got \[1, 3\]",
            ),
            (
                (torch.ones(4, 3), torch.ones(4, 3).long()),
                TypeError,
                "gradient_parts: z2 must be float32, .* torch.int64",
            ),
        ],
    )
    def test_wrong_features(self, arguments, error, message):
        with pytest.raises(error, match=message):
            analysis.gradient_parts(*arguments)

    def test_wrong_numbers(self):
        z = torch.ones(4, 3)
        with pytest.raises(ValueError, match="gradient_parts: temperature must be positive and finite, got 0"):
            analysis.gradient_parts(z, z, temperature=0.0)
        with pytest.raises(ValueError, match="gradient_parts: backend must be one of"):
            analysis.gradient_parts(z, z, backend="fast")


def last_layer(rows, features, dim, *, affine, groups, eps=0.3, seed=0):
    """(h, linear, batch norm or None) in float64; a large eps, so that a forgotten one shows."""
    torch.manual_seed(seed)
    linear = nn.Linear(features, dim).double()
    norm = None
    if affine is not None:
        norm = nn.BatchNorm1d(dim, eps=eps, affine=affine).double()
        if affine:
            with torch.no_grad():
                norm.weight.normal_()
                norm.bias.normal_()
    return random(rows, features), linear, norm


def forward(h, linear, norm, groups):
    u = linear(h)
    return u if norm is None else torch.cat([norm(part) for part in u.chunk(groups)])


def description(h, linear, norm, groups):
    if norm is None:
        return None
    weight = norm.weight.detach() if norm.affine else None
    return BatchNorm(linear(h).detach(), weight, norm.eps, groups)


LAYERS = pytest.mark.parametrize(
    ("affine", "groups"),
    [(None, 1), (False, 1), (True, 1), (True, 2)],
    ids=["linear", "batch norm", "affine batch norm", "batch norm per view"],
)


class TestLayer:
    @LAYERS
    def test_gradient_against_autograd(self, affine, groups):
        h, linear, norm = last_layer(24, 7, 5, affine=affine, groups=groups)
        z = forward(h, linear, norm, groups)
        parts = analysis.gradient_parts(*z.chunk(2), **TERMS)
        described = description(h, linear, norm, groups)
        gradients = [analysis.layer_gradient(h, part, described) for part in parts]
        for gradient, term in zip(gradients, three_terms(*z.chunk(2), **TERMS), strict=True):
            learnt = [linear.weight, *(norm.parameters() if norm is not None else ())]
            exact = torch.autograd.grad(term, [*learnt, linear.bias], retain_graph=True)
            ours = [g for g in (gradient.weight, gradient.norm_weight, gradient.norm_bias) if g is not None]
            for ours_k, exact_k in zip(ours, exact[:-1], strict=True):
                assert relative_error(ours_k, exact_k) < 1e-10
            if norm is None:
                assert relative_error(gradient.bias, exact[-1]) < 1e-10
            else:  # eq. (31): batch norm leaves nothing for the bias
                assert gradient.bias.abs().max() < 1e-14 > exact[-1].abs().max()

    @pytest.mark.parametrize("groups", [1, 3])
    def test_the_jacobian_is_that_of_batch_norm_and_symmetric(self, groups):
        u, gamma = random(12, 3), random(3, seed=2)

        def normalize(u):
            return torch.cat([F.batch_norm(part, None, None, gamma, training=True) for part in u.chunk(groups)])

        exact = torch.autograd.functional.jacobian(normalize, u).reshape(36, 36)
        norm = BatchNorm(u, gamma, groups=groups)
        basis = torch.eye(36, dtype=torch.float64).view(36, 12, 3)
        ours = torch.stack([analysis.batch_norm_jacobian(norm, v).flatten() for v in basis], dim=1)
        assert relative_error(ours, exact) < 1e-10
        assert relative_error(ours, ours.T) < 1e-14

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("rate", [0.1, 1.0, 100.0])
    def test_displacement_of_a_linear_layer_is_exact(self, bias, rate):
        """K_ij = h_i·h_j + 1, no matter how long the step."""
        torch.manual_seed(0)
        linear, h = nn.Linear(7, 5, bias=bias).double(), random(24, 7)
        z = linear(h)
        dz = analysis.gradient_parts(*z.chunk(2)).total
        optimizer = torch.optim.SGD(linear.parameters(), lr=rate)
        mio_ext.mio_loss(*z.chunk(2)).backward()
        optimizer.step()
        measured = linear(h) - z
        assert relative_error(analysis.layer_displacement(h, dz, rate, bias=bias), measured) < 1e-10
        kernel = h @ h.T + float(bias)
        assert relative_error(-rate * kernel @ dz, measured) < 1e-10

    @pytest.mark.parametrize(("affine", "groups"), [(False, 1), (True, 1), (True, 2)])
    def test_displacement_through_batch_norm(self, affine, groups):
        def model_and_prediction(rate):
            h, linear, norm = last_layer(24, 7, 5, affine=affine, groups=groups)
            z = forward(h, linear, norm, groups)
            dz = analysis.gradient_parts(*z.chunk(2)).total
            predicted = analysis.layer_displacement(h, dz, rate, norm=description(h, linear, norm, groups))
            return nn.ModuleList([linear, norm]), lambda: forward(h, linear, norm, groups), predicted

        errors_fall_as_the_square(model_and_prediction, rates=(0.1, 0.05, 0.025))

    def test_kernel_is_never_formed(self):
        """N = 100,000: K alone would take 80 GB."""
        h, dz = torch.randn(100_000, 4).double(), torch.randn(100_000, 3).double()
        moved = analysis.layer_displacement(h, dz, 1.0, norm=BatchNorm(dz))
        assert moved.shape == dz.shape and moved.isfinite().all()


def errors_fall_as_the_square(model_and_prediction, rates):
    """Predicted against measured Δz of a real step of SGD: each halving of η quarters the error."""
    errors, sizes = [], []
    for rate in rates:
        model, z_of, predicted = model_and_prediction(rate)
        z = z_of()
        mio_ext.mio_loss(*z.chunk(2)).backward()
        torch.optim.SGD(model.parameters(), lr=rate).step()
        measured = z_of() - z
        errors.append((measured - predicted).norm().item())
        sizes.append(measured.norm().item())
    assert errors[-1] < 0.02 * sizes[-1]  # the first order is the bulk of it ...
    assert errors[-1] > 1e-6 * sizes[-1]  # ... and what is left is no rounding
    for before, after in itertools.pairwise(errors):
        assert before / after == pytest.approx(4, rel=0.1), errors


def test_displacement_of_a_network():
    """All parameters of a projector with batch norm move."""

    def model_and_prediction(rate):
        torch.manual_seed(0)
        x = random(24, 7)
        model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 5), nn.BatchNorm1d(5))
        model = model.double()
        dz = analysis.gradient_parts(*model(x).chunk(2)).total
        frozen = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def z_of(parameters):
            return torch.func.functional_call(model, {**parameters, **{k: b.clone() for k, b in frozen.items()}}, x)

        predicted = analysis.displacement(z_of, dict(model.named_parameters()), dz, rate)
        return model, lambda: model(x), predicted

    errors_fall_as_the_square(model_and_prediction, rates=(0.02, 0.01, 0.005))


def test_the_general_displacement_contains_that_of_a_layer():
    h, linear, norm = last_layer(24, 7, 5, affine=True, groups=1)
    dz = random(24, 5, seed=3)

    def z_of(p):
        return F.batch_norm(h @ p["w"].T + p["c"], None, None, p["gamma"], p["beta"], training=True, eps=norm.eps)

    parameters = {"w": linear.weight, "c": linear.bias, "gamma": norm.weight, "beta": norm.bias}
    general = analysis.displacement(z_of, parameters, dz, 0.3)
    special = analysis.layer_displacement(h, dz, 0.3, norm=description(h, linear, norm, 1))
    assert relative_error(special, general) < 1e-10


def test_memory_stays_linear():
    """N = 16,384: under 60 MB more at the peak, where the logits alone would take 1 GB."""
    script = """
import torch
from mio_ext import analysis
from pathlib import Path

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

z1, z2 = torch.randn(8192, 32), torch.randn(8192, 32)
analysis.gradient_parts(z1[:64], z2[:64])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew; a child inherits its parent's
before = peak()
parts = analysis.gradient_parts(z1, z2)
analysis.layer_displacement(torch.cat([z1, z2]), parts.total, 0.1)
print(peak() - before)
"""
    result = run_python("-c", script)
    assert result.returncode == 0, result.stderr
    assert 6e6 < int(result.stdout) < 60e6  # at least the three parts: the measurement works


def test_a_heavy_weight_is_exponential_repulsion():
    """Eq. (37): with b = -log ω the loss tends to alignment and uniformity, without a logarithm."""
    z1, z2 = (random(12, 5, seed=seed).requires_grad_() for seed in (1, 2))
    tau, weight = 0.4, 1e7
    loss = mio_ext.mio_loss(
        z1, z2, temperature=tau, negative_weight=weight, bias=-math.log(weight), regularizer=0.0, backend="reference"
    )
    actual = torch.cat(torch.autograd.grad(loss, [z1, z2]))
    z = reference.normalized(torch.cat([z1, z2]))
    s = z @ z.T / tau
    index = torch.arange(24)
    partner = (index + 12) % 24
    negative = (index[:, None] != index) & (partner[:, None] != index)
    limit = -s[index, partner].mean() + s[negative].exp().mean()
    assert relative_error(actual, torch.cat(torch.autograd.grad(limit, [z1, z2]))) < 1e-5
