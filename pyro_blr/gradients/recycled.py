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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from ..families import Block, Precision, factored

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


@dataclass(frozen=True)
class Pool:
    """The draws that are kept: room for `capacity` pairs, of which K are there; the oldest come first.

    Attributes:
        points: z_j, [K, 2, D].
        values: ℓ(z_j) up to a constant, [K, 2]; `gradients` [K, 2, D] and `hessians` [K, 2, D, D] are its derivatives.
        log_mixture: log Σ_k q_k(z_j) up to a constant, [K, 2].
        locs, scales: m_k [K, D] and C_k of each block [K, ...].
        numbers: of each pair among all so far, [K]; D in a row are a frame (`orthogonal.py`).
        capacity: pairs that there is room for.
    """

    points: Tensor
    values: Tensor
    gradients: Tensor
    hessians: Tensor
    log_mixture: Tensor
    locs: Tensor
    scales: tuple[Tensor, ...]
    numbers: Tensor
    capacity: int

    @property
    def count(self) -> int:
        """K."""
        return len(self.points)


class Moments(NamedTuple):
    """The estimate at one Gaussian.

    Attributes:
        weights: w_j, [K, 2].
        effective: n, the number of equally weighted draws that these are worth at q.
        gradient: ĝ, [D].
        hessian: Ĥ, [D, D].
        deviations: by how much each pair moves ĝ, [K, D]; they add up to zero.
    """

    weights: Tensor
    effective: float
    gradient: Tensor
    hessian: Tensor
    deviations: Tensor


def init(num_pairs: int, loc: Tensor, scales: tuple[Any, ...]) -> Pool:
    """Room for `num_pairs` pairs, none there yet."""
    size = len(loc)
    return Pool(
        points=loc.new_zeros(0, 2, size),
        values=loc.new_zeros(0, 2),
        gradients=loc.new_zeros(0, 2, size),
        hessians=loc.new_zeros(0, 2, size, size),
        log_mixture=loc.new_zeros(0, 2),
        locs=loc.new_zeros(0, size),
        scales=tuple(scale.new_zeros(0, *scale.shape) for scale in scales),
        numbers=torch.zeros(0, dtype=torch.int64, device=loc.device),
        capacity=num_pairs,
    )


def emptied(pool: Pool, condition: bool) -> Pool:
    """Without any draw, if so."""
    return _with_rows(pool, slice(0)) if condition else pool


def append(
    pool: Pool,
    blocks: tuple[Block, ...],
    loc: Tensor,
    scales: tuple[Any, ...],
    noise: Tensor,
    values: Tensor,
    gradients: Tensor,
    hessians: Tensor,
) -> Pool:
    """The pool with the pairs loc + C ε more, at ε = `noise` [K, 2, D]; a full pool forgets every fourth pair."""
    blocks, scales = factored(blocks, scales)
    pool = _thinned(pool, blocks) if pool.count == pool.capacity else pool
    found = (noise, values, gradients, hessians)
    if (room := pool.capacity - pool.count) < len(noise):
        pool = append(pool, blocks, loc, scales, *(array[:room] for array in found))
        return append(pool, blocks, loc, scales, *(array[room:] for array in found))
    num_pairs, size = len(noise), len(loc)
    points = loc + scaled(blocks, scales, noise)
    locs = torch.cat([pool.locs, loc.expand(num_pairs, size)])
    all_scales = tuple(
        torch.cat([stack, scale.expand(num_pairs, *scale.shape)])
        for stack, scale in zip(pool.scales, scales, strict=True)
    )
    under_each = _log_density(blocks, locs[:, None], all_scales, points.reshape(-1, size).expand(len(locs), -1, size))
    old = _with_component(pool, blocks, loc, scales, num_pairs)
    first = pool.numbers[-1] + 1 if pool.count else 0
    return Pool(
        points=torch.cat([pool.points, points]),
        values=torch.cat([pool.values, values]),
        gradients=torch.cat([pool.gradients, gradients]),
        hessians=torch.cat([pool.hessians, hessians]),
        log_mixture=torch.cat([old, under_each.logsumexp(0).view(-1, 2)]),
        locs=locs,
        scales=all_scales,
        numbers=torch.cat([pool.numbers, first + torch.arange(num_pairs).to(pool.numbers)]),
        capacity=pool.capacity,
    )


