"""Extrapolation along the drift of the steps: the geodesic, the test by draws, the next reach, and that it pays."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from numpy.testing import assert_allclose

from tests.optim.test_recycled import counts, started, stepper


def drift_of(backend, loc_move, precision_move, reach):
    module = backend.module("optim._drift")
    fresh = module.init(backend.array(np.zeros(2)))
    return module.Drift(backend.array(loc_move), backend.array(precision_move), backend.scalar(reach, fresh.reach))


def precision_of(backend, matrix):
    return started(backend, np.zeros(2), matrix).precision


@pytest.mark.parametrize("reach", [0.5, 2.0])
def test_the_proposal_is_on_the_geodesic(backend, reach):
    """Against the matrix exponential: S (S⁻¹ Δ̄S)ᵉˣᵖ, as L exp(κ L⁻¹ Δ̄S L⁻ᵀ) Lᵀ is."""
    matrix, move = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[0.4, -0.1], [-0.1, -0.2]])
    drift = drift_of(backend, [0.3, -0.2], move, reach)
    loc, precision = backend.module("optim._drift").proposal(
        drift, backend.array(np.array([1.0, 2.0])), precision_of(backend, matrix)
    )
    assert_allclose(backend.to_numpy(loc), np.array([1.0, 2.0]) + reach * np.array([0.3, -0.2]), rtol=1e-12)
    expected = matrix @ scipy.linalg.expm(reach * np.linalg.solve(matrix, move))
    assert_allclose(backend.precision_array(precision), expected, rtol=1e-12)


def test_no_variance_changes_by_more_than_e(backend):
    matrix, move = np.diag([4.0, 1.0]), np.diag([8.0, -3.0])
    _, precision = backend.module("optim._drift").proposal(
        drift_of(backend, [0.0, 0.0], move, 30.0), backend.array(np.zeros(2)), precision_of(backend, matrix)
    )
    assert_allclose(backend.precision_array(precision), np.diag([4 * np.e, 1 / np.e]), rtol=1e-12)


@pytest.mark.parametrize(("change", "lower"), [(-0.61, True), (-0.59, False), (0.1, False)])
def test_the_reach_grows_where_the_loss_is_lower_by_two_of_its_errors(backend, change, lower):
    for reach, grown, cut in ((2.0, 3.0, 1.0), (29.0, 30.0, 14.5), (0.6, 0.9, 0.5)):
        drift = drift_of(backend, [0.0, 0.0], np.zeros((2, 2)), reach)
        numbers = backend.array(np.array(change)), backend.array(np.array(0.3))
        found, judged = backend.module("optim._drift").judged(drift, *numbers)
        assert bool(found) == lower
        assert_allclose(float(judged.reach), grown if lower else cut, rtol=1e-14)


def test_a_drift_is_there_beyond_the_noise_and_never_of_rounding(backend):
    is_there, precision = backend.module("optim._drift").is_there, precision_of(backend, np.diag([4.0, 1.0]))
    drift = drift_of(backend, [0.1, 0.0], np.zeros((2, 2)), 1.0)  # 0.04 nat
    assert bool(is_there(drift, precision, backend.array(np.array(7.9))))
    assert not bool(is_there(drift, precision, backend.array(np.array(8.1))))
    assert not bool(is_there(drift, precision, backend.array(np.array(np.nan)))), "before the first step"
    small = drift_of(backend, [4e-4, 0.0], np.zeros((2, 2)), 1.0)
    assert not bool(is_there(small, precision, backend.array(np.array(0.0))))


def never_enough(backend, monkeypatch):
    """However many draws there are, they are worth fewer than it takes to do without the drift."""
    monkeypatch.setattr(backend.module("gradients.recycled"), "REGULAR", 1e9)


def settled(backend):
    """(a step, the state at the fixed point of `counts` with a full pool, noise of the next step)."""
    step, state = stepper(backend, counts), started(backend, [0.0, 0.0], np.eye(2))
    random = np.random.default_rng(0)
    for _ in range(30):
        state, *_ = step(state, random.normal(size=(4, 2)))
    return step, state, random.normal(size=(4, 2))


def test_a_step_begins_with_the_drift_if_its_draws_are_for_it(both, monkeypatch):
    """From a place off the optimum: four moves back to it are taken, four away from it are not; in both packages."""
    ends = {}
    for backend in both:
        never_enough(backend, monkeypatch)
        step, state, noise = settled(backend)
        home, off = backend.to_numpy(state.loc), np.array([0.4, -0.3])
        for way in (-1, 1):
            drift = drift_of(backend, way * off / 4, np.zeros((2, 2)), 4.0)
            rate = replace(state.rate, noisy_steps=backend.scalar(10**9, state.rate.noisy_steps))  # stays where it is
            recycling = replace(state.recycling, drift=drift)
            beside = replace(state, loc=backend.array(home + off), recycling=recycling, rate=rate)
            after, _, moved = step(beside, noise)
            loc, reach = backend.to_numpy(after.loc), float(after.recycling.drift.reach)
            assert bool(moved)
            assert_allclose(loc, home if way < 0 else home + off, atol=1e-6)
            assert reach == (6.0 if way < 0 else 2.0)
            spent = float(after.evaluations) - float(state.evaluations)
            num_pairs = int(state.recycling.num_pairs)
            assert spent >= 2 * num_pairs * (2 + 1) + 4 * num_pairs
            ends.setdefault(way, []).append(np.append(loc, spent))
            closer, *_ = step(replace(beside, radius=backend.scalar(0.5, state.radius)), noise)
            assert float(closer.recycling.drift.reach) == 4.0, "nobody was asked"
    for first, second in ends.values():
        assert_allclose(first, second, rtol=1e-7)


def test_the_drift_is_the_average_of_the_moves_and_begins_with_sixteen_pairs(backend, monkeypatch):
    never_enough(backend, monkeypatch)
    step, state = stepper(backend, counts), started(backend, [0.0, 0.0], np.eye(2))
    random, moves, compared = np.random.default_rng(1), np.zeros(2), 0
    for _ in range(25):
        before = state
        state, *_ = step(state, random.normal(size=(4, 2)))
        asked = float(state.recycling.drift.reach) != float(before.recycling.drift.reach)
        if int(state.recycling.pool.count) < 16:
            assert not asked and not backend.to_numpy(state.recycling.drift.loc_move).any()
            continue
        moved = backend.to_numpy(state.loc) - backend.to_numpy(before.loc)
        moves = 0.8 * moves + 0.2 * moved
        if asked:  # what it went by the drift is no move of its own
            break
        assert_allclose(backend.to_numpy(state.recycling.drift.loc_move), moves, rtol=1e-9, atol=1e-15)
        compared += 1
    assert compared >= 2


def test_where_the_draws_are_worth_many_there_is_no_drift(backend):
    """They are iterated on alone then."""
    _, state, _ = settled(backend)
    assert not backend.to_numpy(state.recycling.drift.loc_move).any() and float(state.recycling.drift.reach) == 1


MONTHS, YEAR = 36, 12
SEASON = 0.3 * np.sin(2 * np.pi * np.arange(MONTHS) / YEAR) + 0.1 * np.random.default_rng(1).normal(size=MONTHS)


def level_and_season(host):
    """Of 36 months the level, the season and the three scales by which they change: they go together, step by step."""
    sums = np.array([[float(0 <= t - 1 - s < YEAR - 1) for s in range(MONTHS)] for t in range(YEAR - 1, MONTHS)])

    def model(y):
        scales = host.sample("scales", host.dist.LogNormal(host.array(np.full(3, -1.0)), 1.0).to_event(1))
        level = host.sample("level", host.dist.Normal(host.array(np.zeros(MONTHS)), 5.0).to_event(1))
        season = host.sample("season", host.dist.Normal(host.array(np.zeros(MONTHS)), 2.0).to_event(1))
        host.factor("levels", host.dist.Normal(level[:-1], scales[0]).log_prob(level[1:]).sum())
        over_a_year = host.dist.Normal(-(host.array(sums) @ season), scales[1])
        host.factor("seasons", over_a_year.log_prob(season[YEAR - 1 :]).sum())
        host.sample("y", host.dist.Normal(level + season, scales[2]).to_event(1), obs=y)

    return model


@pytest.mark.slow
def test_a_scale_and_what_it_scales_are_followed_along_their_drift(backend, monkeypatch):
    """In 75 coordinates, where the draws are of use to a short step alone: far closer after 40 steps than without."""
    mean_field = lambda host, model: host.autoguide.AutoNormal(model)  # noqa: E731
    elbos = []
    for least in (1 / 200, np.inf):
        monkeypatch.setattr(backend.module("optim._drift"), "LEAST", least)
        fit = backend.start(level_and_season, mean_field, (SEASON,)).run(40)
        elbos.append(-fit.evaluate(500).mean())
    assert elbos[0] > elbos[1] + 0.5, elbos
