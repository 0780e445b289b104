"""Models whose log density has kinks, or a curvature that overflows: `BLR()` as it comes, against exact optima."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import scipy.optimize
from scipy.stats import norm

from .. import cases


def median_model(host):
    """Median regression: the Hessian of the likelihood is zero wherever it is."""

    def model(x, y):
        weights = host.sample("weights", host.dist.Normal(host.xp.zeros(3), 5.0).to_event(1))
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Laplace((x * weights).sum(-1), 0.7), obs=y)

    return model


def lasso_model(host):
    """Bayesian lasso: kinks in the prior of each weight."""

    def model(x, y):
        weights = host.sample("weights", host.dist.Laplace(host.xp.zeros(3), 0.2).to_event(1))
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Normal((x * weights).sum(-1), 2.0), obs=y)

    return model


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(11)
    x = random.normal(size=(60, 3)) @ np.array([[1.0, 0.4, 0.0], [0.0, 1.0, -0.5], [0.0, 0.0, 1.0]])
    return x, x @ np.array([0.5, -0.3, 0.0]) + random.laplace(scale=0.7, size=60)


def folded(mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """E|N(mean, sd²)|"""
    return sd * np.sqrt(2 / np.pi) * np.exp(-((mean / sd) ** 2) / 2) + mean * (1 - 2 * norm.cdf(-mean / sd))


def negative_elbo(name: str, loc: np.ndarray, factor: np.ndarray) -> float:
    """In closed form, with C = `factor`."""
    x, y = data()
    covariance, entropy = factor @ factor.T, np.log(np.abs(np.diagonal(factor))).sum() + 1.5 * np.log(2 * np.pi * np.e)
    mean, variance = x @ loc - y, np.einsum("ia,ab,ib->i", x, covariance, x)
    if name == "median":
        likelihood = (folded(mean, np.sqrt(variance)) / 0.7 + np.log(1.4)).sum()
        prior = ((loc**2 + np.diagonal(covariance)) / 50 + np.log(5 * np.sqrt(2 * np.pi))).sum()
    else:
        likelihood = ((mean**2 + variance) / 8 + np.log(2 * np.sqrt(2 * np.pi))).sum()
        prior = (folded(loc, np.sqrt(np.diagonal(covariance))) / 0.2 + np.log(0.4)).sum()
    return likelihood + prior - entropy


@functools.cache
def best(name: str, dense: bool) -> float:
    """−ELBO of the best Gaussian."""
    rows, columns = np.tril_indices(3, 0 if dense else -3)
    kept = (rows, columns) if dense else (np.arange(3), np.arange(3))

    def objective(at):
        factor = np.zeros((3, 3))
        factor[kept] = at[3:]
        return negative_elbo(name, at[:3], factor)

    start = np.concatenate([np.zeros(3), 0.2 * np.eye(3)[kept]])
    return scipy.optimize.minimize(
        objective, start, method="Nelder-Mead", options={"maxiter": 20_000, "xatol": 1e-7}
    ).fun


@pytest.mark.parametrize(
    ("name", "make", "guide"),
    [
        ("median", median_model, cases.MEAN_FIELD),
        pytest.param("median", median_model, cases.FULL_RANK, marks=pytest.mark.slow),
        pytest.param("lasso", lasso_model, cases.MEAN_FIELD, marks=pytest.mark.slow),
        pytest.param("lasso", lasso_model, cases.FULL_RANK, marks=pytest.mark.slow),
    ],
    ids=["median, mean field", "median, full rank", "lasso, mean field", "lasso, full rank"],
)
def test_kinks_of_likelihood_and_prior(backend, name, make, guide):
    fit = backend.start(make, guide.make, data()).run(100)
    ((loc, covariance),) = fit.gaussians().values()
    gap = negative_elbo(name, loc, np.linalg.cholesky(covariance)) - best(name, guide is cases.FULL_RANK)
    assert -1e-4 < gap < 0.02


def written_out_model(host):
    """Median regression in the user's own words, in which there is no site to tell of kinks."""

    def model(x, y):
        weights = host.sample("weights", host.dist.Normal(host.xp.zeros(3), 5.0).to_event(1))
        host.factor("y", -(host.xp.abs((x * weights).sum(-1) - y) / 0.7 + np.log(1.4)).sum())

    return model


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(median_model, {"learning_rate": 0.1}, marks=pytest.mark.slow),
        (written_out_model, {"estimator": "secant", "learning_rate": 0.1}),
        pytest.param(median_model, {"num_draws": 4, "learning_rate": 0.1}, marks=pytest.mark.slow),
    ],
    ids=["a given rate", "written out, a given rate", "four draws, a given rate"],
)
def test_kinks_where_no_draws_are_kept_or_no_site_tells_of_them(backend, make, options):
    fit = backend.start(make, cases.MEAN_FIELD.make, data(), **options).run(100)
    ((loc, covariance),) = fit.gaussians().values()
    assert negative_elbo("median", loc, np.linalg.cholesky(covariance)) - best("median", False) < 0.02


def shrinkage_model(host):
    """Each datum with a mean of its own, and as many kinks as coordinates."""

    def model(y):
        means = host.sample("means", host.dist.Laplace(host.xp.zeros(300), 0.5).to_event(1))
        with host.plate("data", 300):
            host.sample("y", host.dist.Normal(means, 1.0), obs=y)

    return model


