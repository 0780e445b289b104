"""The Wishart distribution over D × D matrices, scale V, n degrees of freedom: T(X) = (X, log|X|).

    λ = (−V⁻¹/2, (n − D − 1)/2),    A = (n/2) log|2V| + log Γ_D(n/2),    μ = (n V, ψ_D(n/2) + log|2V|)

Its sigma points are (1 ± t) M with M = E[X] and t² = 1 − exp(−2y/D), y = log|M| − E[log|X|] > 0, a function of n
alone. From ∇f = C₁ + c₂ X⁻¹ at the two, symmetric, follows c.

Source: Khan & Rue 2023, section 2; Bishop 2006, "Pattern Recognition and Machine Learning", appendix B.
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.special import digamma, gammaln

from ._natural import Natural, at_both, family, smallest_spread
from ._special import log_minus_digamma, trigamma_excess
from .multivariate_normal import _inverse_cholesky

__all__ = ["WishartNatural"]


@family(dist.Wishart)
class WishartNatural(Natural):
    """λ = (−V⁻¹/2, (n − D − 1)/2), of shapes [*batch, D, D] and [*batch]; n > D − 1."""

    linear: Array
    log_determinant: Array

    ranks = (2, 0)
    value_rank = 2
    host_parameters = (("concentration", "scale_tril"),)

    @property
    def dimension(self) -> int:
        return self.linear.shape[-1]

    @property
    def degrees_of_freedom(self) -> Array:
        return 2 * self.log_determinant + self.dimension + 1

    @property
    def rate_matrix(self) -> Array:
        return -(self.linear + jnp.swapaxes(self.linear, -1, -2))

    @property
    def scale_tril(self) -> Array:
        return _inverse_cholesky(self.rate_matrix)

    @classmethod
    def from_distribution(cls, distribution: dist.Wishart) -> Self:
        inverse = _inverse_cholesky(distribution.scale_tril @ jnp.swapaxes(distribution.scale_tril, -1, -2))
        rate = inverse @ jnp.swapaxes(inverse, -1, -2)
        batch, dimension = distribution.batch_shape, rate.shape[-1]
        log_determinant = (jnp.asarray(distribution.concentration) - dimension - 1) / 2
        return cls(
            linear=jnp.broadcast_to(-rate / 2, (*batch, dimension, dimension)),
            log_determinant=jnp.broadcast_to(log_determinant, batch),
        )

    def to_distribution(self) -> dist.Wishart:
        return dist.Wishart(self.degrees_of_freedom, scale_tril=self.scale_tril)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Mean `value`, with a hundred degrees of freedom more than the least."""
        dimension = value.shape[-1]
        factor = _inverse_cholesky(value)
        rate = (dimension + 99) * factor @ jnp.swapaxes(factor, -1, -2)
        return cls(linear=-rate / 2, log_determinant=jnp.full_like(value[..., 0, 0], 49.0))

    def sufficient_statistics(self, value: Array):
        return self.Expectation(linear=value, log_determinant=_log_determinant(jnp.linalg.cholesky(value)))

    def log_partition(self) -> Array:
        dimension, half = self.dimension, self.degrees_of_freedom / 2
        log_scale = _log_determinant(self.scale_tril) + dimension * jnp.log(2)
        log_gamma = gammaln(self._halves()).sum(-1) + dimension * (dimension - 1) / 4 * jnp.log(jnp.pi)
        return half * log_scale + log_gamma

    def to_expectation(self):
        factor = self.scale_tril
        log_scale = _log_determinant(factor) + self.dimension * jnp.log(2)
        mean = self.degrees_of_freedom[..., None, None] * (factor @ jnp.swapaxes(factor, -1, -2))
        return self.Expectation(linear=mean, log_determinant=log_scale + digamma(self._halves()).sum(-1))

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        dimension = expectation.linear.shape[-1]
        excess = _log_determinant(jnp.linalg.cholesky(expectation.linear)) - expectation.log_determinant
        half = _inverse_excess(excess, dimension)
        factor = _inverse_cholesky(expectation.linear)
        rate = (2 * half + dimension - 1)[..., None, None] * (factor @ jnp.swapaxes(factor, -1, -2))
        return cls(linear=-rate / 2, log_determinant=half - 1)

    def in_domain(self) -> Array:
        factor = jnp.linalg.cholesky(self.rate_matrix)
        finite = jnp.isfinite(factor).all((-2, -1)) & jnp.isfinite(self.log_determinant)
        return finite & (self.log_determinant > -1)

    def fisher_solve(self, gradient) -> Self:
        """With P = −λ₁: dμ₁ = V (n dλ₁ 2 V + 2 dλ₂), dμ₂ = tr(2 V dλ₁) + ψ'_D(n/2) dλ₂, solved for dλ."""
        rate, change = self.rate_matrix / 2, (gradient.linear + jnp.swapaxes(gradient.linear, -1, -2)) / 2
        half = self.degrees_of_freedom / 2
        weighted = rate @ change
        trace = jnp.trace(weighted, axis1=-2, axis2=-1)
        # ψ'_D(n/2) − 2 D/n, whose two terms cancel
        slope = -_excess_and_slope(self._halves(), half)[1]
        log_determinant = (gradient.log_determinant - trace / half) / slope
        linear = (weighted @ rate - log_determinant[..., None, None] * rate) / half[..., None, None]
        return type(self)(linear=linear, log_determinant=log_determinant)

    def sigma_points(self, signs: Array) -> Array:
        return self.point_factors(signs)[..., None, None] * self.to_expectation().linear

    def point_factors(self, signs: Array) -> Array:
        """1 ± t; 1 − t from (1 − t)(1 + t) = exp(−2y/D), which keeps its digits where t is nearly one."""
        excess = 2 / self.dimension * _excess_and_slope(self._halves(), self.degrees_of_freedom / 2)[0]
        spread = jnp.maximum(jnp.sqrt(-jnp.expm1(-excess)), smallest_spread(excess.dtype))
        return jnp.where(signs[..., 0] > 0, 1 + spread, jnp.exp(-excess) / (1 + spread))

    @classmethod
    def along(cls, values: Array, gradients: Array) -> Array:
        """The symmetric part."""
        return (gradients + jnp.swapaxes(gradients, -1, -2)) / 2

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
        gradients = (gradients + jnp.swapaxes(gradients, -1, -2)) / 2
        mean, dimension = values.mean(0), values.shape[-1]
        traces = jnp.trace(values, axis1=-2, axis2=-1) / jnp.trace(mean, axis1=-2, axis2=-1)
        (up, down), (high, low) = at_both(gradients, signs[..., None]), at_both(traces, signs[..., 0])
        # tr(M ∇f) = tr(M C₁) + c₂ D/(1 ± t)
        contrast = ((up - down) * mean).sum((-2, -1))
        log_determinant = contrast * high * low / (dimension * (low - high))
        factor = _inverse_cholesky(mean)
        inverse = factor @ jnp.swapaxes(factor, -1, -2) / (high * low)[..., None, None]
        linear = (up + down) / 2 - log_determinant[..., None, None] * inverse
        return cls(linear=linear, log_determinant=log_determinant)

    def _halves(self) -> Array:
        """(n − i)/2 for i = D − 1, …, 0."""
        return self.log_determinant[..., None] + 1 + jnp.arange(self.dimension, dtype=self.linear.dtype) / 2


