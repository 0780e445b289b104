"""Pyro's loss traced once: the numbers of the handlers without them, and what cannot be traced."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from itertools import count, cycle, islice
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose

torch = pytest.importorskip("torch")
pyro = pytest.importorskip("pyro")
from pyro import distributions as dist  # noqa: E402
from pyro.distributions import constraints  # noqa: E402
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate  # noqa: E402
from pyro.infer.autoguide import (  # noqa: E402
    AutoDelta,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from pyro_blr import BLR, AutoExponentialFamily  # noqa: E402
from pyro_blr.optim import _traced  # noqa: E402
from pyro_blr.optim._graph import Graph  # noqa: E402
from pyro_blr.optim._rewriting import direct, operations  # noqa: E402

pytestmark = pytest.mark.usefixtures("pyro_bridge")

random = np.random.default_rng(5)
X, NOISE, LABELS = random.normal(size=(12, 2)), random.normal(size=12), np.arange(12) % 3


def tensors(*arrays) -> tuple:
    return tuple(map(torch.as_tensor, arrays))


def fit(model, args=(), *, num_steps=4, compile=False, advance=(False,), guide=AutoNormal, loss=None, **options):
    """The parameters and the losses of a fit from a given random state, and its optimizer.

    Args:
        advance: of the steps in turn, whether to leave out the host's own evaluation of the loss.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    optimizer = BLR(**options)
    optimizer.compile = compile
    svi = SVI(model, guide(model), optimizer, loss or Trace_ELBO())
    steps = cycle([partial(optimizer.advance, svi) if alone else svi.step for alone in advance])
    losses = [step(*args) for step in islice(steps, num_steps)]
    return SimpleNamespace(params=stored(), losses=losses, optimizer=optimizer, svi=svi)


def stored() -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().named_parameters()}


def check_same(left: dict, right: dict, rtol: float = 1e-10) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert_allclose(left[name], right[name], rtol=rtol, atol=1e-10, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers


def logistic(x, y):
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    slope = pyro.sample("slope", dist.HalfCauchy(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=slope * (x @ weights)), obs=y)


def hierarchical(group, y):
    mean, spread = pyro.sample("mean", dist.Normal(0.0, 5.0)), pyro.sample("spread", dist.HalfCauchy(2.0))
    with pyro.plate("groups", 3):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
    pyro.deterministic("average", effect.mean())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(effect[..., group], 1.0), obs=y)


def gaussian_process(x, y):
    length, variance = pyro.sample("length", dist.LogNormal(0.0, 1.0)), pyro.sample("variance", dist.Gamma(2.0, 1.0))
    covariance = variance * torch.exp(-((x[:, None] - x) ** 2) / (2 * length**2)) + 0.1 * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def latent_field(x):
    """Sixteen coordinates beside two, on which a Cholesky factor depends alone: Hessians in two parts."""
    length, variance = pyro.sample("length", dist.LogNormal(0.0, 1.0)), pyro.sample("variance", dist.Gamma(2.0, 1.0))
    covariance = variance * torch.exp(-((x[:, None] - x) ** 2) / (2 * length**2)) + 0.01 * torch.eye(len(x))
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.linalg.cholesky(covariance) @ z, 1.0).to_event(1), obs=torch.sin(x))


def multinomial(counts):
    probs = pyro.sample("probs", dist.Dirichlet(torch.full((3,), 2.0)))
    pyro.sample("counts", dist.Multinomial(12, probs), obs=counts)


def categorical(x, labels):
    weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))
    with pyro.plate("data", len(labels)):
        pyro.sample("labels", dist.Categorical(logits=x @ weights), obs=labels)


def poisson(x, counts):
    weights = pyro.sample("weights", dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 0.5))
    with pyro.plate("data", len(counts)), pyro.poutine.scale(scale=2.0), pyro.poutine.mask(mask=counts < 2):
        pyro.sample("counts", dist.Poisson((x @ weights).exp()), obs=counts)


def factor():
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    pyro.factor("banana", -((z[0] ** 2 - z[1]) ** 2))


