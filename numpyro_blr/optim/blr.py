"""The Bayesian learning rule for Gaussian guides.

With q(z) = N(z | m, S⁻¹), ℓ(z) = −log p(D, z) and temperature τ:

    S ← (1 − ρ) S + ρ E_q[∇²ℓ] / τ          precision.blend
    m ← m − ρ S_new⁻¹ E_q[∇ℓ] / τ           precision.solve

which is λ ← (1 − ρ) λ − (ρ/τ) ∇_μ E_q[ℓ] in the natural parameters λ = (S m, −S/2) (`families/_family.py` has the two
lines between). The *new* S in the second line makes ρ = 1 Bayes' rule wherever ℓ is quadratic.

Source: Khan & Rue 2023, "The Bayesian Learning Rule", equations 9 to 12; Khan 2025, arXiv 2509.15641.
Paper's symbols: ρ = `learning_rate`, m = `loc`, S = `precision`, τ = `temperature`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.optim
from jax import Array
from numpyro.infer import SVI

from ..families import Block, DensePrecision, DiagonalPrecision, Precision
from ..gradients import Draws, Estimate, Objective, hessian, hutchinson, reparameterized
from . import _options, _rate, _svi
from ._layout import Layout, gather, recognise, scatter

__all__ = ["BLR", "OptState", "State", "init", "step"]

MAX_DENSE_DIMENSION = 256
UNLEARNED_SCALE = 0.1


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
    """

    loc: Array
    precision: Precision
    rate: _rate.RateState
    radius: Array
    skipped: Array


def init(loc: Array, precision: Precision) -> State:
    """The state at N(loc, precision⁻¹)."""
    return State(
        loc=loc,
        precision=precision,
        rate=_rate.init(loc),
        radius=jnp.ones((), loc.dtype),
        skipped=jnp.zeros((), jnp.int32),
    )


def step(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    others: Any,
    draws: Draws | None,
    estimator: Callable[..., Estimate],
    learning_rate: Array | None = None,
) -> tuple[State, Estimate, Array]:
    """One step of the rule.

    Args:
        objective: L(m, C; ε), see `gradients/_estimate.py`.
        others: parameters of the objective that are no part of the Gaussian; differentiated, not moved.
        learning_rate: ρ; None lets the draws choose it (`_rate.py`).

    Returns:
        the next state, the estimate, and whether the Gaussian moved. Where the loss, a gradient or the proposed state
        is not finite, nothing moves, the step is counted in `skipped`, and the next draws are taken closer to m.
    """
    scales = scales_of(state.precision, blocks, state.radius)
    estimate = completed(estimator(objective, state.loc, scales, others, draws), state.precision)
    usable = all_finite(estimate.losses, estimate.gradient, estimate.hessian, estimate.others)

    assert estimate.extras.weight is not None  # `completed` fills it in
    covered = estimate.extras.weight > 0

    def propose(rate: Array) -> tuple[Array, Precision]:
        precision = state.precision.blend(estimate.hessian, rate)
        direction = jnp.where(covered, precision.solve(estimate.gradient), 0)
        return state.loc - rate * direction, precision

    def propose_and_evaluate(rate: Array) -> tuple[tuple[Array, Precision], Array]:
        loc, precision = propose(rate)
        proposed_scales = scales_of(precision, blocks, state.radius)
        return (loc, precision), jax.vmap(lambda draw: objective(loc, proposed_scales, others, draw)[0])(draws)

    if learning_rate is None:
        rate, (loc, precision), moved = _rate.search(state.rate, estimate, state.precision, propose_and_evaluate)
    else:
        rate, (loc, precision) = state.rate, propose(learning_rate)
        usable &= all_finite(loc, precision, scales_of(precision, blocks, state.radius))
        moved = usable

    radius = jnp.minimum(1, 2 * state.radius)
    accepted = replace(state, loc=loc, precision=precision, rate=rate, radius=radius)
    rejected = replace(state, rate=rate)
    unusable = replace(state, radius=state.radius / 2, skipped=state.skipped + 1)
    moved &= usable
    return select(moved, accepted, select(usable, rejected, unusable)), estimate, moved


def scales_of(precision: Precision, blocks: tuple[Block, ...], radius: Array) -> tuple[Array | None, ...]:
    """C_b of every block that has one of its own."""
    return tuple(
        radius * precision.scale(block) if block.structure in ("diagonal", "dense") else None for block in blocks
    )


