"""What only Pyro has: `svi.step`, the parameter store, checkpoints, modules, frozen parameters, compiled losses."""

from __future__ import annotations

import copy
import pickle
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
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.autoguide import (  # noqa: E402
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam  # noqa: E402

from pyro_blr import BLR, IVON, fit  # noqa: E402

pytestmark = pytest.mark.usefixtures("pyro_bridge")
positive = dist.constraints.positive


def model():
    """Not conjugate, so that steps differ from one another and from draw to draw."""
    log_rate = pyro.sample("log_rate", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", 4):
        pyro.sample("y", dist.Poisson(log_rate.sum().exp()), obs=torch.tensor([3.0, 0.0, 1.0, 2.0]))


def guide_by_hand():
    loc = pyro.param("loc", torch.zeros(2))
    scale = pyro.param("scale", torch.ones(2), constraint=positive)
    pyro.sample("log_rate", dist.Normal(loc, scale).to_event(1))


def broken():
    """No value of z has a finite density."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("bad", -torch.exp(800 + z**2))  # Pyro's validation lets an infinity pass, but no NaN


def broken_guide():
    loc, scale = pyro.param("loc", torch.tensor(0.5)), pyro.param("scale", torch.tensor(1.0), constraint=positive)
    pyro.sample("z", dist.Normal(loc, scale))


def conjugate():
    """The posterior of z is N(1.2, 1/5)."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.5))


def make_svi(model=model, guide=guide_by_hand, loss=None, **options) -> SVI:
    return SVI(model, guide, BLR(**options), loss or Trace_ELBO())


def run(svi: SVI, num_steps: int) -> list[float]:
    return [svi.step() for _ in range(num_steps)]


def stored() -> dict[str, np.ndarray]:
    """A copy of the parameter store: steps change it in place."""
    return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items()}


def check_same(left: dict, right: dict) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)


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
# Stopping and resuming


@pytest.mark.parametrize(
    "options",
    [{}, {"learning_rate": lambda count: (2 + count) ** -0.6, "estimator": "hutchinson"}],
    ids=["automatic", "schedule, hutchinson"],
)
def test_saved_and_loaded_equals_not_stopping_bit_for_bit(options, tmp_path):
    """The store and the optimizer through files, into a new optimizer and a new SVI."""
    svi = make_svi(**options)
    run(svi, 4)
    pyro.get_param_store().save(tmp_path / "parameters.pt")
    svi.optim.save(tmp_path / "optimizer.pt")
    random_state = torch.get_rng_state()
    losses = run(svi, 4)
    straight, straight_state = stored(), svi.optim.get_state()

    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "parameters.pt")
    later = make_svi(**options)
    later.optim.load(tmp_path / "optimizer.pt")
    torch.set_rng_state(random_state)
    assert run(later, 4) == losses
    check_same(stored(), straight)
    state = later.optim.get_state()
    assert state["count"] == straight_state["count"] == 8
    assert torch.equal(state["precision"], straight_state["precision"])


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal])
def test_a_stock_guide_resumes_from_its_state_dict(guide_class):
    """The other way to keep a guide, which is a torch module."""
    svi = make_svi(guide=guide_class(model))
    run(svi, 3)
    parameters = {name: value.clone() for name, value in svi.guide.state_dict().items()}
    state, random_state = svi.optim.get_state(), torch.get_rng_state()
    run(svi, 3)
    straight = stored()

    pyro.clear_param_store()
    guide = guide_class(model)
    guide()
    guide.load_state_dict(parameters)
    later = make_svi(guide=guide)
    later.optim.set_state(state)
    torch.set_rng_state(random_state)
    run(later, 3)
    check_same(stored(), straight)