def ordinal(x, labels):
    """Whose log density writes into arrays."""
    cuts = pyro.sample("cuts", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    pyro.factor("cuts_prior", -(cuts**2).sum() / 8)
    with pyro.plate("data", len(labels)):
        pyro.sample("labels", dist.OrderedLogistic(slope * x[:, 0], cuts), obs=labels)


def chain(y):
    """A loop in Python, and an array that is filled."""
    persistence, state = pyro.sample("persistence", dist.Beta(2.0, 2.0)), torch.zeros(())
    mean = torch.zeros(4)
    for step in range(4):
        state = pyro.sample(f"state_{step}", dist.Normal(persistence * state, 1.0))
        mean[step] = state
    mean[1:] += 0.1
    pyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y[:4])


def at_cuts(model):
    """Parameters are made of the very tensors that they start at, so that each fit needs its own."""
    return AutoNormal(
        model, init_loc_fn=init_to_value(values={"cuts": torch.tensor([-0.5, 0.5]), "slope": torch.tensor(0.0)})
    )


CASES = {
    "mean field": (logistic, (X, 1.0 * (NOISE > 0)), {}),
    "full rank, a temperature, a rate": (
        logistic,
        (X, 1.0 * (NOISE > 0)),
        {"guide": AutoMultivariateNormal, "temperature": 0.5, "learning_rate": 0.3},
    ),
    "full rank": (logistic, (X, 1.0 * (NOISE > 0)), {"guide": AutoMultivariateNormal}),
    "points": (logistic, (X, 1.0 * (NOISE > 0)), {"guide": AutoDelta}),
    "hutchinson": (logistic, (X, 1.0 * (NOISE > 0)), {"estimator": "hutchinson"}),
    "secants": (logistic, (X, 1.0 * (NOISE > 0)), {"estimator": "secant"}),
    "secants, a rate": (logistic, (X, 1.0 * (NOISE > 0)), {"estimator": "secant", "learning_rate": 0.3}),
    "a temperature": (logistic, (X, 1.0 * (NOISE > 0)), {"temperature": 0.5}),
    "a rate": (logistic, (X, 1.0 * (NOISE > 0)), {"learning_rate": 0.3}),
    "particles": (logistic, (X, 1.0 * (NOISE > 0)), {"loss": Trace_ELBO(num_particles=3)}),
    "particles in a plate": (
        hierarchical,
        (LABELS, NOISE),
        {"loss": Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)},
    ),
    "an analytic entropy": (logistic, (X, 1.0 * (NOISE > 0)), {"loss": TraceMeanField_ELBO()}),
    "plates": (hierarchical, (LABELS, NOISE), {}),
    "a Cholesky factor": (gaussian_process, (X[:, 0], NOISE), {}),
    "two parts": (latent_field, (np.linspace(0, 3, 16),), {"guide": AutoMultivariateNormal}),
    "a simplex": (multinomial, (np.array([2.0, 3.0, 7.0]),), {}),
    "events": (categorical, (X, LABELS), {}),
    "masked and scaled data": (poisson, (X, 1.0 * LABELS), {}),
    "a factor": (factor, (), {}),
    "an improper prior": (ordinal, (X, 1.0 * LABELS), {"guide": at_cuts}),
    "a loop": (chain, (NOISE,), {}),
    "a loop, hutchinson": (chain, (NOISE,), {"estimator": "hutchinson"}),
}
# whose parts are in other cases, too
SLOW = ("mean field", "full rank", "a temperature", "a rate", "particles", "a loop, hutchinson")
cases = pytest.mark.parametrize(
    ("model", "args", "options"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else []) for name, case in CASES.items()],
)


