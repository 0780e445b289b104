"""The diagonal of E_q[H] from Hessian-vector products: diag H ≈ Σ_p u_p ⊙ (H u_p), u_p Rademacher in a part p.

The parts are the sites of the guide, of which the smallest share one. Unbiased; as u ⊙ u = 1, the noise comes from the
off-diagonal entries between coordinates of one part alone. Exact where those are zero, however the parts are coupled:
the rows of a plate are independent given the other sites, and a single probe for all would see their coupling to these
as noise. Costs two gradients a part and one, a draw, whatever D is; the automatic choice where a dense Hessian is too
large.

Source: Hutchinson 1990; Bekas, Kokiopoulou & Saad 2007 for the diagonal and for probes that leave coordinates out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import Block
from ._estimate import Draws, Estimate, Objective, at_every_draw, average_over_pairs, each_draw, value_and_gradient
from ._second import by_differences, gradient_of, standard_deviations, unknown

__all__ = ["hutchinson", "parted"]

MAX_PARTS = 4


def hutchinson(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    differences: bool = False,
) -> Estimate:
    """E_q[g] and an estimate of diag E_q[∇²ℓ] at the given draws, of which each has its probes."""
    probes = draws.probes
    assert probes is not None  # the rule makes them for a diagonal precision

    def in_differences(draw: Draws) -> Tensor:
        assert draw.probes is not None
        unit = standard_deviations(blocks, scales, torch.ones_like(loc))
        return by_differences(gradient_of(objective, scales, others, draw), loc, unit * draw.probes) / unit

    def at_draw(draw: Draws):
        assert draw.probes is not None
        loss, extras, gradient, location = value_and_gradient(objective, loc, scales, others, draw)
        products = torch.zeros_like(draw.probes)
        if differences:
            products = in_differences(draw)
        elif gradient.requires_grad:  # not where ℓ is linear
            for product, probe in zip(products, draw.probes, strict=True):
                product += torch.autograd.grad(gradient, location, probe, retain_graph=True, materialize_grads=True)[0]
        return loss, gradient.detach(), products, extras

    (losses, gradients, products), extras = at_every_draw(objective, _products, at_draw, loc, scales, draws, probes)
    cost = 1 + 2 * probes.shape[1]
    if unknown(products, gradients):
        products, cost = torch.stack([in_differences(draw) for draw in each_draw(draws)]), 2 * cost - 1
    return average_over_pairs(losses, gradients, (probes * products).sum(1), extras, cost)


def parted(signs: Tensor, blocks: tuple[Block, ...]) -> Tensor:
    """The probes [S, P, D] with `signs` [S, D] in a part for each block; beyond four, the small ones share one."""
    parts = signs.new_zeros((min(len(blocks), MAX_PARTS), signs.shape[-1]))
    for number, block in enumerate(sorted(blocks, key=lambda block: block.size, reverse=True)):
        parts[min(number, MAX_PARTS - 1), block.start : block.stop] = 1
    return signs[:, None] * parts


def _products(loss: Callable[..., Tensor], forward: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(L, g, H u of every probe) of one draw."""

    def at_draw(loc: Tensor, scales: tuple[Tensor | None, ...], probes: Tensor):
        def derivatives(loc: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.grad_and_value(loss)(loc, scales)

        found: Any
        if forward:
            shared: Any = (None, 0)  # the derivatives themselves are the same for every probe
            push = torch.func.vmap(lambda probe: torch.func.jvp(derivatives, (loc,), (probe,)), out_dims=shared)
            found = push(probes)
            (gradient, value), (products, _) = found
        else:
            found = torch.func.vjp(derivatives, loc)
            (gradient, value), pull_back = found
            (products,) = torch.func.vmap(lambda probe: pull_back((probe, torch.zeros_like(value))))(probes)
        return value, gradient, products

    return at_draw
