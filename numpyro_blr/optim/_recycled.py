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
    """A step under way: a look at where it starts, then proposals, taken or refused, then steps on the pool alone.

    Attributes:
        here: where it is.
        start: where it started.
        first_rate: of the first proposal; `rate` is that of the next one.
        proposals: made so far until one was taken; `inner` steps since.
        looked: whether `start` is known; `taken`: whether a proposal was.
        going: whether to go on.
    """

    here: _Place
    start: _Place
    first_rate: Array
    rate: Array
    proposals: Array
    inner: Array
    looked: Array
    taken: Array
    going: Array


class _Place(NamedTuple):
    """A Gaussian, the pool's estimate there, and r² and V of it."""

    loc: Array
    precision: Precision
    moments: recycled.Moments
    residual: Array
    error: Array


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
    max_pairs, dtype = len(noise), state.loc.dtype
    num_drawn, pool, losses, usable = _fresh(state, objective, blocks, noise, temperature, forward)
    fresh = jnp.arange(max_pairs, dtype=jnp.int32) < recycling.num_pairs

    def noisy_and_first_rate(start: _Place) -> tuple[Array, Array]:
        noisy = start.residual < _rate.NOISE_RATIO * start.error
        cap = _cap(state.rate.noisy_steps + noisy.astype(jnp.int32), start.moments.effective, recycling.num_pairs)
        return noisy, jnp.minimum(state.rate.rate, jnp.where(start.residual > FAR, jnp.inf, cap))

    def attempt(search: _Search) -> _Search:
        """One turn; the first has a rate of zero, and so looks at the start: the estimate is compiled but once."""
        here, looked, taken = search.here, search.looked, search.taken
        rate = jnp.where(taken, INNER_RATE, search.rate)
        precision = here.precision.blend(here.moments.hessian, jnp.minimum(1, rate))
        loc = here.loc - rate * precision.solve(here.moments.gradient)
        scales = scales_of(precision, blocks, state.radius)
        moments = recycled.moments(pool, blocks, loc, scales)
        residual = _rate.squared_norm(moments.gradient, precision)
        there = _Place(loc, precision, moments, residual, recycled.squared_error(moments, precision))
        covered = moments.effective >= jnp.maximum(COVERED, here.moments.effective / 2)

        def not_worse() -> Array:
            return _rate.not_worse(losses, _losses(objective, loc, scales, noise, recycling.num_pairs), fresh)

        needless = covered | taken | ~looked
        accepted = covered | lax.cond(needless, lambda: jnp.zeros((), bool), not_worse)
        accepted = (accepted & all_finite(loc, precision, moments.gradient)) | ~looked
        proposals = search.proposals + (looked & ~taken).astype(jnp.int32)
        inner = search.inner + taken.astype(jnp.int32)
        settled = taken & (here.residual < SETTLED * here.error)
        again = jnp.where(
            accepted, covered & ~settled & (inner < MAX_INNER), ~taken & (proposals < _rate.MAX_PROPOSALS)
        )
        _, first_rate = noisy_and_first_rate(there)
        next_rate = jnp.where(accepted | taken, search.rate, _rate.CUT * search.rate)
        return _Search(
            here=select(accepted, there, here),
            start=select(looked, search.start, there),
            first_rate=jnp.where(looked, search.first_rate, first_rate),
            rate=jnp.where(looked, next_rate, first_rate),
            proposals=proposals,
            inner=inner,
            looked=jnp.ones((), bool),
            taken=looked & (taken | accepted),
            going=again | ~looked,
        )

    nothing, none, no = jnp.zeros((), dtype), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    here = _Place(state.loc, state.precision, _unknown(pool), state.residual, state.error)
    end = lax.while_loop(
        lambda search: search.going,
        attempt,
        _Search(here, here, nothing, nothing, none, none, no, no, going=usable),
    )

    start = end.start
    noisy, _ = noisy_and_first_rate(start)
    more = usable & (noisy | (end.proposals > 1) | ~end.taken)
    num_pairs = jnp.where(more, jnp.minimum(max_pairs, 2 * recycling.num_pairs), recycling.num_pairs)
    num_draws = (2 * num_drawn).astype(dtype)
    longest = jnp.where(start.residual > FAR, jnp.inf, 1)
    rate = _rate.next_rate(end.rate, end.first_rate, end.taken, end.proposals, longest)
    noisy_steps = state.rate.noisy_steps + noisy.astype(jnp.int32)
    rates = state.rate.after(rate, end.rate, noisy_steps, start.moments.gradient, end.taken)
    radius = jnp.where(end.taken, jnp.minimum(1, 2 * state.radius), jnp.where(usable, 1, 0.5) * state.radius)
    after = replace(  # where nothing was taken, `end.here` is the start
        state,
        loc=end.here.loc,
        precision=end.here.precision,
        recycling=Recycling(pool, num_pairs),
        rate=select(usable, rates, state.rate),
        radius=radius,
        skipped=state.skipped + (~usable).astype(jnp.int32),
        evaluations=state.evaluations + num_draws * (len(state.loc) + 1 + end.proposals.astype(dtype)),
        residual=start.residual,
        error=start.error,
    )
    return after, jnp.where(fresh[:, None], losses, 0).sum() / num_draws, end.taken


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
        return number + 1, pool, lax.dynamic_update_index_in_dim(losses, values, number, 0), finite

    nothing = jnp.zeros((len(noise), 2), state.loc.dtype)
    return lax.while_loop(
        lambda carry: (carry[0] < state.recycling.num_pairs) & carry[3],
        draw,
        (jnp.zeros((), jnp.int32), state.recycling.pool, nothing, jnp.ones((), bool)),
    )


def _unknown(pool: recycled.Pool) -> recycled.Moments:
    """Of the shapes of the pool's moments, all zeros: blended in at a rate of zero, it moves nothing."""
    size, dtype = pool.points.shape[-1], pool.points.dtype
    return recycled.Moments(
        weights=jnp.zeros_like(pool.values),
        effective=jnp.zeros((), dtype),
        gradient=jnp.zeros(size, dtype),
        hessian=jnp.zeros((size, size), dtype),
        deviations=jnp.zeros_like(pool.points),
    )


def _losses(objective: Objective, loc: Array, scales: tuple[Any, ...], noise: Array, num_pairs: Array) -> Array:
    """L at this step's draws, [K, 2]."""

    def at_pair(number: Array, losses: Array) -> Array:
        pair = jax.vmap(lambda draw: objective(loc, scales, {}, draw)[0])(Draws.at(_pair(noise[number])))
        return lax.dynamic_update_index_in_dim(losses, pair, number, 0)

    return lax.fori_loop(0, num_pairs, at_pair, jnp.zeros((len(noise), 2), loc.dtype))


def _pair(noise: Array) -> Array:
    """ε and −ε, [2, D]."""
    return jnp.stack([noise, -noise])


def _cap(noisy_steps: Array, effective: Array, num_pairs: Array) -> Array:
    """2/(n + 2), times the number of steps' draws that the estimate is worth; at most 1."""
    falling = 2 / (noisy_steps.astype(effective.dtype) + 2)
    return jnp.minimum(1, falling * effective / (2 * num_pairs).astype(effective.dtype))
