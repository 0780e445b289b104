"""Curvature that no Hessian has: that of kinks, from the gradients at the same draws.

Where ∇ℓ jumps, as that of |x| does (Laplace priors and likelihoods, quantile regression, ReLU), ∇²ℓ is a delta
function, and zero at every draw. But E_q[∇²ℓ] = E_q[Σ⁻¹ δ ∇ℓᵀ] (Stein) has it. Of what a quadratic surrogate leaves of
the gradients, in coordinates ε = C⁻¹ δ in which q is N(0, I),

    r_j = Cᵀ (g_j − ĝ − Ĥ δ_j),        T = Σ_j w_j sym(M⁻¹ (ε_j − ε̄) r_jᵀ),        Ĥ ← Ĥ + C⁻ᵀ T C⁻¹,

T is the curvature that is missing, and noise where ℓ is smooth. V is the Monte Carlo variance of each element,
K/(K − 3) times the sum of the squares of what each of K pairs adds to it; from 2 D draws on, where M⁻¹ makes a
regression of T, of what its residuals r_j − T ε_j add. An element counts by how far it is beyond its noise,

    T ← T⁰ + (T − T⁰) (1 − (c V / (T − T⁰)²)³)₊,        and T⁰ alone for up to three pairs,

with c = 4 + 2 log(D (D + 1)/2), which of D (D + 1)/2 elements hardly one passes by noise, but 3 once there is no doubt
of a kink, because T_aa > 0 of the diagonal is beyond 16 + 2 log D. T_aa < 0 has to be beyond four times that: where
tails are seen too seldom, both T_aa and V are too small.

T⁰ is 0, or κ I while the draws are few if κ, the average curvature that is missing, is more than what Ĥ has: a guide
that has lost what held it in has too few draws left to find it by.

‖T‖² is at most E|r|², of which antithetic pairs leave the odd part. Where that is worth less than 0.001 nat, E|r|²/4,
ℓ is as good as quadratic, and T is 0 without a look.

Source: Stein 1981; Donoho & Johnstone 1994 for c; Breiman 1995 for shrinkage that leaves large elements alone. C, M, ε
and ε̄ are those of `recycled.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ._paged import paged

__all__ = ["Kinks", "missing", "outer_products"]

CERTAIN, DOUBTFUL, BEYOND_DOUBT, NEGATIVE, NEGLIGIBLE = 3.0, 4.0, 16.0, 4.0, 1e-3
FEW, MIN_PAIRS = 32.0, 3.0  # draws, or twice the coordinates; pairs


class Kinks(NamedTuple):
    """C⁻ᵀ T C⁻¹, [D, D], and V of the elements of T, zero for those that are T⁰."""

    curvature: Array
    variance: Array


def missing(
    weights: Array,
    noise: Array,
    stein: Array,
    rest: Array,
    hessian: Array,
    factor: Array,
    effective: Array,
    count: Array,
) -> Kinks:
    """T of draws of which the first `count` pairs are there.

    Args:
        weights: w_j, [K, 2].
        noise, stein, rest: ε_j, M⁻¹ (ε_j − ε̄), r_j, [K, 2, D].
        hessian: Ĥ, [D, D].
        factor: Cᵀ, [D, D].
        effective: n, the draws that these are worth.
    """
    size, num_pairs = len(factor), effective / 2
    odd = (rest[:, 0] - rest[:, 1]) / 2
    spread = (weights.sum(1) * (odd**2).sum(-1)).sum()

    def found() -> Kinks:
        first, second = np.indices((2, 2)).reshape(2, -1)  # two draws of one pair

        def products(weights: Array, noise: Array, stein: Array, rest: Array) -> tuple[tuple[Array, Array], tuple]:
            of_draws = outer_products(weights[..., None] * stein, rest)
            return (_symmetric(of_draws), outer_products(weights[..., None] * noise, noise)), ()

        (total, moment), _ = paged(products, count, weights, noise, stein, rest)
        regressed = jnp.where(effective > 2 * size, total, 0)

        def squares(weights: Array, noise: Array, stein: Array, rest: Array) -> tuple[Array, tuple]:
            stein, rest = weights[..., None] * stein, rest - noise @ regressed
            alike = outer_products(stein[:, first] * stein[:, second], rest[:, first] * rest[:, second])
            crossed = outer_products(stein[:, first] * rest[:, second], rest[:, first] * stein[:, second])
            return (_symmetric(alike) + crossed) / 2, ()

        variance, _ = paged(squares, count, weights, noise, stein, rest)
        variance *= num_pairs / jnp.maximum(num_pairs - MIN_PAIRS, 0.5)
        lacking = (weights[..., None] * noise * rest).sum()
        present = (factor @ hessian @ factor.T * moment).sum()
        few = effective < jnp.maximum(FEW, 2 * size)
        average = jnp.where(few & (lacking > jnp.abs(present)), lacking / jnp.trace(moment), 0)
        centre = average * jnp.eye(size, dtype=factor.dtype)
        away, enough, diagonal = total - centre, num_pairs > MIN_PAIRS, jnp.eye(size, dtype=bool)
        no_doubt = BEYOND_DOUBT + 2 * math.log(size)
        kinked = (diagonal & (away > 0) & (away**2 > no_doubt * variance)).any()
        usual = jnp.where(kinked, CERTAIN, DOUBTFUL + 2 * math.log(size * (size + 1) / 2))
        level = jnp.where(diagonal & (away < 0), NEGATIVE * no_doubt, usual)
        certain = enough & (away**2 > level * variance)
        kept = 1 - (level * variance / jnp.where(certain, away**2, 1)) ** 3
        curvature = centre + jnp.where(certain, kept * away, 0)
        solved = jnp.linalg.solve(factor, jnp.linalg.solve(factor, curvature).T)
        finite = jnp.isfinite(solved).all()  # not where squares of gradients overflow, far from everything
        return Kinks(jnp.where(finite, solved, 0), jnp.where(certain & finite, variance, 0))

    nothing = Kinks(jnp.zeros_like(factor), jnp.zeros_like(factor))
    return lax.cond(spread / 4 > NEGLIGIBLE, found, lambda: nothing)


def outer_products(left: Array, right: Array) -> Array:
    """Σ over draws of the outer products of their rows, [D, D]."""
    return jnp.einsum("kpa,kpb->ab", left, right)


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.T) / 2
