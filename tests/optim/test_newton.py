"""The mean by conjugate gradients beside a diagonal S: the direction, the products, and a walk no diagonal follows.

The steps that it is a part of are compared with the reference in `test_step.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from .. import cases, reference

SIZE, LENGTH = 12, 60


def solved(backend, matrix, gradient, diagonal):
    """(d, whether there is one, the number of products) of a given E_q[H]."""
    held = backend.array(matrix)
    precision = backend.families.DiagonalPrecision(backend.array(diagonal))
    newton = backend.module("optim._newton")
    found, sound, number = newton.direction(lambda vector: held @ vector, backend.array(gradient), precision)
    return backend.to_numpy(found), bool(sound), int(number)


def test_it_solves_the_damped_system_to_a_tenth(backend, random):
    """Over eight orders of magnitude of curvature, which are units to the diagonal."""
    units = np.logspace(-2, 2, SIZE)
    root = random.normal(size=(SIZE, SIZE)) * units[:, None]
    matrix, gradient = root @ root.T, random.normal(size=SIZE) * units
    diagonal = matrix.diagonal().copy()
    found, sound, number = solved(backend, matrix, gradient, diagonal)
    assert sound
    assert 1 < number < SIZE
    assert_allclose(found, reference.newton_direction(matrix, gradient, diagonal), rtol=1e-9)
    residual = gradient - (0.9 * matrix + 0.1 * np.diag(diagonal)) @ found
    assert residual @ (residual / diagonal) <= 0.01 * gradient @ (gradient / diagonal)


def test_where_the_diagonal_is_all_one_product_does(backend, random):
    diagonal, gradient = random.uniform(0.1, 10, SIZE), random.normal(size=SIZE)
    found, sound, number = solved(backend, np.diag(diagonal), gradient, diagonal)
    assert_allclose(found, gradient / diagonal, rtol=1e-12)
    assert sound
    assert number == 1


def test_thirty_products_are_the_most(backend, random):
    values = np.logspace(-6, 0, 200)
    basis, _ = np.linalg.qr(random.normal(size=(200, 200)))
    _, sound, number = solved(backend, basis * values @ basis.T, random.normal(size=200), np.full(200, 1e-6))
    assert sound
    assert number == 30


@pytest.mark.parametrize("value", [-1.0, np.nan], ids=["negative curvature", "not finite"])
def test_a_quadratic_without_a_minimum_has_no_direction(backend, value, random):
    matrix = np.diag(np.append(np.ones(SIZE - 1), value))
    assert not solved(backend, matrix, random.normal(size=SIZE) + 5 * (np.arange(SIZE) == SIZE - 1), np.ones(SIZE))[1]


def test_no_gradient_takes_no_product(backend):
    found, sound, number = solved(backend, np.eye(3), np.zeros(3), np.ones(3))
    assert_allclose(found, 0)
    assert sound
    assert number == 0


def test_a_product_is_that_of_the_expected_hessian(backend, random):
    problem, parts, noise = cases.student(), cases.LAYOUTS["diagonal"], random.normal(size=(3, 4))
    loc, precision, vector = random.normal(size=4), cases.positive_definite(31), random.normal(size=4)
    objective, draws = backend.objective(problem, parts, backend.array(noise)), backend.draws(3, None)
    product = backend.gradients.product(
        objective, backend.array(loc), backend.scales(np.diagonal(precision), parts), None, draws
    )
    factor = reference.factor_of(np.diagonal(precision), parts, cases.FIXED_SCALE)
    hessian = reference.second_order(problem, loc, factor, parts, noise).hessian
    for times in (1, 2):  # linear, and again from the same graphs
        image = backend.to_numpy(product(backend.array(times * vector)))
        assert_allclose(image, times * hessian @ vector, rtol=1e-11)


def walk(host):
    """z ~ N(0, 1), y ~ N(cumsum z, 1/10): each z moves all that comes after it."""

    def model(y):
        z = host.sample("z", host.dist.Normal(host.array(np.zeros(LENGTH)), 1.0).to_event(1))
        host.sample("y", host.dist.Normal(host.xp.cumsum(z, 0), 0.1).to_event(1), obs=y)

    return model


def walked(random):
    """(y, its Hessian, the posterior mean)."""
    sums = np.tril(np.ones((LENGTH, LENGTH)))
    y = sums @ random.normal(size=LENGTH)
    hessian = np.eye(LENGTH) + sums.T @ sums / 0.1**2
    return y, hessian, np.linalg.solve(hessian, sums.T @ y / 0.1**2)


def test_a_walk_is_followed(backend, random):
    """Nats that the mean and the scales cost, against the optimum in closed form."""
    y, hessian, best = walked(random)
    fit = backend.start(walk, cases.MEAN_FIELD.make, (y,), estimator="hutchinson").run(100)
    ((loc, covariance),) = fit.gaussians().values()
    off, ratio = loc - best, covariance.diagonal() * hessian.diagonal()
    assert off @ hessian @ off / 2 < 0.1
    assert (ratio - 1 - np.log(ratio)).sum() / 2 < 2


def test_at_a_given_rate_s_moves_the_mean(backend, random):
    """The rule as it is written, and a step that costs what it did."""
    y, _, _ = walked(random)
    fit = backend.start(walk, cases.MEAN_FIELD.make, (y,), estimator="hutchinson", learning_rate=0.5).run(3)
    assert float(fit.optimizer_state.gradient_evaluations) == 3 * 8 * (1 + 2)
    assert fit.gaussian_state().num_averaged is None
