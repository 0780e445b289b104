"""The beta distribution with concentrations a₁, a₀: T(z) = (log z, log(1 − z)), λ = (a₁ − 1, a₀ − 1).

The Dirichlet distribution on (z, 1 − z); A = log B(a₁, a₀). From z (1 − z) f' = c₁ (1 − z) − c₂ z at two points
follows c.

Source: Khan & Rue 2023, section 2.
"""

from __future__ import annotations

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.special import digamma, gammaln

from ._natural import Natural, at_both, family
from .dirichlet import DirichletNatural, log_sigma_points

__all__ = ["BetaNatural"]


@family(dist.Beta, torch.distributions.Beta)
class BetaNatural(Natural):
    """λ = (a₁ − 1, a₀ − 1), each of the batch's shape."""

    log: Tensor
    log_complement: Tensor

    ranks = (0, 0)
    host_parameters = (("concentration1", "concentration0"),)

    @property
    def concentration1(self) -> Tensor:
        return self.log + 1

    @property
    def concentration0(self) -> Tensor:
        return self.log_complement + 1

    @classmethod
    def from_distribution(cls, distribution: dist.Beta) -> Self:
        one, zero = torch.broadcast_tensors(distribution.concentration1, distribution.concentration0)
        return cls(log=one - 1, log_complement=zero - 1)

    def to_distribution(self) -> dist.Beta:
        return dist.Beta(self.concentration1, self.concentration0)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, as if seen in twenty draws."""
        return cls(log=20 * value - 1, log_complement=20 * (1 - value) - 1)

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(log=torch.log(value), log_complement=torch.log1p(-value))

    def log_partition(self) -> Tensor:
        total = gammaln(self.concentration1 + self.concentration0)
        return gammaln(self.concentration1) + gammaln(self.concentration0) - total

    def to_expectation(self):
        total = digamma(self.concentration1 + self.concentration0)
        return self.Expectation(
            log=digamma(self.concentration1) - total, log_complement=digamma(self.concentration0) - total
        )

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        pair = torch.stack([expectation.log, expectation.log_complement], -1)
        return cls._from_pair(DirichletNatural.from_expectation(DirichletNatural.Expectation(pair)))

    def in_domain(self) -> Tensor:
        return self._dirichlet().in_domain()

    def fisher_solve(self, gradient) -> Self:
        pair = torch.stack([gradient.log, gradient.log_complement], -1)
        return self._from_pair(self._dirichlet().fisher_solve(DirichletNatural.Expectation(pair)))

    def sigma_points(self, signs: Tensor) -> Tensor:
        return torch.exp(log_sigma_points(self._dirichlet().concentration, signs)[..., 0])

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        # z (1 − z) f' = c₁ − (c₁ + c₂) z, a line
        along = values * (1 - values) * gradients
        (up, down), (high, low) = at_both(along, signs[..., 0]), at_both(values, signs[..., 0])
        total = -(up - down) / (high - low)
        log = (up + down) / 2 + total * (high + low) / 2
        return cls(log=log, log_complement=total - log)

    def _dirichlet(self) -> DirichletNatural:
        return DirichletNatural(torch.stack([self.log, self.log_complement], -1))

    @classmethod
    def _from_pair(cls, natural: DirichletNatural) -> Self:
        return cls(log=natural.log[..., 0], log_complement=natural.log[..., 1])
