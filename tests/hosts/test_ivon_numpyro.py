"""What only NumPyro's IVON has: jit, scan, vmap, donation, several devices, single and half precision."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats

from .. import cases, reference
from ..reference import IVONSettings, Weights

jax = pytest.importorskip("jax")
numpyro = pytest.importorskip("numpyro")
jnp, dist = jax.numpy, numpyro.distributions
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO  # noqa: E402
from numpyro.infer.autoguide import AutoNormal  # noqa: E402

from numpyro_blr import BLR, IVON  # noqa: E402
from numpyro_blr.optim import _noise, _weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("numpyro_bridge")
NUM_WORKERS = 4
COUNTS = np.array([3.0, 0.0, 1.0, 2.0, 4.0, 1.0, 0.0, 2.0])


def model(y=None):
    """Not conjugate, so that steps differ from one another and from draw to draw; a shard of y is a minibatch."""
    log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    y = jnp.asarray(COUNTS) if y is None else y
    with numpyro.plate("data", len(COUNTS), subsample_size=len(y)):
        numpyro.sample("y", dist.Poisson(jnp.exp(log_rate.sum())), obs=y)


def make_svi(loss=None, program=model, **options) -> SVI:
    return SVI(program, AutoNormal(program), IVON(**options), loss or Trace_ELBO())


def check_same(left, right, **tolerance) -> None:
    """Trees of arrays: bit for bit unless a tolerance is given."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert_allclose(a, b, **tolerance) if tolerance else assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------------------------------
# The state is data


def test_compiled_once_scanned_mapped_donated_and_pickled():
    traced = []

    def counted(y=None):
        traced.append(1)
        model(y)

    svi = make_svi(program=counted)
    start = svi.init(jax.random.key(0))
    update = jax.jit(svi.update)
    first, _ = update(start)
    before = len(traced)
    straight = first
    for _ in range(3):
        straight, _ = update(straight)
    assert len(traced) == before
    assert update._cache_size() == 1, "nothing is traced or compiled at the second update"

    pickled = pickle.loads(pickle.dumps((first.optim_state, np.asarray(jax.random.key_data(first.rng_key)))))
    resumed = first._replace(optim_state=pickled[0], rng_key=jax.random.wrap_key_data(pickled[1]))
    for _ in range(3):
        resumed, _ = update(resumed)
    check_same(resumed, straight)

    # three other programs: fused differently
    scanned, _ = jax.jit(lambda state: jax.lax.scan(lambda state, _: svi.update(state), state, length=3))(first)
    check_same(scanned, straight, rtol=1e-12)

    donated = jax.tree.map(jnp.copy, first)
    donating = jax.jit(svi.update, donate_argnums=0)
    for _ in range(3):
        donated, _ = donating(donated)
    check_same(donated, straight, rtol=1e-12)


def test_updates_may_be_mapped_over_keys():
    """Each lane is a run of its own."""
    svi = make_svi()
    start = svi.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    states, losses = jax.jit(jax.vmap(lambda key: svi.update(start._replace(rng_key=key))))(keys)
    update = jax.jit(svi.update)
    for lane, key in enumerate(keys):
        alone, loss = update(start._replace(rng_key=key))
        check_same(jax.tree.map(lambda leaf, lane=lane: leaf[lane], states.optim_state), alone.optim_state, rtol=1e-12)
        assert_allclose(losses[lane], loss, rtol=1e-12)
    assert len(np.unique(states.optim_state[1].weights.loc["log_rate"][:, 0])) == 3


def test_run_is_updates_one_by_one():
    svi = make_svi()
    result = svi.run(jax.random.key(0), 4, progress_bar=False)
    state, update = svi.init(jax.random.key(0)), jax.jit(svi.update)
    for _ in range(4):
        state, _ = update(state)
    check_same(result.state.optim_state, state.optim_state, rtol=1e-12)
    check_same(result.params, svi.get_params(state), rtol=1e-12)


