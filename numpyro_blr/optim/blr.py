"""The Bayesian learning rule as an optimizer for NumPyro's SVI: which rule moves which parameter.

The rules themselves are `_gaussian.py` (Gaussian sites, at a rate that is given or that the draws choose),
`_recycled.py` (the same with the draws of earlier steps) and `_sweep.py` (sites of other families);
`_recognition.py` says which parameters are which site's.

Source: Khan & Rue 2023, "The Bayesian Learning Rule"; Khan 2025, arXiv 2509.15641.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.optim
from jax import Array
from numpyro.infer import SVI

from ..families import (
    DensePrecision,
    DiagonalPrecision,
    LowRankPrecision,
    MultivariateNormalNatural,
    NormalNatural,
)
from ..gradients import (
    Chords,
    Draws,
    Estimate,
    Extras,
    Split,
    chords,
    hessian,
    hutchinson,
    parted,
    product,
    reparameterized,
    secant,
)
from . import _options, _recycled, _svi, _sweep
from ._conjugacy import are_jointly_quadratic, find_roles
from ._gaussian import State, all_finite, beside, init, scales_of, select, step, tempered
from ._layout import Layout, gather, gather_members, joined, scatter, scatter_members
from ._noise import digest_of
from ._recognition import halved, recognise

__all__ = ["BLR", "OptState", "State", "init", "scales_of", "step", "tempered"]

MAX_DENSE_DIMENSION = 256
NUM_DRAWS, NUM_DRAWS_ON_BATCHES = 8, 4
UNLEARNED_SCALE = 0.1
GAUSSIANS = (NormalNatural, MultivariateNormalNatural)
# what becomes of a step's key for them, far from the numbers of its draws
PROBES, MEMBERS, CHORDS = 2**31 - 1, 2**31 - 2, 2**31 - 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptState:
    """What SVI carries as the optimizer's state.

    Attributes:
        params: all parameters by name, in SVI's unconstrained coordinates.
        gaussian: the state of the Gaussian over the layout's sites; None where there are none.
        members: the state of the rule for the layout's members.
        others: state of the optimizer of the other parameters.
        layout: which parameter is which coordinate of the Gaussian, or of a member.
        roles: how each member takes part, in the order of a sweep.
        estimator: of E_q[∇²ℓ], the one that is taken for `"auto"`.
        num_draws: a step, or the most.
    """

    params: dict[str, Any]
    gaussian: State | None
    members: _sweep.Sweep
    others: Any
    layout: Layout
    roles: tuple[_sweep.Role, ...] = field(metadata={"static": True})
    estimator: str = field(metadata={"static": True})
    num_draws: int = field(metadata={"static": True})

    @property
    def skipped(self) -> Array:
        """Steps so far in which something was not finite and left the Gaussian, or a member, as it was."""
        return (
            self.members.skipped if self.gaussian is None else jnp.maximum(self.members.skipped, self.gaussian.skipped)
        )

    @property
    def gradient_evaluations(self) -> Array:
        """Gradients so far for the Gaussian; a Hessian counts as D, a Hessian-vector product as 2, a loss as 1."""
        return jnp.zeros(()) if self.gaussian is None else self.gaussian.evaluations

    @property
    def secants(self) -> Array | bool:
        """Whether the curvature is that of secants, from the start or since Hessians missed it."""
        recycling = None if self.gaussian is None else self.gaussian.recycling
        missed = None if recycling is None else recycling.missed
        return self.estimator == "secant" if missed is None else missed.secants


class BLR(numpyro.optim._NumPyroOptim):
    """The Bayesian learning rule as an optimizer for the stock `SVI`: swap the optimizer, change nothing else.

    Recognises the Gaussian sites of the guide (`AutoNormal`, `AutoDiagonalNormal`, `AutoMultivariateNormal`,
    `AutoLowRankMultivariateNormal`, `AutoGuideList` of these, `AutoDelta`, hand-written `Normal` and
    `MultivariateNormal` sites fed by parameters) and moves them by λ ← (1 − ρ) λ − ρ ∇_μ E_q[ℓ]. On a linear-Gaussian
    model one step is the exact posterior. Sites of other exponential families (`AutoExponentialFamily`,
    `natural_param`, a `Gamma` fed by parameters) move by the same rule, one after the other.

    Args:
        learning_rate: ρ in (0, 1], or a schedule, a function of the step 0, 1, 2, ... None (the default) chooses ρ at
            every step from the draws: as long as the loss at common draws supports, shorter once the natural gradient
            is inside its own Monte Carlo error.
        estimator: of E_q[∇²ℓ]. `"hessian"`: dense Hessians, the choice of `"auto"` up to 256 coordinates and for
            guides of full and low rank; D + 1 gradients a draw (2 D + 1 where the model has no second derivative), won
            back in steps. `"hutchinson"`: the diagonal from Hessian-vector products, 2 gradients a site (of at most 4)
            and 1, a draw, and on all data, without a `learning_rate`, the mean by conjugate gradients from up to 30
            more products (`_newton.py`); the choice of `"auto"` beyond. `"secant"`: either, from differences of
            gradients at a distance, of a log density with kinks too; 2 D + 1 gradients a draw, or as Hutchinson's; the
            choice of `"auto"` where a site is a Laplace distribution or made of one, and, where draws are recycled,
            while Hessians miss most of the curvature (`_missed.py`). `"gradient"`: the stock gradient alone, at the
            host's own draws; noisy, so it needs a `learning_rate`.
        num_draws: draws a step and particle, in antithetic pairs: even, and at least 4. Where draws are recycled, the
            most: a step begins with one pair. None is 8, or 4 where a plate is subsampled, since all draws of a step
            share the noise of its minibatch. Not used by `estimator="gradient"`.
        temperature: τ > 0 of E_q[ℓ] − τ H(q). 1 is Bayes.
        others: optimizer of the parameters that belong to no recognised site, a `numpyro.optim` or optax optimizer.
            They get their gradient from the same backward passes. None: with up to 256 coordinates in all, and no
            `learning_rate`, they are points beside the sites and take their steps, which are Newton's; otherwise
            `numpyro.optim.Adam(0.01)`.

    Raises:
        TypeError, ValueError: at construction for arguments out of range; at `svi.init` for a loss that is no ELBO,
            a guide without a recognised site, and parameters that are not real floating-point arrays.
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
        num_draws: int | None = None,
        temperature: float = 1.0,
        others: Any = None,
    ) -> None:
        self.learning_rate = _options.checked_rate(learning_rate, estimator)
        self.estimator = _options.checked_estimator(estimator)
        self.num_draws = None if num_draws is None else _options.checked_num_draws(num_draws)
        self.temperature = _options.checked_temperature(temperature)
        self.others = _svi.host_optimizer(others)
        alone = others is None and learning_rate is None and estimator in ("auto", "hessian")
        self._most_points = MAX_DENSE_DIMENSION if alone else 0

    def init(self, params: Mapping[str, Any]) -> tuple[Array, OptState]:
        """The state for SVI's unconstrained `params`; called by `SVI.init`, from which it learns the guide."""
        _svi.check_params(params)
        svi, args, kwargs = _svi.calling_svi(SVI.init)
        _svi.check_loss(svi.loss)
        gradient_only = self.estimator == "gradient"
        layout = recognise(svi, args, kwargs, params, learned_scales_only=gradient_only, points=self._most_points)
        if layout.members and gradient_only:
            raise ValueError(
                "estimator='gradient' uses the stock gradient of Gaussian sites alone, and the guide has "
                f"{', '.join(member.name for member in layout.members)} of other families. Use the default estimator."
            )
        layout, roles = self._roles(svi, args, kwargs, layout, params) if layout.members else (layout, ())
        gaussian, estimator, num_draws = None, "none", self.num_draws or NUM_DRAWS
        if layout.sites:
            gaussian, estimator, num_draws = self._gaussian(svi, args, kwargs, layout, params)
        layout = halved(layout, svi.guide) if estimator == "hessian" else layout
        state = OptState(
            params=jax.tree.map(jnp.copy, dict(params)),  # no buffer twice, so that the state can be donated
            gaussian=gaussian,
            members=_sweep.init(gather_members(layout, params)),
            others=self.others.init({name: params[name] for name in layout.others}),
            layout=layout,
            roles=roles,
            estimator=estimator,
            num_draws=num_draws,
        )
        return jnp.zeros((), int), state

    def _gaussian(
        self, svi: SVI, args: tuple, kwargs: dict, layout: Layout, params: Mapping[str, Any]
    ) -> tuple[State, str, int]:
        """The state for the sites, the estimator of their curvature, and the draws of a step."""
        structures = {block.structure for block in layout.blocks}
        low_rank, full = "low rank" in structures, not structures.isdisjoint({"dense", "low rank"})
        if full and self.estimator == "hutchinson":
            raise ValueError(
                "estimator='hutchinson' gives the diagonal of the Hessian, and the guide has a full-rank or a low-rank "
                "site. Use estimator='hessian', or a mean-field guide."
            )
        if low_rank and self.estimator == "gradient":
            raise ValueError(
                "estimator='gradient' is for sites that are mean field or full rank, and the guide has a low-rank "
                "site. Use estimator='hessian'."
            )
        dimension = sum(block.size for block in layout.blocks)
        small = dimension <= MAX_DENSE_DIMENSION and self.estimator in ("auto", "secant")
        dense = full or small or self.estimator == "hessian"
        family = LowRankPrecision if low_rank else DensePrecision if dense else DiagonalPrecision
        survey, estimator = _svi.survey(svi, args, kwargs, layout, params), self.estimator
        recycles = dense and self.learning_rate is None and survey.fixed
        if estimator == "auto":
            estimator = "secant" if survey.kinked else "hessian" if dense else "hutchinson"
        may_miss = self.estimator == "auto" and estimator == "hessian" and recycles and _svi.bends(svi, args, kwargs)
        by_products = estimator == "hutchinson" and self.learning_rate is None and not survey.minibatch
        num_draws = self.num_draws or (NUM_DRAWS_ON_BATCHES if survey.minibatch else NUM_DRAWS)

        @jax.jit  # one compilation and not one an operation
        def start(params: dict[str, Any]) -> State:
            loc, scales = gather(layout, params)
            precision = family.from_scales(layout.blocks, scales, UNLEARNED_SCALE, like=loc)
            start = loc
            if self.learning_rate is None:
                start = jnp.where(layout.bare, loc, beside(loc, precision, layout.blocks))
            recycling = _recycled.init(loc, scales, num_draws // 2, may_miss) if recycles else None
            return init(start, precision, recycling, by_products)

        return start(dict(params)), estimator, num_draws

    def _roles(
        self, svi: SVI, args: tuple, kwargs: dict, layout: Layout, params: Mapping[str, Any]
    ) -> tuple[Layout, tuple[_sweep.Role, ...]]:
        """How each member takes part; Normal members that no conjugacy holds for join the Gaussian of the sites."""
        naturals = gather_members(layout, params)
        objective = _svi.objective_of(_svi.loss_of(svi, args, kwargs), layout, params)
        others = {name: params[name] for name in layout.others}
        loc, scales = gather(layout, params)

        def evaluate_at(values: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            discrete = {name: natural for name, natural in naturals.items() if natural.discrete}

            def loss_at(own: dict[str, Array], values: dict[str, Array]) -> Array:
                weights = {name: own[name] for name in discrete}
                members = _svi.Members({**own, **{name: values[name] for name in discrete}}, weights)
                draw = Draws(number=jnp.zeros((), int), sign=jnp.ones((), loc.dtype), probes=None, members=members)
                return objective(loc, scales, others, draw)[0]

            def at_run(values: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
                own = {**values, **{name: jnp.ones(natural.batch_shape) for name, natural in discrete.items()}}
                return jax.value_and_grad(loss_at)(own, values)

            return jax.lax.map(at_run, values)

        roles = find_roles(layout.members, naturals, evaluate_at)
        ours = {member.name for member in layout.members if not member.keys}
        gaussian = [role.name for role in roles if isinstance(naturals[role.name], GAUSSIANS) and role.name in ours]
        not_affine = [role.name for role in roles if role.name in gaussian and role.kind != "affine"]
        size = sum(site.block.size for site in layout.sites)
        size += sum(naturals[name].to_distribution().mean.size for name in gaussian)
        alone = len(gaussian) == len(roles) > 1 and not any(role.local for role in roles)
        if size <= MAX_DENSE_DIMENSION and (
            layout.sites or not_affine or (alone and are_jointly_quadratic(naturals, evaluate_at))
        ):
            not_affine = gaussian  # one dense precision for all of them takes fewer steps than one after the other
        layout = joined(layout, not_affine, params)
        return layout, tuple(role for role in roles if role.name not in not_affine)

    def get_params(self, state: tuple[Array, OptState]) -> dict[str, Any]:
        """The unconstrained parameters; reports steps that were skipped, where the state is not being traced."""
        count, opt_state = _svi.checked_state(state, OptState)
        _svi.report_skipped(count, opt_state.skipped)
        return opt_state.params

    def eval_and_update(
        self, fn: Callable, state: tuple[Array, OptState], forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Array, Any], tuple[Array, OptState]]:
        """One step on SVI's loss `fn`: ((loss averaged over the draws, host's auxiliary output), next state)."""
        count, opt_state = _svi.checked_state(state, OptState)
        layout, params = opt_state.layout, opt_state.params
        others = {name: params[name] for name in layout.others}
        members, gaussian, estimate = opt_state.members, opt_state.gaussian, None
        fitted, draws = dict(params), None if self.estimator == "gradient" else self._draws(fn, opt_state)

        if layout.members:
            assert draws is not None  # refused at init
            members, fitted, draws, loss, g_others, extras = self._sweep(fn, count, opt_state, draws, others)
        if gaussian is not None and gaussian.recycling is not None:
            objective = tempered(_svi.objective_of(fn, layout, params), layout.blocks, self.temperature)
            normals = partial(_svi.joint_noise, _svi.key_of(fn, layout, params), like=gaussian.loc)
            gaussian, noise = _recycled.drawn(gaussian, normals, opt_state.num_draws // 2)
            secants = opt_state.estimator == "secant" or gaussian.recycling.missed is not None
            gaussian, average, moved = _recycled.step(
                gaussian,
                objective,
                layout.blocks,
                noise,
                self.temperature,
                digest_of(_svi.arguments_of_step()),
                chords=self._chords(fn, opt_state, len(gaussian.loc)) if secants else None,
                split=self._split(fn, opt_state),
                forward=forward_mode_differentiation,
            )
            loss, g_others, extras = self.temperature * average, {}, Extras(None)
        elif gaussian is not None:
            gaussian, estimate, moved = step(
                gaussian,
                tempered(_svi.objective_of(fn, layout, params), layout.blocks, self.temperature),
                layout.blocks,
                others,
                draws,
                self._estimator(fn, opt_state, forward_mode_differentiation),
                self._rate(count, gaussian.loc.dtype),
                None if gaussian.num_averaged is None else partial(product, forward=forward_mode_differentiation),
            )
        if gaussian is not None:
            scales = scales_of(gaussian.precision, layout.blocks, jnp.ones((), gaussian.loc.dtype))
            fitted = select(moved, scatter(layout, gaussian.loc, scales, fitted), fitted)
        if not layout.members and estimate is not None:
            loss, g_others = jax.tree.map(lambda value: self.temperature * value, (estimate.loss, estimate.others))
            extras = estimate.extras

        next_state = replace(opt_state, gaussian=gaussian, members=members)
        others_state = opt_state.others
        if layout.others:
            used = all_finite(loss, g_others) & (
                True if gaussian is None else gaussian.skipped == opt_state.gaussian.skipped
            )
            others_state = select(used, self.others.update(g_others, others_state, loss), others_state)
            others = self.others.get_params(others_state)
        next_state = replace(next_state, params={**fitted, **others}, others=others_state)
        return (loss, extras.aux), (count + 1, next_state)

    def _sweep(
        self, fn: Callable, count: Array, opt_state: OptState, draws: Draws, others: dict[str, Any]
    ) -> tuple[_sweep.Sweep, dict[str, Any], Draws, Array, Any, Extras]:
        """One update of every member, and the draws with which the Gaussian is to be updated given them."""
        layout, params, gaussian = opt_state.layout, opt_state.params, opt_state.gaussian
        naturals = gather_members(layout, params)
        design = _sweep.design_of(opt_state.roles, naturals, len(draws.number))
        loc, scales = gather(layout, params)
        if gaussian is not None:
            scales = scales_of(gaussian.precision, layout.blocks, gaussian.radius)
        objective = _svi.objective_of(fn, layout, params)
        runs = draws._replace(number=draws.number[design.draw], sign=draws.sign[design.draw], probes=None, chords=None)

        def evaluate(members: _svi.Members, others: Any) -> tuple[Array, Extras]:
            return jax.vmap(lambda draw: objective(loc, scales, others, draw))(runs._replace(members=members))

        drawn = any(role.kind == "drawn" for role in opt_state.roles)
        rng_key = jax.random.fold_in(_svi.key_of(fn, layout, params), MEMBERS) if drawn else jax.random.key(0)
        members, naturals, loss, g_others, extras = _sweep.sweep(
            opt_state.members,
            naturals,
            evaluate,
            others,
            opt_state.roles,
            design,
            rng_key,
            self._rate(count, next(iter(naturals.values())).flat().dtype),
            self.temperature,
        )
        draws = runs._replace(
            probes=None if draws.probes is None else draws.probes[design.draw],
            chords=jax.tree.map(lambda chord: chord[design.draw], draws.chords),
            members=_sweep.place(naturals, opt_state.roles, design, rng_key),
        )
        return members, scatter_members(layout, naturals, params), draws, loss, g_others, extras

    def eval_and_stable_update(
        self, fn: Callable, state: tuple[Array, OptState], forward_mode_differentiation: bool = False
    ) -> tuple[tuple[Array, Any], tuple[Array, OptState]]:
        """As `eval_and_update`, which never takes a step that is not finite; the loss of such a step is NaN here."""
        (loss, aux), next_state = self.eval_and_update(fn, state, forward_mode_differentiation)
        used = next_state[1].skipped == state[1].skipped
        return (jnp.where(used, loss, jnp.nan), aux), next_state

    def _draws(self, fn: Callable, opt_state: OptState) -> Draws:
        gaussian = opt_state.gaussian
        if gaussian is None and all(role.kind != "drawn" for role in opt_state.roles):
            return Draws(number=jnp.zeros(1, int), sign=jnp.ones(1), probes=None)  # the sweep's expectations are exact
        num_pairs = opt_state.num_draws // 2
        number = jnp.tile(jnp.arange(num_pairs), 2)
        sign = jnp.repeat(jnp.array([1.0, -1.0], float if gaussian is None else gaussian.loc.dtype), num_pairs)
        probes = None
        if gaussian is not None and isinstance(gaussian.precision, DiagonalPrecision):
            key = jax.random.fold_in(_svi.key_of(fn, opt_state.layout, opt_state.params), PROBES)
            signs = jax.random.rademacher(key, (opt_state.num_draws, *gaussian.loc.shape), gaussian.loc.dtype)
            probes = parted(signs, opt_state.layout.blocks)
        draws = Draws(number=number, sign=sign, probes=probes)
        if gaussian is not None and opt_state.estimator == "secant":
            num_directions = len(gaussian.loc) if probes is None else probes.shape[1]
            draws = draws._replace(chords=self._chords(fn, opt_state, num_directions).mirrored())
        return draws

    def _chords(self, fn: Callable, opt_state: OptState, num_directions: int) -> Chords:
        """Of as many pairs as a step may draw."""
        assert opt_state.gaussian is not None  # there are curvatures to estimate
        key = jax.random.fold_in(_svi.key_of(fn, opt_state.layout, opt_state.params), CHORDS)
        return chords(key, opt_state.num_draws // 2, num_directions, like=opt_state.gaussian.loc)

    def _split(self, fn: Callable, opt_state: OptState) -> Split | None:
        """The loss as a function of the wide coordinates alone, where Hessians cost less by it."""
        layout = opt_state.layout
        if not layout.wide:
            return None
        held = tempered(_svi.objective_of(fn, layout.holding, opt_state.params), layout.blocks, self.temperature)
        return Split(held, np.array(layout.wide))

    def _estimator(self, fn: Callable, opt_state: OptState, forward: bool) -> Callable[..., Estimate]:
        if opt_state.estimator == "gradient":
            assert opt_state.gaussian is not None  # there is one whose gradient it is
            dense = isinstance(opt_state.gaussian.precision, DensePrecision)
            return lambda objective, loc, scales, others, _, blocks: reparameterized(
                objective, loc, scales, others, blocks, dense=dense, forward=forward
            )
        if opt_state.estimator == "hessian":
            return partial(hessian, split=self._split(fn, opt_state), forward=forward)
        return partial({"hutchinson": hutchinson, "secant": secant}[opt_state.estimator], forward=forward)

    def _rate(self, count: Array, dtype: Any) -> Array | None:
        if self.learning_rate is None:
            return None
        rate = self.learning_rate(count) if callable(self.learning_rate) else self.learning_rate
        return jnp.asarray(rate, dtype)
