"""Price's theorem at second order: E_q[H] is the average of Hessians, E_q[g] of gradients, over antithetic pairs.

On a quadratic ℓ every Hessian is the same and a pair's gradient noise cancels, so one pair is exact. Costs one run
of the model and D + 1 gradients a draw, D of them vectorised, or 2 D + 1 runs where the model has one derivative only
(`_second.py`), and 2 D more where the second is not finite; the automatic choice up to a few hundred coordinates.

Source: Khan & Rue 2023, equations 9 and 10; Opper & Archambeau 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..families import Block
from ._estimate import (
    Draws,
    Estimate,
    Extras,
    Objective,
    Split,
    Transformation,
    at_every_draw,
    average_over_pairs,
    each_draw,
    value_and_gradient,
)
from ._second import by_differences, gradient_of, standard_deviations, unknown

__all__ = ["hessian", "hessians_at"]


def hessian(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    split: Split | None = None,
    differences: bool = False,
) -> Estimate:
    """E_q[g] and E_q[∇²ℓ] at the given draws."""
    hessians, losses, gradients, extras, cost = hessians_at(
        objective, loc, scales, others, draws, blocks, split=split, differences=differences
    )
    return average_over_pairs(losses, gradients, hessians, extras, cost)


def hessians_at(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    split: Split | None = None,
    differences: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Extras, int]:
    """(∇²ℓ [S, D, D], losses [S], ∇ℓ [S, D]), one for each draw, the extras of the first, and the cost of one.

    Args:
        differences: of gradients, where the model has no second derivative.
    """
    size = len(loc)
    identity = torch.eye(size, dtype=loc.dtype, device=loc.device)

    def in_differences(draw: Draws) -> Tensor:
        columns = standard_deviations(blocks, scales, identity)  # Cᵀ, so that the products are Cᵀ H
        return torch.linalg.solve(columns, by_differences(gradient_of(objective, scales, others, draw), loc, columns))

    def columns_of(objective: Objective, numbers: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Extras]:
        """((losses, gradients, columns of Hessians [S, C, D] of the given numbers), extras)."""

        def at_draw(draw: Draws):
            loss, extras, gradient, m = value_and_gradient(objective, loc, scales, others, draw)
            rows = identity[list(numbers)]
            columns = torch.zeros_like(rows)
            if differences:
                columns = in_differences(draw)
            elif gradient.requires_grad:  # not where ℓ is linear
                (columns,) = torch.autograd.grad(gradient, m, rows, is_grads_batched=True, materialize_grads=True)
            return loss, gradient.detach(), columns, extras

        return at_every_draw(objective, _second_order(numbers), at_draw, loc, scales, draws)

    if split is None or differences:
        (losses, gradients, matrices), extras = columns_of(objective, tuple(range(size)))
    else:
        wide, narrow = list(split.wide), list(split.narrow(size))
        (losses, gradients, columns), extras = columns_of(objective, split.narrow(size))
        (_, _, held), _ = columns_of(split.held, split.wide)
        matrices = loc.new_zeros(len(losses), size, size)
        matrices[:, wide] = held
        matrices[:, narrow], matrices[:, :, narrow] = columns, columns.mT
    cost = (2 if differences else 1) * size + 1
    if unknown(matrices, gradients):
        matrices, cost = torch.stack([in_differences(draw) for draw in each_draw(draws)]), cost + 2 * size
    return (matrices + matrices.mT) / 2, losses, gradients, extras, cost


@cache
def _second_order(numbers: tuple[int, ...]) -> Transformation:
    """(L, g, H's columns of the given numbers) of one draw; one object for the same ones, since programs are kept."""

    def second_order(loss: Callable[..., Tensor], forward: bool) -> Callable[..., tuple[Tensor, ...]]:
        def at_draw(loc: Tensor, scales: tuple[Tensor | None, ...]):
            def gradient_and_aux(loc: Tensor):
                gradient, value = torch.func.grad_and_value(loss)(loc, scales)
                return gradient, (value, gradient)

            if len(numbers) == len(loc):
                jacobian = torch.func.jacfwd if forward else torch.func.jacrev
                matrix, (value, gradient) = jacobian(gradient_and_aux, has_aux=True)(loc)
                return value, gradient, matrix
            rows = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)[list(numbers)]
            if forward:
                push: Any = lambda row: torch.func.jvp(gradient_and_aux, (loc,), (row,), has_aux=True)  # noqa: E731
                _, columns, (values, gradients) = torch.func.vmap(push)(rows)
                return values[0], gradients[0], columns
            pulled: Any = torch.func.vjp(gradient_and_aux, loc, has_aux=True)
            _, pull, (value, gradient) = pulled
            (columns,) = torch.func.vmap(pull)(rows)
            return value, gradient, columns

        return at_draw

    return second_order