def test_the_stable_update_says_which_loss_was_not_used(numpyro_bridge):
    def broken(trap):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("trap", -jnp.exp(trap + z**2))

    svi = make_svi(program=broken)
    state = svi.init(jax.random.key(0), jnp.array(-1000.0))
    update = jax.jit(svi.stable_update)
    state, loss = update(state, jnp.array(-1000.0))
    assert jnp.isfinite(loss)
    after, loss = update(state, jnp.array(800.0))
    assert jnp.isnan(loss)
    check_same(after.optim_state[1].weights.loc, state.optim_state[1].weights.loc)


# ---------------------------------------------------------------------------------------------------------------------
# The host's losses


def test_evaluate_is_the_hosts(numpyro_bridge):
    """Outside of an update the guide is the host's own."""
    svi = make_svi()
    state, _ = jax.jit(svi.update)(svi.init(jax.random.key(0)))
    params, key = svi.get_params(state), jax.random.split(state.rng_key)[1]
    assert_allclose(svi.evaluate(state), svi.loss.loss(key, params, svi.model, svi.guide), rtol=1e-12)


@pytest.mark.parametrize("kind", [TraceMeanField_ELBO, TraceGraph_ELBO])
def test_every_elbo_gives_the_same_step(kind):
    ends = []
    for loss in (Trace_ELBO(), kind()):
        svi = make_svi(loss)
        ends.append(jax.jit(svi.update)(svi.init(jax.random.key(0))))
    (left, _), (right, _) = ends
    check_same(left.optim_state[1].weights, right.optim_state[1].weights, rtol=1e-10)


def test_what_numpyro_alone_can_ask_for_is_refused():
    with pytest.raises(TypeError, match="IVON minimises the negative ELBO.*got RenyiELBO"):
        make_svi(RenyiELBO(num_particles=2)).init(jax.random.key(0))
    svi = make_svi()
    with pytest.raises(TypeError, match="given traced values.*outside of jit and vmap"):
        jax.jit(svi.init)(jax.random.key(0), jnp.asarray(COUNTS))
    svi = make_svi()
    state = svi.init(jax.random.key(0))
    with pytest.raises(ValueError, match="forward_mode_differentiation=True"):
        svi.update(state, forward_mode_differentiation=True)
    adam = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.1), Trace_ELBO()).init(jax.random.key(0))
    with pytest.raises(TypeError, match="IVON cannot continue from an optimizer state"):
        svi.get_params(adam)
    with pytest.raises(RuntimeError, match=r"IVON must be initialised by SVI.init"):
        IVON().init({"loc": jnp.zeros(2)})


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes


@pytest.mark.parametrize("preconditioner", ["factored", "posterior"])
def test_single_precision_stays_single_and_the_forward_pass_may_be_half(numpyro_bridge, preconditioner):
    """float32 and float64 sites in one model, bfloat16 within it; the state of a site has its dtype."""

    def mixed():
        single = numpyro.sample("a", dist.Normal(jnp.zeros((2, 3), "float32"), jnp.float32(1.0)).to_event(2))
        double = numpyro.sample("b", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        x = jnp.ones((5, 2), "bfloat16")
        mean = (x @ single.astype("bfloat16")).astype("float64") + double
        with numpyro.plate("data", 5):
            numpyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=jnp.ones((5, 3)))

    def guide():
        positive = dist.constraints.positive
        loc = numpyro.param("a_loc", jnp.zeros((2, 3), "float32"))
        scale = numpyro.param("a_scale", jnp.ones((2, 3), "float32"), constraint=positive)
        numpyro.sample("a", dist.Normal(loc, scale).to_event(2))
        scale = numpyro.param("b_scale", jnp.ones(3), constraint=positive)
        numpyro.sample("b", dist.Normal(numpyro.param("b_loc", jnp.zeros(3)), scale).to_event(1))

    svi = SVI(mixed, guide, IVON(preconditioner=preconditioner), Trace_ELBO())
    with numpyro_bridge.promotion(lax=True):  # which the host's own Normal needs
        state = svi.init(jax.random.key(0))
        update = jax.jit(svi.update)
        for _ in range(20):
            state, loss = update(state)
    weights = state.optim_state[1].weights
    assert jnp.isfinite(loss)
    for values in (weights.loc, weights.momentum, weights.hessian, weights.second_moment):
        for name, dtype in (("a", "float32"), ("b", "float64")):
            assert {leaf.dtype for leaf in jax.tree.leaves(values.get(name))} <= {jnp.dtype(dtype)}
    assert (weights.loc["a"] > 0).all() and (weights.loc["b"] > 0).all(), "both were moved towards the data"


