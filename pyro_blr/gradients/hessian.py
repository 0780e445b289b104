"""Price's theorem at second order: E_q[H] is the average of Hessians, E_q[g] of gradients, over antithetic pairs.

On a quadratic ℓ every Hessian is the same and a pair's gradient noise cancels, so one pair is exact. Costs one run
of the model and D + 1 gradients a draw, D of them vectorised; the automatic choice up to a few hundred coordinates.

Source: Khan & Rue 2023, equations 9 and 10; Opper & Archambeau 2009.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._estimate import Draws, Estimate, Objective, average_over_pairs, each_draw, value_and_gradient

__all__ = ["hessian"]


def hessian(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
    *,
    dense: bool = True,
) -> Estimate:
    """E_q[g] and E_q[∇²ℓ] at the given draws; with `dense=False` only the diagonal of the latter is kept."""
    identity = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)

    def at_draw(draw: Draws):
        loss, extras, gradient, location = value_and_gradient(objective, loc, scales, others, draw)
        matrix = torch.zeros_like(identity)
        if gradient.requires_grad:  # not where ℓ is linear
            (matrix,) = torch.autograd.grad(gradient, location, identity, is_grads_batched=True, materialize_grads=True)
        return loss, gradient.detach(), ((matrix + matrix.mT) / 2 if dense else matrix.diagonal()), extras

    return average_over_pairs(*map(list, zip(*map(at_draw, each_draw(draws)), strict=True)))
