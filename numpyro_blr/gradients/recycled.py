"""E_q[∇ℓ] and E_q[∇²ℓ] from the draws of earlier steps too, weighted as draws of the mixture of their Gaussians.

With antithetic pairs z_j = m_k ± C_k ε, pair k drawn from q_k, the Gaussian of now q = N(m, Σ), and δ_j = z_j − m:

    w_j ∝ q(z_j) / Σ_k q_k(z_j),    Σ_j w_j = 1,         v_j = w_j (1 − c_jᵀ M⁻¹ δ̄),
    Ĥ = Σ_j v_j H_j,                ĝ = Σ_j v_j (g_j − Ĥ δ_j) + Σ_j w_j (H_j − Ĥ)(Σ − M_v) M⁻¹ c_j / 2,

where δ̄ and M are the mean and the covariance of the δ_j under w, c_j = δ_j − δ̄, and M_v their second moment under v.
The mixture bounds every w_j, and draws far from q weigh nothing. v regresses on δ: Σ_j v_j = 1 and Σ_j v_j δ_j = 0,
as for a perfect sample of q. The last term corrects the spread of the draws, M_v, for that of q: regressing H on δ
finds the third derivative, and its contraction with Σ/2 is what E_q[g] has beyond ∇ℓ(m). So ĝ and Ĥ are exact on a
cubic ℓ. While the draws are worth less than 2 D, or δ̄ is far from 0 (δ̄ᵀ M⁻¹ δ̄ > 1/4), the regression is left out
(v = w, M_v = Σ); ĝ is then exact on a quadratic.

The estimate is worth n = min(1, Z) / Σ_j w_j² equally weighted draws, where Z = Σ_j q(z_j) / (2 Σ_k q_k(z_j)) is 1 on
average if the draws cover q, and nearly 0 if q lies elsewhere. A draw costs its Hessian once and serves every later q
that it covers: near the optimum the noise falls with all draws so far, at a learning rate of 1.

Source: Veach & Guibas 1995 (the balance heuristic) and Owen & Zhou 2000 for the weights and the regression; Arenz et
al. 2023 for draws used again in variational inference. w, n, ĝ, Ĥ = `weights`, `effective`, `gradient`, `hessian`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import cho_solve

from ..families import Block, Precision, factored
from ._paged import paged

__all__ = [
    "Moments",
    "Pool",
    "append",
    "elbo",
    "emptied",
    "init",
    "moments",
    "noise_cost",
    "scaled",
    "squared_error",
    "standardized",
]

REGULAR, MAX_SHIFT = 2.0, 0.25
FORGOTTEN = 4  # of a full pool, one pair in so many
FRAMES = 4  # from which on their spread is known


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The draws that are kept: room for K pairs, row after row, the oldest first.

    Attributes:
        points: z_j, [K, 2, D].
        values: ℓ(z_j) up to a constant, [K, 2]; `gradients` [K, 2, D] and `hessians` [K, 2, D, D] are its derivatives.
        log_mixture: log Σ_k q_k(z_j) up to a constant, [K, 2].
        locs: m_k, [K, D].
        whiteners: C_k⁻¹, [K, D, D], or its diagonal, [K, D], where all blocks are diagonal.
        numbers: of each pair among all so far, [K]; D in a row are a frame (`orthogonal.py`).
        count: pairs that are there, in the first rows.
    """

    points: Array
    values: Array
    gradients: Array
    hessians: Array
    log_mixture: Array
    locs: Array
    whiteners: Array
    numbers: Array
    count: Array


class Moments(NamedTuple):
    """The estimate at one Gaussian.

    Attributes:
        weights: w_j, [K, 2].
        effective: n, the number of equally weighted draws that these are worth at q.
        gradient: ĝ, [D].
        hessian: Ĥ, [D, D].
        deviations: by how much each pair moves ĝ, [K, D]; they add up to zero.
        scatter: Σ over pairs of the outer products of these, [D, D].
    """

    weights: Array
    effective: Array
    gradient: Array
    hessian: Array
    deviations: Array
    scatter: Array


def init(num_pairs: int, loc: Array, scales: tuple[Any, ...]) -> Pool:
    """Room for `num_pairs` pairs, none there yet."""
    size, dtype = len(loc), loc.dtype
    return Pool(
        points=jnp.zeros((num_pairs, 2, size), dtype),
        values=jnp.zeros((num_pairs, 2), dtype),
        gradients=jnp.zeros((num_pairs, 2, size), dtype),
        hessians=jnp.zeros((num_pairs, 2, size, size), dtype),
        log_mixture=jnp.full((num_pairs, 2), -jnp.inf, dtype),
        locs=jnp.zeros((num_pairs, size), dtype),
        whiteners=jnp.ones((num_pairs, size) if _mean_field(scales, size) else (num_pairs, size, size), dtype),
        numbers=jnp.full(num_pairs, -1, jnp.int32),
        count=jnp.zeros((), jnp.int32),
    )


