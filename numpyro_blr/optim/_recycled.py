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

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..families import Block, Precision
from ..gradients import Draws, Objective, hessians_at, recycled
from . import _rate
from ._gaussian import State, all_finite, scales_of, select

__all__ = ["Recycling", "init", "step"]

MAX_NUMBERS = 2**22  # of the Hessians that are kept
MAX_PAIRS = 256
COVERED = 16.0
INNER_RATE, MAX_INNER, SETTLED = 0.5, 20, 0.01
FAR = 1e12  # r²


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recycling:
    """Carried between steps.

    Attributes:
        pool: the draws.
        num_pairs: that the next step draws.
    """

    pool: recycled.Pool
    num_pairs: Array


def init(loc: Array, scales: tuple[Any, ...]) -> Recycling:
    """No draws yet, and room for 512, or as many as have four million numbers in their Hessians."""
    num_pairs = min(MAX_PAIRS, max(8, MAX_NUMBERS // (2 * len(loc) ** 2)))
    return Recycling(pool=recycled.init(num_pairs, loc, scales), num_pairs=jnp.ones((), jnp.int32))


class _Search(NamedTuple):
    """A step under way: proposals, taken or refused, and then steps on the pool alone.

    Attributes:
        loc, precision, moments: where it is, and the pool's estimate there.
        rate: of the next proposal.
        proposals: made so far until one was taken; `inner` steps since.
        taken: whether one was.
        going: whether to go on.
    """

    loc: Array
    precision: Precision
    moments: recycled.Moments
    rate: Array
    proposals: Array
    inner: Array
    taken: Array
    going: Array


def step(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    noise: Array,
    temperature: float = 1.0,
    *,
    forward: bool = False,
) -> tuple[State, Array, Array]:
    """One step.

    Args:
        objective: E_q[ℓ]/τ − H(q) at a noise ε, see `gradients/_estimate.py`.
        noise: ε of as many pairs as a step may draw, [K, D]; the first `num_pairs` are used.

    Returns:
        the next state, the loss averaged over the fresh draws, and whether the Gaussian moved. Where the loss, a
        gradient or a Hessian is not finite at a fresh draw, nothing moves, and the next draws are taken closer to m.
    """
    recycling: Recycling = state.recycling
    max_pairs = len(noise)
    num_drawn, pool, losses, usable = _fresh(state, objective, blocks, noise, temperature, forward)
    fresh = jnp.arange(max_pairs, dtype=jnp.int32) < recycling.num_pairs

    def estimate(loc: Array, precision: Precision) -> recycled.Moments:
        return recycled.moments(pool, blocks, loc, scales_of(precision, blocks, state.radius))

    here = estimate(state.loc, state.precision)
    residual = _rate.squared_norm(here.gradient, state.precision)
    error = recycled.squared_error(here, state.precision)
    noisy = residual < _rate.NOISE_RATIO * error
    noisy_steps = state.rate.noisy_steps + noisy.astype(jnp.int32)
    far = residual > FAR
    longest = jnp.where(far, jnp.inf, _cap(noisy_steps, here.effective, recycling.num_pairs))
    first_rate = jnp.minimum(state.rate.rate, longest)

    def attempt(search: _Search) -> _Search:
        now = search.moments
        rate = jnp.where(search.taken, jnp.asarray(INNER_RATE, search.rate.dtype), search.rate)
        precision = search.precision.blend(now.hessian, jnp.minimum(1, rate))
        loc = search.loc - rate * precision.solve(now.gradient)
        there = estimate(loc, precision)
        covered = there.effective >= jnp.maximum(COVERED, now.effective / 2)

        def not_worse() -> Array:
            scales = scales_of(precision, blocks, state.radius)
            return _rate.not_worse(losses, _losses(objective, loc, scales, noise, recycling.num_pairs), fresh)

        refused = jnp.zeros((), bool)
        accepted = covered | lax.cond(covered | search.taken, lambda: refused, not_worse)
        accepted &= all_finite(loc, precision, there.gradient)
        settled = search.taken & (
            _rate.squared_norm(now.gradient, search.precision) < SETTLED * recycled.squared_error(now, search.precision)
        )
        proposals = search.proposals + (~search.taken).astype(jnp.int32)
        inner = search.inner + search.taken.astype(jnp.int32)
        again = jnp.where(
            accepted, covered & ~settled & (inner < MAX_INNER), ~search.taken & (proposals < _rate.MAX_PROPOSALS)
        )
        loc, precision, there = select(accepted, (loc, precision, there), (search.loc, search.precision, now))
        next_rate = jnp.where(accepted | search.taken, search.rate, _rate.CUT * search.rate)
        return _Search(loc, precision, there, next_rate, proposals, inner, search.taken | accepted, again)

    zero, no = jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    start = _Search(state.loc, state.precision, here, first_rate, zero, zero, no, usable)
    end = lax.while_loop(lambda search: search.going, attempt, start)

    more = usable & (noisy | (end.proposals > 1) | ~end.taken)
    num_pairs = jnp.where(more, jnp.minimum(max_pairs, 2 * recycling.num_pairs), recycling.num_pairs)
    num_draws = (2 * num_drawn).astype(state.loc.dtype)
    rate = _rate.next_rate(end.rate, first_rate, end.taken, end.proposals, jnp.where(far, jnp.inf, 1))
    kept = replace(
        state,
        recycling=Recycling(pool, num_pairs),
        evaluations=state.evaluations + num_draws * (len(state.loc) + 1 + end.proposals.astype(num_draws.dtype)),
        residual=residual,
        error=error,
    )
    rejected = replace(kept, rate=state.rate.after(rate, end.rate, noisy_steps, here.gradient, end.taken))
    moved = replace(rejected, loc=end.loc, precision=end.precision, radius=jnp.minimum(1, 2 * state.radius))
    unusable = replace(kept, radius=state.radius / 2, skipped=state.skipped + 1)
    loss = jnp.where(fresh[:, None], losses, 0).sum() / num_draws
    return select(end.taken & usable, moved, select(usable, rejected, unusable)), loss, end.taken & usable


def _fresh(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    noise: Array,
    temperature: float,
    forward: bool,
) -> tuple[Array, recycled.Pool, Array, Array]:
    """Pairs up to the first that is not finite, the pool with them, their losses [K, 2], and whether there is none."""
    scales = scales_of(state.precision, blocks, state.radius)
    _, log_determinant = recycled.standardized(blocks, state.loc, scales, state.loc)
    constant = log_determinant + len(state.loc) * jnp.log(2 * jnp.pi) / (2 * temperature)

    def draw(carry):
        number, pool, losses, _ = carry
        pair = _pair(noise[number])
        hessians, values, gradients, _, _ = hessians_at(
            objective, state.loc, scales, {}, Draws.at(pair), forward=forward
        )
        energies = values + constant + (pair**2).sum(-1) / (2 * temperature)  # ℓ/τ
        finite = all_finite(values, gradients, hessians)
        pool = lax.cond(
            finite,
            lambda pool: recycled.append(pool, blocks, state.loc, scales, pair, energies, gradients, hessians),
            lambda pool: pool,
            pool,
        )
        return number + 1, pool, losses.at[number].set(values), finite

    nothing = jnp.zeros((len(noise), 2), state.loc.dtype)
    return lax.while_loop(
        lambda carry: (carry[0] < state.recycling.num_pairs) & carry[3],
        draw,
        (jnp.zeros((), jnp.int32), state.recycling.pool, nothing, jnp.ones((), bool)),
    )


def _losses(objective: Objective, loc: Array, scales: tuple[Any, ...], noise: Array, num_pairs: Array) -> Array:
    """L at this step's draws, [K, 2]."""

    def at_pair(number: Array, losses: Array) -> Array:
        pair = jax.vmap(lambda draw: objective(loc, scales, {}, draw)[0])(Draws.at(_pair(noise[number])))
        return losses.at[number].set(pair)

    return lax.fori_loop(0, num_pairs, at_pair, jnp.zeros((len(noise), 2), loc.dtype))


def _pair(noise: Array) -> Array:
    """ε and −ε, [2, D]."""
    return jnp.stack([noise, -noise])


def _cap(noisy_steps: Array, effective: Array, num_pairs: Array) -> Array:
    """2/(n + 2), times the number of steps' draws that the estimate is worth; at most 1."""
    falling = 2 / (noisy_steps.astype(effective.dtype) + 2)
    return jnp.minimum(1, falling * effective / (2 * num_pairs).astype(effective.dtype))
