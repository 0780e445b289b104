"""What only Pyro has: `svi.step`, its losses, and what goes wrong."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_allclose

from .. import cases

torch = pytest.importorskip("torch")
pyro = pytest.importorskip("pyro")
from pyro import distributions as dist  # noqa: E402
from pyro.infer import (  # noqa: E402
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal  # noqa: E402

from pyro_blr import BLR, site_contributions  # noqa: E402
from pyro_blr.gradients import Draws  # noqa: E402
from pyro_blr.optim import _svi  # noqa: E402
from pyro_blr.optim._layout import gather  # noqa: E402
from pyro_blr.optim._svi import Mapped  # noqa: E402

from .pyro_models import (  # noqa: E402
    broken,
    broken_guide,
    check_same,
    conjugate,
    make_svi,
    model,
    positive,
    run,
    scalar_guide,
    stored,
)

pytestmark = pytest.mark.usefixtures("pyro_bridge")

# ---------------------------------------------------------------------------------------------------------------------
# The ways to run


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Pyro's own use of TorchScript
@pytest.mark.parametrize("kind", [Trace_ELBO, JitTrace_ELBO])
def test_the_loss_at_the_posterior_is_the_evidence_whatever_the_draws(pyro_bridge, kind):
    """`evaluate_loss` and what `step` returns: log p(y), with no variance, once the guide is exact."""
    linear = cases.linear()
    linear_model, args = linear.make(pyro_bridge.host), tuple(map(torch.as_tensor, linear.args))
    svi = make_svi(linear_model, AutoMultivariateNormal(linear_model), kind(ignore_jit_warnings=True))
    svi.step(*args)
    assert_allclose(svi.evaluate_loss(*args), linear.negative_log_evidence, rtol=1e-10)
    loss_value = svi.step(*args)
    assert isinstance(loss_value, float)
    assert_allclose(loss_value, linear.negative_log_evidence, rtol=1e-10)
    assert_allclose(svi.guide.get_posterior().mean.detach(), linear.posterior[0], rtol=1e-10)


def test_model_arguments_by_keyword(pyro_bridge):
    linear = cases.linear()
    linear_model = linear.make(pyro_bridge.host)
    x, y, prior_scale = map(torch.as_tensor, linear.args)
    svi = make_svi(linear_model, AutoMultivariateNormal(linear_model))
    svi.step(y=y, x=x, prior_scale=prior_scale)
    assert_allclose(svi.guide.get_posterior().mean.detach(), linear.posterior[0], rtol=1e-10)


def test_a_seed_makes_a_run_reproducible_and_another_seed_another_run():
    ends = []
    for seed in (3, 3, 4):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        run(make_svi(), 4)
        ends.append(stored())
    check_same(ends[0], ends[1])
    assert not np.array_equal(ends[0]["loc"], ends[2]["loc"])


def test_evaluating_the_loss_moves_nothing():
    svi = make_svi()
    run(svi, 2)
    before, state = stored(), svi.optim.get_state()
    svi.evaluate_loss()
    check_same(stored(), before)
    assert torch.equal(svi.optim.get_state()["loc"], state["loc"])


def test_gradients_are_zero_after_a_step_and_do_not_accumulate():
    svi = make_svi()
    run(svi, 2)
    for _, parameter in pyro.get_param_store().named_parameters():
        assert parameter.grad is None or not parameter.grad.any()


def test_single_precision_parameters_stay_single():
    torch.set_default_dtype(torch.float32)
    try:
        run(make_svi(conjugate, AutoNormal(conjugate)), 2)
        (loc,) = [value for name, value in pyro.get_param_store().items() if "locs" in name]
        assert loc.dtype == torch.float32
        assert_allclose(loc.detach(), 1.2, rtol=1e-5)
    finally:
        torch.set_default_dtype(torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Every supported loss


def with_coin():
    """A discrete latent beside z, summed out by the host."""
    conjugate()
    coin = pyro.sample("coin", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
    pyro.sample("side", dist.Normal(coin, 1.0), obs=torch.tensor(0.5))


VECTORISED = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
LOSSES = {
    "one draw": Trace_ELBO(),
    "particles": Trace_ELBO(num_particles=3),
    "vectorised particles": Trace_ELBO(**VECTORISED),
    "mean field": TraceMeanField_ELBO(),
    "graph": TraceGraph_ELBO(),
    "graph, vectorised particles": TraceGraph_ELBO(**VECTORISED),
    "enumeration": TraceEnum_ELBO(max_plate_nesting=0),
    "compiled": JitTrace_ELBO(ignore_jit_warnings=True),
    "compiled, vectorised particles": JitTrace_ELBO(**VECTORISED, ignore_jit_warnings=True),
    "compiled, mean field": JitTraceMeanField_ELBO(ignore_jit_warnings=True),
    "compiled, graph": JitTraceGraph_ELBO(ignore_jit_warnings=True),
    "compiled, enumeration": JitTraceEnum_ELBO(max_plate_nesting=0, ignore_jit_warnings=True),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")  # of Pyro's own use
@pytest.mark.parametrize("rate", [None, 1.0], ids=["automatic", "given"])
@pytest.mark.parametrize("name", LOSSES)
def test_one_step_is_the_posterior_under_every_supported_loss(name, rate):
    guide = AutoMultivariateNormal(conjugate)
    svi = make_svi(with_coin if "enumeration" in name else conjugate, guide, LOSSES[name], learning_rate=rate)
    for _ in range(2):
        svi.step()
        assert_allclose(guide.get_posterior().loc.detach(), [1.2], rtol=1e-12)
        assert_allclose(guide.get_posterior().covariance_matrix.detach(), [[0.2]], rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, and what is not finite


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (RenyiELBO(alpha=0.5, num_particles=2), "RenyiELBO"),
        (TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True), "TraceTailAdaptive_ELBO"),
        (lambda model, guide: torch.zeros(()), "function"),
    ],
    ids=["RenyiELBO", "TraceTailAdaptive_ELBO", "a function"],
)
def test_other_losses_are_refused(loss, name):
    with pytest.raises(TypeError, match=f"got {name}.*Use one of Trace_ELBO"):
        make_svi(loss=loss).step()


def test_a_step_outside_of_svi_is_refused():
    with pytest.raises(RuntimeError, match=r"called by SVI.step.*SVI\(model, guide, BLR\(\), loss\)"):
        BLR()([torch.zeros(2, requires_grad=True)])


def test_a_schedule_is_checked_at_every_step():
    """Pyro's steps are not traced, so a value that the construction did not probe is seen when it comes."""
    svi = make_svi(learning_rate=lambda count: 2.0 if count == 3 else 0.5)
    run(svi, 3)
    with pytest.raises(ValueError, match=r"\(0, 1\], got 2.0 at step 3"):
        svi.step()


