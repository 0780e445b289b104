"""The Poisson distribution with rate r: T(z) = z, λ = log r, A = r, h(z) = 1/z!, and ∇_μ E_q[f] = E_q[f(z + 1) − f(z)].

The values are infinitely many and have no list: `num_values` is None, and a fit draws z instead of summing over it.

Source: Khan & Rue 2023, section 2; Knessl 1998, "Integral representations and asymptotic expansions for Shannon and
Renyi entropies".
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import gammaln

from ._natural import Natural, family

__all__ = ["PoissonNatural"]

LARGE = 100.0  # from here on the entropy's series is exact to 1e-12
NUM_TERMS = 260  # at the rate LARGE the terms beyond have weight 1e-38


@family(dist.Poisson)
class PoissonNatural(Natural):
    """λ = log r, of the batch's shape."""

    linear: Array

    ranks = (0,)
    discrete = True
    host_parameters = (("rate",),)
    num_values = None

    @property
    def rate(self) -> Array:
        return jnp.exp(self.linear)

    @classmethod
    def from_distribution(cls, distribution: dist.Poisson) -> Self:
        return cls(jnp.log(distribution.rate))

    def to_distribution(self) -> dist.Poisson:
        return dist.Poisson(self.rate)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Mean `value`, or a half where that is zero."""
        return cls(jnp.log(jnp.maximum(value * 1.0, 0.5)))

    def sufficient_statistics(self, value: Array):
        return self.Expectation(value.astype(self.linear.dtype))

    def log_base_measure(self, value: Array) -> Array:
        return -gammaln(value.astype(self.linear.dtype) + 1)

    def expected_log_base_measure(self) -> Array:
        """−E[log z!], by the sum over z for small rates and by the series of the entropy for large ones."""
        small, large = jnp.minimum(self.rate, LARGE), jnp.maximum(self.rate, LARGE)
        z = jnp.arange(NUM_TERMS, dtype=small.dtype)
        log_factorial = gammaln(z + 1)
        weights = jnp.exp(z * jnp.minimum(self.linear, jnp.log(LARGE))[..., None] - small[..., None] - log_factorial)
        x = 1 / large
        entropy = (jnp.log(2 * jnp.pi * large) + 1) / 2
        entropy = entropy - x * (1 / 12 + x * (1 / 24 + x * (19 / 360 + x * (9 / 80 + x * 863 / 2520))))
        series = large - large * jnp.log(large) - entropy
        return jnp.where(self.rate > LARGE, series, -(weights * log_factorial).sum(-1))

    def log_partition(self) -> Array:
        return self.rate

    def to_expectation(self):
        return self.Expectation(self.rate)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        return cls(jnp.log(expectation.linear))

    def in_domain(self) -> Array:
        return jnp.isfinite(self.linear)

    def fisher_solve(self, gradient) -> Self:
        return type(self)(gradient.linear / self.rate)

    def difference_weight(self, value: Array) -> Array:
        """w with ∇_μ E_q[f] = E_q[w(z) (f(z + 1) − f(z))]; one."""
        return jnp.ones(value.shape, self.linear.dtype)

    @classmethod
    def match_difference(cls, difference: Array) -> Self:
        """c from E_q[w(z) (f(z + 1) − f(z))]."""
        return cls(difference)
