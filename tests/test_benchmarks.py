"""The benchmark on reference posteriors: the hosts' models are the same, batch and match is right, everything runs."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = (
    pytest.param("ar5", marks=pytest.mark.slow),
    "blr_correlated",
    "earnings_interaction",
    "eight_schools_centered",
    "eight_schools_noncentered",
    pytest.param("gp_regression", marks=pytest.mark.slow),
    pytest.param("hmm_two_state", marks=pytest.mark.slow),
    "kidiq_momhsiq",
    "mesquite_log",
    "nes2000",
)
SHAPES = {"X": (20, 3), "K": None}  # of the data that are no vectors of 20
SPECIAL = {"age_discrete": lambda random: random.integers(1, 5, 20), "K": lambda random: 5}


@pytest.fixture
def load(monkeypatch):
    """Imports a module of the benchmarks as their scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def made_up(model, random: np.random.Generator) -> dict:
    """Positive data, since some models take logarithms, in place of what a file would have."""
    return {
        name: SPECIAL[name](random) if name in SPECIAL else random.uniform(0.5, 3.0, SHAPES.get(name, (20,)))
        for name in inspect.signature(model).parameters
    }


def as_arrays(data: dict, array) -> dict:
    return {name: value if isinstance(value, int) else array(np.asarray(value, float)) for name, value in data.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_models_of_the_hosts_have_one_density_and_one_unconstrained_space(name, both, load, random):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.infer.util
    import pyro.poutine
    import torch
    from torch.distributions import biject_to

    mine, theirs = load("_models_numpyro").MODELS[name], load("_models_pyro").MODELS[name]
    assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs).parameters)
    data = made_up(mine, random)
    arrays, tensors = as_arrays(data, jnp.asarray), as_arrays(data, torch.as_tensor)
    with jax.numpy_dtype_promotion("standard"):  # NumPyro's own ordered vectors mix dtypes
        info = numpyro.infer.util.initialize_model(jax.random.key(0), mine, model_kwargs=arrays)
        free = {key: random.normal(size=value.shape) for key, value in info.param_info.z.items()}
        values = {key: np.array(value) for key, value in info.postprocess_fn(free).items()}
        expected, _ = numpyro.infer.util.log_density(mine, (), arrays, {key: values[key] for key in free})

    conditioned = pyro.poutine.condition(theirs, {key: torch.as_tensor(values[key]) for key in free})
    trace = pyro.poutine.trace(conditioned).get_trace(**tensors)
    assert_allclose(float(trace.log_prob_sum()), float(expected), rtol=1e-10, atol=1e-10)
    for key, value in free.items():
        transform = biject_to(trace.nodes[key]["fn"].support)
        assert_allclose(transform(torch.as_tensor(value)).numpy(), values[key], rtol=1e-10)
    derived = {key for key in values if key not in free}
    assert derived <= set(trace.nodes)
    for key in derived:
        assert_allclose(trace.nodes[key]["value"].numpy(), values[key], rtol=1e-10)


def test_the_densities_that_the_hosts_are_measured_by_are_the_same(both, load, random):
    """In the unconstrained space, the coordinates in one order: here scalars and a vector that changes places."""
    import jax.numpy as jnp
    import torch

    posterior = made_up_posterior(load, "eight_schools_centered", random)
    budget = load("_fits").Budget().quick()
    mine, theirs = (load(f"_methods_{host}").Problem(posterior, "full rank", budget) for host in ("numpyro", "pyro"))
    z = random.normal(size=posterior.dimension)
    expected = float(mine.log_density(jnp.asarray(z)))
    assert_allclose(float(theirs.log_density(torch.as_tensor(z))), expected, rtol=1e-10)


@pytest.mark.parametrize("guide", ["mean field", "full rank"])
@pytest.mark.parametrize("host", ["numpyro", "pyro"])
def test_a_guide_is_read_with_its_coordinates_in_the_order_of_the_density(host, guide, both, load, random):
    """On a model whose sites are not in alphabetical order: its median is the constrained location."""
    posterior = made_up_posterior(load, "gp_regression", random)
    module = load(f"_methods_{host}")
    problem = module.Problem(posterior, guide, load("_fits").Budget().quick())
    if host == "numpyro":
        svi, (state,) = problem.start(importlib.import_module("numpyro").optim.Adam(0.01), 1)
        loc, scale = problem.gaussian(svi, state)
        median = svi.guide.median(svi.get_params(state))
    else:
        svi = problem.start(0, importlib.import_module("pyro").optim.Adam({"lr": 0.01}))
        loc, scale = problem.gaussian(svi)
        median = svi.guide.median()
    constrained = problem.constrained(loc[None])
    assert_allclose(scale, np.eye(3) / 10, rtol=1e-12)
    for name in posterior.mean:
        assert_allclose(constrained[name][0], np.asarray(median[name]), rtol=1e-12)