def test_the_other_optimizer_is_resumed_as_well():
    """Adam's moments are part of the state; without them its first step back would be its longest."""

    def with_center():
        z = pyro.sample("z", dist.Normal(pyro.param("center", torch.tensor(0.3)), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.5))

    with pytest.warns(UserWarning, match="the parameters center belong"):
        svi = make_svi(with_center, AutoNormal(with_center))
        run(svi, 5)
    parameters, state, random_state = pyro.get_param_store().get_state(), svi.optim.get_state(), torch.get_rng_state()
    values = {name: value.detach().clone() for name, value in parameters["params"].items()}
    state = {**state, "others": copy.deepcopy(state["others"])}  # torch's optimizers move their state in place
    run(svi, 3)
    straight = stored()

    for name, parameter in pyro.get_param_store().named_parameters():
        parameter.data.copy_(values[name])
    later = SVI(with_center, svi.guide, BLR(), Trace_ELBO())
    later.optim.set_state(state)
    torch.set_rng_state(random_state)
    with pytest.warns(UserWarning, match="the parameters center belong"):
        run(later, 3)
    check_same(stored(), straight)


def test_a_state_that_is_not_ours_is_refused():
    adam = Adam({"lr": 0.01})
    SVI(model, guide_by_hand, adam, Trace_ELBO()).step()
    with pytest.raises(ValueError, match=r"cannot continue from a state with the entries .*BLR.get_state"):
        BLR().set_state(adam.get_state())


def test_the_state_of_another_guide_is_refused():
    svi = make_svi(guide=AutoMultivariateNormal(model))
    run(svi, 1)
    other = make_svi(guide=AutoNormal(model))
    other.optim.set_state(svi.optim.get_state())
    with pytest.raises(ValueError, match=r"belongs to the sites .*'dense'.*this guide has .*'diagonal'"):
        other.step()


def test_before_its_first_step_an_optimizer_has_no_state():
    assert BLR().get_state() == {}
    svi = make_svi()
    svi.optim.set_state({})
    run(svi, 1)
    assert svi.optim.get_state()["count"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def conjugate_guide():
    loc = pyro.param("loc", torch.tensor(0.3))
    pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.tensor(0.7), constraint=positive)))


def freeze(name: str) -> None:
    conjugate_guide()
    pyro.get_param_store()[name].unconstrained().requires_grad_(False)


def test_a_frozen_scale_stays_and_its_location_is_exact():
    freeze("scale")
    before = stored()["scale"]
    run(make_svi(conjugate, conjugate_guide, learning_rate=1.0), 1)
    assert stored()["scale"] == before
    assert_allclose(stored()["loc"], 1.2, rtol=1e-12)


def test_a_guide_with_nothing_but_frozen_locations_is_refused():
    freeze("loc")
    with pytest.raises(ValueError, match="whose parameters are parameters"):
        make_svi(conjugate, conjugate_guide).step()


def test_a_module_goes_to_the_other_optimizer():
    net = torch.nn.Linear(1, 1)

    def with_net():
        pyro.module("net", net)
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
        pyro.sample("y", dist.Normal(net(z), 0.5).to_event(1), obs=torch.tensor([1.5]))

    before = net.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"net.*belong to no site"):
        run(make_svi(with_net, AutoNormal(with_net)), 1)
    moved = (net.weight.detach() - before).abs()
    assert_allclose(moved, 1e-3, rtol=1e-4)  # Adam's first step is its rate


def test_a_guide_that_is_a_module_with_its_own_parameters():
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor(0.3))
            self.scale = pyro.nn.PyroParam(torch.tensor(0.7), constraint=positive)

        def forward(self):
            pyro.sample("z", dist.Normal(self.loc, self.scale))

    guide = Guide()
    run(make_svi(conjugate, guide, learning_rate=1.0), 1)
    assert_allclose([guide.loc.item(), guide.scale.item()], [1.2, 0.2**0.5], rtol=1e-12)


