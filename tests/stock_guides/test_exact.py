"""One step of `BLR` through the stock SVI lands on the closed form: guides, losses, seeds, and kinds of models.

The posteriors are least squares on all factors of the model (`reference.linear_gaussian`), which knows nothing of
guides, plates or steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from numpy.testing import assert_allclose

from .. import cases, reference

LOSSES = {
    "Trace_ELBO, 3 particles": {"num_particles": 3},
    "Trace_ELBO, 3 particles in turn": {"num_particles": 3, "vectorized": False},
    "TraceMeanField_ELBO": {"kind": "TraceMeanField_ELBO"},
}

guides = pytest.mark.parametrize("guide", cases.GUIDES, ids=str)


def fitted(fit) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the guide, all its Gaussian sites together."""
    locs, covariances = zip(*fit.gaussians().values(), strict=True)
    return np.concatenate(locs), scipy.linalg.block_diag(*covariances)


def check_optimum(fit, model, guide) -> None:
    """m is the posterior mean, and the covariance the inverse of the posterior precision's own blocks."""
    loc, covariance = fitted(fit)
    mean, exact = model.posterior
    scale = np.sqrt(np.diag(exact))
    # to eight digits in the posterior's own units, however the data are scaled
    assert_allclose((loc - mean) / scale, 0, atol=1e-8)
    expected = guide.covariance(model)
    assert_allclose(covariance / np.outer(scale, scale), expected / np.outer(scale, scale), rtol=1e-8, atol=1e-8)


@guides
def test_one_step_is_exact_for_every_guide(backend, guide):
    """A full-rank guide gets the posterior; any other its mean, and the best covariance of the guide's structure."""
    model = cases.linear()
    check_optimum(backend.start(model.make, guide.make, model.args, learning_rate=1.0).run(1), model, guide)


@pytest.mark.parametrize(
    ("make_model", "guide"),
    [
        *[(make_model, cases.MEAN_FIELD) for make_model in cases.GAUSSIAN_MODELS],  # site by site
        *[(make_model, cases.FULL_RANK) for make_model in (cases.plates, cases.positive)],  # all sites in one
    ],
    ids=lambda case: getattr(case, "__name__", str(case)),
)
def test_one_step_is_exact_for_every_kind_of_model(backend, make_model, guide):
    """Plates, nested plates, events of one and two axes, masks, scales, transformed sites, a subsampled plate."""
    model = make_model()
    check_optimum(backend.start(model.make, guide.make, model.args, learning_rate=1.0).run(1), model, guide)


@pytest.mark.slow
def test_one_step_is_exact_from_any_seed(backend):
    """The draws of a quadratic cancel, on Longley's columns of condition 10¹⁰ as well."""
    model = cases.longley()
    fit = backend.start(model.make, cases.FULL_RANK.make, model.args, learning_rate=1.0)
    for seed in range(3):
        check_optimum(fit.again(seed).run(1), model, cases.FULL_RANK)


@pytest.mark.parametrize("arguments", LOSSES.values(), ids=LOSSES)
def test_one_step_is_exact_with_every_other_loss(backend, arguments):
    model, loss = cases.linear(), backend.loss(**arguments)
    fit = backend.start(model.make, cases.FULL_RANK.make, model.args, learning_rate=1.0, loss=loss).run(1)
    check_optimum(fit, model, cases.FULL_RANK)


@pytest.mark.parametrize(
    ("make_model", "guide"),
    [(cases.linear, cases.FULL_RANK), pytest.param(cases.longley, cases.MEAN_FIELD, marks=pytest.mark.slow)],
    ids=lambda case: getattr(case, "__name__", str(case)),
)
def test_the_automatic_rate_takes_the_full_step_and_stays(backend, make_model, guide):
    """`BLR()` as it comes: the first proposal is the posterior, and nothing afterwards leaves it."""
    model = make_model()
    fit = backend.start(model.make, guide.make, model.args).run(1)
    check_optimum(fit, model, guide)
    check_optimum(fit.run(3), model, guide)


