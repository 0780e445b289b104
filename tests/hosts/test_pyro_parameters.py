"""Which of the tensors that Pyro's `SVI` hands over move: modules, frozen ones, those of the other optimizer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose

torch = pytest.importorskip("torch")
pyro = pytest.importorskip("pyro")
import pyro.contrib.gp as gp  # noqa: E402
from pyro import distributions as dist  # noqa: E402
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoNormal  # noqa: E402

from pyro_blr import BLR  # noqa: E402

from .pyro_models import check_same, conjugate, make_svi, positive, run, scalar_guide, stored  # noqa: E402

pytestmark = pytest.mark.usefixtures("pyro_bridge")

# ---------------------------------------------------------------------------------------------------------------------
# The parameter store


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
    assert_allclose(moved, 0.01, rtol=1e-4)  # Adam's first step is its rate


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
# Full rank in a module, hidden ones, the other optimizer's steps


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
    for optimizer in (pyro.optim.Adam(others or {"lr": 0.01}), BLR(1.0, others=others and pyro.optim.Adam(others))):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        SVI(empirical_bayes, scalar_guide, optimizer, Trace_ELBO()).step()
        ends.append(stored()["theta"])
    assert ends[0] == ends[1] != 1.0


def test_parameters_that_the_model_reads_itself_are_refused():
    """Without a word, E_q[∇ℓ] would leave q at the prior: the likelihood knows m and C, and not the draw."""
    inputs = torch.linspace(-2.0, 2.0, 6)
    kernel = gp.kernels.RBF(1)
    model = gp.models.VariationalGP(inputs, (inputs > 0).double(), kernel, gp.likelihoods.Binary(), whiten=True)
    for parameter in kernel.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameters f_loc.* reads them itself.*estimator='gradient'"):
        SVI(model.model, model.guide, BLR(), Trace_ELBO()).step()
    pyro.clear_param_store()
    SVI(model.model, model.guide, BLR(0.1, estimator="gradient"), Trace_ELBO()).step()
    assert abs(model.f_loc.detach().numpy()).max() > 0.01


def test_the_inducing_points_of_a_module_without_a_guide_are_refused_with_the_way_out():
    inputs = torch.linspace(-2.0, 2.0, 12)
    model = gp.models.SparseGPRegression(inputs, inputs.sin(), gp.kernels.RBF(1), torch.linspace(-2.0, 2.0, 3))
    with pytest.raises(ValueError, match=r"the modules of Xu read these themselves.*PyroParam"):
        SVI(model.model, model.guide, BLR(), Trace_ELBO()).step()
    pyro.clear_param_store()
    model.Xu = pyro.nn.PyroParam(model.Xu.detach())
    svi = SVI(model.model, model.guide, BLR(), Trace_ELBO())
    before = svi.evaluate_loss()
    run(svi, 3)
    assert svi.evaluate_loss() < before - 1.0


def test_the_weights_of_a_module_that_are_no_parameters_of_pyro_are_left_to_others():
    """A module reads its own weights without asking; as points they would never move."""
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    x, y = torch.randn(20, 2), torch.randn(20)

    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(self.net(x).squeeze(-1), scale).to_event(1), obs=y)

    model = Model()
    before = net.weight.detach().clone()
    svi = make_svi(model, AutoNormal(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(svi, 2)
    assert (net.weight != before).all()


def test_a_draw_that_is_close_to_a_parameter_by_chance_is_no_point_at_it():
    """In single precision that happened to one of some thousand starts, and the guide was refused."""

    def guide():
        loc = pyro.param("loc", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("by_chance", dist.Delta(scale.detach() * (1 + 1e-6)), infer={"is_auxiliary": True})

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    make_svi(model, guide, learning_rate=1.0).step()
    assert_allclose(stored()["loc"], 1.0, rtol=1e-12)
