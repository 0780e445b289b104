"""BLR and the Adams of `reference.py` in Pyro, one run after the other; the start and the ELBO's noise are the same."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.optim
import torch
from _fits import Budget, Fit, Setting, antithetic, checkpoints, moment_errors
from _models_pyro import MODELS
from _posteriors import Posterior
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import biject_to

from pyro_blr import BLR

__all__ = ["METHODS", "fits"]

CHECKPOINTS = 30  # of a run of Adam: an ELBO costs more here than in NumPyro
CHUNK = 1000  # draws that the density is evaluated at together


class Problem:
    """A posterior under a guide, in the unconstrained space: coordinates by the names of their sites, as in NumPyro."""

    def __init__(self, posterior: Posterior, guide: str, budget: Budget):
        self.posterior, self.guide, self.budget = posterior, guide, budget
        self.model = MODELS[posterior.name]
        self.data = posterior.arguments(self.model, torch.as_tensor)
        prototype = self._guide()
        with torch.no_grad():
            prototype(**self.data)
        sites = {name: site["fn"] for name, site in prototype.prototype_trace.iter_stochastic_nodes()}
        self.transforms = {name: biject_to(sites[name].support) for name in sorted(sites)}
        self.shapes = {name: t.inverse_shape(sites[name].shape()) for name, t in self.transforms.items()}
        sizes = {name: shape.numel() for name, shape in self.shapes.items()}
        ends = np.cumsum([sizes[name] for name in sites])
        places = {name: range(end - sizes[name], end) for name, end in zip(sites, ends, strict=True)}
        self._order = [place for name in self.shapes for place in places[name]]  # a full-rank guide has the model's
        draws = partial(antithetic, dimension=posterior.dimension)
        self._noise = torch.as_tensor(draws(budget.elbo_draws, seed=0))
        self._moment_noise = torch.as_tensor(draws(budget.moment_draws, seed=1))

    def start(self, seed: int, optimizer: Any, num_particles: int = 1) -> SVI:
        """The stock SVI, its guide at the start of the seed."""
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = self._guide()
        with torch.no_grad():
            guide(**self.data)
        return SVI(self.model, guide, optimizer, Trace_ELBO(num_particles=num_particles))

    def run(self, svi: SVI, steps: Sequence[int], read: Callable[[], Any]) -> tuple[list[Any], np.ndarray, float]:
        """What `read` says after each number of steps, the seconds up to there, and what the first step took longer."""
        found, seconds = [read()], []
        for step in range(1, steps[-1] + 1):
            begin = time.perf_counter()
            svi.step(**self.data)
            seconds.append(time.perf_counter() - begin)
            if step in steps:
                found.append(read())
        start_up = max(seconds[0] - float(np.median(seconds[1:] or seconds)), 0.0)
        seconds[0] -= start_up
        return found, np.cumsum([0.0, *seconds])[steps], start_up

    def gaussian(self, svi: SVI) -> tuple[Tensor, Tensor]:
        """(m, C) with C Cᵀ the covariance."""
        guide = svi.guide
        with torch.no_grad():
            if self.guide == "full rank":
                posterior = guide.get_posterior()
                rows = posterior.scale_tril[self._order]
                return posterior.loc[self._order].clone(), torch.linalg.cholesky(rows @ rows.T)
            loc, scale = (
                torch.cat([getattr(part, name).reshape(-1) for name in self.shapes])
                for part in (guide.locs, guide.scales)
            )
            return loc, scale.diag()

    def fit(
        self,
        setting: Setting,
        steps: np.ndarray,
        evaluations: np.ndarray,
        paths: list[list[tuple[Tensor, Tensor]]],
        seconds: Sequence[tuple[np.ndarray, float]],
    ) -> Fit:
        """What became of the Gaussians `paths`, by seed and checkpoint."""
        elbos = np.array([[self._elbo(*gaussian) for gaussian in path] for path in paths])
        finals = [loc + self._moment_noise @ scale.T for loc, scale in (path[-1] for path in paths)]
        errors = [moment_errors(self.constrained(z), self.posterior.mean, self.posterior.sd) for z in finals]
        so_far, start_up = zip(*seconds, strict=True)
        return Fit(
            posterior=self.posterior.name,
            dimension=self.posterior.dimension,
            guide=self.guide,
            host="pyro",
            setting=setting,
            steps=steps,
            evaluations=np.broadcast_to(evaluations, elbos.shape),
            elbos=np.where(np.isfinite(elbos), elbos, -np.inf),
            seconds=np.median(so_far, axis=0),
            start_up_seconds=float(np.median(start_up)),
            mean_errors=np.array([mean for mean, _ in errors]),
            sd_errors=np.array([sd for _, sd in errors]),
        )

    def log_density(self, z: Tensor) -> Tensor:
        """Of the posterior up to a constant, in the unconstrained space, [D] -> []."""
        trace, jacobian = self._trace(z)
        return trace.log_prob_sum() + jacobian

    def constrained(self, draws: Tensor) -> dict[str, np.ndarray]:
        """Parameters by name, [S, *shape]."""

        def named(z: Tensor) -> dict[str, Tensor]:
            nodes = self._trace(z)[0].nodes
            return {name: nodes[name]["value"] for name in self.posterior.mean}

        return {name: values.numpy() for name, values in self._at(named, draws).items()}

    def _guide(self) -> Any:
        make = {"mean field": AutoNormal, "full rank": AutoMultivariateNormal}[self.guide]
        return make(self.model, init_loc_fn=uniform_start)

    def _trace(self, z: Tensor) -> tuple[Any, Tensor]:
        """The model at a point of the unconstrained space, and log |∂ constrained / ∂ z|."""
        parts = z.split([shape.numel() for shape in self.shapes.values()])
        values, jacobian = {}, torch.zeros(())
        for part, (name, shape) in zip(parts, self.shapes.items(), strict=True):
            free, transform = part.reshape(shape), self.transforms[name]
            values[name] = transform(free)
            jacobian = jacobian + transform.log_abs_det_jacobian(free, values[name]).sum()
        return poutine.trace(poutine.condition(self.model, values)).get_trace(**self.data), jacobian

    def _elbo(self, loc: Tensor, scale: Tensor) -> float:
        """The mean of log p − log q: log q at the draw and not on average, which cancels most of its noise."""
        log_q = -(self._noise**2 + np.log(2 * np.pi)).sum(-1) / 2 - scale.diagonal().log().sum()
        return float((self._at(self.log_density, loc + self._noise @ scale.T) - log_q).mean())

    def _at(self, function: Callable, draws: Tensor) -> Any:
        """`function` of every draw; validation asks for values, which vmap does not have."""
        with torch.no_grad(), pyro.validation_enabled(False):
            return torch.func.vmap(function, chunk_size=CHUNK)(draws)


def fits(posterior: Posterior, guide: str, methods: list[str], budget: Budget) -> Iterator[Fit]:
    """Of every setting of the methods that Pyro has here."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    problem = Problem(posterior, guide, budget)
    for method in methods:
        if method in METHODS:
            yield from METHODS[method](problem)


