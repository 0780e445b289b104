"""The diagonal Gaussian N(m, diag(s)⁻¹): natural parameters λ = (s m, −s/2), elementwise.

Source: Khan & Rue 2023, "The Bayesian Learning Rule", section 4; `DiagonalPrecision` is s, `hessian` is E_q[diag ∇²ℓ].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._family import Block

__all__ = ["DiagonalPrecision"]


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

    def blend(self, hessian: Tensor, rate: float) -> DiagonalPrecision:
        """s ← (1 − ρ) s + ρ h wherever that keeps more than (1 − ρ) s / 2, as it does for every h ≥ 0.

        Elsewhere h is reflected: s ← (1 − ρ) s + ρ |h|, at least s / 4. Positive for every h.
        """
        straight = (1 - rate) * self.diagonal + rate * hessian
        reflected = torch.maximum((1 - rate) * self.diagonal + rate * hessian.abs(), self.diagonal / 4)
        return DiagonalPrecision(torch.where(straight > (1 - rate) / 2 * self.diagonal, straight, reflected))

    def solve(self, vector: Tensor) -> Tensor:
        return vector / self.diagonal

    def scale(self, block: Block) -> Tensor:
        """σ = s^(−1/2)."""
        return (self.diagonal[block.start : block.stop] ** -0.5).reshape(block.shape)

    def complete(self, hessian: Tensor, weight: Tensor) -> Tensor:
        covered = weight > 0
        return torch.where(covered, hessian / torch.where(covered, weight, 1.0), self.diagonal)
