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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from ..families import Block
from ._estimate import AtPoints, Draws, Estimate, Extras, Objective, at_every_draw, average_over_pairs
from .recycled import scaled

__all__ = ["SHARE", "Chords", "chords", "gradients_at", "secant"]

SHARE = 0.25  # θ
POINT = 0.003  # in place of √θ C for a point, and for a site whose covariance is not learned: H at the draw, nearly


class Chords(NamedTuple):
    """Between which points the secants of K pairs of draws are taken, or of S draws.

    Attributes:
        beside: η, [K, D].
        along: x, [K, P], in each of P directions.
    """

    beside: Tensor
    along: Tensor

    def mirrored(self, dim: int = 0) -> Chords:
        """Those of both draws of each pair, the first of all in front, or each after the other where `dim` is 1."""
        pairs = torch.stack([self.beside, -self.beside], dim), torch.stack([self.along, self.along], dim)
        return Chords(*(pair.flatten(0, 1) for pair in pairs))


def chords(generator: torch.Generator, num_pairs: int, num_directions: int, like: Tensor) -> Chords:
    """η ~ N(0, I), and x ~ χ₃ as the length of three normals."""
    options: Any = {"generator": generator, "dtype": like.dtype, "device": like.device}
    beside = torch.randn(num_pairs, *like.shape, **options)
    return Chords(beside, torch.linalg.vector_norm(torch.randn(num_pairs, num_directions, 3, **options), dim=-1))


def secant(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
    blocks: tuple[Block, ...],
) -> Estimate:
    """E_q[g] at the given draws, and E_q[∇²ℓ], or its diagonal where the draws have probes."""
    inner, outer = math.sqrt(1 - SHARE), math.sqrt(SHARE)
    reach = tuple(
        loc.new_full(block.shape, POINT) if scale is None else outer * scale
        for block, scale in zip(blocks, scales, strict=True)
    )
    moving = torch.cat(
        [
            torch.full((block.size,), scale is not None, device=loc.device)
            for block, scale in zip(blocks, scales, strict=True)
        ]
    )
    assert draws.chords is not None  # the rule makes them for this estimator
    eta, x = draws.chords
    identity = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
    probes = identity.expand(len(eta), *identity.shape) if draws.probes is None else draws.probes
    lengths = torch.linalg.vector_norm(probes, dim=-1, keepdim=True)
    units = probes / lengths  # u, [S, P, D]
    off = eta[:, None] - units * torch.einsum("spd,sd->sp", units, eta)[..., None]
    ways = [torch.where(moving, off, 0) + way * units for way in (x[..., None], -x[..., None])]
    ends = loc + scaled(blocks, reach, torch.stack(ways, 1))  # z₊ and z₋ but for C √(1 − θ) e, [S, 2, P, D]
    narrowed = tuple(None if scale is None else inner * scale for scale in scales)

    (losses, gradients), extras = gradients_at(objective, loc, scales, others, draws, loc.expand(len(eta), 1, -1))
    (_, at_ends), _ = gradients_at(objective, loc, narrowed, others, draws, ends.flatten(1, 2))
    upper, lower = at_ends.reshape(ends.shape).unbind(1)
    products = lengths * (upper - lower) / (2 * x[..., None])  # √θ H C u, of the probes u
    if draws.probes is None:
        columns = scaled(blocks, reach, identity)  # √θ Cᵀ, and the products are √θ Cᵀ H
        matrices = solve_triangular(columns, products, upper=True)
        curvatures = (matrices + matrices.mT) / 2
    else:
        curvatures = (probes * products).sum(1) / scaled(blocks, reach, torch.ones_like(loc))
    return average_over_pairs(losses[:, 0], gradients[:, 0], curvatures, extras, 1 + 2 * x.shape[1])


def gradients_at(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    others: Any,
    draws: Draws,
    points: Tensor,
) -> tuple[tuple[Tensor, ...], Extras]:
    """(L [S, P], g [S, P, D]) with `points` [S, P, D] for m, at the noise of each draw, and the extras of the first."""

    def at_draw(draw: Draws):
        here = draw.probes  # the draw's row of `points`, which the loss itself does not look at
        assert here is not None
        if isinstance(objective, AtPoints) and len(here) > 1:
            at_once = objective.at_points(here, scales, draw)
            if at_once is not None:
                return *at_once, Extras(None)
        found: list[tuple[Tensor, Tensor]] = []
        for point in here:
            location = point.detach().requires_grad_()
            with torch.enable_grad():
                loss, extras = objective(location, scales, others, draw)
                (gradient,) = torch.autograd.grad(loss, location, materialize_grads=True)
            found.append((loss.detach(), gradient))
        losses, gradients = zip(*found, strict=True)
        return torch.stack(losses), torch.stack(gradients), extras

    return at_every_draw(objective, _at_points, at_draw, loc, scales, draws._replace(probes=points), points)


def _at_points(loss: Callable[..., Tensor], _: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(L, g) of one draw at each of some points."""

    def at_draw(loc: Tensor, scales: tuple[Tensor | None, ...], points: Tensor):
        gradients, values = torch.func.vmap(torch.func.grad_and_value(loss), (0, None))(points, scales)
        return values, gradients

    return at_draw
