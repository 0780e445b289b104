"""Differences of special functions that cancel where their argument is large, by their asymptotic series there."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import digamma, polygamma

__all__ = ["log_minus_digamma", "trigamma_excess"]

LARGE = 10.0  # from here on the series below are exact in double precision
# B₂, B₄, … of Bernoulli
BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798)


def log_minus_digamma(a: Array) -> Array:
    """log a − ψ(a) = 1/(2a) + Σ_k B₂ₖ / (2k a²ᵏ) = 1/(2a) + 1/(12a²) − 1/(120a⁴) + …"""
    x = 1 / jnp.maximum(a, LARGE)
    series = x / 2 + _even_series(x, [number / (2 * k) for k, number in enumerate(BERNOULLI, start=1)])
    small = jnp.minimum(a, LARGE)
    return jnp.where(a > LARGE, series, jnp.log(small) - digamma(small))


def trigamma_excess(a: Array) -> Array:
    """a ψ'(a) − 1 = 1/(2a) + Σ_k B₂ₖ / a²ᵏ = 1/(2a) + 1/(6a²) − 1/(30a⁴) + …"""
    x = 1 / jnp.maximum(a, LARGE)
    small = jnp.minimum(a, LARGE)
    return jnp.where(a > LARGE, x / 2 + _even_series(x, BERNOULLI), small * polygamma(1, small) - 1)


def _even_series(x: Array, coefficients: Sequence[float]) -> Array:
    """Σ_k c_k x²ᵏ, k = 1, 2, …"""
    square = x**2
    return square * functools.reduce(lambda rest, number: number + square * rest, reversed(coefficients), 0 * x)
