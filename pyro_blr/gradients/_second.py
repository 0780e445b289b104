"""H u along given directions u by differences of the gradient, where the model gives it no finite derivative.

    H u ≈ [g(z + h u) − g(z − h u)] / 2h,        u in standard deviations of q, h = 0.03.

An operation with a backward pass of its own (`torch.autograd.Function`, the adjoint method of solvers of differential
equations) may have no second one, or leave itself out of it without a word. Others have one that is not finite where
the gradient is: that of log p has p² in it, which underflows. Averaged over q, a difference is the Hessian averaged
over a q that is wider by h²/3 of its variance, 0.03 %; it is exact on a cubic ℓ, to rounding, and costs two gradients
where a derivative costs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..families import Block
from ._estimate import Draws, Objective, value_and_gradient
from .recycled import scaled

__all__ = ["by_differences", "gradient_of", "has_second_derivative", "standard_deviations", "unknown"]

STEP = 0.03
UNKNOWN_SCALE = 0.1  # of a point, and of a site whose covariance is not learned
_NEGLIGIBLE, _AGREEING = 0.01, 0.25  # of a part that is missing, and of differences over two lengths


def gradient_of(
    objective: Objective, scales: tuple[Tensor | None, ...], others: Any, draw: Draws
) -> Callable[[Tensor], Tensor]:
    """m -> ∇ℓ at one draw."""
    return lambda loc: value_and_gradient(objective, loc, scales, others, draw)[2].detach()


def by_differences(gradient: Callable[[Tensor], Tensor], loc: Tensor, directions: Tensor, step: float = STEP) -> Tensor:
    """H u [P, D] for each of `directions` [P, D]."""
    differences = [gradient(loc + step * u) - gradient(loc - step * u) for u in directions]
    return torch.stack(differences) / (2 * step)


def unknown(products: Tensor, gradients: Tensor) -> bool:
    """Whether they are not finite and the gradients are."""
    return not bool(products.isfinite().all()) and bool(gradients.isfinite().all())


def standard_deviations(blocks: tuple[Block, ...], scales: tuple[Tensor | None, ...], noise: Tensor) -> Tensor:
    """C ε [..., D], also over blocks without a scale."""
    known = tuple(
        noise.new_full(block.shape, UNKNOWN_SCALE) if scale is None else scale
        for block, scale in zip(blocks, scales, strict=True)
    )
    return scaled(blocks, known, noise)


def has_second_derivative(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draw: Draws,
    blocks: tuple[Block, ...],
) -> bool:
    """Whether the derivative of the gradient is what differences of it say, along one direction at one draw.

    Differences over h and 2 h that do not agree with each other, for rounding, a kink or curvature beyond the second
    order, say nothing.
    """
    signs = torch.randint(2, loc.shape, generator=torch.Generator().manual_seed(0)).to(loc) * 2 - 1
    direction = standard_deviations(blocks, scales, signs / len(loc) ** 0.5)
    gradient_at = gradient_of(objective, scales, others, draw)
    _, _, gradient, location = value_and_gradient(objective, loc, scales, others, draw)
    product = torch.zeros_like(loc)
    if gradient.requires_grad:
        try:
            (product,) = torch.autograd.grad(gradient, location, direction, materialize_grads=True)
        except RuntimeError:
            return False
    near, far = (by_differences(gradient_at, loc, direction[None], step)[0] for step in (STEP, 2 * STEP))
    unit = standard_deviations(blocks, scales, torch.ones_like(loc)).abs()
    missing = torch.linalg.vector_norm(unit * (near - product))
    agree = torch.linalg.vector_norm(unit * (near - far)) < _AGREEING * missing
    return not bool(agree & (missing > _NEGLIGIBLE * torch.linalg.vector_norm(unit * near)))