def moments(pool: Pool, blocks: tuple[Block, ...], loc: Tensor, scales: tuple[Any, ...]) -> Moments:
    """ĝ and Ĥ at N(loc, C Cᵀ); NaN where the Gaussian itself is not finite."""
    size = len(loc)
    noise, log_determinant = standardized(blocks, loc, scales, pool.points)  # C⁻¹ δ
    log_ratio = -(noise**2).sum(-1) / 2 - log_determinant - pool.log_mixture
    weights = log_ratio.reshape(-1).softmax(0).reshape(log_ratio.shape)
    effective = min(1.0, float(log_ratio.exp().sum()) / 2) / float((weights**2).sum())

    regressed, excess = weights, torch.zeros_like(noise)
    if effective > REGULAR * size:
        mean = torch.einsum("kp,kpi->i", weights, noise)
        centred, identity = noise - mean, torch.eye(size, dtype=loc.dtype, device=loc.device)
        factor, singular = torch.linalg.cholesky_ex(_second_moment(weights, centred))
        slopes = torch.cholesky_solve(centred.reshape(-1, size).T, factor).T.reshape(noise.shape)  # M⁻¹ c_j
        if not singular and mean @ torch.cholesky_solve(mean[:, None], factor)[:, 0] < MAX_SHIFT:
            regressed = weights * (1 - slopes @ mean)
            excess = slopes @ (identity - _second_moment(regressed, noise))

    hessian = torch.einsum("kp,kpij->ij", regressed, pool.hessians)
    excess = scaled(blocks, scales, excess)
    cubic = (torch.einsum("kpij,kpj->kpi", pool.hessians, excess) - excess @ hessian) / 2
    quadratic = pool.gradients - (pool.points - loc) @ hessian
    terms = (regressed[..., None] * quadratic + weights[..., None] * cubic).sum(1)
    gradient = terms.sum(0)
    return Moments(weights, effective, gradient, hessian, terms - weights.sum(1)[:, None] * gradient)


def _second_moment(weights: Tensor, vectors: Tensor) -> Tensor:
    rows = vectors.flatten(0, 1)
    return (weights.flatten()[:, None] * rows).mT @ rows


def squared_error(moments: Moments, precision: Precision) -> float:
    """V, the Monte Carlo variance of ĝ in the norm of S⁻¹, from the spread over pairs; 0 where one pair is all.

    What the regression takes away is not credited: V is the variance without it, and bounds the one with it. Rates that
    trust the smaller one follow single draws of heavy tails.
    """
    num_pairs = moments.effective / 2
    if not num_pairs > 1:
        return 0.0
    spread = float(precision.solve(moments.deviations.T @ moments.deviations).trace())
    return spread * num_pairs / max(num_pairs - 1, 0.5)


def noise_cost(pool: Pool, moments: Moments, blocks: tuple[Block, ...], precision: Precision) -> float:
    """V/2 + ¼ E‖Cᵀ (Ĥ − E_q[H]) C‖² within the blocks: nats that noise of the mean and of the scales costs.

    Both from the spread over frames of D pairs, which is less than that over pairs where they are at right angles; over
    pairs where there are fewer than four frames.
    """
    groups, scales = _groups(blocks).to(pool.points.device), tuple(precision.scale(block) for block in blocks)
    factor = scaled(blocks, scales, torch.eye(len(groups)).to(pool.points)).T
    hessians = torch.einsum("kj,kjab->kab", moments.weights, pool.hessians)
    hessians -= moments.weights.sum(1)[:, None, None] * moments.hessian
    whitened = (factor.T @ hessians @ factor)[:, groups[:, None] == groups]
    gradients = moments.deviations
    products = gradients @ precision.solve(gradients).T / 2 + whitened @ whitened.T / 4  # of two pairs
    frames, shares = pool.numbers // len(groups), moments.weights.sum(1)
    same = frames[:, None] == frames
    num_frames = 1 / float((same * torch.outer(shares, shares)).sum())
    num_pairs = moments.effective / 2
    if num_frames >= FRAMES:
        return float((same * products).sum()) * num_frames / (num_frames - 1)
    return float(products.trace()) * num_pairs / max(num_pairs - 1, 0.5)


def elbo(
    pool: Pool, weights: Tensor, blocks: tuple[Block, ...], loc: Tensor, scales: tuple[Any, ...]
) -> tuple[float, float]:
    """E_q[−ℓ] + H(q) at N(loc, C Cᵀ) and its standard error, from the draws of the pool with their `weights` there."""
    noise, log_determinant = standardized(blocks, loc, scales, pool.points)
    density = -(noise**2).sum(-1) / 2 - log_determinant - len(loc) * math.log(2 * math.pi) / 2
    terms = -pool.values - density
    mean = (weights * terms).sum()
    return float(mean), float(((weights * (terms - mean)).sum(1) ** 2).sum().sqrt())