def emptied(pool: Pool, condition: Array) -> Pool:
    """Without any draw, if so."""
    return replace(pool, count=jnp.where(condition, 0, pool.count))


def append(
    pool: Pool,
    blocks: tuple[Block, ...],
    loc: Array,
    scales: tuple[Any, ...],
    noise: Array,
    values: Array,
    gradients: Array,
    hessians: Array,
    number: Array | None = None,
) -> Pool:
    """The pool with the pairs loc + C ε more, at ε = `noise` [K, 2, D], or with the first `number` of them alone.

    Where there is no room for K more, it forgets every fourth pair first.
    """
    num_pairs, capacity, whitener = len(noise), len(pool.points), _whitener(blocks, scales)
    assert FORGOTTEN * num_pairs <= capacity
    number = jnp.asarray(num_pairs if number is None else number)
    pool = lax.cond(pool.count + num_pairs > capacity, _thinned, lambda pool: pool, pool)
    row, points = pool.count, loc + scaled(blocks, scales, noise)

    def written(stack: Array, values: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(stack, jnp.broadcast_to(values, (num_pairs, *stack.shape[1:])), row, 0)

    count, locs, whiteners = row + number, written(pool.locs, loc), written(pool.whiteners, whitener)

    def densities(old: Array, log_mixture: Array, locs: Array, whiteners: Array) -> tuple[tuple, tuple[Array, Array]]:
        more = _log_density(old, loc, whitener) + jnp.log(number.astype(loc.dtype))
        return (), (jnp.logaddexp(log_mixture, more), jax.vmap(_log_density, (None, 0, 0))(points, locs, whiteners))

    _, (log_mixture, under_each) = paged(densities, count, pool.points, pool.log_mixture, locs, whiteners)
    pool, order = replace(pool, count=count), jnp.arange(num_pairs, dtype=jnp.int32)
    return replace(
        pool,
        points=written(pool.points, points),
        values=written(pool.values, values),
        gradients=written(pool.gradients, gradients),
        hessians=written(pool.hessians, hessians),
        log_mixture=written(log_mixture, _log_sum(pool, under_each)),
        locs=locs,
        whiteners=whiteners,
        numbers=written(pool.numbers, jnp.where(order < number, pool.numbers.max() + 1 + order, -1)),
    )


def _thinned(pool: Pool) -> Pool:
    """Without one pair in `FORGOTTEN`, of all ages alike.

    Early Gaussians are often wide, and bound the weights of the draws in the tails of the present one: without all of
    them at once, the estimate would jump.
    """
    kept = np.arange(len(pool.points)) % FORGOTTEN > 0
    order = np.argsort(~kept, kind="stable")
    count = (kept & _there(pool)).sum(dtype=jnp.int32)
    pool = jax.tree.map(lambda leaf: leaf[order] if leaf.ndim else count, pool)

    def mixture(points: Array) -> tuple[tuple, Array]:
        return (), _log_sum(pool, jax.vmap(_log_density, (None, 0, 0))(points, pool.locs, pool.whiteners))

    return replace(pool, log_mixture=paged(mixture, pool.count, pool.points)[1])


def _log_sum(pool: Pool, densities: Array) -> Array:
    """log Σ_k q_k over the Gaussians that are there, from log q_k [K, ...]."""
    there = jnp.expand_dims(_there(pool), tuple(range(1, densities.ndim)))
    return jax.nn.logsumexp(jnp.where(there, densities, -jnp.inf), axis=0)


def moments(pool: Pool, blocks: tuple[Block, ...], loc: Array, scales: tuple[Any, ...]) -> Moments:
    """ĝ and Ĥ at N(loc, C Cᵀ); NaN where the Gaussian itself is not finite."""
    size, count = len(loc), pool.count

    def ratios(points: Array, log_mixture: Array) -> tuple[tuple, tuple[Array, Array]]:
        noise, log_determinant = standardized(blocks, loc, scales, points)  # C⁻¹ δ
        return (), (noise, -(noise**2).sum(-1) / 2 - log_determinant - log_mixture)

    _, (noise, log_ratio) = paged(ratios, count, pool.points, pool.log_mixture)
    log_ratio = jnp.where(_there(pool)[:, None], log_ratio, -jnp.inf)
    largest = log_ratio.max()
    ratio = jnp.exp(log_ratio - largest)
    total = ratio.sum()
    weights = ratio / total
    effective = jnp.minimum(1, total * jnp.exp(largest) / 2) / (weights**2).sum()

    def second_moment(weights: Array, noise: Array) -> tuple[tuple[Array, Array], tuple]:
        weighted = weights[..., None] * noise
        return (weighted.sum((0, 1)), _product(weighted, noise)), ()

    (mean, second), _ = paged(second_moment, count, weights, noise)
    enough, identity = effective > REGULAR * size, jnp.eye(size, dtype=loc.dtype)
    covariance = jnp.where(enough, second - jnp.outer(mean, mean), identity)
    inverse = cho_solve((jnp.linalg.cholesky(covariance), True), identity)  # M⁻¹
    slope = inverse @ mean
    regular = enough & (mean @ slope < MAX_SHIFT)

    def regression(weights: Array, noise: Array) -> tuple[Array, Array]:
        regressed = weights * jnp.where(regular, 1 - (noise - mean) @ slope, 1)
        return _product(regressed[..., None] * noise, noise), regressed

    spread, regressed = paged(regression, count, weights, noise)
    excess_of = scaled(blocks, scales, inverse @ (identity - spread))

    def curvature(weights: Array, noise: Array, hessians: Array) -> tuple[Array, tuple[Array, Array]]:
        excess = jnp.where(regular, (noise - mean) @ excess_of, 0)  # (Σ − M_v) M⁻¹ c
        hessian = jnp.einsum("kp,kpab->ab", weights, hessians)
        return hessian, (excess, jnp.einsum("kpab,kpb->kpa", hessians, excess))

    hessian, (excess, product) = paged(curvature, count, regressed, noise, pool.hessians)

    def slopes(regressed, weights, points, gradients, excess, product) -> tuple[Array, Array]:
        quadratic = gradients - (points - loc) @ hessian
        cubic = (product - excess @ hessian) / 2
        terms = (regressed[..., None] * quadratic + weights[..., None] * cubic).sum(1)
        return terms.sum(0), terms

    gradient, terms = paged(slopes, count, regressed, weights, pool.points, pool.gradients, excess, product)

    def scattered(weights: Array, terms: Array) -> tuple[Array, Array]:
        deviations = terms - weights.sum(1)[:, None] * gradient
        return deviations.T @ deviations, deviations

    scatter, deviations = paged(scattered, count, weights, terms)
    return Moments(weights, effective, gradient, hessian, deviations, scatter)


def _product(left: Array, right: Array) -> Array:
    """Σ over draws of the outer products of their rows, [D, D]."""
    return jnp.einsum("kpa,kpb->ab", left, right)


def squared_error(moments: Moments, precision: Precision) -> Array:
    """V, the Monte Carlo variance of ĝ in the norm of S⁻¹, from the spread over pairs; 0 where one pair is all.

    What the regression takes away is not credited: V is the variance without it, and bounds the one with it. Rates that
    trust the smaller one follow single draws of heavy tails.
    """
    num_pairs = moments.effective / 2
    spread = jnp.trace(precision.solve(moments.scatter))
    return jnp.where(num_pairs > 1, spread * num_pairs / jnp.maximum(num_pairs - 1, 0.5), 0)


def noise_cost(pool: Pool, moments: Moments, blocks: tuple[Block, ...], precision: Precision) -> Array:
    """V/2 + ¼ E‖Cᵀ (Ĥ − E_q[H]) C‖² within the blocks: nats that noise of the mean and of the scales costs.

    Both from the spread over frames of D pairs, which is less than that over pairs where they are at right angles; over
    pairs where there are fewer than four frames.
    """
    groups, scales = _groups(blocks), tuple(precision.scale(block) for block in blocks)
    factor = scaled(blocks, scales, jnp.eye(len(groups), dtype=pool.points.dtype)).T
    hessians = jnp.einsum("kj,kjab->kab", moments.weights, pool.hessians)
    hessians -= moments.weights.sum(1)[:, None, None] * moments.hessian
    whitened = jnp.where(groups[:, None] == groups, factor.T @ hessians @ factor, 0).reshape(len(hessians), -1)
    gradients = moments.deviations
    products = gradients @ precision.solve(gradients).T / 2 + whitened @ whitened.T / 4  # of two pairs
    frames, shares = pool.numbers // len(groups), moments.weights.sum(1)
    same = frames[:, None] == frames
    num_frames = 1 / jnp.where(same, jnp.outer(shares, shares), 0).sum()
    num_pairs = moments.effective / 2
    by_pair = jnp.trace(products) * num_pairs / jnp.maximum(num_pairs - 1, 0.5)
    by_frame = jnp.where(same, products, 0).sum() * num_frames / jnp.maximum(num_frames - 1, 0.5)
    return jnp.where(num_frames >= FRAMES, by_frame, by_pair)


def elbo(
    pool: Pool, weights: Array, blocks: tuple[Block, ...], loc: Array, scales: tuple[Any, ...]
) -> tuple[Array, Array]:
    """E_q[−ℓ] + H(q) at N(loc, C Cᵀ) and its standard error, from the draws of the pool with their `weights` there."""
    noise, log_determinant = standardized(blocks, loc, scales, pool.points)
    log_density = -(noise**2).sum(-1) / 2 - log_determinant - len(loc) * jnp.log(2 * jnp.pi) / 2
    terms = jnp.where(_there(pool)[:, None], -pool.values - log_density, 0)
    mean = (weights * terms).sum()
    return mean, jnp.sqrt((((weights * (terms - mean)).sum(1)) ** 2).sum())


def standardized(blocks: tuple[Block, ...], loc: Array, scales: tuple[Any, ...], points: Array) -> tuple[Array, Array]:
    """ε = C⁻¹ (points − loc) of shape [..., D], and log |C|."""
    return _whitened(points - loc, _whitener(blocks, scales))


def _whitened(shifts: Array, whitener: Array) -> tuple[Array, Array]:
    """C⁻¹ δ of shape [..., D], and log |C|."""
    if whitener.ndim == 1:
        return shifts * whitener, -jnp.log(whitener).sum()
    return shifts @ whitener.T, -jnp.log(jnp.diagonal(whitener)).sum()


def _log_density(points: Array, loc: Array, whitener: Array) -> Array:
    """log N(points | loc, C Cᵀ) up to a constant, of shape [...] for points [..., D]."""
    noise, log_determinant = _whitened(points - loc, whitener)
    return -(noise**2).sum(-1) / 2 - log_determinant


def _mean_field(scales: tuple[Any, ...], size: int) -> bool:
    return sum(scale.size for scale in scales) == size


def _whitener(blocks: tuple[Block, ...], scales: tuple[Any, ...]) -> Array:
    """C⁻¹, [D, D], or its diagonal, [D], where that is all."""
    if _mean_field(scales, sum(block.size for block in blocks)):
        return 1 / jnp.concatenate([scale.reshape(-1) for scale in scales])
    parts = []
    for block, scale in zip(*factored(blocks, scales), strict=True):
        if block.structure == "dense":
            identity = jnp.eye(scale.shape[-1], dtype=scale.dtype)
            factors = scale.reshape(-1, *scale.shape[-2:])
            parts += [lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True) for factor in factors]
        else:
            parts.append(jnp.diag(1 / scale.reshape(-1)))
    return parts[0] if len(parts) == 1 else jax.scipy.linalg.block_diag(*parts)


