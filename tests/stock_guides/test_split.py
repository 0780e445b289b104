"""Hessians in two parts, where a few coordinates and what follows from them alone are constants for the many others."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

SIZE = 16


def positions() -> np.ndarray:
    return np.linspace(0.0, 3.0, SIZE)


def counts() -> np.ndarray:
    return np.random.default_rng(0).poisson(np.exp(np.sin(2 * positions()))).astype(float)


def field(host, spread, length, x, y):
    """y ~ Poisson(exp(L z)), z ~ N(0, I), with L Lᵀ the covariance of a Gaussian process."""
    covariance = spread**2 * host.xp.exp(-(((x[:, None] - x) / length) ** 2) / 2)
    factor = host.xp.linalg.cholesky(covariance + 1e-4 * host.array(np.eye(SIZE)))
    z = host.sample("z", host.dist.Normal(host.array(np.zeros(SIZE)), 1.0).to_event(1))
    host.sample("y", host.dist.Poisson(host.xp.exp(factor @ z)).to_event(1), obs=y)


def sampled(host):
    def model(x, y):
        spread = host.sample("spread", host.dist.HalfNormal(host.array(2.0)))
        length = host.sample("length", host.dist.LogNormal(host.array(0.0), 1.0))
        field(host, spread, length, x, y)

    return model


def learned(host):
    def model(x, y):
        spread = host.param("spread", host.array(1.0), constraint=host.constraints.positive)
        length = host.param("length", host.array(1.0), constraint=host.constraints.positive)
        field(host, spread, length, x, y)

    return model


def stock(name):
    return lambda host, model: getattr(host.autoguide, name)(model, init_scale=0.1)


def small(fit) -> set[str]:
    return {name.removesuffix("_unconstrained") for name in fit.optimizer_state.layout.small}


CASES = [
    pytest.param(
        sampled, "AutoMultivariateNormal", {"learning_rate": 0.5}, id="rate 1/2", marks=pytest.mark.slow_to_compile
    ),
    pytest.param(sampled, "AutoMultivariateNormal", {}, id="automatic", marks=pytest.mark.slow),
    pytest.param(sampled, "AutoNormal", {"learning_rate": 0.5}, id="mean field, rate 1/2", marks=pytest.mark.slow),
    pytest.param(learned, "AutoMultivariateNormal", {}, id="parameters", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make", "guide", "options"), CASES)
def test_the_same_steps_are_taken(backend, make, guide, options, monkeypatch):
    def fit():
        return backend.start(make, stock(guide), (positions(), counts()), **options).run(3)

    parts = fit()
    found = parts.params  # before Pyro's store has those of the next fit
    assert small(parts) == {"spread", "length"} and len(parts.optimizer_state.layout.wide) == SIZE
    monkeypatch.setattr(backend.module("optim._recognition"), "MANY", SIZE + 1)
    whole = fit()
    assert not small(whole)
    for name, value in whole.params.items():
        assert_allclose(found[name], value, rtol=1e-8, atol=1e-9, err_msg=name)


GAUSSIANS = [pytest.param(guide, marks=pytest.mark.slow) for guide in ("AutoNormal", "AutoMultivariateNormal")]


@pytest.mark.parametrize("guide", ["AutoDelta", *GAUSSIANS])
def test_the_small_latents_are_constants_of_the_loss_that_is_held(backend, guide):
    """Or the parts would have the same numbers, and cost as much as the whole."""
    make = (lambda host, model: host.autoguide.AutoDelta(model)) if guide == "AutoDelta" else stock(guide)
    fit = backend.start(sampled, make, (positions(), counts())).run(1)
    wide = np.isin(np.arange(SIZE + 2), fit.optimizer_state.layout.wide)
    held, whole = fit.gradients_held_and_not(np.random.default_rng(1).normal(size=SIZE + 2))
    assert_allclose(held, np.where(wide, whole, 0), rtol=1e-10, atol=1e-12)
    assert (whole != 0).all()


@pytest.mark.slow
def test_latents_of_the_same_size_are_not_split(backend):
    def make(host):
        def model(x, y):
            left = host.sample("left", host.dist.Normal(host.array(np.zeros(SIZE)), 1.0).to_event(1))
            right = host.sample("right", host.dist.Normal(host.array(np.zeros(SIZE)), 1.0).to_event(1))
            host.sample("y", host.dist.Normal(left + right * x, 1.0).to_event(1), obs=y)

        return model

    assert not small(backend.start(make, stock("AutoMultivariateNormal"), (positions(), counts())).run(1))
