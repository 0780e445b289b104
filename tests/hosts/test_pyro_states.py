"""A fit in Pyro that is stopped and resumed, copied, or followed by another: checkpoints and random states."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pyro = pytest.importorskip("pyro")
from pyro import distributions as dist  # noqa: E402
from pyro.infer import SVI, Trace_ELBO  # noqa: E402
from pyro.infer.autoguide import (  # noqa: E402
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.optim import Adam  # noqa: E402

from pyro_blr import BLR, IVON, fit  # noqa: E402

from .pyro_models import check_same, guide_by_hand, make_svi, model, positive, run, stored  # noqa: E402

pytestmark = pytest.mark.usefixtures("pyro_bridge")

# ---------------------------------------------------------------------------------------------------------------------
# Stopping and resuming


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "hutchinson"},
        {"learning_rate": lambda count: (2 + count) ** -0.6, "estimator": "hutchinson"},
    ],
    ids=["automatic", "automatic, hutchinson", "schedule, hutchinson"],
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


@pytest.mark.parametrize("guide_class", [AutoNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal])
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
        svi = make_svi(with_center, AutoNormal(with_center), learning_rate=0.5)
        run(svi, 5)
    parameters, state, random_state = pyro.get_param_store().get_state(), svi.optim.get_state(), torch.get_rng_state()
    values = {name: value.detach().clone() for name, value in parameters["params"].items()}
    state = {**state, "others": copy.deepcopy(state["others"])}  # torch's optimizers move their state in place
    run(svi, 3)
    straight = stored()

    for name, parameter in pyro.get_param_store().named_parameters():
        parameter.data.copy_(values[name])
    later = SVI(with_center, svi.guide, BLR(0.5), Trace_ELBO())
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
# Every guide and estimator, other precisions, a used optimizer, random states


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


@pytest.mark.parametrize(("before", "after"), [(None, 0.5), (0.5, None)])
def test_products_move_the_mean_where_the_new_options_say_so(before, after):
    saved = make_svi(estimator="hutchinson", learning_rate=before)
    run(saved, 2)
    resumed = make_svi(estimator="hutchinson", learning_rate=after)
    resumed.optim.set_state(saved.optim.get_state())
    run(resumed, 2)
    counts = resumed.optim.state.gaussian.num_averaged
    assert (counts is None) == (after is not None)


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
