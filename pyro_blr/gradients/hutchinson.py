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

import torch
from torch import Tensor

from ..families import Block
from ._estimate import (
    Draws,
    Estimate,
    Objective,
    Vectorised,
    at_every_draw,
    average_over_pairs,
    each_draw,
    value_and_gradient,
)
from ._second import by_differences, gradient_of, standard_deviations, unknown

__all__ = ["Graphs", "hutchinson", "parted", "product"]

MAX_PARTS = 4

Graphs = list[tuple[Tensor, Tensor]]
"""(∇ℓ with its graph, the leaf m that it is differentiable in), of each draw."""


def hutchinson(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    differences: bool = False,
    graphs: Graphs | None = None,
) -> Estimate:
    """E_q[g] and an estimate of diag E_q[∇²ℓ] at the given draws, of which each has its probes.

    The list `graphs` gets that of each draw, for `product`, unless all draws were one program.
    """
    assert draws.probes is not None  # the rule makes them for a diagonal precision
    unit = standard_deviations(blocks, scales, torch.ones_like(loc))
    directions = unit * draws.probes

    def in_differences(draw: Draws) -> Tensor:
        assert draw.probes is not None
        return by_differences(gradient_of(objective, scales, others, draw), loc, unit * draw.probes)

    def at_draw(draw: Draws):
        assert draw.probes is not None
        loss, extras, gradient, location = value_and_gradient(objective, loc, scales, others, draw)
        products = torch.zeros_like(draw.probes)
        if differences:
            products = in_differences(draw)
        elif gradient.requires_grad:  # not where ℓ is linear
            for row, probe in zip(products, unit * draw.probes, strict=True):
                row += torch.autograd.grad(gradient, location, probe, retain_graph=True, materialize_grads=True)[0]
        if graphs is not None:
            graphs.append((gradient, location))
        return loss, gradient.detach(), products, extras

    (losses, gradients, products), extras = at_every_draw(objective, _products, at_draw, loc, scales, draws, directions)
    cost = 1 + 2 * directions.shape[1]
    if unknown(products, gradients):
        products, cost = torch.stack([in_differences(draw) for draw in each_draw(draws)]), 2 * cost - 1
    diagonals = (draws.probes * products).sum(1) / unit
    return average_over_pairs(losses, gradients, diagonals, extras, cost)


def product(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
    *,
    graphs: Graphs | None = None,
) -> Callable[[Tensor], Tensor]:
    """v -> E_q[H] v at the given draws, two gradients a draw.

    By the `graphs` of `hutchinson`, if there are any.
    """
    graphs = [] if graphs is None else graphs

    def expected(vector: Tensor) -> Tensor:
        if isinstance(objective, Vectorised) and not graphs:
            found = objective.at_all(_product, loc, scales, draws, vector.expand(len(draws.number), -1))
            if found is not None:
                return found[0].mean(0)
        if not graphs:
            graphs.extend(value_and_gradient(objective, loc, scales, others, draw)[2:] for draw in each_draw(draws))
        image = torch.zeros_like(vector)
        for gradient, location in graphs:
            if gradient.requires_grad:  # not where ℓ is linear
                image += torch.autograd.grad(gradient, location, vector, retain_graph=True, materialize_grads=True)[0]
        return image / len(graphs)

    return expected


def parted(signs: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """The probes [S, P, D] with `signs` [S, D] in a part for each block; beyond four, the small ones share one."""
    parts = signs.new_zeros((min(len(blocks), MAX_PARTS), signs.shape[-1]))
    for number, block in enumerate(sorted(blocks, key=lambda block: block.size, reverse=True)):
        parts[min(number, MAX_PARTS - 1), block.start : block.stop] = 1
    return signs[:, None] * parts


def _products(loss: Callable[..., Tensor], forward: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(L, g, H u along every direction) of one draw."""

    def at_draw(loc: Tensor, scales: tuple[Tensor | None, ...], directions: Tensor):
        def derivatives(loc: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.grad_and_value(loss)(loc, scales)

        found: Any
        if forward:
            shared: Any = (None, 0)  # the derivatives themselves are the same for every direction
            push = torch.func.vmap(lambda u: torch.func.jvp(derivatives, (loc,), (u,)), out_dims=shared)
            found = push(directions)
            (gradient, value), (products, _) = found
        else:
            found = torch.func.vjp(derivatives, loc)
            (gradient, value), pull_back = found
            (products,) = torch.func.vmap(lambda u: pull_back((u, torch.zeros_like(value))))(directions)
        return value, gradient, products

    return at_draw


def _product(loss: Callable[..., Tensor], forward: bool) -> Callable[..., tuple[Tensor, ...]]:
    """H u of one draw."""

    def at_draw(loc: Tensor, scales: tuple[Tensor | None, ...], direction: Tensor):
        gradient = torch.func.grad(lambda loc: loss(loc, scales))
        if forward:
            return (torch.func.jvp(gradient, (loc,), (direction,))[1],)
        return torch.func.vjp(gradient, loc)[1](direction)

    return at_draw
