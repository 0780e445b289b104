"""The diagonal Gaussian N(m, diag(s)⁻¹): natural parameters λ = (s m, −s/2), elementwise.

Source: Khan & Rue 2023, "The Bayesian Learning Rule", section 4; `DiagonalPrecision` is s, `hessian` is E_q[diag ∇²ℓ].
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from ._family import Block

__all__ = ["DiagonalPrecision"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DiagonalPrecision:
    """S = diag(s), with `diagonal` = s of shape [D], positive."""

    diagonal: Array

    @classmethod
    def from_scales(
        cls, blocks: tuple[Block, ...], scales: tuple[Array | None, ...], unlearned: float, like: Array
    ) -> DiagonalPrecision:
        parts = [
            jnp.full(block.size, unlearned**-2, like.dtype) if scale is None else jnp.ravel(scale) ** -2
            for block, scale in zip(blocks, scales, strict=True)
        ]
        return cls(jnp.concatenate(parts))

    def blend(self, hessian: Array, rate: Array) -> DiagonalPrecision:
        """s ← (1 − ρ) s + ρ h wherever that keeps more than (1 − ρ) s / 2, as it does for every h ≥ 0.

        Elsewhere h is reflected: s ← (1 − ρ) s + ρ |h|, at least s / 4. Positive for every h.
        """
        straight = (1 - rate) * self.diagonal + rate * hessian
        reflected = jnp.maximum((1 - rate) * self.diagonal + rate * jnp.abs(hessian), self.diagonal / 4)
        return DiagonalPrecision(jnp.where(straight > (1 - rate) / 2 * self.diagonal, straight, reflected))

    def solve(self, vector: Array) -> Array:
        return vector / self.diagonal

    def scale(self, block: Block) -> Array:
        """σ = s^(−1/2)."""
        return jnp.reshape(self.diagonal[block.start : block.stop] ** -0.5, block.shape)

    def complete(self, hessian: Array, weight: Array) -> Array:
        covered = weight > 0
        return jnp.where(covered, hessian / jnp.where(covered, weight, 1), self.diagonal)
