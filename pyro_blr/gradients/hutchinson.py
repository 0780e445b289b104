"""The diagonal of E_q[H] from Hessian-vector products: diag H ≈ u ⊙ (H u) with u Rademacher.

Unbiased, and exact for a diagonal Hessian, since u ⊙ u = 1: the noise comes from the off-diagonal entries alone.
Costs about three gradients a draw whatever D is; the automatic choice where a dense Hessian is too large.

Source: Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007 for the diagonal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._estimate import Draws, Estimate, Objective, average_over_pairs, each_draw, value_and_gradient

__all__ = ["hutchinson"]


def hutchinson(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
) -> Estimate:
    """E_q[g] and an estimate of diag E_q[∇²ℓ] at the given draws, one probe u a draw."""

    def at_draw(draw: Draws):
        loss, extras, gradient, location = value_and_gradient(objective, loc, scales, others, draw)
        probe, product = draw.probes, torch.zeros_like(loc)
        assert probe is not None  # the rule makes them for a diagonal precision
        if gradient.requires_grad:  # not where ℓ is linear
            (product,) = torch.autograd.grad(gradient, location, probe, materialize_grads=True)
        return loss, gradient.detach(), probe * product, extras

    return average_over_pairs(*map(list, zip(*map(at_draw, each_draw(draws)), strict=True)))
