"""Curvature from secants of the gradient: exact on quadratics, unbiased where a Hessian is not, alike in both hosts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import chi, norm

from .. import cases, reference

LOC = np.array([0.3, -0.6, 0.4, 0.1])
PRECISION = 3 * cases.positive_definite(31)
NUM_ESTIMATES = 300
layouts = pytest.mark.parametrize("parts", cases.LAYOUTS.values(), ids=cases.LAYOUTS)


class Absolute:
    """ℓ = Σ_i |x_i · z − y_i|, with E_q[∇²ℓ] = Σ_i 2 N(y_i | x_i · m, x_iᵀ Σ x_i) x_i x_iᵀ that no Hessian has."""

    def __init__(self, x, y):
        self.x, self.y = np.asarray(x, float), np.asarray(y, float)

    def loss(self, backend, z):
        return backend.xp.abs(backend.array(self.x) @ z - backend.array(self.y)).sum()

    def expected_hessian(self, loc, factor):
        density = norm.pdf(self.y, self.x @ loc, np.linalg.norm(self.x @ factor, axis=1))
        return (2 * density * self.x.T) @ self.x


PRIOR = Absolute(np.eye(4), [0.5, -0.4, 0.2, 0.1])  # a kink for every coordinate
LIKELIHOOD = Absolute(np.random.default_rng(7).normal(size=(30, 4)), np.random.default_rng(8).normal(size=30))


def estimate(backend, problem, parts, noise, beside, along, probes=None, *, known=False):
    """One estimate by the package, at N(LOC, PRECISION⁻¹), from pairs ± `noise` [K, D], which it may know."""
    number = len(noise)
    gradients, objective = backend.gradients, backend.objective(problem, parts, noise)
    pairs = gradients.Draws.at(backend.xp.concatenate([noise, -noise])) if known else backend.draws(number, probes)
    draws = pairs._replace(chords=gradients.Chords(beside, along).mirrored())
    loc, scales, blocks = backend.array(LOC), backend.scales(PRECISION, parts), backend.blocks(parts)
    if not known:
        return backend.compiled(partial(gradients.secant, objective, loc, scales, None, draws, blocks))()
    curvatures_at = partial(gradients.curvatures_at, objective, loc, scales, draws, blocks, secants=True)
    hessians, losses, slopes, cost = backend.compiled(curvatures_at)()
    pair_gradients = (slopes[:number] + slopes[number:]) / 2
    return gradients.Estimate(
        losses.mean(), losses, slopes.mean(0), pair_gradients, hessians.mean(0), None, None, cost * 2 * number
    )


def randomness(random, *shape, num_directions=4):
    """ε, η and x of pairs."""
    return (*random.normal(size=(2, *shape, 4)), chi(3).rvs(size=(*shape, num_directions), random_state=random))


@layouts
@pytest.mark.parametrize("known", [False, True], ids=["noise of the host's", "noise of the rule's"])
def test_one_pair_is_exact_on_a_quadratic(backend, parts, known, random):
    problem, given = cases.quadratic(), map(backend.array, randomness(random, 1))
    result = estimate(backend, problem, parts, *given, known=known)
    assert_allclose(backend.to_numpy(result.hessian), problem.matrix, rtol=1e-9, atol=1e-10)
    assert_allclose(backend.to_numpy(result.gradient), problem.gradient(LOC), rtol=1e-11)
    assert int(result.evaluations) == 2 * (1 + 2 * 4), "a gradient, and two for each direction, of two draws"


def test_the_diagonal_is_exact_on_a_diagonal_quadratic_for_any_probe(backend, random):
    problem, parts = cases.separable(), cases.LAYOUTS["diagonal"]
    given, probes = randomness(random, 1, num_directions=1), random.choice([-1.0, 1.0], size=(2, 1, 4))
    result = estimate(backend, problem, parts, *map(backend.array, (*given, probes)))
    assert_allclose(backend.to_numpy(result.hessian), np.diagonal(problem.matrix), rtol=1e-10)
    assert int(result.evaluations) == 2 * (1 + 2)


SHARE, POINT = 0.25, 0.003


def definition(problem, parts, noise, beside, along, directions, known):
    """Σ over the draws of (g(z₊) − g(z₋)) / (2 x) along every direction, [P, D], and R of z± = z + R u (±x − uᵀη)."""
    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    learned = np.concatenate([np.full(part.size, part.structure in ("diagonal", "dense")) for part in parts])
    reach = np.where(learned, np.sqrt(SHARE) * factor, POINT * np.eye(4))
    narrowed = np.where(learned[:, None], np.sqrt(1 - SHARE), 1) * factor
    total, num_draws = 0.0, 2 * len(noise)
    for sign in (1, -1):
        for eps, eta, lengths in zip(sign * noise, sign * beside, along, strict=True):
            if known:  # z is the draw itself
                eta = np.sqrt(SHARE) * eps + np.sqrt(1 - SHARE) * eta
                start = factor @ eps - reach @ eta
            else:
                start = narrowed @ eps
            for number, (u, x) in enumerate(zip(directions, lengths, strict=True)):
                centre = LOC + start + reach @ np.where(learned, eta - u * (u @ eta), 0)
                rise = problem.gradient(centre + x * reach @ u) - problem.gradient(centre - x * reach @ u)
                total = total + np.outer(np.arange(len(directions)) == number, rise / (2 * x)) / num_draws
    return total, reach


@pytest.mark.parametrize(
    ("parts", "known"),
    [pytest.param(parts, False, id=name) for name, parts in cases.LAYOUTS.items()]
    # where the rule makes the noise, every site has a scale of its own
    + [pytest.param(cases.LAYOUTS[name], True, id=f"{name}, noise of the rule's") for name in ("diagonal", "mixed")],
)
def test_it_is_the_average_that_it_says(backend, parts, known, random):
    problem, given = cases.student(), randomness(random, 3)
    result = estimate(backend, problem, parts, *map(backend.array, given), known=known)
    products, reach = definition(problem, parts, *given, np.eye(4), known)
    expected = np.linalg.solve(reach.T, products)
    assert_allclose(backend.to_numpy(result.hessian), (expected + expected.T) / 2, rtol=1e-9, atol=1e-10)
    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    plain = reference.second_order(problem, LOC, factor, parts, given[0])
    assert_allclose(backend.to_numpy(result.gradient), plain.gradient, rtol=1e-10, atol=1e-11)
    assert_allclose(backend.to_numpy(result.pair_gradients), plain.pair_gradients, rtol=1e-10, atol=1e-11)
    assert_allclose(backend.to_numpy(result.losses), plain.losses, rtol=1e-11)


def test_the_diagonal_is_the_average_that_it_says(backend, random):
    problem, parts = cases.student(), cases.LAYOUTS["diagonal, several"]
    given, signs = randomness(random, 1, num_directions=2), random.choice([-1.0, 1.0], size=4)
    probes = np.array([[1, 1, 0, 0], [0, 0, 1, 1]]) * signs
    pair = np.stack([probes, probes])
    result = estimate(backend, problem, parts, *map(backend.array, (*given, pair)))
    products, reach = definition(problem, parts, *given, probes / np.sqrt(2), known=False)
    expected = (np.sqrt(2) * probes * products).sum(0) / np.diagonal(reach)
    assert_allclose(backend.to_numpy(result.hessian), expected, rtol=1e-9)


def check_unbiased(estimates, expected):
    error = estimates.std(axis=0, ddof=1) / len(estimates) ** 0.5
    assert (np.abs(estimates.mean(axis=0) - expected) <= 5 * error + 1e-12).all()
    assert (error < 0.1 * np.linalg.norm(expected)).all(), "too noisy to tell anything"


@pytest.mark.parametrize("known", [False, True], ids=["noise of the host's", "noise of the rule's"])
@pytest.mark.parametrize("name", ["diagonal", "dense"])
@pytest.mark.parametrize("problem", [PRIOR, LIKELIHOOD], ids=["prior", "likelihood"])
def test_the_curvature_of_kinks_is_that_of_the_closed_form(backend, problem, name, known, random):
    parts = cases.LAYOUTS[name]

    def one(*given):
        return estimate(backend, problem, parts, *given, known=known).hessian.reshape(-1)

    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    estimates = backend.map(one, *randomness(random, NUM_ESTIMATES, 1))
    check_unbiased(estimates, problem.expected_hessian(LOC, factor).ravel())


def test_the_diagonal_of_kinks_is_that_of_the_closed_form(backend, random):
    parts = cases.LAYOUTS["diagonal"]

    def one(*given):
        return estimate(backend, LIKELIHOOD, parts, *given).hessian

    probes = random.choice([-1.0, 1.0], size=(NUM_ESTIMATES, 2, 1, 4))
    estimates = backend.map(one, *randomness(random, NUM_ESTIMATES, 1, num_directions=1), probes)
    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    check_unbiased(estimates, np.diagonal(LIKELIHOOD.expected_hessian(LOC, factor)))


@pytest.mark.parametrize("name", ["mixed", "batched dense"])
def test_where_all_is_smooth_it_is_price_s_theorem(backend, name, random):
    """On a Poisson regression, whose E_q[H] is known in closed form and far from H at the mean."""
    problem, parts = cases.poisson(), cases.LAYOUTS[name]

    def one(*given):
        return estimate(backend, problem, parts, *given).hessian.reshape(-1)

    factor = reference.factor_of(PRECISION, parts, cases.FIXED_SCALE)
    _, expected = problem.expected_derivatives(LOC, factor @ factor.T)
    estimates = backend.map(one, *randomness(random, NUM_ESTIMATES, 1))
    check_unbiased(estimates, expected.ravel())
    error = estimates.std(axis=0, ddof=1) / NUM_ESTIMATES**0.5
    assert (np.abs(problem.hessian(LOC).ravel() - expected.ravel()) > 5 * error).any()


def test_the_lengths_are_those_of_three_normals(backend):
    """χ₃: mean 2 √(2/π), mean square 3; and mirrored pairs go as far."""
    module, number = backend.module("gradients.secant"), 4000
    chords = module.chords(backend.source_of_noise(3), number, 2, backend.array(np.zeros(5)))
    beside, along = map(backend.to_numpy, chords)
    assert beside.shape == (number, 5) and along.shape == (number, 2)
    assert_allclose(along.mean(0), 2 * np.sqrt(2 / np.pi), atol=5 * 0.68 / number**0.5)
    assert_allclose((along**2).mean(0), 3, atol=5 * 6**0.5 / number**0.5)
    assert abs(np.corrcoef(along.T)[0, 1]) < 5 / number**0.5
    mirrored = list(map(backend.to_numpy, chords.mirrored()))
    assert_allclose(mirrored[0], np.concatenate([beside, -beside]))
    assert_allclose(mirrored[1], np.concatenate([along, along]))


def test_both_packages_find_the_same(both, random):
    given = randomness(random, 3)
    for parts in (cases.LAYOUTS["mixed"], cases.LAYOUTS["fixed"]):
        one, other = (estimate(backend, LIKELIHOOD, parts, *map(backend.array, given)) for backend in both)
        for name in ("hessian", "gradient", "losses"):
            first, second = (
                backend.to_numpy(getattr(result, name)) for backend, result in zip(both, (one, other), strict=True)
            )
            assert_allclose(first, second, rtol=1e-9, atol=1e-9)
