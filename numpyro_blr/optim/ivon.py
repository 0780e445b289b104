"""IVON as an optimizer for NumPyro's SVI: a diagonal Gaussian over the weights of large networks.

The rule is `_ivon.py`; `_weights.py` says what it is told of the model.

Source: Shen et al. 2024, "Variational Learning is Effective for Large Deep Networks" (ICML); Khan & Rue 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro.distributions import biject_to
from numpyro.infer import SVI
from numpyro.optim import _NumPyroOptim

from . import _ivon, _options, _svi, _weights
from ._gaussian import all_finite, select
from ._ivon import Prior, Settings, State, Weights
from ._layout import Layout
from ._recognition import recognise

__all__ = ["IVON", "IVONState"]

LEARNING_RATES = {"factored": 0.05, "posterior": 0.1}
CLIP_RADII = {"factored": 10.0, "posterior": float("inf")}
MEMORIES = {"factored": 0.9999, "posterior": 0.99999}  # of the curvature


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IVONState:
    """What the optimizer carries from one SVI update to the next.

    Attributes:
        weights: the Gaussian and its averages (`_ivon.State`).
        priors: of each site.
        known: the sites whose prior is a Normal with constant parameters, and so no part of the estimates.
        sums: Σ ĝ and Σ ĥ over the updates since the last step; empty where every update is a step.
        updates: so far; a step is taken at each `accumulation_steps`-th.
        pair: where two draws are an antithetic pair, what the second takes from the first.
        params: the parameters of no site, by name, and their optimizer's state, `others`.
        layout: which parameter is which site's.
        settings: what does not change, N among them.
    """

    weights: State
    priors: dict[str, Prior]
    sums: tuple[Weights, Weights]
    updates: Array
    pair: _weights.Pair
    params: dict[str, Any]
    others: Any
    layout: Layout
    settings: Settings = field(metadata={"static": True})
    known: tuple[str, ...] = field(metadata={"static": True})

    @property
    def skipped(self) -> Array:
        """Updates so far in which something was not finite, which left the weights as they were."""
        return self.weights.skipped


class IVON(_NumPyroOptim):
    """Variational online Newton for networks: swap the optimizer of the stock `SVI`, change nothing else.

    A diagonal Gaussian over many weights at the cost of AdamW: one gradient a step, at one draw of the weights, which
    every second time is the mirror image of the one before (not as published, nor where a step averages over particles,
    updates or workers). Takes the mean-field guides of the host (`AutoNormal`, `AutoDiagonalNormal`, hand-written
    `Normal` sites fed by parameters). The number of data is the model's: the scale of the observed sites, from plates
    or handlers; the precision of the prior is the prior's, and its share of gradient and curvature is exact where it is
    a Normal with constant parameters. What the guide says of the scales at the start is replaced by `hess_init`.

        σ² = τ / (N (h + δ)),   h ← β₂ h + (1 − β₂) ĥ,   m ← m − α · direction        (`_ivon.py` has every equation)

    Args:
        learning_rate: α > 0, or a schedule, a function of the step 0, 1, 2, ...; None (the default) is 0.05 for
            `preconditioner="factored"`, in units of min(s, √128 s²) with s the prior's standard deviation, at most
            0.3; 0.1 for `"posterior"`.
        preconditioner: of the mean. `"factored"`: root of the averaged squared gradients at the drawn weights, kept by
            rows and columns, with Nesterov momentum. `"posterior"`: the posterior's own; the published recursion.
        beta1: memory of the gradient's average.
        beta2: memory of the curvature's average; None is 0.9999 for `"factored"`, 0.99999 for `"posterior"`.
        beta3: memory of the averaged squares, for `"factored"`.
        hess_init: h₀ > 0, the curvature of the averaged loss at the start: σ₀ = 1/√(N (h₀ + δ)). None: 0.1, and for
            `"factored"` so much that σ₀ is at most an eighth of the prior's; wider draws hide few data.
        clip_radius: c, the longest element of the preconditioned gradient that a step takes; None is 10 for
            `"factored"`, ∞ for `"posterior"`.
        temperature: τ > 0 of E_q[ℓ] − τ H(q), or a function of the step. 1 is Bayes.
        accumulation_steps: updates whose gradients, each at a draw of its own, are averaged into one step.
        axis_name: of `jax.shard_map`, `pmap` or `vmap` under which the update runs: every position draws weights of
            its own, and the gradients are averaged over all.
        others: optimizer of the parameters that belong to no site, a `numpyro.optim` or optax optimizer;
            `numpyro.optim.Adam(1e-3)` if None.

    Raises:
        TypeError, ValueError: at construction for arguments out of range; at `svi.init` for a loss that is no ELBO, a
            guide with sites that are not independent Normals, a model without data, local latents.
        FloatingPointError: from `svi.get_params` once ten or more updates and nothing but updates with a loss or
            gradient that is not finite have been made. Fewer are reported in a warning.

    Example:
        >>> svi = SVI(model, AutoNormal(model), IVON(), Trace_ELBO())
        >>> result = svi.run(rng_key, 1000, x, y)
    """

    def __init__(
        self,
        learning_rate: float | Callable[[Array], Array] | None = None,
        *,
        preconditioner: str = "factored",
        beta1: float = 0.9,
        beta2: float | None = None,
        beta3: float = 0.99,
        hess_init: float | None = None,
        clip_radius: float | None = None,
        temperature: float | Callable[[Array], Array] = 1.0,
        accumulation_steps: int = 1,
        axis_name: Any = None,
        others: Any = None,
    ) -> None:
        self.preconditioner = _options.checked_preconditioner(preconditioner)
        rate = LEARNING_RATES[preconditioner] if learning_rate is None else learning_rate
        self.learning_rate = _options.checked_schedule("learning_rate", rate, may_be_zero=True)
        self.beta1 = _options.checked_memory("beta1", beta1)
        self.beta2 = _options.checked_memory("beta2", MEMORIES[preconditioner] if beta2 is None else beta2)
        self.beta3 = _options.checked_memory("beta3", beta3)
        self.hess_init = None if hess_init is None else _options.checked_positive("hess_init", hess_init)
        radius = CLIP_RADII[preconditioner] if clip_radius is None else clip_radius
        self.clip_radius = _options.checked_positive("clip_radius", radius, finite=False)
        self.temperature = _options.checked_schedule("temperature", temperature, may_be_zero=False)
        self.accumulation_steps = _options.checked_count("accumulation_steps", accumulation_steps)
        self.axis_name = axis_name
        self.others = _svi.host_optimizer(others, "IVON")

    def init(self, params: Mapping[str, Any]) -> tuple[Array, IVONState]:
        """The state for SVI's unconstrained `params`; called by `SVI.init`, from which it learns guide and model."""
        _svi.check_params(params, "IVON")
        svi, args, kwargs = _svi.calling_svi(SVI.init, "IVON")
        _svi.check_loss(svi.loss, "IVON")
        layout = recognise(svi, args, kwargs, params, learned_scales_only=True, rule="IVON")
        _weights.check_layout(layout)
        num_data, priors = _weights.survey(svi, args, kwargs, layout, params, _svi.mutable_state())
        alone = svi.loss.num_particles == self.accumulation_steps == 1 and self.axis_name is None
        settings = Settings(
            num_data=num_data,
            preconditioner=self.preconditioner,
            paired=self.preconditioner == "factored" and alone,
            beta1=self.beta1,
            beta2=self.beta2,
            beta3=self.beta3,
            hess_init=self.hess_init,
            clip_radius=self.clip_radius,
        )
        weights = _ivon.init({site.name: params[site.loc] for site in layout.sites}, priors, settings)
        own = {name: params[name] for name in layout.others}
        state = IVONState(
            weights=weights,
            priors=priors,
            sums=_zeros(weights, self.accumulation_steps),
            updates=jnp.zeros((), jnp.int32),
            pair=_weights.Pair(words=jnp.zeros(2, jnp.uint32), due=jnp.zeros((), bool)),
            params=jax.tree.map(jnp.array, own),  # no buffer twice, so that the state can be donated
            others=self.others.init(own),
            layout=layout,
            settings=settings,
            known=tuple(name for name, prior in priors.items() if (prior.precision > 0).any()),
        )
        return jnp.zeros((), int), state

    def get_params(self, state: tuple[Array, IVONState]) -> dict[str, Any]:
        """The guide's unconstrained parameters; reports updates that were skipped, where the state is not traced."""
        count, opt_state = _svi.checked_state(state, IVONState, "IVON")
        _svi.report_skipped(count, opt_state.skipped, "IVON")
        params = dict(opt_state.params)
        scales = self._scales(opt_state)
        for site in opt_state.layout.sites:
            params[site.loc] = opt_state.weights.loc[site.name]
            params[site.scale] = biject_to(site.constraint).inv(scales[site.name])
        return params

    def eval_and_update(
        self, fn: Callable, state: tuple[Array, IVONState], forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Array, Any], tuple[Array, IVONState]]:
        """One update on SVI's loss `fn`: ((the loss, with its KL divergence exact, host's auxiliary), next state)."""
        count, opt_state = _svi.checked_state(state, IVONState, "IVON")
        if forward_mode_differentiation:
            raise ValueError(
                "IVON needs the gradient of every weight, which forward mode gives one by one: leave out "
                "forward_mode_differentiation=True, or use BLR."
            )
        weights, settings, layout = opt_state.weights, opt_state.settings, opt_state.layout
        scales, surrogate, pair = self._scales(opt_state), _ivon.surrogate(weights, settings), opt_state.pair

        def objective(loc: Weights, stretch: Weights, own: dict[str, Any]) -> tuple[Array, Any]:
            """ℓ̄ at the draw of the weights, its gradient less that of the surrogate."""
            total = {name: (settings.num_data * a, settings.num_data * b) for name, (a, b) in surrogate.items()}
            drawn = _weights.Perturb(layout, loc, stretch, scales, total, pair, opt_state.known, self.axis_name)
            with drawn:
                loss, aux = fn({**_weights.placeholders(layout, weights.loc), **own})
            # of several particles, the host maps over the draws
            return loss / settings.num_data, (aux, drawn.words[0] if settings.paired else pair.words)

        point = (weights.loc, jax.tree.map(jnp.zeros_like, weights.loc), opt_state.params)
        if self.axis_name is not None:
            point = _varying(point, self.axis_name)
        (loss, (aux, words)), (gradient, product, g_own) = jax.value_and_grad(
            objective, argnums=(0, 1, 2), has_aux=True
        )(*point)
        g_own = jax.tree.map(lambda g: settings.num_data * g, g_own)  # of the loss itself, as the host would hand it on
        temperature = self._temperature(opt_state)
        estimate = {}
        for name, hessian in weights.hessian.items():
            precision = _ivon.precision_of(hessian, opt_state.priors[name], settings.num_data, temperature)
            estimate[name] = _ivon.curvature(product[name], precision, hessian, weights.count, settings)
        if self.axis_name is not None:
            loss, gradient, estimate, g_own = jax.lax.pmean((loss, gradient, estimate, g_own), self.axis_name)
        divergence = self._divergence(opt_state)
        # sums, since XLA is slow at reducing what `isfinite` says of each element, in an array, or it would work all of
        # this out for every weight again; ĥ is finite where ĝ is
        sums = jnp.stack([loss, divergence, *(jnp.sum(value) for value in gradient.values())])
        usable = all_finite(sums, g_own)
        next_state = self._updated(opt_state, gradient, estimate, g_own, loss, usable)
        due = usable & ~pair.due if settings.paired else pair.due
        next_state = replace(next_state, pair=_weights.Pair(words=words, due=due))
        return (settings.num_data * loss + divergence, aux), (count + 1, next_state)

    def _updated(
        self,
        opt_state: IVONState,
        gradient: Weights,
        estimate: Weights,
        g_own: dict[str, Any],
        loss: Array,
        usable: Array,
    ) -> IVONState:
        """The next state: a step, or one more update on the way to it; where it is not `usable`, one more skipped."""
        weights, sums, steps = opt_state.weights, opt_state.sums, self.accumulation_steps
        updates = opt_state.updates + 1
        if steps > 1:
            sums = jax.tree.map(jnp.add, sums, (gradient, estimate))
            gradient, estimate = jax.tree.map(lambda total: total / steps, sums)

        def advance(_: None) -> tuple[State, tuple[Weights, Weights]]:
            rate = self.learning_rate(weights.count) if callable(self.learning_rate) else self.learning_rate
            priors, settings = opt_state.priors, opt_state.settings
            estimated = opt_state.pair.due | (not settings.paired)
            moved = _ivon.step(weights, gradient, estimate, usable, estimated, priors, rate, settings)
            return moved, jax.tree.map(jnp.zeros_like, sums)

        if steps > 1:
            weights, sums = jax.lax.cond(updates % steps == 0, advance, lambda _: (weights, sums), None)
        else:
            weights, sums = advance(None)
        others, own = opt_state.others, opt_state.params
        if jax.tree.leaves(own):
            others = self.others.update(g_own, others, loss)
            own = self.others.get_params(others)
        weights = replace(weights, skipped=weights.skipped + jnp.where(usable, 0, 1))
        before = (opt_state.sums, opt_state.updates, opt_state.params, opt_state.others)
        sums, updates, own, others = select(usable, (sums, updates, own, others), before)
        return replace(opt_state, weights=weights, sums=sums, updates=updates, params=own, others=others)

    def eval_and_stable_update(
        self, fn: Callable, state: tuple[Array, IVONState], forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Array, Any], tuple[Array, IVONState]]:
        """As `eval_and_update`, which never takes a step that is not finite; the loss of such a step is NaN here."""
        (loss, aux), next_state = self.eval_and_update(fn, state, forward_mode_differentiation)
        used = next_state[1].skipped == state[1].skipped
        return (jnp.where(used, loss, jnp.nan), aux), next_state

    def _temperature(self, opt_state: IVONState) -> Array | float:
        count = opt_state.weights.count - opt_state.pair.due.astype(jnp.int32)  # one for both draws of a pair
        return self.temperature(count) if callable(self.temperature) else self.temperature

    def _scales(self, opt_state: IVONState) -> Weights:
        num_data, temperature = opt_state.settings.num_data, self._temperature(opt_state)
        return {
            name: _ivon.scale_of(hessian, opt_state.priors[name], num_data, temperature)
            for name, hessian in opt_state.weights.hessian.items()
        }

    def _divergence(self, opt_state: IVONState) -> Array:
        """KL(q ‖ prior), site after site, so that the terms of one alone are there at a time."""
        weights, num_data = opt_state.weights, opt_state.settings.num_data
        total, temperature = jnp.zeros(()), self._temperature(opt_state)
        for name, prior in opt_state.priors.items():
            hessian = jnp.where(_ivon.there(total), weights.hessian[name], jnp.nan)
            precision = _ivon.precision_of(hessian, prior, num_data, temperature)
            total += _ivon.kl_divergence(weights.loc[name], precision, prior, num_data)
        return total


def _varying(tree: Any, axis_name: Any) -> Any:
    """The same values, as each position's own: of what is one for all, `jax.shard_map` adds the gradients up."""
    zero = 0 * jax.lax.axis_index(axis_name)  # `jax.lax.pcast` does the same, but under neither vmap nor older jax
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


def _zeros(weights: State, accumulation_steps: int) -> tuple[Weights, Weights]:
    if accumulation_steps == 1:
        return {}, {}
    return jax.tree.map(jnp.zeros_like, (weights.loc, weights.hessian))
