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
from jax import Array, lax

from ..families import Block, Precision

__all__ = ["Moments", "Pool", "append", "elbo", "init", "moments", "scaled", "squared_error", "standardized"]

REGULAR, MAX_SHIFT = 2.0, 0.25


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The draws that are kept: room for K pairs, of which the first `count` are there; the oldest come first.

    Attributes:
        points: z_j, [K, 2, D].
        values: ℓ(z_j) up to a constant, [K, 2]; `gradients` [K, 2, D] and `hessians` [K, 2, D, D] are its derivatives.
        log_mixture: log Σ_k q_k(z_j) up to a constant, [K, 2].
        locs, scales: m_k [K, D] and C_k of each block [K, ...].
        count: pairs that are there.
    """

    points: Array
    values: Array
    gradients: Array
    hessians: Array
    log_mixture: Array
    locs: Array
    scales: tuple[Any, ...]
    count: Array


class Moments(NamedTuple):
    """The estimate at one Gaussian.

    Attributes:
        weights: w_j, [K, 2].
        effective: n, the number of equally weighted draws that these are worth at q.
        gradient: ĝ, [D].
        hessian: Ĥ, [D, D].
        deviations: by how much each draw moves ĝ, [K, 2, D]; they add up to zero.
    """

    weights: Array
    effective: Array
    gradient: Array
    hessian: Array
    deviations: Array


def init(num_pairs: int, loc: Array, scales: tuple[Any, ...]) -> Pool:
    """Room for `num_pairs` pairs, none there yet."""
    size, dtype = len(loc), loc.dtype
    return Pool(
        points=jnp.zeros((num_pairs, 2, size), dtype),
        values=jnp.zeros((num_pairs, 2), dtype),
        gradients=jnp.zeros((num_pairs, 2, size), dtype),
        hessians=jnp.zeros((num_pairs, 2, size, size), dtype),
        log_mixture=jnp.full((num_pairs, 2), -jnp.inf, dtype),
        locs=jnp.broadcast_to(loc, (num_pairs, size)),
        scales=jax.tree.map(lambda scale: jnp.broadcast_to(scale, (num_pairs, *scale.shape)), scales),
        count=jnp.zeros((), jnp.int32),
    )


def append(
    pool: Pool,
    blocks: tuple[Block, ...],
    loc: Array,
    scales: tuple[Any, ...],
    noise: Array,
    values: Array,
    gradients: Array,
    hessians: Array,
) -> Pool:
    """The pool with the pair loc + C ε at ε = `noise` [2, D] more; a full pool forgets its older half."""
    capacity = len(pool.points)
    pool = lax.cond(pool.count == capacity, lambda pool: _without_older_half(pool, blocks), lambda pool: pool, pool)
    index, points = pool.count, loc + scaled(blocks, scales, noise)
    pool = Pool(
        points=pool.points.at[index].set(points),
        values=pool.values.at[index].set(values),
        gradients=pool.gradients.at[index].set(gradients),
        hessians=pool.hessians.at[index].set(hessians),
        log_mixture=_with_component(pool, blocks, loc, scales),
        locs=pool.locs.at[index].set(loc),
        scales=jax.tree.map(lambda stack, scale: stack.at[index].set(scale), pool.scales, scales),
        count=index + 1,
    )
    under_each = jax.vmap(lambda loc, scales: log_density(blocks, loc, scales, points))(pool.locs, pool.scales)
    own = jax.nn.logsumexp(jnp.where(_there(pool)[:, None], under_each, -jnp.inf), axis=0)
    return replace(pool, log_mixture=pool.log_mixture.at[index].set(own))


def moments(pool: Pool, blocks: tuple[Block, ...], loc: Array, scales: tuple[Any, ...]) -> Moments:
    """ĝ and Ĥ at N(loc, C Cᵀ); NaN where the Gaussian itself is not finite."""
    size = len(loc)
    noise, log_determinant = standardized(blocks, loc, scales, pool.points)  # C⁻¹ δ
    log_ratio = -(noise**2).sum(-1) / 2 - log_determinant - pool.log_mixture
    log_ratio = jnp.where(_there(pool)[:, None], log_ratio, -jnp.inf)
    weights = jax.nn.softmax(log_ratio, axis=(0, 1))
    effective = jnp.minimum(1, jnp.exp(jax.nn.logsumexp(log_ratio)) / 2) / (weights**2).sum()

    mean = jnp.einsum("kp,kpi->i", weights, noise)
    centred, identity = noise - mean, jnp.eye(size, dtype=loc.dtype)
    enough = effective > REGULAR * size
    covariance = jnp.where(enough, _second_moment(weights, centred), identity)
    slopes = jnp.linalg.solve(covariance, centred.reshape(-1, size).T).T.reshape(noise.shape)  # M⁻¹ c_j
    regular = enough & (mean @ jnp.linalg.solve(covariance, mean) < MAX_SHIFT)
    regressed = weights * jnp.where(regular, 1 - slopes @ mean, 1)
    excess = jnp.where(regular, slopes @ (identity - _second_moment(regressed, noise)), 0)

    hessian = jnp.einsum("kp,kpij->ij", regressed, pool.hessians)
    cubic = jnp.einsum("kpij,kpj->kpi", pool.hessians - hessian, scaled(blocks, scales, excess)) / 2
    quadratic = pool.gradients - (pool.points - loc) @ hessian
    terms = regressed[..., None] * quadratic + weights[..., None] * cubic
    gradient = terms.sum((0, 1))
    return Moments(weights, effective, gradient, hessian, terms - weights[..., None] * gradient)


def _second_moment(weights: Array, vectors: Array) -> Array:
    return jnp.einsum("kp,kpi,kpj->ij", weights, vectors, vectors)


def squared_error(moments: Moments, precision: Precision) -> Array:
    """V, the Monte Carlo variance of ĝ in the norm of S⁻¹, from the spread over pairs; 0 where one pair is all.

    What the regression takes away is not credited: V is the variance without it, and bounds the one with it. Rates that
    trust the smaller one follow single draws of heavy tails.
    """
    deviations = moments.deviations.sum(1)
    num_pairs = moments.effective / 2
    spread = (deviations * precision.solve(deviations)).sum()
    return jnp.where(num_pairs > 1, spread * num_pairs / jnp.maximum(num_pairs - 1, 0.5), 0)


def elbo(
    pool: Pool, weights: Array, blocks: tuple[Block, ...], loc: Array, scales: tuple[Any, ...]
) -> tuple[Array, Array]:
    """E_q[−ℓ] + H(q) at N(loc, C Cᵀ) and its standard error, from the draws of the pool with their `weights` there."""
    noise, log_determinant = standardized(blocks, loc, scales, pool.points)
    log_density = -(noise**2).sum(-1) / 2 - log_determinant - len(loc) * jnp.log(2 * jnp.pi) / 2
    terms = jnp.where(_there(pool)[:, None], -pool.values - log_density, 0)
    mean = (weights * terms).sum()
    return mean, jnp.sqrt((((weights * (terms - mean)).sum(1)) ** 2).sum())


def log_density(blocks: tuple[Block, ...], loc: Array, scales: tuple[Any, ...], points: Array) -> Array:
    """log N(points | loc, C Cᵀ) up to a constant, of shape [...] for points [..., D]."""
    noise, log_determinant = standardized(blocks, loc, scales, points)
    return -(noise**2).sum(-1) / 2 - log_determinant


def standardized(blocks: tuple[Block, ...], loc: Array, scales: tuple[Any, ...], points: Array) -> tuple[Array, Array]:
    """ε = C⁻¹ (points − loc) of shape [..., D], and log |C|."""

    def solve(factors: Array, columns: Array) -> Array:
        return lax.linalg.triangular_solve(factors, columns, left_side=True, lower=True)

    noise = _by_block(blocks, scales, points - loc, solve, lambda part, scale: part / scale)
    diagonals = [
        jnp.diagonal(scale, axis1=-2, axis2=-1) if block.structure == "dense" else scale
        for block, scale in zip(blocks, scales, strict=True)
    ]
    return noise, jnp.stack([jnp.log(diagonal).sum() for diagonal in diagonals]).sum()


def scaled(blocks: tuple[Block, ...], scales: tuple[Any, ...], noise: Array) -> Array:
    """C ε of shape [..., D]."""
    return _by_block(blocks, scales, noise, jnp.matmul, lambda part, scale: part * scale)


def _by_block(blocks: tuple[Block, ...], scales: tuple[Any, ...], vectors: Array, dense: Any, diagonal: Any) -> Array:
    """A function of C and a vector, for vectors [..., D]: `dense` of matrices and columns, `diagonal` of rows."""
    rows, parts = vectors.reshape(-1, vectors.shape[-1]), []
    for block, scale in zip(blocks, scales, strict=True):
        part = rows[:, block.start : block.stop]
        if block.structure == "dense":
            size = scale.shape[-1]
            columns = dense(scale.reshape(-1, size, size), part.T.reshape(-1, size, len(part)))
            parts.append(columns.reshape(-1, len(part)).T)
        else:
            parts.append(diagonal(part, scale.reshape(-1)))
    return jnp.concatenate(parts, -1).reshape(vectors.shape)


def _there(pool: Pool) -> Array:
    return jnp.arange(len(pool.points), dtype=jnp.int32) < pool.count


def _with_component(pool: Pool, blocks: tuple[Block, ...], loc: Array, scales: tuple[Any, ...]) -> Array:
    """log (Σ_k q_k + q) at every point."""
    return jnp.logaddexp(pool.log_mixture, log_density(blocks, loc, scales, pool.points))


def _without_older_half(pool: Pool, blocks: tuple[Block, ...]) -> Pool:
    half = len(pool.points) // 2
    kept = jax.tree.map(lambda leaf: jnp.roll(leaf, -half, axis=0) if leaf.ndim else leaf - half, pool)

    def add(log_mixture: Array, component: tuple) -> tuple[Array, None]:
        present, loc, scales = component
        added = _with_component(replace(kept, log_mixture=log_mixture), blocks, loc, scales)
        return jnp.where(present, added, log_mixture), None

    nothing = jnp.full_like(pool.log_mixture, -jnp.inf)
    log_mixture, _ = lax.scan(add, nothing, (_there(kept), kept.locs, kept.scales))
    return replace(kept, log_mixture=log_mixture)
