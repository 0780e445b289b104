"""The Bayesian learning rule for Gaussian guides.

With q(z) = N(z | m, S⁻¹), ℓ(z) = −log p(D, z) and temperature τ:

    S ← (1 − ρ) S + ρ E_q[∇²ℓ] / τ          precision.blend
    m ← m − ρ S_new⁻¹ E_q[∇ℓ] / τ           precision.solve

which is λ ← (1 − ρ) λ − (ρ/τ) ∇_μ E_q[ℓ] in the natural parameters λ = (S m, −S/2) (`families/_family.py` has the two
lines between). The *new* S in the second line makes ρ = 1 Bayes' rule wherever ℓ is quadratic. Where S is a diagonal,
all of E_q[∇²ℓ] may take its place there (`_newton.py`).

Source: Khan & Rue 2023, "The Bayesian Learning Rule", equations 9 to 12; Khan 2025, arXiv 2509.15641.
Paper's symbols: ρ = `learning_rate`, m = `loc`, S = `precision`, τ = `temperature`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..families import Block, DiagonalPrecision, Precision, factored
from ..gradients import Draws, Estimate, Objective
from ..gradients.recycled import scaled
from . import _newton, _rate

__all__ = ["State", "all_finite", "beside", "completed", "init", "scales_of", "select", "skipped", "step", "tempered"]

RETREAT = 1 / 64  # of the radius
BESIDE = 0.01


Product = Callable[..., Callable[[Array], Array] | None]
"""(L, m, scales, others, draws) -> (v -> E_q[H] v), or None where there is no such derivative."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The Gaussian and what the rule carries with it.

    Attributes:
        loc: m, [D].
        precision: S.
        rate: of the automatic mode (`_rate.RateState`).
        radius: in (0, 1], by which the draws are drawn towards m after a loss that was not finite there.
        skipped: steps so far that left everything else as it was, because the loss or a gradient was not finite.
        evaluations: gradients of ℓ so far; a Hessian counts as D, a Hessian-vector product as 2, a loss as 1.
        residual: r² = gᵀ S⁻¹ g where the last step began, the squared length of the natural gradient of m in the Fisher
            norm; `error` is V, its Monte Carlo variance. NaN before the first step, and of a single draw.
        num_averaged: n of each coordinate, the steps over which a diagonal S is averaged beside a mean that moves by
            E_q[H] v (`_newton.py`), [D]; None where S moves the mean.
        recycling: the draws that are kept for later steps (`_recycled.Recycling`); None where they are not.
    """

    loc: Array
    precision: Precision
    rate: _rate.RateState
    radius: Array
    skipped: Array
    evaluations: Array
    residual: Array
    error: Array
    num_averaged: Array | None = None
    recycling: Any = None


def init(loc: Array, precision: Precision, recycling: Any = None, by_products: bool = False) -> State:
    """The state at N(loc, precision⁻¹), whose mean moves by E_q[H] v, or by S."""
    return State(
        loc=loc,
        precision=precision,
        rate=_rate.init(loc),
        radius=jnp.ones((), loc.dtype),
        skipped=jnp.zeros((), jnp.int32),
        evaluations=jnp.zeros((), loc.dtype),
        residual=jnp.full((), jnp.nan, loc.dtype),
        error=jnp.full((), jnp.nan, loc.dtype),
        num_averaged=jnp.zeros_like(loc) if by_products else None,
        recycling=recycling,
    )


def beside(loc: Array, precision: Precision, blocks: tuple[Block, ...]) -> Array:
    """m + C ε/100: where all is symmetric around m, it is a saddle that antithetic draws would never leave."""
    noise = BESIDE * np.random.default_rng(0).standard_normal(len(loc))
    return loc + scaled(blocks, tuple(map(precision.scale, blocks)), jnp.asarray(noise, loc.dtype))


def step(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    others: Any,
    draws: Draws | None,
    estimator: Callable[..., Estimate],
    learning_rate: Array | None = None,
    product: Product | None = None,
) -> tuple[State, Estimate, Array]:
    """One step of the rule.

    Args:
        objective: L(m, C; ε), see `gradients/_estimate.py`.
        others: parameters of the objective that are no part of the Gaussian; differentiated, not moved.
        learning_rate: ρ; None lets the draws choose it (`_rate.py`).
        product: for a diagonal S, of the products that move the mean (`_newton.py`); None where S moves it.

    Returns:
        the next state, the estimate, and whether the Gaussian moved. Where the loss, a gradient or the proposed state
        is not finite, the step is `skipped`: nothing moves, and the next draws are taken closer to m.
    """
    scales = scales_of(state.precision, blocks, state.radius)
    estimate = completed(estimator(objective, state.loc, scales, others, draws, blocks), state.precision)
    usable = all_finite(estimate.losses, estimate.gradient, estimate.hessian, estimate.others)

    assert estimate.extras.weight is not None  # `completed` fills it in
    covered = estimate.extras.weight > 0

    newton = _newton.none(state.num_averaged, state.loc)
    if product is not None:
        alike = usable & ((estimate.extras.weight == 1) | ~covered).all() & ~jnp.asarray(estimate.extras.minibatch)

        def solved() -> _newton.Newton:
            assert isinstance(state.precision, DiagonalPrecision)  # with a dense one there is nothing to win
            assert state.num_averaged is not None  # where there are products
            by = product(objective, state.loc, scales, others, draws)
            return newton if by is None else _newton.find(by, estimate, state.precision, blocks, state.num_averaged)

        newton = lax.cond(alike, solved, lambda: newton)

    def propose(rate: Array) -> tuple[Array, Precision]:
        of_precision = rate if product is None else jnp.minimum(rate, newton.gain)
        precision = state.precision.blend(estimate.hessian, of_precision)
        by_precision = jnp.where(covered, precision.solve(estimate.gradient), 0)
        return state.loc - rate * jnp.where(newton.found, newton.direction, by_precision), precision

    def propose_and_evaluate(rate: Array) -> tuple[tuple[Array, Precision], Array]:
        loc, precision = propose(rate)
        losses = jax.vmap(lambda draw: objective(loc, scales, others, draw)[0])(draws)  # of m alone, see `_rate.py`
        sound = all_finite(loc, precision, scales_of(precision, blocks, state.radius))
        return (loc, precision), jnp.where(sound, losses, jnp.nan)

    residual, error = _rate.residual_and_error(estimate, state.precision)
    if learning_rate is None:
        inside, minibatch = residual < _rate.NOISE_RATIO * error, jnp.asarray(estimate.extras.minibatch)
        direction = jnp.where(newton.found, newton.direction, state.precision.solve(estimate.gradient))
        opposed = _rate.opposed(direction, state.rate.last_gradient)
        rate, (loc, precision), moved, proposals = _rate.search(
            state.rate,
            jnp.where(usable, estimate.losses, jnp.nan),  # a step that is refused makes no proposals
            _rate.counted(state.rate, inside, opposed, minibatch, estimate.extras.weight),
            residual + len(state.loc),
            _rate.averaged(state.rate.last_gradient, estimate.gradient, state.precision),
            propose_and_evaluate,
        )
    else:
        rate, (loc, precision), proposals = state.rate, propose(learning_rate), jnp.zeros((), jnp.int32)
        usable &= all_finite(loc, precision, scales_of(precision, blocks, state.radius))
        moved = usable

    evaluations = estimate.evaluations + len(estimate.losses) * (proposals + 2 * newton.num_products)
    evaluations = jnp.asarray(evaluations, loc.dtype)
    state = replace(state, evaluations=state.evaluations + evaluations, residual=residual, error=error)
    radius = jnp.minimum(1, 2 * state.radius)
    accepted = replace(state, loc=loc, precision=precision, rate=rate, radius=radius, num_averaged=newton.num_averaged)
    rejected = replace(state, rate=rate)
    unusable = skipped(state)
    moved &= usable
    return select(moved, accepted, select(usable, rejected, unusable)), estimate, moved


def skipped(state: State) -> State:
    """After draws that were not finite: the next ones are taken closer to m.

    If draws a 64th of the guide's own scale away were not either, m itself is no place to be, and goes halfway to the
    origin of the unconstrained space, around which the hosts start.
    """
    loc = jnp.where(state.radius > RETREAT, state.loc, state.loc / 2)
    return replace(state, loc=loc, radius=state.radius / 2, skipped=state.skipped + 1)


def scales_of(precision: Precision, blocks: tuple[Block, ...], radius: Array) -> tuple[Array | None, ...]:
    """C_b of every block that has one of its own."""
    return tuple(radius * precision.scale(block) if block.learned else None for block in blocks)


def completed(estimate: Estimate, precision: Precision) -> Estimate:
    """The estimate with what it says nothing about left as it is.

    A coordinate whose entropy enters the loss w times is solved for ℓ/w: the row of a subsampled plate sees its own
    term once and not N/M times. A row outside the batch, and a coordinate that the loss does not depend on, stay.
    What global coordinates have in common with rows is left out: over batches S would have the rows' part of it from
    one and the global part from others, whose difference, the precision of the global ones alone, may be anything.
    """
    diagonal = jnp.diagonal(estimate.hessian) if estimate.hessian.ndim == 2 else estimate.hessian
    weight = jnp.ones_like(estimate.gradient) if estimate.extras.weight is None else estimate.extras.weight
    weight = jnp.where((estimate.gradient == 0) & (diagonal == 0), 0, weight)
    gradient_weight, hessian = jnp.where(weight > 0, weight, 1), estimate.hessian
    if hessian.ndim == 2:
        apart = jnp.asarray(estimate.extras.minibatch) & (weight[:, None] != weight)
        hessian = jnp.where(apart, 0, hessian)
    return estimate._replace(
        gradient=estimate.gradient / gradient_weight,
        pair_gradients=estimate.pair_gradients / gradient_weight,
        hessian=precision.complete(hessian, weight),
        extras=estimate.extras._replace(weight=weight),
    )


def tempered(objective: Objective, blocks: tuple[Block, ...], temperature: float) -> Objective:
    """L/τ with the entropy kept whole: E_q[ℓ]/τ − H(q), whose fixed point is that of E_q[ℓ] − τ H(q)."""
    if temperature == 1:
        return objective

    def tempered_objective(loc, scales, others, draw):
        loss, extras = objective(loc, scales, others, draw)
        if extras.weight is not None:
            raise ValueError("temperature != 1 needs a guide without subsampled or scaled latent sites.")
        log_determinant = sum(
            jnp.log(jnp.diagonal(scale, axis1=-2, axis2=-1) if block.structure == "dense" else scale).sum()
            for block, scale in zip(*factored(blocks, scales), strict=True)
            if scale is not None
        )
        return loss / temperature + (1 / temperature - 1) * log_determinant, extras

    return tempered_objective


def all_finite(*trees: Any) -> Array:
    leaves = jax.tree.leaves(trees)
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def select(condition: Array, chosen: Any, otherwise: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)
