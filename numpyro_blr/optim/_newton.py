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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

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

    direction: Array
    found: Array
    num_products: Array
    gain: Array
    num_averaged: Array | None


def none(num_averaged: Array | None, loc: Array) -> Newton:
    """Where all moves by S."""
    zero = jnp.zeros((), jnp.int32)
    return Newton(jnp.zeros_like(loc), jnp.zeros((), bool), zero, jnp.ones_like(loc), num_averaged)


def find(
    product: Callable[[Array], Array],
    estimate: Estimate,
    precision: DiagonalPrecision,
    blocks: tuple[Block, ...],
    num_averaged: Array,
) -> Newton:
    """d and γ.

    Args:
        product: v -> E_q[H] v.
        precision: S, before the step.
        num_averaged: n of each coordinate, [D].
    """
    whole = precision.blend(estimate.hessian, jnp.ones((), precision.diagonal.dtype))
    along, found, num_products = direction(product, estimate.gradient, whole)
    gains, averaged = gain(estimate, precision, blocks, num_averaged)
    return Newton(along, found, num_products, jnp.where(found, gains, 1), jnp.where(found, averaged, num_averaged))


def direction(
    product: Callable[[Array], Array], gradient: Array, precision: DiagonalPrecision
) -> tuple[Array, Array, Array]:
    """d, whether there is one, and how many products v -> E_q[H] v it took."""
    preconditioned = precision.solve(gradient)
    enough = RESIDUAL**2 * gradient @ preconditioned

    def going(carry: tuple[Array, ...]) -> Array:
        _, residual, preconditioned, _, sound, number = carry
        return sound & (residual @ preconditioned > enough) & (number < MAX_PRODUCTS)

    def turn(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        found, residual, preconditioned, along, _, number = carry
        image = (1 - DAMPING) * product(along) + DAMPING * precision.diagonal * along
        curvature, length = along @ image, residual @ preconditioned
        sound = (curvature > 0) & jnp.isfinite(image).all()
        reach = jnp.where(sound, length / jnp.where(sound, curvature, 1), 0)
        residual -= reach * jnp.where(sound, image, 0)
        preconditioned = precision.solve(residual)
        turned = preconditioned + residual @ preconditioned / length * along
        return found + reach * along, residual, preconditioned, turned, sound, number + 1

    start: Any = (jnp.zeros_like(gradient), gradient, preconditioned, preconditioned)
    start += (jnp.ones((), bool), jnp.zeros((), jnp.int32))
    found, *_, sound, number = lax.while_loop(going, turn, start)
    return found, sound, number


def gain(
    estimate: Estimate, precision: DiagonalPrecision, blocks: tuple[Block, ...], num_averaged: Array
) -> tuple[Array, Array]:
    """γ and n of each coordinate, after the step."""
    site = np.repeat(np.arange(len(blocks)), [block.size for block in blocks])

    def over_site(values: Array) -> Array:
        return jax.ops.segment_sum(values / precision.diagonal**2, site, len(blocks))[site]

    change, noise = over_site((estimate.hessian - precision.diagonal) ** 2), over_site(estimate.hessian_variance)
    certain = change > 2 * noise
    num_averaged = jnp.where(certain, 0, num_averaged + 1)
    return jnp.where(certain, 1 - noise / jnp.where(certain, change, 1), 2 / (num_averaged + 2)), num_averaged
