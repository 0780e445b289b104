"""Models whose posterior is no Gaussian: the stock fit ends at the optimum of its guide, the same in both packages."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from numpy.testing import assert_allclose

from .. import cases

# ---------------------------------------------------------------------------------------------------------------------
# One dimension, where the optimum is known by quadrature

OBSERVED = np.array([0.4, -1.1, 0.3, 0.9, -0.2, 1.6])


def spread_model(host):
    """An unknown standard deviation, half-normal: positive, and on the logarithm's scale not Gaussian."""

    def model(y):
        sigma = host.sample("sigma", host.dist.HalfNormal(2.0))
        with host.plate("data", 6):
            host.sample("y", host.dist.Normal(0.0, sigma), obs=y)

    return model


def negative_elbo(loc: float, scale: float) -> float:
    """By Gauss-Hermite quadrature over u = log σ."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    u = loc + scale * nodes
    likelihood = scipy.stats.norm.logpdf(OBSERVED[:, None], scale=np.exp(u)).sum(0)
    joint = likelihood + scipy.stats.halfnorm.logpdf(np.exp(u), scale=2.0) + u
    return -(weights / weights.sum()) @ joint - np.log(scale) - 0.5 * np.log(2 * np.pi * np.e)


@pytest.mark.parametrize("guide", [cases.MEAN_FIELD, pytest.param(cases.FULL_RANK, marks=pytest.mark.slow)], ids=str)
def test_a_positive_latent_reaches_the_best_elbo(backend, guide):
    best = scipy.optimize.minimize(lambda at: negative_elbo(at[0], np.exp(at[1])), np.zeros(2), tol=1e-10).fun
    fit = backend.start(spread_model, guide.make, (OBSERVED,)).run(60)
    ((loc, covariance),) = fit.gaussians().values()
    gap = negative_elbo(loc.item(), covariance.item() ** 0.5) - best
    assert -1e-9 < gap < 0.01  # a nat; four hundred draws in all leave a few thousandths
    assert fit.skipped == 0


# ---------------------------------------------------------------------------------------------------------------------
# The same draws in both packages


def counts_model(host):
    """Poisson counts with random effects, whose spread is a positive latent: three kinds of sites."""

    def model(x, y):
        slope = host.sample("a_slope", host.dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        spread = host.sample("b_spread", host.dist.HalfNormal(1.0))
        with host.plate("data", 5):
            effect = host.sample("c_effect", host.dist.Normal(0.0, 1.0))
            host.sample("y", host.dist.Poisson(host.xp.exp((x * slope).sum(-1) + spread * effect)), obs=y)

    return model


def counts() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(10).normal(size=(5, 2)), np.array([0.0, 3.0, 1.0, 2.0, 5.0])


STARTS = {
    "a_slope": np.array([0.5, -0.5]),
    "b_spread": np.array(0.7),
    "c_effect": np.array([0.1, 0.4, -0.3, 0.2, -0.6]),
}


def common_noise(xp, shape, number):
    """ε as a function of the number of the draw and the shape of the site; nothing random about it.

    The square is there so that matrices of it have full rank.
    """
    size = int(np.prod(shape))
    place = xp.arange(float(size))
    return (1.5 * xp.sin(1.0 + 2.1 * number + 0.7 * size + 1.3 * place + 0.37 * place**2)).reshape(shape)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AutoNormal", {}),
        pytest.param("AutoMultivariateNormal", {}, marks=pytest.mark.slow),
        pytest.param("AutoMultivariateNormal", {"learning_rate": 0.4, "temperature": 2.0}, marks=pytest.mark.slow),
    ],
)
def test_both_packages_take_the_same_steps_through_their_hosts(both, name, options, monkeypatch):
    """Eight steps of the stock SVI: recognition, constraints, plates, estimates, search."""
    fits = []
    for bridge in both:
        bridge.same_noise(monkeypatch, common_noise)
        fits.append(bridge.start(counts_model, cases.started(name, STARTS), counts(), **options).run(8))
    ends = [fit.gaussians() for fit in fits]
    for (loc, covariance), (other_loc, other_covariance) in zip(*[end.values() for end in ends], strict=True):
        # far above rounding, far below any difference of the rule
        assert_allclose(loc, other_loc, rtol=1e-8, atol=1e-8)
        assert_allclose(covariance, other_covariance, rtol=1e-8, atol=1e-8)
    medians = [fit.median() for fit in fits]
    for site in STARTS:
        assert_allclose(medians[0][site], medians[1][site], rtol=1e-8)
        assert not np.allclose(medians[0][site], STARTS[site], rtol=1e-3), "it moved"


def test_in_one_dimension_a_probe_is_the_hessian(backend, monkeypatch):
    """u (H u) = H: on the same draws, Hutchinson's estimator takes the steps of the dense one."""
    backend.same_noise(monkeypatch, common_noise)
    ends = [
        backend.start(spread_model, cases.MEAN_FIELD.make, (OBSERVED,), learning_rate=0.5, estimator=estimator)
        .run(8)
        .gaussians()
        for estimator in ("hessian", "hutchinson")
    ]
    ((loc, variance),), ((other_loc, other_variance),) = (end.values() for end in ends)
    assert_allclose(loc, other_loc, rtol=1e-10)
    assert_allclose(variance, other_variance, rtol=1e-10)
