"""The Bernoulli distribution over 0, 1: T(z) = z, λ = logit p, A = log(1 + e^λ), and ∇_μ E_q[f] = f(1) − f(0).

Source: Khan & Rue 2023, section 2.
"""

from __future__ import annotations

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._natural import Natural, family

__all__ = ["BernoulliNatural"]


@family(dist.Bernoulli, torch.distributions.Bernoulli)
class BernoulliNatural(Natural):
    """λ = logit p, of the batch's shape."""

    linear: Tensor

    ranks = (0,)
    discrete = True
    host_parameters = (("logits",), ("probs",))
    num_values = 2

    @classmethod
    def from_distribution(cls, distribution: dist.Bernoulli) -> Self:
        return cls(distribution.logits)

    def to_distribution(self) -> dist.Bernoulli:
        return dist.Bernoulli(logits=self.linear)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Even odds: a value of 0 or 1 says nothing about the odds."""
        return cls(torch.zeros(value.shape, device=value.device))

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(value.to(self.linear.dtype))

    def log_partition(self) -> Tensor:
        return softplus(self.linear)

    def to_expectation(self):
        return self.Expectation(torch.sigmoid(self.linear))

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(torch.log(expectation.linear) - torch.log1p(-expectation.linear))

    def in_domain(self) -> Tensor:
        return self.linear.isfinite()

    def fisher_solve(self, gradient) -> Self:
        return type(self)(gradient.linear / (torch.sigmoid(self.linear) * torch.sigmoid(-self.linear)))

    def probabilities(self) -> Tensor:
        """Of every value, [2, *batch]."""
        return torch.stack([torch.sigmoid(-self.linear), torch.sigmoid(self.linear)])

    @classmethod
    def match_values(cls, values: Tensor) -> Self:
        """c from f at every value, [2, *batch]."""
        return cls(values[1] - values[0])