def _groups(blocks: tuple[Block, ...]) -> np.ndarray:
    """A number for each coordinate, the same for those of one event of a block that is not mean field."""
    parts = []
    for block in blocks:
        event = block.shape[-1] if block.structure in ("dense", "low rank") else 1
        parts.append(block.start + np.arange(block.size) // event)
    return np.concatenate(parts)


def scaled(blocks: tuple[Block, ...], scales: tuple[Any, ...], noise: Array) -> Array:
    """C ε of shape [..., D]."""
    if _mean_field(scales, noise.shape[-1]):
        return noise * jnp.concatenate([scale.reshape(-1) for scale in scales])
    parts = []
    for block, scale in zip(*factored(blocks, scales), strict=True):
        part = noise[..., block.start : block.stop]
        if block.structure == "dense":
            rows = part.reshape(*part.shape[:-1], -1, scale.shape[-1])
            parts.append(jnp.einsum("bij,...bj->...bi", scale.reshape(-1, *scale.shape[-2:]), rows).reshape(part.shape))
        else:
            parts.append(part * scale.reshape(-1))
    return jnp.concatenate(parts, -1)


def _there(pool: Pool) -> Array:
    """Which rows are, [K]."""
    return jnp.arange(len(pool.points), dtype=jnp.int32) < pool.count
