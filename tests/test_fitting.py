"""`fit` stops by itself where it should, says what it knows and no more, and warns of what it sees."""

from __future__ import annotations

import functools
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from numpy.testing import assert_allclose, assert_array_equal

from . import cases

CHECK = {
    "elbo": -50.0,
    "elbo_error": 0.01,
    "residual": 1e-4,
    "error": 1e-3,
    "rate": 1.0,
    "effective": 20.0,
    "noise_cost": 1e-3,
}


@functools.cache
def poisson_data() -> tuple[np.ndarray, np.ndarray]:
    problem = cases.poisson()
    return problem.inputs, problem.counts


def poisson(host):
    def model(x, y):
        weights = host.sample("weights", host.dist.Normal(host.array(np.zeros(cases.DIMENSION)), 1.0).to_event(1))
        host.deterministic("first", weights[..., 0])
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Poisson(host.xp.exp((x * weights).sum(-1))), obs=y)

    return model


def poisson_optimum() -> float:
    """The largest ELBO of a full-rank Gaussian, by SciPy on its closed form."""
    problem = cases.poisson()
    size = cases.DIMENSION
    below = np.tril_indices(size)
    constant = -np.vectorize(math.lgamma)(problem.counts + 1.0).sum()

    def loss(flat: np.ndarray) -> float:
        loc, factor = flat[:size], np.zeros((size, size))
        factor[below] = flat[size:]
        projected = problem.inputs @ factor
        rates = np.exp(problem.inputs @ loc + (projected**2).sum(1) / 2)
        energy = rates.sum() - problem.counts @ problem.inputs @ loc + (loc @ loc + (factor**2).sum()) / 2
        return energy - np.log(np.abs(np.diag(factor))).sum() - size / 2

    start = np.concatenate([np.zeros(size), 0.3 * np.eye(size)[below]])
    return constant - scipy.optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-7}).fun


def funnel(host):
    def model():
        neck = host.sample("a_neck", host.dist.Normal(0.0, 3.0))
        host.sample("b_mouth", host.dist.Normal(host.array(np.zeros(9)), host.xp.exp(neck / 2)).to_event(1))

    return model


def counts(host):
    def model(y):
        rate = host.sample("rate", host.dist.Gamma(2.0, 0.5))
        with host.plate("data", len(y)):
            host.sample("y", host.dist.Poisson(rate), obs=y)

    return model


def batches(host):
    def model(y):
        center = host.sample("center", host.dist.Normal(0.0, 2.0))
        with host.plate("data", 8, subsample_size=4):
            host.sample("y", host.dist.Normal(center, 1.0), obs=y)

    return model


@functools.cache
def _of_poisson(backend):
    return backend.fit(poisson, "AutoMultivariateNormal", poisson_data())


@pytest.fixture
def of_poisson(backend):
    pytest.importorskip("arviz")
    return _of_poisson(backend)


# ---------------------------------------------------------------------------------------------------------------------
# The stopping rule


@pytest.fixture
def judge(backend):
    """(changes of a check, ...), basis -> (converged, reason), with as many losses as there are steps."""
    module = backend.module("fitting")

    def judge(*changes: dict, basis: str = "recycled", losses=None, tolerance: float = 0.01):
        checks = [module.Check(step=5 * (k + 1), **{**CHECK, **change}) for k, change in enumerate(changes)]
        return module.judge(checks, np.zeros(checks[-1].step) if losses is None else losses, basis, tolerance)

    return judge