def completed(estimate: Estimate, precision: Precision) -> Estimate:
    """The estimate with what it says nothing about left as it is.

    A coordinate whose entropy enters the loss w times is solved for ℓ/w: the row of a subsampled plate sees its own
    term once and not N/M times. A row outside the batch, and a coordinate that the loss does not depend on, stay.
    """
    diagonal = jnp.diagonal(estimate.hessian) if estimate.hessian.ndim == 2 else estimate.hessian
    weight = jnp.ones_like(estimate.gradient) if estimate.extras.weight is None else estimate.extras.weight
    weight = jnp.where((estimate.gradient == 0) & (diagonal == 0), 0, weight)
    gradient_weight = jnp.where(weight > 0, weight, 1)
    return estimate._replace(
        gradient=estimate.gradient / gradient_weight,
        pair_gradients=estimate.pair_gradients / gradient_weight,
        hessian=precision.complete(estimate.hessian, weight),
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
            for block, scale in zip(blocks, scales, strict=True)
            if scale is not None
        )
        return loss / temperature + (1 / temperature - 1) * log_determinant, extras

    return tempered_objective


def all_finite(*trees: Any) -> Array:
    leaves = jax.tree.leaves(trees)
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def select(condition: Array, chosen: Any, otherwise: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, otherwise)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptState:
    """What SVI carries as the optimizer's state.

    Attributes:
        params: all parameters by name, in SVI's unconstrained coordinates.
        gaussian: the rule's own state.
        others: state of the optimizer of the other parameters.
        layout: which parameter is which coordinate of the Gaussian.
    """

    params: dict[str, Any]
    gaussian: State
    others: Any
    layout: Layout


