"""The referee is refereed: `reference.py` against quadrature and differences, without either package."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from . import cases, reference

LOC = np.array([0.3, -0.5, 0.2, 0.1])
COVARIANCE = 0.1 * np.linalg.inv(cases.positive_definite(11))


@pytest.mark.parametrize(
    "make_problem", [cases.quadratic, cases.poisson, cases.student], ids=lambda make: make.__name__
)
def test_hand_written_derivatives_are_derivatives(make_problem, random):
    problem = make_problem()
    z, direction, h = random.normal(size=4), random.normal(size=4), 1e-5
    ahead, behind = z + h * direction, z - h * direction
    # central differences: h² = 1e-10 of truncation
    slope = (problem.value(ahead) - problem.value(behind)) / (2 * h)
    assert_allclose(problem.gradient(z) @ direction, slope, rtol=1e-7)
    curvature = (problem.gradient(ahead) - problem.gradient(behind)) / (2 * h)
    assert_allclose(problem.hessian(z) @ direction, curvature, rtol=1e-7, atol=1e-7)


def test_expected_derivatives_of_the_poisson_regression_are_those_of_quadrature():
    problem = cases.poisson()
    gradient, hessian = problem.expected_derivatives(LOC, COVARIANCE)
    # six Gauss-Hermite nodes an axis: exact to degree 11, and the integrand is the exponential of something small
    assert_allclose(gradient, reference.expectation(problem.gradient, LOC, COVARIANCE, num_nodes=6), rtol=1e-8)
    assert_allclose(hessian, reference.expectation(problem.hessian, LOC, COVARIANCE, num_nodes=6), rtol=1e-8)


def test_natural_gradient_is_the_gradient_in_expectation_parameters():
    """Bonnet and Price, against differences of E_q[ℓ] in μ = (m, Σ + m mᵀ)."""
    problem = cases.poisson()

    def expected_loss(first: np.ndarray, second: np.ndarray) -> float:
        return reference.expectation(problem.value, first, second - np.outer(first, first), num_nodes=6)

    first, second = reference.expectation_of(LOC, COVARIANCE)
    gradient, hessian = problem.expected_derivatives(LOC, COVARIANCE)
    linear, quadratic = reference.natural_gradient(LOC, gradient, hessian)
    h = 1e-5
    step = h * np.array([1.0, -0.5, 0.2, 0.7])
    slope = (expected_loss(first + step, second) - expected_loss(first - step, second)) / (2 * h)
    assert_allclose(linear @ step / h, slope, rtol=1e-6)
    step = h * cases.positive_definite(12) / 10
    slope = (expected_loss(first, second + step) - expected_loss(first, second - step)) / (2 * h)
    assert_allclose((quadratic * step).sum() / h, slope, rtol=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.7, 1.0])
def test_the_step_in_natural_parameters_is_the_step_in_moments(rate):
    problem = cases.poisson()
    gradient, hessian = problem.expected_derivatives(LOC, COVARIANCE)
    natural = reference.natural_of(LOC, COVARIANCE)
    natural = reference.natural_step(natural, reference.natural_gradient(LOC, gradient, hessian), rate)
    loc, precision = reference.moment_step(LOC, np.linalg.inv(COVARIANCE), gradient, hessian, rate)
    # S m and back loses the condition number of S, about 100
    assert_allclose(reference.moments_of_natural(natural)[0], loc, rtol=1e-12)
    assert_allclose(reference.moments_of_natural(natural)[1], np.linalg.inv(precision), rtol=1e-12)


def test_a_full_step_is_bayes_rule():
    """λ ← −∇_μ E_q[ℓ] with ℓ the negative log of a product of Gaussians is the posterior, from any q."""
    model = cases.linear()
    rows, targets, scales = map(np.array, zip(*model.factors, strict=True))
    whitened, aim = rows / scales[:, None], targets / scales
    problem = cases.Quadratic(whitened.T @ whitened, np.linalg.lstsq(whitened, aim, rcond=None)[0])
    gradient = problem.gradient(LOC)
    loc, precision = reference.moment_step(LOC, np.linalg.inv(COVARIANCE), gradient, problem.matrix, rate=1.0)
    assert_allclose(loc, model.posterior[0], rtol=1e-12)
    assert_allclose(np.linalg.inv(precision), model.posterior[1], rtol=1e-12)


def test_the_safe_step_keeps_a_quarter_or_half_of_what_it_forgets(random):
    precision = cases.positive_definite(13)
    for _ in range(50):
        hessian = 10 * random.normal(size=(4, 4))
        hessian += hessian.T
        rate = random.uniform(0.01, 1)
        safe = reference.safe_precision(precision, hessian, rate)
        smallest = np.linalg.eigvals(np.linalg.solve(precision, safe)).real.min()
        assert smallest > min(0.25, (1 - rate) / 2)