def test_a_parameter_of_the_model_that_appears_later_does_not_start_anew():
    late = []

    def growing():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if late:
            z = z + 0 * pyro.param("shift", torch.tensor(2.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=torch.tensor(1.5))

    svi = make_svi(growing, AutoNormal(growing))
    run(svi, 2)
    late.append(True)
    with pytest.warns(UserWarning, match="the parameters shift belong"):
        run(svi, 2)
    assert svi.optim.get_state()["count"] == 4


def test_an_exception_in_the_guide_leaves_the_parameters_as_they_were():
    """Recognition puts random values into the parameters for a moment."""
    calls = []

    def guide():
        loc, scale = pyro.param("loc", torch.tensor(0.3)), pyro.param("scale", torch.tensor(0.7), constraint=positive)
        calls.append(loc.item())
        if len(calls) == 2:
            raise KeyboardInterrupt
        pyro.sample("z", dist.Normal(loc, scale))

    with pytest.raises(KeyboardInterrupt):
        make_svi(conjugate, guide).step()
    assert calls[0] == 0.3 != calls[1], "the second call was the one with random values"
    check_same(stored(), {"loc": np.array(0.3), "scale": stored()["scale"]})
    assert_allclose(stored()["scale"], 0.7, rtol=1e-15)


def test_the_host_s_random_numbers_are_used_once_a_step_and_no_more():
    """The draws of a step have generators of their own: how many there are does not shift the host's."""
    states = []
    for num_draws in (4, 16):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        make_svi(num_draws=num_draws).step()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


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


def test_steps_that_are_not_finite_warn_one_by_one_and_raise_when_there_is_nothing_else():
    svi = make_svi(broken, broken_guide)
    for count in range(1, 10):
        with pytest.warns(UserWarning) as caught:
            svi.step()
        messages = [str(warning.message) for warning in caught]
        assert any(f"BLR: {count} of {count} steps had a loss or gradient" in message for message in messages)
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
    for seed in range(6):
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
    "enumeration": TraceEnum_ELBO(max_plate_nesting=0),
    "compiled": JitTrace_ELBO(ignore_jit_warnings=True),
    "compiled, vectorised particles": JitTrace_ELBO(**VECTORISED, ignore_jit_warnings=True),
    "compiled, mean field": JitTraceMeanField_ELBO(ignore_jit_warnings=True),
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
# More of states: every guide and estimator, other precisions, a used optimizer, random states


def with_other():
    log_scale = pyro.param("log_scale", torch.tensor(0.2))
    log_rate = pyro.sample("log_rate", dist.Normal(0.0, log_scale.exp()).expand([2]).to_event(1))
    pyro.sample("y", dist.Poisson(log_rate.sum().exp()), obs=torch.tensor(3.0))


RESUMED = {
    "full rank": (model, AutoMultivariateNormal, {}),
    "stock gradients": (model, AutoDiagonalNormal, {"estimator": "gradient", "learning_rate": 0.05}),
    "with others": (with_other, AutoNormal, {}),
}


@pytest.mark.filterwarnings("ignore:BLR. the parameters log_scale belong")
@pytest.mark.parametrize(("model", "guide", "options"), RESUMED.values(), ids=RESUMED)
def test_stock_guides_resume_in_a_cleared_store_bit_for_bit(model, guide, options, tmp_path):
    def made() -> SVI:
        return make_svi(model, guide(model), others=pyro.optim.Adam({"lr": 0.05}), **options)

    svi, store = made(), pyro.get_param_store()
    run(svi, 4)
    store.save(tmp_path / "parameters.pt")
    svi.optim.save(tmp_path / "optimizer.pt")
    random_state = pyro.util.get_rng_state()
    losses = run(svi, 4)
    straight = stored()

    store.clear()
    store.load(tmp_path / "parameters.pt")
    later = made()
    later.guide()  # makes its parameters out of the store's
    later.optim.load(tmp_path / "optimizer.pt")
    pyro.util.set_rng_state(random_state)
    assert run(later, 4) == losses
    check_same(stored(), straight)


def test_a_state_of_another_precision_is_refused():
    diagonal = make_svi(estimator="hutchinson")
    diagonal.step()
    dense = make_svi()
    dense.optim.set_state(diagonal.optim.get_state())
    with pytest.raises(ValueError, match=r"precision of shape \(2,\); this guide has .* and \(2, 2\)"):
        dense.step()


def test_a_cleared_store_and_another_svi_start_anew():
    def three_steps(optimizer: BLR) -> dict[str, np.ndarray]:
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        run(SVI(model, AutoNormal(model), optimizer, Trace_ELBO()), 3)
        return stored()

    used = BLR()
    first = three_steps(used)
    check_same(three_steps(used), first)
    assert used.get_state()["count"] == 3


def located(y):
    z = pyro.sample("z", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def located_by_hand(y):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=positive)
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), scale))


