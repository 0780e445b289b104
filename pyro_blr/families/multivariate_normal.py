"""The full-rank Gaussian N(m, S⁻¹): T(z) = (z, z zᵀ), natural parameters λ = (S m, −S/2).

Source: Khan & Rue 2023, "The Bayesian Learning Rule", section 3.1; `DensePrecision` is S, `hessian` is E_q[∇²ℓ].

Everything goes through Cholesky factors, whose errors do not depend on the units of the coordinates (van der Sluis
1969): a regression with unscaled columns is solved as exactly as the scaled one. Eigenvalues, which do depend on
the units, are taken only where the straight step is not positive definite, and then of the *whitened* Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import log, pi
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.linalg import solve_triangular

from ._family import Block
from ._natural import Natural, family

__all__ = ["DensePrecision", "MultivariateNormalNatural"]


@dataclass(frozen=True)
class DensePrecision:
    """S with `matrix` of shape [D, D], symmetric positive definite."""

    matrix: Tensor

    @classmethod
    def from_scales(
        cls, blocks: tuple[Block, ...], scales: tuple[Tensor | None, ...], unlearned: float, like: Tensor
    ) -> DensePrecision:
        parts = []
        for block, scale in zip(blocks, scales, strict=True):
            if scale is None:
                parts.append(torch.eye(block.size, dtype=like.dtype, device=like.device) * unlearned**-2)
            elif block.structure == "dense":
                parts += [torch.cholesky_inverse(factor) for factor in scale.reshape(-1, *scale.shape[-2:])]
            else:
                parts.append(torch.diag(scale.reshape(-1) ** -2))
        return cls(torch.block_diag(*parts))

    def blend(self, hessian: Tensor, rate: float) -> Self:
        """S ← (1 − ρ) S + ρ H wherever that keeps more than (1 − ρ) S / 2, as it does for every H ≥ 0.

        Elsewhere, with S = L Lᵀ and L⁻¹ H L⁻ᵀ = Q diag(w) Qᵀ: S ← L Q diag((1 − ρ) + ρ |w|) Qᵀ Lᵀ, in which a
        direction without positive curvature keeps at least a quarter of its precision. Positive definite for every H.
        """
        straight = (1 - rate) * self.matrix + rate * hessian
        _, failed = torch.linalg.cholesky_ex(straight - (1 - rate) / 2 * self.matrix)
        return self.at(_reflected(self.matrix, hessian, rate) if failed else straight)

    def at(self, matrix: Tensor) -> Self:
        """The precision of the same guide with another S."""
        return replace(self, matrix=matrix)

    def solve(self, vector: Tensor) -> Tensor:
        columns = vector.reshape(-1, len(self.matrix)).T
        return torch.cholesky_solve(columns, self._factor).T.reshape(vector.shape)

    @cached_property
    def _factor(self) -> Tensor:
        """L with L Lᵀ = S; a step asks for it several times."""
        return _cholesky(self.matrix)

    def scale(self, block: Block) -> Tensor:
        """σ = diag(S_bb)^(−1/2) for a mean-field block; the lower C with C Cᵀ = (S_bb)⁻¹ for a dense one."""
        if block.structure != "dense":
            return (self.matrix.diagonal()[block.start : block.stop] ** -0.5).reshape(block.shape)
        size = block.shape[-1]
        rows = [
            _inverse_cholesky(self.matrix[start : start + size, start : start + size])
            for start in range(block.start, block.stop, size)
        ]
        return torch.stack(rows).reshape(*block.shape, size)

    def complete(self, hessian: Tensor, weight: Tensor) -> Tensor:
        # A coordinate outside the batch keeps its row and column; a global one has weight 1, so the pair of a local
        # and a global coordinate is seen as often as the local one alone.
        pair = torch.maximum(weight[:, None], weight[None, :])
        covered = (weight[:, None] > 0) & (weight[None, :] > 0)
        return torch.where(covered, hessian / torch.where(covered, pair, 1.0), self.matrix)


@family(dist.MultivariateNormal, torch.distributions.MultivariateNormal)
class MultivariateNormalNatural(Natural):
    """λ = (S m, −S/2) of shapes [*batch, D] and [*batch, D, D]; A = mᵀ S m/2 − log|S|/2 + D log(2π)/2.

    Sigma points m + C ε for ε in {−1, 1}^D with C Cᵀ = S⁻¹: as many as are needed for uncorrelated signs.
    """

    linear: Tensor
    quadratic: Tensor

    ranks = (1, 2)
    value_rank = 1
    host_parameters = (("loc", "scale_tril"),)

    @property
    def precision_matrix(self) -> Tensor:
        return -(self.quadratic + self.quadratic.mT)

    @property
    def scale_tril(self) -> Tensor:
        return _inverse_cholesky(self.precision_matrix)

    @property
    def loc(self) -> Tensor:
        return _solve(self.precision_matrix, self.linear)

    @classmethod
    def from_distribution(cls, distribution: dist.MultivariateNormal) -> Self:
        factor = distribution.scale_tril
        precision = torch.cholesky_inverse(factor)
        linear = (precision @ distribution.loc[..., None]).squeeze(-1)
        return cls(linear=linear, quadratic=-(precision + precision.mT) / 4)

    def to_distribution(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, scale 0.1 in every direction, as the host's AutoMultivariateNormal starts."""
        identity = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
        quadratic = (-0.5 / 0.01 * identity).expand(*value.shape, value.shape[-1])
        return cls(linear=value / 0.01, quadratic=quadratic)

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(linear=value, quadratic=value[..., :, None] * value[..., None, :])

    def log_partition(self) -> Tensor:
        factor = _cholesky(self.precision_matrix)
        half = solve_triangular(factor, self.linear[..., None], upper=False).squeeze(-1)
        log_determinant = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return (half**2).sum(-1) / 2 - log_determinant + self.linear.shape[-1] * log(2 * pi) / 2

    def to_expectation(self):
        factor, loc = self.scale_tril, self.loc
        second = factor @ factor.mT + loc[..., :, None] * loc[..., None, :]
        return self.Expectation(linear=loc, quadratic=second)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        loc = expectation.linear
        covariance = expectation.quadratic - loc[..., :, None] * loc[..., None, :]
        covariance = (covariance + covariance.mT) / 2
        return cls.from_distribution(dist.MultivariateNormal(loc, scale_tril=_cholesky(covariance)))

    def in_domain(self) -> Tensor:
        factor = _cholesky(self.precision_matrix)
        return factor.isfinite().all(-1).all(-1) & self.linear.isfinite().all(-1)

    def fisher_solve(self, gradient) -> Self:
        """F⁻¹ = ∂λ/∂μ: g changes Σ by dΣ = g₂ − g₁ mᵀ − m g₁ᵀ, and λ by (S g₁ − 2 Q m, Q) with Q = S dΣ S / 2."""
        precision, loc = self.precision_matrix, self.loc
        outer = gradient.linear[..., :, None] * loc[..., None, :]
        change = gradient.quadratic - outer - outer.mT
        quadratic = precision @ ((change + change.mT) / 2) @ precision / 2
        linear = (precision @ gradient.linear[..., None] - 2 * quadratic @ loc[..., None]).squeeze(-1)
        return type(self)(linear=linear, quadratic=quadratic)

    @property
    def num_signs(self) -> int:
        return self.linear.shape[-1]

    def sigma_points(self, signs: Tensor) -> Tensor:
        return self.loc + (self.scale_tril @ signs[..., None]).squeeze(-1)

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        # f' = c₁ + 2 C₂ z at z = m + C ε: the averages of z εᵀ and f' εᵀ are C and 2 C₂ C
        factor = (values[..., :, None] * signs[..., None, :]).mean(0)
        slope = (gradients[..., :, None] * signs[..., None, :]).mean(0)
        hessian = torch.linalg.solve_ex(factor.mT, slope.mT)[0].mT
        hessian = (hessian + hessian.mT) / 2
        linear = gradients.mean(0) - (hessian @ values.mean(0)[..., None]).squeeze(-1)
        return cls(linear=linear, quadratic=hessian / 2)


