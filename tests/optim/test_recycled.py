"""The automatic step on recycled draws: exact where it can be, safe where it cannot, the same in both packages."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests import cases, reference
from tests.cases import Part

PARTS = (Part(0, (2,), "dense"),)


def started(backend, loc, precision):
    """A state that keeps its draws."""
    made = backend.state(reference.State(loc=np.asarray(loc, float), precision=np.asarray(precision, float)))
    blr, recycled = backend.blr, backend.module("optim._recycled")
    scales = blr.scales_of(made.precision, backend.blocks(PARTS), 1.0)
    return blr.init(made.loc, made.precision, recycled.init(made.loc, scales, 4))


def stepper(backend, loss):
    """(state, noise [K, D], digest) -> (state, loss, moved), for ℓ in the backend's own arrays."""
    blocks, step, xp = backend.blocks(PARTS), backend.module("optim._recycled").step, backend.xp
    extras = backend.gradients.Extras(aux=None)

    def objective(loc, scales, others, draw):
        (scale,) = scales
        value = loss(xp, loc + scale @ draw.noise)
        return value - xp.log(xp.einsum("ii->i", scale)).sum() - (draw.noise**2).sum() / 2, extras

    compiled = backend.compiled(lambda state, noise, digest: step(state, objective, blocks, noise, 1.0, digest))
    return lambda state, noise, digest=0: compiled(state, backend.array(noise), backend.digest(digest))


def quadratic(xp, z):
    return 3 * z[0] ** 2 + z[0] * z[1] + z[1] ** 2 / 2 - 2 * z[0]


def counts(xp, z):
    return xp.exp(z[0] + z[1]) - 3 * z[0] + xp.exp(0.5 * z[0]) - 2 * z[1] + (z**2).sum() / 8


def mean_and_log_variance(xp, z):
    """Of ten numbers around 200 with the variance 1, under a wide prior."""
    return 5 * ((z[0] - 200) ** 2 + 1) * xp.exp(-z[1]) + 5 * z[1] + (z[0] ** 2 + z[1] ** 2) / 2e4


def undefined_beyond_three(xp, z):
    return -xp.log(3 - z[0]) + (z**2).sum() / 2


@pytest.mark.parametrize(("loc", "far_out"), [((5.0, -3.0), 1.0), ((0.4, -0.4), 4.0)], ids=["far", "a rare pair"])
def test_one_step_on_a_quadratic_is_exact_from_a_single_pair(backend, loc, far_out, random):
    """Also beside the optimum and of a pair four standard deviations out, whose losses there are larger than before."""
    step, state = stepper(backend, quadratic), started(backend, loc, 100 * np.eye(2))
    state, _, moved = step(state, far_out * np.sign(random.normal(size=(4, 2))))
    hessian = np.array([[6.0, 1.0], [1.0, 1.0]])
    assert bool(moved)
    assert_allclose(backend.precision_array(state.precision), hessian, rtol=1e-10)
    assert_allclose(backend.to_numpy(state.loc), np.linalg.solve(hessian, [2.0, 0.0]), rtol=1e-10)
    # a pair of Hessians and gradients, and the losses of one proposal
    assert float(state.evaluations) == 2 * (2 + 1) + 2


def test_the_rate_that_was_taken_is_kept_beside_the_next_one(backend, random):
    """Under the cap of eight noisy steps, 2/(8 + 2 − 3/2) for draws that are worth one step's: S ← (1 − ρ) S + ρ H."""
    step, state = stepper(backend, quadratic), started(backend, [5.0, -3.0], 100 * np.eye(2))
    assert np.isnan(float(state.rate.taken))
    rate = replace(state.rate, noisy_steps=backend.scalar(8, state.rate.noisy_steps))
    state, _, moved = step(replace(state, rate=rate), random.normal(size=(4, 2)))
    assert bool(moved)
    cap = 2 / 8.5
    assert_allclose([float(state.rate.taken), float(state.rate.rate)], [cap, 1.7 * cap], rtol=1e-14)
    expected = (1 - cap) * 100 * np.eye(2) + cap * np.array([[6.0, 1.0], [1.0, 1.0]])
    assert_allclose(backend.precision_array(state.precision), expected, rtol=1e-12)


