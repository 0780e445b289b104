"""The rule itself, as a function of its state and of given noise: exact, fixed, safe, and equal to the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from .. import cases, reference
from ..cases import FIXED_SCALE, LAYOUTS, Part

NUM_PAIRS = 3
ALL_POINTS = (Part(0, (4,), "point"),)  # no noise at all: z is the mean itself

layouts = pytest.mark.parametrize("parts", LAYOUTS.values(), ids=LAYOUTS)
some_layouts = pytest.mark.parametrize("parts", [LAYOUTS["dense"], LAYOUTS["mixed"]], ids=["dense", "mixed"])
rates = pytest.mark.parametrize("rate", [None, 0.3], ids=["automatic", "given"])


def start(dense: bool = True, precision: float = 4.0, **fields) -> reference.State:
    precision = precision * cases.positive_definite(41)
    loc = np.array([2.0, -1.0, 0.3, -0.5])
    fields = {"num_averaged": np.zeros(4), **fields}
    return reference.State(loc=loc, precision=precision if dense else np.diagonal(precision), **fields)


def run(stepper, backend, state: reference.State, noise, probes=None) -> reference.State:
    """The package's steps on the rows of `noise`."""
    probes = [None] * len(noise) if probes is None else probes
    state = backend.state(state)
    for eps, probe in zip(noise, probes, strict=True):
        state, _, _ = stepper(state, eps, probe)
    return backend.as_reference(state)


def check_equal(state: reference.State, expected: reference.State, rtol: float, atol: float = 0.0) -> None:
    """All of the state; what is counted, exactly."""
    assert_allclose(state.loc, expected.loc, rtol=rtol, atol=atol)
    assert_allclose(state.precision, expected.precision, rtol=rtol, atol=atol)
    assert_allclose([state.rate, state.taken], [expected.rate, expected.taken], rtol=1e-15)
    if expected.last_gradient is not None:
        assert_allclose(state.last_gradient, expected.last_gradient, rtol=rtol, atol=max(atol, 1e-10))
    counted = [(s.noisy_steps, s.rejected, s.radius, s.skipped) for s in (state, expected)]
    assert counted[0] == counted[1]
    if expected.num_averaged is not None:
        assert_array_equal(state.num_averaged, expected.num_averaged)


# ---------------------------------------------------------------------------------------------------------------------
# Exact on quadratics


@pytest.mark.parametrize("rate", [None, 1.0], ids=["automatic", "given"])
@layouts
def test_one_full_step_on_a_quadratic_is_exact_from_any_start(backend, parts, rate, random):
    """Bayes' rule: m is the optimum and S the Hessian, whatever q was; a mean-field guide's mean is exact as well."""
    problem = cases.quadratic()
    stepper = backend.stepper(problem, parts, backend.gradients.hessian, rate)
    for scale, distance in ((1e-3, 1e3), (1.0, 1.0), (1e2, 1e-3)):
        precision = cases.positive_definite(42) / scale**2
        state = reference.State(problem.optimum + distance * random.normal(size=4), precision)
        state = run(stepper, backend, state, random.normal(size=(1, NUM_PAIRS, 4)))
        # rounding of points `distance` away and of draws `scale` apart
        assert_allclose(state.loc, problem.optimum, rtol=0, atol=1e-13 * (1 + distance + scale))
        assert_allclose(state.precision, problem.matrix, rtol=1e-12, atol=1e-13)
        assert (state.rate, state.rejected, state.skipped) == (1.0, 0, 0), "the first proposal is accepted"


def test_one_full_step_of_the_diagonal_rule_is_exact_on_a_diagonal_quadratic(backend, random):
    problem = cases.separable()
    probes = random.choice([-1.0, 1.0], size=(1, 2 * NUM_PAIRS, 1, 4))
    for newton in (False, True):
        stepper = backend.stepper(problem, LAYOUTS["diagonal"], backend.gradients.hutchinson, None, newton=newton)
        state = run(stepper, backend, start(dense=False), random.normal(size=(1, NUM_PAIRS, 4)), probes)
        assert_allclose(state.loc, problem.optimum, rtol=1e-13)
        assert_allclose(state.precision, np.diagonal(problem.matrix), rtol=1e-13)


