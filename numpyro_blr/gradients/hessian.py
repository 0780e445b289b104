"""Price's theorem at second order: E_q[H] is the average of Hessians, E_q[g] of gradients, over antithetic pairs.

On a quadratic ℓ every Hessian is the same and a pair's gradient noise cancels, so one pair is exact. Costs D + 1
gradients a draw, D of them vectorised, or 2 D + 1 where the model has one derivative only (`_second.py`), and 2 D more
where the second is not finite; the automatic choice up to a few hundred coordinates.

Source: Khan & Rue 2023, equations 9 and 10; Opper & Archambeau 2009.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..families import Block
from ._estimate import Draws, Estimate, Extras, Objective, Split, average_over_pairs, value_and_gradients
from ._second import NO_DERIVATIVE, by_differences, by_forward_mode, standard_deviations, where_known

__all__ = ["hessian", "hessians_at"]


def hessian(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    split: Split | None = None,
    forward: bool = False,
) -> Estimate:
    """E_q[g] and E_q[∇²ℓ] at the given draws."""
    evaluate = value_and_gradients(objective, (0, 2), forward)

    def in_differences() -> Array:
        columns = standard_deviations(blocks, scales, jnp.eye(len(loc), dtype=loc.dtype))  # Cᵀ

        def at_draw(draw: Draws) -> Array:
            return by_differences(lambda loc: evaluate(loc, scales, others, draw)[1][0], loc, columns)

        return jnp.linalg.solve(columns, jax.vmap(at_draw)(draws))  # of Cᵀ H

    cost: Any = 2 * len(loc) + 1
    try:
        found = hessians_at(objective, loc, scales, others, draws, blocks, split=split, forward=forward)
        matrices, losses, gradients, g_others, extras = found
        matrices, missing = where_known(matrices, gradients, in_differences)
        cost = jnp.where(missing, 3, 1) * len(loc) + 1
    except NO_DERIVATIVE:
        evaluate_at = jax.vmap(lambda draw: evaluate(loc, scales, others, draw))
        matrices, ((losses, extras), (gradients, g_others)) = in_differences(), evaluate_at(draws)
    hessians = (matrices + jnp.swapaxes(matrices, 1, 2)) / 2
    return average_over_pairs(losses, gradients, hessians, g_others, extras, cost)


def hessians_at(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    split: Split | None = None,
    forward: bool = False,
) -> tuple[Array, Array, Array, Any, Extras]:
    """(∇²ℓ [S, D, D], losses [S], ∇ℓ [S, D], gradients of `others`, extras), one for each draw.

    Raises:
        TypeError, NotImplementedError: where there is no second derivative (`NO_DERIVATIVE`).
    """
    evaluate = value_and_gradients(objective, (0, 2), forward)
    identity = jnp.eye(len(loc), dtype=loc.dtype)

    def columns_of(numbers: np.ndarray) -> tuple[Any, ...]:
        def at_draw(draw: Draws):
            def gradient(loc):
                (loss, extras), (g, g_others) = evaluate(loc, scales, others, draw)
                return g, (loss, g, g_others, extras)

            columns, rest = by_forward_mode(gradient, loc, identity[numbers])
            return columns, *rest

        return jax.vmap(at_draw)(draws)

    if split is None:
        return columns_of(np.arange(len(loc)))
    wide, narrow = split.wide, split.narrow(len(loc))
    columns, *rest = columns_of(narrow)
    evaluate_held = value_and_gradients(split.held, (0,), forward)

    def held_at(draw: Draws) -> Array:
        def gradient(loc):
            _, (g,) = evaluate_held(loc, scales, others, draw)
            return g[wide], None

        return by_forward_mode(gradient, loc, identity[wide])[0]

    matrices = jnp.zeros((len(columns), *identity.shape), loc.dtype)
    matrices = matrices.at[:, wide[:, None], wide].set(jax.vmap(held_at)(draws))
    return matrices.at[:, narrow].set(columns).at[:, :, narrow].set(jnp.swapaxes(columns, 1, 2)), *rest
