"""Extrapolation along the drift of the steps.

The fixed-point map (m, S) ↦ (m − S⁻¹ ĝ, Ĥ) contracts slowly along some directions, as EM does where much is missing: a
scale and what it scales. One step after the other goes the same way then, each a small part of it. The moves of the
steps, averaged,

    Δ̄ ← 0.8 Δ̄ + 0.2 Δ,        Δ = (Δm, ΔS),

keep that direction and lose their noise. Where there is such a drift, Δ̄mᵀ S Δ̄m > max(V/200, 10⁻⁶), a step begins with
κ of them,

    m + κ Δ̄m,        L exp(κ L⁻¹ Δ̄S L⁻ᵀ) Lᵀ,        S = L Lᵀ, the eigenvalues of the exponent within ±1,

if that lowers the loss E_q[ℓ]/τ − H(q) at the draws of this step, of which nothing has been estimated yet, by more than
two standard errors of the paired difference. κ ← 3/2 κ where it does, at most 30, and κ/2 where not, at least 1/2. It
costs losses, no gradients. V is that of the last step's natural gradient.

Source: Varadhan & Roland 2008 extrapolate EM so, from two steps without noise; the average and the test are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..families import DensePrecision

__all__ = ["Drift", "averaged", "init", "is_there", "judged", "proposal"]

MEMORY, LEAST, NEGLIGIBLE = 0.8, 1 / 200, 1e-6  # nats
GROW, CUT, LONGEST, SHORTEST = 1.5, 0.5, 30.0, 0.5
CERTAIN = 2.0  # standard errors


@dataclass(frozen=True)
class Drift:
    """Carried between steps.

    Attributes:
        loc_move: Δ̄m, [D].
        precision_move: Δ̄S, [D, D].
        reach: κ.
    """

    loc_move: Tensor
    precision_move: Tensor
    reach: float


def init(loc: Tensor) -> Drift:
    return Drift(torch.zeros_like(loc), loc.new_zeros(len(loc), len(loc)), 1.0)


def averaged(drift: Drift, loc_move: Tensor, precision_move: Tensor) -> Drift:
    """After a step."""
    return replace(
        drift,
        loc_move=MEMORY * drift.loc_move + (1 - MEMORY) * loc_move,
        precision_move=MEMORY * drift.precision_move + (1 - MEMORY) * precision_move,
    )


def is_there(drift: Drift, precision: DensePrecision, error: float) -> bool:
    """Whether Δ̄mᵀ S Δ̄m > max(V/200, 10⁻⁶)."""
    length = float(drift.loc_move @ precision.matrix @ drift.loc_move)
    return length > LEAST * error and length > NEGLIGIBLE


def proposal(drift: Drift, loc: Tensor, precision: DensePrecision) -> tuple[Tensor, DensePrecision]:
    """(m, S), κ moves on."""
    factor, failed = torch.linalg.cholesky_ex(precision.matrix)
    half = torch.linalg.solve_triangular(factor, drift.precision_move, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
    if failed or not whitened.isfinite().all():
        return loc, precision.at(torch.full_like(factor, torch.nan))  # which is refused; `eigh` would raise
    eigenvalues, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    root = factor @ (vectors * ((drift.reach * eigenvalues).clamp(-1, 1) / 2).exp())
    return loc + drift.reach * drift.loc_move, precision.at(root @ root.T)


def judged(drift: Drift, change: Tensor, error: Tensor) -> tuple[bool, Drift]:
    """Whether the change of the loss is down beyond its standard error; and the next κ."""
    lower = bool(change + CERTAIN * error < 0)
    reach = min(GROW * drift.reach, LONGEST) if lower else max(CUT * drift.reach, SHORTEST)
    return lower, replace(drift, reach=reach)
