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

import torch
from torch import Tensor

__all__ = ["Kinks", "missing", "outer_products"]

CERTAIN, DOUBTFUL, BEYOND_DOUBT, NEGATIVE, NEGLIGIBLE = 3.0, 4.0, 16.0, 4.0, 1e-3
FEW, MIN_PAIRS = 32.0, 3.0  # draws, or twice the coordinates; pairs


class Kinks(NamedTuple):
    """C⁻ᵀ T C⁻¹, [D, D], and V of the elements of T, zero for those that are T⁰."""

    curvature: Tensor
    variance: Tensor


def missing(
    weights: Tensor,
    noise: Tensor,
    stein: Tensor,
    rest: Tensor,
    hessian: Tensor,
    factor: Tensor,
    effective: float,
) -> Kinks:
    """T of all draws.

    Args:
        weights: w_j, [K, 2].
        noise, stein, rest: ε_j, M⁻¹ (ε_j − ε̄), r_j, [K, 2, D].
        hessian: Ĥ, [D, D].
        factor: Cᵀ, [D, D].
        effective: n, the draws that these are worth.
    """
    size, num_pairs, nothing = len(factor), effective / 2, torch.zeros_like(factor)
    odd = (rest[:, 0] - rest[:, 1]) / 2
    if not float((weights.sum(1) * (odd**2).sum(-1)).sum()) / 4 > NEGLIGIBLE:
        return Kinks(nothing, nothing)

    stein, moment = weights[..., None] * stein, outer_products(weights[..., None] * noise, noise)
    total = _symmetric(outer_products(stein, rest))
    left = rest - noise @ total if effective > 2 * size else rest
    first, second = [0, 0, 1, 1], [0, 1, 0, 1]  # two draws of one pair
    alike = outer_products(stein[:, first] * stein[:, second], left[:, first] * left[:, second])
    crossed = outer_products(stein[:, first] * left[:, second], left[:, first] * stein[:, second])
    variance = (_symmetric(alike) + crossed) / 2 * num_pairs / max(num_pairs - MIN_PAIRS, 0.5)

    lacking = float((weights[..., None] * noise * rest).sum())
    present = float((factor @ hessian @ factor.mT * moment).sum())
    few = effective < max(FEW, 2 * size)
    average = lacking / float(moment.trace()) if few and lacking > abs(present) else 0.0
    centre = average * torch.eye(size).to(factor)
    away, enough = total - centre, num_pairs > MIN_PAIRS
    diagonal = torch.eye(size, dtype=torch.bool, device=total.device)
    no_doubt = BEYOND_DOUBT + 2 * math.log(size)
    kinked = bool((diagonal & (away > 0) & (away**2 > no_doubt * variance)).any())
    usual = CERTAIN if kinked else DOUBTFUL + 2 * math.log(size * (size + 1) / 2)
    level = torch.where(diagonal & (away < 0), NEGATIVE * no_doubt, usual)
    certain = (away**2 > level * variance) & enough
    kept = 1 - (level * variance / away**2) ** 3
    curvature = centre + torch.where(certain, kept * away, 0)
    solved = torch.linalg.solve(factor, torch.linalg.solve(factor, curvature).mT)
    if not solved.isfinite().all():  # where squares of gradients overflow, far from everything
        return Kinks(nothing, nothing)
    return Kinks(solved, torch.where(certain, variance, 0))


def outer_products(left: Tensor, right: Tensor) -> Tensor:
    """Σ over draws of the outer products of their rows, [D, D]."""
    return left.flatten(0, 1).mT @ right.flatten(0, 1)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
