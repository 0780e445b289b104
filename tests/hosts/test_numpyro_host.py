"""What only NumPyro has: `svi.run` and its options, jit, scan, vmap, pickle, mutable state, forward mode."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose, assert_array_equal

from .. import cases, reference

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")
jnp, dist = jax.numpy, numpyro.distributions
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO  # noqa: E402
from numpyro.infer.autoguide import (  # noqa: E402
    AutoBatchedLowRankMultivariateNormal,
    AutoBatchedMultivariateNormal,
    AutoBNAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.initialization import init_to_value  # noqa: E402

from numpyro_blr import BLR, AutoExponentialFamily  # noqa: E402
from numpyro_blr.optim import _recognition  # noqa: E402

pytestmark = pytest.mark.usefixtures("numpyro_bridge")
COUNTS = jnp.array([3.0, 0.0, 1.0, 2.0])


def model(y=COUNTS):
    """Not conjugate, so that steps differ from one another and from draw to draw."""
    log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with numpyro.plate("data", 4):
        numpyro.sample("y", dist.Poisson(jnp.exp(log_rate.sum())), obs=y)


def broken(y=COUNTS):
    """No value of z has a finite density."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.factor("bad", jnp.log(-1 - z**2))


def any_normal(model):
    """A guide by hand for `broken`, of which a stock guide finds no valid start."""

    def guide(y=COUNTS):
        scale = numpyro.param("scale", jnp.array(1.0), constraint=dist.constraints.positive)
        numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.array(0.5)), scale))

    return guide


def make_svi(model=model, guide=AutoNormal, loss=None, learning_rate=0.5, **options) -> SVI:
    """With a given rate, whose program compiles in half the time of the automatic one's."""
    return SVI(model, guide(model), BLR(learning_rate, **options), loss or Trace_ELBO())


def advance(svi: SVI, state, num_steps: int, *args, update=None):
    update = update or jax.jit(svi.update)
    for _ in range(num_steps):
        state, _ = update(state, *args)
    return state