def blr(problem: Problem) -> Iterator[Fit]:
    """`BLR()` as it comes."""
    budget, steps = problem.budget, np.arange(problem.budget.steps + 1)
    paths, evaluations, seconds = [], [], []
    for seed in range(budget.seeds):
        optimizer = BLR()
        svi = problem.start(seed, optimizer)
        found, *taken = problem.run(
            svi, steps.tolist(), lambda svi=svi, optimizer=optimizer: (problem.gaussian(svi), count(optimizer))
        )
        paths.append([gaussian for gaussian, _ in found])
        evaluations.append([number for _, number in found])
        seconds.append(tuple(taken))
    yield problem.fit(Setting("BLR()"), steps, np.array(evaluations, float), paths, seconds)


def adam(make: Callable, method: str, problem: Problem) -> Iterator[Fit]:
    """The host's Adam: every rate, and every number of particles."""
    budget = problem.budget
    for particles in budget.particles:
        steps = checkpoints(budget.adam_steps_of(particles), min(budget.adam_checkpoints, CHECKPOINTS))
        for rate in budget.rates:
            paths, seconds = [], []
            for seed in range(budget.adam_seeds):
                svi = problem.start(seed, make({"lr": rate}), particles)
                path, *taken = problem.run(svi, steps.tolist(), partial(problem.gaussian, svi))
                paths.append(path)
                seconds.append(tuple(taken))
            label = f"rate {rate}, {particles} particle{'s' if particles > 1 else ''}"
            yield problem.fit(Setting(method, label, particles), steps, steps * particles, paths, seconds)


def uniform_start(site: dict[str, Any]) -> Tensor:
    """NumPyro's default start, (−2, 2) in the unconstrained space.

    Pyro's own asks the prior for a draw, and a flat one has none.
    """
    transform = biject_to(site["fn"].support)
    return transform(4 * torch.rand(transform.inverse_shape(site["fn"].shape())) - 2)


def count(optimizer: BLR) -> float:
    """Gradients so far; none before the first step."""
    if optimizer.state is None:
        return 0.0
    return float(optimizer.state.gradient_evaluations)


METHODS: dict[str, Callable[[Problem], Iterator[Fit]]] = {
    "BLR()": blr,
    "Adam": partial(adam, pyro.optim.Adam, "Adam"),
    "ClippedAdam": partial(adam, pyro.optim.ClippedAdam, "ClippedAdam"),
}
