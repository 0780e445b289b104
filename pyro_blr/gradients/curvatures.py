"""∇²ℓ at draws whose noise is known, or secants of the gradient that go out from these draws.

With z = m + C ε the draw itself, the ends of the chords of `secant.py` are on lines through z, and say

    Cᵀ H C u ≈ Cᵀ [g(z + (s − o) C u) − g(z − (s + o) C u)] / 2s,        s = √θ x,        o = √θ uᵀη,

the chord turned so that ε = √(1 − θ) e + √θ η.

Source: `secant.py`, `hessian.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from ..families import Block
from ._estimate import Draws, Objective, Split
from ._second import STEP, standard_deviations
from .hessian import hessians_at
from .secant import SHARE, gradients_at

__all__ = ["curvatures_at"]


def curvatures_at(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    secants: bool = False,
    split: Split | None = None,
    differences: bool = False,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(curvatures [S, D, D], losses [S], ∇ℓ [S, D]), one for each draw, and the cost of one.

    Args:
        secants: whether to take those of the draws' chords. Otherwise Hessians, or differences of the gradient where
            they are not finite.
        differences: of gradients, where the model has no second derivative.
    """
    if not secants:
        matrices, losses, gradients, _, cost = hessians_at(
            objective, loc, scales, None, draws, blocks, split=split, differences=differences
        )
        return matrices, losses, gradients, cost
    size = len(loc)
    columns = standard_deviations(blocks, scales, torch.eye(size, dtype=loc.dtype, device=loc.device))  # Cᵀ
    assert draws.chords is not None and draws.noise is not None  # the rule makes them where it keeps draws
    beside, along = draws.chords
    eta = math.sqrt(SHARE) * draws.noise + math.sqrt(1 - SHARE) * beside
    parts = [torch.full((block.size,), scale is not None) for block, scale in zip(blocks, scales, strict=True)]
    learned = torch.cat(parts).to(loc.device)
    lengths = torch.where(learned, math.sqrt(SHARE), STEP) * along  # s, [S, D]
    offsets = torch.where(learned, math.sqrt(SHARE) * eta, 0)  # o
    ways = torch.cat([lengths - offsets, -lengths - offsets], 1)
    ends = loc + ways[..., None] * columns.repeat(2, 1)
    points = torch.cat([loc.expand(len(ends), 1, -1), ends], 1)
    (losses, gradients), _ = gradients_at(objective, loc, scales, None, draws._replace(chords=None), points)
    upper, lower = gradients[:, 1:].reshape(-1, 2, size, size).unbind(1)
    rises = (upper - lower) / (2 * lengths[..., None])  # Cᵀ H
    matrices = solve_triangular(columns, rises, upper=True)
    return (matrices + matrices.mT) / 2, losses[:, 0], gradients[:, 0], 2 * size + 1