def test_steps_that_are_not_finite_warn_ever_more_rarely_and_raise_when_there_is_nothing_else():
    svi = make_svi(broken, broken_guide)
    for count in range(1, 10):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            svi.step()
        messages = [str(warning.message) for warning in caught]
        said = any(f"BLR: {count} of {count} steps had a loss or gradient" in message for message in messages)
        assert said == (count in (1, 2, 4, 8))
        assert stored()["loc"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(FloatingPointError, match=r"10 of 10 steps.*init_to_median.*pyro.enable_validation"):
            svi.step()


def test_a_model_that_cannot_factor_a_matrix_at_some_draw_is_a_step_left_out():
    """torch raises where a covariance is not positive definite; the rule takes it for a loss that is not finite."""

    def fragile():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        covariance = torch.stack([torch.stack([torch.ones(()), z]), torch.stack([z, torch.ones(())])])
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=torch.linalg.cholesky(covariance)),
                    obs=torch.tensor([1.0, 0.8]))  # fmt: skip

    def guide():
        scale = pyro.param("scale", torch.tensor(0.4), constraint=positive)
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.2)), scale))

    svi = make_svi(fragile, guide, num_draws=32)
    skipped = 0
    for seed in range(20):
        pyro.set_rng_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try:
                svi.step()
            except torch.linalg.LinAlgError:
                continue  # at the host's own draw, which is the host's affair
        skipped = svi.optim.get_state()["skipped"]
    assert skipped > 0
    assert all(np.isfinite(value).all() for value in stored().values())


