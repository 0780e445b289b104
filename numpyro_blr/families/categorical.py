"""The categorical distribution over 0, …, K − 1: T(z) = (1[z = k])_k, λ = logits, A = log Σ exp λ_k.

λ is determined up to a constant (the statistics sum to one), and so is ∇_μ E_q[f] = f(k) + constant: the rule
λ ← (1 − ρ) λ − ρ ℓ(k) needs no reference category.

Source: Khan & Rue 2023, section 2.
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.nn import log_softmax, logsumexp, one_hot, softmax

from ._natural import Natural, family

__all__ = ["CategoricalNatural"]


@family(dist.CategoricalLogits, dist.CategoricalProbs)
class CategoricalNatural(Natural):
    """λ = logits, of shape [*batch, K]."""

    indicators: Array

    ranks = (1,)
    discrete = True
    host_parameters = (("logits",), ("probs",))

    @classmethod
    def from_distribution(cls, distribution: dist.CategoricalLogits) -> Self:
        return cls(log_softmax(distribution.logits, -1))

    def to_distribution(self) -> dist.CategoricalLogits:
        return dist.CategoricalLogits(log_softmax(self.indicators, -1))

    @classmethod
    def from_value(cls, value: Array) -> Self:
        raise TypeError("a categorical site starts at its prior; a value does not tell the number of categories.")

    def sufficient_statistics(self, value: Array):
        return self.Expectation(one_hot(value, self.num_values, dtype=self.indicators.dtype))

    def log_partition(self) -> Array:
        return logsumexp(self.indicators, -1)

    def to_expectation(self):
        return self.Expectation(softmax(self.indicators, -1))

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(jnp.log(expectation.indicators))

    def in_domain(self) -> Array:
        return jnp.isfinite(self.indicators).all(-1)

    def fisher_solve(self, gradient) -> Self:
        """The solution with mean zero over the categories; F = diag(p) − p pᵀ has the constants as its kernel."""
        solved = gradient.indicators / softmax(self.indicators, -1)
        return type(self)(solved - solved.mean(-1, keepdims=True))

    @property
    def num_values(self) -> int:
        return self.indicators.shape[-1]

    def probabilities(self) -> Array:
        """Of every value, [K, *batch]."""
        return jnp.moveaxis(softmax(self.indicators, -1), -1, 0)

    @classmethod
    def match_values(cls, values: Array) -> Self:
        """c from f at every value, [K, *batch]; with mean zero, so that what all values share takes no digits."""
        return cls(jnp.moveaxis(values - values.mean(0), 0, -1))
