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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

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


@jax.tree_util.register_dataclass
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

    rate: Array
    taken: Array
    noisy_steps: Array
    rejected: Array
    last_gradient: Any

    def after(self, rate: Array, tried: Array, noisy_steps: Array, gradient: Any, accepted: Array) -> RateState:
        """The next state, after a step whose last proposal was at the rate `tried`."""
        taken = jnp.where(accepted, tried, self.taken)
        rejected = self.rejected + (~accepted).astype(jnp.int32)
        return RateState(rate=rate, taken=taken, noisy_steps=noisy_steps, rejected=rejected, last_gradient=gradient)


def init(loc: Array) -> RateState:
    return RateState(
        rate=jnp.ones((), loc.dtype),
        taken=jnp.full((), jnp.nan, loc.dtype),
        noisy_steps=jnp.zeros((), loc.dtype),
        rejected=jnp.zeros((), jnp.int32),
        last_gradient=jnp.zeros_like(loc),
    )


def search(
    state: RateState,
    losses: Array,
    noisy_steps: Array,
    most: Array,
    gradient: Any,
    propose: Callable[[Array], tuple[Any, Array]],
) -> tuple[RateState, Any, Array, Array]:
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
    first_rate = jnp.minimum(state.rate, 2 / (noisy_steps + 2))
    every_pair = jnp.ones(len(losses) // 2, bool)

    def attempt(carry):
        tries, rate, _, _ = carry
        rate = jnp.where(tries == 0, rate, CUT * rate)
        proposal, proposed = propose(rate)
        return tries + 1, rate, proposal, not_worse(_by_pair(losses), _by_pair(proposed), most, every_pair)

    # `propose` is traced once, inside the loop; the placeholder only gives the carry its shape.
    placeholder = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(propose, first_rate)[0])
    tries, rate, proposal, accepted = lax.while_loop(
        lambda carry: ~carry[3] & (carry[0] < MAX_PROPOSALS) & jnp.isfinite(losses).all(),
        attempt,
        (jnp.zeros((), jnp.int32), first_rate, placeholder, jnp.zeros((), bool)),
    )
    following = next_rate(rate, first_rate, accepted, tries)
    next_state = state.after(following, rate, noisy_steps, gradient, accepted)
    return next_state, proposal, accepted, tries


def next_rate(rate: Array, first_rate: Array, accepted: Array, tries: Array, longest: float | Array = 1.0) -> Array:
    """What the next step tries first: more after a first proposal that was accepted, less after none."""
    after = jnp.where(tries == 1, jnp.minimum(longest, GROW * rate), rate)
    return jnp.where(accepted, after, CUT * first_rate).astype(first_rate.dtype)


def squared_norm(gradient: Array, precision: Precision) -> Array:
    """gᵀ S⁻¹ g: the squared length of the natural gradient in the Fisher norm."""
    return gradient @ precision.solve(gradient)


def residual_and_error(estimate: Estimate, precision: Precision) -> tuple[Array, Array]:
    """(r², V): the squared natural gradient and its Monte Carlo variance, NaN of a single pair or draw."""
    num_pairs = len(estimate.pair_gradients)
    deviations = estimate.pair_gradients - estimate.gradient
    spread = (deviations * precision.solve(deviations)).sum()
    error = spread / (num_pairs * (num_pairs - 1)) if num_pairs > 1 else jnp.full_like(spread, jnp.nan)
    return squared_norm(estimate.gradient, precision), error


def opposed(direction: Array, last_gradient: Array) -> Array:
    """dᵀ ḡ < 0: whether this step, along d = S⁻¹ g, takes back what the last ones did."""
    return direction @ last_gradient < 0


def counted(state: RateState, inside: Array, opposed: Array, minibatch: Array, weight: Array) -> Array:
    """n after a step that was inside its noise, or not, and opposed the last ones, or went on.

    Args:
        minibatch: whether a plate is subsampled.
        weight: [D], N/M for a row of it that is in the batch.
    """
    more = jnp.where((inside | minibatch) & opposed, 1, jnp.where(inside & ~minibatch & ~opposed, -GOING_ON, 0))
    every = jnp.where(minibatch, jnp.maximum(1, weight.max()), 1)
    return jnp.maximum(0, state.noisy_steps + (more / every).astype(state.noisy_steps.dtype))


def averaged(last_gradient: Array, gradient: Array, precision: Precision) -> Array:
    """ḡ of the next step; what it was is no longer than the gradient, so that one of far away is soon forgotten."""
    before, now = squared_norm(last_gradient, precision), squared_norm(gradient, precision)
    shorter = jnp.where(before > now, now / jnp.where(before > 0, before, 1), 1) ** 0.5
    return MEMORY * shorter * last_gradient + (1 - MEMORY) * gradient


def not_worse(before: Array, after: Array, most: Array, taken: Array) -> Array:
    """Whether the mean paired difference is at most its standard error, and rounding where there is none.

    Args:
        before, after: losses at antithetic pairs, [K, 2].
        most: that the standard error counts for.
        taken: [K], which of the pairs are there.
    """
    change, error = paired_difference(before, after, taken)
    sizes = jnp.where(taken, jnp.abs(before).mean(1), 0)
    rounding = 64 * jnp.finfo(before.dtype).eps * sizes.sum() / taken.sum().astype(before.dtype)
    finite = jnp.where(taken, jnp.isfinite(after).all(1), True).all()
    return finite & (change <= jnp.minimum(error, most) + rounding)


def paired_difference(before: Array, after: Array, taken: Array) -> tuple[Array, Array]:
    """The mean of after − before, [K, 2], over the pairs [K] that are `taken`, and its standard error: 0 of one."""
    num_pairs = taken.sum().astype(before.dtype)

    def mean(values: Array) -> Array:
        return jnp.where(taken, values, 0).sum() / num_pairs

    change = (after - before).mean(1)
    return mean(change), (mean((change - mean(change)) ** 2) / jnp.maximum(num_pairs - 1, 1)) ** 0.5


def _by_pair(losses: Array) -> Array:
    return losses.reshape(2, -1).T