@cases
def test_a_traced_step_is_the_step(model, args, options):
    """Same noise bit for bit, same numbers to rounding, with and without the host's own pass."""
    args, in_turn = tensors(*args), (False, True)
    expected = fit(model, args, advance=in_turn, **options)
    found = fit(model, args, compile=True, advance=in_turn, **options)
    assert found.optimizer.traced_reason is None
    check_same(found.params, expected.params)
    assert_allclose(found.losses, expected.losses, rtol=1e-9)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_a_step_on_the_stock_gradient_advances_at_the_host_s_own_draws(guide, compile):
    """Whose random state it leaves where `svi.step` does."""
    args, options = tensors(X, 1.0 * (NOISE > 0)), {"guide": guide, "estimator": "gradient", "learning_rate": 0.1}
    expected, state = fit(logistic, args, **options), torch.get_rng_state()
    found = fit(logistic, args, advance=(True,), compile=compile, **options)
    check_same(found.params, expected.params)
    assert_allclose(found.losses, expected.losses, rtol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("guide", [AutoNormal, AutoExponentialFamily])
def test_advance_is_the_step_without_the_host_s_pass(guide):
    """Untraced bit for bit, and for members of other families."""
    args = tensors(LABELS, NOISE)
    found, expected = (fit(hierarchical, args, advance=(advance,), guide=guide) for advance in (True, False))
    check_same(found.params, expected.params, 0)


def test_advance_calls_model_and_guide_only_while_the_graph_is_checked():
    calls = []

    def counted():
        calls.append(None)
        factor()

    used = fit(counted, advance=(True,), compile=True, num_steps=17)
    before = len(calls)
    for _ in range(15):
        used.optimizer.advance(used.svi)
    assert len(calls) == before, "the last check was at the 16th use, and the next is at the 32nd"
    assert np.isfinite(used.losses).all()


def test_the_draws_of_a_step_are_one_run_of_a_program(monkeypatch):
    """And a program is traced for no other number of draws, not even to check the graph: that is what takes time."""
    program, runs = Graph.program, []

    def noted(graph, transformation, scales, rows, inputs):
        run, num_at_once = program(graph, transformation, scales, rows, inputs)
        runs.append((transformation.__name__, len(rows[0]), num_at_once))
        return run, num_at_once

    monkeypatch.setattr(Graph, "program", noted)
    fit(logistic, tensors(X, LABELS % 2.0), num_steps=1, compile=True)
    assert {(name, num_draws) for name, num_draws, _ in runs} <= {("second_order", 2), ("_value", 2)}
    runs.clear()
    found = fit(logistic, tensors(X, LABELS % 2.0), num_steps=19, compile=True)  # whose last step checks nothing
    num_draws, before = 2 * found.optimizer.state.gaussian.recycling.num_pairs, len(runs)
    assert num_draws > 2
    found.optimizer.advance(found.svi, *tensors(X, LABELS % 2.0))
    assert [run for run in runs[before:] if run[0] == "second_order"] == [("second_order", num_draws, num_draws)]


@pytest.mark.parametrize("estimator", [pytest.param("hessian", marks=pytest.mark.slow), "hutchinson"])
def test_draws_that_do_not_fit_together_are_taken_in_parts(estimator, monkeypatch):
    args = tensors(X, 1.0 * (NOISE > 0))
    expected = fit(logistic, args, estimator=estimator, num_draws=6)
    # the largest array at one draw is a column of the data, for a Hessian in each of the three directions
    monkeypatch.setattr("pyro_blr.optim._graph.MAX_ELEMENTS", {"hessian": 3 * 36, "hutchinson": 3 * 24}[estimator])
    found = fit(logistic, args, estimator=estimator, num_draws=6, compile=True)
    check_same(found.params, expected.params)
    programs = [program for graph, _ in found.optimizer._tracer.graphs.values() for program in graph.programs.values()]
    assert min(num_at_once for _, num_at_once in programs) in (2, 3)


def test_single_precision():
    args = tuple(tensor.float() for tensor in tensors(X, 1.0 * (NOISE > 0)))
    torch.set_default_dtype(torch.float32)
    try:
        expected, found = fit(logistic, args), fit(logistic, args, compile=True)
    finally:
        torch.set_default_dtype(torch.float64)
    for name, value in found.params.items():
        assert value.dtype == np.float32
        assert_allclose(value, expected.params[name], rtol=1e-3, atol=1e-4)


def test_a_proposal_at_which_a_matrix_has_no_cholesky_factor_is_refused():
    """As it is untraced: the draw's loss is NaN, whatever the other draws are."""

    def model():
        correlation = pyro.sample("correlation", dist.Normal(0.0, 1.0))
        covariance = torch.eye(2) + correlation * (1 - torch.eye(2))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), covariance), obs=torch.tensor([1.0, 0.9]))

    guide = partial(AutoNormal, init_scale=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of steps that were not finite
        expected = fit(model, guide=guide, num_steps=12, advance=(True,))  # the host's own pass would raise
        found = fit(model, guide=guide, num_steps=12, advance=(True,), compile=True)
    assert found.optimizer.traced_reason is None
    assert found.optimizer.get_state()["skipped"] == expected.optimizer.get_state()["skipped"]
    assert found.optimizer.get_state()["evaluations"] == expected.optimizer.get_state()["evaluations"]
    check_same(found.params, expected.params)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that change


def test_data_are_inputs_and_other_shapes_and_numbers_are_traced_anew():
    def model(y, spread=1.0):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.StudentT(4.0, z, spread), obs=y)

    batches = [
        *((torch.as_tensor(NOISE[start : start + 4]),) for start in (0, 4, 8)),
        (torch.as_tensor(NOISE[:3]),),
        (torch.as_tensor(NOISE[4:8]),),
        (torch.as_tensor(NOISE[4:8]), 2.0),
    ]

    def after_all(compile):
        used = fit(model, batches[0], compile=compile, num_steps=1)
        for batch in batches:
            used.svi.step(*batch)
        return used

    found = after_all(True)
    assert len(found.optimizer._tracer.graphs) == 3
    check_same(found.params, after_all(False).params)


