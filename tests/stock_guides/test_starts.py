"""Starts from which nothing leads anywhere: where all is symmetric, and where the log density overflows or vanishes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import invgamma, multivariate_normal


def product(host):
    """y = a b + noise: (0, 0) is a saddle, and the posterior has a mode on either side of it."""

    def model(y):
        a = host.sample("a", host.dist.Normal(host.array(0.0), 1.0))
        b = host.sample("b", host.dist.Normal(host.array(0.0), 1.0))
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Normal(a * b, 0.5), obs=y)

    return model


def calendar(host):
    """Counts that grow over the years, which nobody has centred: e^(a + b year) overflows beside where it vanishes."""

    def model(year, y):
        a = host.sample("a", host.dist.Normal(host.array(0.0), 1000.0))
        b = host.sample("b", host.dist.Normal(host.array(0.0), 10.0))
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Poisson(host.xp.exp(a + b * year)), obs=y)

    return model


def weights(host):
    """Groups around a mean of 240 with a vague one for prior, and variances that may be anything."""

    def model(y):
        mean = host.sample("mean", host.dist.Normal(host.array(0.0), 100.0))
        between = host.sample("between", host.dist.InverseGamma(host.array(0.001), 0.001))
        within = host.sample("within", host.dist.InverseGamma(host.array(0.001), 0.001))
        groups = host.sample("groups", host.dist.Normal(mean, between**0.5).expand((len(y),)).to_event(1))
        host.sample("y", host.dist.Normal(groups[..., None], within**0.5).to_event(2), obs=y)

    return model


def from_values(**values: float):
    """A mean-field guide that starts there."""

    def make(host, model):
        return host.autoguide.AutoNormal(model, init_loc_fn=host.init_to_value(values))

    return make


@pytest.mark.parametrize("kind", ["Trace_ELBO", pytest.param("TraceMeanField_ELBO", marks=pytest.mark.slow)])
def test_a_saddle_on_which_antithetic_draws_cancel_is_left(backend, kind):
    """With recycled draws, and without."""
    make_guide, y = from_values(a=0.0, b=0.0), np.full(20, 2.0)
    fit = backend.start(product, make_guide, (y,), loss=backend.loss(kind)).run(60)
    (a, b) = (float(np.ravel(loc)[0]) for loc, _ in fit.gaussians().values())
    assert abs(a * b - 2.0) < 0.2 and abs(a) > 1 and abs(b) > 1


@pytest.mark.filterwarnings("ignore:Encountered (NaN|inf)", "ignore:BLR. .* steps had a loss or gradient")
def test_an_exponential_that_overflows_beside_where_it_vanishes(backend, random):
    year = random.uniform(1900, 2020, size=100)
    counts = random.poisson(np.exp(0.05 * (year - 1960))).astype(float)
    fit = backend.start(calendar, from_values(a=0.187, b=-0.150), (year, counts)).run(80)
    (a, b) = (float(np.ravel(loc)[0]) for loc, _ in fit.gaussians().values())
    rates = np.exp(a + b * year)
    score = np.stack([np.ones(100), year]) @ (counts - rates) - np.array([a / 1000**2, b / 10**2])
    spread = np.linalg.inv((np.stack([np.ones(100), year]) * rates) @ np.stack([np.ones(100), year]).T)
    assert score @ spread @ score < 0.1**2, "squared distance to the mode, in standard deviations"


@pytest.mark.slow_to_compile
def test_a_hierarchy_does_not_shrink_to_a_point_while_the_noise_grows(backend):
    """At the start the noise is below 1 and the data 240 away: a step of the rule alone moves the variance e-fold.

    The groups hear no data meanwhile, and when they do they are one, 50 nats below.
    """
    random = np.random.default_rng(5)
    y = 240 + 14 * random.normal(size=(20, 1)) + 6 * random.normal(size=(20, 4))
    start = from_values(mean=0.3, between=0.7, within=0.5, groups=random.uniform(-1, 1, size=20))
    fit = backend.start(weights, start, (y,)).run(25)
    found = fit.median()

    # given the variances all is Gaussian, and over their logarithms a sum will do
    same_group, same = np.kron(np.eye(20), np.ones((4, 4))), np.ones((80, 80))
    log_between, log_within = (grid.ravel() for grid in np.meshgrid(np.linspace(3, 8, 21), np.linspace(2, 5, 21)))
    log_mass = np.array(
        [
            multivariate_normal.logpdf(y.ravel(), cov=100**2 * same + np.exp(u) * same_group + np.exp(v) * np.eye(80))
            for u, v in zip(log_between, log_within, strict=True)
        ]
    )
    for log_variance in (log_between, log_within):
        log_mass += invgamma.logpdf(np.exp(log_variance), 0.001, scale=0.001) + log_variance
    mass = np.exp(log_mass - log_mass.max())
    mass /= mass.sum()
    for site, values in (("between", log_between), ("within", log_within)):
        mean = mass @ values
        assert abs(np.log(found[site]) - mean) < 0.3 * np.sqrt(mass @ (values - mean) ** 2)
