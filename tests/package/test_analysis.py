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

TERMS = {"temperature": 0.3, "negative_temperature": 0.7, "regularizer": 1.3, "bias": -0.4}


def three_terms(z1, z2, temperature, negative_temperature, regularizer, bias):
    """L_pos, L_neg and L_reg of eq. (3)-(5), each with its own graph."""
    n, batch = 2 * len(z1), len(z1)
    z = reference.normalized(torch.cat([z1, z2]))
    s = z @ z.T
    index = torch.arange(n)
    partner = (index + batch) % n
    negative = (index[:, None] != index) & (partner[:, None] != index)
    return (
        reference.softplus(-(s[index, partner] / temperature + bias)).mean(),
        reference.softplus(s[negative] / negative_temperature + bias).mean(),
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
                    expected[1, i] += 2 * sigma / (n * (n - 2) * 0.7) * tangent
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
            ((torch.ones(4, 3), torch.ones(4, 3).double()), TypeError, "gradient_parts: z2 must be torch.float32"),
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


class TestInformation:
    """x and y standard normal with correlation ρ against independent ones; log p/q is quadratic, so bilinear in
    features of x and y, which is a critic of the form (11)."""

    RHO = 0.8

    @staticmethod
    def log_ratio(x, y, rho):
        quadratic = (rho * x * y - rho**2 * (x.square() + y.square()) / 2) / (1 - rho**2)
        return quadratic - math.log(1 - rho**2) / 2

    @classmethod
    def expectations(cls, critic):
        """E_p softplus(−T) and E_q softplus(T) by the trapezoid rule, spectrally accurate for these integrands."""
        grid = torch.linspace(-9, 9, 901, dtype=torch.float64)
        x, y = grid[:, None], grid
        q = torch.exp(-(x.square() + y.square()) / 2) / (2 * math.pi) * (grid[1] - grid[0]) ** 2
        p = q * cls.log_ratio(x, y, cls.RHO).exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-12)
        t = critic(x, y)
        return float((p * reference.softplus(-t)).sum()), float((q * reference.softplus(t)).sum())

    @classmethod
    def divergence(cls):
        """JSD by its definition, the mean of two KL divergences to the mixture; by quadrature."""
        grid = torch.linspace(-9, 9, 901, dtype=torch.float64)
        x, y = grid[:, None], grid
        log_q = -(x.square() + y.square()) / 2 - math.log(2 * math.pi)
        log_p = log_q + cls.log_ratio(x, y, cls.RHO)
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        kl = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
        return float(kl.sum() * (grid[1] - grid[0]) ** 2) / 2

    def test_the_true_log_ratio_attains_the_divergence(self):
        """Eq. (17) and (18), without a sample."""
        assert 0.1 < (jsd := self.divergence()) < math.log(2)
        positive, negative = self.expectations(lambda x, y: self.log_ratio(x, y, self.RHO))
        assert math.log(2) - (positive + negative) / 2 == pytest.approx(jsd, abs=1e-12)

    def sample(self, rows=20_000, seed=0):
        noise = random(2, rows, seed=seed)
        return noise[0], self.RHO * noise[0] + math.sqrt(1 - self.RHO**2) * noise[1]

    def estimate(self, x, y, scale, bias):
        """(js_estimate of the statistics of all pairs, four standard errors), x and y being features [M, F]."""
        _, stats = mio_ext.siglip_loss(x, y, scale, bias, return_stats=True)
        positive = reference.softplus(-(scale * (x * y).sum(1) + bias))
        # A mean over all pairs varies as the mean over rows of their own means does, once for either side.
        negative = reference.softplus(scale * x[:2000] @ y[:2000].T + bias)
        error = (positive.std() + negative.mean(1).std() + negative.mean(0).std()) / 2 / math.sqrt(len(x))
        return float(analysis.js_estimate(stats)), 4 * float(error)

    def test_estimate_from_all_pairs_of_a_sample(self):
        """The kernel's statistics give the divergence for the true log ratio, and less for another one."""

        def estimate(rho):
            x, y = self.sample()
            k, one = rho**2 / 2, torch.ones_like(x)
            bilinear = torch.stack([rho * x, -k * x.square(), one], 1), torch.stack([y, one, -k * y.square()], 1)
            return self.estimate(*bilinear, 1 / (1 - rho**2), -math.log(1 - rho**2) / 2)

        jsd = self.divergence()
        value, margin = estimate(self.RHO)
        assert margin < 0.1 * jsd
        assert value == pytest.approx(jsd, abs=margin)
        wrong, margin = estimate(0.2)
        assert wrong < jsd - margin

    @pytest.mark.parametrize("temperature", [0.1, 0.5])
    def test_a_cosine_critic_finds_less(self, temperature):
        """x and y on a circle: what the critic misses is the calibration error of eq. (19), in the same numbers."""

        def angle(v):
            return math.pi * torch.erf(v / math.sqrt(2)) / 2

        def critic(x, y):
            return torch.cos(angle(x) - angle(y)) / temperature

        jsd = self.divergence()
        positive, negative = self.expectations(critic)
        exact = math.log(2) - (positive + negative) / 2
        assert exact < jsd - 0.01
        x, y = (torch.stack([angle(v).cos(), angle(v).sin()], 1) for v in self.sample())
        value, margin = self.estimate(x, y, 1 / temperature, 0.0)
        assert value == pytest.approx(exact, abs=margin)
        assert value < jsd - margin
        assert exact < analysis.js_ceiling(temperature)

        # Eq. (19): the gap is the mean KL divergence from the right probability to the critic's.
        grid = torch.linspace(-9, 9, 901, dtype=torch.float64)
        a, b = grid[:, None], grid
        q = torch.exp(-(a.square() + b.square()) / 2) / (2 * math.pi) * (grid[1] - grid[0]) ** 2
        right, guess = self.log_ratio(a, b, self.RHO), critic(a, b)
        eta = right.sigmoid()
        kl = eta * (F.logsigmoid(right) - F.logsigmoid(guess))
        kl += (1 - eta) * (F.logsigmoid(-right) - F.logsigmoid(-guess))
        gap = float((q * (1 + right.exp()) / 2 * kl).sum())
        assert jsd - exact == pytest.approx(gap, abs=1e-12)