def _log_density(blocks: tuple[Block, ...], loc: Tensor, scales: tuple[Any, ...], points: Tensor) -> Tensor:
    """log N(points | loc, C Cᵀ) up to a constant, of shape [...] for points [..., D].

    One Gaussian for all points; or, with loc [K, 1, D] and scales [K, ...], one for each row of points [K, P, D].
    """
    noise, log_determinant = standardized(blocks, loc, scales, points)
    return -(noise**2).sum(-1) / 2 - (log_determinant if loc.ndim == 1 else log_determinant[:, None])


def standardized(
    blocks: tuple[Block, ...], loc: Tensor, scales: tuple[Any, ...], points: Tensor
) -> tuple[Tensor, Tensor]:
    """ε = C⁻¹ (points − loc) of shape [..., D], and log |C|; one Gaussian or one for each row, as in `_log_density`."""

    def solve(factors: Tensor, columns: Tensor) -> Tensor:
        return solve_triangular(factors, columns, upper=False)

    batched = loc.ndim > 1
    blocks, scales = factored(blocks, scales)
    noise = _by_block(blocks, scales, points - loc, solve, lambda part, scale: part / scale, batched)
    log_determinant = sum(
        (scale.diagonal(dim1=-2, dim2=-1) if block.structure == "dense" else scale)
        .log()
        .reshape(*(scale.shape[:1] if batched else ()), -1)
        .sum(-1)
        for block, scale in zip(blocks, scales, strict=True)
    )
    return noise, torch.as_tensor(log_determinant)


def _groups(blocks: tuple[Block, ...]) -> Tensor:
    """A number for each coordinate, the same for those of one event of a block that is not mean field."""
    parts = []
    for block in blocks:
        event = block.shape[-1] if block.structure in ("dense", "low rank") else 1
        parts.append(block.start + torch.arange(block.size) // event)
    return torch.cat(parts)


def scaled(blocks: tuple[Block, ...], scales: tuple[Any, ...], noise: Tensor) -> Tensor:
    """C ε of shape [..., D]."""
    return _by_block(*factored(blocks, scales), noise, torch.matmul, lambda part, scale: part * scale)


def _by_block(
    blocks: tuple[Block, ...],
    scales: tuple[Any, ...],
    vectors: Tensor,
    dense: Callable[[Tensor, Tensor], Tensor],
    diagonal: Callable[[Tensor, Tensor], Tensor],
    batched: bool = False,
) -> Tensor:
    """A function of C and a vector, for vectors [..., D]: `dense` of matrices and columns, `diagonal` of rows."""
    rows = vectors if batched else vectors.reshape(1, -1, vectors.shape[-1])
    parts = []
    for block, scale in zip(blocks, scales, strict=True):
        part = rows[..., block.start : block.stop]
        if block.structure == "dense":
            size = scale.shape[-1]
            columns = part.mT.reshape(len(rows), block.size // size, size, part.shape[1])
            solved = dense(scale.reshape(len(rows) if batched else 1, block.size // size, size, size), columns)
            parts.append(solved.reshape(len(rows), block.size, part.shape[1]).mT)
        else:
            parts.append(diagonal(part, scale.reshape(len(rows), 1, -1) if batched else scale.reshape(-1)))
    return torch.cat(parts, -1).reshape(vectors.shape)


def _with_component(pool: Pool, blocks: tuple[Block, ...], loc: Tensor, scales: tuple[Any, ...], times: int) -> Tensor:
    """log (Σ_k q_k + n q) at every point, with q n `times`."""
    return torch.logaddexp(pool.log_mixture, _log_density(blocks, loc, scales, pool.points) + math.log(times))


def _thinned(pool: Pool, blocks: tuple[Block, ...]) -> Pool:
    """Without one pair in `FORGOTTEN`, of all ages alike.

    Early Gaussians are often wide, and bound the weights of the draws in the tails of the present one: without all of
    them at once, the estimate would jump.
    """
    pool = _with_rows(pool, torch.arange(pool.count, device=pool.points.device) % FORGOTTEN > 0)
    log_mixture = torch.full_like(pool.log_mixture, -torch.inf)
    for index, loc in enumerate(pool.locs):
        component = _log_density(blocks, loc, tuple(scale[index] for scale in pool.scales), pool.points)
        log_mixture = torch.logaddexp(log_mixture, component)
    return replace(pool, log_mixture=log_mixture)


def _with_rows(pool: Pool, rows: Any) -> Pool:
    """Some of the pairs; `log_mixture` has all components still."""
    return Pool(
        pool.points[rows],
        pool.values[rows],
        pool.gradients[rows],
        pool.hessians[rows],
        pool.log_mixture[rows],
        pool.locs[rows],
        tuple(scale[rows] for scale in pool.scales),
        pool.numbers[rows],
        pool.capacity,
    )