def test_a_prior_that_was_expanded_outside_of_the_model_is_traced():
    """`expand` keeps the validation of the moment: its look at a value was taken for a path that depends on one."""
    prior = dist.Normal(0.0, 3.0).expand([2]).to_event(1)

    def model(y):
        pyro.sample("y", dist.StudentT(4.0, pyro.sample("z", prior).sum(), 1.0).expand([len(y)]).to_event(1), obs=y)

    check_same(fit(model, tensors(NOISE), compile=True).params, fit(model, tensors(NOISE), compile=False).params)


@pytest.mark.parametrize("num_pairs", [1, 2], ids=["a program", "no program yet"])
def test_data_from_which_other_shapes_follow_are_evaluated_by_the_host(num_pairs):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        positive = y[y > 0]
        pyro.sample("y", dist.StudentT(4.0, z.expand(len(positive)), 1.0).to_event(1), obs=positive)

    def after_both(compile):
        used = fit(model, tensors(NOISE), compile=compile, num_steps=1)
        gaussian = used.optimizer.state.gaussian
        recycling = replace(gaussian.recycling, num_pairs=num_pairs)
        used.optimizer.state = replace(used.optimizer.state, gaussian=replace(gaussian, recycling=recycling))
        used.svi.step(*tensors(NOISE + 0.5))
        return stored()

    assert ((NOISE > 0).sum()) != ((NOISE + 0.5) > 0).sum()
    check_same(after_both(True), after_both(False))


@pytest.mark.slow
def test_arguments_that_never_stay_the_same_are_not_traced_for_ever():
    def model(temperature):
        pyro.factor("f", -temperature * pyro.sample("z", dist.Normal(0.0, 1.0)) ** 4)

    used = fit(model, (1.0,), compile="auto", num_steps=1)
    for step in range(10):
        used.svi.step(1.0 + step)
    assert "kinds" in used.optimizer.traced_reason
    assert len(used.optimizer._tracer.graphs) == 8


def test_what_the_model_reads_from_elsewhere_is_noticed_when_it_changes():
    factor_of = {"scale": 1.0}

    def model():
        pyro.factor("f", -factor_of["scale"] * pyro.sample("z", dist.Normal(0.0, 1.0)) ** 4)

    used = fit(model, compile="auto", num_steps=4)
    assert used.optimizer.traced_reason is None
    factor_of["scale"] = 2.0
    for _ in range(5):
        used.svi.step()
    assert "depends on what is no argument" in used.optimizer.traced_reason


