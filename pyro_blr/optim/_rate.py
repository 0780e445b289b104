"""The automatic learning rate: the longest step that the draws themselves support.

One step, given the estimate (g, H) at K antithetic pairs of draws and their losses:

1. Noise or progress? With residual r² = gᵀ S⁻¹ g (the natural gradient's Fisher norm) and V its Monte Carlo variance
   from the spread over pairs, a step with r² < 2 V is inside its noise. If it also takes back what the last ones did,
   dᵀ ḡ < 0 (Pflug 1990) with d = S⁻¹ g or as in `_newton.py` and ḡ ← 0.9 ḡ + 0.1 g, the n-th such step caps the rate at
   2 / (n + 2), which averages the noise away (Robbins & Monro 1951). One that goes on makes progress, however noisy,
   and takes 1/2 from n: among D coordinates of noise, a few along which there is far to go show in ḡ, and not in the
   step before. All draws of a step share one minibatch, whose noise V does not show: where a plate is subsampled,
   taking back is enough, and going on takes nothing from n. Where it has sites of its own, whose rows come every
   N/M-th step, that many steps count as one.
2. Propose with rate ρ; evaluate the loss around the proposed mean *at the same noise* and the same scales, of which ĝ
   is the gradient: what a few draws make of D new scales would be noise. Accept unless it is worse by more than one
   standard error of the paired difference; otherwise ρ ← 0.4 ρ and propose again, without new gradients. Of a few
   pairs of which one exploded the standard error is as large as the mean: more than r² + D nats are no noise.
3. Accepted at once: ρ ← min(1, 1.7 ρ) for the next step.

`_recycled.py` has a search of its own, in which proposals may need no evaluation, and are whole Gaussians: in up to 256
coordinates their scales are no noise. The other rules of this file are its, too.

On a quadratic the first proposal, ρ = 1, is the exact posterior and is accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Precision
from ..gradients import Estimate

__all__ = [
    "RateState",
    "averaged",
    "counted",
    "init",
    "next_rate",
    "not_worse",
    "opposed",
    "paired_difference",
    "residual_and_error",
    "search",
    "squared_norm",
]

CUT, GROW, MAX_PROPOSALS = 0.4, 1.7, 8
NOISE_RATIO, MEMORY, GOING_ON = 2.0, 0.9, 0.5


@dataclass(frozen=True)
class RateState:
    """Carried between steps.

    Attributes:
        rate: the rate that the next step tries first, if its cap lets it.
        taken: ρ of the last step that was accepted; NaN before the first.
        noisy_steps: n, steps so far that were inside their Monte Carlo error and took back what the last ones did, less
            half of those that were inside it and went on.
        rejected: steps so far of which no proposal was accepted.
        last_gradient: ḡ, [D]; with recycled draws E_q[g] of the step before, and a direction in λ for a member of
            another family.
    """

    rate: float
    taken: float
    noisy_steps: float
    rejected: int
    last_gradient: Any

    def after(self, rate: float, tried: float, noisy_steps: float, gradient: Any, accepted: bool) -> RateState:
        """The next state, after a step whose last proposal was at the rate `tried`."""
        taken = tried if accepted else self.taken
        rejected = self.rejected + (not accepted)
        return RateState(rate=rate, taken=taken, noisy_steps=noisy_steps, rejected=rejected, last_gradient=gradient)


def init(loc: Tensor) -> RateState:
    return RateState(rate=1.0, taken=math.nan, noisy_steps=0.0, rejected=0, last_gradient=torch.zeros_like(loc))


def search(
    state: RateState,
    losses: Tensor,
    noisy_steps: float,
    most: float,
    gradient: Any,
    propose: Callable[[float], tuple[Any, Tensor]],
) -> tuple[RateState, Any, bool, int]:
    """The accepted proposal.

    Args:
        losses: [S], where the step starts.
        noisy_steps: n, this step with the others.
        most: nats that may count as noise of the losses, r² + D.
        gradient: kept for the next step.
        propose: rate -> (proposal, losses [S] of the proposal at the same draws).

    Returns:
        the next rate state, the last proposal made, whether it was accepted, and how many were made.
    """
    rate = first_rate = min(state.rate, 2 / (noisy_steps + 2))
    accepted, tries = False, 0
    while not accepted and tries < MAX_PROPOSALS:
        rate = rate if tries == 0 else CUT * rate
        proposal, proposed = propose(rate)
        accepted, tries = not_worse(_by_pair(losses), _by_pair(proposed), most), tries + 1
    following = next_rate(rate, first_rate, accepted, tries)
    next_state = state.after(following, rate, noisy_steps, gradient, accepted)
    return next_state, proposal, accepted, tries


def next_rate(rate: float, first_rate: float, accepted: bool, tries: int, longest: float = 1.0) -> float:
    """What the next step tries first: more after a first proposal that was accepted, less after none."""
    if not accepted:
        return CUT * first_rate
    return min(longest, GROW * rate) if tries == 1 else rate


def squared_norm(gradient: Tensor, precision: Precision) -> Tensor:
    """gᵀ S⁻¹ g: the squared length of the natural gradient in the Fisher norm."""
    return gradient @ precision.solve(gradient)


def residual_and_error(estimate: Estimate, precision: Precision) -> tuple[float, float]:
    """(r², V): the squared natural gradient and its Monte Carlo variance, NaN of a single pair or draw."""
    num_pairs = len(estimate.pair_gradients)
    deviations = estimate.pair_gradients - estimate.gradient
    spread = (deviations * precision.solve(deviations)).sum()
    error = float(spread) / (num_pairs * (num_pairs - 1)) if num_pairs > 1 else math.nan
    return float(squared_norm(estimate.gradient, precision)), error


def opposed(direction: Tensor, last_gradient: Tensor) -> bool:
    """dᵀ ḡ < 0: whether this step, along d = S⁻¹ g, takes back what the last ones did."""
    return bool(direction @ last_gradient < 0)


def counted(state: RateState, inside: bool, opposed: bool, minibatch: bool, weight: Tensor) -> float:
    """n after a step that was inside its noise, or not, and opposed the last ones, or went on.

    Args:
        minibatch: whether a plate is subsampled.
        weight: [D], N/M for a row of it that is in the batch.
    """
    if minibatch:
        return state.noisy_steps + opposed / max(1.0, float(weight.max()))
    return max(0.0, state.noisy_steps + (1.0 if opposed else -GOING_ON)) if inside else state.noisy_steps


def averaged(last_gradient: Tensor, gradient: Tensor, precision: Precision) -> Tensor:
    """ḡ of the next step; what it was is no longer than the gradient, so that one of far away is soon forgotten."""
    before, now = float(squared_norm(last_gradient, precision)), float(squared_norm(gradient, precision))
    shorter = (now / before) ** 0.5 if before > now else 1.0
    return MEMORY * shorter * last_gradient + (1 - MEMORY) * gradient


def not_worse(before: Tensor, after: Tensor, most: float) -> bool:
    """Whether the mean paired difference is at most its standard error, and rounding where there is none.

    Args:
        before, after: losses at antithetic pairs, [K, 2].
        most: that the standard error counts for.
    """
    change, error = paired_difference(before, after)
    rounding = 64 * torch.finfo(before.dtype).eps * before.abs().mean()
    return bool(after.isfinite().all() & (change <= error.clamp(max=most) + rounding))


def paired_difference(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of after − before, [K, 2], and its standard error: 0 of one pair."""
    change = (after - before).mean(1)
    return change.mean(), change.std(correction=0) / max(len(change) - 1, 1) ** 0.5


def _by_pair(losses: Tensor) -> Tensor:
    return losses.reshape(2, -1).T