def test_the_fixed_point_is_reached_and_the_error_falls_with_the_draws(backend):
    """Against Gauss–Hermite quadrature: E_q[∇ℓ] = 0 and E_q[∇²ℓ] = S."""
    step, state = stepper(backend, counts), started(backend, [0.0, 0.0], 100 * np.eye(2))
    generator = np.random.default_rng(2)
    for count in range(60):
        state, *_ = step(state, generator.normal(size=(4, 2)))
        if count == 20:
            early = float(state.error)
    assert float(state.error) < early / 2
    loc, matrix = backend.to_numpy(state.loc), backend.precision_array(state.precision)
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    weight = np.outer(weights, weights).reshape(-1) / weights.sum() ** 2
    z = loc + grid @ np.linalg.cholesky(np.linalg.inv(matrix)).T
    both, first = np.exp(z.sum(1)), np.exp(0.5 * z[:, 0])
    gradient = np.stack([both - 3 + 0.5 * first, both - 2], -1) + z / 4
    hessian = both[:, None, None] * np.ones((2, 2)) + 0.25 * np.eye(2)
    hessian[:, 0, 0] += 0.25 * first
    residual = weight @ gradient
    # the optimum is met to within a hundredth of a nat: r² / 2, and a Hessian within a few per cent
    assert residual @ np.linalg.solve(matrix, residual) / 2 < 0.01
    assert_allclose(np.einsum("n,nij->ij", weight, hessian), matrix, rtol=0.05)


def test_a_draw_without_a_finite_loss_moves_nothing_and_brings_the_next_ones_closer(backend):
    step, state = stepper(backend, undefined_beyond_three), started(backend, [2.9, 0.0], np.eye(2))
    noise = np.array([[5.0, 0.1]] * 4)
    after, _, moved = step(state, noise)
    assert not bool(moved)
    assert int(after.skipped) == 1 and float(after.radius) == 0.5
    assert int(after.recycling.pool.count) == 0, "nothing that is not finite is kept"
    assert float(after.evaluations) == 2 * (2 + 1), "a pair of Hessians and gradients was evaluated all the same"
    assert_allclose(backend.to_numpy(after.loc), [2.9, 0.0], rtol=0)
    for _ in range(60):
        after, *_ = step(after, np.array([[0.5, -0.3]] * 4))
    assert np.isfinite(backend.to_numpy(after.loc)).all() and backend.to_numpy(after.loc)[0] < 1


def two_slopes(xp, z):
    """A Poisson regression on a covariate of −40 to 60: what one datum gains, others lose."""
    return xp.exp(z[0] + 60 * z[1]) + xp.exp(z[0] + 50 * z[1]) + xp.exp(z[0] - 40 * z[1]) - 3 * z[0] + (z**2).sum() / 8


def valley(xp, z):
    """A quadratic of condition 1e8."""
    return 1e8 * (z[0] - z[1]) ** 2 + (z[1] - 1) ** 2


def test_no_steps_on_the_pool_alone_where_the_rate_averages_noise_away(backend):
    """A Gaussian beside the fixed point of its draws, all of them good there: it moves by what the cap leaves it."""
    step, state = stepper(backend, counts), started(backend, [0.0, 0.0], np.eye(2))
    random = np.random.default_rng(0)
    for _ in range(30):
        state, *_ = step(state, random.normal(size=(4, 2)))
    settled = backend.to_numpy(state.loc)
    beside = replace(state, loc=backend.array(settled + 0.05))
    moved = {}
    for noisy_steps in (0, 10**7):
        rate = replace(state.rate, noisy_steps=backend.scalar(noisy_steps, state.rate.noisy_steps))
        after, *_ = step(replace(beside, rate=rate), random.normal(size=(4, 2)))
        moved[noisy_steps] = np.abs(backend.to_numpy(after.loc) - settled - 0.05).max()
    assert moved[0] > 0.02 and 0 < moved[10**7] < 1e-4


COVARIATE = np.random.default_rng(30).normal(size=40)
SEPARATED = np.where(COVARIATE > 0.1, 1.0, -1.0)[:, None] * np.stack([np.ones(40), COVARIATE], axis=1)