def check_same(left, right, **tolerance) -> None:
    """Trees of arrays: bit for bit unless a tolerance is given."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if isinstance(a, int):  # what does not depend on arrays
            assert a == b
            continue
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        assert_allclose(a, b, **tolerance) if tolerance else assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# The ways to run


def test_the_loss_at_the_posterior_is_the_evidence_whatever_the_draws(numpyro_bridge):
    """`evaluate` and the loss that `update` returns: log p(y), with no variance, once the guide is exact."""
    linear = cases.linear()
    linear_model, args = linear.make(numpyro_bridge.host), tuple(map(jnp.asarray, linear.args))
    svi = make_svi(linear_model, AutoMultivariateNormal, learning_rate=1.0)
    update = jax.jit(svi.update)
    state, _ = update(svi.init(jax.random.key(0), *args), *args)
    assert_allclose(svi.evaluate(state, *args), linear.negative_log_evidence, rtol=1e-10)
    _, loss = update(state, *args)
    assert_allclose(loss, linear.negative_log_evidence, rtol=1e-10)


def test_run_with_and_without_progress_bar_and_by_hand(capfd):
    svi = make_svi()
    scanned = svi.run(jax.random.key(0), 6, progress_bar=False)
    by_hand = advance(svi, svi.init(jax.random.key(0)), 6)
    barred = svi.run(jax.random.key(0), 6, progress_bar=True)
    assert scanned.losses.shape == barred.losses.shape == (6,)
    # one program for six steps and six runs of a program for one: fused differently
    assert_allclose(scanned.losses, barred.losses, rtol=1e-12)
    check_same(scanned.params, barred.params, rtol=1e-12)
    check_same(by_hand.optim_state, barred.state.optim_state, rtol=1e-12)


def test_stable_update_is_update_where_all_is_finite():
    svi = make_svi()
    plain = svi.run(jax.random.key(0), 4, progress_bar=False)
    stable = svi.run(jax.random.key(0), 4, progress_bar=False, stable_update=True)
    check_same(plain.params, stable.params, rtol=1e-12)
    assert_allclose(plain.losses, stable.losses, rtol=1e-12)


def test_init_params_are_the_start():
    def guide(y=COUNTS):
        loc = numpyro.param("loc", jnp.zeros(2))
        scale = numpyro.param("scale", jnp.ones(2), constraint=dist.constraints.positive)
        numpyro.sample("log_rate", dist.Normal(loc, scale).to_event(1))

    svi = SVI(model, guide, BLR(), Trace_ELBO())
    given = {"loc": jnp.array([0.3, -0.2]), "scale": jnp.array([0.5, 0.25])}
    state = svi.init(jax.random.key(0), init_params=given)
    check_same(svi.get_params(state), given, rtol=1e-15)
    gaussian = state.optim_state[1].gaussian
    assert (abs(gaussian.loc - given["loc"]) < 0.05 * given["scale"]).all(), "the automatic mode begins beside it"
    assert_allclose(gaussian.precision.matrix, np.diag([4.0, 16.0]), rtol=1e-14)


def test_model_arguments_by_keyword_and_fixed_in_the_svi(numpyro_bridge):
    linear = cases.linear()
    linear_model = linear.make(numpyro_bridge.host)
    x, y, prior_scale = map(jnp.asarray, linear.args)
    guide = AutoMultivariateNormal(linear_model)
    svi = SVI(linear_model, guide, BLR(), Trace_ELBO(), prior_scale=np.asarray(prior_scale))
    result = svi.run(jax.random.key(0), 1, y=y, x=x, progress_bar=False)
    assert_allclose(guide.get_posterior(result.params).mean, linear.posterior[0], rtol=1e-10)


def test_the_graph_elbo_is_exact_as_well(numpyro_bridge):
    linear = cases.linear()
    linear_model, args = linear.make(numpyro_bridge.host), tuple(map(jnp.asarray, linear.args))
    svi = make_svi(linear_model, AutoMultivariateNormal, TraceGraph_ELBO(), learning_rate=1.0)
    result = svi.run(jax.random.key(0), 1, *args, progress_bar=False)
    assert_allclose(svi.guide.get_posterior(result.params).mean, linear.posterior[0], rtol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# The state is data


def schedule(count):
    return (jnp.asarray(count, float) + 2) ** -0.6


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": None}, {"learning_rate": schedule, "estimator": "hutchinson"}],
    ids=["automatic", "schedule, hutchinson"],
)
def test_pickled_and_resumed_equals_not_stopping_bit_for_bit(options):
    svi = make_svi(**options)
    update = jax.jit(svi.update)
    halfway = advance(svi, svi.init(jax.random.key(0)), 4, update=update)
    stored = pickle.dumps((halfway.optim_state, np.asarray(jax.random.key_data(halfway.rng_key))))
    straight = advance(svi, halfway, 4, update=update)

    optim_state, key_data = pickle.loads(stored)
    later = make_svi(**options)
    fresh = later.init(jax.random.key(5))  # tells SVI the constraints
    resumed = fresh._replace(optim_state=optim_state, rng_key=jax.random.wrap_key_data(key_data))
    check_same(advance(later, resumed, 4), straight)


def test_run_continues_from_a_state_bit_for_bit():
    svi = make_svi()
    straight = svi.run(jax.random.key(0), 7, progress_bar=False)
    first = svi.run(jax.random.key(0), 3, progress_bar=False)
    second = svi.run(jax.random.key(9), 4, progress_bar=False, init_state=first.state)
    check_same(second.state, straight.state)
    assert_array_equal(np.concatenate([first.losses, second.losses]), straight.losses)
    assert second.state.optim_state[0] == 7, "steps so far"


def test_nothing_is_traced_or_compiled_at_the_second_call():
    traced = []

    def counted(y=COUNTS):
        traced.append(1)
        model(y)

    svi = make_svi(counted)
    update = jax.jit(svi.update)
    state, _ = update(svi.init(jax.random.key(0)))
    before = len(traced)
    for _ in range(3):
        state, _ = update(state)
    assert len(traced) == before
    assert update._cache_size() == 1


def test_the_state_may_be_donated():
    svi = make_svi()
    update = jax.jit(svi.update, donate_argnums=0)
    plain = advance(svi, svi.init(jax.random.key(0)), 3)
    # what SVI.init returns shares its key with the caller
    state = jax.tree.map(jnp.copy, svi.init(jax.random.key(0)))
    check_same(advance(svi, state, 3, update=update), plain)


def test_seeds_may_be_mapped_over():
    """`init` and `update` under vmap: each lane is its own run."""
    keys = jax.random.split(jax.random.key(0), 3)

    def fit(key):
        svi = make_svi()  # a stock guide keeps what it sees at its first call, here a tracer
        state = svi.init(key)
        for _ in range(2):
            state, loss = svi.update(state)
        return state.optim_state, loss

    together = jax.jit(jax.vmap(fit))(keys)
    alone = jax.jit(fit)
    for lane, key in enumerate(keys):
        check_same(jax.tree.map(lambda leaf, lane=lane: leaf[lane], together), alone(key), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rate", [None, 0.5], ids=["automatic", "given"])
def test_mutable_state_passes_through(rate):
    """However many draws a step takes, the model's own state moves on once."""

    def counting(y=COUNTS):
        counter = numpyro.primitives.mutable("counter", {"value": jnp.zeros(())})
        counter["value"] = counter["value"] + 1
        model(y)

    svi = make_svi(counting, learning_rate=rate)
    start = svi.init(jax.random.key(0))
    state = advance(svi, start, 3)
    assert_array_equal(state.mutable_state["counter"]["value"] - start.mutable_state["counter"]["value"], 3)