def test_the_generator_of_noise_is_xxhash():
    """XXH32 of the bytes of (0, 7, i), words with the low byte first, from the reference implementation."""
    expected = [1865362652, 3963179823, 4248846932, 1522351398, 2588021501]
    assert _noise.bits(jax.random.key(7), 5).tolist() == expected
    assert _noise.bits(jax.random.PRNGKey(7), 5).tolist() == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_is_standard_normal(dtype):
    """Its distribution, and no correlation with its neighbours, with another key's, or with the next key's."""
    keys, size = jax.random.split(jax.random.key(3), 128), 2048
    noise = np.asarray(jax.vmap(lambda key: _noise.normals(key, size, jnp.dtype(dtype)))(keys))
    assert noise.dtype == dtype and stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    pairs = [(noise[:, lag:], noise[:, :-lag]) for lag in (1, 2, 64, 1024)] + [(noise[1:], noise[:-1])]
    for one, other in pairs:
        assert abs((one * other).mean()) < 4 / one.size**0.5
    products = noise @ noise.T / size
    assert abs(products[np.triu_indices(len(keys), 1)]).max() < 5.5 / size**0.5
    assert abs(noise).max() < 5.5


@pytest.mark.parametrize("size", [1, 2, 101])
def test_noise_of_sites_is_as_long_as_they_are(size):
    noise = np.asarray(_noise.materialised_normals(jax.random.key(0), size, jnp.zeros((), "float64")))
    assert noise.shape == (size,)
    assert len(np.unique(noise)) == size


def test_sites_in_groups_of_their_own_have_noise_of_their_own(monkeypatch):
    """Groups of one site, of two, of one over several chunks: no number twice, and none of two particles.

    In the order in which the guide draws them, which is not that of their names.
    """
    monkeypatch.setattr(_weights, "CHUNK", 16)
    shapes = {"d": (12,), "b": (3, 3), "c": (2,), "a": (5, 10)}
    assert _weights.grouped({name: math.prod(shape) for name, shape in shapes.items()}) == [["d"], ["b", "c"], ["a"]]
    seen = []

    def model():
        values = [numpyro.sample(name, dist.Normal(jnp.zeros(shape)).to_event()) for name, shape in shapes.items()]
        weights = jnp.concatenate([value.ravel() for value in values])
        jax.debug.callback(seen.append, weights)
        numpyro.sample("y", dist.Normal(weights.sum(), 1.0), obs=jnp.zeros(()))

    svi = SVI(model, AutoNormal(model), IVON(), Trace_ELBO(num_particles=2))
    state = svi.init(jax.random.key(0))
    seen.clear()
    mean = np.concatenate([np.ravel(svi.get_params(state)[f"{name}_auto_loc"]) for name in shapes])
    jax.block_until_ready(jax.jit(svi.update)(state))
    noise = np.concatenate([np.asarray(weights) - mean for weights in seen])
    assert noise.shape == (2 * 73,) and len(np.unique(noise)) == 2 * 73


