"""The normal-gamma distribution of (x, τ): τ of shape a and rate b, x | τ normal about m with precision κ τ.

    T = (log τ, τ, τ x, τ x²),    λ = (a − 1/2, −b − κ m²/2, κ m, −κ/2),    A = log Γ(a) − a log b + log(2π/κ)/2

Its sigma points are the gamma distribution's two in τ, each with x = m ± (κ τ)^(−1/2). From f_x/τ = c₃ + 2 c₄ x over
the sign of x follow c₃ and c₄, and from τ (f_τ − c₃ x − c₄ x²) = c₁ + c₂ τ over the other sign c₁ and c₂.

Source: Bernardo & Smith 1994, "Bayesian Theory", section 3.2.5.
"""

from __future__ import annotations

from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from ._natural import Natural, at_both, family
from .gamma import GammaNatural

__all__ = ["NormalGamma", "NormalGammaNatural"]


class RealAndPositive(constraints.Constraint):
    """Of (x, τ): τ > 0."""

    event_dim = 1

    def __call__(self, x):
        return jnp.isfinite(x[..., 0]) & (x[..., 1] > 0)

    def feasible_like(self, prototype):
        return jnp.broadcast_to(jnp.asarray([0.0, 1.0], jnp.result_type(prototype)), jnp.shape(prototype))

    def tree_flatten(self):
        return (), ((), {})

    def eq(self, other, static=False):
        return isinstance(other, RealAndPositive)


class LogOfLast(Transform):
    """(x, log τ) to (x, τ)."""

    domain = constraints.real_vector
    codomain = RealAndPositive()

    def __call__(self, x):
        return x.at[..., 1].set(jnp.exp(x[..., 1]))

    def _inverse(self, y):
        return y.at[..., 1].set(jnp.log(y[..., 1]))

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return x[..., 1]

    def tree_flatten(self):
        return (), ((), {})

    def eq(self, other, static=False):
        return isinstance(other, LogOfLast)


biject_to.register(RealAndPositive, lambda constraint: LogOfLast())


class NormalGamma(dist.Distribution):
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
    support = RealAndPositive()
    reparametrized_params: ClassVar = ["loc", "kappa", "concentration", "rate"]

    def __init__(self, loc, kappa, concentration, rate, *, validate_args=None) -> None:
        shape = jnp.broadcast_shapes(*map(jnp.shape, (loc, kappa, concentration, rate)))
        self.loc, self.kappa = jnp.broadcast_to(loc, shape), jnp.broadcast_to(kappa, shape)
        self.concentration, self.rate = jnp.broadcast_to(concentration, shape), jnp.broadcast_to(rate, shape)
        super().__init__(batch_shape=shape, event_shape=(2,), validate_args=validate_args)

    def sample(self, key, sample_shape=()) -> Array:
        key_precision, key_mean = jax.random.split(key)
        precision = dist.Gamma(self.concentration, self.rate).sample(key_precision, sample_shape)
        noise = jax.random.normal(key_mean, precision.shape, precision.dtype)
        return jnp.stack([self.loc + noise / jnp.sqrt(self.kappa * precision), precision], -1)

    @validate_sample
    def log_prob(self, value) -> Array:
        x, precision = value[..., 0], value[..., 1]
        normal = dist.Normal(self.loc, 1 / jnp.sqrt(self.kappa * precision)).log_prob(x)
        return dist.Gamma(self.concentration, self.rate).log_prob(precision) + normal

    def marginal(self) -> dist.Gamma:
        """Of τ."""
        return dist.Gamma(self.concentration, self.rate)

    def conditional(self, precision: Array) -> dist.Normal:
        """Of x given τ."""
        return dist.Normal(self.loc, 1 / jnp.sqrt(self.kappa * precision))

    @property
    def mean(self) -> Array:
        return jnp.stack([self.loc, self.concentration / self.rate], -1)

    @property
    def variance(self) -> Array:
        spread = self.rate / (self.kappa * (self.concentration - 1))
        return jnp.stack([jnp.where(self.concentration > 1, spread, jnp.inf), self.concentration / self.rate**2], -1)


@family(NormalGamma)
class NormalGammaNatural(Natural):
    """λ = (a − 1/2, −b − κ m²/2, κ m, −κ/2), each of the batch's shape."""

    log: Array
    linear: Array
    product: Array
    quadratic: Array

    ranks = (0, 0, 0, 0)
    value_rank = 1
    host_parameters = (("loc", "kappa", "concentration", "rate"),)

    @property
    def loc(self) -> Array:
        return self.product / self.kappa

    @property
    def kappa(self) -> Array:
        return -2 * self.quadratic

    @property
    def concentration(self) -> Array:
        return self.log + 0.5

    @property
    def rate(self) -> Array:
        return -self.linear - self.product * self.loc / 2

    @classmethod
    def from_distribution(cls, distribution: NormalGamma) -> Self:
        precision = GammaNatural(log=distribution.concentration - 1, linear=-distribution.rate)
        return cls._of(distribution.loc, distribution.kappa, precision)

    def to_distribution(self) -> NormalGamma:
        return NormalGamma(self.loc, self.kappa, self.concentration, self.rate)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Mean `value`, standard deviation of x about 0.1, of τ a tenth of it."""
        return cls._of(value[..., 0], 100 / value[..., 1], GammaNatural.from_value(value[..., 1]))

    def sufficient_statistics(self, value: Array):
        x, precision = value[..., 0], value[..., 1]
        return self.Expectation(jnp.log(precision), precision, precision * x, precision * x**2)

    def log_partition(self) -> Array:
        return self._precision().log_partition() + jnp.log(2 * jnp.pi / self.kappa) / 2

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

    def in_domain(self) -> Array:
        # b > 0, by more than the rounding of its two terms, and without a sum that a compiler may round in two ways
        positive = -self.linear > self.product * self.loc * (0.5 + 2 * float(jnp.finfo(self.linear.dtype).eps))
        finite = jnp.isfinite(self.flat()).all(-1)
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
    def split(cls, value: Array) -> tuple[Array, Array]:
        """(x, τ)."""
        return value[..., 0], value[..., 1]

    @classmethod
    def join(cls, *values: Array) -> Array:
        """The inverse of `split`."""
        return jnp.stack(jnp.broadcast_arrays(*values), -1)

    @property
    def num_signs(self) -> int:
        return 2

    def sigma_points(self, signs: Array) -> Array:
        precision = self._precision().sigma_points(signs[..., 1:])
        return jnp.stack([self.loc + signs[..., 0] / jnp.sqrt(self.kappa * precision), precision], -1)

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
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
    def _of(cls, loc: Array, kappa: Array, precision: GammaNatural) -> Self:
        return cls(precision.log + 0.5, precision.linear - kappa * loc**2 / 2, kappa * loc, -kappa / 2)
