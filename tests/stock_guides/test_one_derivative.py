"""Models whose gradient has no derivative: functions with a backward pass of their own, as solvers of differential
equations have.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from .. import cases


def poisson(exp_of):
    def make(host):
        def model(x, y):
            weights = host.sample("weights", host.dist.Normal(host.array(np.zeros(4)), 1.0).to_event(1))
            with host.plate("data", len(y)):
                host.sample("y", host.dist.Poisson(exp_of(host)((x * weights).sum(-1))), obs=y)

        return model

    return make


smooth = poisson(lambda host: host.xp.exp)
once = poisson(lambda host: host.exp_of_one_derivative)


@pytest.mark.parametrize(
    ("guide", "options"),
    [
        pytest.param("AutoMultivariateNormal", {}, marks=pytest.mark.slow),
        pytest.param("AutoNormal", {}, marks=pytest.mark.slow_to_compile),
        pytest.param("AutoNormal", {"estimator": "hutchinson"}, marks=pytest.mark.slow),
        pytest.param("AutoNormal", {"learning_rate": 0.5}, marks=pytest.mark.slow),
        ("AutoLaplaceApproximation", {}),
    ],
)
def test_a_model_with_one_derivative_is_fitted_as_one_with_two(backend, guide, options):
    problem, ends = cases.poisson(), []
    inputs = np.repeat(np.eye(4), 2, 0) if "estimator" in options else problem.inputs  # else the probes are noise
    args = (inputs, problem.counts)
    make_guide = lambda host, model: getattr(host.autoguide, guide)(model)  # noqa: E731
    for model in (smooth, once):
        fit = backend.start(model, make_guide, args, **options).run(8)
        ends.append({name: fit.params[name] for name in fit.params})
    for name, expected in ends[0].items():
        assert_allclose(ends[1][name], expected, rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_differences_are_counted(backend):
    problem, counts = cases.poisson(), []
    for model in (smooth, once):
        with pytest.warns(UserWarning, match="not converged"):
            fit = backend.fit(model, "AutoMultivariateNormal", (problem.inputs, problem.counts), max_steps=1)
        counts.append(fit.gradient_evaluations)
    assert counts[1] - counts[0] == 2 * 4  # of a pair of draws and four coordinates
