"""Price's theorem at second order: E_q[H] is the average of Hessians, E_q[g] of gradients, over antithetic pairs.

On a quadratic ℓ every Hessian is the same and a pair's gradient noise cancels, so one pair is exact. Costs D + 1
gradients a draw, D of them vectorised; the automatic choice up to a few hundred coordinates.

Source: Khan & Rue 2023, equations 9 and 10; Opper & Archambeau 2009.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from ._estimate import Draws, Estimate, Extras, Objective, average_over_pairs, value_and_gradients

__all__ = ["hessian", "hessians_at"]


def hessian(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    others: Any,
    draws: Draws,
    *,
    forward: bool = False,
) -> Estimate:
    """E_q[g] and E_q[∇²ℓ] at the given draws."""
    hessians, losses, gradients, g_others, extras = hessians_at(objective, loc, scales, others, draws, forward=forward)
    return average_over_pairs(losses, gradients, hessians, g_others, extras, cost=len(loc) + 1)


def hessians_at(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    others: Any,
    draws: Draws,
    *,
    forward: bool = False,
) -> tuple[Array, Array, Array, Any, Extras]:
    """(∇²ℓ [S, D, D], losses [S], ∇ℓ [S, D], gradients of `others`, extras), one for each draw."""
    evaluate = value_and_gradients(objective, (0, 2), forward)

    def at_draw(draw: Draws):
        def gradient(loc):
            (loss, extras), (g, g_others) = evaluate(loc, scales, others, draw)
            return g, (loss, g, g_others, extras)

        matrix, rest = jax.jacfwd(gradient, has_aux=True)(loc)
        return (matrix + matrix.T) / 2, *rest

    return jax.vmap(at_draw)(draws)
