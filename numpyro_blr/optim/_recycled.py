"""The automatic step on recycled draws: more than one step of the rule for the price of one.

One step, from N(m, S⁻¹) and the pool of earlier draws (`gradients/recycled.py`), which is emptied where the model's
arguments are not those of the last step: the draws are of another ℓ, and as between minibatches a step that takes back
what the last one did is noise.

0. Begin further along the drift of the last steps, if there is one and the draws of this step are for it (`_drift.py`).
   It is followed once sixteen pairs are there, and while they are worth less than 2 D draws, with which 3 does not get
   along.
1. Draw a few antithetic pairs into the pool, with their Hessians, or secants while these miss curvature (`_missed.py`),
   each pair at right angles to the ones before it (`gradients/orthogonal.py`; V does not know it, and is a bound): at
   first one a step; twice as many, up to `num_draws`, from then on whenever the natural gradient is inside its own
   error or a step finds nothing to take, or sixteen pairs are worth little more than the last: in hundreds of
   dimensions only the last draws weigh anything, and one pair knows no error. A shorter rate alone tells of curvature,
   not of noise.
2. A step of the rule with ĝ and Ĥ of the whole pool. The pool *covers* a proposal if it is worth half as many draws
   there as here, and at least 8. One that is covered is taken as it is: the estimate holds there. Any other is tried
   at the fresh draws, and its rate shortened as `_rate.py` does. Of a single pair, which knows no error, what its ε
   makes of other scales by chance is taken off, (εᵀ A ε − tr A)/2 with A = C'ᵀ Ĥ C' − Cᵀ Ĥ C: then it is exact on a
   quadratic, where ε beyond two or three would refuse the posterior.
3. Steps at ρ = 1/2 on the pool alone, each with its own ĝ and Ĥ, while the pool covers them and until they move by a
   tenth of their own error: no evaluation of the model. They run along the slow directions of the fixed-point map
   (the scale of a hierarchy and what it scales), which would cost a stochastic step each. Where Ĥ grows faster with
   the scales than S falls, as in heavy tails, a step in S leads beyond the fixed point, and the next ones with it
   around in a circle: they are as much shorter as the secant says that this one was too long (Irons & Tuck 1969).

The n-th step that is noise caps the rate at 2 / (n + 2 − 3 T/2), where the pool is worth the draws of T steps: so many
it averages itself, and the rate need not. A step is noise by the rule of `_rate.py`, and once sixteen pairs are there
wherever it takes back what the last one did, which in many dimensions is for want of draws too: S has too few, and the
step leads too far. Below 1/2 there are no steps on the pool alone, which would undo the averaging.

*Steep* are coordinates along which ℓ is mostly exponential, |ĝ_j| > D and Ĥ_jj = |ĝ_j| to a hundredth, as along the log
of a scale that is far too small. Newton's unit along z leaves no pull on x where ℓ = f(x) exp(−z), since ∂²ℓ/∂x∂z =
−∂ℓ/∂x: the data go unheard until z has grown, unit by unit, and a hierarchy shrinks to a point meanwhile, from which it
is hundreds of steps back. So a step of such x alone is proposed first, and taken if it lowers the loss by more than
units along the steep ones promise, Σ_j |ĝ_j| (1 − 1/e).

*Far* from everything, where r² > 1e12 at a loss L = E_q[ℓ] > 0, S says nothing of where q will be. The mean alone
moves, by the rule at ρ = 1 or down log L, and the rule starts anew there, from S = 100 I as the stock guides do:

    m ← m − Ĥ⁻¹ ĝ    or    m ← m − ρ P⁻¹ ĝ/L,    P = 100 I + Ĥ/L − (ĝ/L)(ĝ/L)ᵀ,    reflected as in the rule,

whichever makes the loss around m smaller. The one is exact on a quadratic, but on the slope of an exponential it is one
unit, and from a log density of −1e100 there is one for every power of e. The ρ of the other may grow beyond 1. The next
draws are drawn closer to m, since those far from it are all that is seen of such a density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..families import Block, DensePrecision
from ..gradients import Chords, Draws, Objective, Split, curvatures_at, orthogonal, recycled
from . import _drift, _missed, _rate
from ._gaussian import State, all_finite, scales_of, select, skipped

__all__ = ["Recycling", "drawn", "init", "step"]

MAX_NUMBERS = 2**22  # of the Hessians that are kept
MAX_PAIRS = 256
COVERED, BEGUN = 8.0, 16
INNER_RATE, MAX_INNER, SETTLED = 0.5, 20, 0.01
SHORTEST = 0.1  # share of a step that was too long
STEEP, UNHEARD = 0.01, 0.5  # of |g|
FAR, TRUST = 1e12, 100.0  # r²; a precision
NARROWER, NARROWEST = 1 / 16, 1 / 256  # of the radius


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recycling:
    """Carried between steps.

    Attributes:
        pool: the draws.
        frame: what the next ones are taken from.
        num_pairs: that the next step draws.
        digest: of the model's arguments at the draws.
        taken: whether the last step took anything.
        drift: of the last steps (`_drift.py`).
        missed: curvature that Hessians did not see (`_missed.py`); None where nobody asks.
    """

    pool: recycled.Pool
    frame: orthogonal.Frame
    num_pairs: Array
    digest: Array
    taken: Array
    drift: _drift.Drift
    missed: _missed.Missed | None


def init(loc: Array, scales: tuple[Any, ...], max_pairs: int, may_miss: bool = False) -> Recycling:
    """No draws yet, and room for 512, or as many as have four million numbers in their Hessians; at least for 16."""
    eights = min(MAX_PAIRS, MAX_NUMBERS // (2 * len(loc) ** 2)) // 8
    num_pairs = max(8 * eights, 8, recycled.FORGOTTEN * max_pairs)
    return Recycling(
        pool=recycled.init(num_pairs, loc, scales),
        frame=orthogonal.init(loc, max_pairs),
        num_pairs=jnp.ones((), jnp.int32),
        digest=jnp.zeros((), jnp.uint32),
        taken=jnp.zeros((), bool),
        drift=_drift.init(loc),
        missed=_missed.init(loc) if may_miss else None,
    )


def drawn(state: State, normals: Callable[[int], Array], max_pairs: int) -> tuple[State, Array]:
    """ε of the next step's pairs, the first of [`max_pairs`, D], from standard normal noise: S -> [S, D]."""
    recycling = state.recycling
    noise, frame = orthogonal.drawn(recycling.frame, normals, recycling.num_pairs, max_pairs)
    return replace(state, recycling=replace(recycling, frame=frame)), noise


