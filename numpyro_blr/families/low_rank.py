"""The Gaussian of low rank, N(m, Σ) with Σ = diag(a²) + F Fᵀ, F of shape [D, r].

It is no exponential family: its precision is bound to a curved surface. So S stays the dense matrix of the rule, which
moves the mean, and the guide has the Σ that is closest to it:

    (a, F) = argmin KL(N(m, Σ) ‖ N(m, S⁻¹)) = argmin tr(S Σ) − log |Σ|.

The gradient in Σ is S − Σ⁻¹, that of the negative ELBO is (E_q[∇²ℓ] − Σ⁻¹)/2: where S has come to rest at E_q[∇²ℓ],
the one is stationary on the surface where the other is, and the rule ends at an optimum of the guide's family. For
r = 0 it is the mean-field guide's diag(S)⁻¹, for r ≥ D the full-rank guide's S⁻¹.

It is found by turns. With A = diag(a) S diag(a) = U diag(θ) Uᵀ, θ ascending:

1. F given a, exactly: F = diag(a) U_r diag((1/θ − 1)₊)^½, the r directions that are widest by S.
2. a given F, one Newton step in log a². With P = diag(a) Σ⁻¹ diag(a) = I − U_r diag((1 − θ)₊) U_rᵀ the gradient of
   tr(S Σ) − log |Σ| is g = diag(A − P), and P∘P + diag(g) its second derivative, of which P∘P + diag(g₊) is taken:
   that is positive, and the other need not be, since KL is convex in a² and not in its logarithm.

The next S begins with the shares a² diag(S) of the last, which have no units. A share is at least 10⁻⁶, since F alone
may be all of a coordinate's Σ, and the host divides by a.

Source: Jöreskog 1967 for the profile over F of the mirror image, log |Σ| + tr(Σ⁻¹ S), which is factor analysis.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from ._family import Block
from .multivariate_normal import DensePrecision

__all__ = ["LowRankPrecision", "factored"]

LEAST_SHARE, MAX_TURNS, MAX_CHANGE = 1e-6, 10, 3.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankPrecision(DensePrecision):
    """S, and the Σ of low rank that is closest to it.

    Attributes:
        own: (a | F) of every low-rank block, [*batch, D, 1 + r]; None of the others.
        blocks: all of them.
    """

    own: tuple[Array | None, ...]
    blocks: tuple[Block, ...] = field(metadata={"static": True})

    @classmethod
    def from_scales(
        cls, blocks: tuple[Block, ...], scales: tuple[Array | None, ...], unlearned: float, like: Array
    ) -> Self:
        precision = DensePrecision.from_scales(*factored(blocks, scales), unlearned, like)
        own = (scale if block.structure == "low rank" else None for block, scale in zip(blocks, scales, strict=True))
        return cls(precision.matrix, tuple(own), blocks)

    def at(self, matrix: Array) -> Self:
        own = tuple(
            None if scale is None else _closest(_parts(matrix, block), _parts(self.matrix, block), scale)
            for block, scale in zip(self.blocks, self.own, strict=True)
        )
        return replace(self, matrix=matrix, own=own)

    def scale(self, block: Block) -> Array:
        """(a | F) of a low-rank block; of the others what a dense S has for them."""
        scale = self.own[self.blocks.index(block)]
        return super().scale(block) if scale is None else scale


def factored(blocks: tuple[Block, ...], scales: tuple[Any, ...]) -> tuple[tuple[Block, ...], tuple[Any, ...]]:
    """Dense blocks for the low-rank ones, with the lower C of C Cᵀ = diag(a²) + F Fᵀ for (a | F)."""
    dense = tuple(replace(block, structure="dense") if block.structure == "low rank" else block for block in blocks)
    factors = (
        _scale_tril(scale) if block.structure == "low rank" else scale
        for block, scale in zip(blocks, scales, strict=True)
    )
    return dense, tuple(factors)


def _scale_tril(scale: Array) -> Array:
    """C = diag(a) chol(I + W Wᵀ) with F = diag(a) W, which has no units either."""
    root, factor = scale[..., :1], scale[..., 1:] / scale[..., :1]
    identity = jnp.eye(scale.shape[-2], dtype=scale.dtype)
    return root * jnp.linalg.cholesky(identity + factor @ jnp.swapaxes(factor, -1, -2))


def _parts(matrix: Array, block: Block) -> Array:
    """S of every vector of the block, [*batch, D, D]."""
    size = block.shape[-1]
    parts = [matrix[start : start + size, start : start + size] for start in range(block.start, block.stop, size)]
    return jnp.stack(parts).reshape(*block.shape, size)


@partial(jnp.vectorize, signature="(d,d),(d,d),(d,k)->(d,k)")
def _closest(matrix: Array, last_matrix: Array, scale: Array) -> Array:
    """(a | F) closest to S, from what was closest to the last S; for each vector of a batch."""
    diagonal, rank = jnp.diagonal(matrix), scale.shape[1] - 1
    unit = matrix / jnp.sqrt(jnp.outer(diagonal, diagonal))

    def turn(carry: tuple[Array, Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array, Array]:
        shares, _, _, _, number = carry
        return *_turn(unit, shares, rank), shares, number + 1

    def going(carry: tuple[Array, Array, Array, Array, Array]) -> Array:
        _, _, off, _, number = carry
        return (number < MAX_TURNS) & ~(off < jnp.finfo(scale.dtype).eps ** 0.5)

    shares = jnp.clip(scale[:, 0] ** 2 * jnp.diagonal(last_matrix), LEAST_SHARE, 1)
    start = shares, scale[:, 1:], jnp.full((), jnp.inf, scale.dtype), shares, jnp.zeros((), jnp.int32)
    _, factor, _, shares, _ = lax.while_loop(going, turn, start)
    return jnp.sqrt(shares / diagonal)[:, None] * jnp.concatenate([jnp.ones_like(shares)[:, None], factor], 1)


def _turn(unit: Array, shares: Array, rank: int) -> tuple[Array, Array, Array]:
    """The next shares, F/a at the present ones, and by how much these are off, in units in which diag(S) = 1."""
    root, eps = jnp.sqrt(shares), jnp.finfo(shares.dtype).eps
    theta, vectors = jnp.linalg.eigh(root[:, None] * unit * root)
    wide, vectors = jnp.maximum(theta[:rank], len(theta) * eps), vectors[:, :rank]
    narrowed = jnp.maximum(1 - wide, 0)
    factor = vectors * jnp.sqrt(narrowed / wide)
    inverse = jnp.eye(len(theta), dtype=shares.dtype) - (vectors * narrowed) @ vectors.T  # P
    slope = shares - jnp.diagonal(inverse)
    change = jnp.linalg.solve(inverse**2 + jnp.diag(jnp.maximum(slope, 0)), slope)
    following = jnp.maximum(shares * jnp.exp(-jnp.clip(change, -MAX_CHANGE, MAX_CHANGE)), LEAST_SHARE)
    off = jnp.where((following <= LEAST_SHARE) & (slope > 0), 0, jnp.abs(slope)).max()
    return following, jnp.pad(factor, ((0, 0), (0, rank - factor.shape[1]))), off  # the rank may be above D
