"""The inverse Gaussian distribution with mean m and concentration s: T(z) = (z, 1/z), λ = (−s/(2m²), −s/2).

    q(z) = (2π z³)^(−1/2) exp(⟨λ, T(z)⟩ − A),    A = −s/m − log(s)/2,    μ = (m, 1/m + 1/s)

Its sigma points are c e^(±t) with sinh² t = m/s and c cosh t = m; from f' = c₁ − c₂/z² at the two follows c.

Source: Michael, Schucany & Haas 1976 for the draws; Figurnov, Mohamed & Mnih 2018 for their gradients.
"""

from __future__ import annotations

from math import log, pi
from typing import ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.special import log_ndtr

from ._natural import Natural, at_both, family, smallest_spread

__all__ = ["InverseGaussian", "InverseGaussianNatural"]


class InverseGaussian(dist.TorchDistribution):
    """The time at which a Brownian motion with drift first reaches a level; variance loc³ / concentration.

    Args:
        loc: the mean m.
        concentration: s.
    """

    arg_constraints: ClassVar = {"loc": constraints.positive, "concentration": constraints.positive}
    support = constraints.positive
    has_rsample = True

    def __init__(self, loc, concentration, validate_args=None) -> None:
        self.loc, self.concentration = broadcast_all(loc, concentration)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(InverseGaussian, _instance)
        new.loc, new.concentration = self.loc.expand(batch_shape), self.concentration.expand(batch_shape)
        super(InverseGaussian, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()) -> Tensor:
        loc, concentration = self.loc.detach(), self.concentration.detach()
        noise = loc.new_empty(self._extended_shape(torch.Size(sample_shape)))
        # of the two roots z with s (z − m)² / (m² z) = ν², the smaller with probability m / (m + z)
        w = noise.normal_() ** 2 * loc / concentration / 2
        root = 1 / (1 + w + torch.sqrt(w * (w + 2)))
        value = loc * torch.where(torch.rand_like(noise) * (1 + root) <= 1, root, 1 / root)
        by_loc, by_concentration = self._implicit_gradient(value, loc, concentration)
        return value + by_loc * (self.loc - loc) + by_concentration * (self.concentration - concentration)

    @staticmethod
    def _implicit_gradient(value: Tensor, loc: Tensor, concentration: Tensor) -> tuple[Tensor, Tensor]:
        """∂z/∂θ = −∂F/∂θ / q(z), with Mills' ratio of b = √(s/z) (z/m + 1)."""
        b = torch.sqrt(concentration / value) * (value / loc + 1)
        mills = torch.exp(log_ndtr(-b) + b**2 / 2 + log(2 * pi) / 2)
        scaled = 2 * mills * value * torch.sqrt(value / concentration) / loc
        return scaled * concentration / loc, value / concentration - scaled

    def log_prob(self, value) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        exponent = self.concentration * (value - self.loc) ** 2 / (2 * self.loc**2 * value)
        return (torch.log(self.concentration / (2 * pi)) - 3 * torch.log(value)) / 2 - exponent

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self.loc**3 / self.concentration


@family(InverseGaussian)
class InverseGaussianNatural(Natural):
    """λ = (−s/(2m²), −s/2), each of the batch's shape."""

    linear: Tensor
    inverse: Tensor

    ranks = (0, 0)
    host_parameters = (("loc", "concentration"),)

    @property
    def loc(self) -> Tensor:
        return torch.sqrt(self.inverse / self.linear)

    @property
    def concentration(self) -> Tensor:
        return -2 * self.inverse

    @classmethod
    def from_distribution(cls, distribution: InverseGaussian) -> Self:
        loc, concentration = torch.broadcast_tensors(distribution.loc, distribution.concentration)
        return cls(linear=-concentration / loc**2 / 2, inverse=-concentration / 2)

    def to_distribution(self) -> InverseGaussian:
        return InverseGaussian(self.loc, self.concentration)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, standard deviation a tenth of it."""
        return cls(linear=-50 / value, inverse=-50 * value)

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(linear=value, inverse=1 / value)

    def log_base_measure(self, value: Tensor) -> Tensor:
        return -(log(2 * pi) + 3 * torch.log(value)) / 2

    def base_slope(self, value: Tensor) -> Tensor:
        return -1.5 / value

    def expected_log_base_measure(self) -> Tensor:
        """From E[log z] = log m − e^x E₁(x) with x = 2 s/m."""
        loc = self.loc
        expected_log = torch.log(loc) - _scaled_exponential_integral(2 * self.concentration / loc)
        return -(log(2 * pi) + 3 * expected_log) / 2

    def log_partition(self) -> Tensor:
        return -2 * torch.sqrt(self.linear * self.inverse) - torch.log(self.concentration) / 2

    def to_expectation(self):
        return self.Expectation(linear=self.loc, inverse=1 / self.loc + 1 / self.concentration)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        loc = expectation.linear
        concentration = loc / (expectation.inverse * loc - 1)
        return cls(linear=-concentration / loc**2 / 2, inverse=-concentration / 2)

    def in_domain(self) -> Tensor:
        finite = self.linear.isfinite() & self.inverse.isfinite()
        return (self.linear < 0) & (self.inverse < 0) & finite

    def fisher_solve(self, gradient) -> Self:
        # F⁻¹ = ∂λ/∂μ with m = μ₁, 1/s = μ₂ − 1/μ₁
        loc, concentration = self.loc, self.concentration
        change = -(concentration**2) * (gradient.inverse + gradient.linear / loc**2)
        linear = (concentration * gradient.linear / loc - change / 2) / loc**2
        return type(self)(linear=linear, inverse=-change / 2)

    def sigma_points(self, signs: Tensor) -> Tensor:
        ratio = self.loc / self.concentration
        spread = torch.asinh(torch.sqrt(ratio)).clamp(min=smallest_spread(ratio.dtype))
        return self.loc / torch.sqrt(1 + ratio) * torch.exp(signs[..., 0] * spread)

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        (up, down), (high, low) = at_both(gradients, signs[..., 0]), at_both(values, signs[..., 0])
        # f' = c₁ − c₂/z²; with z² times it, the two sides are of one size
        inverse = (up - down) / (high - low) * (high * low) ** 2 / (high + low)
        linear = (up * high**2 - down * low**2) / (high - low) / (high + low)
        return cls(linear=linear, inverse=inverse)


def _scaled_exponential_integral(x: Tensor) -> Tensor:
    """e^x E₁(x), by the series about 0 and, from 2 on, by the continued fraction 1/(x + 1 − 1/(x + 3 − …))."""
    small, large = x.clamp(max=2), x.clamp(min=2)
    series = torch.zeros_like(x)
    for k in range(26, 0, -1):
        series = -small / k * (series - 1 / k)  # Σ (−1)^(k+1) x^k / (k k!), by Horner's rule
    fraction = large + 81
    for k in range(40, 0, -1):
        fraction = large + 2 * k - 1 - k**2 / fraction
    return torch.where(x > 2, 1 / fraction, torch.exp(small) * (-0.5772156649015329 - torch.log(small) + series))