class _Place(NamedTuple):
    """A Gaussian and the pool's estimate there: n, ĝ and Ĥ, with r², V and L = E_q[ℓ]/τ."""

    loc: Array
    precision: DensePrecision
    effective: Array
    gradient: Array
    hessian: Array
    residual: Array
    error: Array
    loss: Array

    @property
    def far(self) -> Array:
        return (self.residual > FAR) & (self.loss > 0)

    @property
    def noisy(self) -> Array:
        return ~self.far & (self.residual < _rate.NOISE_RATIO * self.error)

    @property
    def steep(self) -> Array:
        """[D], whether ℓ is mostly exponential along a coordinate."""
        slope = jnp.abs(self.gradient)
        return (slope > len(slope)) & (jnp.abs(jnp.diagonal(self.hessian) - slope) < STEEP * slope)

    @property
    def promised(self) -> Array:
        """Nats that units along steep coordinates promise: all but 1/e of what is exponential along them."""
        return (1 - math.exp(-1)) * jnp.where(self.steep, jnp.abs(self.gradient), 0).sum()

    @property
    def unheard(self) -> Array:
        """[D], coordinates on which Newton's units along steep ones leave less than half of the pull."""
        gradient, hessian, steep = self.gradient, self.hessian, self.steep
        units = jnp.where(steep, -gradient / jnp.where(steep, jnp.diagonal(hessian), 1), 0)
        return ~steep & (jnp.abs(gradient + hessian @ units) < UNHEARD * jnp.abs(gradient))

    def step(self, rate: Array, downhill: Array, alone: Array) -> tuple[Array, DensePrecision]:
        """(m, S) after a step of the rule, or of one down log L, or of the rule for the unheard alone."""
        unheard = self.unheard
        gradient = jnp.where(alone & ~unheard, 0, self.gradient)
        hessian = jnp.where(alone & (unheard[:, None] != unheard), 0, self.hessian)
        slope = gradient / self.loss
        curvature = hessian / self.loss - jnp.outer(slope, slope)
        trust = TRUST * jnp.eye(len(gradient), dtype=gradient.dtype)
        before = DensePrecision(jnp.where(downhill, trust, self.precision.matrix))
        after = before.blend(jnp.where(downhill, curvature, hessian), jnp.where(downhill, 0.5, rate))
        direction = after.solve(jnp.where(downhill, slope / 2, gradient))  # downhill of P/2, and half the slope
        return self.loc - rate * direction, self.precision.at(jnp.where(self.far, trust, after.matrix))

    def share(self, there: _Place) -> Array:
        """Of the step in S from here, how far Ĥ = S was by the secant, in the Fisher metric; 1 where not yet behind."""
        moved = there.precision.matrix - self.precision.matrix
        weights = self.precision.solve(self.precision.solve(moved).T)
        was, now = ((weights * (place.hessian - place.precision.matrix)).sum() for place in (self, there))
        beyond = (was > 0) & (now < 0)
        return jnp.where(beyond, jnp.maximum(was / jnp.where(beyond, was - now, 1), SHORTEST), 1)