def test_two_quiet_checks_are_convergence_and_one_is_not(judge):
    assert judge({}, {})[0]
    assert not judge({})[0]
    assert not judge({"residual": 1.0}, {})[0]
    assert not judge({}, {"residual": 1.0})[0]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"residual": 0.01}, "still gain"),  # 5 V, and 0.005 nat
        ({"noise_cost": 0.02}, "noise still cost about 0.02"),
        ({"noise_cost": math.nan}, "noise still cost"),
        ({"elbo_error": math.inf}, "not finite"),
        ({"elbo": -math.inf}, "not finite"),
        ({"effective": 7.0}, "worth 7.0"),
        ({"residual": math.nan}, "still gain"),
        ({"elbo": -49.9}, "still rose"),
        ({"curvature": -1.0}, "a saddle"),
        ({"curvature": 0.1}, "nothing holds the posterior"),
        ({"curvature": 0.1, "noise_cost": 0.5}, "nothing holds the posterior"),
    ],
)
def test_what_is_missing_is_said(judge, change, reason):
    converged, said = judge({}, change)
    assert not converged and reason in said


def test_a_negligible_gain_is_convergence_whatever_its_noise(judge):
    assert judge({"residual": 1.9e-3, "error": 1e-9}, {"residual": 1.9e-3, "error": 1e-9})[0]
    assert not judge({"residual": 2.1e-3, "error": 1e-9}, {"residual": 2.1e-3, "error": 1e-9})[0]


def test_the_rate_averages_the_noise_of_fresh_draws_but_not_of_recycled_ones(judge):
    noisy = {"error": 0.1, "noise_cost": 0.05, "rate": 0.05}  # V/2 is 0.05 nat, of which ρ/(2 − ρ) leaves 0.0013
    assert judge(noisy, noisy, basis="drawn")[0]
    assert not judge(noisy, noisy, basis="recycled")[0]
    assert judge({"effective": math.nan}, {"effective": math.nan}, basis="drawn")[0]


def test_a_mean_that_creeps_on_has_not_converged(judge):
    assert judge({"creep": 9e-4}, {"creep": 9e-4}, basis="drawn")[0]
    converged, reason = judge({"creep": 9e-4}, {"creep": 2e-3}, basis="drawn")
    assert not converged and "drifted" in reason and "0.002 nat" in reason


def test_an_exact_elbo_that_stands_still_is_convergence(judge):
    assert judge({"elbo": -50.0}, {"elbo": -50.0005}, basis="exact")[0]
    assert not judge({"elbo": -50.0}, {"elbo": -49.99}, basis="exact")[0]


def test_averaged_losses_converge_where_they_do_not_fall_at_a_small_rate(judge, random):
    noise = random.normal(size=90)
    settled, falling = noise, noise - np.arange(90.0)
    assert judge({"rate": 0.05}, basis="averaged", losses=settled)[0]
    assert "no proof" in judge({"rate": 0.05}, basis="averaged", losses=settled)[1]
    assert not judge({"rate": 0.5}, basis="averaged", losses=settled)[0]
    assert not judge({"rate": 0.05}, basis="averaged", losses=falling)[0]
    # the noise of minibatches is in r² alone: c r²/2 = 0.05/1.95/2 r²
    assert judge({"rate": 0.05, "residual": 0.7}, basis="averaged", losses=settled)[0]
    converged, reason = judge({"rate": 0.05, "residual": 0.9}, basis="averaged", losses=settled)
    assert not converged and "noise still cost about 0.012 nat" in reason
    assert judge({"rate": 0.05, "residual": math.nan, "drift": 0.9}, basis="averaged", losses=settled)[0]
    converged, reason = judge({"rate": 0.05, "drift": 1.1}, basis="averaged", losses=settled)
    assert not converged and "moved on by 1.1 of their spread" in reason
    assert not judge({"rate": 0.05}, basis="averaged", losses=settled[:20])[0]


def test_a_mean_that_creeps_on_is_told_from_one_that_goes_to_and_fro(backend, random):
    """A drift of 0.02 standard deviations a step along one of 400 coordinates, which all have noise of 0.03."""
    fitting = backend.module("fitting")
    checks = [fitting.Check(step, -50.0, 0.01, rate=0.1) for step in range(5, 205, 5)]
    noise = 0.03 * random.normal(size=(40, 400))
    assert fitting._creep(list(noise), checks, np.ones(400)) == 0
    drift = np.zeros(400)
    drift[7] = 0.02
    places = [check.step * drift + place for check, place in zip(checks, noise, strict=True)]
    for precision in (np.ones(400), np.eye(400)):
        gained = fitting._creep(places, checks, precision)
        assert_allclose(gained, (50 * 0.02) ** 2 / (2 * 0.1 * 50), rtol=0.2)
    assert math.isnan(fitting._creep(places[:5], checks[:5], np.ones(400)))


