"""The Wishart distribution over D × D matrices, scale V, n degrees of freedom: T(X) = (X, log|X|).

    λ = (−V⁻¹/2, (n − D − 1)/2),    A = (n/2) log|2V| + log Γ_D(n/2),    μ = (n V, ψ_D(n/2) + log|2V|)

Its sigma points are (1 ± t) M with M = E[X] and t² = 1 − exp(−2y/D), y = log|M| − E[log|X|] > 0, a function of n
alone. From ∇f = C₁ + c₂ X⁻¹ at the two, symmetric, follows c.

Source: Khan & Rue 2023, section 2; Bishop 2006, "Pattern Recognition and Machine Learning", appendix B.
"""

from __future__ import annotations

from math import log, pi
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.special import digamma, gammaln

from ._natural import Natural, at_both, family, smallest_spread
from ._special import log_minus_digamma, trigamma_excess
from .multivariate_normal import _cholesky, _inverse_cholesky

__all__ = ["WishartNatural"]


class Wishart(dist.Wishart):
    """The host's, whose own draws come with warnings of singular ones where there are none."""

    def rsample(self, sample_shape=()) -> Tensor:
        return _draw(self.df, self.scale_tril, torch.Size(sample_shape))


@family(dist.Wishart, torch.distributions.Wishart)
class WishartNatural(Natural):
    """λ = (−V⁻¹/2, (n − D − 1)/2), of shapes [*batch, D, D] and [*batch]; n > D − 1."""

    linear: Tensor
    log_determinant: Tensor

    ranks = (2, 0)
    value_rank = 2
    host_parameters = (("df", "scale_tril"),)

    @property
    def dimension(self) -> int:
        return self.linear.shape[-1]

    @property
    def degrees_of_freedom(self) -> Tensor:
        return 2 * self.log_determinant + self.dimension + 1

    @property
    def rate_matrix(self) -> Tensor:
        return -(self.linear + self.linear.mT)

    @property
    def scale_tril(self) -> Tensor:
        return _inverse_cholesky(self.rate_matrix)

    @classmethod
    def from_distribution(cls, distribution: dist.Wishart) -> Self:
        inverse = _inverse_cholesky(distribution.scale_tril @ distribution.scale_tril.mT)
        rate = inverse @ inverse.mT
        batch, dimension = distribution.batch_shape, rate.shape[-1]
        log_determinant = (distribution.df - dimension - 1) / 2
        return cls(
            linear=torch.broadcast_to(-rate / 2, (*batch, dimension, dimension)),
            log_determinant=torch.broadcast_to(log_determinant, batch),
        )

    def to_distribution(self) -> dist.Wishart:
        return Wishart(self.degrees_of_freedom, scale_tril=self.scale_tril)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, with a hundred degrees of freedom more than the least."""
        dimension = value.shape[-1]
        factor = _inverse_cholesky(value)
        rate = (dimension + 99) * factor @ factor.mT
        return cls(linear=-rate / 2, log_determinant=torch.full_like(value[..., 0, 0], 49.0))

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(linear=value, log_determinant=_log_determinant(_cholesky(value)))

    def log_partition(self) -> Tensor:
        dimension, half = self.dimension, self.degrees_of_freedom / 2
        log_scale = _log_determinant(self.scale_tril) + dimension * log(2)
        log_gamma = gammaln(self._halves()).sum(-1) + dimension * (dimension - 1) / 4 * log(pi)
        return half * log_scale + log_gamma

    def to_expectation(self):
        factor = self.scale_tril
        log_scale = _log_determinant(factor) + self.dimension * log(2)
        mean = self.degrees_of_freedom[..., None, None] * (factor @ factor.mT)
        return self.Expectation(linear=mean, log_determinant=log_scale + digamma(self._halves()).sum(-1))

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        dimension = expectation.linear.shape[-1]
        excess = _log_determinant(_cholesky(expectation.linear)) - expectation.log_determinant
        half = _inverse_excess(excess, dimension)
        factor = _inverse_cholesky(expectation.linear)
        rate = (2 * half + dimension - 1)[..., None, None] * (factor @ factor.mT)
        return cls(linear=-rate / 2, log_determinant=half - 1)

    def in_domain(self) -> Tensor:
        factor = _cholesky(self.rate_matrix)
        finite = factor.isfinite().all(-1).all(-1) & self.log_determinant.isfinite()
        return finite & (self.log_determinant > -1)

    def fisher_solve(self, gradient) -> Self:
        """With P = −λ₁: dμ₁ = V (n dλ₁ 2 V + 2 dλ₂), dμ₂ = tr(2 V dλ₁) + ψ'_D(n/2) dλ₂, solved for dλ."""
        rate, change = self.rate_matrix / 2, (gradient.linear + gradient.linear.mT) / 2
        half = self.degrees_of_freedom / 2
        weighted = rate @ change
        trace = weighted.diagonal(dim1=-2, dim2=-1).sum(-1)
        # ψ'_D(n/2) − 2 D/n, whose two terms cancel
        slope = -_excess_and_slope(self._halves(), half)[1]
        log_determinant = (gradient.log_determinant - trace / half) / slope
        linear = (weighted @ rate - log_determinant[..., None, None] * rate) / half[..., None, None]
        return type(self)(linear=linear, log_determinant=log_determinant)

    def sigma_points(self, signs: Tensor) -> Tensor:
        return self.point_factors(signs)[..., None, None] * self.to_expectation().linear

    def point_factors(self, signs: Tensor) -> Tensor:
        """1 ± t; 1 − t from (1 − t)(1 + t) = exp(−2y/D), which keeps its digits where t is nearly one."""
        excess = 2 / self.dimension * _excess_and_slope(self._halves(), self.degrees_of_freedom / 2)[0]
        spread = torch.sqrt(-torch.expm1(-excess)).clamp(min=smallest_spread(excess.dtype))
        return torch.where(signs[..., 0] > 0, 1 + spread, torch.exp(-excess) / (1 + spread))

    @classmethod
    def along(cls, values: Tensor, gradients: Tensor) -> Tensor:
        """The symmetric part."""
        return (gradients + gradients.mT) / 2

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        gradients = (gradients + gradients.mT) / 2
        mean, dimension = values.mean(0), values.shape[-1]
        traces = values.diagonal(dim1=-2, dim2=-1).sum(-1) / mean.diagonal(dim1=-2, dim2=-1).sum(-1)
        (up, down), (high, low) = at_both(gradients, signs[..., None]), at_both(traces, signs[..., 0])
        # tr(M ∇f) = tr(M C₁) + c₂ D/(1 ± t)
        contrast = ((up - down) * mean).sum((-2, -1))
        log_determinant = contrast * high * low / (dimension * (low - high))
        factor = _inverse_cholesky(mean)
        inverse = factor @ factor.mT / (high * low)[..., None, None]
        linear = (up + down) / 2 - log_determinant[..., None, None] * inverse
        return cls(linear=linear, log_determinant=log_determinant)

    def _halves(self) -> Tensor:
        """(n − i)/2 for i = D − 1, …, 0."""
        steps = torch.arange(self.dimension, dtype=self.linear.dtype, device=self.linear.device)
        return self.log_determinant[..., None] + 1 + steps / 2


