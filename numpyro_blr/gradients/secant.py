"""E_q[H] from secants of the gradient, of a log density with kinks too.

With z = m + C (√(1 − θ) e + √θ η), e and η standard normal, and a unit vector u along which η is not drawn but gone ±x,

    E_q[Cᵀ H C] u = E[Cᵀ (g(z₊) − g(z₋)) / (2 √θ x)],        z± = z + √θ C u (±x − uᵀη),        x ~ χ₃,

since by parts E[f′(t)] = ∫₀^∞ t φ(t) (f(t) − f(−t)) dt for t ~ N(0, 1) with density φ, and 2 t² φ(t) is that of χ₃. It
is unbiased for every continuous ℓ, as Price's theorem is not of Hessians: what jumps in g between z₋ and z₊ is in the
secant, and in no Hessian. On a quadratic ℓ one draw is exact. Short chords have the noise of rare jumps, and long ones
take the columns of a matrix from points far from each other: θ = ¼.

For a dense precision u is each unit vector; for a diagonal one the probes of `hutchinson.py` over √n, with diag(C H C)
≈ Σ_p √n u_p ⊙ (C H C u_p). Costs two gradients a direction and one, a draw.

Source: Stein 1981 (integration by parts); the length x is ours.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random
from jax.scipy.linalg import solve_triangular

from ..families import Block
from ._estimate import Draws, Estimate, Objective, average_over_pairs, value_and_gradients
from .recycled import scaled

__all__ = ["SHARE", "Chords", "chords", "secant"]

SHARE = 0.25  # θ
POINT = 0.003  # in place of √θ C for a point, and for a site whose covariance is not learned: H at the draw, nearly


class Chords(NamedTuple):
    """Between which points the secants of K pairs of draws are taken, or of S draws.

    Attributes:
        beside: η, [K, D].
        along: x, [K, P], in each of P directions.
    """

    beside: Array
    along: Array

    def mirrored(self) -> Chords:
        """Those of both draws of each pair, the first of all in front."""
        return Chords(jnp.concatenate([self.beside, -self.beside]), jnp.concatenate([self.along, self.along]))


def chords(rng_key: Array, num_pairs: int, num_directions: int, like: Array) -> Chords:
    """η ~ N(0, I), and x ~ χ₃ as the length of three normals."""
    normals = random.normal(rng_key, (num_pairs * (len(like) + 3 * num_directions),), like.dtype)
    beside, along = jnp.split(normals, [num_pairs * len(like)])
    return Chords(beside.reshape(num_pairs, -1), jnp.linalg.norm(along.reshape(num_pairs, num_directions, 3), axis=-1))


def secant(
    objective: Objective,
    loc: Array,
    scales: tuple[Array | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
    *,
    forward: bool = False,
) -> Estimate:
    """E_q[g] at the given draws, and E_q[∇²ℓ], or its diagonal where the draws have probes."""
    evaluate = value_and_gradients(objective, (0, 2), forward)
    inner, outer = math.sqrt(1 - SHARE), math.sqrt(SHARE)
    reach = tuple(
        jnp.full(block.shape, POINT, loc.dtype) if scale is None else outer * scale
        for block, scale in zip(blocks, scales, strict=True)
    )
    moving = np.concatenate(
        [np.full(block.size, scale is not None) for block, scale in zip(blocks, scales, strict=True)]
    )
    assert draws.chords is not None  # the rule makes them for this estimator
    eta, x = draws.chords
    identity = jnp.eye(len(loc), dtype=loc.dtype)
    probes = jnp.broadcast_to(identity, (len(eta), *identity.shape)) if draws.probes is None else draws.probes
    lengths = jnp.linalg.norm(probes, axis=-1, keepdims=True)
    units = probes / lengths  # u, [S, P, D]
    off = eta[:, None] - units * jnp.einsum("spd,sd->sp", units, eta)[..., None]
    ways = (jnp.where(moving, off, 0) + way * units for way in (x[..., None], -x[..., None]))
    ends = loc + scaled(blocks, reach, jnp.stack(list(ways), 1))  # z₊ and z₋ but for C √(1 − θ) e, [S, 2, P, D]
    narrowed = tuple(None if scale is None else inner * scale for scale in scales)

    def at_draw(draw: Draws, ends: Array) -> tuple[Any, ...]:
        gradient_at = jax.vmap(jax.vmap(lambda end: evaluate(end, narrowed, others, draw)[1][0]))
        (loss, extras), (gradient, g_others) = evaluate(loc, scales, others, draw)
        return gradient_at(ends), loss, gradient, g_others, extras

    at_ends, losses, gradients, g_others, extras = jax.vmap(at_draw)(draws, ends)
    products = lengths * (at_ends[:, 0] - at_ends[:, 1]) / (2 * x[..., None])  # √θ H C u, of the probes u
    if draws.probes is None:
        columns = scaled(blocks, reach, identity)  # √θ Cᵀ, and the products are √θ Cᵀ H
        matrices = jax.vmap(lambda product: solve_triangular(columns, product, lower=False))(products)
        curvatures = (matrices + jnp.swapaxes(matrices, 1, 2)) / 2
    else:
        curvatures = (probes * products).sum(1) / scaled(blocks, reach, jnp.ones_like(loc))
    return average_over_pairs(losses, gradients, curvatures, g_others, extras, 1 + 2 * x.shape[1])
