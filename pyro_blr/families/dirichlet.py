"""The Dirichlet distribution with concentrations α: T(z) = log z, λ = α − 1, A = Σ log Γ(α_k) − log Γ(Σ α_k).

With μ = E[log z], the two points softmax(μ ± t v) average to μ where the two log-normalisers cancel, which fixes t.
F = diag(ψ'(α)) − ψ'(α₀) 1 1ᵀ with α₀ = Σ α_k, solved by the formula of Sherman & Morrison 1950.

Source: Khan & Rue 2023, section 2; Minka 2000, "Estimating a Dirichlet distribution".
"""

from __future__ import annotations

from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.special import digamma, gammaln, polygamma

from ._natural import Natural, at_both, family, smallest_spread
from ._special import trigamma_excess

__all__ = ["DirichletNatural"]


NUM_ITERATIONS = 40


@family(dist.Dirichlet, torch.distributions.Dirichlet)
class DirichletNatural(Natural):
    """λ = α − 1, of shape [*batch, K]."""

    log: Tensor

    ranks = (1,)
    value_rank = 1
    host_parameters = (("concentration",),)

    @property
    def concentration(self) -> Tensor:
        return self.log + 1

    @classmethod
    def from_distribution(cls, distribution: dist.Dirichlet) -> Self:
        return cls(log=distribution.concentration - 1)

    def to_distribution(self) -> dist.Dirichlet:
        return dist.Dirichlet(self.concentration)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, as if seen in ten draws for each category."""
        return cls(log=10 * value.shape[-1] * value - 1)

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(log=torch.log(value))

    def log_partition(self) -> Tensor:
        return gammaln(self.concentration).sum(-1) - gammaln(self.concentration.sum(-1))

    def to_expectation(self):
        total = self.concentration.sum(-1, keepdim=True)
        return self.Expectation(log=digamma(self.concentration) - digamma(total))

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        """By Newton's method on log α, each step solved with `fisher_solve`, halved where it would overshoot."""
        log = expectation.log
        # Minka's fixed point, from the concentrations of a flat Dirichlet, brings Newton's method into its basin
        concentration = torch.ones_like(log)
        for _ in range(20):
            concentration = _inverse_digamma(log + digamma(concentration.sum(-1, keepdim=True)))
        for _ in range(30):
            current = cls(log=concentration - 1)
            step = current.fisher_solve(current.to_expectation() - expectation).log
            concentration = torch.maximum(concentration - step, concentration / 4)
        return cls(log=concentration - 1)

    def in_domain(self) -> Tensor:
        return ((self.concentration > 0) & self.log.isfinite()).all(-1)

    def fisher_solve(self, gradient) -> Self:
        # with e = a ψ'(a) − 1 and p = α/α₀: 1 − ψ'(α₀) Σ 1/ψ'(α_k) = (1 + e₀) Σ p_k e_k/(1 + e_k) − e₀, for α₀ large
        concentration, total = self.concentration, self.concentration.sum(-1, keepdim=True)
        excess, excess_total = trigamma_excess(concentration), trigamma_excess(total)
        inverse, share = concentration / (1 + excess), concentration / total / (1 + excess)
        direct = 1 - (1 + excess_total) * share.sum(-1, keepdim=True)
        rest = (1 + excess_total) * (share * excess).sum(-1, keepdim=True) - excess_total
        scaled = inverse * gradient.log
        correction = (1 + excess_total) * scaled.sum(-1, keepdim=True) / torch.where(total > 1, rest, direct)
        return type(self)(log=scaled + correction * share)

    def sigma_points(self, signs: Tensor) -> Tensor:
        return torch.exp(log_sigma_points(self.concentration, signs))

    @classmethod
    def along(cls, values: Tensor, gradients: Tensor) -> Tensor:
        """z_k (f'_k − Σ_j z_j f'_j), the derivative with respect to the logits."""
        return values * (gradients - (values * gradients).sum(-1, keepdim=True))

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        # along the simplex the derivative is c_k − z_k c₀ with c₀ = Σ c_k
        (up, down), (high, low) = at_both(cls.along(values, gradients), signs), at_both(values, signs)
        width = high - low
        total = -((up - down) * width).sum(-1, keepdim=True) / (width**2).sum(-1, keepdim=True)
        return cls(log=(up + down) / 2 + total * (high + low) / 2)


def log_sigma_points(concentration: Tensor, signs: Tensor) -> Tensor:
    """log z of the two points, [R, *batch, K]."""
    center = digamma(concentration) - digamma(concentration.sum(-1, keepdim=True))
    alternating = torch.ones_like(center)
    alternating[..., 1::2] = -1
    direction = alternating / (concentration / concentration.amax(-1, keepdim=True)) ** 0.5
    direction = direction / direction.abs().amax(-1, keepdim=True)

    def normalizers(spread: Tensor) -> tuple[Tensor, Tensor]:
        spread = spread[..., None]
        return (center + spread * direction).logsumexp(-1), (center - spread * direction).logsumexp(-1)

    def slope(spread: Tensor) -> Tensor:
        spread = spread[..., None]
        tilt = (center + spread * direction).softmax(-1) - (center - spread * direction).softmax(-1)
        return (direction * tilt).sum(-1) / 2

    # the mean of both is convex, even and increasing: Newton's method from the right of its root comes down to it
    gap = direction[..., 0].abs() + direction[..., 1].abs()
    spread, least = -(center[..., 0] + center[..., 1]) / gap, smallest_spread(center.dtype)
    for _ in range(NUM_ITERATIONS):
        last = spread
        spread = (spread - sum(normalizers(spread)) / 2 / slope(spread)).clamp(min=least)
        if torch.allclose(spread, last, rtol=torch.finfo(spread.dtype).eps, atol=0):
            break
    up, down = normalizers(spread)
    normalizer = torch.where(signs[..., 0] > 0, up, down)
    return center + signs * spread[..., None] * direction - normalizer[..., None]


def _inverse_digamma(value: Tensor) -> Tensor:
    """Newton's method from Minka's start."""
    result = torch.where(value >= -2.22, torch.exp(value) + 0.5, -1 / (value - digamma(torch.ones_like(value))))
    for _ in range(5):
        result = result - (digamma(result) - value) / polygamma(1, result)
    return result