def test_hutchinson_s_diagonal_is_exact_where_the_posterior_is_diagonal(backend):
    design = np.linalg.qr(np.column_stack([np.ones(8), np.random.default_rng(9).normal(size=(8, 3))]))[0]
    model = cases.regression("orthogonal", 3 * design[:, 1:], np.arange(8.0), np.array([1.0, 2.0, 3.0]), 10.0, 0.5)
    for options in ({}, {"learning_rate": 1.0}):
        fit = backend.start(model.make, cases.MEAN_FIELD.make, model.args, estimator="hutchinson", **options).run(1)
        check_optimum(fit, model, cases.MEAN_FIELD)


def test_temperature_widens_the_posterior_by_itself(backend):
    """E_q[ℓ] − τ H(q): the same mean, τ times the covariance."""
    model = cases.linear()
    fit = backend.start(model.make, cases.FULL_RANK.make, model.args, temperature=3.0).run(1)
    loc, covariance = fitted(fit)
    assert_allclose(loc, model.posterior[0], rtol=1e-10)
    assert_allclose(covariance, 3 * model.posterior[1], rtol=1e-10, atol=1e-14)


def test_a_schedule_is_a_function_of_the_step(backend):
    """S after rates ρ₀, ρ₁ is (1 − ρ₁)((1 − ρ₀) S₀ + ρ₀ H) + ρ₁ H, with S₀ of the stock guides' scale, 0.1."""
    model = cases.linear()
    schedule = backend.schedule(lambda count: 0.5 / (1 + count))
    fit = backend.start(model.make, cases.FULL_RANK.make, model.args, learning_rate=schedule).run(2)
    hessian = np.linalg.inv(model.posterior[1])
    expected = 0.75 * (0.5 * np.eye(4) / 0.1**2 + 0.5 * hessian) + 0.25 * hessian
    assert_allclose(np.linalg.inv(fitted(fit)[1]), expected, rtol=1e-9)


@pytest.mark.parametrize("guide", [cases.MEAN_FIELD, cases.FULL_RANK], ids=str)
def test_the_stock_gradient_estimates_the_hessian(backend, guide, random):
    """One step with many particles: (S_new − (1 − ρ) S)/ρ is H within the standard error of as many single draws."""
    model, num_particles, rate = cases.linear(), 2000, 0.01
    mean, hessian = model.posterior[0], np.linalg.inv(model.posterior[1])
    near = mean + np.array([0.02, -0.01, 0.01, 0.02])  # the estimator's noise is in proportion to the gradient
    make_guide = cases.started(guide.name, {"coefficients": near[:3], "intercept": near[3]})
    options = {"estimator": "gradient", "learning_rate": rate, "loss": backend.loss(num_particles=num_particles)}
    fit = backend.start(model.make, make_guide, model.args, **options)
    loc, covariance = fitted(fit)
    before = np.linalg.inv(covariance)
    loc_after, covariance_after = fitted(fit.run(1))
    estimated = (np.linalg.inv(covariance_after) - (1 - rate) * before) / rate

    problem, parts = cases.Quadratic(hessian, mean), guide.parts(model)
    factor = reference.factor_of(before, parts, np.nan)
    singles = [reference.first_order(problem, loc, factor, parts, eps) for eps in random.normal(size=(500, 4))]
    within = np.zeros((4, 4))
    for group in guide.groups(list(model.sites.values())):
        within[np.ix_(group, group)] = 1
    error = np.std([single.hessian for single in singles], axis=0) / num_particles**0.5
    assert (np.abs(estimated - hessian * within) <= 5 * error + 1e-9).all()
    assert (5 * error < np.abs(hessian).max() / 2).all(), "too noisy to tell H from zero"
    moved = -rate * covariance_after @ problem.gradient(loc)
    error = rate * np.std([covariance_after @ single.gradient for single in singles], axis=0) / num_particles**0.5
    assert (np.abs(loc_after - loc - moved) <= 5 * error).all()
