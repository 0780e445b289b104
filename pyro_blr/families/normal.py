"""The diagonal Gaussian N(m, diag(s)⁻¹): T(z) = (z, z²), natural parameters λ = (s m, −s/2), elementwise.

Source: Khan & Rue 2023, "The Bayesian Learning Rule", section 4; `DiagonalPrecision` is s, `hessian` is E_q[diag ∇²ℓ].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log, pi
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor

from ._family import Block
from ._natural import Natural, at_both, family
from .multivariate_normal import MultivariateNormalNatural

__all__ = ["DiagonalPrecision", "NormalNatural"]


@dataclass(frozen=True)
class DiagonalPrecision:
    """S = diag(s), with `diagonal` = s of shape [D], positive."""

    diagonal: Tensor

    @classmethod
    def from_scales(
        cls, blocks: tuple[Block, ...], scales: tuple[Tensor | None, ...], unlearned: float, like: Tensor
    ) -> DiagonalPrecision:
        parts = [
            like.new_full((block.size,), unlearned**-2) if scale is None else scale.reshape(-1) ** -2
            for block, scale in zip(blocks, scales, strict=True)
        ]
        return cls(torch.cat(parts))

    def blend(self, hessian: Tensor, rate: float | Tensor) -> DiagonalPrecision:
        """s ← (1 − ρ) s + ρ h wherever that keeps more than (1 − ρ) s / 2, as it does for every h ≥ 0; ρ may be [D].

        Elsewhere h is reflected: s ← (1 − ρ) s + ρ |h|, at least s / 4. Positive for every h.
        """
        straight = (1 - rate) * self.diagonal + rate * hessian
        reflected = torch.maximum((1 - rate) * self.diagonal + rate * hessian.abs(), self.diagonal / 4)
        return DiagonalPrecision(torch.where(straight > (1 - rate) / 2 * self.diagonal, straight, reflected))

    def solve(self, vector: Tensor) -> Tensor:
        return vector / self.diagonal

    def scale(self, block: Block) -> Tensor:
        """σ = s^(−1/2)."""
        return self._scales[block.start : block.stop].reshape(block.shape)

    @cached_property
    def _scales(self) -> Tensor:
        """Of all blocks; a step asks for them several times."""
        return self.diagonal**-0.5

    def complete(self, hessian: Tensor, weight: Tensor) -> Tensor:
        covered = weight > 0
        return torch.where(covered, hessian / torch.where(covered, weight, 1.0), self.diagonal)


@family(dist.Normal, torch.distributions.Normal)
class NormalNatural(Natural):
    """λ = (s m, −s/2), each of the batch's shape; A = s m²/2 − log(s)/2 + log(2π)/2. Sigma points m ± σ."""

    linear: Tensor
    quadratic: Tensor

    ranks = (0, 0)
    host_parameters = (("loc", "scale"),)

    @property
    def loc(self) -> Tensor:
        return self.linear / (-2 * self.quadratic)

    @property
    def scale(self) -> Tensor:
        return (-2 * self.quadratic) ** -0.5

    @classmethod
    def from_distribution(cls, distribution: dist.Normal) -> Self:
        loc, scale = torch.broadcast_tensors(distribution.loc, distribution.scale)
        return cls(linear=loc / scale**2, quadratic=-0.5 / scale**2)

    def to_distribution(self) -> dist.Normal:
        return dist.Normal(self.loc, self.scale)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, scale 0.1, as the host's AutoNormal starts."""
        return cls(linear=value / 0.01, quadratic=torch.full_like(value, -0.5 / 0.01))

    @classmethod
    def from_joint(cls, joint: MultivariateNormalNatural) -> Self:
        """The best member for a quadratic over all coordinates of the last axis: mean S⁻¹ h, precision diag S."""
        precision = -2 * joint.quadratic.diagonal(dim1=-2, dim2=-1)
        return cls(linear=precision * joint.loc, quadratic=-precision / 2)

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(linear=value, quadratic=value**2)

    def log_partition(self) -> Tensor:
        return self.linear**2 / (-4 * self.quadratic) - torch.log(-2 * self.quadratic) / 2 + log(2 * pi) / 2

    def to_expectation(self):
        return self.Expectation(linear=self.loc, quadratic=self.loc**2 + self.scale**2)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        precision = 1 / (expectation.quadratic - expectation.linear**2)
        return cls(linear=precision * expectation.linear, quadratic=-precision / 2)

    def in_domain(self) -> Tensor:
        return (self.quadratic < 0) & self.linear.isfinite() & self.quadratic.isfinite()

    def fisher_solve(self, gradient) -> Self:
        # F⁻¹ = ∂λ/∂μ with s = 1 / (μ₂ − μ₁²)
        precision, loc = -2 * self.quadratic, self.loc
        quadratic = precision**2 * (gradient.quadratic / 2 - loc * gradient.linear)
        return type(self)(linear=precision * gradient.linear - 2 * loc * quadratic, quadratic=quadratic)

    def sigma_points(self, signs: Tensor) -> Tensor:
        return self.loc + self.scale * signs[..., 0]

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        (up, down), (high, low) = at_both(gradients, signs[..., 0]), at_both(values, signs[..., 0])
        slope = (up - down) / (high - low)
        return cls(linear=(up + down) / 2 - slope * (high + low) / 2, quadratic=slope / 2)