def test_a_steady_drift_is_told_from_noise(backend, random):
    drift = backend.module("fitting")._drift
    steady = np.linspace(0.0, 1.0, 300)[:, None] * np.ones(4)
    assert_allclose(drift(list(steady)), 12**0.5, rtol=2e-2)
    assert drift(list(random.normal(size=(300, 4)))) < 1
    assert drift(list(1e-4 * steady)) < 1, "negligible"
    assert math.isnan(drift(list(steady[:5]))) and math.isnan(drift(9 * [np.zeros(0)]))


def test_the_least_curvature_is_that_of_the_pencil(backend, random):
    least = backend.module("fitting")._least_curvature
    units, factor = 10.0 ** np.array([-6.0, 0.0, 6.0]), random.normal(size=(3, 3))
    precision, hessian = factor @ factor.T + np.eye(3), np.diag([1.0, -2.0, 3.0])
    expected = scipy.linalg.eigh(hessian, precision, eigvals_only=True)[0]
    scaled = [units * matrix * units[:, None] for matrix in (precision, hessian)]
    assert_allclose(least(*scaled), expected, rtol=1e-8)
    assert math.isnan(least(np.ones((2, 2), "float32"), np.eye(2, dtype="float32")))
    assert math.isnan(least(np.eye(2), np.full((2, 2), np.nan)))