def _log_determinant(factor: Array) -> Array:
    """log|L Lᵀ| of a triangular factor."""
    return 2 * jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)).sum(-1)


def _excess_and_slope(halves: Array, half: Array) -> tuple[Array, Array]:
    """y(h) = Σ_i log h − ψ(h_i) and y'(h) = Σ_i 1/h − ψ'(h_i) at h = n/2, h_i = (n − i)/2, without cancellation."""
    half = half[..., None]
    gap = jnp.arange(halves.shape[-1] - 1, -1, -1, dtype=halves.dtype) / 2
    excess = jnp.log1p(gap / halves) + log_minus_digamma(halves)
    slope = -(gap / half + trigamma_excess(halves)) / halves
    return excess.sum(-1), slope.sum(-1)


def _inverse_excess(value: Array, dimension: int) -> Array:
    """(n − D + 1)/2 with y(n/2) = `value`, by Newton's method on the logarithms of both, which are nearly a line."""
    steps = jnp.arange(dimension, dtype=value.dtype) / 2
    log_half = jnp.log(dimension * (dimension + 1) / 4 / value)
    for _ in range(12):
        least = jnp.exp(log_half)
        excess, slope = _excess_and_slope(least[..., None] + steps, least + (dimension - 1) / 2)
        log_half = log_half - (jnp.log(excess) - jnp.log(value)) * excess / (slope * least)
    return jnp.exp(log_half)