class TestCeiling:
    @pytest.mark.parametrize(("temperature", "bias"), [(0.5, 0.0), (0.1, 0.0), (0.5, -1.0), (2.0, 0.7)])
    @pytest.mark.parametrize("batch", [2, 5, 30])
    def test_a_simplex_attains_it(self, temperature, bias, batch):
        """Rows at the corners of a regular simplex, both views the same: nothing can do better."""
        corners = torch.eye(batch, dtype=torch.float64) - 1 / batch
        _, stats = mio_ext.mio_loss(corners, corners, temperature=temperature, bias=bias, return_stats=True)
        ceiling = analysis.js_ceiling(temperature, bias, batch)
        assert float(analysis.js_estimate(stats)) == pytest.approx(ceiling, abs=1e-12)
        z1, z2 = views(batch, batch, torch.float64, noise=0.01)
        _, stats = mio_ext.mio_loss(z1, z2, temperature=temperature, bias=bias, return_stats=True)
        assert float(analysis.js_estimate(stats)) < ceiling

    def test_descent_on_free_rows_approaches_it_from_below(self):
        z1, z2 = views(6, 8, torch.float64)
        optimizer = torch.optim.SGD([z1, z2], lr=20.0)
        for _ in range(300):
            loss, stats = mio_ext.mio_loss(z1, z2, regularizer=0.0, return_stats=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ceiling = analysis.js_ceiling(0.5, batch=6)
        assert ceiling - 1e-3 < float(analysis.js_estimate(stats)) <= ceiling

    def test_limits(self):
        assert analysis.js_ceiling(0.5) == pytest.approx(analysis.js_ceiling(0.5, batch=10**9), abs=1e-8)
        # Without a bias half of log 2 at any temperature; with the best bias all of it.
        assert analysis.js_ceiling(1e-3) == pytest.approx(math.log(2) / 2, abs=1e-12)
        assert analysis.js_ceiling(1e-3, -500) == pytest.approx(math.log(2), abs=1e-12)

    def test_mistakes(self):
        with pytest.raises(ValueError, match="js_ceiling: temperature must be positive, got 0"):
            analysis.js_ceiling(0)
        with pytest.raises(ValueError, match="js_ceiling: batch must be at least 2, got 1"):
            analysis.js_ceiling(0.5, batch=1)


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
