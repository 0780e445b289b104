"""Every method of `reference.py` in NumPyro; the start and the ELBO's noise are the same.

The seeds of Adam, and its rates, run side by side; seconds are measured on one run by itself.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from _fits import Budget, Fit, Setting, antithetic, checkpoints, moment_errors
from _models_numpyro import MODELS
from _posteriors import Posterior
from _score_matching import Gaussian, ScoreState, bam_step, gsm_step
from jax import Array
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.util import initialize_model

from numpyro_blr import BLR

__all__ = ["METHODS", "fits"]

TIMED_STEPS = 1000  # of a run of Adam or score matching
TIMED_LENGTHS = 10  # of runs of BLR, about
SCHEDULES = {"λ = B D": True, "λ = B D/(t + 1)": False}


class Problem:
    """A posterior under a guide, in the unconstrained space: coordinates by the names of their sites.

    Attributes:
        log_density: of the posterior up to a constant, [D] -> [].
        constrained: draws [S, D] -> parameters by name, [S, *shape].
    """

    def __init__(self, posterior: Posterior, guide: str, budget: Budget):
        self.posterior, self.guide, self.budget = posterior, guide, budget
        self.model = MODELS[posterior.name]
        self.data = posterior.arguments(self.model, jnp.asarray)
        info = initialize_model(jax.random.key(0), self.model, model_kwargs=self.data)
        free = info.param_info.z
        flat, unravel = ravel_pytree(free)  # which sorts the names
        self.names = sorted(free)
        ends = np.cumsum([value.size for value in free.values()])
        places = {name: range(end - free[name].size, end) for name, end in zip(free, ends, strict=True)}
        self._order = np.array([place for name in self.names for place in places[name]])
        self.log_density: Callable[[Array], Array] = lambda z: -info.potential_fn(unravel(z))
        self.constrained = jax.jit(jax.vmap(lambda z: info.postprocess_fn(unravel(z))))
        self._noise = jnp.asarray(antithetic(budget.elbo_draws, len(flat), seed=0))
        self._moment_noise = jnp.asarray(antithetic(budget.moment_draws, len(flat), seed=1))
        self._elbos = jax.jit(partial(jax.lax.map, self._elbo))

    def start(self, optimizer: Any, num_seeds: int, num_particles: int = 1) -> tuple[SVI, list[Any]]:
        """The stock SVI, and its state at the start of every seed; a guide of each, since it keeps its first start."""
        make = {"mean field": AutoNormal, "full rank": AutoMultivariateNormal}[self.guide]
        loss = Trace_ELBO(num_particles=num_particles)
        svis = [SVI(self.model, make(self.model), optimizer, loss) for _ in range(num_seeds)]
        return svis[0], [svi.init(jax.random.key(seed), **self.data) for seed, svi in enumerate(svis)]

    def gaussian(self, svi: SVI, state: Any) -> tuple[Array, Array]:
        """(m, C) with C Cᵀ the covariance."""
        params = svi.get_params(state)
        if self.guide == "full rank":
            posterior = svi.guide.get_posterior(params)
            rows = posterior.scale_tril[self._order]  # the guide has the sites in the order of the model
            return posterior.loc[self._order], jnp.linalg.cholesky(rows @ rows.T)
        loc, scale = (
            ravel_pytree({name: params[f"{name}_auto_{part}"] for name in self.names})[0] for part in ("loc", "scale")
        )
        return loc, jnp.diag(scale)

    def fit(
        self,
        setting: Setting,
        steps: np.ndarray,
        evaluations: np.ndarray,
        path: tuple[Array, Array],
        seconds: np.ndarray,
        start_up_seconds: float,
    ) -> Fit:
        """What became of the Gaussians `path`, [R, T, ...]."""
        rows = tuple(values.reshape(-1, *values.shape[2:]) for values in path)
        elbos = np.asarray(self._elbos(rows)).reshape(path[0].shape[:2])
        errors = [
            moment_errors(self.constrained(loc + self._moment_noise @ scale.T), self.posterior.mean, self.posterior.sd)
            for loc, scale in zip(path[0][:, -1], path[1][:, -1], strict=True)
        ]
        return Fit(
            posterior=self.posterior.name,
            dimension=self.posterior.dimension,
            guide=self.guide,
            host="numpyro",
            setting=setting,
            steps=steps,
            evaluations=np.broadcast_to(evaluations, elbos.shape),
            elbos=np.where(np.isfinite(elbos), elbos, -np.inf),
            seconds=seconds,
            start_up_seconds=start_up_seconds,
            mean_errors=np.array([mean for mean, _ in errors]),
            sd_errors=np.array([sd for _, sd in errors]),
        )

    def _elbo(self, gaussian: tuple[Array, Array]) -> Array:
        """The mean of log p − log q: log q at the draw and not on average, which cancels most of its noise."""
        loc, scale = gaussian
        log_q = -(self._noise**2 + jnp.log(2 * jnp.pi)).sum(-1) / 2 - jnp.log(jnp.abs(jnp.diagonal(scale))).sum()
        return (jax.vmap(self.log_density)(loc + self._noise @ scale.T) - log_q).mean()


def fits(posterior: Posterior, guide: str, methods: list[str], budget: Budget) -> Iterator[Fit]:
    """Of every setting of the methods that this guide has."""
    numpyro.enable_x64()
    problem = Problem(posterior, guide, budget)
    for method in methods:
        yield from METHODS.get(method, {}).get(guide, _none)(problem)


def blr(problem: Problem) -> Iterator[Fit]:
    """`BLR()` as it comes. Its steps differ in what they cost, so that runs of several lengths are timed."""
    budget, steps = problem.budget, np.arange(problem.budget.steps + 1)
    svi, states = problem.start(BLR(), budget.seeds)

    def step(state: Any) -> Any:
        return svi.update(state, **problem.data)[0]

    def read(state: Any) -> Any:
        return (*problem.gaussian(svi, state), state.optim_state[1].gradient_evaluations)

    run, start_up = compiled(partial(advance, step), states[0], budget.steps)
    lengths = checkpoints(budget.steps, TIMED_LENGTHS)
    measured = [timed(run, states[0], length, repeats=budget.timings) for length in lengths]
    seconds = np.interp(steps, lengths, measured)
    follow_all = jax.jit(lambda state: follow(step, state, steps, read))
    locs, scales, evaluations = jax.tree.map(lambda *rows: jnp.stack(rows), *map(follow_all, states))
    yield problem.fit(Setting("BLR()"), steps, np.asarray(evaluations), (locs, scales), seconds, start_up)


def adam(make: Callable, method: str, problem: Problem) -> Iterator[Fit]:
    """The host's Adam, `make(rate)`: every rate, and every number of particles."""
    budget = problem.budget
    for particles in budget.particles:
        num_steps = budget.adam_steps_of(particles)
        steps = checkpoints(num_steps, budget.adam_checkpoints)
        svi, states = problem.start(make(budget.rates[0]), budget.adam_seeds, particles)  # the state has no rate

        def run(steps: np.ndarray, rate: Array, state: Any, svi: SVI = svi) -> Any:
            with_rate = copy.copy(svi)
            with_rate.optim = make(rate)
            return follow(
                lambda state: with_rate.update(state, **problem.data)[0],
                state,
                steps,
                lambda state: problem.gaussian(svi, state),
            )

        short = min(num_steps, TIMED_STEPS)
        seconds, start_up = timed_run(partial(run, np.array([0, short])), budget, budget.rates[0], states[0])
        beside = jax.jit(jax.vmap(jax.vmap(partial(run, steps), (None, 0)), (0, None)))
        locs, scales = beside(jnp.array(budget.rates), jax.tree.map(lambda *rows: jnp.stack(rows), *states))
        for rate, *path in zip(budget.rates, locs, scales, strict=True):
            label = f"rate {rate}, {particles} particle{'s' if particles > 1 else ''}"
            setting, so_far = Setting(method, label, particles), steps / short * seconds
            yield problem.fit(setting, steps, steps * particles, tuple(path), so_far, start_up)


