"""The exponential distribution with rate b: T(z) = z, λ = −b, A = −log b.

Its one sigma point is E[z] = 1/b, and c is the mean of f'.

Source: Khan & Rue 2023, section 2.
"""

from __future__ import annotations

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor

from ._natural import Natural, family

__all__ = ["ExponentialNatural"]


@family(dist.Exponential, torch.distributions.Exponential)
class ExponentialNatural(Natural):
    """λ = −b, of the batch's shape."""

    linear: Tensor

    ranks = (0,)
    host_parameters = (("rate",),)

    @property
    def rate(self) -> Tensor:
        return -self.linear

    @classmethod
    def from_distribution(cls, distribution: dist.Exponential) -> Self:
        return cls(-(distribution.rate))

    def to_distribution(self) -> dist.Exponential:
        return dist.Exponential(self.rate)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`; the standard deviation is the mean."""
        return cls(-1 / value)

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(value)

    def log_partition(self) -> Tensor:
        return -torch.log(self.rate)

    def to_expectation(self):
        return self.Expectation(1 / self.rate)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(-1 / expectation.linear)

    def in_domain(self) -> Tensor:
        return (self.rate > 0) & self.linear.isfinite()

    def fisher_solve(self, gradient) -> Self:
        return type(self)(self.rate**2 * gradient.linear)

    @property
    def num_signs(self) -> int:
        return 0

    def sigma_points(self, signs: Tensor) -> Tensor:
        return torch.broadcast_to(1 / self.rate, signs.shape[:-1])

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        return cls(gradients.mean(0))
