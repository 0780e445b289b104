"""Estimators of E_q[g] and E_q[H]: exact where they promise to be, unbiased elsewhere, equal to their definitions."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from .. import cases, reference

LOC = np.array([0.3, -0.6, 0.4, 0.1])
PRECISION = 3 * cases.positive_definite(31)
COUPLED = np.array([[3.0, 0.0, 0.7, -0.4], [0.0, 2.0, -1.1, 0.3], [0.7, -1.1, 4.0, 0.9], [-0.4, 0.3, 0.9, 1.0]])

layouts = pytest.mark.parametrize("parts", cases.LAYOUTS.values(), ids=cases.LAYOUTS)
learned_layouts = pytest.mark.parametrize(
    "parts",
    [pytest.param(parts, id=name) for name, parts in cases.LAYOUTS.items() if name not in ("fixed", "point")],
)


def estimate(backend, name, problem, parts, noise, probes=None, *, weight=None, **options):
    """One estimate by the package, at N(LOC, PRECISION⁻¹)."""
    weight = None if weight is None else backend.array(weight)
    objective = backend.objective(problem, parts, backend.array(noise), weight)
    draws = backend.draws(len(noise), None if probes is None else backend.array(probes))
    at = backend.array(LOC), backend.scales(PRECISION, parts), None, draws, backend.blocks(parts)
    return backend.compiled(partial(getattr(backend.gradients, name), objective, *at, **options))()


def first_order(backend, problem, parts, eps, *, weight=None):
    """One estimate by the stock gradient at the draw `eps`."""
    weight = None if weight is None else backend.array(weight)
    objective = backend.objective(problem, parts, backend.array(eps)[None], weight)
    at = backend.array(LOC), backend.scales(PRECISION, parts), None, None, backend.blocks(parts)
    return backend.compiled(partial(backend.first_order(dense=True), objective, *at))()


def rademacher(random, *shape):
    return random.choice([-1.0, 1.0], size=shape)


# ---------------------------------------------------------------------------------------------------------------------
# Exact on quadratics


@layouts
def test_hessian_is_exact_on_a_quadratic_at_any_draw(backend, parts, random):
    problem = cases.quadratic()
    result = estimate(backend, "hessian", problem, parts, 5 * random.normal(size=(1, 4)))
    assert_allclose(backend.to_numpy(result.hessian), problem.matrix, rtol=1e-12, atol=1e-13)
    assert_allclose(backend.to_numpy(result.gradient), problem.gradient(LOC), rtol=1e-12)


def test_hutchinson_is_exact_on_a_diagonal_quadratic_for_any_probe(backend, random):
    problem, parts = cases.separable(), cases.LAYOUTS["diagonal"]
    noise, probes = random.normal(size=(1, 4)), rademacher(random, 2, 1, 4)
    result = estimate(backend, "hutchinson", problem, parts, noise, probes)
    assert_allclose(backend.to_numpy(result.hessian), np.diagonal(problem.matrix), rtol=1e-12)
    assert_allclose(backend.to_numpy(result.gradient), problem.gradient(LOC), rtol=1e-12)


def test_a_probe_a_site_is_exact_where_a_site_is_diagonal_however_it_is_coupled_to_others(backend, random):
    """Rows of a plate given what they share. One probe for all takes the coupling for noise."""
    parts = [cases.Part(0, (2,), "diagonal"), cases.Part(2, (1,), "diagonal"), cases.Part(3, (1,), "diagonal")]
    problem = cases.Quadratic(COUPLED, np.zeros(4))
    noise, signs = random.normal(size=(1, 4)), rademacher(random, 2, 4)
    probes = backend.to_numpy(backend.gradients.parted(backend.array(signs), backend.blocks(parts)))
    assert_array_equal(probes.sum(1), signs)
    assert [sorted(map(len, map(np.flatnonzero, of_draw))) for of_draw in probes] == [[1, 1, 2]] * 2
    result = estimate(backend, "hutchinson", problem, parts, noise, probes)
    assert_allclose(backend.to_numpy(result.hessian), np.diagonal(COUPLED), rtol=1e-12)
    assert int(result.evaluations) == 2 * (1 + 2 * 3), "a gradient, and a product for each part, of two draws"
    single = estimate(backend, "hutchinson", problem, parts, noise, signs[:, None])
    assert np.abs(backend.to_numpy(single.hessian) - np.diagonal(COUPLED)).max() > 0.1


def test_of_many_sites_the_small_ones_share_a_probe(backend, random):
    sizes = [1, 5, 2, 1, 7, 6, 1]
    starts = np.cumsum([0, *sizes[:-1]])
    parts = [cases.Part(int(start), (size,), "diagonal") for start, size in zip(starts, sizes, strict=True)]
    signs = rademacher(random, 2, 23)
    probes = backend.to_numpy(backend.gradients.parted(backend.array(signs), backend.blocks(parts)))
    assert_array_equal(probes.sum(1), signs)
    assert_array_equal(np.abs(probes).sum(-1), [[7, 6, 5, 5]] * 2)


@pytest.mark.parametrize("name", ["hessian", "hutchinson"])
def test_antithetic_pairs_cancel_the_noise_of_a_quadratic(backend, name, random):
    """Each pair by itself has the gradient at the mean: there is no Monte Carlo error to be seen between pairs."""
    problem, parts, noise = cases.quadratic(), cases.LAYOUTS["diagonal"], 10 * random.normal(size=(3, 4))
    result = estimate(backend, name, problem, parts, noise, rademacher(random, 6, 1, 4))
    # the noise is ten standard deviations, so the rounding is of gradients ten times as large
    assert_allclose(backend.to_numpy(result.pair_gradients), [problem.gradient(LOC)] * 3, rtol=1e-11)
    assert np.ptp(backend.to_numpy(result.losses)) > 1, "the single draws do differ"


@pytest.mark.parametrize("wide", [[1, 2, 3], [0, 2]])
def test_a_hessian_in_two_parts_is_the_whole_one(backend, wide, random):
    """Of which the wide columns are those of a loss in which the other coordinates are constants."""
    problem, parts, noise = cases.student(), cases.LAYOUTS["mixed"], random.normal(size=(2, 4))
    whole = backend.objective(problem, parts, backend.array(noise))
    is_wide = backend.array(np.isin(np.arange(4), wide).astype(float))

    def held(loc, *rest):
        return whole(is_wide * loc + (1 - is_wide) * backend.array(LOC), *rest)

    split = backend.gradients.Split(held, np.array(wide) if backend.package == "numpyro_blr" else tuple(wide))
    found, expected = (
        estimate(backend, "hessian", problem, parts, noise, **options) for options in ({"split": split}, {})
    )
    assert_allclose(backend.to_numpy(found.hessian), backend.to_numpy(expected.hessian), rtol=1e-11, atol=1e-12)
    assert_allclose(backend.to_numpy(found.gradient), backend.to_numpy(expected.gradient), rtol=1e-12)


class Underflow:
    """ℓ = 400 + 100 z₀ + |z|²/2 by way of p = exp(−400 − 100 z₀), of which p² is 0: log p has a gradient alone."""

    def loss(self, backend, z):
        return -backend.xp.log(backend.xp.exp(-400 - 100 * z[0])) + z @ z / 2


@pytest.mark.parametrize(("name", "cost"), [("hessian", 1 + 3 * 4), ("hutchinson", 1 + 2 * 2)])
def test_curvature_that_is_not_finite_where_the_gradient_is_comes_from_differences(backend, name, cost, random):
    parts, probes = cases.LAYOUTS["diagonal"], rademacher(random, 2, 1, 4)
    result = estimate(backend, name, Underflow(), parts, random.normal(size=(1, 4)), probes)
    identity = np.eye(4) if name == "hessian" else np.ones(4)
    assert_allclose(backend.to_numpy(result.hessian), identity, atol=1e-10)
    assert_allclose(backend.to_numpy(result.gradient), LOC + np.array([100.0, 0, 0, 0]), rtol=1e-12)
    assert int(result.evaluations) == 2 * cost


@pytest.mark.parametrize("name", ["hessian", "hutchinson"])
def test_a_linear_loss_has_no_curvature(backend, name, random):
    class Linear:
        def loss(self, backend, z):
            return (backend.array([1.0, -2.0, 0.0, 3.0]) * z).sum()

    noise, probes = random.normal(size=(2, 4)), rademacher(random, 4, 1, 4)
    result = estimate(backend, name, Linear(), cases.LAYOUTS["diagonal"], noise, probes)
    assert_array_equal(backend.to_numpy(result.hessian), 0)
    assert_array_equal(backend.to_numpy(result.gradient), [1.0, -2.0, 0.0, 3.0])


# ---------------------------------------------------------------------------------------------------------------------
# Equal to their definitions on given noise


@layouts
def test_hessian_and_hutchinson_are_the_averages_they_say(backend, parts, random):
    problem, noise, probes = cases.student(), random.normal(size=(3, 4)), rademacher(random, 6, 1, 4)
    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    for name, given in (("hessian", None), ("hutchinson", probes)):
        result = estimate(backend, name, problem, parts, noise, probes)
        expected = reference.second_order(problem, LOC, factor, parts, noise, given)
        assert_allclose(backend.to_numpy(result.hessian), expected.hessian, rtol=1e-11, atol=1e-12)
        assert_allclose(backend.to_numpy(result.gradient), expected.gradient, rtol=1e-11, atol=1e-12)
        assert_allclose(backend.to_numpy(result.pair_gradients), expected.pair_gradients, rtol=1e-11, atol=1e-12)
        assert_allclose(backend.to_numpy(result.losses), expected.losses, rtol=1e-12)
        assert_allclose(float(result.loss), expected.losses.mean(), rtol=1e-12)


@learned_layouts
def test_reparameterized_is_price_s_theorem_at_first_order(backend, parts, random):
    problem, eps = cases.student(), random.normal(size=4)
    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    result = first_order(backend, problem, parts, eps)
    expected = reference.first_order(problem, LOC, factor, parts, eps)
    assert_allclose(backend.to_numpy(result.hessian), expected.hessian, rtol=1e-10, atol=1e-11)
    assert_allclose(backend.to_numpy(result.gradient), expected.gradient, rtol=1e-11)
    assert_allclose(float(result.loss), expected.losses.item(), rtol=1e-12)


@learned_layouts
def test_reparameterized_takes_the_entropy_out_whatever_its_weight(backend, parts, random):
    """H is that of ℓ: the weight with which log |C| enters the loss must leave no trace in it."""
    problem, eps = cases.student(), random.normal(size=4)
    plain = first_order(backend, problem, parts, eps)
    weighted = first_order(backend, problem, parts, eps, weight=np.array([1.0, 5.0, 0.5, 2.0]))
    assert_allclose(backend.to_numpy(weighted.hessian), backend.to_numpy(plain.hessian), rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# Unbiased on a Poisson regression, whose E_q[g] and E_q[H] are known in closed form

NUM_ESTIMATES = 700


def flat(backend, result):
    """Gradient and Hessian in one vector."""
    return backend.xp.concatenate([result.gradient, result.hessian.reshape(-1)])


def check_unbiased(estimates: np.ndarray, truth: np.ndarray, at_the_mean: np.ndarray) -> None:
    standard_error = estimates.std(axis=0, ddof=1) / len(estimates) ** 0.5
    assert (np.abs(estimates.mean(axis=0) - truth) <= 5 * standard_error + 1e-12).all()
    assert (np.abs(at_the_mean - truth) > 5 * standard_error).any(), "too noisy to tell E_q[H] from H at the mean"


@pytest.mark.parametrize(("name", "curvature_of"), [("hessian", np.ravel), ("hutchinson", np.diagonal)])
def test_second_order_estimators_are_unbiased(backend, name, curvature_of, random):
    problem, parts = cases.poisson(), cases.LAYOUTS["mixed"]
    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    gradient, hessian = problem.expected_derivatives(LOC, factor @ factor.T)
    truth = np.concatenate([gradient, curvature_of(hessian)])
    at_the_mean = np.concatenate([problem.gradient(LOC), curvature_of(problem.hessian(LOC))])

    scales, loc, blocks = backend.scales(PRECISION, parts), backend.array(LOC), backend.blocks(parts)

    def one(eps, probes):
        objective = backend.objective(problem, parts, eps[None])
        return flat(
            backend, getattr(backend.gradients, name)(objective, loc, scales, None, backend.draws(1, probes), blocks)
        )

    noise, probes = random.normal(size=(NUM_ESTIMATES, 4)), rademacher(random, NUM_ESTIMATES, 2, 1, 4)
    check_unbiased(backend.map(one, noise, probes), truth, at_the_mean)


@pytest.mark.parametrize("name", ["diagonal", "dense"])
def test_the_first_order_estimator_is_unbiased(backend, name, random):
    problem, parts = cases.poisson(), cases.LAYOUTS[name]
    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    gradient, hessian = problem.expected_derivatives(LOC, factor @ factor.T)
    of_the_structure = np.zeros((4, 4))
    for group in parts[0].groups:
        of_the_structure[np.ix_(group, group)] = 1
    truth = np.concatenate([gradient, np.ravel(hessian * of_the_structure)])
    estimator = backend.first_order(dense=True)
    scales, blocks = backend.scales(PRECISION, parts), backend.blocks(parts)

    def one(eps):
        objective = backend.objective(problem, parts, eps[None])
        return flat(backend, estimator(objective, backend.array(LOC), scales, None, None, blocks))

    # |g|/σ of noise that second order does not have: four times the draws tell the gradients apart, and H from zero
    estimates = backend.map(one, random.normal(size=(4 * NUM_ESTIMATES, 4)))
    check_unbiased(estimates, truth, np.concatenate([problem.gradient(LOC), np.zeros(16)]))