def test_a_cleared_store_starts_anew():
    def guide(_):
        def by_hand():
            loc = pyro.param("loc", torch.zeros(2))
            scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

        return by_hand

    used = fit(factor, guide=guide, compile=True, advance=(True,), num_steps=2)
    pyro.clear_param_store()
    used.optimizer.advance(used.svi)
    assert used.optimizer.get_state()["count"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be traced


def minibatch(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=3) as rows:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def branching(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 2.0 if z > 0 else 1.0).expand([len(y)]).to_event(1), obs=y)


def noisy(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", -((z - torch.randn(())) ** 2))


def by_counting(y):
    """Never twice the same, in a way that no graph shows; unlike random numbers, its differences never agree."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", -((z - next(EVALUATIONS)) ** 2))


EVALUATIONS = count()


def with_parameter(y):
    z = pyro.sample("z", dist.Normal(pyro.param("shift", torch.zeros(())), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([len(y)]).to_event(1), obs=y)


def rates(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y.abs())


@config_enumerate
def mixture(y):
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 2.0))
    with pyro.plate("data", len(y)):
        component = pyro.sample("component", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[component], 1.0), obs=y)


def continuous(model):
    return AutoNormal(pyro.poutine.block(model, hide=["component"]))


UNTRACEABLE = {
    "minibatches": (minibatch, {}, "a plate is subsampled"),
    "a branch": (branching, {}, "a path that depends on values"),
    "random numbers": (noisy, {}, "random numbers of its own"),
    "numbers of its own elsewhere": (by_counting, {}, "differ from those of the host's loss"),
    "members": (rates, {"guide": AutoExponentialFamily}, "of other families"),
    "enumeration": (mixture, {"guide": continuous, "loss": TraceEnum_ELBO(max_plate_nesting=1)}, "enumeration"),
}
untraceable = pytest.mark.parametrize(("model", "options", "reason"), UNTRACEABLE.values(), ids=UNTRACEABLE)


@untraceable
def test_auto_evaluates_it_as_it_is_and_keeps_the_reason(model, options, reason):
    args = tensors(NOISE)
    found = fit(model, args, compile="auto", num_steps=3, **options)
    assert reason in found.optimizer.traced_reason
    if model is not by_counting:
        check_same(found.params, fit(model, args, num_steps=3, **options).params, 0)


def test_auto_does_not_trace_what_takes_minutes(monkeypatch):
    """A loss of very many operations, as that of a differential equation solved step by step; True traces it still."""
    monkeypatch.setattr(_traced, "MAX_OPERATIONS", 3)
    args = tensors(NOISE)
    assert "operations, whose derivatives" in fit(branchless, args, num_steps=1, compile="auto").optimizer.traced_reason
    assert fit(branchless, args, num_steps=1, compile=True).optimizer.traced_reason is None


def branchless(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0).expand([len(y)]).to_event(1), obs=y)


@untraceable
def test_true_says_what_was_expected_what_came_and_the_way_out(model, options, reason):
    args = tensors(NOISE)
    with pytest.raises(RuntimeError, match=f"compile=True expects a loss.*{reason}.*compile='auto'"):
        fit(model, args, compile=True, num_steps=1, **options)


def test_points_are_traced_and_parameters_of_other_optimizers_are_not():
    check_same(*(fit(with_parameter, tensors(NOISE), compile=compile).params for compile in (True, False)))
    with pytest.warns(UserWarning, match="shift"):
        found = fit(with_parameter, tensors(NOISE), compile="auto", advance=(True,), num_steps=2, learning_rate=0.5)
    assert "shift belong to no site" in found.optimizer.traced_reason


def test_a_program_calls_torchs_own_functions():
    def function(x):
        return torch.where(x > 1, 2 * x.exp(), x.expand(2, 3)).sum(0) @ x.pow(2)

    x = torch.tensor([0.5, 1.5, 2.5])
    graph = make_fx(function)(x)
    run = direct(graph)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert {torch.gt, torch.exp, torch.mul, torch.Tensor.expand, torch.where, torch.sum, torch.pow} <= called
    assert not operations(graph), "of torch.ops.aten nothing is left"
    assert_allclose(run(x).numpy(), function(x).numpy(), rtol=1e-15)
