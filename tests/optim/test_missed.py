"""Curvature that the Hessians at the draws miss: when a step does, when secants are taken instead, and the gain."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
from numpy.testing import assert_allclose

from tests import cases, reference
from tests.optim.test_recycled import PARTS
from tests.stock_guides import test_kinks
from tests.stock_guides.test_kinks import counts_model, data, written_out_model


def fresh(backend, secants=False):
    """Nothing missed so far, or just turned to secants."""
    module = backend.module("optim._missed")
    state = module.init(backend.array(np.zeros(2))) if backend.name == "numpyro" else module.init()
    return replace(state, secants=backend.scalar(secants, state.secants))


def misses(backend, traces, chords, secants=False) -> bool:
    arrays = [backend.array(np.asarray(values, float)) for values in (traces, chords)]
    there = [backend.array(np.full(len(traces), True))] if backend.name == "numpyro" else []
    return bool(backend.module("optim._missed").misses(fresh(backend, secants), *arrays, 20, *there))


@pytest.mark.parametrize(
    ("traces", "chords", "missed"),
    [
        ([3.0, 3.0, 3.0, 3.0], [0.5, 9.0, 2.0, 4.0], False),  # a quadratic, of three coordinates
        ([0.01, 0.02, 0.1, 12.0], [3.0, 2.0, 4.0, 3.0], True),  # most draws have none, and one has all
        ([0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 2.0, 3.0], True),  # a kink
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], False),  # a slope
        ([0.8, 0.9, 0.8, 0.9], [3.0, 3.0, 3.0, 3.0], False),  # more than a quarter
        ([-2.0, -2.0, -2.0, -2.0], [-2.0, -3.0, -1.0, -2.0], False),  # the top of a hill
    ],
)
def test_a_step_misses_curvature_of_which_most_draws_have_next_to_nothing(backend, traces, chords, missed):
    assert misses(backend, traces, chords) == missed


@pytest.mark.parametrize(
    ("traces", "chords", "missed"),
    [
        ([3.0, 3.0, 3.0, 3.0], [0.5, 9.0, 2.0, 4.0], False),
        ([2.0, 9.0, 30.0, 4.0], [9.0, 11.0, 9.0, 11.0], False),  # the least has a fifth
        ([1.9, 9.0, 30.0, 4.0], [9.0, 11.0, 9.0, 11.0], True),
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], False),  # a twentieth of that of the fixed point, 20
        ([0.9, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9], True),  # no more than the prior's
        ([0.0, 0.0, 0.0, 0.0], [2.0, 1.0, 2.0, 3.0], True),
    ],
)
def test_a_look_shows_curvature_if_every_pair_has_some(backend, traces, chords, missed):
    assert misses(backend, traces, chords, secants=True) == missed


@pytest.mark.parametrize("secants", [False, True])
def test_pairs_that_are_not_there_do_not_count(numpyro_bridge, secants):
    traces, chords = map(numpyro_bridge.array, (np.array([0.6, 2.0, 0.0]), np.array([2.0, 2.0, 1e9])))
    there = numpyro_bridge.array(np.arange(3) < 2)
    assert not bool(
        numpyro_bridge.module("optim._missed").misses(fresh(numpyro_bridge, secants), traces, chords, 2, there)
    )


@pytest.mark.parametrize(
    ("steps", "secants"), [("111", False), ("1111", True), ("11110000", True), (9 * "10000000", False)]
)
def test_a_fifth_of_the_last_steps_is_enough(backend, steps, secants):
    assert bool(followed(backend, fresh(backend), steps)[0].secants) == secants


def followed(backend, state, steps):
    """The state after `steps` that missed curvature, 1, or did not; and which were by Hessians, by secants, a look."""
    ways = ""
    for missed in steps:
        ways += "l" if bool(state.look) else "s" if bool(state.secants) else "h"
        state = backend.module("optim._missed").after(state, backend.array(np.array(missed == "1")))
    return state, ways


def test_every_sixth_step_of_secants_is_a_look_and_more_while_it_shows_curvature(backend):
    state, ways = followed(backend, fresh(backend, secants=True), 5 * "0" + "1" + 5 * "0" + "0" + "01" + "00")
    assert ways == "sssssl" + "sssssl" + "sl" + "ss"
    assert bool(state.secants) and int(state.shown) == 0


def test_four_looks_in_a_row_that_show_curvature_bring_hessians_back(backend):
    state = fresh(backend, secants=True)
    state, ways = followed(backend, state, 12 * "0")
    assert ways == "sssssl" + 3 * "sl" and not bool(state.secants)
    assert (float(state.share), int(state.shown), int(state.needed)) == (0, 0, 16)
    state, ways = followed(backend, state, "1111")  # and when they miss it again, it takes sixteen
    assert ways == "hhhh" and bool(state.secants)
    state, ways = followed(backend, state, (6 + 14 * 2) * "0")
    assert bool(state.secants) and int(state.shown) == 15
    assert not bool(followed(backend, state, "00")[0].secants)


NOISE = np.random.default_rng(0).normal(size=(4, 2))


def kinks(xp, z):
    return 5 * xp.abs(z).sum() + (z**2).sum() / 20


def after_a_step(backend, num_pairs, share, loss=kinks, look=None):
    """The state after one step from N(0, I), where that share of the last steps missed curvature.

    `look`: the step is one, of secants, after so many that showed the curvature.
    """
    blocks, rule = backend.blocks(PARTS), backend.module("optim._recycled")
    extras, xp = backend.gradients.Extras(aux=None), backend.xp

    def objective(loc, scales, others, draw):
        value = loss(xp, loc + scales[0] @ draw.noise)
        return value - xp.log(xp.einsum("ii->i", scales[0])).sum() - (draw.noise**2).sum() / 2, extras

    made = backend.state(reference.State(loc=np.zeros(2), precision=np.eye(2)))
    scales = backend.blr.scales_of(made.precision, blocks, 1.0)
    state = backend.blr.init(made.loc, made.precision, rule.init(made.loc, scales, 4, may_miss=True))
    missed = replace(state.recycling.missed, share=backend.scalar(share, state.recycling.missed.share))
    if look is not None:
        now = {"secants": True, "wait": 0, "shown": look}
        missed = replace(missed, **{name: backend.scalar(value, getattr(missed, name)) for name, value in now.items()})
    pairs = backend.scalar(num_pairs, state.recycling.num_pairs)
    state = replace(
        state,
        rate=replace(state.rate, noisy_steps=backend.scalar(9.0, state.rate.noisy_steps)),
        recycling=replace(state.recycling, missed=missed, num_pairs=pairs),
    )
    noise, chords = backend.array(NOISE), None
    if look is not None or backend.name == "numpyro":  # whose program has both ways in it
        chords = backend.module("gradients.secant").chords(backend.source_of_noise(0), 4, 2, made.loc)
    step = backend.compiled(
        lambda state: rule.step(state, objective, blocks, noise, 1.0, backend.digest(0), chords=chords)
    )
    return step(state)[0]


def test_both_traces_are_those_of_a_quadratic(backend, monkeypatch):
    """t = tr H at every pair of N(0, I), and u = εᵀ H ε."""
    module, along = backend.module("optim._missed"), 3 * NOISE[:, 0] ** 2 + NOISE[:, 1] ** 2

    def exact(_, traces, chords, size, *there):
        same = (abs(traces - 4).max() < 1e-12) & (abs(chords - backend.array(along)).max() < 1e-12)
        return same if there else bool(same)

    monkeypatch.setattr(module, "misses", exact)
    state = after_a_step(backend, 4, 0.0, lambda xp, z: 1.5 * z[0] ** 2 + 0.5 * z[1] ** 2)
    assert float(state.recycling.missed.share) == 1 / 16


def test_with_the_turn_to_secants_the_rule_begins_anew(backend):
    """Without the draws that miss the curvature, and without the noise that shortened the rate."""
    turned, going_on = after_a_step(backend, 4, 0.19), after_a_step(backend, 4, 0.1)
    assert_allclose(float(turned.recycling.missed.share), 0.19 + 0.81 / 16)
    assert bool(turned.recycling.missed.secants) and not bool(going_on.recycling.missed.secants)
    assert (int(turned.recycling.pool.count), int(going_on.recycling.pool.count)) == (0, 4)
    assert float(turned.rate.noisy_steps) == 0 and float(turned.rate.rate) == 1
    assert float(going_on.rate.noisy_steps) >= 9


@pytest.mark.slow_to_compile
def test_with_the_turn_back_it_begins_anew_as_well(backend):
    def bowl(xp, z):
        return (z**2).sum()

    back, going_on = (after_a_step(backend, 4, 0.0, bowl, look) for look in (3, 2))
    assert not bool(back.recycling.missed.secants) and bool(going_on.recycling.missed.secants)
    assert (int(back.recycling.pool.count), int(going_on.recycling.pool.count)) == (0, 4)
    assert float(back.rate.noisy_steps) == 0 and float(going_on.rate.noisy_steps) >= 9


def test_what_a_look_sees_is_not_kept(backend):
    """Of Hessians without the kinks the estimate would be too flat by their share, for ever."""
    state = after_a_step(backend, 4, 0.0, kinks, 3)
    assert int(state.recycling.missed.shown) == 0 and int(state.recycling.pool.count) == 4
    hessians = np.asarray(state.recycling.pool.hessians[:4]).reshape(4, 2, 2, 2)
    assert (np.trace(hessians, axis1=2, axis2=3).mean(1) > 1).all()  # 0.2 by Hessians
    assert float(state.evaluations) == 4 * 2 * ((2 * 2 + 1) + (2 + 1) + 1)  # secants, Hessians and losses of a proposal


@pytest.mark.parametrize("look", [None, 3])
def test_a_step_of_one_pair_says_nothing(backend, look):
    share = 0.19 if look is None else 0.0
    missed = after_a_step(backend, 1, share, look=look).recycling.missed
    assert float(missed.share) == share and bool(missed.secants) == (look is not None)
    assert look is None or (int(missed.shown), int(missed.wait)) == (3, 0)


@pytest.mark.slow
def test_where_nothing_is_missed_steps_are_those_of_hessians(backend):
    """Classes that overlap, number for number and gradient for gradient."""
    x, y = data()
    args = x, 1.0 * (x[:, 0] + y > 0)
    found, expected = (
        backend.start(classes_model(3.0), cases.FULL_RANK.make, args, **options).run(25)
        for options in ({}, {"estimator": "hessian"})
    )
    assert not bool(found.optimizer_state.secants)
    assert found.optimizer_state.gaussian.recycling.missed is not None
    assert expected.optimizer_state.gaussian.recycling.missed is None
    assert_allclose(found.losses, expected.losses, rtol=1e-9)
    assert float(found.gaussian_state().evaluations) == float(expected.gaussian_state().evaluations)


@pytest.mark.slow
def test_kinks_of_ones_own_are_found_on_the_way_and_across_a_stop(backend):
    straight = backend.start(written_out_model, cases.MEAN_FIELD.make, data()).run(30)
    losses = list(straight.losses)
    ((loc, covariance),) = straight.gaussians().values()
    gap = test_kinks.negative_elbo("median", loc, np.linalg.cholesky(covariance)) - test_kinks.best("median", False)
    assert bool(straight.optimizer_state.secants) and -1e-4 < gap < 0.02
    with pytest.raises(ValueError, match="made of Hessians, which do not know the curvature"):
        straight.contributions()

    stopped = backend.start(written_out_model, cases.MEAN_FIELD.make, data())
    for _ in range(30):
        stopped = stopped.run(1).stopped_and_resumed()  # at every share of steps that missed some
    assert_allclose(stopped.losses, losses, rtol=1e-9)


def classes_model(prior_scale):
    """Logistic regression."""

    def make(host):
        def model(x, y):
            weights = host.sample("weights", host.dist.Normal(host.xp.zeros(x.shape[1]), prior_scale).to_event(1))
            logits = (2 * y - 1) * (x * weights).sum(-1)
            host.factor("y", -host.xp.logaddexp(host.xp.zeros_like(logits), -logits).sum())

        return model

    return make


SIZE, WIDE = 5, 1000.0


@functools.cache
def separated() -> tuple[np.ndarray, np.ndarray]:
    """Classes on either side of a plane."""
    random = np.random.default_rng(0)
    x, normal = random.normal(size=(50, SIZE)), random.normal(size=SIZE)
    return x, 1.0 * (x @ normal > 0)


def negative_elbo(loc: np.ndarray, factor: np.ndarray) -> float:
    """By quadrature, a sum over data of expectations in one dimension; `factor` is C."""
    x, y = separated()
    sides = x * (2 * y - 1)[:, None]
    nodes = np.linspace(-9, 9, 4001)
    weights = np.exp(-(nodes**2) / 2) / np.exp(-(nodes**2) / 2).sum()
    logits = (sides @ loc)[:, None] + np.linalg.norm(sides @ factor, axis=1)[:, None] * nodes
    prior = ((loc**2).sum() + (factor**2).sum()) / (2 * WIDE**2) + SIZE * np.log(WIDE) - SIZE / 2
    return (np.logaddexp(0, -logits) @ weights).sum() + prior - np.log(np.abs(np.diagonal(factor))).sum()


@functools.cache
def least() -> float:
    """Of all Gaussians, in units of the prior's scale."""
    rows, columns = np.tril_indices(SIZE)
    x, y = separated()
    direction = np.linalg.lstsq(x, 2 * y - 1, rcond=None)[0]

    def objective(at):
        factor = np.zeros((SIZE, SIZE))
        factor[rows, columns] = at[SIZE:]
        return negative_elbo(WIDE * at[:SIZE], WIDE * factor)

    start = np.concatenate([0.6 * direction / np.linalg.norm(direction), 0.2 * np.eye(SIZE)[rows, columns]])
    return scipy.optimize.minimize(objective, start, method="BFGS").fun


