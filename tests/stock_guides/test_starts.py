"""Starts from which nothing leads anywhere: where all is symmetric, and where the log density overflows or vanishes."""

from __future__ import annotations

import numpy as np
import pytest


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
