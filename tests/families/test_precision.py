"""The verbs of a precision against dense linear algebra in NumPy, for both families and every layout of blocks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.linalg
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from .. import cases, reference

UNLEARNED = 0.2
RATES = (0.05, 0.6, 1.0)

dense_layouts = pytest.mark.parametrize("parts", cases.LAYOUTS.values(), ids=cases.LAYOUTS)
every_family = pytest.mark.parametrize(
    ("parts", "dense"),
    [pytest.param(parts, True, id=f"dense, {name}") for name, parts in cases.LAYOUTS.items()]
    + [pytest.param(cases.LAYOUTS[name], False, id=f"diagonal, {name}") for name in cases.ONLY_DIAGONAL],
)


def positive_definite(dense: bool) -> np.ndarray:
    matrix = cases.positive_definite(21)
    return matrix if dense else np.diagonal(matrix)


def made_scales(backend, parts, random):
    """A scale for every part that has one: (the backend's arrays, C of each group of coordinates)."""
    scales, factors = [], []
    for part in parts:
        groups = [random.normal(size=(len(group), len(group))) for group in part.groups]
        groups = [np.linalg.cholesky(np.eye(len(group)) + group @ group.T) for group in groups]
        if part.structure == "diagonal":
            scales.append(backend.array(np.reshape(groups, part.shape)))
        elif part.structure == "dense":
            scales.append(backend.array(np.reshape(groups, (*part.shape, part.shape[-1]))))
        else:
            scales.append(None)
            groups = [UNLEARNED * np.eye(len(group)) for group in groups]
        factors += groups
    return tuple(scales), factors


@every_family
def test_from_scales_is_the_inverse_covariance(backend, parts, dense, random):
    scales, factors = made_scales(backend, parts, random)
    precision = backend.from_scales(parts, scales, UNLEARNED, dense)
    expected = scipy.linalg.block_diag(*[np.linalg.inv(factor @ factor.T) for factor in factors])
    assert_allclose(reference.as_matrix(backend.precision_array(precision)), expected, rtol=1e-12, atol=1e-14)


@every_family
def test_scale_inverts_from_scales(backend, parts, dense, random):
    scales, _ = made_scales(backend, parts, random)
    precision = backend.from_scales(parts, scales, UNLEARNED, dense)
    for block, scale in zip(backend.blocks(parts), scales, strict=True):
        if scale is not None:
            assert_allclose(backend.to_numpy(precision.scale(block)), backend.to_numpy(scale), rtol=1e-12, atol=1e-14)


@every_family
def test_scale_is_the_factor_of_the_inverse_block_of_the_precision(backend, parts, dense):
    """C_b C_bᵀ = (S_bb)⁻¹, the inverse of the block and not the block of the inverse."""
    value = positive_definite(dense)
    expected = reference.factor_of(value, parts, fixed_scale=np.nan)
    for part, block in zip(parts, backend.blocks(parts), strict=True):
        if part.structure in ("diagonal", "dense"):
            scale = backend.to_numpy(backend.precision(value).scale(block))
            factors = np.reshape(scale, (len(part.groups), len(part.groups[0]), -1))
            for group, factor in zip(part.groups, factors, strict=True):
                assert_allclose(factor, expected[np.ix_(group, group)], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dense", [True, False])
def test_solve(backend, dense, random):
    value, vector = positive_definite(dense), random.normal(size=4)
    solution = backend.precision(value).solve(backend.array(vector))
    assert_allclose(backend.to_numpy(solution), np.linalg.solve(reference.as_matrix(value), vector), rtol=1e-12)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dense", [True, False])
def test_blend_is_the_straight_step_where_that_keeps_enough(backend, dense, rate):
    """To the last digit: the safe step's correction must not touch it, or ρ = 1 would not be Bayes' rule."""
    value = positive_definite(dense)
    hessian = 3 * cases.positive_definite(22) - 0.3 * np.eye(4)
    hessian = hessian if dense else np.diagonal(hessian)
    blended = backend.precision(value).blend(backend.array(hessian), backend.rate(rate))
    assert_array_equal(backend.precision_array(blended), (1 - rate) * value + rate * hessian)


def test_blend_keeps_the_straight_step_also_for_an_indefinite_hessian(backend):
    value, hessian, rate = np.eye(2), np.diag([5.0, -0.5]), 0.4
    blended = backend.precision(value).blend(backend.array(hessian), backend.rate(rate))
    assert_allclose(backend.precision_array(blended), np.diag([2.6, 0.4]), rtol=1e-15)


def test_complete_leaves_what_the_weights_do_not_cover(backend, random):
    value, hessian = positive_definite(dense=True), cases.positive_definite(23)
    weight = np.array([1.0, 0.0, 4.0, 2.0])
    expected = value.copy()
    for i in range(4):
        for j in range(4):
            if weight[i] > 0 and weight[j] > 0:
                expected[i, j] = hessian[i, j] / max(weight[i], weight[j])
    completed = backend.precision(value).complete(backend.array(hessian), backend.array(weight))
    assert_array_equal(backend.to_numpy(completed), expected)

    value, hessian = np.diagonal(value), np.diagonal(hessian)
    completed = backend.precision(value).complete(backend.array(hessian), backend.array(weight))
    assert_array_equal(backend.to_numpy(completed), np.diagonal(expected))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("curvature", [[2.0, 30.0, 0.5, 1.0], [2.0, -80.0, -50.0, 1.0]], ids=["convex", "not convex"])
def test_diagonal_is_dense_on_a_diagonal_problem(backend, curvature, rate, random):
    value, hessian, vector = np.array([1.0, 2.0, 0.3, 7.0]), np.array(curvature), random.normal(size=4)
    diagonal = backend.precision(value).blend(backend.array(hessian), backend.rate(rate))
    dense = backend.precision(np.diag(value)).blend(backend.array(np.diag(hessian)), backend.rate(rate))
    assert_allclose(np.diag(backend.precision_array(diagonal)), backend.precision_array(dense), rtol=1e-13, atol=1e-13)
    solutions = [backend.to_numpy(precision.solve(backend.array(vector))) for precision in (diagonal, dense)]
    assert_allclose(*solutions, rtol=1e-12)
    (block,) = backend.blocks(cases.LAYOUTS["diagonal"])
    assert_allclose(*[backend.to_numpy(precision.scale(block)) for precision in (diagonal, dense)], rtol=1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_the_step_is_the_one_in_natural_parameters(backend, rate, random):
    """λ ← (1 − ρ) λ − ρ ∇_μ E_q[ℓ] through the package's blend and solve."""
    loc, gradient, hessian = random.normal(size=4), random.normal(size=4), cases.positive_definite(24)
    value = positive_definite(dense=True)
    precision = backend.precision(value).blend(backend.array(hessian), backend.rate(rate))
    moved = loc - rate * backend.to_numpy(precision.solve(backend.array(gradient)))

    natural = reference.natural_of(loc, np.linalg.inv(value))
    natural = reference.natural_step(natural, reference.natural_gradient(loc, gradient, hessian), rate)
    expected_loc, expected_covariance = reference.moments_of_natural(natural)
    assert_allclose(moved, expected_loc, rtol=1e-11, atol=1e-12)  # S m and back costs the condition number, about 10
    assert_allclose(np.linalg.inv(backend.precision_array(precision)), expected_covariance, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("shift", [0.0, 40.0], ids=["straight", "reflected"])
@dense_layouts
def test_units_of_the_coordinates_do_not_matter(backend, parts, shift, rate, random):
    """With z' = z / u: S' = U S U, H' = U H U, and every verb answers in the new units, condition 1e20 or not."""
    units = np.array([1e-5, 3.0, 1e5, 70.0])
    value, vector = positive_definite(dense=True), random.normal(size=4)
    hessian = cases.positive_definite(25) - shift * np.eye(4)

    def answers(units):
        precision = backend.precision(units[:, None] * value * units)
        blended = precision.blend(backend.array(units[:, None] * hessian * units), backend.rate(rate))
        solution = backend.to_numpy(blended.solve(backend.array(units * vector))) * units
        scales = [
            backend.to_numpy(blended.scale(block))
            for block in backend.blocks(parts)
            if block.structure in ("diagonal", "dense")
        ]
        matrix = backend.precision_array(blended) / units[:, None] / units
        return matrix, solution, scales

    matrix, solution, scales = answers(np.ones(4))
    other_matrix, other_solution, other_scales = answers(units)
    # the units are no powers of two: each product with them rounds once, and S has condition 10 in good units
    assert_allclose(other_matrix, matrix, rtol=1e-11, atol=1e-12)
    assert_allclose(other_solution, solution, rtol=1e-11, atol=1e-12)
    learned = [part for part in parts if part.structure in ("diagonal", "dense")]
    for part, other, scale in zip(learned, other_scales, scales, strict=True):
        first = units[part.start : part.start + np.prod(part.shape, dtype=int)].reshape(part.shape)
        first = first[..., None] if part.structure == "dense" else first
        assert_allclose(other * first, scale, rtol=1e-11, atol=1e-12)


CURVATURES = st.one_of(st.floats(-1e8, 1e8), st.floats(-1e-3, 1e-3), st.sampled_from([0.0, 1.0, -1.0]))


@settings(max_examples=150)
@given(
    curvature=st.tuples(CURVATURES, CURVATURES, CURVATURES),
    rate=st.floats(1e-4, 1),
    exponents=st.tuples(*[st.integers(-5, 5)] * 3),
    seed=st.integers(0, 1000),
)
def test_blend_stays_positive_definite_whatever_the_hessian(backend, curvature, rate, exponents, seed):
    """Any symmetric H is L Q diag(w) Qᵀ Lᵀ with S = L Lᵀ; w may be indefinite, singular, tiny, huge."""
    random = np.random.default_rng(seed)
    units = 10.0 ** np.array(exponents)
    value = units[:, None] * cases.positive_definite(seed, 3) * units
    rotation = scipy.linalg.qr(random.normal(size=(3, 3)))[0]
    factor = np.linalg.cholesky(value) @ rotation
    hessian = (factor * curvature) @ factor.T
    hessian = (hessian + hessian.T) / 2
    curvature = np.array(curvature)
    # on the very edge, rounding decides which of two safe steps is taken; the next test looks there
    largest = np.abs(curvature).max()
    assume(np.abs((1 - rate) / 2 + rate * curvature).min() > 1e-12 * max(1, rate * largest))
    assume(not ((curvature > 0) & (curvature < 1e-12 * largest)).any())

    blended = backend.compiled_blend()(value, hessian, rate)
    whitened = scipy.linalg.eigvalsh(blended / units[:, None] / units, value / units[:, None] / units)
    blend = (1 - rate) + rate * curvature
    if blend.min() <= (1 - rate) / 2:
        blend = reference.safe_blend(curvature, rate)
    # eigenvalues are determined to the rounding of the largest
    assert_allclose(whitened, np.sort(blend), rtol=1e-9, atol=1e-13 * blend.max())

    blended = backend.compiled_blend()(np.diagonal(value), np.diagonal(hessian), rate)
    assert (blended > 0).all()
    assert_allclose(blended, reference.safe_diagonal(np.diagonal(value), np.diagonal(hessian), rate), rtol=1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_blend_on_the_edge_of_the_cone(backend, rate):
    """H that takes exactly half of (1 − ρ) S in one direction: either answer is finite and leaves the other half."""
    value = cases.positive_definite(26, 3)
    direction = np.array([1.0, 2.0, -1.0])
    direction /= np.sqrt(direction @ value @ direction)
    hessian = value - value @ np.outer(direction, direction) @ value * (1 + rate) / (2 * rate)
    blended = backend.compiled_blend()(value, hessian, rate)
    assert np.isfinite(blended).all()
    assert scipy.linalg.eigvalsh(blended, value).min() > (1 - rate) / 2 - 1e-14


@pytest.mark.parametrize("curvature", [[0.0, 0.0, 0.0], [-1e8, -1e8, -1e8], [2.0, 0.0, -3.0], [2.0, 0.0, 3.0]], ids=str)
@pytest.mark.parametrize("dense", [True, False])
def test_a_full_step_keeps_every_direction(backend, curvature, dense):
    """At ρ = 1, where H is not positive in a direction, that direction keeps a quarter of its precision or gains."""
    value, curvature = np.array([0.5, 1.0, 2.0]), np.array(curvature)
    hessian = value * curvature
    blended = backend.compiled_blend()(*([np.diag(value), np.diag(hessian)] if dense else [value, hessian]), 1.0)
    expected = np.where(curvature > 0, curvature, np.maximum(np.abs(curvature), 0.25))
    assert_allclose(blended, np.diag(value * expected) if dense else value * expected, rtol=1e-12, atol=1e-8)


@pytest.mark.parametrize("dense", [True, False])
def test_single_precision_stays_single(backend, dense):
    value = positive_definite(dense).astype(np.float32)
    single = partial(backend.array, dtype="float32")
    precision = type(backend.precision(value))(single(value))
    block = backend.blocks(cases.LAYOUTS["dense" if dense else "diagonal"])[0]
    weight = single(np.array([1.0, 0.0, 2.0, 1.0]))
    straight, reflected = (precision.blend(single(sign * value), backend.rate(0.5, "float32")) for sign in (1, -5))
    outcomes = [
        backend.precision_array(straight),
        backend.precision_array(reflected),
        backend.to_numpy(precision.solve(weight)),
        backend.to_numpy(precision.scale(block)),
        backend.to_numpy(precision.complete(single(value), weight)),
    ]
    assert {outcome.dtype for outcome in outcomes} == {np.dtype(np.float32)}
