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
from jax import Array

from ..families import Block
from ._estimate import Draws, Estimate, Extras, Objective, Split, average_over_pairs, value_and_gradients
from ._second import NO_DERIVATIVE, Products, by_differences, by_forward_mode, standard_deviations, where_known

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
    hessians, losses, gradients, g_others, extras, cost = hessians_at(
        objective, loc, scales, others, draws, blocks, split=split, forward=forward
    )
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
) -> tuple[Array, Array, Array, Any, Extras, Any]:
    """(∇²ℓ [S, D, D], losses [S], ∇ℓ [S, D], gradients of `others`, extras), one for each draw, and the cost of one."""
    evaluate = value_and_gradients(objective, (0, 2), forward)
    identity = jnp.eye(len(loc), dtype=loc.dtype)

    def at_every_draw(products: Products, directions: Array) -> tuple[Any, ...]:
        def at_draw(draw: Draws):
            def gradient(loc):
                (loss, extras), (g, g_others) = evaluate(loc, scales, others, draw)
                return g, (loss, g, g_others, extras)

            matrix, rest = products(gradient, loc, directions)
            return matrix, *rest

        return jax.vmap(at_draw)(draws)

    def in_parts(split: Split) -> tuple[Any, ...]:
        wide, narrow = split.wide, split.narrow(len(loc))
        columns, *rest = at_every_draw(by_forward_mode, identity[narrow])

        evaluate_held = value_and_gradients(split.held, (0,), forward)

        def at_draw(draw: Draws) -> Array:
            def gradient(loc):
                _, (g,) = evaluate_held(loc, scales, others, draw)
                return g[wide], None

            products, _ = by_forward_mode(gradient, loc, identity[wide])
            return products

        matrices = jnp.zeros((len(columns), *identity.shape), loc.dtype)
        matrices = matrices.at[:, wide[:, None], wide].set(jax.vmap(at_draw)(draws))
        return matrices.at[:, narrow].set(columns).at[:, :, narrow].set(jnp.swapaxes(columns, 1, 2)), *rest

    def in_differences() -> tuple[Any, ...]:
        columns = standard_deviations(blocks, scales, identity)  # Cᵀ, so that the products are Cᵀ H
        products, *rest = at_every_draw(by_differences, columns)
        return jnp.linalg.solve(columns, products), *rest

    try:
        found = at_every_draw(by_forward_mode, identity) if split is None else in_parts(split)
        matrices, losses, gradients, g_others, extras = found
        matrices, missing = where_known(matrices, gradients, lambda: in_differences()[0])
        cost: Any = jnp.where(missing, 3, 1) * len(loc) + 1
    except NO_DERIVATIVE:
        matrices, losses, gradients, g_others, extras = in_differences()
        cost = 2 * len(loc) + 1
    return (matrices + jnp.swapaxes(matrices, 1, 2)) / 2, losses, gradients, g_others, extras, cost