def test_batch_and_match_lands_on_a_gaussian(both, load, random):
    """At the target an update stays there, whatever the draws; elsewhere it gets there, with λ constant."""
    import jax
    import jax.numpy as jnp

    module = load("_score_matching")
    loc, root = random.normal(size=4), random.normal(size=(4, 4))
    covariance = root @ root.T + np.eye(4) / 10
    precision = np.linalg.inv(covariance)

    def log_density(z):
        return -(z - loc) @ precision @ (z - loc) / 2

    target = module.Gaussian(jnp.asarray(loc), jnp.asarray(covariance))
    draws = random.normal(size=(6, 4))
    stayed = module.bam_update(target, draws, -(draws - loc) @ precision, 3.0)
    assert_allclose(stayed.loc, loc, rtol=1e-9)
    assert_allclose(stayed.covariance, covariance, rtol=1e-9)

    start = module.Gaussian(jnp.zeros(4), jnp.eye(4) / 100)
    state = module.ScoreState(start, jnp.zeros(()), jax.random.key(0))
    state = jax.lax.fori_loop(0, 100, lambda _, state: module.bam_step(log_density, 16, state, True), state)
    assert_allclose(state.gaussian.loc, loc, rtol=1e-6)
    assert_allclose(state.gaussian.covariance, covariance, rtol=1e-6)


def made_up_posterior(load, name: str, random: np.random.Generator):
    """With moments made up as well, of the right shapes."""
    data = made_up(load("_models_numpyro").MODELS[name], random)
    shapes = {
        "eight_schools_centered": {"mu": (), "tau": (), "theta": (20,)},
        "gp_regression": {"rho": (), "alpha": (), "sigma": ()},
    }[name]
    return load("_posteriors").Posterior(
        name=name,
        dimension=sum(math.prod(shape) for shape in shapes.values()),
        data=data,
        draws={},
        mean={key: np.zeros(shape) for key, shape in shapes.items()},
        sd={key: np.ones(shape) for key, shape in shapes.items()},
    )


@pytest.mark.slow
def test_the_benchmark_runs_writes_and_goes_on_from_what_it_kept(
    numpyro_bridge, load, tmp_path, random, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    data = {"X": random.normal(size=(20, 3)).tolist(), "y": random.normal(size=20).tolist()}
    moments = {"beta": {"mean": [0.0] * 3, "sd": [1.0] * 3}, "sigma": {"mean": 1.0, "sd": 0.2}}
    record = {
        "unconstrained_dim": 4,
        "data": data,
        "reference": moments,
        "draws": {"beta": [[0.0] * 3], "sigma": [1.0]},
    }
    (tmp_path / "blr_correlated.json").write_text(json.dumps(record))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("markdown", "figure.png", "record")}
    options = [
        *("--data", str(tmp_path), "--host", "numpyro", "--quick", "--guides", "full rank", "--seeds", "1"),
        *("--methods", "BLR()", "Adam", "BaM", "--keep", str(tmp_path / "kept")),
        *("--markdown", str(files["markdown"]), "--figure", str(files["figure.png"])),
        *("--json", str(files["record"])),
    ]
    benchmark = load("reference")
    benchmark.main(options)
    table = files["markdown"].read_text()
    assert "BLR()" in table and "BaM" in table and table.strip() in capsys.readouterr().out
    assert files["figure.png"].read_bytes().startswith(b"\x89PNG")
    entries = {entry["method"]: entry for entry in json.loads(files["record"].read_text())}
    assert set(entries) == {"BLR()", "Adam", "BaM"}
    starts = [entry["curve"]["elbos"][0][0] for entry in entries.values()]
    assert_allclose(starts, starts[0], rtol=1e-10)  # the same start, the same noise
    assert entries["BLR()"]["settings"][""]["final_gaps"][0] < 0.1

    monkeypatch.setattr(load("_methods_numpyro"), "fits", None)  # what is kept is not run again
    files["markdown"].unlink()
    benchmark.main(options)
    assert files["markdown"].read_text() == table
    with pytest.raises(ValueError, match="name another --keep"):
        benchmark.main([*options, "--seeds", "2"])


def test_the_data_are_asked_for_by_name(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="--data takes the folder"):
        load("_posteriors").load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["numpyro", "pyro"])
