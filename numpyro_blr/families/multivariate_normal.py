"""The full-rank Gaussian N(m, S⁻¹): natural parameters λ = (S m, −S/2).

Source: Khan & Rue 2023, "The Bayesian Learning Rule", section 3.1; `DensePrecision` is S, `hessian` is E_q[∇²ℓ].

Everything goes through Cholesky factors, whose errors do not depend on the units of the coordinates (van der Sluis
1969): a regression with unscaled columns is solved as exactly as the scaled one. Eigenvalues, which do depend on
the units, are taken only where the straight step is not positive definite, and then of the *whitened* Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular

from ._family import Block

__all__ = ["DensePrecision"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DensePrecision:
    """S with `matrix` of shape [D, D], symmetric positive definite."""

    matrix: Array

    @classmethod
    def from_scales(
        cls, blocks: tuple[Block, ...], scales: tuple[Array | None, ...], unlearned: float, like: Array
    ) -> DensePrecision:
        parts = []
        for block, scale in zip(blocks, scales, strict=True):
            if scale is None:
                parts.append(jnp.eye(block.size, dtype=like.dtype) * unlearned**-2)
            elif block.structure == "dense":
                for scale_tril in scale.reshape(-1, *scale.shape[-2:]):
                    parts.append(cho_solve((scale_tril, True), jnp.eye(scale.shape[-1], dtype=scale.dtype)))
            else:
                parts.append(jnp.diag(jnp.ravel(scale) ** -2))
        return cls(jax.scipy.linalg.block_diag(*parts))

    def blend(self, hessian: Array, rate: Array) -> DensePrecision:
        """S ← (1 − ρ) S + ρ H wherever that keeps more than (1 − ρ) S / 2, as it does for every H ≥ 0.

        Elsewhere, with S = L Lᵀ and L⁻¹ H L⁻ᵀ = Q diag(w) Qᵀ: S ← L Q diag((1 − ρ) + ρ |w|) Qᵀ Lᵀ, in which a
        direction without positive curvature keeps at least a quarter of its precision. Positive definite for every H.
        """
        straight = (1 - rate) * self.matrix + rate * hessian
        margin = straight - (1 - rate) / 2 * self.matrix
        positive = jnp.isfinite(jnp.linalg.cholesky(margin)).all()
        return DensePrecision(jax.lax.cond(positive, lambda: straight, lambda: _reflected(self.matrix, hessian, rate)))

    def solve(self, vector: Array) -> Array:
        return cho_solve((jnp.linalg.cholesky(self.matrix), True), vector)

    def scale(self, block: Block) -> Array:
        """σ = diag(S_bb)^(−1/2) for a mean-field block; the lower C with C Cᵀ = (S_bb)⁻¹ for a dense one."""
        if block.structure != "dense":
            return jnp.reshape(jnp.diagonal(self.matrix)[block.start : block.stop] ** -0.5, block.shape)
        size = block.shape[-1]
        rows = [
            _inverse_cholesky(self.matrix[start : start + size, start : start + size])
            for start in range(block.start, block.stop, size)
        ]
        return jnp.stack(rows).reshape(*block.shape, size)

    def complete(self, hessian: Array, weight: Array) -> Array:
        # A coordinate outside the batch keeps its row and column; a global one has weight 1, so the pair of a local
        # and a global coordinate is seen as often as the local one alone.
        pair = jnp.maximum(weight[:, None], weight[None, :])
        covered = (weight[:, None] > 0) & (weight[None, :] > 0)
        return jnp.where(covered, hessian / jnp.where(covered, pair, 1), self.matrix)


def _reflected(matrix: Array, hessian: Array, rate: Array) -> Array:
    factor = jnp.linalg.cholesky(matrix)
    half = solve_triangular(factor, hessian, lower=True)
    whitened = solve_triangular(factor, half.T, lower=True)
    eigenvalues, vectors = jnp.linalg.eigh((whitened + whitened.T) / 2)
    blended = (1 - rate) + rate * jnp.abs(eigenvalues)
    rounding = len(matrix) * jnp.finfo(matrix.dtype).eps * jnp.abs(eigenvalues).max()
    blended = jnp.where(eigenvalues > rounding, blended, jnp.maximum(blended, 0.25))
    root = factor @ (vectors * jnp.sqrt(blended))
    return root @ root.T


def _inverse_cholesky(matrix: Array) -> Array:
    """Lower C with C Cᵀ = S⁻¹, from S = U Uᵀ with U upper: C = U⁻ᵀ. S is never inverted."""
    upper = jnp.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]
    return solve_triangular(upper.T, jnp.eye(matrix.shape[-1], dtype=matrix.dtype), lower=True)
