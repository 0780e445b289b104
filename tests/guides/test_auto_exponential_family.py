"""Which family a site gets, where it starts, what the fitted guide gives back, and sites without conjugacy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import gamma, norm


def many_sites(host):
    def model():
        dist, array = host.dist, host.array
        host.sample("real", dist.Normal(array(0.0), 1.0))
        host.sample("vector", dist.Normal(array(np.zeros(3)), 1.0).to_event(1))
        host.sample("rate", dist.Gamma(array(2.0), 1.0))
        host.sample("waiting", dist.Exponential(array(2.0)))
        host.sample("scale", dist.HalfNormal(array(2.0)))
        host.sample("inverse", dist.InverseGamma(array(3.0), 1.0))
        host.sample("wide", dist.InverseGamma(array(0.5), 1.0))
        host.sample("passage", host.inverse_gaussian(array(2.0), array(3.0)))
        host.sample("share", dist.Beta(array(2.0), 1.0))
        host.sample("unit", dist.Uniform(array(0.0), 1.0))
        host.sample("shares", dist.Dirichlet(array(np.ones(3))))
        host.sample("switch", dist.Bernoulli(array(0.3)))
        host.sample("which", dist.Categorical(array(np.array([0.2, 0.3, 0.5]))))
        with host.plate("groups", 2):
            host.sample("angle", dist.VonMises(array(0.0), 1.0))
            host.sample("matrix", dist.Normal(array(np.ones((2, 3))), 0.5).to_event(2))

    return model


FAMILIES = {
    "real": "NormalNatural",
    "vector": "MultivariateNormalNatural",
    "rate": "GammaNatural",
    "waiting": "GammaNatural",
    "scale": "NormalNatural",
    "inverse": "InverseGammaNatural",
    "wide": "InverseGammaNatural",
    "passage": "InverseGaussianNatural",
    "share": "BetaNatural",
    "unit": "BetaNatural",
    "shares": "DirichletNatural",
    "switch": "BernoulliNatural",
    "which": "CategoricalNatural",
    "angle": "VonMisesNatural",
    "matrix": "NormalNatural",
}


def test_every_site_gets_the_family_of_its_prior_or_support_and_one_step_finds_the_prior(backend):
    with backend.promotion(lax=True):
        fit = backend.start_families(many_sites, (), {}, learning_rate=1.0).run(1)
        naturals = fit.natural_objects()
        assert {name: type(natural).__name__ for name, natural in naturals.items()} == FAMILIES
        found = fit.naturals()
        np.testing.assert_allclose(found["rate"], (1.0, -1.0), rtol=1e-8)
        np.testing.assert_allclose(found["waiting"], (0.0, -2.0), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(found["inverse"], (-4.0, -1.0), rtol=1e-8)
        np.testing.assert_allclose(found["wide"], (-1.5, -1.0), rtol=1e-8)
        np.testing.assert_allclose(found["passage"], (-3 / 8, -3 / 2), rtol=1e-8)
        np.testing.assert_allclose(found["share"], (1.0, 0.0), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(found["unit"], (0.0, 0.0), atol=1e-8)
        np.testing.assert_allclose(found["shares"][0], np.zeros(3), atol=1e-8)
        np.testing.assert_allclose(found["switch"][0], np.log(0.3 / 0.7), rtol=1e-8)
        shares = np.exp(found["which"][0])
        np.testing.assert_allclose(shares / shares.sum(), [0.2, 0.3, 0.5], rtol=1e-8)
        np.testing.assert_allclose(found["matrix"], np.broadcast_to([[[[4.0]]], [[[-2.0]]]], (2, 2, 2, 3)), rtol=1e-8)
        np.testing.assert_allclose(np.stack(found["angle"]), [[1.0, 1.0], [0.0, 0.0]], atol=1e-7)


def two_sites(host):
    def model():
        host.sample("rate", host.dist.HalfNormal(host.array(2.0)))
        host.sample("vector", host.dist.Normal(host.array(np.zeros(3)), 1.0).to_event(1))

    return model


def test_families_starts_and_density_can_be_chosen(backend):
    options = {"families": {"rate": backend.host.dist.Gamma}, "start": {"rate": 3.0}, "dense": False}
    fit = backend.start_families(two_sites, (), options)
    naturals = fit.natural_objects()
    assert [type(naturals[name]).__name__ for name in ("rate", "vector")] == ["GammaNatural", "NormalNatural"]
    log, linear = fit.naturals()["rate"]
    np.testing.assert_allclose((log + 1) / -linear, 3.0, rtol=1e-10)


@pytest.mark.parametrize("option", ["families", "start", "dense"])
def test_a_name_that_is_no_latent_site_is_refused(backend, option):
    with pytest.raises(ValueError, match=f"{option} names 'nothing', which is no latent site.*'rate', 'vector'"):
        backend.start_families(
            two_sites, (), {option: {"nothing": backend.host.dist.Gamma if option == "families" else 1.0}}
        )


def test_a_fitted_guide_gives_draws_quantiles_and_distributions(backend):
    def make(host):
        def model():
            tau = host.sample("tau", host.dist.Gamma(host.array(2.0), 1.0))
            mu = host.sample("mu", host.dist.Normal(host.array(1.0), (0.5 * tau) ** -0.5))
            host.deterministic("twice", 2 * mu)
            host.sample("rate", host.dist.Gamma(host.array(3.0), 2.0))

        return model

    fit = backend.start_families(make, (), {}, learning_rate=1.0).run(1)
    draws = fit.draws(2_000)
    assert {"mu", "tau", "rate"} <= draws.keys()
    for name, mean, sd in (("tau", 2.0, 2.0**0.5), ("rate", 1.5, 0.75**0.5)):
        assert abs(draws[name].mean() - mean) < 5 * sd / 2_000**0.5
    np.testing.assert_allclose(fit.quantiles([0.1, 0.5])["rate"], gamma.ppf([0.1, 0.5], 3, scale=0.5), rtol=0.1)
    assert abs(fit.median()["mu"] - 1.0) < 0.1


def test_a_site_without_conjugacy_reaches_the_optimum_of_its_family(backend):
    """y ~ N(2 log r + r/10, 1/2) with r ~ Gamma(2, 1/2): the best Gamma by quadrature."""
    y = np.array([1.0, 1.2, 0.8])

    def make(host):
        def model(y):
            rate = host.sample("rate", host.dist.Gamma(2.0, 0.5))
            with host.plate("data", 3):
                host.sample("y", host.dist.Normal(2 * host.xp.log(rate) + 0.1 * rate, 0.5), obs=y)

        return model

    grid = np.exp(np.linspace(-6, 4, 8_001))
    log_joint = gamma.logpdf(grid, 2, scale=2.0)
    log_joint = log_joint + sum(norm.logpdf(value, 2 * np.log(grid) + 0.1 * grid, 0.5) for value in y)

    def loss(parameters: np.ndarray) -> float:
        concentration, rate = np.exp(parameters)
        log_density = gamma.logpdf(grid, concentration, scale=1 / rate)
        return np.trapezoid(np.exp(log_density) * (log_density - log_joint), grid)

    best = minimize(loss, [3.0, 3.0], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12})
    log, linear = backend.start_families(make, (y,), {}).run(40).naturals()["rate"]
    assert loss(np.log([log + 1, -linear])) - best.fun < 0.02


def test_a_discrete_prior_without_a_family_is_refused_with_the_way_out(backend):
    def make(host):
        def model():
            host.sample("count", host.dist.GammaPoisson(host.array(3.0), host.array(1.0)))

        return model

    with backend.promotion(lax=True), pytest.raises(TypeError, match="'count' \\(GammaPoisson.*`families`"):
        backend.start_families(make, (), {})