def test_a_step_holds_the_draw_and_the_gradient_and_little_else(monkeypatch):
    """In copies of the weights, beside the state: XLA is not to copy what is written over, nor to start everything."""
    width, layers = 128, 8
    monkeypatch.setattr(_weights, "CHUNK", width**2 // 4)

    def model(x, y):
        for layer in range(layers):
            x = jnp.tanh(x @ numpyro.sample(f"w{layer}", dist.Normal(0, 0.1).expand([width, width]).to_event(2)))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(2), obs=y)

    svi = SVI(model, AutoNormal(model), IVON(), Trace_ELBO())
    data = 2 * [jnp.ones((1, width))]
    state = svi.init(jax.random.key(0), *data)
    step = jax.jit(svi.update, donate_argnums=0).lower(state, *data).compile()
    weights = svi.get_params(state)
    copy = sum(weights[f"w{layer}_auto_loc"].nbytes for layer in range(layers))
    assert step.memory_analysis().temp_size_in_bytes < 2 * copy


# ---------------------------------------------------------------------------------------------------------------------
# Modules


def test_a_module_of_nnx_is_a_model():
    """The mean comes to the coefficients of a line with little noise."""
    nnx = pytest.importorskip("flax.nnx", reason="needs flax, of the extra `examples`")
    from numpyro.contrib.module import random_nnx_module

    def line(x, y):
        net = random_nnx_module("net", nnx.Linear(2, 1, param_dtype=float, rngs=nnx.Rngs(0)), dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(net(x)[:, 0], 0.1), obs=y)

    x = np.random.default_rng(0).normal(size=(50, 2))
    y = x @ np.array([1.0, -2.0]) + 0.5
    result = make_svi(program=line).run(jax.random.key(0), 300, x, y, progress_bar=False)
    assert result.losses[-50:].mean() < result.losses[:5].mean() - 1000
    assert_allclose(result.params["net/kernel_auto_loc"][:, 0], [1.0, -2.0], atol=0.1)
    assert_allclose(result.params["net/bias_auto_loc"], 0.5, atol=0.1)


