"""The exponential distribution with rate b: T(z) = z, λ = −b, A = −log b.

Its one sigma point is E[z] = 1/b, and c is the mean of f'.

Source: Khan & Rue 2023, section 2.
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from ._natural import Natural, family

__all__ = ["ExponentialNatural"]


@family(dist.Exponential)
class ExponentialNatural(Natural):
    """λ = −b, of the batch's shape."""

    linear: Array

    ranks = (0,)
    host_parameters = (("rate",),)

    @property
    def rate(self) -> Array:
        return -self.linear

    @classmethod
    def from_distribution(cls, distribution: dist.Exponential) -> Self:
        return cls(-jnp.asarray(distribution.rate))

    def to_distribution(self) -> dist.Exponential:
        return dist.Exponential(self.rate)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Mean `value`; the standard deviation is the mean."""
        return cls(-1 / value)

    def sufficient_statistics(self, value: Array):
        return self.Expectation(value)

    def log_partition(self) -> Array:
        return -jnp.log(self.rate)

    def to_expectation(self):
        return self.Expectation(1 / self.rate)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(-1 / expectation.linear)

    def in_domain(self) -> Array:
        return (self.rate > 0) & jnp.isfinite(self.linear)

    def fisher_solve(self, gradient) -> Self:
        return type(self)(self.rate**2 * gradient.linear)

    @property
    def num_signs(self) -> int:
        return 0

    def sigma_points(self, signs: Array) -> Array:
        return jnp.broadcast_to(1 / self.rate, signs.shape[:-1])

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
        return cls(gradients.mean(0))