@pytest.mark.parametrize("rate", [None, 0.3, 1.0])
def test_the_posterior_stays(backend, rate, random):
    problem = cases.quadratic()
    stepper = backend.stepper(problem, LAYOUTS["mixed"], backend.gradients.hessian, rate)
    state = reference.State(problem.optimum, problem.matrix)
    state = run(stepper, backend, state, random.normal(size=(5, NUM_PAIRS, 4)))
    assert_allclose(state.loc, problem.optimum, rtol=1e-14)
    assert_allclose(state.precision, problem.matrix, rtol=1e-13)


def test_a_fixed_point_has_no_gradient_and_the_expected_hessian(backend, random):
    """On fixed noise the rule settles where E[g] = 0 and S = E[H], on a problem that is no quadratic."""
    problem, parts, noise = cases.poisson(), LAYOUTS["mixed"], random.normal(size=(NUM_PAIRS, 4))
    stepper = backend.stepper(problem, parts, backend.gradients.hessian, 0.3)
    state = run(stepper, backend, start(), [noise] * 120)  # contracts by 0.7 a step: 0.7¹²⁰ = 3e-19
    factor = reference.factor_of(state.precision, parts, FIXED_SCALE)
    estimate = reference.second_order(problem, state.loc, factor, parts, noise)
    assert_allclose(estimate.gradient, 0, atol=1e-13)
    assert_allclose(state.precision, estimate.hessian, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Ten steps on given noise


@dataclass(frozen=True)
class Rule:
    """An estimator with the family of its precision, in the package and in the reference."""

    dense: bool
    estimator: str
    first_order: bool = False
    probes: bool = False
    minibatch: bool = False
    newton: bool = False

    def __str__(self) -> str:
        words = [self.estimator, "dense" if self.dense else "diagonal"]
        words += [name for name in ("minibatch", "newton") if getattr(self, name)]
        return " ".join(words).strip()

    def in_package(self, backend, parts):
        if self.first_order:
            return backend.first_order(self.dense)
        return getattr(backend.gradients, self.estimator)

    def in_reference(self, problem, parts, noise, probes):
        if self.first_order:
            return lambda loc, factor: reference.first_order(problem, loc, factor, parts, noise[0])
        return lambda loc, factor: reference.second_order(problem, loc, factor, parts, noise, probes)


DENSE = Rule(dense=True, estimator="hessian")
DIAGONAL = Rule(dense=False, estimator="hutchinson", probes=True)
NEWTON = replace(DIAGONAL, newton=True)
DENSE_MINIBATCH = Rule(dense=True, estimator="hessian", minibatch=True)
FIRST_ORDER_DENSE = Rule(dense=True, estimator="reparameterized", first_order=True)
FIRST_ORDER_DIAGONAL = Rule(dense=False, estimator="reparameterized", first_order=True)
# Of the start, in units of a well-conditioned matrix: the automatic rate finds its way from where draws go far out, a
# given rate would lose its digits there.
PRECISIONS = {None: 0.05, 0.3: 4.0, 0.05: 4.0}
TRAJECTORIES = [
    *[(DENSE, name, rate) for name in LAYOUTS for rate in (None, 0.3)],
    *[(DIAGONAL, name, rate) for name in ("diagonal", "fixed") for rate in (None, 0.3)],
    (DENSE_MINIBATCH, "dense", None),
    *[(NEWTON, name, None) for name in ("diagonal", "diagonal, several")],
    (replace(NEWTON, minibatch=True), "diagonal", None),
    (FIRST_ORDER_DENSE, "batched dense", 0.05),
    (FIRST_ORDER_DENSE, "mixed", 0.05),
    (FIRST_ORDER_DIAGONAL, "diagonal", 0.05),
]


def reference_trajectory(rule: Rule, problem, parts, rate, state, noise, probes):
    """The last state, and what happened on the way."""
    events = []
    for eps, probe in zip(noise, probes, strict=True):
        estimate_fn = rule.in_reference(problem, parts, eps, probe)
        draws = np.concatenate([eps, -eps])
        state, event = reference.step(
            state, problem, parts, estimate_fn, rate, FIXED_SCALE, draws, rule.minibatch, rule.newton
        )
        events.append(event)
    return state, events


def given_noise(rule: Rule, random, num_steps: int = 10):
    noise = random.normal(size=(num_steps, NUM_PAIRS, 4))
    probes = random.choice([-1.0, 1.0], size=(num_steps, 2 * NUM_PAIRS, 1, 4)) if rule.probes else [None] * num_steps
    return noise, probes


@pytest.mark.parametrize(("rule", "layout", "rate"), TRAJECTORIES, ids=str)
def test_ten_steps_equal_the_reference(backend, rule, layout, rate, random):
    """With draws that start at half of their radius."""
    problem, parts, state = cases.student(), LAYOUTS[layout], start(rule.dense, PRECISIONS[rate], radius=0.5)
    noise, probes = given_noise(rule, random)
    options = {"minibatch": rule.minibatch, "newton": rule.newton}
    stepper = backend.stepper(problem, parts, rule.in_package(backend, parts), rate, **options)
    expected, _ = reference_trajectory(rule, problem, parts, rate, state, noise, probes)
    # ten steps of solves with condition below a thousand
    check_equal(run(stepper, backend, state, noise, probes), expected, rtol=1e-10, atol=1e-10)


def test_the_ten_steps_meet_every_case_of_the_search(random):
    """Otherwise the test above would say nothing of the noise cap, of shorter proposals."""
    noise, probes = given_noise(DENSE, random)
    state = start(precision=PRECISIONS[None], radius=0.5)
    end, events = reference_trajectory(DENSE, cases.student(), LAYOUTS["dense"], None, state, noise, probes)
    assert {event.inside_noise for event in events} == {True, False}
    assert {event.tries > 1 for event in events} == {True, False}
    other, _ = reference_trajectory(DENSE_MINIBATCH, cases.student(), LAYOUTS["dense"], None, state, noise, probes)
    assert other.noisy_steps > end.noisy_steps, "gradients opposed to the last one"
    noise, probes = given_noise(NEWTON, random)
    state = start(dense=False, precision=PRECISIONS[None], radius=0.5)
    end, events = reference_trajectory(NEWTON, cases.student(), LAYOUTS["diagonal"], None, state, noise, probes)
    assert {event.turned for event in events} == {True, False}
    assert end.num_averaged.min() > 0


@pytest.mark.parametrize(
    ("inside", "opposed", "minibatch", "more"),
    [
        (True, True, False, 1.0),
        (True, False, False, -0.5),
        (False, True, False, 0.0),
        (False, False, False, 0.0),
        (False, True, True, 1.0),
        (True, False, True, 0.0),
    ],
)
def test_steps_count_as_noise_while_they_take_back_what_was_done(backend, inside, opposed, minibatch, more):
    rate = backend.module("optim._rate")
    for before in (0.0, 4.0):
        state = backend.state(replace(start(), noisy_steps=before)).rate
        for weight in (1.0, 4.0):  # of the rows of a site that come every fourth step
            flags = (backend.flag(inside), backend.flag(opposed), backend.flag(minibatch))
            after = rate.counted(state, *flags, backend.array(np.array([1.0, 0.0, weight])))
            assert float(after) == max(0.0, before + more / (weight if minibatch else 1.0))


@pytest.mark.parametrize("minibatch", [False, True])
def test_rows_of_a_batch_and_global_coordinates_have_no_curvature_in_common(backend, minibatch):
    """Nothing is left of it between the weights 1 and 3; a scaled site of all data keeps it."""
    problem, parts, gaussian = cases.quadratic(), LAYOUTS["diagonal"], backend.module("optim._gaussian")
    weight = np.array([1.0, 1.0, 3.0, 3.0])
    objective = backend.objective(problem, parts, backend.array(np.zeros((1, 4))), backend.array(weight), minibatch)
    precision, blocks = backend.precision(np.eye(4)), backend.blocks(parts)
    scales = backend.scales(np.eye(4), parts)
    found = backend.gradients.hessian(
        objective, backend.array(np.ones(4)), scales, None, backend.draws(1, None), blocks
    )
    hessian = backend.to_numpy(gaussian.completed(found, precision).hessian)
    expected = backend.to_numpy(found.hessian) / np.maximum(weight[:, None], weight)
    if minibatch:
        expected[:2, 2:] = expected[2:, :2] = 0
    assert_allclose(hessian, expected, rtol=1e-12)
    assert np.abs(expected[:2, :2]).min() > 0


def test_gradients_from_far_away_are_soon_forgotten(backend):
    rate, precision = backend.module("optim._rate"), backend.precision(np.array([1.0, 4.0]))
    average = backend.array(np.array([1e9, 0.0]))
    gradient = np.array([0.0, 2.0])
    average = backend.to_numpy(rate.averaged(average, backend.array(gradient), precision))
    assert_allclose(average, [0.9, 0.2])  # of length √(gᵀ S⁻¹ g) = 1 before


@pytest.mark.parametrize("rate", [0.3, 0.9])
@pytest.mark.parametrize(("rule", "layout"), [(DENSE, "mixed"), (DIAGONAL, "diagonal")], ids=str)
def test_a_step_with_negative_curvature_equals_the_reference(backend, rule, layout, rate, random):
    """Far from the data the Hessian is indefinite and the straight step leaves the domain; both rules reflect it."""
    problem, parts = cases.student(), LAYOUTS[layout]
    state = replace(start(rule.dense, precision=0.01), loc=np.array([5.0, 0.0, 5.0, 0.0]), radius=1 / 32)
    noise, probes = given_noise(rule, random, num_steps=1)
    expected, events = reference_trajectory(rule, problem, parts, rate, state, noise, probes)
    assert events[0].reflected
    stepper = backend.stepper(problem, parts, rule.in_package(backend, parts), rate)
    check_equal(run(stepper, backend, state, noise, probes), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("rule", "layout"), [(DENSE, "mixed"), (NEWTON, "diagonal")], ids=str)
def test_both_packages_take_the_same_ten_steps(both, rule, layout, random):
    problem, parts, state = cases.student(), LAYOUTS[layout], start(rule.dense, precision=0.1)
    noise, probes = given_noise(rule, random)
    ends = [
        run(
            bridge.stepper(problem, parts, rule.in_package(bridge, parts), None, newton=rule.newton),
            bridge,
            state,
            noise,
            probes,
        )
        for bridge in both
    ]
    check_equal(*ends, rtol=1e-8)  # far above rounding, far below any difference in the rule


@rates
def test_diagonal_is_dense_on_a_separable_problem(backend, rate, random):
    """Not a quadratic: the two follow each other step by step, automatic rate and all."""
    problem = cases.PoissonRegression(np.diag([0.5, -1.0, 0.7, 0.3]), np.array([3.0, 0.0, 1.0, 2.0]))
    parts, noise = LAYOUTS["diagonal"], random.normal(size=(6, NUM_PAIRS, 4))
    probes = random.choice([-1.0, 1.0], size=(6, 2 * NUM_PAIRS, 1, 4))
    scales = np.array([1.0, 4.0, 0.5, 2.0])
    stepper = backend.stepper(problem, parts, backend.gradients.hutchinson, rate)
    diagonal = run(stepper, backend, replace(start(), precision=scales), noise, probes)
    stepper = backend.stepper(problem, parts, backend.gradients.hessian, rate)
    dense = run(stepper, backend, replace(start(), precision=np.diag(scales)), noise)
    check_equal(replace(diagonal, precision=np.diag(diagonal.precision)), dense, rtol=1e-12, atol=1e-13)


def test_blocks_are_dense_on_a_problem_of_blocks(backend, random):
    """Two independent pairs of coordinates: one guide of both together, and one of a batch of two."""
    inputs = np.zeros((6, 4))
    inputs[:3, :2], inputs[3:, 2:] = random.normal(size=(2, 3, 2)) / 2
    problem = cases.PoissonRegression(inputs, np.array([1.0, 0.0, 2.0, 3.0, 1.0, 0.0]))
    state, noise = replace(start(), precision=2 * np.eye(4)), random.normal(size=(6, NUM_PAIRS, 4))
    ends = [
        run(backend.stepper(problem, LAYOUTS[name], backend.gradients.hessian, None), backend, state, noise)
        for name in ("dense", "batched dense")
    ]
    check_equal(*ends, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


@some_layouts
def test_tempered_fixed_point(backend, parts, random):
    """E_q[ℓ] − τ H(q): the mean is the optimum and the precision H/τ."""
    problem = cases.quadratic()
    stepper = backend.stepper(problem, parts, backend.gradients.hessian, None, temperature=3.0)
    state = run(stepper, backend, start(), random.normal(size=(2, NUM_PAIRS, 4)))
    assert_allclose(state.loc, problem.optimum, rtol=1e-12)
    assert_allclose(state.precision, problem.matrix / 3, rtol=1e-12, atol=1e-13)
    assert (state.rate, state.rejected) == (1.0, 0)


@some_layouts
def test_the_tempered_loss_keeps_the_entropy_whole(backend, parts, random):
    """L = ℓ/τ − log |C|, which the automatic rate compares between different C."""
    problem, noise = cases.student(), random.normal(size=(NUM_PAIRS, 4))
    stepper = backend.stepper(problem, parts, backend.gradients.hessian, 0.5, temperature=4.0)
    _, estimate, _ = stepper(backend.state(start()), noise)
    factor = reference.factor_of(start().precision, parts, FIXED_SCALE)
    entropy = reference.log_determinant(factor, parts)
    signed = np.concatenate([noise, -noise])
    expected = (reference.losses_at(problem, start().loc, factor, parts, signed) + entropy) / 4 - entropy
    assert_allclose(backend.to_numpy(estimate.losses), expected, rtol=1e-12)


def test_temperature_is_refused_where_the_entropy_is_weighted(backend, random):
    stepper = backend.stepper(
        cases.quadratic(), LAYOUTS["diagonal"], backend.gradients.hessian, 0.5, weight=np.ones(4), temperature=2.0
    )
    with pytest.raises(ValueError, match="temperature != 1 needs a guide without"):
        stepper(backend.state(start()), random.normal(size=(NUM_PAIRS, 4)))


# ---------------------------------------------------------------------------------------------------------------------
# What is not finite


class InfiniteGradient:
    """ℓ = √z₀ + |z|²/2: at z₀ = 0 the loss is finite and its gradient is not."""

    def loss(self, backend, z):
        return backend.xp.sqrt(z[0]) + z @ z / 2


class InfiniteHessian:
    """ℓ = z₀^1.5 + |z|²/2: at z₀ = 0 loss and gradient are finite, and neither the Hessian nor the gradient below 0."""

    def loss(self, backend, z):
        return z[0] ** 1.5 + z @ z / 2


class NotANumber:
    def loss(self, backend, z):
        return backend.xp.log(-1 - z[0] ** 2) + z @ z / 2


def check_untouched(backend, state, before: reference.State, radius: float, skipped: int) -> None:
    """Bit for bit, but for the two things that tell of the failure."""
    after = backend.as_reference(state)
    assert_array_equal(after.loc, before.loc)
    assert_array_equal(after.precision, before.precision)
    assert (after.radius, after.skipped) == (radius, skipped)
    assert (after.rate, after.noisy_steps, after.rejected) == (before.rate, before.noisy_steps, before.rejected)
    assert_array_equal(after.last_gradient, 0)


@rates
@pytest.mark.parametrize("kind", [InfiniteGradient, InfiniteHessian, NotANumber])
def test_what_is_not_finite_moves_nothing(backend, kind, rate, random):
    before = replace(start(), loc=np.array([0.0, -1.0, 0.3, -0.5]), rate=0.7)
    stepper = backend.stepper(kind(), ALL_POINTS, backend.gradients.hessian, rate)
    state = backend.state(before)
    for skipped, radius in ((1, 0.5), (2, 0.25), (3, 0.125)):
        state, _, moved = stepper(state, random.normal(size=(NUM_PAIRS, 4)))
        assert not moved
        check_untouched(backend, state, before, radius, skipped)
        cost = 4 + 1 + (2 * 4 if kind is InfiniteHessian else 0)  # for which differences are tried
        assert float(state.evaluations) == skipped * 2 * NUM_PAIRS * cost, "of Hessians and gradients, no proposal"


@rates
@pytest.mark.parametrize(("dense", "estimator"), [(True, "hessian"), (False, "hutchinson")])
def test_one_bad_draw_is_enough_and_the_next_step_recovers(backend, dense, estimator, rate, random):
    """A draw beyond the edge of the model leaves the step out; the radius comes back by doubling."""
    stepper = backend.stepper(cases.poisson(), LAYOUTS["diagonal"], getattr(backend.gradients, estimator), rate)
    before, noise = start(dense), random.normal(size=(NUM_PAIRS, 4))
    probes = None if dense else random.choice([-1.0, 1.0], size=(2 * NUM_PAIRS, 1, 4))
    bad = noise.copy()
    bad[1] = 1e6  # exp overflows
    state, _, moved = stepper(backend.state(before), bad, probes)
    assert not moved
    check_untouched(backend, state, before, radius=0.5, skipped=1)
    state, _, moved = stepper(state, noise, probes)
    assert moved
    assert not np.array_equal(backend.to_numpy(state.loc), before.loc)
    assert (float(state.radius), int(state.skipped)) == (1.0, 1)


def test_draws_are_taken_within_the_radius(backend, random):
    """With radius r the losses are those at m + r C ε."""
    problem, noise = cases.poisson(), random.normal(size=(NUM_PAIRS, 4))
    stepper = backend.stepper(problem, LAYOUTS["dense"], backend.gradients.hessian, 0.3)
    _, estimate, _ = stepper(backend.state(start(radius=0.125)), noise)
    factor = reference.factor_of(start().precision, LAYOUTS["dense"], FIXED_SCALE) / 8
    signed = np.concatenate([noise, -noise])
    expected = reference.losses_at(problem, start().loc, factor, LAYOUTS["dense"], signed)
    assert_allclose(backend.to_numpy(estimate.losses), expected, rtol=1e-12)


def test_a_search_that_finds_nothing_leaves_the_gaussian_and_shortens_the_rate(backend, random):
    """The loss is finite at the mean and nowhere else, so every proposal is refused."""

    class Needle:
        def loss(self, backend, z):
            away = ((z - backend.array(start().loc)) ** 2).sum()
            return backend.xp.where(away > 0, backend.array(np.nan), z @ z / 2)

    stepper = backend.stepper(Needle(), ALL_POINTS, backend.gradients.hessian, None)
    state, _, moved = stepper(backend.state(start()), random.normal(size=(NUM_PAIRS, 4)))
    assert not moved
    after = backend.as_reference(state)
    assert_array_equal(after.loc, start().loc)
    assert_array_equal(after.precision, start().precision)
    assert (after.rate, after.rejected, after.skipped, after.radius) == (0.4, 1, 0, 1.0)


@pytest.mark.parametrize("rate", [None, 1.0], ids=["automatic", "given"])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000), distance=st.sampled_from([0.1, 3.0, 100.0]), scale=st.sampled_from([1e-4, 1.0, 100.0])
)
def test_no_step_leaves_the_domain(backend, rate, seed, distance, scale):
    """From any start, with any draw, on a problem whose Hessian is indefinite: finite, positive definite, usable."""
    random = np.random.default_rng(seed)
    stepper = cached_stepper(backend, rate)
    precision = cases.positive_definite(seed) / scale**2
    state = backend.state(reference.State(distance * random.normal(size=4), precision))
    for _ in range(3):
        state, _, _ = stepper(state, 3 * random.normal(size=(NUM_PAIRS, 4)))
        after = backend.as_reference(state)
        assert np.isfinite(after.loc).all()
        assert np.linalg.eigvalsh(after.precision).min() > 0
        scales = backend.blr.scales_of(state.precision, backend.blocks(LAYOUTS["dense"]), 1.0)
        assert all(np.isfinite(backend.to_numpy(scale)).all() for scale in scales)


