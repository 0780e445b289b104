"""The bridge: what the shared tests need of a framework and of its host, under the same names.

A test is written once and asks its `backend` for arrays, an objective, a step, a stock fit. Frameworks are imported
only when their bridge is built, so that each can be tested where the other is not installed.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cached_property
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.linalg

from . import reference
from .cases import FIXED_SCALE, Part

__all__ = ["BRIDGES", "Bridge", "NumPyroBridge", "PyroBridge"]


class Bridge:
    """What is the same for both: everything that can be said in their common dialect of array functions."""

    name: str
    package: str
    xp: Any  # the module of array functions
    host: SimpleNamespace  # what models and guides are written in
    fit_class: type

    def module(self, path: str) -> Any:
        return import_module(f"{self.package}.{path}")

    def argument(self, value: Any) -> Any:
        """A model's argument: floats in double precision, booleans and integers as they are."""
        if value is None:
            return None
        value = np.asarray(value)
        return self.array(value, "float64" if value.dtype.kind == "f" else str(value.dtype))

    @cached_property
    def families(self) -> Any:
        return self.module("families")

    @cached_property
    def gradients(self) -> Any:
        return self.module("gradients")

    @cached_property
    def guides(self) -> Any:
        return self.module("guides")

    @cached_property
    def blr(self) -> Any:
        return self.module("optim.blr")

    @property
    def BLR(self) -> Any:
        return import_module(self.package).BLR

    def blocks(self, parts: Sequence[Part]) -> tuple:
        return tuple(self.families.Block(part.start, part.shape, part.structure) for part in parts)

    def precision(self, value: np.ndarray) -> Any:
        """S from a matrix, or from the vector of its diagonal."""
        family = self.families.DensePrecision if value.ndim == 2 else self.families.DiagonalPrecision
        return family(self.array(value))

    def precision_array(self, precision: Any) -> np.ndarray:
        """The matrix, or the diagonal."""
        (field,) = fields(precision)
        return self.to_numpy(getattr(precision, field.name))

    def from_scales(self, parts: Sequence[Part], scales: tuple, unlearned: float, dense: bool) -> Any:
        family = self.families.DensePrecision if dense else self.families.DiagonalPrecision
        return family.from_scales(self.blocks(parts), scales, unlearned, like=self.array(0.0))

    @cached_property
    def _blend(self) -> Callable:
        return self.compiled(lambda precision, hessian, rate: precision.blend(hessian, rate))

    def natural_of(self, distribution: Any) -> Any:
        """λ of a host's distribution."""
        return self.families.natural_of(distribution)

    def gradient_of(self, fn: Callable, natural: Any) -> Any:
        """∇f(λ), an element of the dual space, of an f with one number for each of the batch."""
        leaves = tuple(getattr(natural, item.name) for item in fields(natural))
        return natural.Expectation(*self.gradient(lambda leaves: fn(type(natural)(*leaves)).sum(), leaves))

    def compiled_blend(self) -> Callable:
        """`blend` on NumPy arrays (S, H) and a rate, compiled once for all tests."""

        def blend(value: np.ndarray, hessian: np.ndarray, rate: float) -> np.ndarray:
            return self.precision_array(self._blend(self.precision(value), self.array(hessian), self.rate(rate)))

        return blend

    def state(self, state: reference.State) -> Any:
        """The package's own state with the numbers of the reference's."""
        made = self.blr.init(self.array(state.loc), self.precision(state.precision))
        rate = replace(
            made.rate,
            rate=self.scalar(state.rate, made.rate.rate),
            taken=self.scalar(state.taken, made.rate.taken),
            noisy_steps=self.scalar(state.noisy_steps, made.rate.noisy_steps),
            rejected=self.scalar(state.rejected, made.rate.rejected),
        )
        if state.last_gradient is not None:
            rate = replace(rate, last_gradient=self.array(state.last_gradient))
        return replace(
            made,
            rate=rate,
            radius=self.scalar(state.radius, made.radius),
            skipped=self.scalar(state.skipped, made.skipped),
            num_averaged=None if state.num_averaged is None else self.array(state.num_averaged),
        )

    def as_reference(self, state: Any) -> reference.State:
        return reference.State(
            loc=self.to_numpy(state.loc),
            precision=self.precision_array(state.precision),
            rate=float(state.rate.rate),
            taken=float(state.rate.taken),
            noisy_steps=float(state.rate.noisy_steps),
            rejected=int(state.rate.rejected),
            last_gradient=self.to_numpy(state.rate.last_gradient),
            radius=float(state.radius),
            skipped=int(state.skipped),
            num_averaged=None if state.num_averaged is None else self.to_numpy(state.num_averaged),
        )

    def objective(
        self, problem: Any, parts: Sequence[Part], noise: Any, weight: Any = None, minibatch: bool = False
    ) -> Callable:
        """L(m, C; ε) = ℓ(m + C ε) − log |C| with the given ε, as the packages define an objective.

        Args:
            noise: [K, D] in the backend's arrays; draw k is row k times its sign, the host's own draw is row 0, and a
                draw that has its noise needs none.
            weight: [D], with which each coordinate's entropy enters the loss; reported along with it.
            minibatch: reported as well.
        """
        xp = self.xp

        def evaluate(loc, scales, others, draw):
            epsilon = noise[0] if draw is None else draw.noise
            epsilon = noise[draw.number] * draw.sign if epsilon is None else epsilon
            values, entropy = [], 0.0
            for part, scale in zip(parts, scales, strict=True):
                here = slice(part.start, part.start + part.size)
                mean, eps, times = loc[here], epsilon[here], 1.0 if weight is None else weight[here]
                if part.structure == "dense":
                    values.append(mean + (scale @ eps.reshape(*part.shape, 1)).reshape(-1))
                    entropy = entropy + (times * xp.log(xp.einsum("...ii->...i", scale)).reshape(-1)).sum()
                elif part.structure == "diagonal":
                    values.append(mean + scale.reshape(-1) * eps)
                    entropy = entropy + (times * xp.log(scale).reshape(-1)).sum()
                else:
                    values.append(mean + (FIXED_SCALE if part.structure == "fixed" else 0.0) * eps)
            extras = self.gradients.Extras(aux=None, weight=weight, minibatch=self.flag(minibatch))
            return problem.loss(self, xp.concatenate(values)) - entropy, extras

        return evaluate

    def stepper(
        self,
        problem: Any,
        parts: Sequence[Part],
        estimator: Callable,
        learning_rate: float | None,
        *,
        weight: np.ndarray | None = None,
        minibatch: bool = False,
        temperature: float = 1.0,
        newton: bool = False,
    ) -> Callable:
        """(state, noise [K, D], probes [2 K, D] or None) -> (state, estimate, moved), compiled where that exists.

        With `newton` the mean moves by conjugate gradients.
        """
        blocks = self.blocks(parts)
        weight = None if weight is None else self.array(weight)

        def step(state, noise, probes):
            objective = self.blr.tempered(self.objective(problem, parts, noise, weight, minibatch), blocks, temperature)
            draws = self.draws(len(noise), probes)
            given = state, objective, blocks, None, draws, estimator, self.rate(learning_rate)
            return self.blr.step(*given, self.gradients.product if newton else None)

        compiled = self.compiled(step)
        return lambda state, noise, probes=None: compiled(
            state, self.array(noise), None if probes is None else self.array(probes)
        )

    def scales(self, precision: np.ndarray, parts: Sequence[Part]) -> tuple:
        """C_b of every part that has one of its own."""
        return self.blr.scales_of(self.precision(precision), self.blocks(parts), 1.0)

    def first_order(self, dense: bool) -> Callable:
        """The estimator of the stock gradient, as `BLR(estimator="gradient")` calls it."""
        return lambda objective, loc, scales, others, _, blocks: self.gradients.reparameterized(
            objective, loc, scales, others, blocks, dense=dense
        )

    def start(
        self,
        make_model: Callable,
        make_guide: Callable,
        args: tuple,
        *,
        loss: Any = None,
        rule: str = "BLR",
        **options: Any,
    ) -> Any:
        """A fit by the stock SVI with `rule(**options)` from seed 0, before its first step.

        Args:
            make_model, make_guide: host -> model, (host, model) -> guide.
            args: of the model, in NumPy.
            rule: name of the optimizer in the package.
        """
        return self.fit_class(self, make_model, make_guide, args, loss or self.loss(), options, rule)

    @property
    def IVON(self) -> Any:
        return import_module(self.package).IVON

    @cached_property
    def ivon(self) -> Any:
        return self.module("optim._ivon")

    def natural_param(self, name: str, distribution: Any) -> Any:
        return import_module(self.package).natural_param(name, distribution)

    def merge(self, prior: Any, posteriors: Sequence) -> Any:
        return import_module(self.package).merge(prior, posteriors)

    def leaves(self, vector: Any) -> tuple[np.ndarray, ...]:
        """The fields of a point of a family's spaces."""
        return tuple(self.to_numpy(getattr(vector, item.name)) for item in fields(vector))

    def start_families(self, make_model: Callable, args: tuple, guide_options: dict, **options: Any) -> Any:
        """`start` with the guide AutoExponentialFamily and a loss that takes discrete sites."""

        def make_guide(host: Any, model: Callable) -> Any:
            return import_module(self.package).AutoExponentialFamily(model, **self._guide_options(guide_options))

        return self.start(make_model, make_guide, args, loss=self.loss(self.discrete_loss), **options)

    def fit(self, make_model: Callable, guide: str, args: tuple, *, seed: int = 0, **options: Any) -> Any:
        """`fit` by the stock guide of that name, or AutoExponentialFamily, anew from this seed."""
        package = import_module(self.package)
        made = package.AutoExponentialFamily if guide == "AutoExponentialFamily" else None
        self.reset(seed)
        options = {"progress_bar": False, **self._seeded(seed), **options}
        made = getattr(self.host.autoguide, guide) if made is None else made
        return package.fit(make_model(self.host), made, *map(self.argument, args), **options)

    def _guide_options(self, options: dict) -> dict:
        start = {name: self.array(value) for name, value in options.get("start", {}).items()}
        return {**options, "start": start}


