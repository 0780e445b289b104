"""Draws used again: exact on polynomials, right on average, and aware of where they tell nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.cases import Part

DIMENSION = 3
PARTS = {
    "diagonal": (Part(0, (DIMENSION,), "diagonal"),),
    "dense": (Part(0, (DIMENSION,), "dense"),),
    "mixed": (Part(0, (1,), "diagonal"), Part(1, (2,), "dense")),
}
LINEAR = np.array([0.3, -1.0, 0.5])
SQUARE = np.array([[2.0, 0.5, 0.1], [0.5, 1.5, -0.3], [0.1, -0.3, 1.0]])
CUBE = np.random.default_rng(3).normal(scale=0.2, size=(DIMENSION,) * 3)
CUBE = sum(CUBE.transpose(order) for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))) / 6


def gradient_at(z: np.ndarray, cube: np.ndarray) -> np.ndarray:
    return LINEAR + z @ SQUARE + np.einsum("abc,...b,...c->...a", cube, z, z) / 2


def hessian_at(z: np.ndarray, cube: np.ndarray) -> np.ndarray:
    return SQUARE + np.einsum("abc,...c->...ab", cube, z)


def value_at(z: np.ndarray, cube: np.ndarray) -> np.ndarray:
    quadratic = np.einsum("...a,ab,...b->...", z, SQUARE, z) / 2
    return z @ LINEAR + quadratic + np.einsum("abc,...a,...b,...c->...", cube, z, z, z) / 6


def gaussian(random: np.random.Generator, parts: tuple, spread: float = 0.3) -> tuple[np.ndarray, tuple, np.ndarray]:
    """(m, the scales of the parts, C) near N(0, 1)."""
    loc, scales, factor = spread * random.normal(size=DIMENSION), [], np.zeros((DIMENSION, DIMENSION))
    for part in parts:
        size, here = part.size, slice(part.start, part.start + part.size)
        scale = np.exp(spread * random.normal(size=size) / 2)
        if part.structure == "dense":
            scale = np.diag(scale) + np.tril(spread * random.normal(size=(size, size)), -1)
            factor[here, here] = scale
        else:
            factor[here, here] = np.diag(scale)
        scales.append(scale)
    return loc, tuple(scales), factor


def pooled(backend, random, parts, cube, num_pairs, capacity=64, offset=0.0, forgotten=(), spread=0.3):
    """A pool of draws of as many Gaussians, but for those of these numbers, and (blocks, module)."""
    recycled, blocks = backend.module("gradients.recycled"), backend.blocks(parts)

    def append(pool, loc, scales, noise, values, gradients, hessians):
        return recycled.append(pool, blocks, loc, scales, noise, values, gradients, hessians)

    append, pool = backend.compiled(append), None
    for number in range(num_pairs):
        loc, scales, factor = gaussian(random, parts, spread)
        loc = loc + offset
        noise = random.normal(size=DIMENSION)
        if number in forgotten:
            continue
        noise = np.stack([noise, -noise])
        points = loc + noise @ factor.T
        given = backend.array(loc), tuple(map(backend.array, scales))
        if pool is None:
            pool = recycled.init(capacity, *given)
        arrays = (noise, value_at(points, cube), gradient_at(points, cube), hessian_at(points, cube))
        pool = append(pool, *given, *(backend.array(array[None]) for array in arrays))
    return pool, blocks, recycled


def estimate(backend, pool, blocks, recycled, loc, scales):
    found = recycled.moments(pool, blocks, backend.array(loc), tuple(map(backend.array, scales)))
    return SimpleNamespace(
        weights=backend.to_numpy(found.weights),
        effective=float(found.effective),
        gradient=backend.to_numpy(found.gradient),
        hessian=backend.to_numpy(found.hessian),
        moments=found,
    )


@pytest.mark.parametrize("name", PARTS)
def test_exact_on_a_quadratic_from_two_pairs_of_other_gaussians(backend, random, name):
    quadratic = np.zeros_like(CUBE)
    pool, blocks, recycled = pooled(backend, random, PARTS[name], quadratic, num_pairs=2)
    loc, scales, _ = gaussian(random, PARTS[name])
    found = estimate(backend, pool, blocks, recycled, loc, scales)
    assert_allclose(found.gradient, gradient_at(loc, quadratic), atol=1e-12)
    assert_allclose(found.hessian, SQUARE, atol=1e-12)


@pytest.mark.parametrize("name", PARTS)
def test_exact_on_a_cubic_once_the_draws_are_worth_more_than_twice_the_dimension(backend, random, name):
    """E_q[∇ℓ] = ∇ℓ(m) + T : Σ / 2 and E_q[∇²ℓ] = ∇²ℓ(m) for third derivatives T."""
    pool, blocks, recycled = pooled(backend, random, PARTS[name], CUBE, num_pairs=20)
    loc, scales, factor = gaussian(random, PARTS[name], spread=0.1)
    found = estimate(backend, pool, blocks, recycled, loc, scales)
    assert found.effective > 2 * DIMENSION
    expected = gradient_at(loc, CUBE) + np.einsum("abc,bc->a", CUBE, factor @ factor.T) / 2
    assert_allclose(found.gradient, expected, atol=1e-11)
    assert_allclose(found.hessian, hessian_at(loc, CUBE), atol=1e-11)


def test_the_weights_are_those_of_the_mixture(backend, random):
    """Against the densities themselves, with a mixture of three Gaussians of two draws each."""
    from scipy.stats import multivariate_normal

    parts, components, points = PARTS["mixed"], [], []
    generator = np.random.default_rng(5)
    for _ in range(3):
        loc, _, factor = gaussian(generator, parts)
        noise = generator.normal(size=DIMENSION)
        components.append(multivariate_normal(loc, factor @ factor.T))
        points += [loc + factor @ noise, loc - factor @ noise]
    pool, blocks, recycled = pooled(backend, np.random.default_rng(5), parts, CUBE, num_pairs=3)
    loc, scales, factor = gaussian(random, parts)
    found = estimate(backend, pool, blocks, recycled, loc, scales)
    mixture = sum(component.pdf(points) for component in components)
    weights = multivariate_normal(loc, factor @ factor.T).pdf(points) / mixture
    assert_allclose(found.weights.reshape(-1)[:6], weights / weights.sum(), rtol=1e-10)
    expected = min(1.0, weights.sum() / 2) / ((weights / weights.sum()) ** 2).sum()
    assert_allclose(found.effective, expected, rtol=1e-10)


@pytest.mark.parametrize("num_pairs", [6, 27], ids=["by pairs", "by frames"])
@pytest.mark.parametrize("name", PARTS)
def test_the_cost_of_noise_is_that_of_gradient_and_hessian_within_the_blocks(backend, random, name, num_pairs):
    """In the coordinates in which q is N(0, I), by sums over frames of three pairs once there are four."""
    pool, blocks, recycled = pooled(backend, random, PARTS[name], CUBE, num_pairs=num_pairs, spread=0.1)
    loc, scales, factor = gaussian(random, PARTS[name], spread=0.1)
    precision = backend.precision(np.linalg.inv(factor @ factor.T))
    found = estimate(backend, pool, blocks, recycled, loc, scales)
    hessians = np.einsum(
        "kj,kjab->kab", found.weights[:num_pairs], backend.to_numpy(pool.hessians)[:num_pairs] - found.hessian
    )
    gradients = backend.to_numpy(found.moments.deviations)[:num_pairs] @ factor
    whitened = factor.T @ hessians @ factor
    within = np.zeros((DIMENSION, DIMENSION), bool)
    for part in PARTS[name]:
        for group in part.groups:
            within[np.ix_(group, group)] = True
    each = np.concatenate([gradients / 2**0.5, whitened[:, within] / 2], axis=1)
    size = 1 if num_pairs == 6 else DIMENSION
    each = each.reshape(-1, size, each.shape[1]).sum(1)
    shares = found.weights[:num_pairs].sum(1).reshape(-1, size).sum(1)
    groups = found.effective / 2 if size == 1 else 1 / (shares**2).sum()
    assert size == 1 or groups > 4
    expected = (each**2).sum() * groups / max(groups - 1, 0.5)
    assert_allclose(float(recycled.noise_cost(pool, found.moments, blocks, precision)), expected, rtol=1e-9)


def test_a_gaussian_that_no_draw_is_near_is_not_covered(backend, random):
    """However even the weights are: far away, or a million times as wide, every draw is as unlikely as the next."""
    pool, blocks, recycled = pooled(backend, random, PARTS["diagonal"], CUBE, num_pairs=20)
    for loc, scale in ((np.full(DIMENSION, 60.0), np.ones(DIMENSION)), (np.zeros(DIMENSION), np.full(DIMENSION, 1e6))):
        assert estimate(backend, pool, blocks, recycled, loc, (scale,)).effective < 1e-3


def test_the_average_over_pools_is_the_expectation(backend):
    """On exp(z), whose moments are known, within five standard errors; the error bounds the spread."""
    parts, rate = (Part(0, (1,), "diagonal"),), 0.7
    recycled, blocks = backend.module("gradients.recycled"), backend.blocks(parts)
    found, claimed = [], []
    generator = np.random.default_rng(8)
    precision = backend.precision(np.eye(1))

    def run(noise):
        given = backend.array(np.zeros(1)), (backend.array(np.ones(1)),)
        pool = recycled.init(12, *given)
        for index in range(12):
            points = backend.xp.stack([noise[index], -noise[index]])
            values = backend.xp.exp(rate * points[:, 0])
            arrays = points, values, rate * values[:, None], rate**2 * values[:, None, None]
            pool = recycled.append(pool, blocks, *given, *(array[None] for array in arrays))
        moments = recycled.moments(pool, blocks, *given)
        return moments.gradient, moments.hessian, recycled.squared_error(moments, precision)

    run = backend.compiled(run)
    for _ in range(200):
        gradient, hessian, error = run(backend.array(generator.normal(size=(12, 1))))
        found.append([backend.to_numpy(gradient)[0], backend.to_numpy(hessian)[0, 0]])
        claimed.append(float(error))
    found, expected = np.array(found), np.exp(rate**2 / 2) * np.array([rate, rate**2])
    # a ratio of averages, and a regression, are biased by the order of one over the draws
    assert (np.abs(found.mean(0) - expected) < 5 * found.std(0) / 200**0.5 + expected / 24).all()
    plain = (rate**2 * (np.exp(2 * rate**2) + 1) / 2 - rate**2 * np.exp(rate**2)) / 12  # of 12 pairs, no regression
    assert found[:, 0].var() < np.mean(claimed)
    assert 0.3 < np.mean(claimed) / plain < 3


def test_a_full_pool_forgets_every_fourth_pair(backend):
    """The draws that stay are weighted as if the others had never been made."""
    parts, seed = PARTS["mixed"], 4
    full, blocks, recycled = pooled(backend, np.random.default_rng(seed), parts, CUBE, num_pairs=11, capacity=8)
    forgotten = (0, 4, 1, 6)  # the first and the fifth of the eight that were there, when 8 came and when 10 did
    fresh, *_ = pooled(backend, np.random.default_rng(seed), parts, CUBE, num_pairs=11, forgotten=forgotten)
    assert int(full.count) == int(fresh.count) == 7
    loc, scales, _ = gaussian(np.random.default_rng(1), parts)
    kept, anew = (estimate(backend, pool, blocks, recycled, loc, scales) for pool in (full, fresh))
    assert_allclose(np.sort(kept.weights, axis=None)[-14:], np.sort(anew.weights, axis=None)[-14:], rtol=1e-10)
    assert_allclose(kept.gradient, anew.gradient, rtol=1e-10)


def test_pairs_of_one_gaussian_are_appended_at_once_as_one_after_the_other(backend, random):
    """Past the room that there is, too."""
    parts = PARTS["mixed"]
    pool, blocks, recycled = pooled(backend, random, parts, CUBE, num_pairs=14, capacity=16)
    loc, scales, factor = gaussian(random, parts)
    noise = random.normal(size=(4, 1, DIMENSION)) * [[1], [-1]]
    points = loc + noise @ factor.T
    arrays = (noise, value_at(points, CUBE), gradient_at(points, CUBE), hessian_at(points, CUBE))
    arrays = [backend.array(array) for array in arrays]
    given = backend.array(loc), tuple(map(backend.array, scales))
    at_once, singly = recycled.append(pool, blocks, *given, *arrays), pool
    for index in range(4):
        singly = recycled.append(singly, blocks, *given, *(array[index : index + 1] for array in arrays))
    assert int(at_once.count) == int(singly.count) == 14
    one, other = (estimate(backend, each, blocks, recycled, loc, scales) for each in (at_once, singly))
    for name in ("weights", "effective", "gradient", "hessian"):
        assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12)


def test_the_elbo_of_a_gaussian_posterior_has_no_error(backend, random):
    """log p − log q is the same at every draw of q = p."""
    quadratic = np.zeros_like(CUBE)
    pool, blocks, recycled = pooled(backend, random, PARTS["dense"], quadratic, num_pairs=4)
    loc = -np.linalg.solve(SQUARE, LINEAR)
    factor = np.linalg.cholesky(np.linalg.inv(SQUARE))
    given = backend.array(loc), (backend.array(factor),)
    weights = recycled.moments(pool, blocks, *given).weights
    elbo, error = recycled.elbo(pool, weights, blocks, *given)
    log_evidence = -value_at(loc, quadratic) + DIMENSION * np.log(2 * np.pi) / 2 + np.log(np.diag(factor)).sum()
    assert_allclose(float(elbo), log_evidence, rtol=1e-12)
    assert float(error) < 1e-12
