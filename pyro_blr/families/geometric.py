"""The geometric distribution, z failures before a success of probability p: T(z) = z, λ = log(1 − p), A = −log p.

∇_μ E_q[f] = E_q[(z + 1) p (f(z + 1) − f(z))], in which the weight (z + 1) p has mean one. The values are infinitely
many and have no list: `num_values` is None, and a fit draws z instead of summing over it.

Source: Khan & Rue 2023, section 2; summation by parts.
"""

from __future__ import annotations

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._natural import Natural, family

__all__ = ["GeometricNatural"]


@family(dist.Geometric, torch.distributions.Geometric)
class GeometricNatural(Natural):
    """λ = log(1 − p), of the batch's shape."""

    linear: Tensor

    ranks = (0,)
    discrete = True
    host_parameters = (("logits",), ("probs",))
    num_values = None

    @property
    def probs(self) -> Tensor:
        return -torch.expm1(self.linear)

    @property
    def logits(self) -> Tensor:
        return torch.log(self.probs) - self.linear

    @classmethod
    def from_distribution(cls, distribution: dist.Geometric) -> Self:
        return cls(-softplus(distribution.logits))

    def to_distribution(self) -> dist.Geometric:
        return dist.Geometric(logits=self.logits)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, or a half where that is zero."""
        return cls(-torch.log1p(1 / (value * 1.0).clamp(min=0.5)))

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(value.to(self.linear.dtype))

    def log_partition(self) -> Tensor:
        return -torch.log(self.probs)

    def to_expectation(self):
        return self.Expectation(torch.exp(self.linear) / self.probs)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(-torch.log1p(1 / expectation.linear))

    def in_domain(self) -> Tensor:
        return (self.linear < 0) & self.linear.isfinite()

    def fisher_solve(self, gradient) -> Self:
        return type(self)(self.probs**2 * torch.exp(-self.linear) * gradient.linear)

    def difference_weight(self, value: Tensor) -> Tensor:
        """w with ∇_μ E_q[f] = E_q[w(z) (f(z + 1) − f(z))]; (z + 1) p."""
        return (value.to(self.linear.dtype) + 1) * self.probs

    @classmethod
    def match_difference(cls, difference: Tensor) -> Self:
        """c from E_q[w(z) (f(z + 1) − f(z))]."""
        return cls(difference)