class NumPyroBridge(Bridge):
    discrete_loss = "TraceGraph_ELBO"  # the host's other losses warn of discrete latents
    name, package = "numpyro", "numpyro_blr"

    def __init__(self) -> None:
        import jax
        import numpyro

        numpyro.enable_x64()
        jax.config.update("jax_numpy_dtype_promotion", "strict")
        self.jax, self.numpyro, self.xp = jax, numpyro, jax.numpy
        self.host = SimpleNamespace(
            record=self.record,
            sample=numpyro.sample,
            factor=numpyro.factor,
            param=numpyro.param,
            plate=numpyro.plate,
            deterministic=numpyro.deterministic,
            mask=lambda mask: numpyro.handlers.mask(mask=mask),
            scale=lambda scale: numpyro.handlers.scale(scale=scale),
            block=numpyro.handlers.block,
            dist=numpyro.distributions,
            constraints=numpyro.distributions.constraints,
            lower_cholesky=numpyro.distributions.constraints.lower_cholesky,
            exp_of_one_derivative=self.exp_of_one_derivative(),
            inverse_gaussian=lambda loc, concentration: self.families.InverseGaussian(loc, concentration),
            wishart=lambda df, rate: numpyro.distributions.Wishart(df, rate_matrix=rate),
            array=self.array,
            integer=lambda value: self.xp.asarray(value),
            xp=self.xp,
            autoguide=numpyro.infer.autoguide,
            init_to_value=lambda values: numpyro.infer.init_to_value(
                values={name: self.array(value) for name, value in values.items()}
            ),
        )

    def exp_of_one_derivative(self) -> Callable:
        """exp, with a derivative that has none, as those of the solvers of differential equations."""
        exp = self.jax.custom_vjp(self.xp.exp)  # whose own forward pass it is
        exp.defvjp(lambda value: (exp(value),) * 2, lambda result, gradient: (gradient * result,))
        return exp

    def reset(self, seed: int) -> None:
        """Nothing is global here."""

    def record(self, values: dict[str, Any]) -> None:
        """Called in a model: what `drawn` of a fit is to return."""
        drawn = self.numpyro.primitives.mutable("drawn", self.jax.tree.map(self.xp.zeros_like, values))
        drawn.update(values)

    def ivon_init(self, loc: dict[str, np.ndarray], priors: dict, settings: Any) -> Any:
        """The rule's state at m = `loc`."""
        return self.ivon.init({name: self.array(value) for name, value in loc.items()}, priors, settings)

    def ivon_step(self, state: Any, gradient: dict, estimate: Any, priors: dict, rate: float, settings: Any) -> Any:
        """A step of the rule from ĝ and ĥ, or None, compiled by itself."""
        found = (gradient, gradient if estimate is None else estimate)
        arrays = [{name: self.array(value) for name, value in values.items()} for values in found]
        usable, estimated = self.xp.asarray(True), self.xp.asarray(estimate is not None)
        return self._ivon_step(state, *arrays, usable, estimated, priors, self.array(rate), settings)

    @cached_property
    def _ivon_step(self) -> Callable:
        return self.jax.jit(self.ivon.step, static_argnums=7)

    def ivon_unknown_prior(self) -> Any:
        """Of a site whose prior's term stays in the loss."""
        return self.ivon.Prior(self.array(0.0), self.array(0.0))

    def promotion(self, lax: bool) -> Any:
        """A context in which dtypes may be mixed, if `lax`."""
        return self.jax.numpy_dtype_promotion("standard" if lax else "strict")

    def array(self, value: Any, dtype: str = "float64") -> Any:
        return self.xp.asarray(value, dtype)

    def to_numpy(self, value: Any) -> np.ndarray:
        return np.asarray(value)

    def scalar(self, value: float, like: Any) -> Any:
        return self.xp.asarray(value, like.dtype)

    def digest(self, value: int) -> Any:
        return self.xp.asarray(value, "uint32")

    def flag(self, value: bool) -> Any:
        return self.xp.asarray(value)

    def rate(self, learning_rate: float | None, dtype: str = "float64") -> Any:
        return None if learning_rate is None else self.array(learning_rate, dtype)

    def compiled(self, fn: Callable) -> Callable:
        return self.jax.jit(fn)

    def gradient(self, fn: Callable, at: Any) -> Any:
        """∇f of a number, at an array or a tuple of them."""
        return self.jax.grad(fn)(at)

    def derivative(self, fn: Callable, like: Any) -> Any:
        """d/dt f(t) at zero, in the dtype of `like`."""
        return self.jax.jvp(fn, (self.array(0, like.dtype),), (self.array(1, like.dtype),))[1]

    def sample(self, distribution: Any, num_draws: int) -> np.ndarray:
        with self.jax.numpy_dtype_promotion("standard"):  # some of the host's samplers need it
            return self.to_numpy(distribution.sample(self.jax.random.key(0), (num_draws,)))

    def log_prob(self, distribution: Any, values: Any) -> Any:
        with self.jax.numpy_dtype_promotion("standard"):
            return distribution.log_prob(values)

    def entropy(self, distribution: Any) -> Any:
        with self.jax.numpy_dtype_promotion("standard"):
            return distribution.entropy()

    def kl_divergence(self, first: Any, second: Any) -> Any:
        with self.jax.numpy_dtype_promotion("standard"):
            return self.numpyro.distributions.kl_divergence(first, second)

    def map(self, fn: Callable, *stacks: np.ndarray) -> np.ndarray:
        """fn at each row of the stacks."""
        return self.to_numpy(self.jax.jit(self.jax.vmap(fn))(*map(self.array, stacks)))

    def source_of_noise(self, seed: int) -> Any:
        return self.jax.random.key(seed)

    def draws(self, num_pairs: int, probes: Any = None, dtype: str = "float64") -> Any:
        sign = self.xp.repeat(self.array([1.0, -1.0], dtype), num_pairs)
        return self.gradients.Draws(self.xp.tile(self.xp.arange(num_pairs), 2), sign, probes)

    def loss(self, kind: str = "Trace_ELBO", num_particles: int = 1, vectorized: bool = True) -> Any:
        return getattr(self.numpyro.infer, kind)(num_particles=num_particles, vectorize_particles=vectorized)

    def schedule(self, fn: Callable) -> Callable:
        """A function of the step; strict promotion wants its arithmetic in one dtype."""
        return lambda count: fn(self.array(count))

    def gradient_descent(self, rate: float) -> Any:
        """A host optimizer for `others`."""
        return self.numpyro.optim.SGD(rate)

    def noise_key(self, seed: int) -> Any:
        """Whatever an estimator takes its noise from."""
        return self.jax.random.key(seed)

    def map_fn(self, fn: Callable, stack: Any) -> Any:
        """fn at each row of a stack."""
        return self.jax.vmap(fn)(stack)

    def natural_leaves(self, fit: Any, name: str) -> tuple[np.ndarray, ...]:
        """The fields of a `natural_param`."""
        return leaves_of({name: fit._params[name]}, np.asarray)[name]

    def gaussian_of(self, result: Any) -> Any:
        """The rule's state at the end of a `fit`."""
        return result.state.optim_state[1].gaussian

    def _seeded(self, seed: int) -> dict[str, Any]:
        """The option of `fit`."""
        return {"rng_key": self.jax.random.key(seed)}

    def constant(self, value: Any) -> Any:
        """The value without its derivative."""
        return self.jax.lax.stop_gradient(value)

    def same_noise(self, monkeypatch: Any, noise: Callable) -> None:
        """ε of a site becomes noise(array module, shape of the site, number of the draw)."""
        monkeypatch.setattr(
            self.module("optim._svi"),
            "standard_normal",
            lambda rng_key, number, shape, dtype: noise(self.xp, shape, number.astype(dtype)),
        )


