"""The diagonal of E_q[H] from Hessian-vector products: diag H ≈ u ⊙ (H u) with u Rademacher.

Unbiased, and exact for a diagonal Hessian, since u ⊙ u = 1: the noise comes from the off-diagonal entries alone.
Costs about three gradients a draw whatever D is; the automatic choice where a dense Hessian is too large.

Source: Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007 for the diagonal.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import Array

from ._estimate import Draws, Estimate, Objective, average_over_pairs, value_and_gradients

__all__ = ["hutchinson"]


def hutchinson(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    others: Any,
    draws: Draws,
    *,
    forward: bool = False,
) -> Estimate:
    """E_q[g] and an estimate of diag E_q[∇²ℓ] at the given draws, one probe u a draw."""
    evaluate = value_and_gradients(objective, (0, 2), forward)

    def at_draw(draw: Draws):
        def gradient(loc):
            (loss, extras), (g, g_others) = evaluate(loc, scales, others, draw)
            return g, (loss, g, g_others, extras)

        _, product, rest = jax.jvp(gradient, (loc,), (draw.probes,), has_aux=True)
        return draw.probes * product, *rest

    diagonals, losses, gradients, g_others, extras = jax.vmap(at_draw)(draws)
    return average_over_pairs(losses, gradients, diagonals, g_others, extras, cost=3)