STEPPERS: dict = {}


def cached_stepper(backend, rate):
    """Compiled once for all examples."""
    if (backend.name, rate) not in STEPPERS:
        stepper = backend.stepper(cases.student(), LAYOUTS["dense"], backend.gradients.hessian, rate)
        STEPPERS[backend.name, rate] = stepper
    return STEPPERS[backend.name, rate]


# ---------------------------------------------------------------------------------------------------------------------
# What the loss says nothing about


@rates
@pytest.mark.parametrize(("dense", "estimator"), [(True, "hessian"), (False, "hutchinson")])
def test_a_coordinate_that_the_loss_does_not_depend_on_stays(backend, dense, estimator, rate, random):
    class Half:
        """A quadratic of the first two coordinates."""

        def loss(self, backend, z):
            return (z[0] - 1) ** 2 + 3 * (z[1] + 2) ** 2

    precision = np.array([1.0, 2.0, 3.0, 4.0])
    before = replace(start(), precision=np.diag(precision) if dense else precision)
    stepper = backend.stepper(Half(), LAYOUTS["diagonal"], getattr(backend.gradients, estimator), rate)
    probes = [None] * 4 if dense else random.choice([-1.0, 1.0], size=(4, 2 * NUM_PAIRS, 1, 4))
    state = run(stepper, backend, before, random.normal(size=(4, NUM_PAIRS, 4)), probes)
    kept = np.diagonal(reference.as_matrix(state.precision))
    # (1 − ρ) s + ρ s rounds; nothing else may happen to them
    assert_allclose(kept[2:], precision[2:], rtol=1e-15)
    assert_array_equal(state.loc[2:], before.loc[2:])
    assert (np.abs(state.loc[:2] - [1, -2]) < np.abs(before.loc[:2] - [1, -2])).all()