def _solve(matrix: Tensor, vector: Tensor) -> Tensor:
    return torch.cholesky_solve(vector.unsqueeze(-1), _cholesky(matrix)).squeeze(-1)


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower factor, NaN where there is none: what is not finite is then refused in one place, by the rule."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor.masked_fill((failed > 0)[..., None, None], torch.nan)


def _reflected(matrix: Tensor, hessian: Tensor, rate: float) -> Tensor:
    factor = _cholesky(matrix)
    half = solve_triangular(factor, hessian, upper=False)
    whitened = solve_triangular(factor, half.mT, upper=False)
    if not whitened.isfinite().all():
        return whitened  # eigh raises where Cholesky returns NaN
    eigenvalues, vectors = torch.linalg.eigh((whitened + whitened.mT) / 2)
    blended = (1 - rate) + rate * eigenvalues.abs()
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * eigenvalues.abs().max()
    blended = torch.where(eigenvalues > rounding, blended, blended.clamp(min=0.25))
    root = factor @ (vectors * blended.sqrt())
    return root @ root.mT


def _inverse_cholesky(matrix: Tensor) -> Tensor:
    """Lower C with C Cᵀ = S⁻¹, from S = U Uᵀ with U upper: C = U⁻ᵀ. S is never inverted."""
    upper = _cholesky(matrix.flip(-2, -1)).flip(-2, -1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return solve_triangular(upper.mT, identity, upper=False)
