"""Curvature that is in no Hessian: found where the gradient jumps, and nowhere else."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from ..cases import Part

DIMENSION, NUM_PAIRS = 3, 240
DIAGONAL, DENSE = (Part(0, (DIMENSION,), "diagonal"),), (Part(0, (DIMENSION,), "dense"),)
MEAN = np.array([0.3, -0.2, 0.5])
FACTOR = np.array([[0.8, 0.0, 0.0], [0.5, 0.6, 0.0], [-0.3, 0.2, 1.1]])
layouts = pytest.mark.parametrize("parts", [DIAGONAL, DENSE], ids=["diagonal", "dense"])


class Absolute:
    """ℓ = Σ_i |x_i · z − y_i|, with E_q[∇²ℓ] = Σ_i 2 N(y_i | x_i · m, x_iᵀ Σ x_i) x_i x_iᵀ that no Hessian has."""

    def __init__(self, x, y):
        self.x, self.y = np.asarray(x, float), np.asarray(y, float)

    def gradients(self, z):
        return np.sign(z @ self.x.T - self.y) @ self.x

    def hessians(self, z):
        return np.zeros((*z.shape, z.shape[-1]))

    def expected_hessian(self, loc, factor):
        density = norm.pdf(self.y, self.x @ loc, np.linalg.norm(self.x @ factor, axis=1))
        return (2 * density * self.x.T) @ self.x


class Quartic:
    """ℓ = Σ_i (z_i⁴/12 + z_i²), smooth and far from quadratic."""

    def gradients(self, z):
        return z**3 / 3 + 2 * z

    def hessians(self, z):
        return (z**2 + 2)[..., None] * np.eye(z.shape[-1])


PRIOR = Absolute(np.eye(DIMENSION), [0.5, 0.0, -0.4])  # a kink for every coordinate
LIKELIHOOD = Absolute(np.random.default_rng(7).normal(size=(200, DIMENSION)), np.random.default_rng(8).normal(size=200))


def scale_of(parts):
    """(the scale as the packages have it, C)."""
    return (FACTOR, FACTOR) if parts is DENSE else (np.diagonal(FACTOR), np.diag(np.diagonal(FACTOR)))


@functools.cache
def evaluation(backend, parts):
    """The arrays of pairs at one Gaussian -> (pool, its moments at that Gaussian); compiled once for each size."""
    recycled, blocks = backend.module("gradients.recycled"), backend.blocks(parts)
    given = backend.array(MEAN), (backend.array(scale_of(parts)[0]),)

    def evaluate(*arrays):
        pool = recycled.append(recycled.init(4 * len(arrays[0]), *given), blocks, *given, *arrays)
        return pool, recycled.moments(pool, blocks, *given)

    return backend.compiled(evaluate)


def pooled(backend, problem, parts, noise):
    """(pool, its moments) of the pairs ± `noise` [K, D]."""
    pairs = np.stack([noise, -noise], 1)
    points = MEAN + pairs @ scale_of(parts)[1].T
    arrays = pairs, np.zeros(points.shape[:2]), problem.gradients(points), problem.hessians(points)
    pool, moments = evaluation(backend, parts)(*map(backend.array, arrays))
    found = SimpleNamespace(
        hessian=backend.to_numpy(moments.hessian),
        curvature=backend.to_numpy(moments.kinks.curvature),
        variance=backend.to_numpy(moments.kinks.variance),
        moments=moments,
    )
    return pool, found


@layouts
@pytest.mark.parametrize("problem", [PRIOR, LIKELIHOOD], ids=["prior", "likelihood"])
def test_the_curvature_of_kinks_is_that_of_the_closed_form(backend, problem, parts, random):
    """Within five standard errors in coordinates in which q is N(0, I), and most of it found."""
    _, found = pooled(backend, problem, parts, random.normal(size=(NUM_PAIRS, DIMENSION)))
    factor = scale_of(parts)[1]
    expected = factor.T @ problem.expected_hessian(MEAN, factor) @ factor
    off = factor.T @ found.hessian @ factor - expected
    error = np.sqrt(found.variance.max())
    assert (np.diagonal(found.variance) > 0).all(), "no kink of the diagonal is in doubt"
    assert (np.abs(off) < 5 * error).all()
    assert np.linalg.norm(off) < 0.2 * np.linalg.norm(expected)
    assert_array_equal(found.curvature, found.hessian)
    assert_allclose(found.hessian, found.hessian.T, rtol=1e-12)


def test_the_variance_is_that_of_the_estimate(backend, random):
    """Of the diagonal over pools of its own; the mean is off by less than its error, shrinkage included."""
    estimates, variances = [], []
    factor = scale_of(DIAGONAL)[1]
    for _ in range(24):
        _, found = pooled(backend, PRIOR, DIAGONAL, random.normal(size=(NUM_PAIRS, DIMENSION)))
        estimates.append(np.diagonal(factor.T @ found.hessian @ factor))
        variances.append(np.diagonal(found.variance))
    ratio = np.var(estimates, axis=0, ddof=1) / np.mean(variances, axis=0)
    assert (ratio > 0.35).all() and (ratio < 2.0).all()  # χ²/23 is not within, one time in 500
    expected = np.diagonal(factor.T @ PRIOR.expected_hessian(MEAN, factor) @ factor)
    assert_allclose(np.mean(estimates, axis=0), expected, atol=4 * np.sqrt(np.mean(variances) / 24))


@layouts
def test_where_all_is_smooth_hardly_anything_is_found(backend, parts, random):
    """By chance alone, in one pool of thirty."""
    number, problem = 0, Quartic()
    for _ in range(30):
        _, found = pooled(backend, problem, parts, random.normal(size=(60, DIMENSION)))
        number += found.curvature.any()
    assert number <= 4


@layouts
def test_a_few_pairs_tell_the_average_curvature(backend, parts, random):
    """A multiple of Σ⁻¹ that has the trace of the closed form, to the noise of three pairs."""
    _, found = pooled(backend, LIKELIHOOD, parts, random.normal(size=(3, DIMENSION)))
    factor = scale_of(parts)[1]
    whitened = factor.T @ found.hessian @ factor
    assert_allclose(whitened, whitened[0, 0] * np.eye(DIMENSION), atol=1e-10 * whitened[0, 0])
    expected = np.trace(factor.T @ LIKELIHOOD.expected_hessian(MEAN, factor) @ factor) / DIMENSION
    assert 0.6 < whitened[0, 0] / expected < 1.6


@layouts
def test_the_noise_of_the_curvature_has_a_cost(backend, parts, random):
    """V/4 of every element within a block, in addition to what else costs."""
    pool, found = pooled(backend, LIKELIHOOD, parts, random.normal(size=(60, DIMENSION)))
    factor = scale_of(parts)[1]
    precision = backend.precision(np.linalg.inv(factor @ factor.T))
    recycled, blocks = backend.module("gradients.recycled"), backend.blocks(parts)
    kinks = found.moments.kinks._replace(variance=0 * found.moments.kinks.variance)
    with_it, without = (
        float(recycled.noise_cost(pool, moments, blocks, precision))
        for moments in (found.moments, found.moments._replace(kinks=kinks))
    )
    within = found.variance if parts is DENSE else np.diagonal(found.variance)
    assert within.sum() > 0
    assert_allclose(with_it - without, within.sum() / 4, rtol=1e-10)


def test_both_packages_find_the_same(both, random):
    noise = random.normal(size=(40, DIMENSION))
    for parts in (DIAGONAL, DENSE):
        one, other = (pooled(backend, LIKELIHOOD, parts, noise)[1] for backend in both)
        assert_allclose(one.hessian, other.hessian, rtol=1e-9, atol=1e-9)
        assert_allclose(one.variance, other.variance, rtol=1e-8, atol=1e-10)
