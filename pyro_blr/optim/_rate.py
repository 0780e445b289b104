"""The automatic learning rate: the longest step that the draws themselves support.

One step, given the estimate (g, H) at K antithetic pairs of draws and their losses:

1. Inside the noise? With residual r² = gᵀ S⁻¹ g (the natural gradient's Fisher norm) and V its Monte Carlo variance
   from the spread over pairs, a step with r² < 2 V moves by noise and not by progress. The n-th such step caps the
   rate at 2 / (n + 2), which averages the noise away (Robbins & Monro 1951); steps that still make progress do not
   lower the cap, however many they are. All draws of a step share one minibatch, whose noise V does not show: where
   a plate is subsampled, a natural gradient opposed to the last one counts as well (Pflug 1990).
2. Propose with rate ρ; evaluate the loss of the proposal *at the same noise*. Accept it unless it is worse by more
   than one standard error of the paired difference; otherwise ρ ← 0.4 ρ and propose again, without new gradients.
3. Accepted at once: ρ ← min(1, 1.7 ρ) for the next step.

On a quadratic the first proposal, ρ = 1, is the exact posterior and is accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..families import Precision
from ..gradients import Estimate

__all__ = ["RateState", "init", "search"]

CUT, GROW, MAX_PROPOSALS = 0.4, 1.7, 8
NOISE_RATIO = 2.0


@dataclass(frozen=True)
class RateState:
    """Carried between steps.

    Attributes:
        rate: the rate that the next step tries first.
        noisy_steps: n, steps so far whose residual was inside its own Monte Carlo error.
        rejected: steps so far of which no proposal was accepted.
        last_gradient: E_q[g] of the step before, [D].
    """

    rate: float
    noisy_steps: int
    rejected: int
    last_gradient: Any


def init(loc: Tensor) -> RateState:
    return RateState(rate=1.0, noisy_steps=0, rejected=0, last_gradient=torch.zeros_like(loc))


def search(
    state: RateState, losses: Tensor, noisy: bool, gradient: Any, propose: Callable[[float], tuple[Any, Tensor]]
) -> tuple[RateState, Any, bool]:
    """The accepted proposal.

    Args:
        losses: [S], where the step starts.
        noisy: whether the natural gradient tells nothing but noise.
        gradient: kept for the next step.
        propose: rate -> (proposal, losses [S] of the proposal at the same draws).

    Returns:
        the next rate state, the last proposal made, and whether it was accepted.
    """
    noisy_steps = state.noisy_steps + noisy
    rate = first_rate = min(state.rate, 2 / (noisy_steps + 2))
    for tries in range(MAX_PROPOSALS):
        rate = rate if tries == 0 else CUT * rate
        proposal, proposed = propose(rate)
        if not_worse(losses, proposed):
            next_rate = min(1.0, GROW * rate) if tries == 0 else rate
            return RateState(next_rate, noisy_steps, state.rejected, gradient), proposal, True
    return RateState(CUT * first_rate, noisy_steps, state.rejected + 1, gradient), proposal, False


def inside_noise(estimate: Estimate, precision: Precision) -> bool:
    """r² < 2 V: whether the natural gradient is indistinguishable from its Monte Carlo error."""
    num_pairs = len(estimate.pair_gradients)
    deviations = estimate.pair_gradients - estimate.gradient
    spread = sum(vector @ precision.solve(vector) for vector in deviations)
    residual = estimate.gradient @ precision.solve(estimate.gradient)
    return bool(residual < NOISE_RATIO * spread / (num_pairs * (num_pairs - 1)))


def opposed(estimate: Estimate, precision: Precision, last_gradient: Tensor) -> bool:
    """gᵀ S⁻¹ g_last < 0: whether this step takes back what the last one did."""
    return bool(estimate.gradient @ precision.solve(last_gradient) < 0)


def not_worse(before: Tensor, after: Tensor) -> bool:
    """Mean paired difference at most its standard error, and at most rounding where there is none."""
    num_pairs = len(before) // 2
    change = after - before
    change = (change[:num_pairs] + change[num_pairs:]) / 2
    error = change.std(correction=0) / (num_pairs - 1) ** 0.5
    rounding = 64 * torch.finfo(before.dtype).eps * before.abs().mean()
    return bool(after.isfinite().all() & (change.mean() <= error + rounding))