@pytest.mark.slow
def test_kinks_of_many_coordinates(backend):
    """Beyond 256 coordinates the diagonal of E_q[H] is from secants along all coordinates at once."""
    y = np.random.default_rng(3).normal(scale=1.2, size=300)
    fit = backend.start(shrinkage_model, cases.MEAN_FIELD.make, (y,)).run(150)
    ((loc, covariance),) = fit.gaussians().values()

    def objective(mean, log_sd):
        sd = np.exp(log_sd)
        return folded(mean, sd) / 0.5 + ((y - mean) ** 2 + sd**2) / 2 - log_sd

    sds = np.log(np.linspace(0.2, 1.2, 101))
    best = np.min([objective(mean, log_sd) for mean in np.linspace(-4, 4, 161)[:, None] for log_sd in sds[:, None]], 0)
    gap = (objective(loc, np.log(np.diagonal(covariance)) / 2) - best).sum()
    assert gap < 0.02 * 300


def mixture_model(host):
    """A Laplace distribution within a mixture."""

    def model(x, y):
        weights = host.sample("weights", host.dist.Normal(host.xp.zeros(3), 1.0).to_event(1))
        which, loc = host.dist.Categorical(host.array([0.5, 0.5])), (x * weights).sum(-1)[:, None]
        with host.plate("data", len(y)):
            components = host.dist.Laplace(loc, host.array([0.5, 2.0]))
            host.sample("y", host.dist.MixtureSameFamily(which, components), obs=y)

    return model


def counts_model(host):
    """Poisson regression, which is smooth."""

    def model(x, y):
        weights = host.sample("weights", host.dist.Normal(host.xp.zeros(3), 1.0).to_event(1))
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Poisson(host.xp.exp((x * weights).sum(-1))), obs=y)

    return model


SMOOTH = pytest.param(counts_model, "hessian", marks=pytest.mark.slow_to_compile)


@pytest.mark.parametrize(("make", "estimator"), [(mixture_model, "secant"), (lasso_model, "secant"), SMOOTH])
def test_sites_tell_of_kinks(backend, make, estimator):
    x, y = data()
    fit = backend.start(make, cases.MEAN_FIELD.make, (x, abs(np.round(y)))).run(1)
    assert fit.optimizer_state.estimator == estimator


def test_fit_tells_of_kinks_that_the_hessians_one_asked_for_do_not_know(backend):
    """Stein's identity does: by the Hessians, which are the prior's alone, the guide is far too wide."""
    optimizer = backend.BLR(estimator="hessian")
    with pytest.warns(UserWarning) as caught:
        backend.fit(written_out_model, "AutoNormal", data(), optimizer=optimizer, max_steps=40)
    (text,) = (str(warning.message) for warning in caught if "kinks" in str(warning.message))
    assert "which no Hessian knows" in text and "estimator='secant'" in text


@pytest.mark.slow
def test_fit_is_content_with_secants(backend, recwarn):
    result = backend.fit(median_model, "AutoNormal", data())
    assert result.converged and not [warning for warning in recwarn if "kinks" in str(warning.message)]


def test_contributions_are_not_made_of_hessians_that_do_not_know_kinks(backend):
    fit = backend.start(lasso_model, cases.MEAN_FIELD.make, data(), learning_rate=0.1).run(2)
    with pytest.raises(ValueError, match="made of Hessians, which do not know the curvature"):
        fit.contributions()


def lifetimes_model(host):
    """Survivals at given times, of which no one has taken the logarithm: of p = e^(−rate t) the square underflows."""

    def model(time, survived):
        log_rate = host.sample("log_rate", host.dist.Normal(host.array(0.0), 5.0))
        probability = host.xp.exp(-host.xp.exp(log_rate) * time)
        log_likelihood = host.xp.log(host.xp.where(survived > 0, probability, 1 - probability))
        host.factor("survivals", log_likelihood.sum())

    return model


def test_a_start_where_the_gradient_is_finite_and_the_hessian_is_not(backend):
    """At a rate of 1, e^(−600) is a number and e^(−1200) is not."""
    time, survived = np.linspace(20.0, 600.0, 30), (np.arange(30) < 12).astype(float)

    def make_guide(host, model):
        return host.autoguide.AutoNormal(model, init_loc_fn=host.init_to_value({"log_rate": 0.0}))

    fit = backend.start(lifetimes_model, make_guide, (time, survived)).run(60)
    assert fit.skipped == 0

    grid = np.linspace(-9, -2, 4001)
    hazard = np.exp(grid)[:, None] * time
    log_density = norm.logpdf(grid, 0, 5) + np.where(survived > 0, -hazard, np.log(-np.expm1(-hazard))).sum(-1)
    weights = np.exp(log_density - log_density.max())
    mean = (weights * grid).sum() / weights.sum()
    sd = np.sqrt((weights * (grid - mean) ** 2).sum() / weights.sum())
    ((loc, covariance),) = fit.gaussians().values()
    assert abs(float(loc[0]) - mean) < 0.1 * sd
    assert abs(np.log(float(covariance[0, 0]) ** 0.5 / sd)) < 0.1
