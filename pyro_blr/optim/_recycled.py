"""The automatic step on recycled draws: more than one step of the rule for the price of one.

One step, from N(m, S⁻¹) and the pool of earlier draws (`gradients/recycled.py`):

1. Draw a few antithetic pairs, with their Hessians, into the pool: at first one pair a step; twice as many, up to
   `num_draws`, from then on whenever the natural gradient is inside its own error or a proposal is refused.
2. A step of the rule with ĝ and Ĥ of the whole pool. The pool *covers* a proposal if it is worth half as many draws
   there as here, and at least 16. One that is covered is taken as it is: the estimate holds there. Any other is tried
   at the fresh draws, and its rate shortened as `_rate.py` does.
3. Steps at ρ = 1/2 on the pool alone, each with its own ĝ and Ĥ, while the pool covers them and until they move by a
   tenth of their own error: no evaluation of the model. They run along the slow directions of the fixed-point map
   (the scale of a hierarchy and what it scales), which would cost a stochastic step each.

The n-th step whose natural gradient is inside its error caps the rate at 2 / (n + 2) as in `_rate.py`, times the draws
that the pool is worth over the draws of a step: where the pool averages the noise away, the rate need not. Only beyond
r² = 1e12 may the mean, and the mean alone, move further than a Newton step, which on the slope of an exponential is one
unit: a start at a log density of −1e100 would take as many steps as it has powers of e.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..families import Block, Precision
from ..gradients import Draws, Objective, hessians_at, recycled
from . import _rate
from ._gaussian import State, all_finite, losses_at, scales_of

__all__ = ["Recycling", "init", "step"]

MAX_NUMBERS = 2**22  # of the Hessians that are kept
MAX_PAIRS = 256
COVERED = 16.0
INNER_RATE, MAX_INNER, SETTLED = 0.5, 20, 0.01
FAR = 1e12  # r²


@dataclass(frozen=True)
class Recycling:
    """Carried between steps.

    Attributes:
        pool: the draws.
        num_pairs: that the next step draws.
    """

    pool: recycled.Pool
    num_pairs: int


def init(loc: Tensor, scales: tuple[Any, ...]) -> Recycling:
    """No draws yet, and room for 512, or as many as have four million numbers in their Hessians."""
    num_pairs = min(MAX_PAIRS, max(8, MAX_NUMBERS // (2 * len(loc) ** 2)))
    return Recycling(pool=recycled.init(num_pairs, loc, scales), num_pairs=1)


class _Search(NamedTuple):
    """A step under way: proposals, taken or refused, and then steps on the pool alone.

    Attributes:
        loc, precision, moments: where it is, and the pool's estimate there.
        rate: of the next proposal.
        proposals: made so far until one was taken; `inner` steps since.
        taken: whether one was.
        going: whether to go on.
    """

    loc: Tensor
    precision: Precision
    moments: recycled.Moments
    rate: float
    proposals: int
    inner: int
    taken: bool
    going: bool


def step(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    noise: Tensor,
    temperature: float = 1.0,
) -> tuple[State, Tensor, bool]:
    """One step.

    Args:
        objective: E_q[ℓ]/τ − H(q) at a noise ε, see `gradients/_estimate.py`.
        noise: ε of as many pairs as a step may draw, [K, D]; the first `num_pairs` are used.

    Returns:
        the next state, the loss averaged over the fresh draws, and whether the Gaussian moved. Where the loss, a
        gradient or a Hessian is not finite at a fresh draw, nothing moves, and the next draws are taken closer to m.
    """
    recycling: Recycling = state.recycling
    draws = [Draws.at(torch.stack([row, -row])) for row in noise[: recycling.num_pairs]]
    pool, losses, usable = _fresh(state, objective, blocks, draws, temperature)

    def estimate(loc: Tensor, precision: Precision) -> recycled.Moments:
        return recycled.moments(pool, blocks, loc, scales_of(precision, blocks, state.radius))

    if not usable:
        kept = replace(
            state,
            recycling=replace(recycling, pool=pool),
            radius=state.radius / 2,
            skipped=state.skipped + 1,
            evaluations=state.evaluations + losses.numel() * (len(state.loc) + 1),
        )
        return kept, losses.mean(), False
    here = estimate(state.loc, state.precision)
    residual = float(_rate.squared_norm(here.gradient, state.precision))
    error = recycled.squared_error(here, state.precision)
    noisy = residual < _rate.NOISE_RATIO * error
    noisy_steps = state.rate.noisy_steps + noisy
    far = residual > FAR
    longest = math.inf if far else _cap(noisy_steps, here.effective, recycling.num_pairs)
    first_rate = min(state.rate.rate, longest)

    def attempt(search: _Search) -> _Search:
        now = search.moments
        rate = INNER_RATE if search.taken else search.rate
        precision = search.precision.blend(now.hessian, min(1.0, rate))
        loc = search.loc - rate * precision.solve(now.gradient)
        finite = all_finite(loc, precision.solve(loc), *scales_of(precision, blocks, state.radius))
        there = estimate(loc, precision) if finite else now
        covered = finite and there.effective >= max(COVERED, now.effective / 2)

        def not_worse() -> bool:
            scales = scales_of(precision, blocks, state.radius)
            after = [losses_at(objective, loc, scales, None, pair) for pair in draws]
            return _rate.not_worse(losses, torch.stack(after))

        accepted = covered or (not search.taken and finite and not_worse())
        accepted = accepted and all_finite(there.gradient)
        settled = search.taken and float(_rate.squared_norm(now.gradient, search.precision)) < (
            SETTLED * recycled.squared_error(now, search.precision)
        )
        proposals, inner = search.proposals + (not search.taken), search.inner + search.taken
        if not accepted:
            again = not search.taken and proposals < _rate.MAX_PROPOSALS
            shorter = search.rate if search.taken else _rate.CUT * search.rate
            return search._replace(rate=shorter, proposals=proposals, inner=inner, going=again)
        again = covered and not settled and inner < MAX_INNER
        return _Search(loc, precision, there, search.rate, proposals, inner, True, again)

    end = _Search(state.loc, state.precision, here, first_rate, 0, 0, False, True)
    while end.going:
        end = attempt(end)

    more = noisy or end.proposals > 1 or not end.taken
    num_pairs = min(len(noise), 2 * recycling.num_pairs) if more else recycling.num_pairs
    rate = _rate.next_rate(end.rate, first_rate, end.taken, end.proposals, math.inf if far else 1.0)
    kept = replace(
        state,
        recycling=Recycling(pool, num_pairs),
        evaluations=state.evaluations + 2 * recycling.num_pairs * (len(state.loc) + 1 + end.proposals),
        residual=residual,
        error=error,
        rate=state.rate.after(rate, end.rate, noisy_steps, here.gradient, end.taken),
    )
    moved = replace(kept, loc=end.loc, precision=end.precision, radius=min(1.0, 2 * state.radius))
    return (moved if end.taken else kept), losses.mean(), end.taken


def _fresh(
    state: State, objective: Objective, blocks: tuple[Block, ...], draws: list[Draws], temperature: float
) -> tuple[recycled.Pool, Tensor, bool]:
    """The pool with this step's pairs, their losses up to the first that is not finite, and whether there is none."""
    scales = scales_of(state.precision, blocks, state.radius)
    _, log_determinant = recycled.standardized(blocks, state.loc, scales, state.loc)
    constant = log_determinant + len(state.loc) * math.log(2 * math.pi) / (2 * temperature)
    pool, losses = state.recycling.pool, []
    for pair in draws:
        hessians, values, gradients, _ = hessians_at(objective, state.loc, scales, None, pair)
        losses.append(values)
        if not all_finite(values, gradients, hessians):
            return pool, torch.stack(losses), False
        assert pair.noise is not None
        energies = values + constant + (pair.noise**2).sum(-1) / (2 * temperature)  # ℓ/τ
        pool = recycled.append(pool, blocks, state.loc, scales, pair.noise, energies, gradients, hessians)
    return pool, torch.stack(losses), True


def _cap(noisy_steps: int, effective: float, num_pairs: int) -> float:
    """2/(n + 2), times the number of steps' draws that the estimate is worth; at most 1."""
    return min(1.0, 2 / (noisy_steps + 2) * effective / (2 * num_pairs))
