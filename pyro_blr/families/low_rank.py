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

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ._family import Block
from .multivariate_normal import DensePrecision, _cholesky

__all__ = ["LowRankPrecision", "factored"]

LEAST_SHARE, MAX_TURNS, MAX_CHANGE = 1e-6, 10, 3.0


@dataclass(frozen=True)
class LowRankPrecision(DensePrecision):
    """S, and the Σ of low rank that is closest to it.

    Attributes:
        own: (a | F) of every low-rank block, [*batch, D, 1 + r]; None of the others.
        blocks: all of them.
    """

    own: tuple[Tensor | None, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def from_scales(
        cls, blocks: tuple[Block, ...], scales: tuple[Tensor | None, ...], unlearned: float, like: Tensor
    ) -> Self:
        precision = DensePrecision.from_scales(*factored(blocks, scales), unlearned, like)
        own = (scale if block.structure == "low rank" else None for block, scale in zip(blocks, scales, strict=True))
        return cls(precision.matrix, tuple(own), blocks)

    def at(self, matrix: Tensor) -> Self:
        own = tuple(
            None if scale is None else _closest(_parts(matrix, block), _parts(self.matrix, block), scale)
            for block, scale in zip(self.blocks, self.own, strict=True)
        )
        return replace(self, matrix=matrix, own=own)

    def scale(self, block: Block) -> Tensor:
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


def _scale_tril(scale: Tensor) -> Tensor:
    """C = diag(a) chol(I + W Wᵀ) with F = diag(a) W, which has no units either."""
    root, factor = scale[..., :1], scale[..., 1:] / scale[..., :1]
    return root * _cholesky(torch.eye(scale.shape[-2]).to(scale) + factor @ factor.mT)


def _parts(matrix: Tensor, block: Block) -> Tensor:
    """S of every vector of the block, [*batch, D, D]."""
    size = block.shape[-1]
    parts = [matrix[start : start + size, start : start + size] for start in range(block.start, block.stop, size)]
    return torch.stack(parts).reshape(*block.shape, size)


def _closest(matrix: Tensor, last_matrix: Tensor, scale: Tensor) -> Tensor:
    """(a | F) closest to S, from what was closest to the last S; for each vector of a batch."""
    if scale.ndim > 2:
        return torch.stack([_closest(*each) for each in zip(matrix, last_matrix, scale, strict=True)])
    diagonal, rank = matrix.diagonal(), scale.shape[1] - 1
    unit = matrix / torch.outer(diagonal, diagonal).sqrt()
    if not unit.isfinite().all():
        return torch.full_like(scale, torch.nan)  # torch has no eigenvalues of such a matrix
    following = (scale[:, 0] ** 2 * last_matrix.diagonal()).clamp(LEAST_SHARE, 1)
    exact = torch.finfo(scale.dtype).eps ** 0.5
    for _ in range(MAX_TURNS):
        shares = following
        following, factor, off = _turn(unit, shares, rank)
        if off < exact:
            break
    return (shares / diagonal).sqrt()[:, None] * torch.cat([torch.ones_like(shares)[:, None], factor], 1)


def _turn(unit: Tensor, shares: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The next shares, F/a at the present ones, and by how much these are off, in units in which diag(S) = 1."""
    root, eps = shares.sqrt(), torch.finfo(shares.dtype).eps
    theta, vectors = torch.linalg.eigh(root[:, None] * unit * root)
    wide, vectors = theta[:rank].clamp(min=len(theta) * eps), vectors[:, :rank]
    narrowed = (1 - wide).clamp(min=0)
    factor = vectors * (narrowed / wide).sqrt()
    inverse = torch.eye(len(theta)).to(shares) - (vectors * narrowed) @ vectors.T  # P
    slope = shares - inverse.diagonal()
    change = torch.linalg.solve(inverse**2 + slope.clamp(min=0).diag(), slope)
    following = (shares * (-change.clamp(-MAX_CHANGE, MAX_CHANGE)).exp()).clamp(min=LEAST_SHARE)
    off = torch.where((following <= LEAST_SHARE) & (slope > 0), 0.0, slope.abs()).max()
    return following, torch.nn.functional.pad(factor, (0, rank - factor.shape[1])), off  # the rank may be above D
