"""Conditionally conjugate models: sweeps of BLR, sweeps of coordinate ascent in NumPy, and steps of the host's Adam.

    python benchmarks/conjugate.py [--host numpyro|pyro|both] [--rounds 9] [--json FILE] [--quick]

All start from the same distributions. "steps" is how many it takes to come within 0.01 nat of the optimizer's own final
ELBO; "to 0.1 nat" is the same with 0.1, and its seconds are those steps times the median seconds of a step, which are
taken in turns within each round and without compilation.

BLR and coordinate ascent (CAVI) run until a sweep gains less than 10⁻⁹ nat. Their ELBO is exact and computed by one
NumPy formula for both; it is checked that BLR's is the same after every sweep, and in NumPyro that the loss which it
reports is that number where the step began (Pyro's SVI reports its own draw).

Adam has the easier problem. Its guide has the same families with the host's own constrained parameters, but where the
model has discrete sites (mixtures, latent Dirichlet allocation) they are summed out for it, and its bound is tighter:
there, compare a final ELBO with its own kind only. It runs the host's Trace_ELBO with one particle at rates of 0.1,
0.03, 0.01 and 0.003, 5,000 steps in NumPyro and 2,000 in Pyro. Every 50 steps its ELBO is computed, exactly or, where
sites are summed out, with exact KL terms and 400 fixed draws. Its final ELBO is the best that it has had by then at
any rate, though its noise takes it away again, and the table has the rate that comes within 0.01 nat of that first. An
Adam that has not come far in its steps is compared with how far it came.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.special import digamma, gammaincinv, gammaln, logsumexp, ndtri, softmax

RATES = (0.1, 0.03, 0.01, 0.003)
ADAM_STEPS = {"numpyro": 5000, "pyro": 2000}
EVERY = 50  # steps of Adam between two values of its ELBO
SWEEPS = {"numpyro": 20, "pyro": 5}  # of BLR in one timed run
MAX_SWEEPS = 3000
NUM_DRAWS = 400
MODULES = (
    "argparse ast asyncio bisect calendar collections configparser contextlib csv dataclasses datetime decimal difflib "
    "email fractions functools heapq http.client inspect itertools json logging pathlib pickle random sched socket "
    "statistics string subprocess tarfile tempfile threading typing unittest uuid weakref zipfile"
)

Naturals = dict[str, tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Problem:
    """A model, and its coordinate ascent in NumPy.

    Attributes:
        model, summed: host -> the model as it is, and with its discrete sites summed out.
        start: the value around which each continuous site starts.
        plates: (name, size, dim) of those around each continuous site.
        sweep: λ of every site -> λ of every site.
        elbo: λ of every site -> the ELBO.
        summed_elbo: λ of the continuous sites -> the ELBO of `summed`.
    """

    args: tuple[np.ndarray, ...]
    model: Callable[[Any], Callable]
    summed: Callable[[Any], Callable]
    start: dict[str, np.ndarray]
    plates: dict[str, tuple[tuple[str, int, int], ...]]
    sweep: Callable[[Naturals], Naturals]
    elbo: Callable[[Naturals], float]
    summed_elbo: Callable[[Naturals], float]


# ---------------------------------------------------------------------------------------------------------------------
# Families in NumPy: λ is (α − 1, −β) for a gamma, α − 1 for a Dirichlet, (S m, −S/2) for a Gaussian


def gamma_moments(natural: tuple) -> tuple[np.ndarray, np.ndarray]:
    """E[z] and E[log z]."""
    log, linear = natural
    return (log + 1) / -linear, digamma(log + 1) - np.log(-linear)


def gamma_bound(natural: tuple, concentration: float, rate: Any, log_rate: Any) -> float:
    """E[log p(z)] + H(q), the prior's rate known or with its own E[β] and E[log β]."""
    (shape, scale), (mean, log) = (natural[0] + 1, -1 / natural[1]), gamma_moments(natural)
    prior = concentration * log_rate - gammaln(concentration) + (concentration - 1) * log - rate * mean
    return float((prior + shape + np.log(scale) + gammaln(shape) + (1 - shape) * digamma(shape)).sum())


