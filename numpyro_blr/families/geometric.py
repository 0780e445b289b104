"""The geometric distribution, z failures before a success of probability p: T(z) = z, λ = log(1 − p), A = −log p.

∇_μ E_q[f] = E_q[(z + 1) p (f(z + 1) − f(z))], in which the weight (z + 1) p has mean one. The values are infinitely
many and have no list: `num_values` is None, and a fit draws z instead of summing over it.

Source: Khan & Rue 2023, section 2; summation by parts.
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.nn import softplus

from ._natural import Natural, family

__all__ = ["GeometricNatural"]


@family(dist.GeometricLogits, dist.GeometricProbs)
class GeometricNatural(Natural):
    """λ = log(1 − p), of the batch's shape."""

    linear: Array

    ranks = (0,)
    discrete = True
    host_parameters = (("logits",), ("probs",))
    num_values = None

    @property
    def probs(self) -> Array:
        return -jnp.expm1(self.linear)

    @property
    def logits(self) -> Array:
        return jnp.log(self.probs) - self.linear

    @classmethod
    def from_distribution(cls, distribution: dist.GeometricLogits) -> Self:
        return cls(-softplus(jnp.asarray(distribution.logits)))

    def to_distribution(self) -> dist.GeometricLogits:
        return dist.GeometricLogits(self.logits)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Mean `value`, or a half where that is zero."""
        return cls(-jnp.log1p(1 / jnp.maximum(value * 1.0, 0.5)))

    def sufficient_statistics(self, value: Array):
        return self.Expectation(value.astype(self.linear.dtype))

    def log_partition(self) -> Array:
        return -jnp.log(self.probs)

    def to_expectation(self):
        return self.Expectation(jnp.exp(self.linear) / self.probs)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(-jnp.log1p(1 / expectation.linear))

    def in_domain(self) -> Array:
        return (self.linear < 0) & jnp.isfinite(self.linear)

    def fisher_solve(self, gradient) -> Self:
        return type(self)(self.probs**2 * jnp.exp(-self.linear) * gradient.linear)

    def difference_weight(self, value: Array) -> Array:
        """w with ∇_μ E_q[f] = E_q[w(z) (f(z + 1) − f(z))]; (z + 1) p."""
        return (value.astype(self.linear.dtype) + 1) * self.probs

    @classmethod
    def match_difference(cls, difference: Array) -> Self:
        """c from E_q[w(z) (f(z + 1) − f(z))]."""
        return cls(difference)
