"""The inverse-gamma distribution with shape a and rate b: T(z) = (log z, 1/z), λ = (−a − 1, −b).

1/z is gamma distributed with the same shape and rate, A = log Γ(a) − a log b: the sigma points are the inverses of its
points, and from the derivative of f in 1/z, −z² f', follows c as it does there.

Source: Khan & Rue 2023, section 2; the gamma distribution's file.
"""

from __future__ import annotations

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor

from ._natural import Natural, family
from .gamma import GammaNatural

__all__ = ["InverseGammaNatural"]


@family(dist.InverseGamma)
class InverseGammaNatural(Natural):
    """λ = (−a − 1, −b), each of the batch's shape."""

    log: Tensor
    inverse: Tensor

    ranks = (0, 0)
    host_parameters = (("concentration", "rate"),)

    @property
    def concentration(self) -> Tensor:
        return -self.log - 1

    @property
    def rate(self) -> Tensor:
        return -self.inverse

    @classmethod
    def from_distribution(cls, distribution: dist.InverseGamma) -> Self:
        concentration, rate = torch.broadcast_tensors(distribution.concentration, distribution.rate)
        return cls(log=-concentration - 1, inverse=-rate)

    def to_distribution(self) -> dist.InverseGamma:
        return dist.InverseGamma(self.concentration, self.rate)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """1/z of mean 1/`value`, standard deviation a tenth of it."""
        return cls._of_inverse(GammaNatural.from_value(1 / value))

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(log=torch.log(value), inverse=1 / value)

    def log_partition(self) -> Tensor:
        return self._inverse().log_partition()

    def to_expectation(self):
        expectation = self._inverse().to_expectation()
        return self.Expectation(log=-expectation.log, inverse=expectation.linear)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        inverse = GammaNatural.Expectation(log=-expectation.log, linear=expectation.inverse)
        return cls._of_inverse(GammaNatural.from_expectation(inverse))

    def in_domain(self) -> Tensor:
        return self._inverse().in_domain()

    def widened(self, factor: float) -> Self:
        return self._of_inverse(self._inverse().widened(factor))

    def fisher_solve(self, gradient) -> Self:
        inverse = GammaNatural.Expectation(log=-gradient.log, linear=gradient.inverse)
        solved = self._inverse().fisher_solve(inverse)
        return type(self)(log=-solved.log, inverse=solved.linear)

    def sigma_points(self, signs: Tensor) -> Tensor:
        return 1 / self._inverse().sigma_points(signs)

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        matched = GammaNatural.match(1 / values, -(values**2) * gradients, signs)
        return cls(log=-matched.log, inverse=matched.linear)

    def _inverse(self) -> GammaNatural:
        """λ of 1/z."""
        return GammaNatural(log=self.concentration - 1, linear=self.inverse)

    @classmethod
    def _of_inverse(cls, natural: GammaNatural) -> Self:
        return cls(log=-natural.concentration - 1, inverse=natural.linear)
