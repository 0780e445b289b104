"""The Poisson distribution with rate r: T(z) = z, λ = log r, A = r, h(z) = 1/z!, and ∇_μ E_q[f] = E_q[f(z + 1) − f(z)].

The values are infinitely many and have no list: `num_values` is None, and a fit draws z instead of summing over it.

Source: Khan & Rue 2023, section 2; Knessl 1998, "Integral representations and asymptotic expansions for Shannon and
Renyi entropies".
"""

from __future__ import annotations

from math import log, pi
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.special import gammaln

from ._natural import Natural, family

__all__ = ["PoissonNatural"]

LARGE = 100.0  # from here on the entropy's series is exact to 1e-12
NUM_TERMS = 260  # at the rate LARGE the terms beyond have weight 1e-38


@family(dist.Poisson, torch.distributions.Poisson)
class PoissonNatural(Natural):
    """λ = log r, of the batch's shape."""

    linear: Tensor

    ranks = (0,)
    discrete = True
    host_parameters = (("rate",),)
    num_values = None

    @property
    def rate(self) -> Tensor:
        return torch.exp(self.linear)

    @classmethod
    def from_distribution(cls, distribution: dist.Poisson) -> Self:
        return cls(torch.log(distribution.rate))

    def to_distribution(self) -> dist.Poisson:
        return dist.Poisson(self.rate)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, or a half where that is zero."""
        return cls(torch.log((value * 1.0).clamp(min=0.5)))

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(value.to(self.linear.dtype))

    def log_base_measure(self, value: Tensor) -> Tensor:
        return -gammaln(value.to(self.linear.dtype) + 1)

    def expected_log_base_measure(self) -> Tensor:
        """−E[log z!], by the sum over z for small rates and by the series of the entropy for large ones."""
        small, large = self.rate.clamp(max=LARGE), self.rate.clamp(min=LARGE)
        z = torch.arange(NUM_TERMS, dtype=small.dtype, device=small.device)
        log_factorial = gammaln(z + 1)
        weights = torch.exp(z * self.linear.clamp(max=log(LARGE))[..., None] - small[..., None] - log_factorial)
        x = 1 / large
        entropy = (torch.log(2 * pi * large) + 1) / 2
        entropy = entropy - x * (1 / 12 + x * (1 / 24 + x * (19 / 360 + x * (9 / 80 + x * 863 / 2520))))
        series = large - large * torch.log(large) - entropy
        return torch.where(self.rate > LARGE, series, -(weights * log_factorial).sum(-1))

    def log_partition(self) -> Tensor:
        return self.rate

    def to_expectation(self):
        return self.Expectation(self.rate)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(torch.log(expectation.linear))

    def in_domain(self) -> Tensor:
        return self.linear.isfinite()

    def fisher_solve(self, gradient) -> Self:
        return type(self)(gradient.linear / self.rate)

    def difference_weight(self, value: Tensor) -> Tensor:
        """w with ∇_μ E_q[f] = E_q[w(z) (f(z + 1) − f(z))]; one."""
        return torch.ones_like(value, dtype=self.linear.dtype)

    @classmethod
    def match_difference(cls, difference: Tensor) -> Self:
        """c from E_q[w(z) (f(z + 1) − f(z))]."""
        return cls(difference)