def batch_and_match(problem: Problem) -> Iterator[Fit]:
    constants = jnp.array(list(SCHEDULES.values()))
    for batch in problem.budget.batches:
        step = partial(bam_step, problem.log_density, batch)
        runs, steps, *seconds = score_matching(problem, batch, step, constants)
        for schedule, *path in zip(SCHEDULES, *runs, strict=True):
            setting = Setting("BaM", f"{schedule}, B = {batch}")
            yield problem.fit(setting, steps, steps * batch, tuple(path), *seconds)


def gaussian_score_matching(problem: Problem) -> Iterator[Fit]:
    for batch in (2, *problem.budget.batches):  # 2 is the default of the package
        step = partial(gsm_step, problem.log_density, batch)
        runs, steps, *seconds = score_matching(problem, batch, lambda state, _, step=step: step(state), jnp.zeros(1))
        yield problem.fit(Setting("GSM", f"B = {batch}"), steps, steps * batch, tuple(x[0] for x in runs), *seconds)


def score_matching(
    problem: Problem, batch: int, step: Callable[[ScoreState, Array], ScoreState], options: Array
) -> tuple[tuple[Array, Array], np.ndarray, np.ndarray, float]:
    """Paths of Gaussians by option and seed, the steps of their checkpoints, the seconds so far and to start up."""
    budget = problem.budget
    num_steps = max(budget.evaluations // batch, 1)
    steps = checkpoints(num_steps, budget.adam_checkpoints)
    svi, starts = problem.start(numpyro.optim.Adam(0.01), budget.seeds)

    def begin(seed: int, start: Any) -> ScoreState:
        loc, scale = problem.gaussian(svi, start)
        return ScoreState(Gaussian(loc, scale @ scale.T), jnp.zeros(()), jax.random.key(seed))

    def read(state: ScoreState) -> tuple[Array, Array]:
        return state.gaussian.loc, jnp.linalg.cholesky(state.gaussian.covariance)

    def run(steps: np.ndarray, option: Array, state: ScoreState) -> Any:
        return follow(lambda state: step(state, option), state, steps, read)

    states = [begin(seed, start) for seed, start in enumerate(starts)]
    short = min(num_steps, TIMED_STEPS)
    seconds, start_up = timed_run(partial(run, np.array([0, short])), budget, options[0], states[0])
    beside = jax.jit(jax.vmap(jax.vmap(partial(run, steps), (None, 0)), (0, None)))
    runs = beside(options, jax.tree.map(lambda *rows: jnp.stack(rows), *states))
    return runs, steps, steps / short * seconds, start_up


def follow(step: Callable[[Any], Any], state: Any, steps: np.ndarray, read: Callable[[Any], Any]) -> Any:
    """What `read` says of the state after each number of steps."""

    def to_next(state: Any, num_steps: Array) -> tuple[Any, Any]:
        state = advance(step, state, num_steps)
        return state, read(state)

    return jax.lax.scan(to_next, state, jnp.diff(jnp.asarray(steps), prepend=0))[1]


def advance(step: Callable[[Any], Any], state: Any, num_steps: Array) -> Any:
    return jax.lax.fori_loop(0, num_steps, lambda _, state: step(state), state)


def compiled(run: Callable, *args: Any) -> tuple[Callable, float]:
    """`run` compiled, and the seconds that tracing and compilation took."""
    begin = time.perf_counter()
    made = jax.jit(run).lower(*args).compile()
    return made, time.perf_counter() - begin


def timed(run: Callable, *args: Any, repeats: int) -> float:
    """Median seconds of a compiled function."""
    jax.block_until_ready(run(*args))  # the first call also loads
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def timed_run(run: Callable, budget: Budget, *args: Any) -> tuple[float, float]:
    """Seconds of `run` compiled, and what tracing and compilation took."""
    made, start_up = compiled(run, *args)
    return timed(made, *args, repeats=budget.timings), start_up


def _none(problem: Problem) -> Iterator[Fit]:
    return iter(())


_adam = partial(adam, numpyro.optim.Adam, "Adam")
_clipped_adam = partial(adam, numpyro.optim.ClippedAdam, "ClippedAdam")
METHODS: dict[str, dict[str, Callable[[Problem], Iterator[Fit]]]] = {
    "BLR()": {"mean field": blr, "full rank": blr},
    "Adam": {"mean field": _adam, "full rank": _adam},
    "ClippedAdam": {"mean field": _clipped_adam, "full rank": _clipped_adam},
    "GSM": {"full rank": gaussian_score_matching},
    "BaM": {"full rank": batch_and_match},
}