# ---------------------------------------------------------------------------------------------------------------------
# Forward mode, other parameters


def test_forward_mode_is_reverse_mode_for_every_estimator(numpyro_bridge, random):
    problem, parts = cases.student(), cases.LAYOUTS["dense"]
    loc, scales = jnp.asarray(random.normal(size=4)), numpyro_bridge.scales(cases.positive_definite(51), parts)
    objective = numpyro_bridge.objective(problem, parts, jnp.asarray(random.normal(size=(2, 4))))
    gradients, probes = numpyro_bridge.gradients, jnp.asarray(random.choice([-1.0, 1.0], size=(4, 1, 4)))
    chords = gradients.chords(jax.random.key(0), 2, 1, like=loc).mirrored()
    draws = numpyro_bridge.draws(2, probes)._replace(chords=chords)
    blocks = numpyro_bridge.blocks(parts)
    for estimator in (gradients.hessian, gradients.hutchinson, gradients.secant):
        way = partial(estimator, objective, loc, scales, None, draws, blocks)
        check_same(*(jax.jit(partial(way, forward=forward))() for forward in (False, True)), rtol=1e-11, atol=1e-12)
    way = partial(gradients.reparameterized, objective, loc, scales, None, blocks, dense=True)
    check_same(*(jax.jit(partial(way, forward=forward))() for forward in (False, True)), rtol=1e-11, atol=1e-12)


def test_recognition_makes_the_values_of_the_parameters_once_for_all_sites():
    """A copy for each site is all that there is room for, where the sites are the layers of a network."""

    def layers():
        for layer in range(3):
            numpyro.sample(f"weights_{layer}", dist.Normal(jnp.zeros(4), 1.0).to_event(1))

    svi = SVI(layers, AutoNormal(layers), BLR(), Trace_ELBO())
    state = svi.init(jax.random.key(0))
    _, fed, *_ = _recognition._probe(svi, (), {}, svi.optim.get_params(state.optim_state), any_family=False)
    assert len(fed) == 3 and len({id(array) for values, _ in fed.values() for array in values.values()}) == 6


def test_a_model_with_a_loop_that_has_no_reverse_mode():
    """z doubled three times: y ~ N(8 z, 1) and z ~ N(0, 1), so the posterior precision is 65 and the mean 8 y / 65."""

    def looped(y):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        _, value = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, 2 * c[1]), (0, z))
        numpyro.sample("y", dist.Normal(value, 1.0), obs=y)

    def guide(y):
        scale = numpyro.param("scale", jnp.array(1.0), constraint=dist.constraints.positive)
        numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.array(0.0)), scale))

    svi = SVI(looped, guide, BLR(), Trace_ELBO())
    run = {"progress_bar": False, "forward_mode_differentiation": True}
    params = svi.run(jax.random.key(0), 1, jnp.array(2.0), **run).params
    assert_allclose(params["loc"], 16 / 65, rtol=1e-12)
    assert_allclose(params["scale"], 65**-0.5, rtol=1e-12)


@pytest.mark.parametrize("name", ["hessian", "hutchinson"])
def test_other_parameters_get_the_averaged_gradient_of_the_same_draws(numpyro_bridge, name, random):
    problem, parts, noise = cases.quadratic(), cases.LAYOUTS["dense"], random.normal(size=(2, 4))
    loc, precision = random.normal(size=4), cases.positive_definite(52)
    inner = numpyro_bridge.objective(problem, parts, jnp.asarray(noise))

    def objective(loc, scales, others, draw):
        return inner(loc + others["shift"], scales, None, draw)

    draws = numpyro_bridge.draws(2, jnp.ones((4, 1, 4)))
    others, scales = {"shift": jnp.zeros(4)}, numpyro_bridge.scales(precision, parts)
    estimate = getattr(numpyro_bridge.gradients, name)(
        objective, jnp.asarray(loc), scales, others, draws, numpyro_bridge.blocks(parts)
    )
    factor = reference.factor_of(precision, parts, np.nan)
    points = [loc + sign * factor @ eps for sign in (1, -1) for eps in noise]
    expected = np.mean([problem.gradient(z) for z in points], axis=0)
    assert_allclose(estimate.others["shift"], expected, rtol=1e-11)