class NumPyroFit:
    """The stock SVI, a step at a time."""

    def __init__(self, bridge: NumPyroBridge, make_model, make_guide, args, loss, options, rule) -> None:
        self.bridge, self.losses = bridge, []
        self.args = tuple(map(bridge.argument, args))
        self.model = make_model(bridge.host)
        self.guide = make_guide(bridge.host, self.model)
        optimizer = getattr(bridge, rule)(**options)
        self.svi = bridge.numpyro.infer.SVI(self.model, self.guide, optimizer, loss)
        self.update = bridge.jax.jit(self.svi.update)
        self.first_state = self.state = self.svi.init(bridge.jax.random.key(0), *self.args)

    def again(self, seed: int) -> NumPyroFit:
        """Start anew with other draws."""
        self.state = self.first_state._replace(rng_key=self.bridge.jax.random.key(seed))
        return self

    def stopped_and_resumed(self) -> NumPyroFit:
        """The state through a pickle."""
        self.state = pickle.loads(pickle.dumps(self.state))
        return self

    def anew(self, *args: Any) -> NumPyroFit:
        """Start anew with other arguments."""
        self.args = tuple(map(self.bridge.argument, args))
        return self.again(seed=0)

    def run(self, num_steps: int) -> NumPyroFit:
        for _ in range(num_steps):
            self.state, loss = self.update(self.state, *self.args)
            self.losses.append(float(loss))
        return self

    @property
    def skipped(self) -> int:
        return int(self.state.optim_state[1].gaussian.skipped)

    def gaussian_state(self) -> Any:
        return self.state.optim_state[1].gaussian

    def first_gaussian_state(self) -> Any:
        """As early as there is one."""
        return self.gaussian_state()

    @property
    def optimizer_state(self) -> Any:
        """What the optimizer carries, ready before the first step."""
        return self.state.optim_state[1]

    def ivon_arrays(self, field: str) -> dict[str, np.ndarray]:
        """A field of `IVON`'s state, by site."""
        return numpy_dict(getattr(self.optimizer_state.weights, field), np.array)

    def ivon_sums(self, site: str) -> tuple[np.ndarray, np.ndarray]:
        """Σ ĝ and Σ ĥ since the last step."""
        gradients, estimates = self.optimizer_state.sums
        return np.array(gradients[site]), np.array(estimates[site])

    def with_ivon_momentum(self, site: str, momentum: np.ndarray) -> NumPyroFit:
        count, state = self.state.optim_state
        weights = replace(state.weights, momentum={**state.weights.momentum, site: self.bridge.array(momentum)})
        self.state = self.state._replace(optim_state=(count, replace(state, weights=weights)))
        return self

    @property
    def drawn(self) -> dict[str, np.ndarray]:
        """What the model was given by the guide at the last step, as `host.record` was told."""
        return numpy_dict(self.state.mutable_state["drawn"], np.array)

    def evaluate(self, num_draws: int) -> np.ndarray:
        """Losses of the host at draws of its own, by `SVI.evaluate`."""
        random = self.bridge.jax.random
        keys = random.split(random.key(3), num_draws)
        states = [self.state._replace(rng_key=key) for key in keys]
        evaluate = self.bridge.jax.jit(self.svi.evaluate)
        return np.array([evaluate(state, *self.args) for state in states])

    @property
    def params(self) -> dict[str, np.ndarray]:
        return numpy_dict(self._params, np.asarray)

    @property
    def _params(self) -> dict[str, Any]:
        return self.svi.get_params(self.state)

    def gradients_held_and_not(self, noise: np.ndarray) -> list[np.ndarray]:
        """∇ℓ at one noise of the loss in which the small latents are constants, and of the loss itself."""
        state, svi, bridge = self.optimizer_state, self.bridge.module("optim._svi"), self.bridge
        scales = bridge.module("optim._gaussian").scales_of(state.gaussian.precision, state.layout.blocks, 1.0)
        draw, fn = bridge.gradients.Draws.at(bridge.array(noise)), svi.loss_of(self.svi, self.args, {})
        losses = [svi.objective_of(fn, layout, state.params) for layout in (state.layout.holding, state.layout)]
        at = state.gaussian.loc
        return [np.asarray(bridge.jax.grad(lambda m, loss=loss: loss(m, scales, {}, draw)[0])(at)) for loss in losses]

    def natural_objects(self) -> dict[str, Any]:
        """λ of every site of an AutoExponentialFamily."""
        return self.guide.natural(self._params)

    def naturals(self) -> dict[str, tuple[np.ndarray, ...]]:
        """The same as tuples of fields."""
        return leaves_of(self.natural_objects(), np.asarray)

    def contribution_objects(self, **options: Any) -> dict[str, dict[str, Any]]:
        module = import_module(self.bridge.package)
        return module.site_contributions(self.svi, self.state, *self.args, **options)

    def contributions(self, **options: Any) -> dict[str, dict[str, tuple[np.ndarray, ...]]]:
        """By site and factor, as tuples of fields."""
        parts = self.contribution_objects(**options)
        return {site: leaves_of(by_factor, np.asarray) for site, by_factor in parts.items()}

    def param_names(self, *sites: str) -> list[str]:
        """Of an AutoNormal: (loc, scale) for each site in turn."""
        return [f"{site}_auto_{kind}" for site in sites for kind in ("loc", "scale")]

    def gaussians(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(loc, covariance) of every Gaussian that the guide draws from, by site."""
        handlers = self.bridge.numpyro.handlers
        guide = handlers.substitute(handlers.seed(self.guide, 0), self._params)
        return gaussians_of(handlers.trace(guide).get_trace(*self.args), np.asarray)

    def median(self) -> dict[str, np.ndarray]:
        return numpy_dict(self.guide.median(self._params), np.asarray)

    def quantiles(self, levels: Sequence[float]) -> dict[str, np.ndarray]:
        return numpy_dict(self.guide.quantiles(self._params, self.bridge.array(levels)), np.asarray)

    def posterior(self) -> Any:
        """What the guide's own `get_posterior` returns."""
        return self.guide.get_posterior(self._params)

    def draws(self, num_draws: int) -> dict[str, np.ndarray]:
        """Of the latents, by the guide."""
        key = self.bridge.jax.random.key(1)
        return numpy_dict(self.guide.sample_posterior(key, self._params, sample_shape=(num_draws,)), np.asarray)

    def predictive(self, num_draws: int, *args: Any) -> dict[str, np.ndarray]:
        """Of the model's sites, with the latents drawn by the guide."""
        predictive = self.bridge.numpyro.infer.Predictive(
            self.model, guide=self.guide, params=self._params, num_samples=num_draws
        )
        return numpy_dict(predictive(self.bridge.jax.random.key(2), *map(self.bridge.argument, args)), np.asarray)


class PyroBridge(Bridge):
    discrete_loss = "Trace_ELBO"
    name, package = "pyro", "pyro_blr"

    def __init__(self) -> None:
        import pyro
        import pyro.infer.autoguide
        import pyro.optim
        import torch

        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        pyro.enable_validation(True)
        self.torch, self.pyro, self.xp = torch, pyro, torch
        self.host = SimpleNamespace(
            record=self.record,
            sample=pyro.sample,
            factor=pyro.factor,
            param=pyro.param,
            plate=pyro.plate,
            deterministic=pyro.deterministic,
            mask=lambda mask: pyro.poutine.mask(mask=mask),
            scale=lambda scale: pyro.poutine.scale(scale=scale),
            block=pyro.poutine.block,
            dist=pyro.distributions,
            constraints=pyro.distributions.constraints,
            lower_cholesky=pyro.distributions.constraints.lower_cholesky,
            exp_of_one_derivative=self.exp_of_one_derivative(),
            inverse_gaussian=lambda loc, concentration: self.families.InverseGaussian(loc, concentration),
            wishart=lambda df, rate: pyro.distributions.Wishart(self.array(df), precision_matrix=rate),
            array=self.array,
            integer=lambda value: self.xp.asarray(value),
            xp=self.xp,
            autoguide=pyro.infer.autoguide,
            init_to_value=lambda values: pyro.infer.autoguide.init_to_value(
                values={name: self.array(value) for name, value in values.items()}
            ),
        )

    def exp_of_one_derivative(self) -> Callable:
        """exp, with a derivative that has none, as those of the solvers of differential equations."""

        class Exp(self.torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                result = value.exp()
                ctx.save_for_backward(result)
                return result

            @staticmethod
            @self.torch.autograd.function.once_differentiable
            def backward(ctx, gradient):
                return gradient * ctx.saved_tensors[0]

        return Exp.apply

    def promotion(self, lax: bool) -> Any:
        return nullcontext()

    def reset(self, seed: int) -> None:
        self.pyro.clear_param_store()
        self.pyro.set_rng_seed(seed)

    def record(self, values: dict[str, Any]) -> None:
        """Called in a model: what `drawn` of a fit is to return."""
        self.recorded = {name: self.to_numpy(value).copy() for name, value in values.items()}

    def ivon_init(self, loc: dict[str, np.ndarray], priors: dict, settings: Any) -> Any:
        """The rule's state at m = `loc`."""
        start = {name: self.array(value) for name, value in loc.items()}
        hessian = {name: self.torch.empty_like(value) for name, value in start.items()}
        shapes = {name: ((1, value.shape),) for name, value in start.items()}
        return self.ivon.init(start, hessian, priors, shapes, settings)

    def ivon_step(self, state: Any, gradient: dict, estimate: Any, priors: dict, rate: float, settings: Any) -> Any:
        """A step of the rule from ĝ and ĥ, or None, which writes in place."""
        estimates = {name: None if estimate is None else self.array(estimate[name]) for name in gradient}
        found = [(name, self.array(gradient[name]), estimates[name]) for name in gradient]
        return self.ivon.step(state, found, priors, rate, settings)

    def ivon_unknown_prior(self) -> Any:
        """Of a site whose prior's term stays in the loss."""
        return self.ivon.Prior(0.0, 0.0)

    def array(self, value: Any, dtype: str = "float64") -> Any:
        return self.torch.as_tensor(np.array(value), dtype=getattr(self.torch, dtype))

    def to_numpy(self, value: Any) -> np.ndarray:
        return value.detach().numpy()

    def scalar(self, value: float, like: Any) -> Any:
        return type(like)(value)

    def digest(self, value: int) -> Any:
        return value

    def flag(self, value: bool) -> Any:
        return value

    def rate(self, learning_rate: float | None, dtype: str = "float64") -> Any:
        return learning_rate

    def compiled(self, fn: Callable) -> Callable:
        return fn

    def gradient(self, fn: Callable, at: Any) -> Any:
        return self.torch.func.grad(fn)(at)

    def derivative(self, fn: Callable, like: Any) -> Any:
        return self.torch.func.jvp(fn, (like.new_zeros(()),), (like.new_ones(()),))[1]

    def sample(self, distribution: Any, num_draws: int) -> np.ndarray:
        self.pyro.set_rng_seed(0)
        return self.to_numpy(distribution.sample((num_draws,)))

    def log_prob(self, distribution: Any, values: Any) -> Any:
        return distribution.log_prob(values)

    def entropy(self, distribution: Any) -> Any:
        return distribution.entropy()

    def kl_divergence(self, first: Any, second: Any) -> Any:
        return self.torch.distributions.kl_divergence(first, second)

    def map(self, fn: Callable, *stacks: np.ndarray) -> np.ndarray:
        rows = zip(*map(self.array, stacks), strict=True)
        return np.stack([self.to_numpy(fn(*row)) for row in rows])

    def source_of_noise(self, seed: int) -> Any:
        return self.torch.Generator().manual_seed(seed)

    def draws(self, num_pairs: int, probes: Any = None, dtype: str = "float64") -> Any:
        return self.gradients.Draws(2 * list(range(num_pairs)), [1.0] * num_pairs + [-1.0] * num_pairs, probes)

    def loss(self, kind: str = "Trace_ELBO", num_particles: int = 1, vectorized: bool = True) -> Any:
        return getattr(self.pyro.infer, kind)(
            num_particles=num_particles, vectorize_particles=vectorized and num_particles > 1, max_plate_nesting=2
        )

    def schedule(self, fn: Callable) -> Callable:
        """A function of the step."""
        return fn

    def gradient_descent(self, rate: float) -> Any:
        """A host optimizer for `others`."""
        return self.pyro.optim.SGD({"lr": rate})

    def same_noise(self, monkeypatch: Any, noise: Callable) -> None:
        monkeypatch.setattr(
            self.module("optim._svi"),
            "standard_normal",
            lambda generator, number, shape, like: noise(self.xp, tuple(shape), float(number)),
        )

    def noise_key(self, seed: int) -> Any:
        """Whatever an estimator takes its noise from."""
        return seed

    def map_fn(self, fn: Callable, stack: Any) -> Any:
        """fn at a stack of rows, over which it broadcasts."""
        return fn(stack)

    def gaussian_of(self, result: Any) -> Any:
        return result.state.gaussian

    def _seeded(self, seed: int) -> dict[str, Any]:
        return {"seed": seed}

    def constant(self, value: Any) -> Any:
        return value.detach()

    def natural_leaves(self, fit: Any, name: str) -> tuple[np.ndarray, ...]:
        """The fields of a `natural_param`, each a parameter of its own."""
        return tuple(value for key, value in fit.params.items() if key.startswith(f"{name}."))


class PyroFit:
    """The stock SVI, a step at a time."""

    def __init__(self, bridge: PyroBridge, make_model, make_guide, args, loss, options, rule) -> None:
        self.bridge, self.losses, self.loss, self.options = bridge, [], loss, options
        self.optimizer = getattr(bridge, rule)
        self.args = tuple(map(bridge.argument, args))
        self.model, self.make_guide = make_model(bridge.host), make_guide
        self.again(seed=0)

    def again(self, seed: int) -> PyroFit:
        """Start anew with other draws."""
        self.bridge.reset(seed)
        self.guide = self.make_guide(self.bridge.host, self.model)
        self.guide(*self.args)  # makes its parameters
        self.svi = self.bridge.pyro.infer.SVI(self.model, self.guide, self.optimizer(**self.options), self.loss)
        return self

    def stopped_and_resumed(self) -> PyroFit:
        """The states of the optimizer, the parameter store and the random numbers, through a file, in new objects."""
        store, rng_state = self.bridge.pyro.get_param_store(), self.bridge.pyro.util.get_rng_state()
        saved = io.BytesIO()
        self.bridge.torch.save((self.svi.optim.get_state(), store.get_state()), saved)
        losses = self.losses
        self.again(seed=0)
        saved.seek(0)
        optimizer, parameters = self.bridge.torch.load(saved, weights_only=False)
        store.set_state(parameters)
        self.svi.optim.set_state(optimizer)
        self.bridge.pyro.util.set_rng_state(rng_state)
        self.losses = losses
        return self

    def anew(self, *args: Any) -> PyroFit:
        """Start anew with other arguments."""
        self.args = tuple(map(self.bridge.argument, args))
        return self.again(seed=0)

    def run(self, num_steps: int) -> PyroFit:
        for _ in range(num_steps):
            self.losses.append(self.svi.step(*self.args))
        return self

    @property
    def skipped(self) -> int:
        return self.svi.optim.state.gaussian.skipped

    def gaussian_state(self) -> Any:
        return self.svi.optim.state.gaussian

    @property
    def optimizer_state(self) -> Any:
        """What the optimizer carries, read off model and guide as at the first step."""
        if self.svi.optim.state is None:
            with self.bridge.pyro.poutine.trace(param_only=True) as found:
                self.svi.loss(self.model, self.guide, *self.args)
            params = [site["value"].unconstrained() for site in found.trace.nodes.values()]
            loaded = self.svi.optim._loaded
            state = self.svi.optim.init(self.svi, self.args, {}, params)
            self.svi.optim._loaded = loaded  # which `init` takes up once
            return state
        return self.svi.optim.state

    def ivon_arrays(self, field: str) -> dict[str, np.ndarray]:
        """A field of `IVON`'s state, by the model's site: AutoNormal draws in sites of its own."""
        arrays = getattr(self.optimizer_state.weights, field)
        return {name.removesuffix("_unconstrained"): self._copied(value) for name, value in arrays.items()}

    def ivon_sums(self, site: str) -> tuple[np.ndarray, np.ndarray]:
        """Σ ĝ and Σ ĥ since the last step."""
        names = (f"{site}_unconstrained", site)
        sums = self.optimizer_state.sums or [(site, *2 * [self.bridge.array(0.0)])]
        ((gradients, estimates),) = (pair for name, *pair in sums if name in names)
        return self._copied(gradients), self._copied(estimates)

    def with_ivon_momentum(self, site: str, momentum: np.ndarray) -> PyroFit:
        self.svi.optim.state = self.optimizer_state
        state = self.svi.optim.get_state()
        (name,) = (name for name in state["momentum"] if name in (f"{site}_unconstrained", site))
        self.svi.optim.set_state({**state, "momentum": {**state["momentum"], name: self.bridge.array(momentum)}})
        return self

    @property
    def drawn(self) -> dict[str, np.ndarray]:
        """What the model was given by the guide at the last step, as `host.record` was told."""
        return self.bridge.recorded

    def evaluate(self, num_draws: int) -> np.ndarray:
        """Losses of the host at draws of its own, by `SVI.evaluate_loss`."""
        return np.array([self.svi.evaluate_loss(*self.args) for _ in range(num_draws)])

    def first_gaussian_state(self) -> Any:
        """The optimizer sees the guide at its first step, and not before."""
        return self.run(1).gaussian_state()

    def local_names(self) -> list[str]:
        """Names of the parameters (location, scale) of a guide with one site."""
        return sorted(self.params)

    @property
    def params(self) -> dict[str, np.ndarray]:
        return numpy_dict(dict(self.bridge.pyro.get_param_store()), self._copied)

    def _copied(self, value: Any) -> np.ndarray:
        return self.bridge.to_numpy(value).copy()  # Pyro moves its parameters in place

    def gradients_held_and_not(self, noise: np.ndarray) -> list[np.ndarray]:
        """∇ℓ at one noise of the loss in which the small latents are constants, and of the loss itself."""
        state, svi, bridge = self.optimizer_state, self.bridge.module("optim._svi"), self.bridge
        scales = bridge.module("optim._gaussian").scales_of(state.gaussian.precision, state.layout.blocks, 1.0)
        draw = bridge.gradients.Draws(None, 1.0, None, noise=bridge.array(noise))
        layouts = state.layout.holding, state.layout
        losses = [svi.objective_of(self.svi, self.args, {}, layout, seed=0) for layout in layouts]
        value_and_gradient = bridge.module("gradients._estimate").value_and_gradient
        found = [value_and_gradient(loss, state.gaussian.loc, scales, None, draw)[2] for loss in losses]
        return [self._copied(gradient.detach()) for gradient in found]

    def natural_objects(self) -> dict[str, Any]:
        """λ of every site of an AutoExponentialFamily."""
        return self.guide.natural()

    def naturals(self) -> dict[str, tuple[np.ndarray, ...]]:
        """The same as tuples of fields."""
        return leaves_of(self.natural_objects(), self._copied)

    def contribution_objects(self, **options: Any) -> dict[str, dict[str, Any]]:
        return import_module(self.bridge.package).site_contributions(self.svi, *self.args, **options)

    def contributions(self, **options: Any) -> dict[str, dict[str, tuple[np.ndarray, ...]]]:
        """By site and factor, as tuples of fields."""
        parts = self.contribution_objects(**options)
        return {site: leaves_of(by_factor, self._copied) for site, by_factor in parts.items()}

    def param_names(self, *sites: str) -> list[str]:
        """Of an AutoNormal: (loc, scale) for each site in turn."""
        return [f"AutoNormal.{kind}.{site}" for site in sites for kind in ("locs", "scales")]

    def gaussians(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """(loc, covariance) of every Gaussian that the guide draws from, by site."""
        return gaussians_of(self.bridge.pyro.poutine.trace(self.guide).get_trace(*self.args).nodes, self._copied)

    def median(self) -> dict[str, np.ndarray]:
        return numpy_dict(self.guide.median(*self.args), self._copied)

    def quantiles(self, levels: Sequence[float]) -> dict[str, np.ndarray]:
        return numpy_dict(self.guide.quantiles(levels, *self.args), self._copied)

    def posterior(self) -> Any:
        """What the guide's own `get_posterior` returns."""
        return self.guide.get_posterior()

    def draws(self, num_draws: int) -> dict[str, np.ndarray]:
        """Of the latents, by the guide."""
        self.bridge.pyro.set_rng_seed(1)
        predictive = self.bridge.pyro.infer.Predictive(self.guide, num_samples=num_draws)
        return numpy_dict(predictive(*self.args), self._copied)

    def predictive(self, num_draws: int, *args: Any) -> dict[str, np.ndarray]:
        """Of the model's sites, with the latents drawn by the guide."""
        self.bridge.pyro.set_rng_seed(2)
        predictive = self.bridge.pyro.infer.Predictive(self.model, guide=self.guide, num_samples=num_draws)
        return numpy_dict(predictive(*map(self.bridge.argument, args)), self._copied)


NumPyroBridge.fit_class, PyroBridge.fit_class = NumPyroFit, PyroFit
BRIDGES = {"numpyro": NumPyroBridge, "pyro": PyroBridge}


def numpy_dict(values: dict[str, Any], to_numpy: Callable) -> dict[str, np.ndarray]:
    return {name: to_numpy(value) for name, value in values.items()}


def leaves_of(naturals: dict[str, Any], to_numpy: Callable) -> dict[str, tuple[np.ndarray, ...]]:
    return {
        name: tuple(to_numpy(getattr(natural, item.name)) for item in fields(natural))
        for name, natural in naturals.items()
    }


def gaussians_of(trace: dict[str, Any], to_numpy: Callable) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The Gaussian sites of a guide's trace; a guide without any is a point, and its Deltas are taken.

    Stock guides draw some latents in auxiliary sites, from which the model's sites follow as Deltas.
    """
    kinds: dict[bool, dict] = {True: {}, False: {}}
    for name, site in trace.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        fn = site["fn"]
        while hasattr(fn, "base_dist") and not hasattr(fn, "scale_tril"):
            fn = fn.base_dist
        if hasattr(fn, "v"):
            loc = to_numpy(fn.v).ravel()
            kinds[False][name] = (loc, np.zeros((loc.size, loc.size)))
        elif hasattr(fn, "scale_tril"):
            factors = to_numpy(fn.scale_tril).reshape(-1, *fn.scale_tril.shape[-2:])
            covariances = [factor @ factor.T for factor in factors]
            kinds[True][name] = (to_numpy(fn.loc).ravel(), scipy.linalg.block_diag(*covariances))
        else:
            loc, scale = np.broadcast_arrays(to_numpy(fn.loc), to_numpy(fn.scale))
            kinds[True][name] = (loc.ravel(), np.diag(scale.ravel() ** 2))
    return kinds[True] or kinds[False]
