"""∇²ℓ at draws whose noise is known, or secants of the gradient that go out from these draws.

With z = m + C ε the draw itself, the ends of the chords of `secant.py` and those of the differences of `_second.py` are
on lines through z, and both say

    Cᵀ H C u ≈ Cᵀ [g(z + (s − o) C u) − g(z − (s + o) C u)] / 2s,

of secants with s = √θ x and o = √θ uᵀη, the chord turned so that ε = √(1 − θ) e + √θ η, and of differences with s = h
and o = 0.

Source: `secant.py`, `_second.py`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import solve_triangular

from ..families import Block
from ._estimate import Draws, Objective, Split, value_and_gradients
from ._second import NO_DERIVATIVE, STEP, standard_deviations
from .hessian import hessians_at
from .secant import SHARE

__all__ = ["curvatures_at"]


def curvatures_at(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    secants: Array | bool = False,
    split: Split | None = None,
    forward: bool = False,
) -> tuple[Array, Array, Array, Any]:
    """(curvatures [S, D, D], losses [S], ∇ℓ [S, D]), one for each draw, and the cost of one.

    The gradient is compiled twice, once to be differentiated and once for whatever lines there may be.

    Args:
        secants: whether to take those of the draws' chords, which the program may know only when it runs. Otherwise
            Hessians, or differences of the gradient where they are not finite.
    """
    evaluate = value_and_gradients(objective, (0,), forward)
    size, identity = len(loc), jnp.eye(len(loc), dtype=loc.dtype)
    columns = standard_deviations(blocks, scales, identity)  # Cᵀ
    noise = draws.noise
    assert noise is not None  # the rule makes it where it keeps draws
    lengths, offsets = jnp.full_like(noise, STEP), jnp.zeros_like(noise)  # s and o, [S, D]
    if draws.chords is not None:
        beside, along = draws.chords
        eta = math.sqrt(SHARE) * noise + math.sqrt(1 - SHARE) * beside
        learned = np.concatenate(
            [np.full(block.size, scale is not None) for block, scale in zip(blocks, scales, strict=True)]
        )
        lengths = jnp.where(secants, jnp.where(learned, math.sqrt(SHARE), STEP) * along, lengths)
        offsets = jnp.where(secants & learned, math.sqrt(SHARE) * eta, offsets)

    def along_lines() -> tuple[Array, Array, Array]:
        def at_draw(draw: Draws, lengths: Array, offsets: Array) -> tuple[Array, Array, Array]:
            ways = jnp.concatenate([lengths - offsets, -lengths - offsets])
            points = jnp.concatenate([loc[None], loc + ways[:, None] * jnp.tile(columns, (2, 1))])
            (losses, _), (gradients,) = jax.vmap(lambda point: evaluate(point, scales, {}, draw))(points)
            upper, lower = gradients[1:].reshape(2, size, size)
            return (upper - lower) / (2 * lengths[:, None]), losses[0], gradients[0]

        rises, losses, gradients = jax.vmap(at_draw)(draws._replace(chords=None), lengths, offsets)  # rises Cᵀ H
        return jax.vmap(lambda rise: solve_triangular(columns, rise, lower=False))(rises), losses, gradients

    def by_derivatives() -> tuple[Array, Array, Array]:
        return hessians_at(objective, loc, scales, {}, draws, blocks, split=split, forward=forward)[:3]

    def wherever_known() -> tuple[tuple[Array, Array, Array], Array]:
        if secants is False:
            found = by_derivatives()
        else:
            shapes = (len(noise), size, size), (len(noise),), noise.shape
            nothing = tuple(jnp.zeros(shape, loc.dtype) for shape in shapes)
            found = lax.cond(secants, lambda: nothing, by_derivatives)
        matrices, _, gradients = found
        missing = ~jnp.isfinite(matrices).all() & jnp.isfinite(gradients).all()
        cost = jnp.where(secants, 2, jnp.where(missing, 3, 1)) * size + 1
        return lax.cond(secants | missing, along_lines, lambda: found), cost

    cost: Any = 2 * size + 1
    try:
        found, cost = (along_lines(), cost) if secants is True else wherever_known()
    except NO_DERIVATIVE:
        found = along_lines()
    matrices, losses, gradients = found
    return (matrices + jnp.swapaxes(matrices, 1, 2)) / 2, losses, gradients, cost