class _Search(NamedTuple):
    """A step under way: a look at where it starts, then proposals, taken or refused, then steps on the pool alone.

    Attributes:
        here: where it is.
        start: where it started.
        first_rate: of the first proposal; `rate` is that of the next one.
        proposals: made so far until one was taken; `inner` steps since, the next of them at `inner_rate`; none at 0.
        before, by_rule: the start's loss; far away, that close around its mean and around that of a step of the rule.
        looked: whether `start` is known; `taken`: whether a proposal was.
        going: whether to go on.
    """

    here: _Place
    start: _Place
    first_rate: Array
    rate: Array
    proposals: Array
    inner: Array
    inner_rate: Array
    before: Array
    by_rule: Array
    looked: Array
    taken: Array
    going: Array


def step(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    noise: Array,
    temperature: float,
    digest: Array,
    *,
    chords: Chords | None = None,
    split: Split | None = None,
    forward: bool = False,
) -> tuple[State, Array, Array]:
    """One step.

    Args:
        objective: E_q[ℓ]/τ − H(q) at a noise ε, see `gradients/_estimate.py`.
        noise: ε of as many pairs as a step may draw, [K, D]; the first `num_pairs` are used.
        digest: of the model's arguments.
        chords: of the same pairs, where the curvature is that of secants, or may be; else None.
        split: by which Hessians cost less, if there is any.

    Returns:
        the next state, the loss averaged over the fresh draws, and whether the Gaussian moved. Where the loss, a
        gradient or a Hessian is not finite at a fresh draw, the step is `skipped`.
    """
    changed = digest != state.recycling.digest
    recycling = replace(state.recycling, pool=recycled.emptied(state.recycling.pool, changed), digest=digest)
    state = replace(state, recycling=recycling)
    max_pairs, dtype = len(noise), state.loc.dtype
    fresh = jnp.arange(max_pairs, dtype=jnp.int32) < recycling.num_pairs
    before, (state, went_on, extra_losses) = state, _drifted(state, objective, blocks, noise, fresh)
    assert isinstance(state.precision, DensePrecision)  # where draws are recycled, it is
    curvatures = partial(curvatures_at, split=split, forward=forward)
    num_drawn, pool, losses, usable, misses, evaluations = _fresh(
        state, objective, blocks, noise, chords, temperature, curvatures
    )

    def noisy_steps_of(start: _Place) -> Array:
        opposed = _rate.opposed(start.precision.solve(start.gradient), state.rate.last_gradient)
        begun = (pool.count >= BEGUN) & ~start.far
        return state.rate.noisy_steps + ((start.noisy | changed | begun) & opposed).astype(dtype)

    def cap_of(start: _Place) -> Array:
        return _cap(noisy_steps_of(start), start.effective, recycling.num_pairs)

    def first_rate_of(start: _Place) -> Array:
        cap = cap_of(start)
        # down log L, or at draws closer to m than q's, a step that was taken says nothing of the next one's rate
        anew = (state.radius < 1) & recycling.taken
        return jnp.where(start.far, state.rate.rate, jnp.where(anew, cap, jnp.minimum(state.rate.rate, cap)))

    def attempt(search: _Search) -> _Search:
        """One turn; the first has a rate of zero, and so looks at the start: the estimate is compiled but once."""
        here, looked, taken, number = search.here, search.looked, search.taken, search.proposals
        far = looked & search.start.far
        downhill = far & (number != 0) & (number != 2)
        partly = looked & ~taken & ~far & (number == 0) & search.start.unheard.any()
        rate = jnp.where(taken, search.inner_rate, jnp.where((far & ~downhill) | partly, 1, search.rate))
        loc, precision = select(looked, here.step(rate, downhill, partly), (here.loc, here.precision))
        scales = scales_of(precision, blocks, state.radius)
        moments = recycled.moments(pool, blocks, loc, scales)
        residual = _rate.squared_norm(moments.gradient, precision)
        error = recycled.squared_error(moments, precision)
        loss = (moments.weights * pool.values).sum()
        there = _Place(loc, precision, moments.effective, moments.gradient, moments.hessian, residual, error, loss)
        covered = ~far & ~partly & (moments.effective >= jnp.maximum(COVERED, here.effective / 2))

        def judged() -> tuple[Array, Array, Array, Array]:
            first = far & (number == 0)
            close = select(far, scales_of(here.precision, blocks, jnp.asarray(NARROWEST, dtype)), scales)
            places = (loc, close), (here.loc, close)
            after, at_start = _losses(objective, places, first, noise, recycling.num_pairs)
            now = jnp.where(jnp.isfinite(after).all(), after.sum(), jnp.inf)
            before, by_rule = jnp.where(first, at_start.sum(), search.before), jnp.where(first, now, search.by_rule)
            lower = ~first & (now < before)
            chance = _by_chance(here.hessian, blocks, scales_of(here.precision, blocks, state.radius), scales, noise)
            exact = jnp.where(recycling.num_pairs == 1, after - chance[:, None], after)
            by_units = 2 * recycling.num_pairs.astype(dtype) * search.start.promised
            better = jnp.where(
                far | partly,
                jnp.where(partly, now < before - by_units, lower & ((number != 1) | (now < by_rule))),
                _rate.not_worse(losses, exact, search.start.residual + len(loc), fresh),
            )
            return better, lower, before, by_rule

        unjudged = jnp.zeros((), bool), jnp.zeros((), bool), search.before, search.by_rule
        better, lower, before, by_rule = lax.cond(covered | taken | ~looked, lambda: unjudged, judged)
        accepted = ((covered | better) & all_finite(loc, precision, moments.gradient)) | ~looked
        proposals = search.proposals + (looked & ~taken).astype(jnp.int32)
        inner = search.inner + taken.astype(jnp.int32)
        settled = taken & (here.residual < SETTLED * here.error)
        again = jnp.where(
            accepted,
            covered & ~settled & (inner < MAX_INNER) & (search.inner_rate > 0),
            ~taken & (proposals < _rate.MAX_PROPOSALS),
        )
        first_rate, first_inner = first_rate_of(there), jnp.where(cap_of(there) < INNER_RATE, 0, INNER_RATE)
        share = lax.cond(looked & covered, here.share, lambda there: jnp.ones((), dtype), there)
        # a step downhill that is but too short is the longer next time
        factor = jnp.where(downhill & lower, _rate.GROW, jnp.where((far & ~downhill) | partly, 1, _rate.CUT))
        next_rate = jnp.where(accepted | taken, 1, factor) * search.rate
        return _Search(
            here=select(accepted, there, here),
            start=select(looked, search.start, there),
            first_rate=jnp.where(looked, search.first_rate, first_rate),
            rate=jnp.where(looked, next_rate, first_rate),
            proposals=proposals,
            inner=inner,
            inner_rate=jnp.where(looked, share * search.inner_rate, first_inner.astype(dtype)),
            before=before,
            by_rule=by_rule,
            looked=jnp.ones((), bool),
            taken=looked & (taken | accepted),
            going=again | ~looked,
        )

    nothing, none, no = jnp.zeros((), dtype), jnp.zeros((), jnp.int32), jnp.zeros((), bool)
    unknown = jnp.zeros_like(state.loc), jnp.zeros_like(state.precision.matrix)  # at a rate of zero, it moves nothing
    here = _Place(state.loc, state.precision, nothing, *unknown, state.residual, state.error, jnp.ones((), dtype))
    total = jnp.where(fresh[:, None], losses, 0).sum()
    end = lax.while_loop(
        lambda search: search.going,
        attempt,
        _Search(here, here, nothing, nothing, none, none, nothing, total, nothing, no, no, going=usable),
    )

    start = end.start
    far = usable & start.far
    partly = start.unheard.any() & (end.proposals > 1)
    aside = (start.far | partly).astype(jnp.int32)  # proposals that searched no rate
    alone = (pool.count >= BEGUN) & (start.effective < 3 * recycling.num_pairs.astype(dtype)) & ~start.far
    more = usable & (start.noisy | ~end.taken | alone)
    num_pairs = jnp.where(more, jnp.minimum(max_pairs, 2 * recycling.num_pairs), recycling.num_pairs)
    num_draws, num_losses = (2 * num_drawn).astype(dtype), end.proposals + far.astype(jnp.int32)
    longest = jnp.where(far, jnp.inf, 1)
    rate = _rate.next_rate(end.rate, end.first_rate, end.taken, end.proposals - aside, longest)
    rates = state.rate.after(rate, end.rate, noisy_steps_of(start), start.gradient, end.taken)
    radius = jnp.where(far, jnp.maximum(NARROWER * state.radius, NARROWEST), jnp.minimum(1, 2 * state.radius))
    evaluations += num_draws * num_losses.astype(dtype) + extra_losses
    taken = jnp.where(usable, end.taken, recycling.taken)
    moves = end.here.loc - state.loc, end.here.precision.matrix - state.precision.matrix
    few = (pool.count >= BEGUN) & (start.effective < recycled.REGULAR * len(state.loc))
    drift = select(
        usable & few & ~start.far & ~changed, _drift.averaged(state.recycling.drift, *moves), _drift.init(state.loc)
    )
    missed = recycling.missed
    if missed is not None:
        missed = select(usable & (num_drawn > 1), _missed.after(missed, misses), missed)
        turned = missed.secants ^ recycling.missed.secants
        pool = recycled.emptied(pool, turned)
        rates = select(turned, _rate.init(state.loc), rates)
    recycling = replace(recycling, pool=pool, num_pairs=num_pairs, taken=taken, drift=drift, missed=missed)
    tried = replace(state, recycling=recycling, evaluations=state.evaluations + evaluations)
    after = replace(  # where nothing was taken, `end.here` is the start
        tried,
        loc=end.here.loc,
        precision=end.here.precision,
        rate=rates,
        radius=radius,
        residual=start.residual,
        error=start.error,
    )
    after = select(usable, after, skipped(replace(tried, loc=before.loc, precision=before.precision)))
    return after, total / num_draws, usable & (went_on | end.taken)