@pytest.mark.parametrize("parts", [LAYOUTS["diagonal"], LAYOUTS["batched dense"]], ids=["diagonal", "batched dense"])
def test_weights_are_divided_out_and_weight_zero_stays(backend, parts, random):
    """Rows of a subsampled plate: ℓ and the entropy of a row in the batch both count w times; others are not seen."""
    weight = np.array([3.0, 3.0, 0.0, 0.0])
    optimum, matrix = np.array([1.0, -2.0, 7.0, 7.0]), np.zeros((4, 4))
    matrix[:2, :2] = [[2.0, 0.5], [0.5, 1.0]]
    problem = cases.Quadratic(3 * matrix, optimum)
    precision = np.diag([1.0, 2.0, 3.0, 4.0])
    precision[2, 3] = precision[3, 2] = 0.5
    before = replace(start(), precision=precision)
    stepper = backend.stepper(problem, parts, backend.gradients.hessian, None, weight=weight)
    state = run(stepper, backend, before, random.normal(size=(1, NUM_PAIRS, 4)))
    assert_allclose(state.loc[:2], optimum[:2], rtol=1e-13)
    assert_allclose(state.precision[:2, :2], matrix[:2, :2], rtol=1e-13)
    assert_array_equal(state.loc[2:], before.loc[2:])
    assert_array_equal(state.precision[2:, 2:], precision[2:, 2:])
    assert state.rejected == 0


def test_single_precision_stays_single(backend, random):
    class Gaussian:
        def loss(self, backend, z):
            return (z * z).sum() / 2

    blocks = backend.blocks(LAYOUTS["mixed"])
    loc = backend.array(np.ones(4), "float32")
    scales = tuple(backend.array(scale, "float32") for scale in (2 * np.eye(2), 2.0, np.full(1, 2.0)))
    precision = backend.families.DensePrecision.from_scales(blocks, scales, 0.1, like=loc)
    noise = backend.array(random.normal(size=(NUM_PAIRS, 4)), "float32")
    draws = backend.draws(NUM_PAIRS, dtype="float32")
    objective = backend.objective(Gaussian(), LAYOUTS["mixed"], noise)
    step = backend.compiled(
        lambda state: backend.blr.step(state, objective, blocks, None, draws, backend.gradients.hessian, None)
    )
    state, _, moved = step(backend.blr.init(loc, precision))
    assert moved
    arrays = (
        backend.to_numpy(state.loc),
        backend.precision_array(state.precision),
        backend.to_numpy(state.rate.last_gradient),
    )
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}
    assert_allclose(backend.to_numpy(state.loc), 0, atol=1e-6)
