# SPDX-License-Identifier: Apache-2.0
"""The information that the loss estimates, and its ceiling, where the right number is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import views

import mio_ext
from mio_ext import analysis, reference


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
        noise = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
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
