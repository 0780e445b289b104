"""Bayes' rule as addition: contributions of factors and of data, merging, forgetting, leaving out."""

from __future__ import annotations

import numpy as np
import pytest

COUNTS = np.array([3.0, 5.0, 2.0, 7.0])


def poisson(host):
    def model(counts):
        rate = host.sample("rate", host.dist.Gamma(2.0, 0.5))
        with host.plate("data", len(counts)):
            host.sample("counts", host.dist.Poisson(rate), obs=counts)

    return model


def fitted(backend, counts, **options):
    return backend.start_families(poisson, (counts,), {}, learning_rate=1.0, **options).run(1)


def test_each_factor_of_a_conjugate_model_contributes_its_own_natural_parameters(backend):
    parts = fitted(backend, COUNTS).contributions()["rate"]
    assert set(parts) == {"rate", "counts"}
    np.testing.assert_allclose(parts["rate"], (1.0, -0.5), rtol=1e-10)
    np.testing.assert_allclose(parts["counts"], (COUNTS.sum(), -4.0), rtol=1e-10)


def test_each_datum_contributes_its_own(backend):
    parts = fitted(backend, COUNTS).contributions(plate="data")["rate"]
    np.testing.assert_allclose(parts["data"], (COUNTS, -np.ones(4)), rtol=1e-10)
    np.testing.assert_allclose(parts["rest"], (1.0, -0.5), rtol=1e-10)


def test_posteriors_merge_and_data_are_forgotten_exactly(backend):
    prior = backend.natural_of(backend.host.dist.Gamma(backend.array(2.0), backend.array(0.5)))
    halves = [fitted(backend, part).natural_objects()["rate"] for part in (COUNTS[:1], COUNTS[1:])]
    whole = fitted(backend, COUNTS)
    merged = backend.merge(prior, halves)
    np.testing.assert_allclose(backend.leaves(merged), whole.naturals()["rate"], rtol=1e-10)
    data = whole.contribution_objects(plate="data")["rate"]["data"]
    without = [leaf[0] for leaf in backend.leaves(whole.natural_objects()["rate"] - data)]
    np.testing.assert_allclose(without, fitted(backend, COUNTS[1:]).naturals()["rate"], rtol=1e-10)


def test_contributions_at_a_temperature_sum_to_what_was_fitted(backend):
    fit = fitted(backend, COUNTS, temperature=2.0)
    parts = fit.contributions()["rate"]
    np.testing.assert_allclose(parts["rate"], (0.5, -0.25), rtol=1e-10)
    np.testing.assert_allclose(np.add(parts["rate"], parts["counts"]), fit.naturals()["rate"], rtol=1e-10)


def logistic(host):
    def model(x, y):
        weights = host.sample("weights", host.dist.Normal(host.array(np.zeros(2)), 2.0).to_event(1))
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Bernoulli(logits=x @ weights), obs=y)

    return model


def logistic_data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(30, 2))
    return x, (random.uniform(size=30) < 1 / (1 + np.exp(-x @ np.array([1.0, -2.0])))).astype(float)


@pytest.mark.slow_to_compile
def test_the_contributions_of_a_logistic_regression_sum_to_its_posterior(backend):
    x, y = logistic_data()
    with backend.promotion(lax=True):
        fit = backend.start_families(logistic, (x, y), {}).run(30)
        natural = fit.naturals()["weights"]
        parts = fit.contributions()["weights"]
        np.testing.assert_allclose(parts["weights"][1], -np.eye(2) / 8, atol=1e-10)  # the prior's is exact
        sds = np.sqrt(np.diag(np.linalg.inv(-2 * natural[1])))
        total = [sum(leaves) for leaves in zip(*parts.values(), strict=True)]
        shift = np.linalg.solve(-2 * total[1], total[0]) - np.linalg.solve(-2 * natural[1], natural[0])
        # what is left is the Monte Carlo noise of the fit (8 draws a step) and of the contributions (256 draws)
        assert (np.abs(shift) < 0.2 * sds).all()


@pytest.mark.slow
def test_without_the_contribution_of_a_datum_is_the_posterior_without_the_datum(backend):
    x, y = logistic_data()
    with backend.promotion(lax=True):
        fit = backend.start_families(logistic, (x, y), {}).run(30)
        natural = fit.naturals()["weights"]
        sds = np.sqrt(np.diag(np.linalg.inv(-2 * natural[1])))
        data = fit.contributions(plate="data")["weights"]["data"]
        left_out = [whole - part[0] for whole, part in zip(natural, data, strict=True)]
        refit = backend.start_families(logistic, (x[1:], y[1:]), {}).run(30).naturals()["weights"]
        predicted, actual = (np.linalg.solve(-2 * leaves[1], leaves[0]) for leaves in (left_out, refit))
        assert (np.abs(predicted - actual) < 0.15 * sds).all()


def test_a_joint_site_has_contributions_under_its_name_in_the_guide(backend):
    y = np.array([1.0, 2.5, 0.5])

    def make(host):
        def model(y):
            tau = host.sample("tau", host.dist.Gamma(2.0, 1.0))
            mu = host.sample("mu", host.dist.Normal(1.0, (0.5 * tau) ** -0.5))
            with host.plate("data", 3):
                host.sample("y", host.dist.Normal(mu, tau**-0.5), obs=y)

        return model

    parts = backend.start_families(make, (y,), {}, learning_rate=1.0).run(1).contributions(plate="data")["mu,tau"]
    each = (np.full(3, 0.5), -(y**2) / 2, y, np.full(3, -0.5))  # of log τ, τ, τ μ, τ μ²
    np.testing.assert_allclose(parts["data"], each, rtol=1e-8, atol=1e-8)


def test_bad_arguments(backend):
    fit = fitted(backend, COUNTS)
    with pytest.raises(ValueError, match="no plate 'days'; its plates are 'data'"):
        fit.contributions(plate="days")
    with pytest.raises(ValueError, match="num_draws must be even"):
        fit.contributions(num_draws=3)