def _drifted(
    state: State, objective: Objective, blocks: tuple[Block, ...], noise: Array, fresh: Array
) -> tuple[State, Array, Array]:
    """The state on along the drift, if the fresh draws are for it, and with the next κ; whether, and losses it took."""
    recycling, loc, precision, one = state.recycling, state.loc, state.precision, jnp.ones((), state.loc.dtype)
    drift, num_pairs, start = recycling.drift, recycling.num_pairs, (loc, precision)
    assert isinstance(precision, DensePrecision)

    def asked() -> tuple[Any, ...]:
        there = _drift.proposal(drift, loc, precision)
        places = tuple((loc, scales_of(precision, blocks, one)) for loc, precision in (start, there))
        losses = _losses(objective, places, jnp.ones((), bool), noise, num_pairs)
        lower, judged = _drift.judged(drift, *_rate.paired_difference(losses[0], losses[1], fresh))
        lower &= all_finite(there)
        return *select(lower, there, start), judged, lower, 4 * num_pairs.astype(one.dtype)

    def not_asked() -> tuple[Any, ...]:
        return *start, drift, jnp.zeros((), bool), jnp.zeros_like(one)

    begun = (recycling.pool.count >= BEGUN) & (num_pairs > 1) & (state.radius == 1)  # one pair knows no error
    asks = begun & _drift.is_there(drift, precision, state.error)
    after_loc, after_precision, judged, went_on, extra_losses = lax.cond(asks, asked, not_asked)
    recycling = replace(recycling, drift=judged)
    return replace(state, loc=after_loc, precision=after_precision, recycling=recycling), went_on, extra_losses


