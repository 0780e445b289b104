"""The normal-gamma distribution of (x, τ): τ of shape a and rate b, x | τ normal about m with precision κ τ.

    T = (log τ, τ, τ x, τ x²),    λ = (a − 1/2, −b − κ m²/2, κ m, −κ/2),    A = log Γ(a) − a log b + log(2π/κ)/2

Its sigma points are the gamma distribution's two in τ, each with x = m ± (κ τ)^(−1/2). From f_x/τ = c₃ + 2 c₄ x over
the sign of x follow c₃ and c₄, and from τ (f_τ − c₃ x − c₄ x²) = c₁ + c₂ τ over the other sign c₁ and c₂.

Source: Bernardo & Smith 1994, "Bayesian Theory", section 3.2.5.
"""

from __future__ import annotations

from math import pi
from typing import ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from ._natural import Natural, at_both, family
from .gamma import GammaNatural

__all__ = ["NormalGamma", "NormalGammaNatural"]


class NormalGamma(dist.TorchDistribution):
    """The conjugate prior of a normal distribution's mean x and precision τ, value [*batch, 2].

    Args:
        loc: m.
        kappa: κ, how many draws' worth of precision the mean has.
        concentration: a of τ.
        rate: b of τ.
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real,
        "kappa": constraints.positive,
        "concentration": constraints.positive,
        "rate": constraints.positive,
    }
    support = constraints.stack([constraints.real, constraints.positive], -1)
    has_rsample = True

    def __init__(self, loc, kappa, concentration, rate, validate_args=None) -> None:
        self.loc, self.kappa, self.concentration, self.rate = broadcast_all(loc, kappa, concentration, rate)
        super().__init__(self.loc.shape, torch.Size([2]), validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(NormalGamma, _instance)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        super(NormalGamma, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()) -> Tensor:
        precision = dist.Gamma(self.concentration, self.rate).rsample(torch.Size(sample_shape))
        return torch.stack([self.loc + torch.randn_like(precision) / torch.sqrt(self.kappa * precision), precision], -1)

    def log_prob(self, value) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, precision = value[..., 0], value[..., 1]
        normal = dist.Normal(self.loc, 1 / torch.sqrt(self.kappa * precision)).log_prob(x)
        return dist.Gamma(self.concentration, self.rate).log_prob(precision) + normal

    def marginal(self) -> dist.Gamma:
        """Of τ."""
        return dist.Gamma(self.concentration, self.rate)

    def conditional(self, precision: Tensor) -> dist.Normal:
        """Of x given τ."""
        return dist.Normal(self.loc, 1 / torch.sqrt(self.kappa * precision))

    @property
    def mean(self) -> Tensor:
        return torch.stack([self.loc, self.concentration / self.rate], -1)

    @property
    def variance(self) -> Tensor:
        spread = self.rate / (self.kappa * (self.concentration - 1))
        spread = torch.where(self.concentration > 1, spread, torch.inf)
        return torch.stack([spread, self.concentration / self.rate**2], -1)


@family(NormalGamma)
class NormalGammaNatural(Natural):
    """λ = (a − 1/2, −b − κ m²/2, κ m, −κ/2), each of the batch's shape."""

    log: Tensor
    linear: Tensor
    product: Tensor
    quadratic: Tensor

    ranks = (0, 0, 0, 0)
    value_rank = 1
    host_parameters = (("loc", "kappa", "concentration", "rate"),)

    @property
    def loc(self) -> Tensor:
        return self.product / self.kappa

    @property
    def kappa(self) -> Tensor:
        return -2 * self.quadratic

    @property
    def concentration(self) -> Tensor:
        return self.log + 0.5

    @property
    def rate(self) -> Tensor:
        return -self.linear - self.product * self.loc / 2

    @classmethod
    def from_distribution(cls, distribution: NormalGamma) -> Self:
        precision = GammaNatural(log=distribution.concentration - 1, linear=-distribution.rate)
        return cls._of(distribution.loc, distribution.kappa, precision)

    def to_distribution(self) -> NormalGamma:
        return NormalGamma(self.loc, self.kappa, self.concentration, self.rate)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, standard deviation of x about 0.1, of τ a tenth of it."""
        return cls._of(value[..., 0], 100 / value[..., 1], GammaNatural.from_value(value[..., 1]))

    def sufficient_statistics(self, value: Tensor):
        x, precision = value[..., 0], value[..., 1]
        return self.Expectation(torch.log(precision), precision, precision * x, precision * x**2)

    def log_partition(self) -> Tensor:
        return self._precision().log_partition() + torch.log(2 * pi / self.kappa) / 2

    def to_expectation(self):
        precision, loc = self._precision().to_expectation(), self.loc
        quadratic = 1 / self.kappa + loc**2 * precision.linear
        return self.Expectation(precision.log, precision.linear, loc * precision.linear, quadratic)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        loc = expectation.product / expectation.linear
        precision = GammaNatural.Expectation(log=expectation.log, linear=expectation.linear)
        kappa = 1 / (expectation.quadratic - expectation.product * loc)
        return cls._of(loc, kappa, GammaNatural.from_expectation(precision))

    def in_domain(self) -> Tensor:
        # b > 0, by more than the rounding of its two terms, and without a sum that a compiler may round in two ways
        positive = -self.linear > self.product * self.loc * (0.5 + 2 * torch.finfo(self.linear.dtype).eps)
        finite = self.flat().isfinite().all(-1)
        return finite & positive & (self.quadratic < 0) & (self.concentration > 0)

    def fisher_solve(self, gradient) -> Self:
        # F⁻¹ = ∂λ/∂μ, with m = μ₃/μ₂ and 1/κ = μ₄ − μ₃²/μ₂ beside the gamma distribution's (μ₁, μ₂)
        loc, kappa, precision = self.loc, self.kappa, self._precision()
        solved = precision.fisher_solve(GammaNatural.Expectation(log=gradient.log, linear=gradient.linear))
        shift = (gradient.product - loc * gradient.linear) * self.rate / self.concentration
        change = -(kappa**2) * (gradient.quadratic - 2 * loc * gradient.product + loc**2 * gradient.linear)
        linear = solved.linear - change * loc**2 / 2 - kappa * loc * shift
        return type(self)(solved.log, linear, change * loc + kappa * shift, -change / 2)

    @classmethod
    def split(cls, value: Tensor) -> tuple[Tensor, Tensor]:
        """(x, τ)."""
        return value[..., 0], value[..., 1]

    @classmethod
    def join(cls, *values: Tensor) -> Tensor:
        """The inverse of `split`."""
        return torch.stack(torch.broadcast_tensors(*values), -1)

    @property
    def num_signs(self) -> int:
        return 2

    def sigma_points(self, signs: Tensor) -> Tensor:
        precision = self._precision().sigma_points(signs[..., 1:])
        return torch.stack([self.loc + signs[..., 0] / torch.sqrt(self.kappa * precision), precision], -1)

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        x, precision = values[..., 0], values[..., 1]
        slope = gradients[..., 0] / precision
        (up, down), (high, low) = at_both(slope, signs[..., 0]), at_both(x, signs[..., 0])
        quadratic = (up - down) / (high - low) / 2
        product = (up + down) / 2 - quadratic * (high + low)
        rest = gradients[..., 1] - x * (product + quadratic * x)
        matched = GammaNatural.match(precision, rest, signs[..., 1:])
        return cls(matched.log, matched.linear, product, quadratic)

    def _precision(self) -> GammaNatural:
        """λ of τ."""
        return GammaNatural(log=self.concentration - 1, linear=-self.rate)

    @classmethod
    def _of(cls, loc: Tensor, kappa: Tensor, precision: GammaNatural) -> Self:
        return cls(precision.log + 0.5, precision.linear - kappa * loc**2 / 2, kappa * loc, -kappa / 2)