class BLR(numpyro.optim._NumPyroOptim):
    """The Bayesian learning rule as an optimizer for the stock `SVI`: swap the optimizer, change nothing else.

    Recognises the Gaussian sites of the guide (`AutoNormal`, `AutoDiagonalNormal`, `AutoMultivariateNormal`,
    `AutoGuideList` of these, `AutoDelta`, hand-written `Normal` and `MultivariateNormal` sites fed by parameters) and
    moves them by λ ← (1 − ρ) λ − ρ ∇_μ E_q[ℓ]. On a linear-Gaussian model one step is the exact posterior.

    Args:
        learning_rate: ρ in (0, 1], or a schedule, a function of the step 0, 1, 2, ... None (the default) chooses ρ at
            every step from the draws: as long as the loss at common draws supports, shorter once the natural gradient
            is inside its own Monte Carlo error.
        estimator: of E_q[∇²ℓ]. `"hessian"`: dense Hessians, the choice of `"auto"` up to 256 coordinates and for
            full-rank guides; D + 1 gradients a draw, won back in steps. `"hutchinson"`: the diagonal from
            Hessian-vector products, about 3 gradients a draw; the choice of `"auto"` beyond. `"gradient"`: the stock
            gradient alone, at the host's own draws; noisy, so it needs a `learning_rate`.
        num_draws: draws a step and particle, in antithetic pairs; even. Not used by `estimator="gradient"`.
        temperature: τ > 0 of E_q[ℓ] − τ H(q). 1 is Bayes.
        others: optimizer of the parameters that belong to no recognised site, a `numpyro.optim` or optax optimizer;
            `numpyro.optim.Adam(1e-3)` if None. They get their gradient from the same backward passes.

    Raises:
        TypeError, ValueError: at construction for arguments out of range; at `svi.init` for a loss that is no ELBO,
            a guide without a Gaussian site, and parameters that are not real floating-point arrays.
        FloatingPointError: from `svi.get_params` (which `svi.run` calls) once ten or more steps and nothing but
            steps with a loss or gradient that is not finite have been taken. Fewer are reported in a warning.

    Example:
        >>> svi = SVI(model, AutoMultivariateNormal(model), BLR(), Trace_ELBO())
        >>> result = svi.run(rng_key, 100, x, y)
    """

    def __init__(
        self,
        learning_rate: float | Callable[[Array], Array] | None = None,
        *,
        estimator: str = "auto",
        num_draws: int = 8,
        temperature: float = 1.0,
        others: Any = None,
    ) -> None:
        self.learning_rate = _options.checked_rate(learning_rate, estimator)
        self.estimator = _options.checked_estimator(estimator)
        self.num_draws = _options.checked_num_draws(num_draws)
        self.temperature = _options.checked_temperature(temperature)
        self.others = _svi.host_optimizer(others)

    def init(self, params: Mapping[str, Any]) -> tuple[Array, OptState]:
        """The state for SVI's unconstrained `params`; called by `SVI.init`, from which it learns the guide."""
        _svi.check_params(params)
        svi, args, kwargs = _svi.calling_svi(SVI.init)
        _svi.check_loss(svi.loss)
        gradient_only = self.estimator == "gradient"
        layout = recognise(svi, args, kwargs, params, learned_scales_only=gradient_only)
        full_rank = any(block.structure == "dense" for block in layout.blocks)
        if full_rank and self.estimator == "hutchinson":
            raise ValueError(
                "estimator='hutchinson' gives the diagonal of the Hessian, and the guide has a full-rank site. "
                "Use estimator='hessian', or a mean-field guide."
            )
        dimension = sum(block.size for block in layout.blocks)
        small = self.estimator == "hessian" or (self.estimator == "auto" and dimension <= MAX_DENSE_DIMENSION)
        family = DensePrecision if full_rank or small else DiagonalPrecision

        @jax.jit  # one compilation and not one an operation
        def start(params: dict[str, Any]) -> State:
            loc, scales = gather(layout, params)
            return init(loc, family.from_scales(layout.blocks, scales, UNLEARNED_SCALE, like=loc))

        state = OptState(
            params=jax.tree.map(jnp.copy, dict(params)),  # no buffer twice, so that the state can be donated
            gaussian=start(dict(params)),
            others=self.others.init({name: params[name] for name in layout.others}),
            layout=layout,
        )
        return jnp.zeros((), int), state

    def get_params(self, state: tuple[Array, OptState]) -> dict[str, Any]:
        """The unconstrained parameters; reports steps that were skipped, where the state is not being traced."""
        count, opt_state = _svi.checked_state(state, OptState)
        _svi.report_skipped(count, opt_state.gaussian.skipped)
        return opt_state.params

    def eval_and_update(
        self, fn: Callable, state: tuple[Array, OptState], forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Array, Any], tuple[Array, OptState]]:
        """One step on SVI's loss `fn`: ((loss averaged over the draws, host's auxiliary output), next state)."""
        count, opt_state = _svi.checked_state(state, OptState)
        layout, gaussian, params = opt_state.layout, opt_state.gaussian, opt_state.params
        others = {name: params[name] for name in layout.others}
        gaussian, estimate, moved = step(
            gaussian,
            tempered(_svi.objective_of(fn, layout, params), layout.blocks, self.temperature),
            layout.blocks,
            others,
            None if self.estimator == "gradient" else self._draws(count, gaussian),
            self._estimator(gaussian.precision, layout.blocks, forward_mode_differentiation),
            self._rate(count, gaussian.loc.dtype),
        )
        used = gaussian.skipped == opt_state.gaussian.skipped
        others_state = opt_state.others
        if layout.others:
            others_state = select(used, self.others.update(estimate.others, others_state, estimate.loss), others_state)
            others = self.others.get_params(others_state)
        scales = scales_of(gaussian.precision, layout.blocks, jnp.ones((), gaussian.loc.dtype))
        fitted = select(moved, scatter(layout, gaussian.loc, scales, params), params)
        opt_state = OptState(params={**fitted, **others}, gaussian=gaussian, others=others_state, layout=layout)
        return (estimate.loss, estimate.extras.aux), (count + 1, opt_state)

    def eval_and_stable_update(
        self, fn: Callable, state: tuple[Array, OptState], forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Array, Any], tuple[Array, OptState]]:
        """As `eval_and_update`, which never takes a step that is not finite; the loss of such a step is NaN here."""
        (loss, aux), next_state = self.eval_and_update(fn, state, forward_mode_differentiation)
        used = next_state[1].gaussian.skipped == state[1].gaussian.skipped
        return (jnp.where(used, loss, jnp.nan), aux), next_state

    def _draws(self, count: Array, gaussian: State) -> Draws:
        num_pairs = self.num_draws // 2
        number = jnp.tile(jnp.arange(num_pairs), 2)
        sign = jnp.repeat(jnp.array([1.0, -1.0], gaussian.loc.dtype), num_pairs)
        probes = None
        if isinstance(gaussian.precision, DiagonalPrecision):
            # the probes are independent of the draws, whose noise comes from SVI's key
            key = jax.random.fold_in(jax.random.key(0), count)
            probes = jax.random.rademacher(key, (self.num_draws, *gaussian.loc.shape), gaussian.loc.dtype)
        return Draws(number=number, sign=sign, probes=probes)

    def _estimator(self, precision: Precision, blocks: tuple[Block, ...], forward: bool) -> Callable[..., Estimate]:
        dense = isinstance(precision, DensePrecision)
        if self.estimator == "gradient":
            return lambda objective, loc, scales, others, _: reparameterized(
                objective, loc, scales, others, blocks, dense=dense, forward=forward
            )
        return partial(hessian if dense else hutchinson, forward=forward)

    def _rate(self, count: Array, dtype: Any) -> Array | None:
        if self.learning_rate is None:
            return None
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        return jnp.asarray(rate, dtype)