def _fresh(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    noise: Array,
    chords: Chords | None,
    temperature: float,
    curvatures: Callable[..., tuple[Any, ...]],
) -> tuple[Array, recycled.Pool, Array, Array, Array, Array]:
    """Pairs up to the first that is not finite, the pool with them, their losses [K, 2], whether there is none, whether
    they miss curvature, and the gradients that they took.
    """
    scales = scales_of(state.precision, blocks, state.radius)
    _, log_determinant = recycled.standardized(blocks, state.loc, scales, state.loc)
    constant = log_determinant + len(state.loc) * jnp.log(2 * jnp.pi) / (2 * temperature)

    num_pairs, missed = state.recycling.num_pairs, state.recycling.missed
    max_pairs, size, dtype = *noise.shape, state.loc.dtype
    columns = recycled.scaled(blocks, scales, jnp.eye(size, dtype=dtype))  # Cᵀ
    covariance = columns.T @ columns

    def draw(carry):
        number, found, traces, _, evaluations = carry
        look = number >= num_pairs  # at the same pairs again, whose Hessians go into a row to spare
        place, row = lax.rem(number, num_pairs), jnp.where(look, max_pairs, number)
        pair = Draws.at(_pair(noise[place]))
        if chords is not None:
            pair = pair._replace(chords=Chords(*(chord[None, place] for chord in chords)).mirrored())
        secants = chords is not None if missed is None else missed.secants & ~look
        hessians, values, gradients, cost = curvatures(objective, state.loc, scales, pair, blocks, secants=secants)
        finite = look | all_finite(values, gradients, hessians)
        found = tuple(
            lax.dynamic_update_index_in_dim(stack, value, row, 0)
            for stack, value in zip(found, (values, gradients, hessians), strict=True)
        )
        if missed is not None:
            traces = traces.at[place].set(jnp.einsum("pab,ab->", hessians, covariance) / 2)
        return number + 1, found, traces, finite, evaluations + 2 * jnp.asarray(cost, dtype)

    rows, turns = (
        (max_pairs, num_pairs) if missed is None else (max_pairs + 1, jnp.where(missed.look, 2, 1) * num_pairs)
    )
    nothing = tuple(jnp.zeros((rows, 2, *shape), dtype) for shape in ((), (size,), (size, size)))
    number, found, traces, usable, evaluations = lax.while_loop(
        lambda carry: (carry[0] < turns) & carry[3],
        draw,
        (jnp.zeros((), jnp.int32), nothing, jnp.zeros(max_pairs, dtype), jnp.ones((), bool), jnp.zeros((), dtype)),
    )
    number, (losses, gradients, hessians) = jnp.minimum(number, num_pairs), (stack[:max_pairs] for stack in found)
    pairs = jnp.stack([noise, -noise], 1)
    energies = losses + constant + (pairs**2).sum(-1) / (2 * temperature)  # ℓ/τ
    num_finite = number - (~usable).astype(jnp.int32)
    there = jnp.arange(max_pairs, dtype=jnp.int32) < num_finite  # the others may be no numbers, at any weight
    pairs, energies, gradients, hessians = (
        jnp.where(jnp.expand_dims(there, range(1, array.ndim)), array, 0)
        for array in (pairs, energies, gradients, hessians)
    )
    pool = recycled.append(
        state.recycling.pool, blocks, state.loc, scales, pairs, energies, gradients, hessians, num_finite
    )
    misses = jnp.zeros((), bool)
    if missed is not None:
        away = recycled.scaled(blocks, scales, pairs)
        misses = _missed.misses(missed, traces, (away * gradients).sum((1, 2)) / 2, size, there)
    return number, pool, losses, usable, misses, evaluations


