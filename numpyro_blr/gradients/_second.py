"""H u along given directions u by differences of the gradient, where the model gives it no finite derivative.

    H u ≈ [g(z + h u) − g(z − h u)] / 2h,        u in standard deviations of q, h = 0.03.

Solvers of differential equations and other functions with a derivative of their own (`jax.custom_vjp`) have a gradient
that cannot be differentiated, and of some JAX knows no second derivative (the incomplete gamma function). Averaged over
q, a difference is the Hessian averaged over a q that is wider by h²/3 of its variance, 0.03 %; it is exact on a cubic
ℓ, to rounding, and costs two gradients where a derivative costs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ..families import Block
from .recycled import scaled

__all__ = ["NO_DERIVATIVE", "STEP", "by_differences", "by_forward_mode", "standard_deviations", "where_known"]

STEP = 0.03
NO_DERIVATIVE = (TypeError, NotImplementedError)  # of a function with a derivative of its own, or without a second
UNKNOWN_SCALE = 0.1  # of a point, and of a site whose covariance is not learned


def by_forward_mode(gradient: Callable[[Array], tuple[Array, Any]], loc: Array, directions: Array) -> tuple[Array, Any]:
    """(H u [P, D] for each of `directions` [P, D], and what `gradient` has beside ∇ℓ), or an error: `NO_DERIVATIVE`."""
    push = jax.vmap(lambda u: jax.jvp(gradient, (loc,), (u,), has_aux=True), out_axes=(None, 0, None))
    _, products, rest = push(directions)
    return products, rest


def by_differences(gradient: Callable[[Array], Array], loc: Array, directions: Array) -> Array:
    """H u [P, D] for each of `directions` [P, D]."""
    upper, lower = jax.vmap(jax.vmap(gradient))(loc + STEP * jnp.stack([directions, -directions]))
    return (upper - lower) / (2 * STEP)


def where_known(products: Array, gradients: Array, differences: Callable[[], Array]) -> tuple[Array, Array]:
    """`products`, or `differences()` where they are not finite and the gradients are; and whether it is these."""
    unknown = ~jnp.isfinite(products).all() & jnp.isfinite(gradients).all()
    return jax.lax.cond(unknown, differences, lambda: products), unknown


def standard_deviations(blocks: tuple[Block, ...], scales: tuple[Array | None, ...], noise: Array) -> Array:
    """C ε [..., D], also over blocks without a scale."""
    known = tuple(
        jnp.full(block.shape, UNKNOWN_SCALE, noise.dtype) if scale is None else scale
        for block, scale in zip(blocks, scales, strict=True)
    )
    return scaled(blocks, known, noise)
