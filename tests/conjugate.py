"""Conjugate and conditionally conjugate models with their answers in plain NumPy.

Every model is written as a user writes it. `Conjugate` has one exact posterior; `Conditional` has a sweep of
coordinate-ascent variational Bayes, site by site in the order in which the packages take them, from the same start.
Natural parameters are tuples in the order of a family's fields.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import digamma, logsumexp

__all__ = ["CONDITIONAL", "CONJUGATE", "Conditional", "Conjugate", "gamma_poisson", "normal_wishart", "regression"]


@dataclass(frozen=True)
class Conjugate:
    """A model whose posterior belongs to the family of its prior.

    Attributes:
        make: host -> the model, a function of `args`.
        posterior: λ of each site of the guide.
        options: of the guide.
        lax: whether the host's own distributions mix dtypes, which the strict mode of the tests forbids.
    """

    name: str
    make: Callable[[Any], Callable]
    args: tuple
    posterior: dict[str, tuple]
    options: dict[str, Any] = field(default_factory=dict)
    lax: bool = False

    def __repr__(self) -> str:
        return self.name


def normal_of(loc: Any, precision: Any) -> tuple:
    return precision * loc, -precision / 2


def normal_mean() -> Conjugate:
    y = np.random.default_rng(0).normal(3.0, 2.0, size=20)

    def make(host):
        def model(y):
            mu = host.sample("mu", host.dist.Normal(1.0, 10.0))
            with host.plate("data", len(y)):
                host.sample("y", host.dist.Normal(mu, 2.0), obs=y)

        return model

    precision = 1 / 100 + len(y) / 4
    return Conjugate("normal mean", make, (y,), {"mu": (1 / 100 + y.sum() / 4, -precision / 2)})


def regression_data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    x = random.normal(size=(30, 4)) * np.array([1.0, 10.0, 100.0, 0.1])
    return x, x @ np.ones(4) + random.normal(size=30)


def regression() -> Conjugate:
    """Full rank: a site on a vector has a MultivariateNormal."""
    x, y = regression_data()

    def make(host):
        def model(x, y):
            weights = host.sample("weights", host.dist.Normal(host.array(np.zeros(4)), 3.0).to_event(1))
            with host.plate("data", len(y)):
                host.sample("y", host.dist.Normal(x @ weights, 0.5), obs=y)

        return model

    precision = 4 * x.T @ x + np.eye(4) / 9
    return Conjugate("regression", make, (x, y), {"weights": (4 * x.T @ y, -precision / 2)})


def mean_field_regression() -> Conjugate:
    """The best mean-field posterior, coefficients in a plate: the mean is solved for all of them at once."""
    x, y = regression_data()

    def make(host):
        def model(x, y):
            with host.plate("columns", 4):
                weights = host.sample("weights", host.dist.Normal(0.0, 3.0))
            with host.plate("data", len(y)):
                host.sample("y", host.dist.Normal(x @ weights, 0.5), obs=y)

        return model

    precision = 4 * x.T @ x + np.eye(4) / 9
    loc = np.linalg.solve(precision, 4 * x.T @ y)
    return Conjugate("mean-field regression", make, (x, y), {"weights": normal_of(loc, np.diag(precision))})


def regression_by_sites() -> Conjugate:
    """Intercept and slope are sites of their own, and uncentred: mean field, solved for both at once."""
    random = np.random.default_rng(13)
    x = random.normal(10.0, 1.0, size=20)
    y = 3 - 2 * x + random.normal(size=20)

    def make(host):
        def model(x, y):
            intercept = host.sample("intercept", host.dist.Normal(0.0, 10.0))
            slope = host.sample("slope", host.dist.Normal(0.0, 10.0))
            with host.plate("data", len(y)):
                host.sample("y", host.dist.Normal(intercept + slope * x, 0.5), obs=y)

        return model

    design = np.column_stack([np.ones(20), x])
    precision = 4 * design.T @ design + np.eye(2) / 100
    natural = normal_of(np.linalg.solve(precision, 4 * design.T @ y), np.diag(precision))
    sites = {name: tuple(leaf[i] for leaf in natural) for i, name in enumerate(("intercept", "slope"))}
    return Conjugate("regression by sites", make, (x, y), sites)


def gamma_poisson() -> Conjugate:
    counts = np.random.default_rng(2).poisson(4.0, size=(6, 3)).astype(float)

    def make(host):
        def model(counts):
            with host.plate("groups", 3):
                rate = host.sample("rate", host.dist.Gamma(2.0, 0.5))
                with host.plate("repeats", 6, dim=-2):
                    host.sample("counts", host.dist.Poisson(rate), obs=counts)

        return model

    return Conjugate("gamma-Poisson", make, (counts,), {"rate": (1 + counts.sum(0), -0.5 - np.full(3, 6.0))})


def gamma_exponential() -> Conjugate:
    """An exponential prior is a gamma prior."""
    waits = np.random.default_rng(3).exponential(0.4, size=12)

    def make(host):
        def model(waits):
            rate = host.sample("rate", host.dist.Exponential(2.0))
            with host.plate("data", len(waits)):
                host.sample("waits", host.dist.Exponential(rate), obs=waits)

        return model

    return Conjugate("gamma-exponential", make, (waits,), {"rate": (12.0, -2 - waits.sum())})


def beta_bernoulli() -> Conjugate:
    tosses = np.random.default_rng(4).integers(0, 2, size=(10, 3)).astype(float)

    def make(host):
        def model(tosses):
            with host.plate("coins", 3):
                fairness = host.sample("fairness", host.dist.Beta(2.0, 3.0))
                with host.plate("tosses", 10, dim=-2):
                    host.sample("heads", host.dist.Bernoulli(fairness), obs=tosses)

        return model

    heads = tosses.sum(0)
    return Conjugate("beta-Bernoulli", make, (tosses,), {"fairness": (1 + heads, 2 + 10 - heads)})


def dirichlet_categorical() -> Conjugate:
    values = np.random.default_rng(5).integers(0, 4, size=25)
    prior = np.array([1.0, 2.0, 0.5, 0.1])

    def make(host):
        def model(values):
            shares = host.sample("shares", host.dist.Dirichlet(host.array(prior)))
            with host.plate("data", 25):
                host.sample("values", host.dist.Categorical(shares), obs=values)

        return model

    return Conjugate(
        "Dirichlet-categorical", make, (values,), {"shares": (prior - 1 + np.bincount(values, minlength=4),)}
    )


def normal_gamma() -> Conjugate:
    y = np.random.default_rng(6).normal(3.0, 2.0, size=(20, 2))

    def make(host):
        def model(y):
            with host.plate("groups", 2):
                tau = host.sample("tau", host.dist.Gamma(2.0, 1.0))
                mu = host.sample("mu", host.dist.Normal(1.0, (0.5 * tau) ** -0.5))
                with host.plate("repeats", 20, dim=-2):
                    host.sample("y", host.dist.Normal(mu, tau**-0.5), obs=y)

        return model

    kappa, total = 0.5 + 20, 0.5 + y.sum(0)
    linear = -1 - 0.5 / 2 - (y**2).sum(0) / 2  # −b − κ m²/2 is additive
    one = np.ones(2)
    posterior = ((2 - 0.5 + 10) * one, linear, total, -kappa / 2 * one)
    return Conjugate("normal-gamma", make, (y,), {"mu,tau": posterior})


def normal_wishart() -> Conjugate:
    random = np.random.default_rng(7)
    y = random.normal(size=(15, 2)) @ random.normal(size=(2, 2)) + np.array([1.0, -2.0])

    def make(host):
        def model(y):
            matrix = host.sample("matrix", host.wishart(5.0, host.array(2 * np.eye(2))))
            center = host.array(np.ones(2))
            mu = host.sample("mu", host.dist.MultivariateNormal(center, precision_matrix=0.3 * matrix))
            with host.plate("data", len(y)):
                host.sample("y", host.dist.MultivariateNormal(mu, precision_matrix=matrix), obs=y)

        return model

    linear = -(2 * np.eye(2) + 0.3 * np.ones((2, 2)) + y.T @ y) / 2
    posterior = ((5 + 15 - 2) / 2, linear, 0.3 * np.ones(2) + y.sum(0), -(0.3 + 15) / 2)
    return Conjugate("normal-Wishart", make, (y,), {"mu,matrix": posterior}, lax=True)


def discrete() -> Conjugate:
    y = np.random.default_rng(8).normal(1.0, 1.5, size=5)

    def make(host):
        def model(y):
            with host.plate("data", 5):
                switch = host.sample("switch", host.dist.Bernoulli(0.3))
                host.sample("y", host.dist.Normal(2.0 * switch, 1.0), obs=y)

        return model

    return Conjugate("Bernoulli-normal", make, (y,), {"switch": (np.log(0.3 / 0.7) + 2 * y - 2,)}, lax=True)


CONJUGATE = (
    normal_mean,
    regression,
    mean_field_regression,
    regression_by_sites,
    gamma_poisson,
    gamma_exponential,
    beta_bernoulli,
    dirichlet_categorical,
    normal_gamma,
    normal_wishart,
    discrete,
)

# ---------------------------------------------------------------------------------------------------------------------
# Conditionally conjugate models


@dataclass(frozen=True)
class Conditional:
    """A model in which every site is conjugate given the others.

    Attributes:
        start: where the guide's sites start, for those that are not left at the guide's own start.
        sweep: λ of every site -> λ of every site after one sweep of coordinate ascent.
    """

    name: str
    make: Callable[[Any], Callable]
    args: tuple
    start: dict[str, np.ndarray]
    sweep: Callable[[dict[str, tuple]], dict[str, tuple]]
    lax: bool = False

    def __repr__(self) -> str:
        return self.name


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))


def expected_log(natural: np.ndarray) -> np.ndarray:
    """E[log z] of a Dirichlet with λ = α − 1."""
    return digamma(natural + 1) - digamma((natural + 1).sum(-1, keepdims=True))


@functools.cache
def mixture() -> Conditional:
    random = np.random.default_rng(9)
    y = np.concatenate([random.normal(-4, 1.0, 15), random.normal(0, 0.5, 15), random.normal(5, 1.5, 10)])

    def make(host):
        def model(y):
            weights = host.sample("weights", host.dist.Dirichlet(host.array(np.ones(3))))
            with host.plate("components", 3):
                mu = host.sample("mu", host.dist.Normal(0.0, 10.0))
                tau = host.sample("tau", host.dist.Gamma(1.0, 1.0))
            with host.plate("data", len(y)):
                which = host.sample("which", host.dist.Categorical(weights))
                host.sample("y", host.dist.Normal(mu[which], tau[which] ** -0.5), obs=y)

        return model

    def sweep(natural):
        (linear, quadratic), (log, rate), (weights,) = natural["mu"], natural["tau"], natural["weights"]
        loc, variance = linear / (-2 * quadratic), 1 / (-2 * quadratic)
        precision, log_precision = (log + 1) / -rate, digamma(log + 1) - np.log(-rate)
        distance = (y[:, None] - loc) ** 2 + variance
        logits = expected_log(weights) + log_precision / 2 - precision * distance / 2 - np.log(2 * np.pi) / 2
        share = softmax(logits)
        quadratic = -(1 / 100 + precision * share.sum(0)) / 2
        linear = precision * (share * y[:, None]).sum(0)
        loc, variance = linear / (-2 * quadratic), 1 / (-2 * quadratic)
        distance = (y[:, None] - loc) ** 2 + variance
        return {
            "mu": (linear, quadratic),
            "tau": (share.sum(0) / 2, -1 - (share * distance).sum(0) / 2),
            "weights": (share.sum(0),),
        }

    return Conditional("mixture of Gaussians", make, (y,), {"mu": np.array([-2.0, 0.5, 3.0])}, sweep, lax=True)


@functools.cache
def hierarchical_poisson() -> Conditional:
    random = np.random.default_rng(10)
    counts = random.poisson(np.repeat(random.gamma(3, 2, size=8), 5)).reshape(8, 5).astype(float)

    def make(host):
        def model(counts):
            scale = host.sample("scale", host.dist.Gamma(1.0, 1.0))
            with host.plate("groups", 8, dim=-2):
                rate = host.sample("rate", host.dist.Gamma(2.0, scale))
                with host.plate("repeats", 5, dim=-1):
                    host.sample("counts", host.dist.Poisson(rate), obs=counts)

        return model

    def sweep(natural):
        log, linear = natural["scale"]
        expected = (log + 1) / -linear
        rate = (1 + counts.sum(1, keepdims=True), np.full((8, 1), -expected - 5))
        return {"rate": rate, "scale": (np.array(2.0 * 8), -1 - ((rate[0] + 1) / -rate[1]).sum())}

    return Conditional("hierarchical Poisson", make, (counts,), {}, sweep)


@functools.cache
def factor_analysis() -> Conditional:
    random = np.random.default_rng(11)
    y = random.normal(size=(8, 2)) @ random.normal(size=(2, 4)) + 0.3 * random.normal(size=(8, 4))

    def make(host):
        def model(y):
            tau = host.sample("tau", host.dist.Gamma(1.0, 1.0))
            with host.plate("outputs", 4):
                loadings = host.sample("loadings", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
            with host.plate("data", 8):
                factors = host.sample("factors", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
                host.sample("y", host.dist.Normal(factors @ loadings.T, tau**-0.5).to_event(1), obs=y)

        return model

    def moments(natural):
        covariance = np.linalg.inv(-2 * natural[1])
        return np.einsum("nij,nj->ni", covariance, natural[0]), covariance

    def regress(targets, tau, natural):
        loc, covariance = moments(natural)
        precision = np.eye(2) + tau * (covariance.sum(0) + loc.T @ loc)
        return tau * targets @ loc, np.repeat(-precision[None] / 2, len(targets), 0)

    def sweep(natural):
        tau = (natural["tau"][0] + 1) / -natural["tau"][1]
        factors = regress(y, tau, natural["loadings"])
        loadings = regress(y.T, tau, factors)
        (x, x_cov), (w, w_cov) = moments(factors), moments(loadings)
        error = ((y - x @ w.T) ** 2).sum()
        for i in range(8):
            for j in range(4):
                error += np.trace(x_cov[i] @ w_cov[j]) + x[i] @ w_cov[j] @ x[i] + w[j] @ x_cov[i] @ w[j]
        return {"factors": factors, "loadings": loadings, "tau": (np.array(16.0), -1 - error / 2)}

    return Conditional("factor analysis", make, (y,), {}, sweep)


@functools.cache
def topics() -> Conditional:
    """Latent Dirichlet allocation, the topic of every word summed out of nothing."""
    words = np.random.default_rng(12).integers(0, 7, size=(8, 6))

    def make(host):
        def model(words):
            with host.plate("topics", 2):
                topic = host.sample("topic", host.dist.Dirichlet(host.array(np.full(7, 0.5))))
            with host.plate("documents", 6, dim=-1):
                share = host.sample("share", host.dist.Dirichlet(host.array(np.full(2, 0.7))))
                with host.plate("words", 8, dim=-2):
                    which = host.sample("which", host.dist.Categorical(share))
                    host.sample("word", host.dist.Categorical(topic[which]), obs=words)

        return model

    def sweep(natural):
        (topic,), (share,) = natural["topic"], natural["share"]
        member = softmax(expected_log(share)[None] + expected_log(topic).T[words])
        counts = [[member[words == word, k].sum() for word in range(7)] for k in range(2)]
        return {"share": (-0.3 + member.sum(0),), "topic": (-0.5 + np.array(counts),)}

    return Conditional("latent Dirichlet allocation", make, (words,), {}, sweep, lax=True)


CONDITIONAL = (mixture, hierarchical_poisson, factor_analysis, topics)