def _losses(
    objective: Objective,
    places: tuple[tuple[Array, tuple[Any, ...]], ...],
    both: Array,
    noise: Array,
    num_pairs: Array,
) -> Array:
    """L at this step's draws of the first place, a mean and scales, or of both, [2, K, 2]; compiled but once."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *places)

    def at_pair(count: Array, losses: Array) -> Array:
        place, number = lax.div(count, num_pairs), lax.rem(count, num_pairs)  # of `//`, the signs take most
        loc, scales = jax.tree.map(lambda leaf: leaf[place], stacked)
        draws = Draws.at(_pair(noise[number]))
        pair = jax.vmap(lambda draw: objective(loc, scales, {}, draw)[0])(draws)
        return losses.at[place, number].set(pair)

    nothing = jnp.zeros((2, len(noise), 2), noise.dtype)
    return lax.fori_loop(0, jnp.where(both, 2, 1) * num_pairs, at_pair, nothing)


def _by_chance(hessian: Array, blocks: tuple[Block, ...], before: Any, after: Any, noise: Array) -> Array:
    """(εᵀ A ε − tr A)/2, [K], with A = C'ᵀ H C' − Cᵀ H C for the scales C before and C' after."""
    identity = jnp.eye(len(hessian), dtype=noise.dtype)

    def beyond_expectation(scales: Any) -> Array:
        away, columns = (recycled.scaled(blocks, scales, vectors) for vectors in (noise, identity))
        return ((away @ hessian * away).sum(-1) - (hessian * (columns.T @ columns)).sum()) / 2

    return beyond_expectation(after) - beyond_expectation(before)


def _pair(noise: Array) -> Array:
    """ε and −ε, [2, D]."""
    return jnp.stack([noise, -noise])


def _cap(noisy_steps: Array, effective: Array, num_pairs: Array) -> Array:
    """2/(n + 2 − 3 T/2), T the number of steps whose draws the estimate is worth; at most 1."""
    averaged = 1.5 * effective / (2 * num_pairs).astype(effective.dtype)
    return 2 / (jnp.maximum(0, noisy_steps - averaged) + 2)