@pytest.mark.parametrize("estimator", ["hessian", "hutchinson", "gradient"])
def test_the_temperature_is_not_in_the_gradient_of_other_parameters(estimator):
    """Of E_q[ℓ] − τ H(q), whose gradient is that of E_q[ℓ]; in the loss it is a factor of the entropy alone."""

    def shifted(y=2.0):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z + numpyro.param("shift", jnp.array(0.0)), 1.0), obs=y)

    found = {}
    for temperature in (1.0, 4.0):
        optimizer = BLR(0.5, estimator=estimator, temperature=temperature, others=numpyro.optim.SGD(1.0))
        with pytest.warns(UserWarning, match="shift belong to no site"):
            guide = AutoNormal(shifted, init_loc_fn=init_to_value(values={"z": 0.0}))
            svi = SVI(shifted, guide, optimizer, Trace_ELBO())
            state = svi.init(jax.random.key(0))
        state, loss = jax.jit(svi.update)(state)
        found[temperature] = svi.get_params(state)["shift"], loss
    (shift, loss), (same, hot) = found.values()
    assert_allclose(same, shift, rtol=1e-12)
    assert 1.0 < shift < 3.0
    assert_allclose(loss - hot, 3 * math.log(0.1), rtol=1e-10)  # of the entropy, up to a constant


def test_draws_of_other_families_follow_the_key():
    def model():
        numpyro.sample("y", dist.Normal(jnp.log(numpyro.sample("r", dist.Gamma(2.0, 1.0))), 1.0), obs=1.0)

    guide = AutoExponentialFamily(model, start={"r": dist.Gamma(2.0, 1.0)})
    svi = SVI(model, guide, BLR(), Trace_ELBO())
    update = jax.jit(svi.update)
    start = svi.init(jax.random.key(0))
    once, again, other = (
        guide.posterior(svi.get_params(advance(svi, start._replace(rng_key=jax.random.key(seed)), 2, update=update)))
        for seed in (0, 0, 1)
    )
    assert once["r"].concentration == again["r"].concentration != other["r"].concentration


def test_a_function_without_a_second_derivative_is_fitted():
    """Of the incomplete gamma function, as in a censored survival time, JAX knows no second derivative."""

    def censored():
        shape = numpyro.sample("shape", dist.LogNormal(0.0, 0.5))
        numpyro.factor("beyond 2", jnp.log1p(-dist.Gamma(shape, 1.0).cdf(2.0)))

    def posterior(shape):  # up to a constant
        return scipy.stats.lognorm(0.5).pdf(shape) * scipy.stats.gamma(shape).sf(2.0)

    svi = SVI(censored, AutoNormal(censored), BLR(), Trace_ELBO())
    params = svi.run(jax.random.key(0), 10, progress_bar=False).params
    grid = np.exp(np.linspace(-3, 3, 2001))
    weights = posterior(grid) * grid
    mean = (weights * np.log(grid)).sum() / weights.sum()
    assert_allclose(params["shape_auto_loc"], mean, atol=0.02)


@pytest.mark.slow
def test_labels_dates_and_long_integers_are_arguments_like_others():
    def model(y, names, day, number):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y)

    svi = SVI(model, AutoNormal(model), BLR(), Trace_ELBO())
    args = jnp.array(1.5), np.array(["a", "b"]), np.datetime64("2024-02-29"), 10**30
    state, digests = svi.init(jax.random.key(0), *args), []
    for names in (args[1], args[1], np.array(["a", "c"], object)):
        state, _ = svi.update(state, args[0], names, *args[2:])
        digests.append(int(state.optim_state[1].gaussian.recycling.digest))
    assert digests[0] == digests[1] != digests[2], "other data, whose draws are none of these"


