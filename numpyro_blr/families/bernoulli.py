"""The Bernoulli distribution over 0, 1: T(z) = z, λ = logit p, A = log(1 + e^λ), and ∇_μ E_q[f] = f(1) − f(0).

Source: Khan & Rue 2023, section 2.
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.nn import sigmoid, softplus

from ._natural import Natural, family

__all__ = ["BernoulliNatural"]


@family(dist.BernoulliLogits, dist.BernoulliProbs)
class BernoulliNatural(Natural):
    """λ = logit p, of the batch's shape."""

    linear: Array

    ranks = (0,)
    discrete = True
    host_parameters = (("logits",), ("probs",))
    num_values = 2

    @classmethod
    def from_distribution(cls, distribution: dist.BernoulliLogits) -> Self:
        return cls(distribution.logits)

    def to_distribution(self) -> dist.BernoulliLogits:
        return dist.BernoulliLogits(self.linear)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Even odds: a value of 0 or 1 says nothing about the odds."""
        return cls(jnp.zeros(value.shape, jnp.result_type(float)))

    def sufficient_statistics(self, value: Array):
        return self.Expectation(value.astype(self.linear.dtype))

    def log_partition(self) -> Array:
        return softplus(self.linear)

    def to_expectation(self):
        return self.Expectation(sigmoid(self.linear))

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(jnp.log(expectation.linear) - jnp.log1p(-expectation.linear))

    def in_domain(self) -> Array:
        return jnp.isfinite(self.linear)

    def fisher_solve(self, gradient) -> Self:
        return type(self)(gradient.linear / (sigmoid(self.linear) * sigmoid(-self.linear)))

    def probabilities(self) -> Array:
        """Of every value, [2, *batch]."""
        return jnp.stack([sigmoid(-self.linear), sigmoid(self.linear)])

    @classmethod
    def match_values(cls, values: Array) -> Self:
        """c from f at every value, [2, *batch]."""
        return cls(values[1] - values[0])
