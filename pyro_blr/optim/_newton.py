"""Beside a diagonal S: the mean by all of E_q[H], which is asked for its products alone, and S at a rate of its own.

    ((1 − κ) E_q[∇²ℓ] + κ S) d = E_q[∇ℓ],        m ← m − ρ d,        κ = 1/10,

by conjugate gradients from 0, preconditioned by S, until a tenth of the residual is left or for 30 products. A diagonal
turns one step along what many coordinates have in common, as the level of all later years in a random walk, into
hundreds, each as short as the narrowest of them; on a hierarchy, where it does as well, two or three products are all.
E_q[∇ℓ] of a few draws is noise, which H⁻¹ would follow furthest where H is least: κ bounds that to tenfold. Where H is
diagonal, d = S⁻¹ E_q[∇ℓ]; so it is where the quadratic has no minimum, along a direction of negative curvature, and
where a product is not finite. The fixed point, E_q[∇ℓ] = 0, is the same for every direction.

At the rate that such a mean is worth, 1, S would be Ĥ, what the probes of one step make of it, whose noise comes from
just those off-diagonal entries. So S moves at min(ρ, γ), with the gain of a filter for each site, of coordinates a:

    γ = 1 − Σ_a Var[Ĥ_a] / s_a² / Σ_a (Ĥ_a − s_a)² / s_a²,

the part of the change that is no noise (Kalman 1960); where that is less than half, for the n-th time in a row, an
average that forgets, γ = 2 / (n + 2). γ does not multiply ρ, which falls as 2 / (n + 2) for the mean's noise: S would
freeze.

Source: Hestenes & Stiefel 1952; Martens 2010, "Deep learning via Hessian-free optimization", for damping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..families import Block, DiagonalPrecision
from ..gradients import Estimate

__all__ = ["Newton", "direction", "find", "gain", "none"]

DAMPING, RESIDUAL, MAX_PRODUCTS = 0.1, 0.1, 30


class Newton(NamedTuple):
    """What a step takes from here.

    Attributes:
        direction: d, [D].
        found: whether there is one; otherwise d and γ say nothing.
        num_products: v -> E_q[H] v that it took.
        gain: γ of each coordinate, [D].
        num_averaged: n of each coordinate after the step, [D].
    """

    direction: Tensor
    found: bool
    num_products: int
    gain: Tensor
    num_averaged: Tensor | None


def none(num_averaged: Tensor | None, loc: Tensor) -> Newton:
    """Where all moves by S."""
    return Newton(torch.zeros_like(loc), False, 0, torch.ones_like(loc), num_averaged)


def find(
    product: Callable[[Tensor], Tensor],
    estimate: Estimate,
    precision: DiagonalPrecision,
    blocks: tuple[Block, ...],
    num_averaged: Tensor,
) -> Newton:
    """d and γ.

    Args:
        product: v -> E_q[H] v.
        precision: S, before the step.
        num_averaged: n of each coordinate, [D].
    """
    along, found, num_products = direction(product, estimate.gradient, precision.blend(estimate.hessian, 1.0))
    if not found:
        return none(num_averaged, along)._replace(num_products=num_products)
    return Newton(along, found, num_products, *gain(estimate, precision, blocks, num_averaged))


def direction(
    product: Callable[[Tensor], Tensor], gradient: Tensor, precision: DiagonalPrecision
) -> tuple[Tensor, bool, int]:
    """d, whether there is one, and how many products v -> E_q[H] v it took."""
    found, residual = torch.zeros_like(gradient), gradient
    along = preconditioned = precision.solve(gradient)
    length = residual @ preconditioned
    enough, number = RESIDUAL**2 * length, 0
    while length > enough and number < MAX_PRODUCTS:
        image = (1 - DAMPING) * product(along) + DAMPING * precision.diagonal * along
        curvature, number = along @ image, number + 1
        if not (curvature > 0 and bool(image.isfinite().all())):
            return found, False, number
        reach = length / curvature
        found, residual = found + reach * along, residual - reach * image
        preconditioned, last = precision.solve(residual), length
        length = residual @ preconditioned
        along = preconditioned + length / last * along
    return found, True, number


def gain(
    estimate: Estimate, precision: DiagonalPrecision, blocks: tuple[Block, ...], num_averaged: Tensor
) -> tuple[Tensor, Tensor]:
    """γ and n of each coordinate, after the step."""
    sizes = torch.tensor([block.size for block in blocks], device=num_averaged.device)
    site = torch.arange(len(blocks), device=num_averaged.device).repeat_interleave(sizes)

    def over_site(values: Tensor) -> Tensor:
        return values.new_zeros(len(blocks)).index_add(0, site, values / precision.diagonal**2)[site]

    assert estimate.hessian_variance is not None  # of a diagonal
    change, noise = over_site((estimate.hessian - precision.diagonal) ** 2), over_site(estimate.hessian_variance)
    certain = change > 2 * noise
    num_averaged = torch.where(certain, 0, num_averaged + 1)
    return torch.where(certain, 1 - noise / torch.where(certain, change, 1), 2 / (num_averaged + 2)), num_averaged