def test_the_first_step_on_a_sparse_gaussian_process_is_the_collapsed_bound(load, host, request):
    """log N(y | 0, Q + σ² I) − tr(K − Q)/2σ² (Titsias 2009), and the benchmark's own formula says so."""
    pytest.importorskip("sklearn")
    request.getfixturevalue(f"{host}_bridge")
    module = load("gaussian_processes")
    problem = module.problem("regression", learned=False)
    _, place = next({"numpyro": module.numpyro_steps, "pyro": module.pyro_steps}[host](problem))
    values = problem.start
    solve = lambda factor, right: np.linalg.solve(factor, right)  # noqa: E731
    a, variance = module.projected(np, solve, *module.distances(problem), values)
    covariance = a @ a.T + values["noise"] * np.eye(len(problem.y))
    _, log_determinant = np.linalg.slogdet(2 * np.pi * covariance)
    collapsed = -(problem.y @ np.linalg.solve(covariance, problem.y) + log_determinant) / 2
    collapsed -= variance.sum() / (2 * values["noise"])
    assert_allclose(module.elbo(problem)(place), collapsed, rtol=1e-10)


class Captured(Exception):
    """In place of a fit, with the model that was to be fitted."""


@pytest.mark.parametrize("name", ["visits", "affairs", "digits"])
def test_the_formula_of_the_minibatches_is_the_density_of_both_models(name, both, load, random, monkeypatch):
    """Up to one constant, at three places of the unconstrained space, on all rows."""
    import jax
    import numpyro.infer.util
    import pyro.infer
    import pyro.poutine
    import torch

    for package in ("numpyro_blr", "pyro_blr"):
        importlib.import_module(package)  # before they could take the stand-in for the hosts' SVI
    benchmark = load("minibatches")
    task = benchmark.problem(name)
    task = task._replace(batch=len(task.y))

    def capture(model, *_):
        raise Captured(model)

    def captured(places):
        with pytest.raises(Captured) as caught:
            next(places(task, 0.1, [1], 0))
        return caught.value.args[0]

    for host in (numpyro, pyro):
        monkeypatch.setattr(host.infer, "SVI", capture)
    mine, theirs = captured(benchmark.numpyro_places), captured(benchmark.pyro_places)
    rows, tensors = (task.x, task.y), tuple(map(torch.as_tensor, (task.x, task.y)))
    constants = []
    for _ in range(3):
        free = {"weights": 0.2 * random.normal(size=task.shape), "size": random.normal()}
        values = {"weights": free["weights"]} | ({"size": np.exp(free["size"])} if name == "visits" else {})
        jacobian, expected = free["size"] if name == "visits" else 0.0, benchmark.log_density(task, free)
        with jax.numpy_dtype_promotion("standard"), numpyro.handlers.seed(rng_seed=0):
            found = float(numpyro.infer.util.log_density(mine, rows, {}, values)[0])
        given = {key: torch.as_tensor(value) for key, value in values.items()}
        trace = pyro.poutine.trace(pyro.poutine.condition(theirs, given)).get_trace(*tensors)
        constants.append([found + jacobian - expected, float(trace.log_prob_sum()) + jacobian - expected])
    # NumPyro's negative binomial is right to a hundred-millionth of its 70,000 nats
    assert_allclose(constants, np.full((3, 2), constants[0][0]), rtol=0, atol=0.005)


@pytest.mark.slow
def test_the_models_of_many_coordinates_are_the_same_in_both_hosts(both, load):
    """Log density at a draw of the prior, and the number of coordinates."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.infer.util
    import pyro.poutine
    import torch
    from pyro.poutine.util import prune_subsample_sites

    pytest.importorskip("sklearn")
    pytest.importorskip("statsmodels")
    module = load("_models_many")
    mine, theirs = module.models(numpyro, jnp), module.models(pyro, torch)
    assert tuple(mine) == tuple(theirs) == module.MODELS
    for name, (model, data) in theirs.items():
        trace = prune_subsample_sites(pyro.poutine.trace(model).get_trace(*map(torch.as_tensor, data)))
        values = {site: trace.nodes[site]["value"].numpy() for site in trace.stochastic_nodes}
        assert sum(value.size for value in values.values()) > 256
        with jax.numpy_dtype_promotion("standard"), numpyro.handlers.seed(rng_seed=0):
            found = float(numpyro.infer.util.log_density(mine[name][0], mine[name][1], {}, values)[0])
        assert_allclose(found, float(trace.log_prob_sum()), rtol=1e-9)