def heavy_tail(xp, z):
    """A logistic regression on classes that a line parts, under Cauchy priors: a wider q sees steeper slopes."""
    margins = xp.asarray(SEPARATED) @ z
    return xp.log(1 + xp.exp(-margins)).sum() + xp.log(1 + (z / 2.5) ** 2).sum()


def test_no_circle_around_the_fixed_point_of_a_heavy_tail(backend):
    """The slope of S ↦ Ĥ is below −3 there: at ρ = 1/2 the scales change by a third every step, and by e⁵ at times."""
    step, state = stepper(backend, heavy_tail), started(backend, [0.0, 0.0], np.eye(2))
    random, changes = np.random.default_rng(1), []
    for number in range(60):
        before = backend.precision_array(state.precision)
        state, *_ = step(state, random.normal(size=(4, 2)))
        ratio = np.linalg.eigvals(np.linalg.solve(before, backend.precision_array(state.precision)))
        changes += [np.abs(np.log(ratio.real)).max()] if number >= 30 else []
    assert np.median(changes) < 0.1


def test_a_pair_that_explodes_is_no_noise(backend):
    """Of two pairs of which one gets worse the standard error exceeds the mean, however much worse it gets."""
    not_worse, xp = backend.module("optim._rate").not_worse, backend.xp
    every_pair = (xp.ones(2, dtype=bool),) if "taken" in inspect.signature(not_worse).parameters else ()

    def accepted(change):
        after = backend.array(np.array([[change, change], [-1.0, -1.0]]))
        return bool(not_worse(backend.array(np.zeros((2, 2))), after, 8.4, *every_pair))

    assert accepted(0.5) and accepted(10.0)
    assert not accepted(1e3) and not accepted(1e257)


def test_a_start_without_a_finite_loss_is_left_towards_the_origin(backend, random):
    """The seventh step and every one after it halve the mean: 12, 6, 3, 1.5, where the loss is defined again."""
    step, state = stepper(backend, undefined_beyond_three), started(backend, [12.0, 0.0], 100 * np.eye(2))
    for count in range(10):
        state, *_ = step(state, random.normal(size=(4, 2)))
        expected = 12.0 / 2 ** max(count - 5, 0)
        assert_allclose(backend.to_numpy(state.loc), [expected, 0.0], rtol=0, err_msg=str(count))
        if expected < 3:
            break
    assert int(state.skipped) == count + 1
    for _ in range(20):
        state, *_ = step(state, random.normal(size=(4, 2)))
    assert int(state.skipped) == count + 1 and float(state.radius) == 1
    assert float(state.residual) < 0.1


def test_the_slopes_of_exponentials_are_left_in_a_few_steps(backend):
    """From ℓ = e¹²⁰ or e²⁰⁰ to the optimum, where a step of the rule is one unit of z₀ + 60 z₁, or of z₀."""

    def one_slope(xp, z):
        return xp.exp(z[0]) - 3 * z[0] + (z**2).sum() / 8

    generator = np.random.default_rng(3)
    for loss, start in ((two_slopes, [0.5, 2.0]), (one_slope, [200.0, 0.0])):
        step, state = stepper(backend, loss), started(backend, start, 100 * np.eye(2))
        for _ in range(33):
            state, value, _ = step(state, generator.normal(size=(4, 2)))
        assert float(state.residual) < 1 and float(state.radius) == 1
        assert float(value) < 10
        assert int(state.skipped) == 0


def test_a_quadratic_is_one_step_from_however_far(backend, random):
    """r² is 1e27 at the start, where others are left down log L; a step of the rule is exact but for rounding.

    It starts anew there, and finds the precision in the next step.
    """
    step, state = stepper(backend, valley), started(backend, [1e6, -1e6], 100 * np.eye(2))
    state, *_ = step(state, random.normal(size=(4, 2)))
    assert_allclose(backend.to_numpy(state.loc), [1.0, 1.0], atol=1.0)
    assert_allclose(backend.precision_array(state.precision), 100 * np.eye(2), rtol=0)
    assert float(state.evaluations) == 2 * (2 + 1) + 2 * 4, (
        "the losses at the old mean, at the new one twice, and downhill"
    )
    state, *_ = step(state, random.normal(size=(4, 2)))
    assert_allclose(backend.to_numpy(state.loc), [1.0, 1.0], atol=1e-6)
    assert_allclose(backend.precision_array(state.precision), 2e8 * np.array([[1, -1], [-1, 1 + 1e-8]]), rtol=1e-6)


