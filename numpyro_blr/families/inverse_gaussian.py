"""The inverse Gaussian distribution with mean m and concentration s: T(z) = (z, 1/z), λ = (−s/(2m²), −s/2).

    q(z) = (2π z³)^(−1/2) exp(⟨λ, T(z)⟩ − A),    A = −s/m − log(s)/2,    μ = (m, 1/m + 1/s)

Its sigma points are c e^(±t) with sinh² t = m/s and c cosh t = m; from f' = c₁ − c₂/z² at the two follows c.

Source: Michael, Schucany & Haas 1976 for the draws; Figurnov, Mohamed & Mnih 2018 for their gradients.
"""

from __future__ import annotations

from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.lax import stop_gradient
from jax.scipy.special import log_ndtr
from numpyro.distributions import constraints
from numpyro.distributions.util import promote_shapes, validate_sample

from ._natural import Natural, at_both, family, smallest_spread

__all__ = ["InverseGaussian", "InverseGaussianNatural"]


class InverseGaussian(dist.Distribution):
    """The time at which a Brownian motion with drift first reaches a level; variance loc³ / concentration.

    Args:
        loc: the mean m.
        concentration: s.
    """

    arg_constraints: ClassVar = {"loc": constraints.positive, "concentration": constraints.positive}
    support = constraints.positive
    reparametrized_params: ClassVar = ["loc", "concentration"]

    def __init__(self, loc, concentration, *, validate_args=None) -> None:
        self.loc, self.concentration = promote_shapes(loc, concentration)
        shape = jnp.broadcast_shapes(jnp.shape(loc), jnp.shape(concentration))
        super().__init__(batch_shape=shape, validate_args=validate_args)

    def sample(self, key, sample_shape=()) -> Array:
        key_normal, key_uniform = jax.random.split(key)
        shape, dtype = sample_shape + self.batch_shape, jnp.result_type(self.loc, self.concentration, float)
        loc, concentration = stop_gradient(self.loc), stop_gradient(self.concentration)
        # of the two roots z with s (z − m)² / (m² z) = ν², the smaller with probability m / (m + z)
        w = jax.random.normal(key_normal, shape, dtype) ** 2 * loc / concentration / 2
        root = 1 / (1 + w + jnp.sqrt(w * (w + 2)))
        draw = jax.random.uniform(key_uniform, shape, dtype)
        value = loc * jnp.where(draw * (1 + root) <= 1, root, 1 / root)
        by_loc, by_concentration = self._implicit_gradient(value, loc, concentration)
        return value + by_loc * (self.loc - loc) + by_concentration * (self.concentration - concentration)

    @staticmethod
    def _implicit_gradient(value: Array, loc: Array, concentration: Array) -> tuple[Array, Array]:
        """∂z/∂θ = −∂F/∂θ / q(z), with Mills' ratio of b = √(s/z) (z/m + 1)."""
        b = jnp.sqrt(concentration / value) * (value / loc + 1)
        mills = jnp.exp(log_ndtr(-b) + b**2 / 2 + jnp.log(2 * jnp.pi) / 2)
        scaled = 2 * mills * value * jnp.sqrt(value / concentration) / loc
        return scaled * concentration / loc, value / concentration - scaled

    @validate_sample
    def log_prob(self, value) -> Array:
        exponent = self.concentration * (value - self.loc) ** 2 / (2 * self.loc**2 * value)
        return (jnp.log(self.concentration / (2 * jnp.pi)) - 3 * jnp.log(value)) / 2 - exponent

    @property
    def mean(self) -> Array:
        return jnp.broadcast_to(self.loc, self.batch_shape)

    @property
    def variance(self) -> Array:
        return jnp.broadcast_to(self.loc**3 / self.concentration, self.batch_shape)


