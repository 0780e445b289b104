"""The full-rank Gaussian N(m, S⁻¹): natural parameters λ = (S m, −S/2).

Source: Khan & Rue 2023, "The Bayesian Learning Rule", section 3.1; `DensePrecision` is S, `hessian` is E_q[∇²ℓ].

Everything goes through Cholesky factors, whose errors do not depend on the units of the coordinates (van der Sluis
1969): a regression with unscaled columns is solved as exactly as the scaled one. Eigenvalues, which do depend on
the units, are taken only where the straight step is not positive definite, and then of the *whitened* Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from ._family import Block

__all__ = ["DensePrecision"]


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

    def blend(self, hessian: Tensor, rate: float) -> DensePrecision:
        """S ← (1 − ρ) S + ρ H wherever that keeps more than (1 − ρ) S / 2, as it does for every H ≥ 0.

        Elsewhere, with S = L Lᵀ and L⁻¹ H L⁻ᵀ = Q diag(w) Qᵀ: S ← L Q diag((1 − ρ) + ρ |w|) Qᵀ Lᵀ, in which a
        direction without positive curvature keeps at least a quarter of its precision. Positive definite for every H.
        """
        straight = (1 - rate) * self.matrix + rate * hessian
        _, failed = torch.linalg.cholesky_ex(straight - (1 - rate) / 2 * self.matrix)
        return DensePrecision(_reflected(self.matrix, hessian, rate) if failed else straight)

    def solve(self, vector: Tensor) -> Tensor:
        return torch.cholesky_solve(vector.unsqueeze(-1), _cholesky(self.matrix)).squeeze(-1)

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


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower factor, NaN where there is none: what is not finite is then refused in one place, by the rule."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return factor.fill_(torch.nan) if failed else factor


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
    upper = _cholesky(matrix.flip(0, 1)).flip(0, 1)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return solve_triangular(upper.mT, identity, upper=False)
