"""Differences of special functions that cancel where their argument is large, by their asymptotic series there."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["log_minus_digamma", "trigamma_excess"]

LARGE = 10.0  # from here on the series below are exact in double precision
# B₂, B₄, … of Bernoulli
BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798)


def log_minus_digamma(a: Tensor) -> Tensor:
    """log a − ψ(a) = 1/(2a) + Σ_k B₂ₖ / (2k a²ᵏ) = 1/(2a) + 1/(12a²) − 1/(120a⁴) + …"""
    x = 1 / a.clamp(min=LARGE)
    series = x / 2 + _even_series(x, [number / (2 * k) for k, number in enumerate(BERNOULLI, start=1)])
    small = a.clamp(max=LARGE)
    return torch.where(a > LARGE, series, small.log() - small.digamma())


def trigamma_excess(a: Tensor) -> Tensor:
    """a ψ'(a) − 1 = 1/(2a) + Σ_k B₂ₖ / a²ᵏ = 1/(2a) + 1/(6a²) − 1/(30a⁴) + …"""
    x = 1 / a.clamp(min=LARGE)
    small = a.clamp(max=LARGE)
    return torch.where(a > LARGE, x / 2 + _even_series(x, BERNOULLI), small * torch.special.zeta(2, small) - 1)


def _even_series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Σ_k c_k x²ᵏ, k = 1, 2, …"""
    square = x**2
    return square * functools.reduce(lambda rest, number: number + square * rest, reversed(coefficients), 0 * x)