@family(InverseGaussian)
class InverseGaussianNatural(Natural):
    """λ = (−s/(2m²), −s/2), each of the batch's shape."""

    linear: Array
    inverse: Array

    ranks = (0, 0)
    host_parameters = (("loc", "concentration"),)

    @property
    def loc(self) -> Array:
        return jnp.sqrt(self.inverse / self.linear)

    @property
    def concentration(self) -> Array:
        return -2 * self.inverse

    @classmethod
    def from_distribution(cls, distribution: InverseGaussian) -> Self:
        loc, concentration = jnp.broadcast_arrays(distribution.loc, distribution.concentration)
        return cls(linear=-concentration / loc**2 / 2, inverse=-concentration / 2)

    def to_distribution(self) -> InverseGaussian:
        return InverseGaussian(self.loc, self.concentration)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Mean `value`, standard deviation a tenth of it."""
        return cls(linear=-50 / value, inverse=-50 * value)

    def sufficient_statistics(self, value: Array):
        return self.Expectation(linear=value, inverse=1 / value)

    def log_base_measure(self, value: Array) -> Array:
        return -(jnp.log(2 * jnp.pi) + 3 * jnp.log(value)) / 2

    def base_slope(self, value: Array) -> Array:
        return -1.5 / value

    def expected_log_base_measure(self) -> Array:
        """From E[log z] = log m − e^x E₁(x) with x = 2 s/m."""
        loc = self.loc
        expected_log = jnp.log(loc) - _scaled_exponential_integral(2 * self.concentration / loc)
        return -(jnp.log(2 * jnp.pi) + 3 * expected_log) / 2

    def log_partition(self) -> Array:
        return -2 * jnp.sqrt(self.linear * self.inverse) - jnp.log(self.concentration) / 2

    def to_expectation(self):
        return self.Expectation(linear=self.loc, inverse=1 / self.loc + 1 / self.concentration)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        loc = expectation.linear
        concentration = loc / (expectation.inverse * loc - 1)
        return cls(linear=-concentration / loc**2 / 2, inverse=-concentration / 2)

    def in_domain(self) -> Array:
        finite = jnp.isfinite(self.linear) & jnp.isfinite(self.inverse)
        return (self.linear < 0) & (self.inverse < 0) & finite

    def fisher_solve(self, gradient) -> Self:
        # F⁻¹ = ∂λ/∂μ with m = μ₁, 1/s = μ₂ − 1/μ₁
        loc, concentration = self.loc, self.concentration
        change = -(concentration**2) * (gradient.inverse + gradient.linear / loc**2)
        linear = (concentration * gradient.linear / loc - change / 2) / loc**2
        return type(self)(linear=linear, inverse=-change / 2)

    def sigma_points(self, signs: Array) -> Array:
        ratio = self.loc / self.concentration
        spread = jnp.maximum(jnp.arcsinh(jnp.sqrt(ratio)), smallest_spread(ratio.dtype))
        return self.loc / jnp.sqrt(1 + ratio) * jnp.exp(signs[..., 0] * spread)

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
        (up, down), (high, low) = at_both(gradients, signs[..., 0]), at_both(values, signs[..., 0])
        # f' = c₁ − c₂/z²; with z² times it, the two sides are of one size
        inverse = (up - down) / (high - low) * (high * low) ** 2 / (high + low)
        linear = (up * high**2 - down * low**2) / (high - low) / (high + low)
        return cls(linear=linear, inverse=inverse)


def _scaled_exponential_integral(x: Array) -> Array:
    """e^x E₁(x), by the series about 0 and, from 2 on, by the continued fraction 1/(x + 1 − 1/(x + 3 − …))."""
    small, large = jnp.minimum(x, 2), jnp.maximum(x, 2)
    series = jnp.zeros_like(x)
    for k in range(26, 0, -1):
        series = -small / k * (series - 1 / k)  # Σ (−1)^(k+1) x^k / (k k!), by Horner's rule
    fraction = large + 81
    for k in range(40, 0, -1):
        fraction = large + 2 * k - 1 - k**2 / fraction
    return jnp.where(x > 2, 1 / fraction, jnp.exp(small) * (-jnp.euler_gamma - jnp.log(small) + series))