@pytest.mark.slow
def test_separated_classes_under_a_wide_prior(backend):
    """The likelihood bends where few draws lie; by Hessians alone the gap is 5 to 22 nats over seeds (NumPyro)."""
    fit = backend.start(classes_model(WIDE), cases.FULL_RANK.make, separated()).run(120)
    assert bool(fit.optimizer_state.secants)
    ((loc, covariance),) = fit.gaussians().values()
    assert -1e-4 < negative_elbo(loc, np.linalg.cholesky(covariance)) - least() < 2


@functools.cache
def steep() -> tuple[np.ndarray, np.ndarray]:
    """Classes that overlap, by columns up to 10⁶ in size: the Hessian has a condition of 10¹²."""
    random = np.random.default_rng(0)
    axes, _ = np.linalg.qr(random.normal(size=(8, 8)))
    x = random.normal(size=(60, 8)) @ (axes * np.logspace(0, 6, 8)) @ axes.T
    logits = x @ random.normal(size=8)
    return x, 1.0 * (random.uniform(size=60) < 1 / (1 + np.exp(-3 * logits / logits.std())))


@pytest.mark.slow
def test_hessians_are_back_where_curvature_was_missed_for_the_distance_alone(backend):
    """From a start at which every draw is far from where the likelihood bends.

    By secants alone the gap is 1,476 nats after as many steps in NumPyro, 20 in Pyro.

    The negative ELBO is convex in the mean and the scales (Challis & Barber 2013), and a point at which its gradient
    vanishes is the optimum: from there it is r²/2 + Σ (σ² E_q[h] − 1)²/4, to second order.
    """
    (x, y), fit = steep(), backend.start(classes_model(1.0), cases.MEAN_FIELD.make, steep()).run(20)
    assert bool(fit.optimizer_state.secants)
    fit = fit.run(130)
    missed = fit.optimizer_state.gaussian.recycling.missed
    assert not bool(missed.secants) and int(missed.needed) == 16

    ((loc, covariance),) = fit.gaussians().values()
    variance = np.diag(covariance)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    logits = (x @ loc)[:, None] + np.sqrt(x**2 @ variance)[:, None] * nodes
    likely = 1 / (1 + np.exp(-logits))
    mean, bend = (values @ weights / weights.sum() for values in (likely, likely * (1 - likely)))
    gradient, hessian = x.T @ (mean - y) + loc, (x.T * bend) @ x + np.eye(8)
    factor = np.sqrt(np.diag(hessian))  # whose equilibration leaves digits to solve with
    residual = (gradient / factor) @ np.linalg.solve(hessian / np.outer(factor, factor), gradient / factor)
    assert residual / 2 + ((variance * np.diag(hessian) - 1) ** 2).sum() / 4 < 0.2


def affine_model(host):
    def model(x, y):
        weights = host.sample("weights", host.dist.Normal(host.xp.zeros(3), 1.0).to_event(1))
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Normal((x * weights).sum(-1), 1.0), obs=y)

    return model


@pytest.mark.parametrize(
    ("make", "options", "asks"),
    [
        (affine_model, {}, False),
        (counts_model, {}, False),
        (written_out_model, {}, True),
        (written_out_model, {"estimator": "hessian"}, False),
        (classes_model(1.0), {}, True),
        (classes_model(1.0), {"learning_rate": 0.1}, None),
    ],
    ids=["quadratic", "counts", "an absolute value", "Hessians by choice", "classes", "a given rate"],
)
def test_a_program_asks_only_where_curvature_may_be_in_narrow_places(numpyro_bridge, make, options, asks):
    """Since XLA takes longer over both ways to it; in Pyro there is nothing to save."""
    x, y = data()
    fit = numpyro_bridge.start(make, cases.MEAN_FIELD.make, (x, 1.0 * (y > 0)), **options)
    recycling = fit.gaussian_state().recycling
    assert (recycling is None) if asks is None else ((recycling.missed is not None) == asks)