def test_checks_come_further_apart_and_never_beyond_the_budget(backend):
    between = backend.module("fitting").num_steps_between_checks
    assert [between(steps, 1000) for steps in (0, 99, 200, 998)] == [5, 5, 10, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Fits


def test_a_conjugate_regression_is_exact_within_a_few_steps(backend):
    model = cases.linear()
    result = backend.fit(model.make, "AutoMultivariateNormal", model.args)
    assert result.converged and result.steps <= 20
    assert_allclose(result.elbo, -model.negative_log_evidence, rtol=1e-8)
    draws = result.sample(10)
    assert {name: tuple(value.shape) for name, value in draws.items()} == {"coefficients": (10, 3), "intercept": (10,)}


def test_a_fit_stops_by_itself_at_the_optimum(backend, of_poisson):
    optimum = poisson_optimum()
    assert of_poisson.converged and of_poisson.steps < 200
    assert abs(of_poisson.elbo - optimum) < 4 * of_poisson.elbo_error + 0.05
    log_weights = of_poisson.to_arviz(2000).sample_stats["log_weight"].to_numpy()
    error = log_weights.std() / log_weights.size**0.5
    assert abs(log_weights.mean() - optimum) < 0.05 + 4 * error, "E_q[log p − log q] by draws that the fit did not see"
    assert abs(log_weights.mean() - of_poisson.elbo) < 4 * math.hypot(error, of_poisson.elbo_error)


def test_the_elbo_is_at_draws_that_the_guide_was_not_fitted_to(of_poisson):
    log_weights = of_poisson.log_weights(300)
    assert_allclose(of_poisson.elbo, log_weights.mean())
    assert_allclose(of_poisson.elbo_error, log_weights.std(ddof=1) / 300**0.5)
    assert of_poisson.elbo != of_poisson.history["elbo"][-1]


def test_a_guide_that_reaches_where_there_is_no_density_has_an_elbo_of_minus_infinity(backend):
    def make(host):
        def model():
            z = host.sample("z", host.dist.Normal(0.0, 1.0))
            host.factor("edge", host.xp.where(z > 1.5, -math.inf, 0.0 * z))

        return model

    with pytest.warns(UserWarning) as caught:
        result = backend.fit(make, "AutoNormal", (), max_steps=20)
    assert any("not finite at one of 300 draws of the guide" in str(one.message) for one in caught)
    assert result.elbo == -math.inf and math.isnan(result.elbo_error)


def test_the_history_has_a_number_for_each_check(backend, of_poisson):
    steps = of_poisson.history["step"]
    names = {"step", "elbo", "elbo_error", "residual", "error", "rate"}
    names |= {"effective", "noise_cost", "curvature", "creep", "drift"}
    assert of_poisson.history.keys() == names
    assert all(len(values) == len(steps) for values in of_poisson.history.values())
    assert steps[-1] == of_poisson.steps == len(of_poisson.losses)
    assert of_poisson.gradient_evaluations > of_poisson.steps
    assert np.isfinite(of_poisson.losses).all()
    assert of_poisson.history["rate"][-1] == float(backend.gaussian_of(of_poisson).rate.taken)


def test_curvatures_by_products_that_do_not_converge_are_told_of_whole_ones(backend):
    diagonal = backend.BLR(estimator="hutchinson")
    with pytest.warns(UserWarning, match=r"not converged in 1 steps.*Curvatures here come from products.*='hessian'"):
        backend.fit(poisson, "AutoNormal", poisson_data(), max_steps=1, optimizer=diagonal)


SAME = pytest.param(0, marks=pytest.mark.slow_to_compile)


@pytest.mark.parametrize("seed", [SAME, 4])
def test_a_budget_that_ends_is_said_and_a_seed_gives_the_same_numbers_whatever_the_budget(backend, of_poisson, seed):
    with pytest.warns(UserWarning, match=r"not converged in 2 steps \(max_steps=2\): .*Give more steps"):
        result = backend.fit(poisson, "AutoMultivariateNormal", poisson_data(), max_steps=2, seed=seed)
    assert not result.converged and result.steps == 2
    same = np.isclose(result.losses, of_poisson.losses[:2], rtol=1e-12)  # two programs, rounded differently
    assert_array_equal(same, seed == 0)


def test_a_family_that_cannot_fit_is_said(backend):
    pytest.importorskip("arviz")
    with pytest.warns(UserWarning, match="does not cover the posterior.*AutoMultivariateNormal.*reparametrise"):
        result = backend.fit(funnel, "AutoNormal", (), max_steps=300, tolerance=0.5)
    assert result.pareto_k > 0.7


def switched(host):
    """Of two components, where every datum knows its own: the weight and the choices hang together."""

    def model(x):
        weight = host.sample("weight", host.dist.Beta(host.array(1.0), 1.0))
        for i in range(3):
            choice = host.sample(f"choice_{i}", host.dist.Bernoulli(weight))
            host.sample(f"x_{i}", host.dist.Normal(3.0 * choice, 1.0), obs=x[i])

    return model


@pytest.mark.slow
def test_of_discrete_sites_that_it_does_not_cover_a_fit_says_another_way_out(backend):
    """And the host's warning, that their gradients are wrong, is not passed on: no draw of them is differentiated."""
    pytest.importorskip("arviz")
    with backend.promotion(lax=True), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = backend.fit(switched, "AutoExponentialFamily", (np.array([0.0, 3.0, 0.2]),))
    assert result.converged and result.pareto_k > 0.7
    (text,) = [str(warning.message) for warning in said if issubclass(warning.category, UserWarning)]
    assert "does not cover the posterior" in text and text.endswith("a mixture distribution, or enumeration.")


def test_a_parameter_of_the_model_is_fitted_with_the_guide(backend):
    """y ~ N(z, 1/2), z ~ N(center, 1): at center = y the evidence is N(y | y, 5/4), and q is the posterior."""
    pytest.importorskip("arviz")

    def make(host):
        def model(y):
            z = host.sample("z", host.dist.Normal(host.param("center", host.array(0.3)), 1.0))
            host.sample("y", host.dist.Normal(z, 0.5), obs=y)

        return model

    result = backend.fit(make, "AutoNormal", (np.array(1.5),))
    assert result.converged and result.steps <= 20
    assert_allclose(result.elbo, -math.log(2 * math.pi * 1.25) / 2, rtol=1e-8)
    assert_allclose(backend.to_numpy(result.params["center"]), 1.5, rtol=1e-8)
    assert result.pareto_k < 0.7


def test_exact_sweeps_stop_where_the_elbo_stands_still(backend):
    result = backend.fit(counts, "AutoExponentialFamily", (np.array([3.0, 5.0, 2.0, 7.0]),))
    assert result.converged and result.steps == 10 and "exact ELBO" in result.reason
    assert result.elbo_error == 0 and result.site_residuals == {}


def test_minibatches_are_judged_by_their_losses(backend):
    with pytest.warns(UserWarning, match="not converged"):
        result = backend.fit(batches, "AutoNormal", (np.ones(4),), max_steps=10)
    assert "too few" in result.reason and "minibatch" in result.no_weights
    with pytest.raises(ValueError, match="minibatch"):
        result.psis()


def test_a_model_that_lets_nothing_move_is_said(backend):
    factor = getattr(backend, backend.name).factor

    def make(host):
        def model():
            value = host.sample("z", host.dist.Normal(0.0, 1.0))
            # falls where its derivative says that it rises
            factor("wrong", 2e6 * value - backend.constant(3e6 * value))

        return model

    with pytest.warns(UserWarning) as caught:
        result = backend.fit(make, "AutoNormal", (), max_steps=12)
    assert not result.converged
    assert any("refused" in str(one.message) or "rate was cut" in str(one.message) for one in caught)


# ---------------------------------------------------------------------------------------------------------------------
# What is returned


def test_the_report_has_what_one_wants_to_know(of_poisson):
    report = str(of_poisson)
    for part in ("ELBO", "±", "converged", "steps", "gradient evaluations", "Pareto k̂", "r²", "site"):
        assert part in report
    assert of_poisson.reason in report and f"{of_poisson.gradient_evaluations:,}" in report
    ((residual, noise),) = of_poisson.site_residuals.values()
    assert 0 <= residual < 1 and 0 < noise < 1
    assert "converged=True" in repr(of_poisson) and "\n" not in repr(of_poisson)


def test_pareto_k_is_small_where_the_guide_fits(of_poisson):
    assert of_poisson.psis(500) < 0.7
    assert of_poisson.pareto_k < 0.7
    assert of_poisson.psis(500) == of_poisson.psis(500), "the same draws at every call"


def test_to_arviz_has_the_sites_the_weights_and_the_data(of_poisson):
    data = of_poisson.to_arviz(50)
    assert set(data.posterior.data_vars) == {"weights", "first"}
    assert data.posterior["weights"].shape == (1, 50, cases.DIMENSION)
    assert_allclose(data.posterior["first"], data.posterior["weights"][..., 0])
    assert data.sample_stats["log_weight"].shape == (1, 50)
    assert_allclose(data.observed_data["y"], poisson_data()[1])


def test_as_many_draws_as_are_asked_for_each_a_new_one(backend, of_poisson):
    for num_draws in (1, 250):
        drawn = backend.to_numpy(of_poisson.sample(num_draws)["weights"])
        assert drawn.shape == (num_draws, cases.DIMENSION) and len(np.unique(drawn[:, 0])) == num_draws


@pytest.mark.parametrize(("num_draws", "error"), [(0, ValueError), (2.5, TypeError)])
def test_a_number_of_draws_that_is_none_is_refused(of_poisson, num_draws, error):
    with pytest.raises(error, match="num_draws must be"):
        of_poisson.sample(num_draws)


def test_plot_has_three_axes(of_poisson):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = of_poisson.plot()
    assert [axes.get_ylabel() for axes in figure.axes] == ["ELBO", "residual", "rate ρ"]
    pyplot.close(figure)


def test_arviz_that_is_not_there_is_said(backend, of_poisson, monkeypatch):
    monkeypatch.setattr(backend.module("results"), "arviz_is_installed", lambda: False)
    for ask in (of_poisson.psis, of_poisson.to_arviz):
        with pytest.raises(ImportError, match="pip install 'arviz"):
            ask()


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_steps": 0}, ValueError, "max_steps must be positive, got 0"),
        ({"max_steps": 1.5}, TypeError, "positive integer, got 1.5"),
        ({"tolerance": 0}, ValueError, "tolerance must be positive and finite, got 0"),
        ({"tolerance": "small"}, TypeError, "number of nats, got 'small'"),
        ({"compile": "fast"}, ValueError, "one of 'auto', True, False.*got 'fast'"),
        ({"compile": 1}, ValueError, "got 1"),
        ({"optimizer": SimpleNamespace()}, TypeError, "must be a BLR.*got SimpleNamespace"),
        ({"learning_rate": 2.0}, ValueError, "learning_rate must lie in"),
        ({"guide": "AutoNormal"}, TypeError, "such as AutoNormal; got 'AutoNormal'"),
    ],
)
def test_an_argument_out_of_range_is_refused(backend, options, error, message):
    options = {"guide": backend.host.autoguide.AutoNormal, **options}
    with pytest.raises(error, match=message):
        backend.module("fitting").fit(poisson(backend.host), **options)