def test_a_mean_is_heard_before_the_noise_has_grown(backend, random):
    """A step of the rule moves log variance by one and the mean, on which it leaves no pull, by next to nothing."""
    step, state = stepper(backend, mean_and_log_variance), started(backend, [0.0, 0.0], 100 * np.eye(2))
    state = replace(state, rate=replace(state.rate, rate=0.25 * state.rate.rate))  # which is that of the rule
    state, *_ = step(state, random.normal(size=(4, 2)))
    mean, log_variance = backend.to_numpy(state.loc)
    assert abs(mean - 200) < 0.1 and log_variance == 0
    # a pair of Hessians and gradients, and the losses of one proposal
    assert float(state.evaluations) == 2 * (2 + 1) + 2
    for _ in range(20):
        state, *_ = step(state, random.normal(size=(4, 2)))
    mean, log_variance = backend.to_numpy(state.loc)
    assert abs(mean - 200) < 0.1 and abs(log_variance) < 0.3

    # where the mean is right and its noise far too small, the rule is taken, at the cost of one look
    state, *_ = step(started(backend, [200.0, -8.0], 100 * np.eye(2)), random.normal(size=(4, 2)))
    mean, log_variance = backend.to_numpy(state.loc)
    assert abs(mean - 200) < 0.1 and -7.5 < log_variance < -6
    assert float(state.evaluations) == 2 * (2 + 1) + 2 * 2 and float(state.rate.rate) == 1


def test_a_step_of_the_rule_is_shortened_where_the_mean_alone_gains_little(backend, random):
    """Beyond −7.5 there is a wall; the mean is a tenth of a thousandth off, and half of the loss is the noise's."""

    def before_a_wall(xp, z):
        return mean_and_log_variance(xp, z) + xp.exp(30 * (z[1] + 7.5))

    step, state = stepper(backend, before_a_wall), started(backend, [200.0001, -8.0], 1e4 * np.eye(2))
    state, *_ = step(state, random.normal(size=(4, 2)))
    assert -7.9 < float(state.loc[1]) < -7.5


def test_a_shorter_rate_asks_for_no_more_draws_and_a_step_that_finds_none_does(backend, random):
    step, state = stepper(backend, counts), started(backend, [-3.0, -1.0], np.eye(2))
    state, _, moved = step(state, random.normal(size=(4, 2)))
    assert bool(moved) and float(state.rate.taken) < 1, "too far at ρ = 1"
    assert int(state.recycling.num_pairs) == 1

    def ends_at_zero(xp, z):
        return xp.where(z[0] < 0, np.inf, 5 * z[0] + (z**2).sum() / 2)

    step, state = stepper(backend, ends_at_zero), started(backend, [0.0, 1.0], np.eye(2))
    along_the_edge = np.array([[0.0, 0.3]] * 2)
    for num_pairs in (2, 2):
        state, _, moved = step(state, along_the_edge)
        assert not bool(moved) and int(state.skipped) == 0
        assert int(state.recycling.num_pairs) == num_pairs, "up to as many as there is noise for"


def test_pairs_that_are_worth_no_more_than_the_last_ask_for_more(backend, random):
    """On a way on which no draw is of use to the next step, one pair says nothing of its error."""

    def slope(xp, z):
        return 40 * z[0] + 40 * xp.exp(z[0] / 40) + z[1] ** 2 / 2

    step, state = stepper(backend, slope), started(backend, [100.0, 0.0], np.eye(2))
    drawn = []
    for _ in range(18):
        state, *_ = step(state, random.normal(size=(4, 2)), digest=7)
        drawn.append(int(state.recycling.num_pairs))
    assert drawn[:15] == [1] * 15 and drawn[-1] > 1


