"""`AutoLowRankMultivariateNormal`: the best of all covariances diag(a²) + F Fᵀ, and what is no such guide."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
from numpy.testing import assert_allclose

from .. import cases

RANK = 2
CLOSE = {"gtol": 1e-10, "ftol": 1e-15, "maxiter": 10_000}


def low_rank(rank):
    return lambda host, model: host.autoguide.AutoLowRankMultivariateNormal(model, rank=rank)


def by_hand(host, model):
    """The same in other units, W and s of a covariance diag(s) (I + W Wᵀ) diag(s), with s kept as its logarithm."""

    def guide(x, y):
        size = x.shape[1]
        loc, factor = host.param("loc", host.array(np.zeros(size))), host.param("factor", host.array(np.eye(size, 2)))
        scale = host.param("scale", host.array(np.ones(size)), constraint=host.constraints.positive)
        host.sample("z", host.dist.LowRankMultivariateNormal(loc, scale[:, None] * factor, scale**2))

    return guide


def correlated(host):
    """z ~ N(0, 10²) with y = X z + noise of 1/2: six coordinates in units from 1 to 10⁵."""

    def model(x, y):
        z = host.sample("z", host.dist.Normal(host.array(np.zeros(x.shape[1])), 10.0).to_event(1))
        host.sample("y", host.dist.Normal(x @ z, 0.5).to_event(1), obs=y)

    return model


def counts(host):
    """y ~ Poisson(exp(X z)), z ~ N(0, 1)."""

    def model(x, y):
        z = host.sample("z", host.dist.Normal(host.array(np.zeros(x.shape[1])), 1.0).to_event(1))
        host.sample("y", host.dist.Poisson(host.xp.exp(x @ z)).to_event(1), obs=y)

    return model


def in_groups(host):
    """z_g ~ N(0, 10²) with y_g = X_g z_g + noise of 1/2, for each group g."""

    def model(x, y):
        with host.plate("groups", len(x)):
            z = host.sample("z", host.dist.Normal(host.array(np.zeros(x.shape[2])), 10.0).to_event(1))
            host.sample("y", host.dist.Normal((x @ z[..., None])[..., 0], 0.5).to_event(1), obs=y)

    return model


def a_covariance_each(host, model):
    """A covariance diag(s_g) (I + W_g W_gᵀ) diag(s_g) of rank one for each group."""

    def guide(x, y):
        groups, _, size = x.shape
        loc = host.param("loc", host.array(np.zeros((groups, size))))
        factor = host.param("factor", host.array(np.zeros((groups, size, 1))))
        scale = host.param("scale", host.array(np.ones((groups, size))), constraint=host.constraints.positive)
        with host.plate("groups", groups):
            host.sample("z", host.dist.LowRankMultivariateNormal(loc, scale[..., None] * factor, scale**2))

    return guide


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(6)  # of many that have one optimum, and that with all a > 0
    x = random.normal(size=(20, 6)) @ (np.eye(6) + 0.7 * random.normal(size=(6, 6)))
    return x * np.logspace(0, 5, 6), random.normal(size=20)


def parameters(fit) -> tuple[np.ndarray, np.ndarray]:
    """a and f of a guide of rank one."""
    scale, factor = (next(value for name, value in fit.params.items() if end in name) for end in ("scale", "factor"))
    return scale, scale * factor[:, 0]


def divergence(precision: np.ndarray, covariance: np.ndarray) -> float:
    """KL(N(m, Σ) ‖ N(m, S⁻¹))."""
    product = precision @ covariance
    return (np.trace(product) - np.linalg.slogdet(product)[1] - len(precision)) / 2


def least_divergence(precision: np.ndarray, rank: int) -> float:
    """Of all Σ = diag(a²) + F Fᵀ, by L-BFGS from several starts, in the units in which S has ones on its diagonal."""
    size, unit = len(precision), np.diag(precision) ** -0.5
    precision = unit * precision * unit[:, None]

    def at(vector: np.ndarray) -> tuple[float, np.ndarray]:
        logs, factor = vector[:size], vector[size:].reshape(size, rank)
        covariance = np.diag(np.exp(logs)) + factor @ factor.T
        slope = (precision - np.linalg.inv(covariance)) / 2
        gradient = np.concatenate([np.exp(logs) * np.diag(slope), (2 * slope @ factor).ravel()])
        return divergence(precision, covariance), gradient

    random = np.random.default_rng(0)
    starts = [0.3 * random.normal(size=size * (1 + rank)) for _ in range(10)]
    with np.errstate(all="ignore"):
        found = [scipy.optimize.minimize(at, start, jac=True, method="L-BFGS-B", options=CLOSE) for start in starts]
    return min(result.fun for result in found)


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.slow), {"learning_rate": 1.0}], ids=["automatic", "rate 1"]
)
def test_it_ends_at_the_best_covariance_of_its_rank(backend, data, options):
    x, y = data
    precision = x.T @ x / 0.5**2 + np.eye(6) / 10**2
    fit = backend.start(correlated, low_rank(RANK), data, **options).run(15)
    ((loc, covariance),) = fit.gaussians().values()
    scale = np.diag(precision) ** -0.5
    assert_allclose(loc / scale, np.linalg.solve(precision, x.T @ y / 0.5**2) / scale, rtol=1e-8, atol=1e-8)
    least = least_divergence(precision, RANK)
    assert_allclose(divergence(precision, covariance), least, atol=1e-8)
    assert divergence(precision, np.diag(1 / np.diag(precision))) > least + 1, "or mean field would do"
    assert least > 1e-3, "or full rank would do"


def test_each_group_of_a_plate_has_the_best_covariance_of_its_rank(backend):
    random = np.random.default_rng(6)  # of many that have all a > 0
    x, y = random.normal(size=(3, 9, 4)) @ (np.eye(4) + 0.5 * random.normal(size=(3, 4, 4))), random.normal(size=(3, 9))
    fit = backend.start(in_groups, a_covariance_each, (x, y), learning_rate=1.0).run(15)
    ((loc, covariance),) = fit.gaussians().values()
    for group, rows in enumerate(np.split(np.arange(12), 3)):
        precision = x[group].T @ x[group] / 0.5**2 + np.eye(4) / 10**2
        assert_allclose(loc[rows], np.linalg.solve(precision, x[group].T @ y[group] / 0.5**2), rtol=1e-8)
        least = least_divergence(precision, 1)
        assert_allclose(divergence(precision, covariance[np.ix_(rows, rows)]), least, atol=1e-8)
        assert least > 1e-3, "or full rank would do"


@pytest.mark.slow
def test_a_rank_of_all_coordinates_is_full_rank(backend):
    model = cases.linear()
    fit = backend.start(model.make, low_rank(5), model.args).run(15)
    ((loc, covariance),) = fit.gaussians().values()
    mean, exact = model.posterior
    assert_allclose(loc, mean, rtol=1e-8)
    assert_allclose(divergence(np.linalg.inv(exact), covariance), 0, atol=1e-8)


@pytest.mark.slow
def test_written_by_hand_it_is_the_same(backend, data):
    stock, own = (backend.start(correlated, make, data).run(15).gaussians() for make in (low_rank(RANK), by_hand))
    assert_allclose(own["z"][1], next(iter(stock.values()))[1], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["hessian", pytest.param("secant", marks=pytest.mark.slow)])
def test_beyond_gaussian_posteriors_it_ends_where_its_own_gradients_vanish(backend, estimator):
    """Poisson regression in closed form: E_q[g] = 0, and E_q[H] = Σ⁻¹ as far as the guide can tell."""
    problem = cases.poisson()
    fit = backend.start(counts, low_rank(1), (problem.inputs, problem.counts), estimator=estimator).run(60)
    ((loc, covariance),) = fit.gaussians().values()
    gradient, hessian = problem.expected_derivatives(loc, covariance)
    assert gradient @ covariance @ gradient < 1e-3
    # the derivatives in log a² and in log |f| of Σ = diag(a²) + f fᵀ
    slope = hessian - np.linalg.inv(covariance)
    scale, factor = parameters(fit)
    assert_allclose(scale**2 * np.diag(slope), 0, atol=0.02)
    assert_allclose(scale * (slope @ factor), 0, atol=0.02)
    assert np.linalg.norm(factor / scale) > 0.3, "or mean field would do"


@pytest.mark.parametrize(
    ("estimator", "options"), [("hutchinson", {}), ("gradient", {"learning_rate": 0.1})], ids=lambda case: str(case)
)
def test_estimators_of_less_are_refused(backend, data, estimator, options):
    with pytest.raises(ValueError, match=f"estimator='{estimator}'.*low-rank site. Use estimator='hessian'"):
        backend.start(correlated, low_rank(RANK), data, estimator=estimator, **options).run(1)


def test_a_covariance_of_other_parameters_is_refused(backend, data):
    def other(host, model):
        def guide(x, y):
            size = x.shape[1]
            loc = host.param("loc", host.array(np.zeros(size)))
            factor = host.param("factor", host.array(np.eye(size, 2)))
            variance = host.param("variance", host.array(np.ones(size)), constraint=host.constraints.positive)
            host.sample("z", host.dist.LowRankMultivariateNormal(loc, factor, variance))

        return guide

    with pytest.raises(ValueError, match=r"covariance of site 'z' is not recognised: expected .* Use that guide"):
        backend.start(correlated, other, data).run(1)


@pytest.mark.slow_to_compile
def test_there_are_no_contributions_to_natural_parameters_that_it_has_not(backend, data):
    fit = backend.start(correlated, low_rank(RANK), data).run(1)
    with pytest.raises(ValueError, match=r"no exponential family. Use AutoMultivariateNormal"):
        fit.contributions()
