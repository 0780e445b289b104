"""Which family a site gets, where it starts, what the fitted guide gives back, and sites without conjugacy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import gamma, norm


def on_the_line_and_the_half_line(host):
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

    return model


def bounded_discrete_and_in_plates(host):
    def model():
        dist, array = host.dist, host.array
        host.sample("share", dist.Beta(array(2.0), 1.0))
        host.sample("unit", dist.Uniform(array(0.0), 1.0))
        host.sample("shares", dist.Dirichlet(array(np.ones(3))))
        host.sample("switch", dist.Bernoulli(array(0.3)))
        host.sample("which", dist.Categorical(array(np.array([0.2, 0.3, 0.5]))))
        with host.plate("groups", 2):
            host.sample("angle", dist.VonMises(array(0.0), 1.0))
            host.sample("matrix", dist.Normal(array(np.ones((2, 3))), 0.5).to_event(2))

    return model


# model -> (family, λ of the prior where it is looked at, of a categorical site up to a constant) of every site
SITES = {
    on_the_line_and_the_half_line: {
        "real": ("NormalNatural", None),
        "vector": ("MultivariateNormalNatural", None),
        "rate": ("GammaNatural", (1.0, -1.0)),
        "waiting": ("GammaNatural", (0.0, -2.0)),
        "scale": ("NormalNatural", None),
        "inverse": ("InverseGammaNatural", (-4.0, -1.0)),
        "wide": ("InverseGammaNatural", (-1.5, -1.0)),
        "passage": ("InverseGaussianNatural", (-3 / 8, -3 / 2)),
    },
    bounded_discrete_and_in_plates: {
        "share": ("BetaNatural", (1.0, 0.0)),
        "unit": ("BetaNatural", (0.0, 0.0)),
        "shares": ("DirichletNatural", (np.zeros(3),)),
        "switch": ("BernoulliNatural", (np.log(0.3 / 0.7),)),
        "which": ("CategoricalNatural", (np.log([0.2, 0.3, 0.5]),)),
        "angle": ("VonMisesNatural", (np.ones(2), np.zeros(2))),
        "matrix": ("NormalNatural", (np.full((2, 2, 3), 4.0), np.full((2, 2, 3), -2.0))),
    },
}


MAKES = [
    pytest.param(make, marks=pytest.mark.slow_to_compile if make is on_the_line_and_the_half_line else ())
    for make in SITES
]


@pytest.mark.parametrize("make", MAKES, ids=lambda make: make.__name__)
def test_every_site_gets_the_family_of_its_prior_or_support_and_one_step_finds_the_prior(backend, make):
    with backend.promotion(lax=True):
        fit = backend.start_families(make, (), {}, learning_rate=1.0).run(1)
        families = {name: type(natural).__name__ for name, natural in fit.natural_objects().items()}
        found = fit.naturals()
    assert families == {name: family for name, (family, _) in SITES[make].items()}
    for name, (family, expected) in SITES[make].items():
        for actual, desired in zip(found[name], expected or (), strict=expected is not None):
            constant = (actual - desired).mean() if family == "CategoricalNatural" else 0
            np.testing.assert_allclose(actual - constant, desired, rtol=1e-7, atol=1e-7, err_msg=name)


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
    assert np.shape(fit.quantiles(0.1)["rate"]) == np.shape(fit.quantiles(0.1)["mu"]) == ()
    np.testing.assert_allclose(fit.quantiles(0.1)["rate"], gamma.ppf(0.1, 3, scale=0.5), rtol=0.1)


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