def test_a_rate_and_an_optimizer_together_are_refused(backend):
    with pytest.raises(ValueError, match="give the rate to the optimizer"):
        backend.fit(poisson, "AutoNormal", poisson_data(), learning_rate=0.5, optimizer=backend.BLR())


def test_a_given_schedule_and_other_options_are_taken(backend):
    def schedule(count):
        return 0.4 / (1 + 0.05 * count)

    optimizer = backend.BLR(backend.schedule(schedule), num_draws=16)
    result = backend.fit(poisson, "AutoNormal", poisson_data(), optimizer=optimizer, max_steps=200, tolerance=0.1)
    assert result.converged
    steps = result.history["step"]  # of which the last was the one of count step − 1
    assert_allclose(result.history["rate"], [schedule(step - 1) for step in steps], rtol=1e-14)


def test_pyro_gives_the_same_numbers_traced_and_not(pyro_bridge):
    with pytest.warns(UserWarning, match="not converged"):
        results = [
            pyro_bridge.fit(poisson, "AutoNormal", poisson_data(), max_steps=5, compile=compile)
            for compile in (False, True)
        ]
    assert [result.compiled for result in results] == ["not traced: compile=False", "traced"]
    assert_allclose(results[0].losses, results[1].losses, rtol=1e-8)
    for name, value in results[0].params.items():
        assert_allclose(value, results[1].params[name], rtol=1e-8)


def test_numpyro_compiles_draws_once_for_any_number(numpyro_bridge):
    pytest.importorskip("arviz")
    result = _of_poisson(numpyro_bridge)
    for num_draws in (3, 100, 101):
        result.sample(num_draws)
    assert result.draws._page._cache_size() == 1, "that of the fit's own"


def test_numpyro_leaves_away_what_takes_longer_than_a_fit_s_steps(numpyro_bridge, monkeypatch):
    compiling = numpyro_bridge.module("compiling")
    small, large = (compiling.quick(np.zeros(size)) for size in (10, compiling.MAX_UNOPTIMIZED + 1))
    assert small["xla_backend_optimization_level"] == 0 and "xla_backend_optimization_level" not in large
    assert not compiling._is_known("xla_of_another_version", True), "which XLA would refuse"
    monkeypatch.setattr(compiling.jax, "default_backend", lambda: "gpu")
    assert not any(name.startswith("xla_cpu") for name in compiling.quick(np.zeros(10)))
