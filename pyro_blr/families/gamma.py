"""The gamma distribution with shape a and rate b: T(z) = (log z, z), λ = (a − 1, −b), A = log Γ(a) − a log b.

Its sigma points are e^(s ± t) with s = E[log z] and cosh t = E[z] e^(−s); two of them match both statistics. From
z f' = c₁ + c₂ z at the two follows c. The Fisher information is [[ψ'(a), 1/b], [1/b, a/b²]] in λ.

Source: Khan & Rue 2023, section 2; Lin, Schmidt & Khan 2020, appendix.
"""

from __future__ import annotations

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.special import digamma, gammaln, polygamma

from ._natural import Natural, at_both, family, smallest_spread
from ._special import log_minus_digamma, trigamma_excess

__all__ = ["GammaNatural", "inverse_log_minus_digamma", "sigma_points_of"]


@family(dist.Gamma, dist.Chi2, torch.distributions.Gamma)
class GammaNatural(Natural):
    """λ = (a − 1, −b), each of the batch's shape."""

    log: Tensor
    linear: Tensor

    ranks = (0, 0)
    host_parameters = (("concentration", "rate"),)

    @property
    def concentration(self) -> Tensor:
        return self.log + 1

    @property
    def rate(self) -> Tensor:
        return -self.linear

    @classmethod
    def from_distribution(cls, distribution: dist.Gamma) -> Self:
        concentration, rate = torch.broadcast_tensors(distribution.concentration, distribution.rate)
        return cls(log=concentration - 1, linear=-rate)

    def to_distribution(self) -> dist.Gamma:
        return dist.Gamma(self.concentration, self.rate)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, standard deviation a tenth of it."""
        concentration = torch.full_like(value, 100.0)
        return cls(log=concentration - 1, linear=-concentration / value)

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(log=torch.log(value), linear=value)

    def log_partition(self) -> Tensor:
        return gammaln(self.concentration) - self.concentration * torch.log(self.rate)

    def to_expectation(self):
        return self.Expectation(
            log=digamma(self.concentration) - torch.log(self.rate), linear=self.concentration / self.rate
        )

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        concentration = inverse_log_minus_digamma(torch.log(expectation.linear) - expectation.log)
        return cls(log=concentration - 1, linear=-concentration / expectation.linear)

    def in_domain(self) -> Tensor:
        finite = self.log.isfinite() & self.linear.isfinite()
        return (self.concentration > 0) & (self.rate > 0) & finite

    def fisher_solve(self, gradient) -> Self:
        a, b = self.concentration, self.rate
        excess = trigamma_excess(a)
        log = (a * gradient.log - b * gradient.linear) / excess
        linear = b * (polygamma(1, a) * b * gradient.linear - gradient.log) / excess
        return type(self)(log=log, linear=linear)

    def sigma_points(self, signs: Tensor) -> Tensor:
        return sigma_points_of(self.concentration, self.rate, signs[..., 0])

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        (up, down), (high, low) = at_both(values * gradients, signs[..., 0]), at_both(values, signs[..., 0])
        linear = (up - down) / (high - low)
        return cls(log=(up + down) / 2 - linear * (high + low) / 2, linear=linear)


def sigma_points_of(concentration: Tensor, rate: Tensor, signs: Tensor) -> Tensor:
    """e^(s ± t) with s = E[log z] and cosh t = E[z] e^(−s) = exp(log a − ψ(a))."""
    excess = torch.expm1(log_minus_digamma(concentration))
    spread = torch.log1p(excess + torch.sqrt(excess * (excess + 2)))  # arccosh(1 + excess)
    spread = spread.clamp(min=smallest_spread(spread.dtype))
    return torch.exp(digamma(concentration) - torch.log(rate) + signs * spread)


def inverse_log_minus_digamma(value: Tensor) -> Tensor:
    """a with log a − ψ(a) = y, by Newton's method on log a from Minka's closed approximation."""
    y = value
    log_a = torch.log((3 - y + torch.sqrt((y - 3) ** 2 + 24 * y)) / (12 * y))
    for _ in range(6):
        a = torch.exp(log_a)
        log_a = log_a + (log_minus_digamma(a) - y) / trigamma_excess(a)
    return torch.exp(log_a)