@pytest.mark.parametrize(
    ("loss", "loc"),
    [
        pytest.param(quadratic, [0.4, -0.2], marks=pytest.mark.slow),
        (counts, [0.4, -0.2]),
        (undefined_beyond_three, [2.95, 0.0]),
        (two_slopes, [0.5, 2.0]),
        (mean_and_log_variance, [0.0, 0.0]),
    ],
)
def test_both_packages_take_the_same_steps(both, loss, loc):
    """Steps that are refused, and what they cost, among them."""
    generator = np.random.default_rng(6)
    noise = generator.normal(size=(15, 4, 2))
    states = []
    for bridge in both:
        step, state = stepper(bridge, loss), started(bridge, loc, 25 * np.eye(2))
        for one in noise:
            state, *_ = step(state, one)
        states.append(state)
    first, second = states
    assert_allclose(both[0].to_numpy(first.loc), both[1].to_numpy(second.loc), rtol=1e-9, atol=1e-12)
    arrays = [bridge.precision_array(state.precision) for bridge, state in zip(both, states, strict=True)]
    assert_allclose(arrays[0], arrays[1], rtol=1e-9)
    for name in ("evaluations", "residual", "error"):
        assert_allclose(float(getattr(first, name)), float(getattr(second, name)), rtol=1e-6, atol=1e-12)
    assert int(first.recycling.num_pairs) == int(second.recycling.num_pairs)
    assert int(first.skipped) == int(second.skipped)
    assert (int(first.skipped) > 0) == (loss is undefined_beyond_three)


def test_draws_of_other_arguments_are_forgotten(backend, random):
    """A step that takes back what the last one did is then noise, as between minibatches."""
    step, state = stepper(backend, counts), started(backend, [0.0, 0.0], 100 * np.eye(2))
    for _ in range(3):
        state, *_ = step(state, random.normal(size=(4, 2)), digest=7)
    assert int(state.recycling.pool.count) >= 3
    num_pairs, noisy_steps = int(state.recycling.num_pairs), int(state.rate.noisy_steps)
    for sign in (1, -1):
        gradient = backend.array(sign * np.asarray(backend.to_numpy(state.rate.last_gradient)))
        before = replace(state, rate=replace(state.rate, last_gradient=gradient))
        after, *_ = step(before, random.normal(size=(4, 2)), digest=8)
        assert int(after.recycling.pool.count) == num_pairs
        opposed = int(after.rate.noisy_steps) - noisy_steps
        found = backend.to_numpy(after.rate.last_gradient) @ np.linalg.solve(
            backend.precision_array(before.precision), backend.to_numpy(gradient)
        )
        assert opposed == (found < 0)


def location(host):
    def model(y):
        center = host.sample("center", host.dist.Normal(host.array(0.0), 10.0))
        with host.scale(400 / len(y)), host.plate("data", len(y)):
            host.sample("y", host.dist.Normal(center, 1.0), obs=y)

    return model


def test_data_may_change_between_steps(backend, random):
    """Other data for good, and then a minibatch at every step, of which no plate speaks."""
    first = random.normal(size=400) + 3.0
    second = first + 0.07  # 1.4 standard deviations of the posterior: what was drawn for the first still has weight
    fit = backend.start(location, cases.MEAN_FIELD.make, (first,)).run(20)
    fit.args = (backend.argument(second),)
    ((loc, _),) = fit.run(10).gaussians().values()
    assert_allclose(loc, second.sum() / 400.01, rtol=1e-8)
    errors = []
    for _ in range(150):
        fit.args = (backend.argument(random.choice(second, 25)),)
        ((loc, _),) = fit.run(1).gaussians().values()
        errors.append(float(np.ravel(loc)[0]) - second.mean())
    assert np.abs(errors[-50:]).mean() < 0.06, "the mean of a batch is off by 0.2"


def test_what_is_not_one_density_at_all_draws_is_not_recycled(backend):
    """Several particles, an analytic KL, a given rate: the rule without the pool."""
    observed = (np.array([1.0, 2.0, 0.5]),)

    def make_model(host):
        def model(y):
            rate = host.sample("log_rate", host.dist.Normal(host.array(0.0), 1.0))
            with host.plate("data", len(y)):
                host.sample("y", host.dist.Normal(rate, 1.0), obs=y)

        return model

    def keeps_draws(loss=None, **options):
        fit = backend.start(make_model, cases.MEAN_FIELD.make, observed, loss=loss, **options)
        return fit.first_gaussian_state().recycling is not None

    assert keeps_draws()
    assert not keeps_draws(learning_rate=0.5)
    assert not keeps_draws(loss=backend.loss(num_particles=2))
    assert not keeps_draws(loss=backend.loss("TraceMeanField_ELBO"))
