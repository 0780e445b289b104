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

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..families import Precision
from ..gradients import Estimate

__all__ = ["RateState", "init", "search"]

CUT, GROW, MAX_PROPOSALS = 0.4, 1.7, 8
NOISE_RATIO = 2.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RateState:
    """Carried between steps.

    Attributes:
        rate: the rate that the next step tries first.
        noisy_steps: n, steps so far whose residual was inside its own Monte Carlo error.
        rejected: steps so far of which no proposal was accepted.
        last_gradient: E_q[g] of the step before, [D]; a direction in λ for a member of another family.
    """

    rate: Array
    noisy_steps: Array
    rejected: Array
    last_gradient: Any


def init(loc: Array) -> RateState:
    return RateState(
        rate=jnp.ones((), loc.dtype),
        noisy_steps=jnp.zeros((), jnp.int32),
        rejected=jnp.zeros((), jnp.int32),
        last_gradient=jnp.zeros_like(loc),
    )


def search(
    state: RateState, losses: Array, noisy: Array, gradient: Any, propose: Callable[[Array], tuple[Any, Array]]
) -> tuple[RateState, Any, Array]:
    """The accepted proposal.

    Args:
        losses: [S], where the step starts.
        noisy: whether the natural gradient tells nothing but noise.
        gradient: kept for the next step.
        propose: rate -> (proposal, losses [S] of the proposal at the same draws).

    Returns:
        the next rate state, the last proposal made, and whether it was accepted.
    """
    noisy_steps = state.noisy_steps + noisy.astype(jnp.int32)
    first_rate = jnp.minimum(state.rate, 2 / (noisy_steps.astype(state.rate.dtype) + 2))

    def attempt(carry):
        tries, rate, _, _ = carry
        rate = jnp.where(tries == 0, rate, CUT * rate)
        proposal, proposed = propose(rate)
        return tries + 1, rate, proposal, not_worse(losses, proposed)

    # `propose` is traced once, inside the loop; the placeholder only gives the carry its shape.
    placeholder = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(propose, first_rate)[0])
    tries, rate, proposal, accepted = lax.while_loop(
        lambda carry: ~carry[3] & (carry[0] < MAX_PROPOSALS) & jnp.isfinite(losses).all(),
        attempt,
        (jnp.zeros((), jnp.int32), first_rate, placeholder, jnp.zeros((), bool)),
    )
    next_rate = jnp.where(tries == 1, jnp.minimum(1, GROW * rate), rate)
    next_rate = jnp.where(accepted, next_rate, CUT * first_rate).astype(state.rate.dtype)
    next_state = RateState(
        rate=next_rate,
        noisy_steps=noisy_steps,
        rejected=state.rejected + (~accepted).astype(jnp.int32),
        last_gradient=gradient,
    )
    return next_state, proposal, accepted


def inside_noise(estimate: Estimate, precision: Precision) -> Array:
    """r² < 2 V: whether the natural gradient is indistinguishable from its Monte Carlo error."""
    squared_norm = jax.vmap(lambda vector: vector @ precision.solve(vector))
    num_pairs = len(estimate.pair_gradients)
    spread = squared_norm(estimate.pair_gradients - estimate.gradient).sum()
    residual = squared_norm(estimate.gradient[None])[0]
    return residual < NOISE_RATIO * spread / (num_pairs * (num_pairs - 1))


def opposed(estimate: Estimate, precision: Precision, last_gradient: Array) -> Array:
    """gᵀ S⁻¹ g_last < 0: whether this step takes back what the last one did."""
    return estimate.gradient @ precision.solve(last_gradient) < 0


def not_worse(before: Array, after: Array) -> Array:
    """Mean paired difference at most its standard error, and at most rounding where there is none."""
    num_pairs = len(before) // 2
    change = after - before
    change = (change[:num_pairs] + change[num_pairs:]) / 2
    error = change.std() / (num_pairs - 1) ** 0.5
    rounding = 64 * jnp.finfo(before.dtype).eps * jnp.abs(before).mean()
    return jnp.isfinite(after).all() & (change.mean() <= error + rounding)
