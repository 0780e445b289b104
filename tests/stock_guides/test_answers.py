"""What users read off a fitted guide agrees with the Gaussian in its parameters, and with the posterior."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from .. import cases

NUM_DRAWS = 400


@pytest.fixture(params=[cases.MEAN_FIELD, cases.FULL_RANK], ids=str)
def answers(backend, request):
    """(fit, mean, standard deviations) of the regression at its exact optimum."""
    model, guide = cases.linear(), request.param
    fit = backend.start(model.make, guide.make, model.args, learning_rate=1.0).run(1)
    return fit, model.posterior[0], np.sqrt(np.diag(guide.covariance(model)))


def by_site(values: dict[str, np.ndarray]) -> np.ndarray:
    """(coefficients, intercept) along the last axis."""
    coefficients, intercept = values["coefficients"], values["intercept"]
    return np.concatenate([coefficients, intercept.reshape(*coefficients.shape[:-1], 1)], axis=-1)


def test_what_a_guide_tells_of_its_latents(answers, random):
    fit, mean, scale = answers
    assert_allclose(by_site(fit.median()), mean, rtol=1e-10)
    levels, deviations = [0.15865525393145707, 0.5, 0.9772498680518208], [-1.0, 0.0, 2.0]
    expected = mean + np.outer(deviations, scale)
    assert_allclose(by_site(fit.quantiles(levels)), expected, rtol=1e-6)  # NumPyro's quantiles are single precision

    draws = by_site(fit.draws(NUM_DRAWS))
    error = scale / NUM_DRAWS**0.5
    assert (np.abs(draws.mean(0) - mean) < 5 * error).all()
    assert_allclose(draws.std(0), scale, rtol=5 / (2 * NUM_DRAWS) ** 0.5)  # five standard errors of a deviation

    x, _, prior_scale = cases.linear().args
    predicted = fit.predictive(NUM_DRAWS, x, None, prior_scale)["y"]
    center = x @ mean[:3] + mean[3]
    assert predicted.shape == (NUM_DRAWS, len(x))
    assert (np.abs(predicted.mean(0) - center) < 5 * predicted.std(0) / NUM_DRAWS**0.5).all()
    assert (predicted.std(0) > 0.5 * (1 - 5 / (2 * NUM_DRAWS) ** 0.5)).all(), "at least the observation noise, 0.5"


@pytest.mark.parametrize("name", ["AutoDiagonalNormal", "AutoMultivariateNormal"])
def test_get_posterior(backend, name):
    model, (guide,) = cases.linear(), [guide for guide in cases.GUIDES if guide.name == name]
    fit = backend.start(model.make, guide.make, model.args, learning_rate=1.0).run(1)
    posterior = fit.posterior()
    assert_allclose(backend.to_numpy(posterior.mean), model.posterior[0], rtol=1e-10)
    assert_allclose(backend.to_numpy(posterior.variance), np.diag(guide.covariance(model)), rtol=1e-10)
