"""The diagonal of E_q[H] from Hessian-vector products: diag H ≈ u ⊙ (H u) with u Rademacher.

Unbiased, and exact for a diagonal Hessian, since u ⊙ u = 1: the noise comes from the off-diagonal entries alone.
Costs about three gradients a draw whatever D is; the automatic choice where a dense Hessian is too large.

Source: Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007 for the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._estimate import Draws, Estimate, Objective, at_every_draw, average_over_pairs, value_and_gradient

__all__ = ["hutchinson"]


def hutchinson(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
) -> Estimate:
    """E_q[g] and an estimate of diag E_q[∇²ℓ] at the given draws, one probe u a draw."""
    probes = draws.probes
    assert probes is not None  # the rule makes them for a diagonal precision

    def at_draw(draw: Draws):
        loss, extras, gradient, location = value_and_gradient(objective, loc, scales, others, draw)
        product = torch.zeros_like(loc)
        if gradient.requires_grad:  # not where ℓ is linear
            (product,) = torch.autograd.grad(gradient, location, draw.probes, materialize_grads=True)
        return loss, gradient.detach(), product, extras

    (losses, gradients, products), extras = at_every_draw(objective, _product, at_draw, loc, scales, draws, probes)
    return average_over_pairs(losses, gradients, probes * products, extras, cost=3)


def _product(loss: Callable[..., Tensor], forward: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(L, g, H u) of one draw."""

    def at_draw(loc: Tensor, scales: tuple[Tensor | None, ...], probe: Tensor):
        def derivatives(loc: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.grad_and_value(loss)(loc, scales)

        found: Any
        if forward:
            found = torch.func.jvp(derivatives, (loc,), (probe,))
            (gradient, value), (product, _) = found
        else:
            found = torch.func.vjp(derivatives, loc)
            (gradient, value), pull_back = found
            (product,) = pull_back((probe, torch.zeros_like(value)))
        return value, gradient, product

    return at_draw