@pytest.mark.slow
def test_the_host_s_solver_of_differential_equations_is_as_good_as_the_solution():
    """Logistic growth, z' = r z (1 − z), solved by JAX, whose gradients have no derivative, and by hand."""
    times, counts = jnp.arange(6.0), jnp.array([1.0, 4.0, 8.0, 14.0, 18.0, 19.0])

    def solved(start, rate):
        from jax.experimental.ode import odeint

        return odeint(lambda z, t: rate * z * (1 - z), start, times, rtol=1e-8, atol=1e-8)

    def by_hand(start, rate):
        return 1 / (1 + (1 / start - 1) * jnp.exp(-rate * times))

    def growth(solution):
        start = numpyro.sample("start", dist.Beta(1.0, 5.0))
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        numpyro.sample("counts", dist.Poisson(20 * solution(start, rate)).to_event(1), obs=counts)

    ends = []
    for solution in (solved, by_hand):
        model = partial(growth, solution)
        svi = SVI(model, AutoMultivariateNormal(model), BLR(), Trace_ELBO())
        ends.append(svi.run(jax.random.key(0), 15, progress_bar=False).params)
    for name, expected in ends[1].items():
        assert_allclose(ends[0][name], expected, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is not finite


def integer_guide(y=COUNTS):
    numpyro.param("count", jnp.array(3))
    numpyro.sample("log_rate", dist.Normal(numpyro.param("loc", jnp.zeros(2)), 0.3).to_event(1))


def test_integer_parameters_are_refused():
    svi = SVI(model, integer_guide, BLR(), Trace_ELBO())
    with pytest.raises(TypeError, match=r"'count' has dtype int.*floating-point initial value"):
        svi.init(jax.random.key(0))


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (RenyiELBO(alpha=0.5, num_particles=2), "got RenyiELBO.*Use one of Trace_ELBO"),
        (Trace_ELBO(num_particles=2, multi_sample_guide=True), "num_particles"),
    ],
    ids=["RenyiELBO", "multi_sample_guide"],
)
def test_other_losses_are_refused(loss, match):
    with pytest.raises(TypeError, match=match):
        SVI(model, AutoNormal(model), BLR(), loss).init(jax.random.key(0))


def test_the_state_of_another_optimizer_is_refused():
    guide = AutoNormal(model)
    adam = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
    result = adam.run(jax.random.key(0), 2, progress_bar=False)
    svi = SVI(model, guide, BLR(), Trace_ELBO())
    svi.init(jax.random.key(0))
    with pytest.raises(TypeError, match=r"cannot continue from an optimizer state of type.*init_params"):
        svi.run(jax.random.key(0), 2, progress_bar=False, init_state=result.state)


@pytest.mark.parametrize("guide", ["automatic", "by hand"])
def test_a_start_of_families_within_a_transformation_is_refused(guide):
    def model(counts):
        numpyro.sample("counts", dist.Poisson(numpyro.sample("rate", dist.Gamma(2.0, 0.5))), obs=counts)

    def by_hand(counts):
        numpyro.sample("rate", dist.Gamma(positive("shape", 2.0), positive("rate_of_it", 1.0)))

    svi = SVI(model, AutoExponentialFamily(model) if guide == "automatic" else by_hand, BLR(), Trace_ELBO())
    with pytest.raises(TypeError, match=r"call `svi.init` .*outside jit, vmap and scan"):
        jax.jit(svi.init)(jax.random.key(0), jnp.array(3.0))


def test_a_start_outside_of_svi_is_refused():
    with pytest.raises(RuntimeError, match=r"initialised by SVI.init.*SVI\(model, guide, BLR\(\), loss\)"):
        BLR().init({"loc": jnp.zeros(2)})


def test_a_few_steps_that_are_not_finite_are_reported_in_a_warning():
    svi = make_svi(broken, any_normal)
    state = advance(svi, svi.init(jax.random.key(0)), 3)
    with pytest.warns(UserWarning, match="BLR: 3 of 3 steps had a loss or gradient that is not finite"):
        svi.get_params(state)


def test_nothing_but_steps_that_are_not_finite_raises():
    svi = make_svi(broken, any_normal)
    with pytest.raises(FloatingPointError, match=r"10 of 10 steps.*init_to_median.*numpyro.validation_enabled"):
        svi.run(jax.random.key(0), 10, progress_bar=False)


def test_the_loss_of_a_stable_step_that_is_left_out_is_not_a_number():
    svi = make_svi(broken, any_normal)
    start = svi.init(jax.random.key(0))
    state, loss = jax.jit(svi.stable_update)(start)
    assert np.isnan(loss)
    check_same(state.optim_state[1].params, start.optim_state[1].params)
    assert state.optim_state[1].gaussian.skipped == 1


def test_a_finite_fit_reports_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_svi().run(jax.random.key(0), 3, progress_bar=False)


# ---------------------------------------------------------------------------------------------------------------------
# Eager steps, another loss, others


def positive(name: str, value: float) -> Any:
    return numpyro.param(name, jnp.array(value), constraint=dist.constraints.positive)