@pytest.mark.parametrize("interrupted", ["model", "guide"])
def test_an_exception_anywhere_in_a_step_leaves_the_parameters(interrupted):
    """At every place in turn: in the host's own pass, the probe of the guide, a draw, a draw of a proposal."""
    guide, num_calls = AutoNormal(model), 0
    guide()
    before = stored()

    def raising(program, name):
        def called():
            program()
            if name == interrupted:
                calls.append(name)
                if len(calls) == num_calls:
                    raise KeyboardInterrupt

        return called

    finished = False
    while not finished:
        calls, num_calls = [], num_calls + 1
        try:
            make_svi(raising(model, "model"), raising(guide, "guide"), num_draws=4).step()
            finished = True
        except KeyboardInterrupt:
            check_same(stored(), before)
    assert num_calls > 1 + 2 + 2, "the host's pass, both draws of the first pair, both of a proposal"
    assert all((value != before[name]).all() for name, value in stored().items())


def wall(height):
    """The posterior of z is N(0.5 / 1.01, 0.01 / 1.01), and `height` is added to the log density beyond z = 3."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    log_factor = torch.where(z > 3, torch.tensor(height), torch.tensor(0.0))
    pyro.sample("wall", dist.Unit(log_factor, validate_args=False), obs=torch.empty(0))  # validation refuses a NaN
    pyro.sample("y", dist.Normal(z, 0.1), obs=torch.tensor(0.5))


@pytest.mark.parametrize("height", [np.nan, -np.inf])
def test_draws_that_are_not_finite_are_counted_and_the_fit_arrives(height):
    """The first draws are in part beyond the wall, and the posterior is far from it."""
    svi = make_svi(wall, partial(scalar_guide, loc=2.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            svi.step(height)
    reports = [str(w.message) for w in caught if str(w.message).startswith("BLR")]
    skipped = svi.optim.get_state()["skipped"]
    assert 0 < skipped < 20
    assert len(reports) == skipped
    assert all("steps had a loss or gradient that is not finite" in report for report in reports)
    assert_allclose(stored()["loc"], 0.5 / 1.01, rtol=1e-12)
    assert_allclose(stored()["scale"], (0.01 / 1.01) ** 0.5, rtol=1e-12)


def complex_guide():
    pyro.param("k", torch.tensor(1j))
    scalar_guide()


def student_guide():
    loc, scale = pyro.param("loc", torch.tensor(0.0)), pyro.param("scale", torch.tensor(1.0), constraint=positive)
    pyro.sample("z", dist.StudentT(3.0, loc, scale))


NOT_FOR_THE_RULE = {
    "a complex parameter": (complex_guide, TypeError, r"'k' has dtype torch\.complex128\. Give it a floating-point"),
    "a Student": (student_guide, ValueError, r"the guide has 'z': StudentT\. Use AutoNormal, .*AutoMultivariateNormal"),
}


@pytest.mark.parametrize(("guide", "error", "says"), NOT_FOR_THE_RULE.values(), ids=NOT_FOR_THE_RULE)
def test_the_first_step_refuses_and_says_the_way_out(guide, error, says):
    with pytest.raises(error, match=says):
        make_svi(conjugate, guide).step()


def test_a_stock_flow_is_refused():
    two = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    flow = AutoIAFNormal(lambda: pyro.sample("z", two))
    with pytest.raises(ValueError, match=r"_latent': Normal \(not of parameters alone\), .* Use AutoNormal"):
        make_svi(flow.model, flow).step()


@pytest.mark.parametrize("guide", [AutoMultivariateNormal, AutoNormal])
def test_the_state_of_a_fit_in_single_precision_is_single(guide):
    torch.set_default_dtype(torch.float32)
    try:
        svi = make_svi(guide=guide(model))
        run(svi, 3)
        state = svi.optim.get_state()
        kept = [state["loc"], state["precision"], state["rate"]["last_gradient"], *svi.guide.parameters()]
        assert {value.dtype for value in kept} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Second derivatives


class SilentExp(torch.autograd.Function):
    """exp, whose backward pass leaves itself out of a second one without a word."""

    @staticmethod
    def forward(ctx, value):
        result = value.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, gradient):
        return (gradient * ctx.saved_tensors[0]).detach()


def of_rates(exp, prior=dist.Normal):
    def model():
        log_rate = pyro.sample("log_rate", prior(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("data", 2):
            pyro.sample("y", dist.Poisson(exp(log_rate)), obs=torch.tensor([3.0, 1.0]))

    return model


def branching(log_rate):
    """exp, by a path that no vmap can take."""
    return torch.exp(log_rate) if float(log_rate.detach().sum()) < 100 else log_rate


@pytest.mark.parametrize("exp", [torch.exp, branching, SilentExp.apply], ids=["vmap", "a branch", "no vmap of its own"])
def test_all_chords_of_a_draw_at_once_are_the_chords_one_by_one(exp, monkeypatch):
    ends, found = [], []
    at_points = Mapped.at_points

    def counted(self, *args):
        found.append(at_points(self, *args))
        return found[-1]

    for replacement in (counted, lambda self, *args: None):
        monkeypatch.setattr(Mapped, "at_points", replacement)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = of_rates(exp, dist.Laplace)
        run(make_svi(model, AutoMultivariateNormal(model)), 4)
        ends.append(stored())
    assert all((result is not None) == (exp is torch.exp) for result in found) and found
    for name, expected in ends[1].items():
        assert_allclose(ends[0][name], expected, rtol=1e-10, atol=1e-12)


def test_chords_at_once_are_checked_against_the_host():
    """A loss without the host's looks at values that is another one is not used."""
    model = of_rates(torch.exp, dist.Laplace)
    svi = make_svi(model, AutoNormal(model))
    svi.step()
    layout = svi.optim.state.layout
    host = _svi.objective_of(svi, (), {}, layout, seed=0)
    right = _svi.traceable_objective_of(svi, (), {}, layout, seed=0)
    (loc, scales), draw = gather(layout), Draws(0, 1.0, None)
    points = torch.stack([loc, loc + 0.1])
    assert Mapped(host, right).at_points(points, scales, draw) is not None
    wrong = Mapped(host, lambda *given: (right(*given)[0] + 1.0, None))
    assert wrong.at_points(points, scales, draw) is None


