"""The diagonal of E_q[H] from Hessian-vector products: diag H ≈ Σ_p u_p ⊙ (H σ u_p) / σ, u_p Rademacher in a part p.

The parts are the sites of the guide, of which the smallest share one. Unbiased; as u ⊙ u = 1, the noise comes from the
off-diagonal entries between coordinates of one part alone, and where σ are the scales of q, H_aa = σ_a⁻² has that of
H_ab σ_a σ_b, whatever the units; without them narrow coordinates would drown wide ones. Exact where those entries are
zero, however the parts are coupled: the rows of a plate are independent given the other sites, and a single probe for
all would see their coupling to these as noise. Costs two gradients a part and one, a draw, whatever D is; the automatic
choice where a dense Hessian is too large.

Source: Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007 for the diagonal and for probes that leave coordinates out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..families import Block
from ._estimate import Draws, Estimate, Objective, average_over_pairs, value_and_gradients
from ._second import NO_DERIVATIVE, by_differences, by_forward_mode, standard_deviations, where_known

__all__ = ["hutchinson", "parted", "product"]

MAX_PARTS = 4


def hutchinson(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    forward: bool = False,
) -> Estimate:
    """E_q[g] and an estimate of diag E_q[∇²ℓ] at the given draws, of which each has its probes."""
    probes = draws.probes
    assert probes is not None  # the rule makes them for a diagonal precision
    evaluate = value_and_gradients(objective, (0, 2), forward)

    unit = standard_deviations(blocks, scales, jnp.ones_like(loc))

    def by_derivatives(draw: Draws, probes: Array) -> tuple[Any, ...]:
        def gradient(loc):
            (loss, extras), (g, g_others) = evaluate(loc, scales, others, draw)
            return g, (loss, g, g_others, extras)

        rows, rest = by_forward_mode(gradient, loc, unit * probes)
        return diagonal_of(probes, rows), *rest

    def in_differences(draw: Draws, probes: Array) -> Array:
        rows = by_differences(lambda loc: evaluate(loc, scales, others, draw)[1][0], loc, unit * probes)
        return diagonal_of(probes, rows)

    def diagonal_of(probes: Array, rows: Array) -> Array:
        return (probes * rows).sum(0) / unit

    cost: Any = 1 + 2 * probes.shape[1]
    try:
        diagonals, losses, gradients, g_others, extras = jax.vmap(by_derivatives)(draws, probes)
        diagonals, missing = where_known(diagonals, gradients, lambda: jax.vmap(in_differences)(draws, probes))
        cost += jnp.where(missing, cost - 1, 0)
    except NO_DERIVATIVE:
        evaluate_at = jax.vmap(lambda draw: evaluate(loc, scales, others, draw))
        (losses, extras), (gradients, g_others) = evaluate_at(draws)
        diagonals = jax.vmap(in_differences)(draws, probes)
    return average_over_pairs(losses, gradients, diagonals, g_others, extras, cost)


def product(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    others: Any,
    draws: Draws,
    *,
    forward: bool = False,
) -> Callable[[Array], Array] | None:
    """v -> E_q[H] v at the given draws, two gradients a draw.

    None where the model has no second derivative.
    """
    evaluate = value_and_gradients(objective, (0,), forward)

    def gradient(loc: Array) -> Array:
        return jax.vmap(lambda draw: evaluate(loc, scales, others, draw)[1][0])(draws).mean(0)

    try:
        return jax.linearize(gradient, loc)[1]
    except NO_DERIVATIVE:
        return None


def parted(signs: Array, blocks: tuple[Block, ...]) -> Array:
    """The probes [S, P, D] with `signs` [S, D] in a part for each block; beyond four, the small ones share one."""
    parts = np.zeros((min(len(blocks), MAX_PARTS), signs.shape[-1]))
    for number, block in enumerate(sorted(blocks, key=lambda block: block.size, reverse=True)):
        parts[min(number, MAX_PARTS - 1), block.start : block.stop] = 1
    return signs[:, None] * parts.astype(signs.dtype)
