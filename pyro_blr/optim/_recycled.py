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

import torch
from torch import Tensor

from ..families import Block, DensePrecision
from ..gradients import Chords, Draws, Objective, Split, curvatures_at, orthogonal, recycled
from . import _drift, _missed, _rate
from ._gaussian import State, all_finite, losses_at, scales_of, skipped

__all__ = ["Recycling", "drawn", "init", "step"]

MAX_NUMBERS = 2**22  # of the Hessians that are kept
MAX_PAIRS = 256
COVERED, BEGUN = 8.0, 16
INNER_RATE, MAX_INNER, SETTLED = 0.5, 20, 0.01
SHORTEST = 0.1  # share of a step that was too long
STEEP, UNHEARD = 0.01, 0.5  # of |g|
FAR, TRUST = 1e12, 100.0  # r²; a precision
NARROWER, NARROWEST = 1 / 16, 1 / 256  # of the radius


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
    num_pairs: int
    digest: int
    taken: bool
    drift: _drift.Drift
    missed: _missed.Missed | None


def init(loc: Tensor, scales: tuple[Any, ...], max_pairs: int, may_miss: bool = False) -> Recycling:
    """No draws yet, and room for 512, or as many as have four million numbers in their Hessians; at least for 16."""
    eights = min(MAX_PAIRS, MAX_NUMBERS // (2 * len(loc) ** 2)) // 8
    num_pairs = max(8 * eights, 8, recycled.FORGOTTEN * max_pairs)
    pool, frame = recycled.init(num_pairs, loc, scales), orthogonal.init(loc, max_pairs)
    drift, missed = _drift.init(loc), _missed.init() if may_miss else None
    return Recycling(pool=pool, frame=frame, num_pairs=1, digest=0, taken=False, drift=drift, missed=missed)


def drawn(state: State, normals: Callable[[int], Tensor], max_pairs: int) -> tuple[State, Tensor]:
    """ε of the next step's pairs, the first of [`max_pairs`, D], from standard normal noise: S -> [S, D]."""
    recycling = state.recycling
    noise, frame = orthogonal.drawn(recycling.frame, normals, recycling.num_pairs, max_pairs)
    return replace(state, recycling=replace(recycling, frame=frame)), noise


class _Place(NamedTuple):
    """A Gaussian and the pool's estimate there: n, ĝ and Ĥ, with r², V and L = E_q[ℓ]/τ."""

    loc: Tensor
    precision: DensePrecision
    effective: float
    gradient: Tensor
    hessian: Tensor
    residual: float
    error: float
    loss: float

    @property
    def far(self) -> bool:
        return self.residual > FAR and self.loss > 0

    @property
    def noisy(self) -> bool:
        return not self.far and self.residual < _rate.NOISE_RATIO * self.error

    @property
    def steep(self) -> Tensor:
        """[D], whether ℓ is mostly exponential along a coordinate."""
        slope = self.gradient.abs()
        return (slope > len(slope)) & ((self.hessian.diagonal() - slope).abs() < STEEP * slope)

    @property
    def promised(self) -> float:
        """Nats that units along steep coordinates promise: all but 1/e of what is exponential along them."""
        return (1 - math.exp(-1)) * float(self.gradient[self.steep].abs().sum())

    @property
    def unheard(self) -> Tensor:
        """[D], coordinates on which Newton's units along steep ones leave less than half of the pull."""
        gradient, hessian, steep = self.gradient, self.hessian, self.steep
        units = torch.where(steep, -gradient / torch.where(steep, hessian.diagonal(), 1), 0)
        return ~steep & ((gradient + hessian @ units).abs() < UNHEARD * gradient.abs())

    def step(self, rate: float, downhill: bool, alone: bool) -> tuple[Tensor, DensePrecision]:
        """(m, S) after a step of the rule, or of one down log L, or of the rule for the unheard alone."""
        gradient, hessian = self.gradient, self.hessian
        trust = TRUST * torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
        if alone:
            unheard = self.unheard
            gradient = torch.where(unheard, gradient, 0)
            hessian = torch.where(unheard[:, None] == unheard, hessian, 0)
        if not downhill:
            precision = self.precision.blend(hessian, rate)
            return self.loc - rate * precision.solve(gradient), self.precision.at(trust) if self.far else precision
        slope = gradient / self.loss
        curvature = hessian / self.loss - torch.outer(slope, slope)
        half = DensePrecision(trust).blend(curvature, 0.5)  # P/2, and so is the slope
        return self.loc - rate * half.solve(slope / 2), self.precision.at(trust)

    def share(self, there: _Place) -> float:
        """Of the step in S from here, how far Ĥ = S was by the secant, in the Fisher metric; 1 where not yet behind."""
        moved = there.precision.matrix - self.precision.matrix
        weights = self.precision.solve(self.precision.solve(moved).T)
        was, now = (float((weights * (place.hessian - place.precision.matrix)).sum()) for place in (self, there))
        return max(was / (was - now), SHORTEST) if was > 0 > now else 1.0


class _Search(NamedTuple):
    """A step under way: proposals, taken or refused, and then steps on the pool alone.

    Attributes:
        here: where it is.
        rate: of the next proposal.
        proposals: made so far until one was taken; `inner` steps since, the next of them at `inner_rate`; none at 0.
        before, by_rule: the start's loss; far away, that close around its mean and around that of a step of the rule.
        taken: whether one was.
        going: whether to go on.
    """

    here: _Place
    rate: float
    proposals: int
    inner: int
    inner_rate: float
    before: float
    by_rule: float
    taken: bool
    going: bool


def step(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    noise: Tensor,
    temperature: float,
    digest: int,
    *,
    chords: Chords | None = None,
    split: Split | None = None,
    differences: bool = False,
) -> tuple[State, Tensor, bool]:
    """One step.

    Args:
        objective: E_q[ℓ]/τ − H(q) at a noise ε, see `gradients/_estimate.py`.
        noise: ε of as many pairs as a step may draw, [K, D]; the first `num_pairs` are used.
        digest: of the model's arguments.
        chords: of the same pairs, where the curvature is that of secants; None where it is that of Hessians.
        split: by which Hessians cost less, if there is any.
        differences: whether Hessians are differences of gradients.

    Returns:
        the next state, the loss averaged over the fresh draws, and whether the Gaussian moved. Where the loss, a
        gradient or a Hessian is not finite at a fresh draw, the step is `skipped`.
    """
    changed = digest != state.recycling.digest
    recycling = replace(state.recycling, pool=recycled.emptied(state.recycling.pool, changed), digest=digest)
    state = replace(state, recycling=recycling)
    pairs = torch.stack([noise, -noise], 1)[: recycling.num_pairs]
    draws = Draws.at(pairs.flatten(0, 1))  # one object for all that is asked of them, whose noise is made once

    def losses_around(loc: Tensor, scales: tuple[Any, ...]) -> Tensor:
        return losses_at(objective, loc, scales, None, draws).reshape(-1, 2)

    before, (state, went_on, extra_losses) = state, _drifted(state, blocks, losses_around)
    assert isinstance(state.precision, DensePrecision)  # where draws are recycled, it is
    curvatures = partial(curvatures_at, split=split, differences=differences)
    pool, losses, usable, misses, evaluations = _fresh(
        state, objective, blocks, pairs, draws, chords, temperature, curvatures
    )

    def place(loc: Tensor, precision: DensePrecision, scales: tuple[Any, ...]) -> _Place:
        moments = recycled.moments(pool, blocks, loc, scales)
        residual = float(_rate.squared_norm(moments.gradient, precision))
        error = recycled.squared_error(moments, precision)
        loss = float((moments.weights * pool.values).sum())
        return _Place(loc, precision, moments.effective, moments.gradient, moments.hessian, residual, error, loss)

    if not usable:
        recycling = replace(recycling, pool=pool, drift=_drift.init(state.loc))
        kept = replace(before, recycling=recycling, evaluations=state.evaluations + evaluations + extra_losses)
        return skipped(kept), losses.mean(), False
    start = place(state.loc, state.precision, scales_of(state.precision, blocks, state.radius))
    far, last_gradient = start.far, state.rate.last_gradient
    unheard = not far and bool(start.unheard.any())
    opposed = _rate.opposed(start.precision.solve(start.gradient), last_gradient)
    begun = pool.count >= BEGUN and not far
    noisy_steps = state.rate.noisy_steps + ((start.noisy or changed or begun) and opposed)
    first_rate, cap = state.rate.rate, _cap(noisy_steps, start.effective, recycling.num_pairs)
    if not far:
        # down log L, or at draws closer to m than q's, a step that was taken says nothing of the next one's rate
        first_rate = cap if state.radius < 1 and recycling.taken else min(first_rate, cap)

    def total_loss(loc: Tensor, scales: tuple[Any, ...]) -> float:
        total = float(losses_around(loc, scales).sum())
        return total if math.isfinite(total) else math.inf

    def attempt(search: _Search) -> _Search:
        here, taken, number = search.here, search.taken, search.proposals
        downhill, partly = far and number not in (0, 2), unheard and not taken and number == 0
        rate = search.inner_rate if taken else 1.0 if (far and not downhill) or partly else search.rate
        loc, precision = here.step(rate, downhill, partly)
        scales = scales_of(precision, blocks, state.radius)
        finite = all_finite(loc, precision.solve(loc), *scales)
        there = place(loc, precision, scales) if finite else here
        covered = finite and not (far or partly) and there.effective >= max(COVERED, here.effective / 2)
        before, by_rule, better, lower = search.before, search.by_rule, False, False
        if partly:
            better = finite and total_loss(loc, scales) < before - losses.numel() * start.promised
        elif far:
            close = scales_of(here.precision, blocks, NARROWEST)
            now = total_loss(loc, close) if finite else math.inf
            if number == 0:
                before, by_rule = total_loss(here.loc, close), now
            else:
                lower = now < before
                better = lower and (number != 1 or now < by_rule)
        elif finite and not (covered or taken):
            after = losses_around(loc, scales)
            if len(pairs) == 1:
                here_scales = scales_of(here.precision, blocks, state.radius)
                after = after - _by_chance(here.hessian, blocks, here_scales, scales, pairs[:, 0])
            better = _rate.not_worse(losses, after, start.residual + len(loc))
        accepted = (covered or better) and all_finite(there.gradient)
        settled = taken and here.residual < SETTLED * here.error
        proposals, inner = number + (not taken), search.inner + taken
        if not accepted:
            again = not taken and proposals < _rate.MAX_PROPOSALS
            # a step downhill that is but too short is the longer next time
            searched = not (taken or partly or (far and not downhill))
            factor = 1.0 if not searched else _rate.GROW if downhill and lower else _rate.CUT
            return _Search(
                here, factor * search.rate, proposals, inner, search.inner_rate, before, by_rule, taken, again
            )
        again = covered and not settled and inner < MAX_INNER and search.inner_rate > 0
        inner_rate = here.share(there) * search.inner_rate if again else search.inner_rate
        return _Search(there, search.rate, proposals, inner, inner_rate, before, by_rule, True, again)

    inner_rate, total = INNER_RATE if cap >= INNER_RATE else 0.0, float(losses.sum())
    end = _Search(start, first_rate, 0, 0, inner_rate, total, math.nan, False, True)
    while end.going:
        end = attempt(end)

    aside = far or (unheard and end.proposals > 1)  # a proposal that searched no rate
    alone = begun and start.effective < 3 * recycling.num_pairs
    more = start.noisy or not end.taken or alone
    num_pairs = min(len(noise), 2 * recycling.num_pairs) if more else recycling.num_pairs
    longest = math.inf if far else 1.0
    rate = _rate.next_rate(end.rate, first_rate, end.taken, end.proposals - aside, longest)
    drift = _drift.init(state.loc)
    if begun and not changed and start.effective < recycled.REGULAR * len(state.loc):
        moves = end.here.loc - state.loc, end.here.precision.matrix - state.precision.matrix
        drift = _drift.averaged(state.recycling.drift, *moves)
    evaluations += 2 * recycling.num_pairs * (end.proposals + far) + extra_losses
    rates = state.rate.after(rate, end.rate, noisy_steps, start.gradient, end.taken)
    missed = recycling.missed
    if missed is not None and len(pairs) > 1:
        missed = _missed.after(missed, misses)
        if missed.secants != recycling.missed.secants:
            pool, rates = recycled.emptied(pool, True), _rate.init(state.loc)
    kept = replace(
        state,
        recycling=replace(recycling, pool=pool, num_pairs=num_pairs, taken=end.taken, drift=drift, missed=missed),
        evaluations=state.evaluations + evaluations,
        residual=start.residual,
        error=start.error,
        rate=rates,
        radius=max(NARROWER * state.radius, NARROWEST) if far else min(1.0, 2 * state.radius),
    )
    moved = replace(kept, loc=end.here.loc, precision=end.here.precision)
    return (moved if end.taken else kept), losses.mean(), went_on or end.taken


def _drifted(state: State, blocks: tuple[Block, ...], losses_around: Callable[..., Tensor]) -> tuple[State, bool, int]:
    """The state on along the drift, if the fresh draws are for it, and with the next κ; whether, and losses it took."""
    recycling, loc, precision = state.recycling, state.loc, state.precision
    assert isinstance(precision, DensePrecision)
    begun = recycling.pool.count >= BEGUN and recycling.num_pairs > 1 and state.radius == 1  # one knows no error
    if not (begun and _drift.is_there(recycling.drift, precision, state.error)):
        return state, False, 0
    there = _drift.proposal(recycling.drift, loc, precision)
    scales = scales_of(there[1], blocks, 1.0)
    if not all_finite(there[0], there[1].matrix, *scales):
        return state, False, 0
    before, after = losses_around(loc, scales_of(precision, blocks, 1.0)), losses_around(there[0], scales)
    lower, drift = _drift.judged(recycling.drift, *_rate.paired_difference(before, after))
    state = replace(state, recycling=replace(recycling, drift=drift))
    return (replace(state, loc=there[0], precision=there[1]) if lower else state), lower, 2 * before.numel()


def _fresh(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    pairs: Tensor,
    draws: Draws,
    chords: Chords | None,
    temperature: float,
    curvatures: Callable[..., tuple[Any, ...]],
) -> tuple[recycled.Pool, Tensor, bool, bool, int]:
    """The pool with the pairs up to the first that is not finite, all losses, [K, 2], whether there is none, whether
    they miss curvature, and the gradients that they took.
    """
    scales = scales_of(state.precision, blocks, state.radius)
    _, log_determinant = recycled.standardized(blocks, state.loc, scales, state.loc)
    constant = log_determinant + len(state.loc) * math.log(2 * math.pi) / (2 * temperature)
    if chords is not None:
        draws = draws._replace(chords=Chords(*(chord[: len(pairs)] for chord in chords)).mirrored(1))
    at, secants = (objective, state.loc, scales, draws, blocks), chords is not None
    hessians, losses, gradients, cost = curvatures(*at, secants=secants)
    losses = losses.reshape(-1, 2)
    energies = losses + constant + (pairs**2).sum(-1) / (2 * temperature)  # ℓ/τ
    found = [pairs, energies, gradients.reshape(pairs.shape), hessians.reshape(*pairs.shape, -1)]
    finite = torch.stack([array.isfinite().flatten(1).all(1) for array in found]).all(0)
    num_finite = int(finite.cumprod(0).sum())
    pool = state.recycling.pool
    if num_finite:
        pool = recycled.append(pool, blocks, state.loc, scales, *(array[:num_finite] for array in found))
    misses, missed = False, state.recycling.missed
    if missed is not None and (missed.look or not missed.secants):
        if missed.look:
            hessians, *_, more = curvatures(*at)
            cost += more
        identity = torch.eye(pairs.shape[-1], dtype=pairs.dtype, device=pairs.device)
        columns, away = (recycled.scaled(blocks, scales, vectors) for vectors in (identity, pairs))
        traces = torch.einsum("kpab,ab->k", hessians.reshape(*pairs.shape, -1), columns.T @ columns) / 2
        misses = _missed.misses(missed, traces, (away * gradients.reshape(pairs.shape)).sum((1, 2)) / 2, len(identity))
    return pool, losses, num_finite == len(pairs), misses, cost * losses.numel()


def _by_chance(hessian: Tensor, blocks: tuple[Block, ...], before: Any, after: Any, noise: Tensor) -> Tensor:
    """(εᵀ A ε − tr A)/2, [K], with A = C'ᵀ H C' − Cᵀ H C for the scales C before and C' after."""
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)

    def beyond_expectation(scales: Any) -> Tensor:
        away, columns = (recycled.scaled(blocks, scales, vectors) for vectors in (noise, identity))
        return ((away @ hessian * away).sum(-1) - (hessian * (columns.T @ columns)).sum()) / 2

    return beyond_expectation(after) - beyond_expectation(before)


def _cap(noisy_steps: float, effective: float, num_pairs: int) -> float:
    """2/(n + 2 − 3 T/2), T the number of steps whose draws the estimate is worth; at most 1."""
    averaged = 1.5 * effective / (2 * num_pairs)
    return 2 / (max(0.0, noisy_steps - averaged) + 2)