def dirichlet_log(natural: tuple) -> np.ndarray:
    """E[log z]."""
    concentration = natural[0] + 1
    return digamma(concentration) - digamma(concentration.sum(-1, keepdims=True))


def dirichlet_bound(natural: tuple, concentration: float) -> float:
    """E[log p(z)] + H(q), the prior symmetric."""
    shape = natural[0] + 1
    size = shape.shape[-1]
    prior = gammaln(size * concentration) - size * gammaln(concentration)
    own = gammaln(shape.sum(-1)) - gammaln(shape).sum(-1)
    return float((prior - own + ((concentration - shape) * dirichlet_log(natural)).sum(-1)).sum())


def gaussian_moments(natural: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the covariance of vectors."""
    covariance = np.linalg.inv(-2 * natural[1])
    return np.einsum("nij,nj->ni", covariance, natural[0]), covariance


def gaussian_bound(natural: tuple) -> float:
    """E[log p(z)] + H(q), the prior standard normal."""
    loc, covariance = gaussian_moments(natural)
    trace = np.einsum("nii->n", covariance)
    return float((np.linalg.slogdet(covariance)[1] + loc.shape[-1] - trace - (loc**2).sum(-1)).sum() / 2)


def normal_bound(natural: tuple, prior_scale: float) -> float:
    """E[log p(z)] + H(q), the prior's mean zero."""
    loc, variance = natural[0] / (-2 * natural[1]), 1 / (-2 * natural[1])
    ratio = variance / prior_scale**2
    return float((1 + np.log(ratio) - ratio - (loc / prior_scale) ** 2).sum() / 2)


def uniforms(*shape: int) -> np.ndarray:
    """The same numbers at every call, in pairs u, 1 − u."""
    half = np.random.default_rng(0).uniform(size=(NUM_DRAWS // 2, *shape))
    return np.concatenate([half, 1 - half])


def dirichlet_draws(natural: tuple) -> np.ndarray:
    gammas = gammaincinv(natural[0] + 1, uniforms(*natural[0].shape))
    return gammas / gammas.sum(-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# The models


def mixture(num_components: int) -> Problem:
    """The petals of 150 irises: two clear groups. Of three components the ELBO is best where one is empty."""
    from sklearn.datasets import load_iris

    y = load_iris().data[:, 2]

    def model(host):
        def model(y):
            weights = host.sample("weights", host.dist.Dirichlet(host.array(np.ones(num_components))))
            with host.plate("components", num_components):
                mu = host.sample("mu", host.dist.Normal(0.0, 10.0))
                tau = host.sample("tau", host.dist.Gamma(1.0, 1.0))
            with host.plate("data", len(y)):
                which = host.sample("which", host.dist.Categorical(weights))
                host.sample("y", host.dist.Normal(mu[which], tau[which] ** -0.5), obs=y)

        return model

    def summed(host):
        def model(y):
            weights = host.sample("weights", host.dist.Dirichlet(host.array(np.ones(num_components))))
            with host.plate("components", num_components):
                mu = host.sample("mu", host.dist.Normal(0.0, 10.0))
                tau = host.sample("tau", host.dist.Gamma(1.0, 1.0))
            with host.plate("data", len(y)):
                components = host.dist.Normal(mu, tau**-0.5)
                host.sample("y", host.dist.MixtureSameFamily(host.dist.Categorical(weights), components), obs=y)

        return model

    def log_joint(naturals):
        """E[log p(y_n, which_n = k | …)]."""
        linear, quadratic = naturals["mu"]
        loc, variance = linear / (-2 * quadratic), 1 / (-2 * quadratic)
        precision, log_precision = gamma_moments(naturals["tau"])
        distance = (y[:, None] - loc) ** 2 + variance
        return dirichlet_log(naturals["weights"]) + (log_precision - precision * distance - np.log(2 * np.pi)) / 2

    def sweep(naturals):
        logits = log_joint(naturals)
        share, precision = softmax(logits, -1), gamma_moments(naturals["tau"])[0]
        linear = precision * (share * y[:, None]).sum(0)
        quadratic = -(1 / 100 + precision * share.sum(0)) / 2
        distance = (y[:, None] - linear / (-2 * quadratic)) ** 2 + 1 / (-2 * quadratic)
        return {
            "which": (logits,),
            "mu": (linear, quadratic),
            "tau": (share.sum(0) / 2, -1 - (share * distance).sum(0) / 2),
            "weights": (share.sum(0),),
        }

    def prior(naturals):
        return (
            dirichlet_bound(naturals["weights"], 1.0)
            + normal_bound(naturals["mu"], 10.0)
            + gamma_bound(naturals["tau"], 1.0, 1.0, 0.0)
        )

    def elbo(naturals):
        return categorical_bound(naturals["which"], log_joint(naturals)) + prior(naturals)

    def summed_elbo(naturals):
        (linear, quadratic), (log, rate) = naturals["mu"], naturals["tau"]
        noise = uniforms(2, num_components)
        mu = linear / (-2 * quadratic) + ndtri(noise[:, 0]) * (-2 * quadratic) ** -0.5
        tau = gammaincinv(log + 1, noise[:, 1]) / -rate
        weights = dirichlet_draws(naturals["weights"])
        normal = (np.log(tau / (2 * np.pi)) - tau * (y[:, None, None] - mu) ** 2) / 2
        return logsumexp(np.log(weights) + normal, axis=-1).mean(1).sum() + prior(naturals)

    components = (("components", num_components, -1),)
    return Problem(
        args=(y,),
        model=model,
        summed=summed,
        start={
            "weights": np.full(num_components, 1 / num_components),
            "mu": np.quantile(y, (np.arange(num_components) + 0.5) / num_components),
            "tau": np.ones(num_components),
        },
        plates={"weights": (), "mu": components, "tau": components},
        sweep=sweep,
        elbo=elbo,
        summed_elbo=summed_elbo,
    )


def categorical_bound(natural: tuple, log_joint: np.ndarray) -> float:
    """E[log p(data, z)] + H(q)."""
    share = softmax(natural[0], -1)
    entropy = logsumexp(natural[0], axis=-1) - (share * natural[0]).sum(-1)
    return float(((share * log_joint).sum(-1) + entropy).sum())


def hierarchical_poisson() -> Problem:
    """Sunspots of 300 years, thirty decades with a rate each."""
    import statsmodels.api

    years = statsmodels.api.datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy()
    counts = np.round(years[:300]).reshape(30, 10)

    def model(host):
        def model(counts):
            scale = host.sample("scale", host.dist.Gamma(1.0, 1.0))
            with host.plate("groups", 30, dim=-2):
                rate = host.sample("rate", host.dist.Gamma(2.0, scale))
                with host.plate("repeats", 10, dim=-1):
                    host.sample("counts", host.dist.Poisson(rate), obs=counts)

        return model

    def sweep(naturals):
        scale = gamma_moments(naturals["scale"])[0]
        rate = (1 + counts.sum(1, keepdims=True), np.full((30, 1), -scale - 10))
        return {"rate": rate, "scale": (np.array(60.0), -1 - gamma_moments(rate)[0].sum())}

    def elbo(naturals):
        rate, log = gamma_moments(naturals["rate"])
        return (
            (counts * log - rate - gammaln(counts + 1)).sum()
            + gamma_bound(naturals["rate"], 2.0, *gamma_moments(naturals["scale"]))
            + gamma_bound(naturals["scale"], 1.0, 1.0, 0.0)
        )

    return Problem(
        args=(counts,),
        model=model,
        summed=model,
        start={"scale": np.array(1.0), "rate": np.full((30, 1), counts.mean())},
        plates={"scale": (), "rate": (("groups", 30, -2),)},
        sweep=sweep,
        elbo=elbo,
        summed_elbo=elbo,
    )


def factor_analysis() -> Problem:
    """Thirteen measurements of 178 wines, standardised, two factors."""
    from sklearn.datasets import load_wine

    y = load_wine().data
    y = (y - y.mean(0)) / y.std(0)
    num_data, num_outputs = y.shape

    def model(host):
        def model(y):
            tau = host.sample("tau", host.dist.Gamma(1.0, 1.0))
            with host.plate("outputs", num_outputs):
                loadings = host.sample("loadings", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
            with host.plate("data", num_data):
                factors = host.sample("factors", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
                host.sample("y", host.dist.Normal(factors @ loadings.T, tau**-0.5).to_event(1), obs=y)

        return model

    def regressed(targets, tau, natural):
        loc, covariance = gaussian_moments(natural)
        precision = np.eye(2) + tau * (covariance.sum(0) + loc.T @ loc)
        return tau * targets @ loc, np.repeat(-precision[None] / 2, len(targets), 0)

    def squared_error(naturals):
        (x, x_covariance), (w, w_covariance) = map(gaussian_moments, (naturals["factors"], naturals["loadings"]))
        second = (x_covariance.sum(0) + x.T @ x) * (w_covariance.sum(0) + w.T @ w)
        return (y**2).sum() - 2 * (y * (x @ w.T)).sum() + second.sum()

    def sweep(naturals):
        tau = gamma_moments(naturals["tau"])[0]
        factors = regressed(y, tau, naturals["loadings"])
        loadings = regressed(y.T, tau, factors)
        error = squared_error({"factors": factors, "loadings": loadings})
        return {"factors": factors, "loadings": loadings, "tau": (np.array(y.size / 2), -1 - error / 2)}

    def elbo(naturals):
        tau, log_tau = gamma_moments(naturals["tau"])
        return (
            (y.size * (log_tau - np.log(2 * np.pi)) - tau * squared_error(naturals)) / 2
            + gaussian_bound(naturals["factors"])
            + gaussian_bound(naturals["loadings"])
            + gamma_bound(naturals["tau"], 1.0, 1.0, 0.0)
        )

    random = np.random.default_rng(0)
    return Problem(
        args=(y,),
        model=model,
        summed=model,
        start={
            "tau": np.array(1.0),
            "loadings": random.normal(size=(num_outputs, 2)),
            "factors": random.normal(size=(num_data, 2)),
        },
        plates={"tau": (), "loadings": (("outputs", num_outputs, -1),), "factors": (("data", num_data, -1),)},
        sweep=sweep,
        elbo=elbo,
        summed_elbo=elbo,
    )


def documents(num_words: int, num_terms: int) -> np.ndarray:
    """The first words of the standard library's docstrings, a column for each module, of the most frequent ones."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    texts = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        members = [getattr(module, member, None) for member in sorted(getattr(module, "__all__", dir(module)))]
        # of its own classes and functions only: what else a module holds depends on what has been imported before
        own = [one for one in members if callable(one) and getattr(one, "__module__", None) == name]
        text = " ".join(str(one.__doc__ or "") for one in (module, *own))
        words = re.findall(r"[a-z]{4,}", text.lower())
        texts.append([word for word in words if word not in ENGLISH_STOP_WORDS])
    frequent = Counter(word for text in texts for word in text).most_common(num_terms)
    index = {word: number for number, (word, _) in enumerate(frequent)}
    numbers = [[index[word] for word in text if word in index][:num_words] for text in texts]
    return np.array([one for one in numbers if len(one) == num_words]).T


def topics() -> Problem:
    """Latent Dirichlet allocation on the docstrings of the standard library, three topics."""
    num_terms, num_topics = 40, 3
    words = documents(20, num_terms)
    num_words, num_documents = words.shape

    def model(host):
        def model(words):
            with host.plate("topics", num_topics):
                topic = host.sample("topic", host.dist.Dirichlet(host.array(np.full(num_terms, 0.5))))
            with host.plate("documents", num_documents, dim=-1):
                share = host.sample("share", host.dist.Dirichlet(host.array(np.full(num_topics, 0.7))))
                with host.plate("words", num_words, dim=-2):
                    which = host.sample("which", host.dist.Categorical(share))
                    host.sample("word", host.dist.Categorical(topic[which]), obs=words)

        return model

    def summed(host):
        def model(words):
            with host.plate("topics", num_topics):
                topic = host.sample("topic", host.dist.Dirichlet(host.array(np.full(num_terms, 0.5))))
            with host.plate("documents", num_documents, dim=-1):
                share = host.sample("share", host.dist.Dirichlet(host.array(np.full(num_topics, 0.7))))
                with host.plate("words", num_words, dim=-2):
                    host.sample("word", host.dist.Categorical(share @ topic), obs=words)

        return model

    def log_joint(naturals):
        return dirichlet_log(naturals["share"])[None] + dirichlet_log(naturals["topic"]).T[words]

    def sweep(naturals):
        logits = log_joint(naturals)
        member = softmax(logits, -1)
        counts = np.zeros((num_terms, num_topics))
        np.add.at(counts, words, member)
        return {"which": (logits,), "share": (-0.3 + member.sum(0),), "topic": (-0.5 + counts.T,)}

    def prior(naturals):
        return dirichlet_bound(naturals["topic"], 0.5) + dirichlet_bound(naturals["share"], 0.7)

    def elbo(naturals):
        return categorical_bound(naturals["which"], log_joint(naturals)) + prior(naturals)

    def summed_elbo(naturals):
        probabilities = dirichlet_draws(naturals["share"]) @ dirichlet_draws(naturals["topic"])
        terms = np.log(np.take_along_axis(probabilities, words.T[None], -1))
        return terms.mean(0).sum() + prior(naturals)

    random = np.random.default_rng(0)
    return Problem(
        args=(words,),
        model=model,
        summed=summed,
        start={
            "topic": random.dirichlet(np.full(num_terms, 2.0), num_topics),
            "share": random.dirichlet(np.full(num_topics, 2.0), num_documents),
        },
        plates={"topic": (("topics", num_topics, -1),), "share": (("documents", num_documents, -1),)},
        sweep=sweep,
        elbo=elbo,
        summed_elbo=summed_elbo,
    )


PROBLEMS = {
    "mixture of two Gaussians": partial(mixture, 2),
    "mixture of three Gaussians": partial(mixture, 3),
    "hierarchical Poisson": hierarchical_poisson,
    "factor analysis": factor_analysis,
    "latent Dirichlet allocation": topics,
}

# ---------------------------------------------------------------------------------------------------------------------
# The hosts: a fit is a function that runs on, and says λ and the losses of its steps


@dataclass(frozen=True)
class Fit:
    """A fit by the stock SVI.

    Attributes:
        start: λ where it starts.
        run: () -> (λ after each of the steps that are recorded, the loss of each of these).
        timed: () -> None, the same number of steps without the records.
        num_steps: of one call.
        exact_losses: whether the losses of BLR are exact.
    """

    start: Naturals
    run: Callable[[], tuple[list[Naturals], np.ndarray]]
    timed: Callable[[], None]
    num_steps: int
    exact_losses: bool


PARAMETERS = {
    "Gamma": ("concentration", "rate"),
    "Dirichlet": ("concentration",),
    "Normal": ("loc", "scale"),
    "MultivariateNormal": ("loc", "scale_tril"),
}


def stock_guide(host: Any, plates: dict[str, tuple], starts: dict[str, Any]) -> tuple[Callable, Callable]:
    """q by the host's own constrained parameters, and the distributions from those parameters.

    Args:
        starts: the host's distribution where each site starts.
    """
    constraint = {"loc": host.dist.constraints.real, "scale_tril": host.dist.constraints.lower_cholesky}

    def distribution(name: str, values: dict[str, Any]) -> Any:
        return type(starts[name])(
            **{kind: values[f"{name}.{kind}"] for kind in PARAMETERS[type(starts[name]).__name__]}
        )

    def guide(*args: Any) -> None:
        made = {frame: host.plate(frame[0], frame[1], dim=frame[2]) for frame in set().union(*plates.values())}
        for name, start in starts.items():
            values = {}
            for kind in PARAMETERS[type(start).__name__]:
                value = host.array(getattr(start, kind))
                values[f"{name}.{kind}"] = host.param(
                    f"{name}.{kind}", value, constraint=constraint.get(kind, host.dist.constraints.positive)
                )
            with ExitStack() as stack:
                for frame in plates[name]:
                    stack.enter_context(made[frame])
                host.sample(name, distribution(name, values))

    return guide, lambda values: {name: distribution(name, values) for name in starts}


def numpy_of(naturals: dict[str, Any], to_numpy: Callable = np.asarray) -> Naturals:
    return {
        name: tuple(to_numpy(getattr(natural, field.name)) for field in fields(natural))
        for name, natural in naturals.items()
    }


class NumPyroHost:
    def __init__(self) -> None:
        import jax
        import numpyro

        numpyro.enable_x64()
        self.jax, self.numpyro = jax, numpyro
        self.namespace = SimpleNamespace(
            sample=numpyro.sample,
            plate=numpyro.plate,
            param=numpyro.param,
            dist=numpyro.distributions,
            array=jax.numpy.asarray,
        )

    def blr(self, problem: Problem) -> Fit:
        from numpyro_blr import BLR, AutoExponentialFamily

        model = problem.model(self.namespace)
        guide = AutoExponentialFamily(model, start=problem.start)
        loss = self.numpyro.infer.TraceGraph_ELBO()  # the host's other losses warn of discrete latents
        return self._fit(problem, model, guide, BLR(), loss, guide.natural, SWEEPS["numpyro"], 1)

    def adam(self, problem: Problem, rate: float) -> Fit:
        from numpyro_blr import AutoExponentialFamily
        from numpyro_blr.families import natural_of

        model = problem.summed(self.namespace)
        start = AutoExponentialFamily(model, start=problem.start)
        with self.numpyro.handlers.seed(rng_seed=0), self.numpyro.handlers.trace() as trace:
            start(*map(self.namespace.array, problem.args))
        starts = {name: host_start(trace[name]["fn"]) for name in problem.start}
        guide, distributions = stock_guide(self.namespace, problem.plates, starts)

        def natural(params: dict[str, Any]) -> dict[str, Any]:
            return {name: natural_of(fn) for name, fn in distributions(params).items()}

        adam, loss = self.numpyro.optim.Adam(rate), self.numpyro.infer.Trace_ELBO()
        return self._fit(problem, model, guide, adam, loss, natural, EVERY, EVERY)

    def _fit(self, problem, model, guide, optimizer, loss, natural, num_steps, every) -> Fit:
        jax = self.jax
        args = tuple(map(self.namespace.array, problem.args))
        svi = self.numpyro.infer.SVI(model, guide, optimizer, loss)
        first = state = svi.init(jax.random.key(0), *args)

        def step(state, _):
            return jax.lax.scan(lambda state, _: svi.update(state, *args), state, length=every)

        def recorded(state, _):
            state, losses = step(state, None)
            return state, (natural(svi.get_params(state)), losses[-1])

        on = jax.jit(lambda state: jax.lax.scan(recorded, state, length=num_steps // every))
        bare = jax.jit(lambda state: jax.lax.scan(step, state, length=num_steps // every))

        def run():
            nonlocal state
            state, (naturals, losses) = on(state)
            stacked = numpy_of(naturals)
            rows = range(num_steps // every)
            return [jax.tree.map(lambda leaf, row=row: leaf[row], stacked) for row in rows], np.asarray(losses)

        return Fit(
            start=numpy_of(natural(svi.get_params(first))),
            run=run,
            timed=lambda: jax.block_until_ready(bare(first)),
            num_steps=num_steps,
            exact_losses=True,
        )


class PyroHost:
    def __init__(self) -> None:
        import pyro
        import pyro.infer
        import pyro.optim
        import torch

        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        self.pyro, self.torch = pyro, torch
        self.namespace = SimpleNamespace(
            sample=pyro.sample,
            plate=pyro.plate,
            param=pyro.param,
            dist=pyro.distributions,
            array=lambda value: torch.as_tensor(value).detach().clone(),
        )

    def blr(self, problem: Problem) -> Fit:
        from pyro_blr import BLR

        model = problem.model(self.namespace)
        guide = self._families(model, problem)
        return self._fit(problem, model, guide, BLR(), guide.natural, SWEEPS["pyro"], 1)

    def adam(self, problem: Problem, rate: float) -> Fit:
        from pyro_blr.families import natural_of

        model = problem.summed(self.namespace)
        args = tuple(map(self.namespace.array, problem.args))
        with self.pyro.get_param_store().scope({"params": {}, "constraints": {}}):
            trace = self.pyro.poutine.trace(self._families(model, problem)).get_trace(*args)
        starts = {name: host_start(trace.nodes[name]["fn"]) for name in problem.start}
        guide, distributions = stock_guide(self.namespace, problem.plates, starts)

        def natural() -> dict[str, Any]:
            params = dict(self.pyro.get_param_store())
            return {name: natural_of(fn) for name, fn in distributions(params).items()}

        return self._fit(problem, model, guide, self.pyro.optim.Adam({"lr": rate}), natural, EVERY, EVERY)

    def _families(self, model, problem):
        from pyro_blr import AutoExponentialFamily

        start = {name: self.namespace.array(value) for name, value in problem.start.items()}
        return AutoExponentialFamily(model, start=start)

    def _fit(self, problem, model, guide, optimizer, natural, num_steps, every) -> Fit:
        args = tuple(map(self.namespace.array, problem.args))
        store = {"params": {}, "constraints": {}}
        svi = self.pyro.infer.SVI(model, guide, optimizer, self.pyro.infer.Trace_ELBO())

        def naturals():
            with self.torch.no_grad():
                # Pyro moves its parameters in place
                return numpy_of(natural(), lambda value: value.detach().numpy().copy())

        def run():
            found, losses = [], []
            with self.pyro.get_param_store().scope(store):
                for _ in range(num_steps // every):
                    losses.append([svi.step(*args) for _ in range(every)][-1])
                    found.append(naturals())
            return found, np.array(losses)

        def timed():
            with self.pyro.get_param_store().scope(store):
                for _ in range(num_steps):
                    svi.step(*args)

        self.pyro.set_rng_seed(0)
        with self.pyro.get_param_store().scope(store):
            guide(*args)  # makes its parameters
            start = naturals()
        return Fit(start=start, run=run, timed=timed, num_steps=num_steps, exact_losses=False)


def host_start(fn: Any) -> Any:
    """The distribution itself, without the shapes that a host puts around it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


HOSTS = {"numpyro": NumPyroHost, "pyro": PyroHost}

# ---------------------------------------------------------------------------------------------------------------------
# The measurement


@dataclass(frozen=True)
class Curve:
    """The ELBO after 0, every, 2 · every, … steps."""

    every: int
    elbos: list[float]

    @property
    def best(self) -> float:
        return max(self.elbos)

    def steps_to(self, level: float) -> float:
        """After how many steps it first is at least `level`; infinite if it never is."""
        return next((index * self.every for index, elbo in enumerate(self.elbos) if elbo >= level), math.inf)


def ascend(problem: Problem, start: Naturals, sweep: Callable[[Naturals], Naturals]) -> Curve:
    """Coordinate ascent in NumPy until a sweep gains less than 1e-9 nat."""
    naturals, elbos = start, [problem.elbo(start)]
    while len(elbos) <= MAX_SWEEPS and (len(elbos) < 3 or elbos[-1] - elbos[-2] > 1e-9):
        naturals = sweep(naturals)
        elbos.append(problem.elbo(naturals))
    return Curve(1, elbos)


def sweep_blr(problem: Problem, fit: Fit, expected: Curve) -> Curve:
    """As many sweeps of BLR, or a few more; that its ELBO, and its losses where they are exact, are as expected."""
    elbos, losses = [problem.elbo(fit.start)], []
    while len(elbos) < len(expected.elbos):
        found, reported = fit.run()
        elbos += [problem.elbo(naturals) for naturals in found]
        losses += list(reported)
    np.testing.assert_allclose(elbos[: len(expected.elbos)], expected.elbos, atol=1e-4)
    if fit.exact_losses:
        np.testing.assert_allclose(losses, np.negative(elbos[:-1]), rtol=1e-8)
    return Curve(1, elbos)


def follow_adam(problem: Problem, fit: Fit, num_steps: int) -> Curve:
    elbos = [problem.summed_elbo(fit.start)]
    for _ in range(num_steps // EVERY):
        found, _ = fit.run()
        elbos.append(problem.summed_elbo(found[-1]))
    return Curve(EVERY, elbos)


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each run."""
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[label].append(time.perf_counter() - start)
    return {label: statistics.median(values) for label, values in seconds.items()}


def measure(host: Any, problem: Problem, rates: Sequence[float], num_steps: int, rounds: int) -> dict[str, dict]:
    """By optimizer: its final ELBO, steps to 0.01 and to 0.1 nat, milliseconds a step, seconds to 0.1 nat."""
    blr = host.blr(problem)
    # a discrete site has no start: the first sweep gives it its first λ, and reads none
    curves = {"CAVI in NumPy": ascend(problem, blr.start, problem.sweep)}
    curves["BLR()"] = sweep_blr(problem, blr, curves["CAVI in NumPy"])
    fits = {rate: host.adam(problem, rate) for rate in rates}
    by_rate = {rate: follow_adam(problem, fit, num_steps) for rate, fit in fits.items()}
    best = max(curve.best for curve in by_rate.values())

    chosen = min(rates, key=lambda rate: by_rate[rate].steps_to(best - 0.01))
    curves[f"Adam({chosen})"] = by_rate[chosen]

    def ascend_once() -> None:
        problem.sweep(blr.start)

    runs = {"BLR()": blr.timed, "CAVI in NumPy": ascend_once, f"Adam({chosen})": fits[chosen].timed}
    lengths = {"BLR()": blr.num_steps, "CAVI in NumPy": 1, f"Adam({chosen})": EVERY}
    seconds = interleaved(runs, rounds)
    figures = {}
    for label in runs:
        final, each = curves[label].best, seconds[label] / lengths[label]
        if label.startswith("Adam"):
            final = best
        coarse = curves[label].steps_to(final - 0.1)
        figures[label] = {
            "elbo": final,
            "steps": curves[label].steps_to(final - 0.01),
            "steps_to_0.1": coarse,
            "ms": 1e3 * each,
            "seconds_to_0.1": coarse * each,
        }
    figures[f"Adam({chosen})"]["curves"] = {str(rate): curve.elbos for rate, curve in by_rate.items()}
    return figures


def row(host: str, name: str, label: str, figure: dict, steps_of_blr: int) -> str:
    cells = [host, name, label, f"{figure['elbo']:.3f}", f"{figure['steps']}", f"{figure['steps'] / steps_of_blr:.1f}"]
    cells += [f"{figure['steps_to_0.1']}", f"{figure['ms']:.3g}", f"{figure['seconds_to_0.1']:.2g}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("numpyro", "pyro", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of interleaved runs (default 9)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one rate and 200 steps of Adam: a check, no measurement")
    arguments = parser.parse_args()
    figures = []
    print("| host | model | optimizer | final ELBO | steps | / BLR() | to 0.1 nat | ms a step | s to 0.1 nat |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for name in ("numpyro", "pyro") if arguments.host == "both" else (arguments.host,):
        if importlib.util.find_spec(name) is None:
            print(f"| {name} | not installed |")
            continue
        host = HOSTS[name]()
        rates, num_steps = ((0.03,), 200) if arguments.quick else (RATES, ADAM_STEPS[name])
        for title, make in PROBLEMS.items():
            measured = measure(host, make(), rates, num_steps, 2 if arguments.quick else arguments.rounds)
            for label, figure in measured.items():
                print(row(name, title, label, figure, measured["BLR()"]["steps"]), flush=True)
                figures.append({"host": name, "model": title, "optimizer": label, **figure})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