def scalar_guide(*_, loc: float = 0.3):
    """z ~ N(loc, 2²), whatever the model's arguments."""
    numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.array(loc)), positive("scale", 2.0)))


def empirical_bayes(y):
    """With q = N(m, s²) the gradient in θ is θ − m, whatever s and the draws, which come in pairs."""
    theta = numpyro.param("theta", jnp.array(1.0))
    z = numpyro.sample("z", dist.Normal(theta, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_an_eager_update_is_a_compiled_one():
    svi = SVI(conjugate, scalar_guide, BLR(0.3, estimator="gradient"), Trace_ELBO())
    start = svi.init(jax.random.key(0))
    check_same(svi.update(start), jax.jit(svi.update)(start), rtol=1e-12)


@pytest.mark.slow
def test_one_step_is_exact_for_a_guide_of_one_covariance_a_group(random):
    """AutoBatchedMultivariateNormal, of groups that know nothing of each other."""
    x, y, spread = random.normal(size=(3, 8, 2)), random.normal(size=(3, 8)), 0.5

    def groups():
        with numpyro.plate("groups", 3):
            weights = numpyro.sample("weights", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(jnp.einsum("gnp,gp->gn", x, weights), spread).to_event(1), obs=y)

    svi = make_svi(groups, partial(AutoBatchedMultivariateNormal, batch_ndim=1), learning_rate=None)
    params = svi.run(jax.random.key(0), 1, progress_bar=False).params
    for group, (loc, factor) in enumerate(zip(params["auto_loc"], params["auto_scale_tril"], strict=True)):
        rows, targets = np.vstack([x[group], np.eye(2)]), np.append(y[group], np.zeros(2))
        mean, covariance = reference.linear_gaussian(rows, targets, np.repeat([spread, 1.0], [8, 2]))
        assert_allclose(loc, mean, rtol=1e-10)
        assert_allclose(factor @ factor.T, covariance, rtol=1e-10)


@pytest.mark.slow
def test_a_guide_of_one_low_rank_covariance_a_group_is_full_rank_where_its_rank_is(random):
    """AutoBatchedLowRankMultivariateNormal with rank 1 in two dimensions, of which it misses nothing."""
    x, y, spread = random.normal(size=(3, 8, 2)), random.normal(size=(3, 8)), 0.5

    def groups():
        with numpyro.plate("groups", 3):
            weights = numpyro.sample("weights", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(jnp.einsum("gnp,gp->gn", x, weights), spread).to_event(1), obs=y)

    guide = partial(AutoBatchedLowRankMultivariateNormal, batch_ndim=1, rank=1)
    params = make_svi(groups, guide, learning_rate=None).run(jax.random.key(0), 15, progress_bar=False).params
    for group, (loc, scale, factor) in enumerate(
        zip(params["auto_loc"], params["auto_scale"], params["auto_cov_factor"], strict=True)
    ):
        rows, targets = np.vstack([x[group], np.eye(2)]), np.append(y[group], np.zeros(2))
        mean, covariance = reference.linear_gaussian(rows, targets, np.repeat([spread, 1.0], [8, 2]))
        assert_allclose(loc, mean, rtol=1e-8)
        assert_allclose(np.outer(scale, scale) * (np.eye(2) + factor @ factor.T), covariance, rtol=1e-6)


def test_one_step_is_exact_where_the_host_sums_out_a_discrete_latent():
    pytest.importorskip("funsor")

    def with_coin():
        conjugate()
        coin = numpyro.sample("coin", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("side", dist.Normal(jnp.asarray(coin, "float64"), 1.0), obs=0.5)

    svi = SVI(with_coin, scalar_guide, BLR(), TraceEnum_ELBO(max_plate_nesting=0))
    with jax.numpy_dtype_promotion("standard"):  # NumPyro's enumeration adds integers to booleans
        params = svi.run(jax.random.key(0), 1, progress_bar=False).params
    assert_allclose(params["loc"], 1.0, rtol=1e-12)
    assert_allclose(params["scale"], 0.5**0.5, rtol=1e-12)


def sgd(library: str) -> Any:
    return numpyro.optim.SGD(0.1) if library == "numpyro" else pytest.importorskip("optax").sgd(0.1)


@pytest.mark.parametrize("library", ["numpyro", "optax"])
def test_others_descend_the_same_loss(library):
    y, loc, theta = 2.0, 0.3, 1.0
    svi = SVI(empirical_bayes, scalar_guide, BLR(1.0, others=sgd(library)), Trace_ELBO())
    with pytest.warns(UserWarning, match="parameters theta belong to no site"):
        params = svi.run(jax.random.key(0), 3, y, progress_bar=False).params
    for _ in range(3):  # both from the state before: Bayes' rule given θ, a gradient step given m
        loc, theta = (theta + y) / 2, theta - 0.1 * (theta - loc)
    assert_allclose(params["theta"], theta, rtol=1e-12)
    assert_allclose(params["loc"], loc, rtol=1e-12)


def test_a_parameter_that_is_a_tree_belongs_to_others():
    def with_net(y):
        net = numpyro.param("net", {"w": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)})
        z = numpyro.sample("z", dist.Normal(net["w"].sum() + net["b"], 1.0))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    svi = SVI(with_net, scalar_guide, BLR(1.0, others=numpyro.optim.SGD(0.1)), Trace_ELBO())
    with pytest.warns(UserWarning, match="parameters net belong to no site"):
        params = svi.run(jax.random.key(0), 1, 2.0, progress_bar=False).params
    step = 0.1 * (3.5 - 0.3)
    check_same(params["net"], {"w": jnp.array([1.0 - step, 2.0 - step]), "b": jnp.array(0.5 - step)}, rtol=1e-12)
    assert_allclose(params["loc"], (3.5 + 2.0) / 2, rtol=1e-12)


def test_the_first_state_can_be_donated_where_others_are_updated():
    """As with stock Adam, whose state holds each buffer once: JAX refuses to donate a buffer twice."""
    svi = SVI(empirical_bayes, scalar_guide, BLR(0.5), Trace_ELBO())
    with pytest.warns(UserWarning, match="parameters theta belong"):
        state = svi.init(jax.random.key(0), 2.0)
    expected = jax.tree.map(jnp.negative, state.optim_state)
    check_same(jax.jit(partial(jax.tree.map, jnp.negative), donate_argnums=0)(state.optim_state), expected)


# ---------------------------------------------------------------------------------------------------------------------
# More that is refused


def conjugate(y=2.0):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def complex_guide():
    numpyro.param("k", jnp.array(1j))
    scalar_guide()


def student_guide():
    numpyro.sample("z", dist.StudentT(3.0, numpyro.param("loc", jnp.array(0.0)), positive("scale", 1.0)))


def flow_guide():
    flow = dist.transforms.AffineTransform(numpyro.param("shift", jnp.array(0.0)), positive("stretch", 1.0))
    numpyro.sample("z", dist.TransformedDistribution(dist.Normal(0.0, 1.0), flow))


NOT_FOR_THE_RULE = {
    "a complex parameter": (complex_guide, TypeError, r"'k' has dtype complex128\. Give it a floating-point"),
    "a Student": (student_guide, ValueError, r"the guide has 'z': StudentT\. Use AutoNormal, .*AutoMultivariateNormal"),
    "a flow": (flow_guide, ValueError, r"the guide has 'z': Normal \(not of parameters alone\)\. Use AutoNormal"),
    "no site": (lambda: None, ValueError, "the guide has no site at all"),
}


@pytest.mark.parametrize(("guide", "error", "says"), NOT_FOR_THE_RULE.values(), ids=NOT_FOR_THE_RULE)
def test_init_refuses_and_says_the_way_out(guide, error, says):
    with pytest.raises(error, match=says):
        SVI(conjugate, guide, BLR(), Trace_ELBO()).init(jax.random.key(0))


@pytest.mark.slow
def test_a_stock_flow_is_refused():
    # the flow's own initialiser adds integers to floats
    with (
        jax.numpy_dtype_promotion("standard"),
        pytest.raises(ValueError, match=r"'_auto_latent': Normal, .* Use AutoNormal"),
    ):
        make_svi(guide=partial(AutoBNAFNormal, num_flows=1, hidden_factors=[2])).init(jax.random.key(0))


# ---------------------------------------------------------------------------------------------------------------------
# More that is not finite


def wall(y, height):
    """Normal, with `height` added to the log density beyond z = 3."""
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.factor("wall", jnp.where(z > 3, height, 0.0))
    numpyro.sample("y", dist.Normal(z, 0.1), obs=y)


def test_steps_that_are_never_finite_leave_the_start_bit_for_bit():
    svi = make_svi(broken, any_normal)
    start = svi.get_params(svi.init(jax.random.key(0)))
    with pytest.warns(UserWarning, match="BLR: 9 of 9 steps .*; they left the guide as it was"):
        result = svi.run(jax.random.key(0), 9, progress_bar=False)
    check_same(result.params, start)
    assert not np.isfinite(result.losses).any()


def test_draws_that_are_not_finite_are_counted_and_the_fit_arrives():
    """The draws start in part beyond the wall, and the posterior, N(y / 1.01, 0.01 / 1.01), far from it."""
    svi = SVI(wall, partial(scalar_guide, loc=2.5), BLR(), Trace_ELBO())
    with pytest.warns(UserWarning, match=r"\d+ of 20 steps had a loss or gradient that is not finite"):
        result = svi.run(jax.random.key(0), 20, 0.5, jnp.nan, stable_update=True, progress_bar=False)
    skipped = int(result.state.optim_state[1].gaussian.skipped)
    assert 0 < skipped < 20
    assert np.isnan(result.losses).sum() == skipped
    assert_allclose(result.params["loc"], 0.5 / 1.01, rtol=1e-12)
    assert_allclose(result.params["scale"], (0.01 / 1.01) ** 0.5, rtol=1e-12)


def test_an_infinite_loss_is_returned_by_update_and_not_a_number_for_stable_update():
    svi = SVI(wall, partial(scalar_guide, loc=2.5), BLR(), Trace_ELBO())
    start = svi.init(jax.random.key(0), 0.5, -jnp.inf)
    plain, stable = jax.jit(lambda state: [f(state, 0.5, -jnp.inf) for f in (svi.update, svi.stable_update)])(start)
    check_same(stable[0], plain[0], rtol=1e-12)
    check_same(stable[0].optim_state[1].params, start.optim_state[1].params)
    assert plain[1] == np.inf
    assert np.isnan(stable[1])
    pool = plain[0].optim_state[1].gaussian.recycling.pool
    assert np.isfinite(pool.values).all()  # in the rows to come, too: no weight of zero makes a number of them


# ---------------------------------------------------------------------------------------------------------------------
# Single precision, the default of JAX and so of another process

SINGLE = """
import json
import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro_blr import BLR
jax.config.update("jax_numpy_dtype_promotion", "strict")

def model(x, y):
    z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(x @ z, 0.5).to_event(1), obs=y)

def guide(x, y):
    factor = numpyro.param("factor", 2 * jnp.eye(2), constraint=dist.constraints.lower_cholesky)
    numpyro.sample("z", dist.MultivariateNormal(numpyro.param("loc", jnp.array([3.0, -1.0])), scale_tril=factor))

x, y = jnp.array({x}), jnp.array({y})
result = SVI(model, guide, BLR(), Trace_ELBO()).run(jax.random.key(0), 10, x, y, progress_bar=False)
dtypes = sorted({{str(leaf.dtype) for leaf in jax.tree.leaves(result.state.optim_state)}})
print(json.dumps([dtypes, result.params["loc"].tolist(), result.params["factor"].tolist()]))
"""


def test_single_precision_stays_single_and_arrives(random):
    x = random.normal(size=(6, 2))
    y = x @ np.array([1.0, -2.0]) + 0.3 * random.normal(size=6)
    code = SINGLE.format(x=x.tolist(), y=y.tolist())
    root = Path(__file__).parents[2]
    child = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    dtypes, loc, factor = json.loads(child.stdout)
    assert dtypes == ["bool", "float32", "int32", "uint32"]
    rows, scales = np.concatenate([np.eye(2), x]), np.repeat([1.0, 0.5], [2, 6])
    exact_loc, exact_covariance = reference.linear_gaussian(rows, np.concatenate([[0.0, 0.0], y]), scales)
    assert_allclose(loc, exact_loc, rtol=1e-3)
    assert_allclose(factor @ np.transpose(factor), exact_covariance, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What another process has compiled

COMPILED = """
import collections, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro_blr import BLR

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))

def model(y):
    sites = [numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("intercept", "slope", "trend", "season")]
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(sum(sites) * jnp.arange(3.0), scale).to_event(1), obs=y)

svi = SVI(model, AutoNormal(model), BLR(), Trace_ELBO())
state = svi.init(jax.random.key(0), jnp.ones(3))
events.clear()
jax.jit(svi.update)(state, jnp.ones(3))
print(events["cache_hits"], events["cache_misses"])
"""


@pytest.mark.slow
def test_a_step_is_compiled_once_for_all_processes_that_order_sets_alike(tmp_path):
    """As the README has it: BLR adds nothing of its own that differs from one process to the next."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    ordered = {**os.environ, **cache, "PYTHONHASHSEED": "0"}
    found = [
        subprocess.run([sys.executable, "-c", COMPILED], env=ordered, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    ]
    hits, misses = np.array([text.split() for text in found], int).T
    assert hits[0] == misses[1] == 0
    assert hits[1] == misses[0] > 0