@pytest.mark.parametrize("guide", [AutoNormal, located_by_hand], ids=["a module", "by hand"])
def test_a_fit_draws_what_it_found_whatever_was_fitted_since(guide):
    """And leaves the store as it finds it."""
    fits, draws = [], []
    for sign in (1.0, -1.0):
        pyro.clear_param_store()
        fits.append(fit(located, guide, sign * torch.tensor([2.9, 3.1]), progress_bar=False))
        draws.append(fits[-1].sample(50)["z"])
        assert abs(float(draws[-1].mean()) - 3 * sign) < 1.0
    for _ in range(3):
        fits[1].svi.step(torch.tensor([0.0, 0.1]))  # goes on, with the tensors of the fit
    left = stored()
    for made, drawn in zip(fits, draws, strict=True):
        assert torch.equal(made.sample(50)["z"], drawn)
    check_same(stored(), left)
    pyro.clear_param_store()
    assert torch.equal(fits[0].sample(50)["z"], draws[0])
    assert not stored()


def test_a_plate_that_is_iterated_over_is_a_minibatch_too():
    def in_turn():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for row in pyro.plate("data", 6, subsample_size=2):
            pyro.sample(f"y_{row}", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    svi = make_svi(in_turn, AutoNormal(in_turn))
    svi.step()
    assert svi.optim.state.gaussian.recycling is None


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda rule: pickle.loads(pickle.dumps(rule))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("rule", [BLR, IVON])
def test_a_copy_of_an_optimizer_goes_on(rule, copied):
    """With the parameters as they are: bit for bit what the optimizer itself would do."""
    svi, y = SVI(located, AutoNormal(located), rule(), Trace_ELBO()), torch.tensor([2.9, 3.1])
    for _ in range(3):
        svi.step(y)
    before, twin = pyro.get_param_store().get_state(), copied(svi.optim)
    before = {name: value.detach().clone() for name, value in before["params"].items()}
    svi.step(y)
    after = stored()
    with torch.no_grad():
        for name, value in before.items():
            dict(pyro.get_param_store().named_parameters())[name].copy_(value)
    svi.optim = twin
    svi.step(y)
    check_same(stored(), after)


def test_a_loaded_state_is_kept_until_it_is_taken_up():
    svi = make_svi()
    svi.step()
    state = svi.optim.get_state()
    fresh = BLR()
    fresh.set_state(state)
    assert fresh.get_state() == state


@pytest.mark.parametrize("rule", [BLR, IVON])
def test_one_optimizer_does_not_serve_two_in_turns(rule):
    """One after the other, it does."""
    optimizer, y = rule(), torch.tensor([2.9, 3.1])
    first, second = (SVI(located, AutoNormal(located), optimizer, Trace_ELBO()) for _ in range(2))
    first.step(y)
    first.step(y)
    pyro.clear_param_store()
    second.step(y)
    with pytest.raises(ValueError, match=f"this {rule.__name__} has served another SVI.*of its own"):
        first.step(y)
    second.step(y)


def test_the_host_s_random_numbers_do_not_depend_on_the_draws_of_hutchinson():
    """Whose probes are random as well."""
    states = []
    for num_draws in (4, 16):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        make_svi(num_draws=num_draws, estimator="hutchinson").step()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ---------------------------------------------------------------------------------------------------------------------
# More of parameters: full rank in a module, hidden ones, the other optimizer's steps


def test_a_module_s_own_scale_tril_is_recognised():
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
            self.factor = pyro.nn.PyroParam(torch.tensor([[0.5, 0.0], [0.2, 2.0]]), dist.constraints.lower_cholesky)

        def forward(self):
            pyro.sample("z", dist.MultivariateNormal(self.loc, scale_tril=self.factor))

    def sum_of_two():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(3.0))

    guide = Guide()
    tensors = guide.loc, guide.factor_unconstrained
    make_svi(sum_of_two, guide).step()
    assert_allclose(guide.loc.detach(), [1.0, 1.0], rtol=1e-12)
    assert_allclose((guide.factor @ guide.factor.mT).detach(), [[2 / 3, -1 / 3], [-1 / 3, 2 / 3]], rtol=1e-12)
    assert (guide.loc, guide.factor_unconstrained) == tensors, "moved in place"


