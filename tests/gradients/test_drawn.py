"""Estimators of ∇_μ E_q[ℓ] from draws: unbiased, linear in ℓ, and without noise where q is the posterior."""

from __future__ import annotations

import numpy as np
import pytest

NUM_DRAWS = 4_000

# name, distribution of the host, f of one value in the host's array functions (smooth, not affine in T), and the
# expectation of f under the host's distribution as a function of its parameters is had by a much larger sample
PATH = {
    "gamma": lambda dist, array: dist.Gamma(array([3.0, 0.8]), array([2.0, 0.5])),
    "beta": lambda dist, array: dist.Beta(array([2.0, 0.9]), array([3.0, 4.0])),
    "normal": lambda dist, array: dist.Normal(array([0.3, -1.0]), array([0.5, 2.0])),
}


def grid_of(name: str) -> np.ndarray:
    """Points of the support, dense where the distributions above have their mass."""
    if name == "beta":
        return 1 / (1 + np.exp(-np.linspace(-40, 40, 40_001)))
    return np.exp(np.linspace(-60, 6, 60_001)) if name == "gamma" else np.linspace(-40, 40, 40_001)


@pytest.mark.parametrize("name", PATH)
def test_the_path_gradient_is_unbiased(backend, name):
    """Against ∇_μ E_q[f] = Cov(T)⁻¹ Cov(T, f), both by quadrature."""
    drawn = backend.module("gradients.drawn")
    natural = backend.natural_of(PATH[name](backend.host.dist, backend.array))
    assert drawn.estimator_of(natural) == "path"
    key = backend.noise_key(1)
    values = drawn.samples(natural, NUM_DRAWS, key)
    slopes = backend.array(np.cos(backend.to_numpy(values)))  # f = sin
    estimates = drawn.natural_gradients(natural, slopes, values, key)

    grid = grid_of(name)
    points = backend.array(np.stack([grid, grid], -1))
    density = np.exp(backend.to_numpy(backend.map_fn(natural.log_density, points)))
    statistics = backend.leaves(backend.map_fn(natural.sufficient_statistics, points))
    for cell in range(2):
        mass = density[:, cell] * np.gradient(grid)
        mass = np.where(np.isfinite(mass), mass, 0)
        mass /= mass.sum()
        kept = mass > 0
        centered = [row[kept, cell] - mass[kept] @ row[kept, cell] for row in statistics]
        covariance = np.array([[mass[kept] @ (a * b) for b in centered] for a in centered])
        target = np.array([mass[kept] @ (a * np.sin(grid[kept])) for a in centered])
        expected = np.linalg.solve(covariance, target)
        for found, desired in zip(backend.leaves(estimates), expected, strict=True):
            draws = found[:, cell]
            assert abs(draws.mean() - desired) < 5 * draws.std() / NUM_DRAWS**0.5


def test_the_difference_of_a_count_is_unbiased(backend):
    """E_q[f] of a Poisson variable under f(z) = z²: r + r², whose derivative with respect to μ = r is 1 + 2 r."""
    drawn = backend.module("gradients.drawn")
    natural = backend.natural_of(backend.host.dist.Poisson(backend.array([0.5, 6.0])))
    assert drawn.estimator_of(natural) == "difference"
    key = backend.noise_key(2)
    values = drawn.samples(natural, NUM_DRAWS, key)
    slopes = backend.array(2.0 * backend.to_numpy(values) + 1)
    (estimates,) = backend.leaves(drawn.natural_gradients(natural, slopes, values, key))
    error = estimates.std(0) / NUM_DRAWS**0.5
    assert (np.abs(estimates.mean(0) - (1 + 2 * np.array([0.5, 6.0]))) < 5 * error).all()


def test_the_difference_of_a_geometric_count_is_unbiased(backend):
    """E_q[z²] = μ + 2 μ² for μ = (1 − p)/p: 1 + 4 μ."""
    drawn = backend.module("gradients.drawn")
    natural = backend.natural_of(backend.host.dist.Geometric(backend.array([0.2, 0.7])))
    key = backend.noise_key(2)
    values = drawn.samples(natural, NUM_DRAWS, key)
    slopes = backend.array(2.0 * backend.to_numpy(values) + 1)
    (estimates,) = backend.leaves(drawn.natural_gradients(natural, slopes, values, key))
    error = estimates.std(0) / NUM_DRAWS**0.5
    assert (np.abs(estimates.mean(0) - (1 + 4 * np.array([0.8 / 0.2, 0.3 / 0.7]))) < 5 * error).all()


@pytest.mark.parametrize("name", PATH)
def test_directions_vanish_at_the_posterior(backend, name):
    """ℓ = −log q: every single draw says that nothing is to be done."""
    drawn = backend.module("gradients.drawn")
    natural = backend.natural_of(PATH[name](backend.host.dist, backend.array))
    key = backend.noise_key(3)
    values = drawn.samples(natural, 6, key)
    slopes = backend.gradient(lambda values: -backend.map_fn(natural.log_density, values).sum(), values)
    directions = drawn.directions(natural, slopes, backend.array(np.ones(2)), key)
    for leaf in backend.leaves(directions):
        np.testing.assert_allclose(leaf, np.zeros_like(leaf), atol=1e-9)


def test_the_score_is_unbiased_where_the_sampler_has_no_derivative(backend):
    """Of a von Mises variable, f = sin 2θ: Cov(T)⁻¹ Cov(T, f) by quadrature."""
    drawn = backend.module("gradients.drawn")
    with backend.promotion(lax=True):
        natural = backend.natural_of(backend.host.dist.VonMises(backend.array(0.7), backend.array(1.5)))
        assert drawn.estimator_of(natural) == "score"
        key = backend.noise_key(4)
        values = drawn.samples(natural, NUM_DRAWS, key)
        losses = backend.array(np.sin(2 * backend.to_numpy(values)))
        estimates = backend.leaves(drawn.natural_gradients(natural, losses, values, key))
    angles = np.linspace(-np.pi, np.pi, 2_001)[:-1]
    mass = np.exp(1.5 * np.cos(angles - 0.7))
    mass /= mass.sum()
    statistics = [np.cos(angles), np.sin(angles)]
    centered = [statistic - mass @ statistic for statistic in statistics]
    covariance = np.array([[mass @ (a * b) for b in centered] for a in centered])
    expected = np.linalg.solve(covariance, [mass @ (a * np.sin(2 * angles)) for a in centered])
    for found, desired in zip(estimates, expected, strict=True):
        assert abs(found.mean() - desired) < 5 * found.std() / NUM_DRAWS**0.5