def _draw(df: Tensor, scale_tril: Tensor, sample_shape: Any = ()) -> Tensor:
    """Draws by Bartlett's decomposition."""
    halves = (df[..., None] - torch.arange(scale_tril.shape[-1], dtype=df.dtype, device=df.device)) / 2
    diagonal = torch.sqrt(2 * torch.distributions.Gamma(halves, torch.ones_like(halves)).rsample(sample_shape))
    below = torch.randn_like(diagonal[..., None].expand(*diagonal.shape, diagonal.shape[-1])).tril(-1)
    factor = scale_tril @ (below + torch.diag_embed(diagonal))
    return factor @ factor.mT


def _log_determinant(factor: Tensor) -> Tensor:
    """log|L Lᵀ| of a triangular factor."""
    return 2 * torch.log(factor.diagonal(dim1=-2, dim2=-1)).sum(-1)


def _excess_and_slope(halves: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """y(h) = Σ_i log h − ψ(h_i) and y'(h) = Σ_i 1/h − ψ'(h_i) at h = n/2, h_i = (n − i)/2, without cancellation."""
    half = half[..., None]
    gap = torch.arange(halves.shape[-1] - 1, -1, -1, dtype=halves.dtype, device=halves.device) / 2
    excess = torch.log1p(gap / halves) + log_minus_digamma(halves)
    slope = -(gap / half + trigamma_excess(halves)) / halves
    return excess.sum(-1), slope.sum(-1)


def _inverse_excess(value: Tensor, dimension: int) -> Tensor:
    """(n − D + 1)/2 with y(n/2) = `value`, by Newton's method on the logarithms of both, which are nearly a line."""
    steps = torch.arange(dimension, dtype=value.dtype, device=value.device) / 2
    log_half = torch.log(dimension * (dimension + 1) / 4 / value)
    for _ in range(12):
        least = torch.exp(log_half)
        excess, slope = _excess_and_slope(least[..., None] + steps, least + (dimension - 1) / 2)
        log_half = log_half - (torch.log(excess) - torch.log(value)) * excess / (slope * least)
    return torch.exp(log_half)