class Pair(pyro.nn.PyroModule):
    """Two independent latents; the parameters named in `hidden` SVI does not get to see."""

    def __init__(self, hidden: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.hidden = hidden
        for name in ("a", "b"):
            setattr(self, f"{name}_loc", torch.nn.Parameter(torch.tensor(0.3)))
            setattr(self, f"{name}_scale", pyro.nn.PyroParam(torch.tensor(0.7), constraint=positive))

    def forward(self):
        with pyro.poutine.block(hide=list(self.hidden)):
            arguments = {name: (getattr(self, f"{name}_loc"), getattr(self, f"{name}_scale")) for name in ("a", "b")}
        for name, (loc, scale) in arguments.items():
            pyro.sample(name, dist.Normal(loc, scale))


def two_conjugates():
    """The posterior of each is N(1, 1/2)."""
    for name in ("a", "b"):
        pyro.sample(f"{name}_y", dist.Normal(pyro.sample(name, dist.Normal(0.0, 1.0)), 1.0), obs=torch.tensor(2.0))


@pytest.mark.parametrize("frozen", [("a_loc", "a_scale"), ("a_scale",)], ids=["a location and its scale", "a scale"])
@pytest.mark.parametrize("hide", [True, False], ids=["poutine.block", "requires_grad_"])
def test_frozen_parameters_stay_bit_for_bit_beside_others_that_move(frozen, hide):
    guide = Pair(hidden=frozen if hide else ())
    guide()
    for name, parameter in guide.named_parameters():
        parameter.requires_grad_(hide or name.removesuffix("_unconstrained") not in frozen)
    before = stored()
    run(make_svi(two_conjugates, guide), 3)
    after = stored()
    assert {name for name in after if after[name].tobytes() == before[name].tobytes()} == set(frozen)
    for name in {"a_loc", "b_loc"} - set(frozen):
        assert_allclose(after[name], 1.0, rtol=1e-12)
    assert_allclose(after["b_scale"], 0.5**0.5, rtol=1e-12)


def empirical_bayes():
    z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(1.0)), 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))


def scalar_guide(*_, loc: float = 0.3):
    """z ~ N(loc, 2²), whatever the model's arguments."""
    loc, scale = pyro.param("loc", torch.tensor(loc)), pyro.param("scale", torch.tensor(2.0), constraint=positive)
    pyro.sample("z", dist.Normal(loc, scale))


def test_others_descend_the_hosts_loss():
    """With the KL in closed form the gradient in θ is θ − m, whatever is drawn."""
    loc, theta = 0.3, 1.0
    svi = make_svi(empirical_bayes, scalar_guide, TraceMeanField_ELBO(), others=pyro.optim.SGD({"lr": 0.1}))
    with pytest.warns(UserWarning, match="parameters theta belong to no site"):
        run(svi, 3)
    for _ in range(3):  # both from the state before: Bayes' rule given θ, a gradient step given m
        loc, theta = (theta + 2.0) / 2, theta - 0.1 * (theta - loc)
    assert_allclose(stored()["theta"], theta, rtol=1e-12)
    assert_allclose(stored()["loc"], loc, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:BLR. the parameters theta belong")
@pytest.mark.parametrize("others", [None, {"lr": 0.02, "betas": (0.5, 0.9)}], ids=["by default", "given"])
def test_others_take_the_step_of_stock_adam_from_the_same_backward_pass(others):
    ends = []
    for optimizer in (pyro.optim.Adam(others or {"lr": 1e-3}), BLR(others=others and pyro.optim.Adam(others))):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        SVI(empirical_bayes, scalar_guide, optimizer, Trace_ELBO()).step()
        ends.append(stored()["theta"])
    assert ends[0] == ends[1] != 1.0


# ---------------------------------------------------------------------------------------------------------------------
# More that goes wrong


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


def test_a_stock_flow_and_another_gradient_are_refused():
    two = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    flow = AutoIAFNormal(lambda: pyro.sample("z", two))
    with pytest.raises(ValueError, match=r"'_AutoIAFNormal_latent': Normal, .* Use AutoNormal"):
        make_svi(flow.model, flow).step()
    with pytest.raises(TypeError, match="got TraceGraph_ELBO"):
        make_svi(loss=TraceGraph_ELBO()).step()


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