@pytest.mark.filterwarnings("ignore:BLR. the parameters net.params")
@pytest.mark.parametrize("rule", [IVON, BLR])
def test_a_module_with_mutable_state_keeps_its_averages(rule):
    """BatchNorm, whose averages SVI carries: in the model under IVON, and in the guide under BLR."""
    linen = pytest.importorskip("flax.linen", reason="needs flax, of the extra `examples`")
    from numpyro.contrib.module import flax_module, random_flax_module

    norm = linen.BatchNorm(use_running_average=False, momentum=0.5)
    options = {"input_shape": (1, 2), "mutable": ["batch_stats"]}

    def model(x, y):
        mean = 0.0
        if rule is IVON:
            mean = random_flax_module("net", norm, dist.Normal(0.0, 1.0), **options)(x).sum(-1)
        noise = numpyro.sample("noise", dist.HalfNormal(1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(mean, noise), obs=y)

    guide = AutoNormal(model)

    def guide_with_a_module(x, y):
        flax_module("net", norm, **options)(x)
        return guide(x, y)

    x = 3 + np.random.default_rng(0).normal(size=(50, 2))
    y = (x - x.mean(0)).sum(-1) / x.std(0).mean()
    svi = SVI(model, guide if rule is IVON else guide_with_a_module, rule(), Trace_ELBO())
    with jax.numpy_dtype_promotion("standard"):  # flax makes the averages in single precision
        result = svi.run(jax.random.key(0), 60, x, y, progress_bar=False)
    assert result.losses[-10:].mean() < result.losses[:5].mean()
    stats = result.state.mutable_state["net$state"]["batch_stats"]
    assert_allclose(stats["mean"], x.mean(0), rtol=1e-6)
    assert_allclose(stats["var"], x.var(0), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Several devices


def test_positions_of_an_axis_draw_for_themselves_and_average(numpyro_bridge):
    """The step is the reference's, on the averages of what the four found: four particles of one worker."""
    network = cases.network()
    program = network.make(numpyro_bridge.host)
    x, y = map(jnp.asarray, network.args)

    svi = make_svi(program=program, axis_name="data", learning_rate=0.1, hess_init=0.1)
    state = svi.init(jax.random.key(0), x, y)
    weights = {name: Weights.at(np.array(m), 0.1) for name, m in state.optim_state[1].weights.loc.items()}
    update = jax.jit(jax.vmap(svi.update, in_axes=(None, 0, 0), axis_name="data"))
    xs, ys = jnp.stack([x] * NUM_WORKERS), jnp.stack([y] * NUM_WORKERS)
    for _ in range(2):
        states, losses = update(state, xs, ys)
        state = jax.tree.map(lambda leaf: leaf[0], states)
        drawn = [
            {name: np.array(w[i]) for name, w in states.mutable_state["drawn"].items()} for i in range(NUM_WORKERS)
        ]
        for name in weights:
            settings = IVONSettings(
                num_data=12.0,
                weight_decay=1 / (12 * np.asarray(network.priors[name][1]) ** 2),
                prior_loc=network.priors[name][0],
                beta2=0.9999,
            )
            slopes = [network.gradient(draw)[name] / 12 for draw in drawn]
            estimates = [
                reference.factored_estimate(weights[name], draw[name], slope, settings)
                for draw, slope in zip(drawn, slopes, strict=True)
            ]
            weights[name] = reference.factored_ivon(
                weights[name], np.mean(slopes, 0), np.mean(estimates, 0), 0.1, settings
            )
            assert len({draw[name].tobytes() for draw in drawn}) == NUM_WORKERS, "draws of their own"
        for leaf in jax.tree.leaves(states.optim_state[1].weights):
            assert_array_equal(leaf, jnp.broadcast_to(leaf[0], leaf.shape), err_msg="the same at every position")
        assert_array_equal(losses, losses[0])
    for name, expected in weights.items():  # rounding, through a network
        for field in ("loc", "momentum", "hessian"):
            value = getattr(state.optim_state[1].weights, field)[name]
            assert_allclose(value, getattr(expected, field), rtol=1e-10, atol=1e-11)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, numpyro
from functools import partial
from jax.sharding import PartitionSpec as P
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
numpyro.enable_x64()
from tests.hosts.test_ivon_numpyro import COUNTS, NUM_WORKERS, model
from numpyro_blr import IVON

assert jax.device_count() == NUM_WORKERS
y = jnp.asarray(COUNTS)
svi = SVI(model, AutoNormal(model), IVON(axis_name="data"), Trace_ELBO())
state = svi.init(jax.random.key(0), y[:2])
mesh = jax.make_mesh((NUM_WORKERS,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
update = jax.jit(jax.shard_map(svi.update, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
mapped = jax.jit(jax.vmap(svi.update, in_axes=(None, 0), axis_name="data"))
expected = state
for _ in range(3):
    state, loss = update(state, y)
    states, losses = mapped(expected, y.reshape(NUM_WORKERS, -1))
    expected = jax.tree.map(lambda leaf: leaf[0], states)
    assert np.allclose(loss, losses[0], rtol=1e-12, atol=0)
weights = state.optim_state[1].weights
assert weights.count == 3
for left, right in zip(jax.tree.leaves(weights), jax.tree.leaves(expected.optim_state[1].weights), strict=True):
    assert np.allclose(left, right, rtol=1e-12, atol=0)  # another program
    shards = [np.asarray(shard.data) for shard in left.addressable_shards]
    assert len(shards) == NUM_WORKERS and all(np.array_equal(shard, shards[0]) for shard in shards)
svi.get_params(state)
"""


def test_devices_with_shards_of_the_data_are_positions_of_an_axis():
    """Four devices of this machine, in a process of its own, under `jax.shard_map` with all its checks."""
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_WORKERS}"}
    ran = subprocess.run(
        [sys.executable, "-c", SHARDED], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