def test_a_second_derivative_that_leaves_out_a_part_is_found_out():
    ends = []
    for exp in (torch.exp, SilentExp.apply):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model = of_rates(exp)
        run(make_svi(model, AutoMultivariateNormal(model)), 8)
        ends.append(stored())
    for name, expected in ends[0].items():
        assert_allclose(ends[1][name], expected, rtol=2e-3)


def test_contributions_of_a_model_without_second_derivatives_are_refused():
    model = of_rates(SilentExp.apply)
    svi = make_svi(model, AutoNormal(model))
    svi.step()
    with pytest.raises(ValueError, match="has no derivative.*subtract"):
        site_contributions(svi)


def test_a_graph_that_would_lose_a_backward_pass_is_refused():
    model = of_rates(SilentExp.apply)
    svi = make_svi(model, AutoNormal(model))
    svi.optim.compile = True
    with pytest.raises(RuntimeError, match="backward pass of its own"):
        svi.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prior", [dist.Normal, dist.Laplace])
def test_rounding_and_kinks_are_no_reason_for_differences(dtype, prior):
    torch.set_default_dtype(dtype)
    try:
        model = of_rates(torch.exp, prior)
        svi = make_svi(model, AutoNormal(model))
        svi.step()
    finally:
        torch.set_default_dtype(torch.float64)
    assert not svi.optim.state.differences
