"""Curvature at draws whose noise is known: Hessians, differences where these are not finite, or secants."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import chi

from .. import cases, reference
from .test_estimators import Underflow

LOC = np.array([0.3, -0.6, 0.4, 0.1])
PRECISION = 3 * cases.positive_definite(31)


def curvatures_at(backend, problem, parts, noise, chords=None):
    """`secants` -> the package's, at N(LOC, PRECISION⁻¹) and pairs ± `noise` [K, D]."""
    gradients, pairs = backend.gradients, backend.array(np.concatenate([noise, -noise]))
    draws = gradients.Draws.at(pairs)
    if chords is not None:
        draws = draws._replace(chords=gradients.Chords(*map(backend.array, chords)).mirrored())
    objective = backend.objective(problem, parts, pairs)
    at = objective, backend.array(LOC), backend.scales(PRECISION, parts), draws, backend.blocks(parts)
    return lambda secants: gradients.curvatures_at(*at, secants=secants)


@pytest.mark.parametrize("name", ["diagonal", "mixed"])
def test_hessians_are_those_of_each_draw(backend, name, random):
    problem, parts, noise = cases.student(), cases.LAYOUTS[name], random.normal(size=(2, 4))
    found = backend.compiled(partial(curvatures_at(backend, problem, parts, noise), False))()
    hessians, losses, gradients = map(backend.to_numpy, found[:3])
    points = LOC + np.concatenate([noise, -noise]) @ reference.factor_of(PRECISION, parts, cases.FIXED_SCALE).T
    assert_allclose(hessians, [problem.hessian(point) for point in points], rtol=1e-10, atol=1e-11)
    assert_allclose(gradients, [problem.gradient(point) for point in points], rtol=1e-10, atol=1e-11)
    assert losses.shape == (4,) and int(found[3]) == 1 + 4


def test_differences_are_taken_where_hessians_are_not_finite(backend, random):
    at = curvatures_at(backend, Underflow(), cases.LAYOUTS["mixed"], random.normal(size=(1, 4)))
    hessians, _, gradients, cost = backend.compiled(partial(at, False))()
    assert_allclose(backend.to_numpy(hessians), [np.eye(4)] * 2, atol=1e-10)
    assert_allclose(backend.to_numpy(gradients).mean(0), LOC + np.array([100.0, 0, 0, 0]), rtol=1e-12)
    assert int(cost) == 1 + 3 * 4, "the Hessian that is none, and two gradients a direction"


def test_which_it_is_may_be_known_to_the_running_program_alone(numpyro_bridge, random):
    backend, noise = numpyro_bridge, random.normal(size=(2, 4))
    chords = random.normal(size=(2, 4)), chi(3).rvs(size=(2, 4), random_state=random)
    at = curvatures_at(backend, cases.student(), cases.LAYOUTS["mixed"], noise, chords)
    late, found = backend.compiled(at), {}
    for secants in (True, False):
        found[secants] = backend.compiled(partial(at, secants))()
        for value, expected in zip(late(backend.xp.asarray(secants)), found[secants], strict=True):
            assert_allclose(backend.to_numpy(value), backend.to_numpy(expected), rtol=1e-12)
    assert int(found[True][3]) == 1 + 2 * 4
    assert np.abs(backend.to_numpy(found[True][0]) - backend.to_numpy(found[False][0])).max() > 0.01
