"""A torch module as one site: its density, its output at given weights, and what it takes for a module."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from numpy.testing import assert_allclose

torch = pytest.importorskip("torch")
pyro = pytest.importorskip("pyro")
from pyro import distributions as dist  # noqa: E402
from pyro.infer import SVI, Predictive, Trace_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoNormal, init_to_value  # noqa: E402
from torch import nn  # noqa: E402

from pyro_blr import IVON, AutoWeights, BayesianModule  # noqa: E402

pytestmark = pytest.mark.usefixtures("pyro_bridge")


class Tied(nn.Module):
    """Its two ends share a matrix, and each holds it under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.embedding, self.decode = nn.Linear(3, 2, bias=False), nn.Embedding(3, 2), nn.Linear(2, 3)
        self.decode.weight = self.embedding.weight

    def forward(self, x):
        return self.decode(self.encode(x) + self.embedding.weight.sum(0))


class Averaged(nn.Module):
    """A buffer, and a layer with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
        self.register_buffer("shift", torch.tensor([1.0, -1.0]))
        self.norm.running_mean.copy_(torch.tensor([0.3, 0.2]))
        self.eval()

    def forward(self, x):
        return self.norm(self.linear(x)) + self.shift


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x):
        return self.layers(torch.stack([x, x], -1).view(-1, 1, 2, 3))


MODULES = {
    "layers": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "tied": Tied,
    "buffers": Averaged,
    "convolution": Image,
}
modules = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def inputs():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def pieces(net: BayesianModule, weights):
    """The module's parameters, by name, in a vector of all."""
    return {part.name: weights[part.start : part.stop].view(part.shape) for part in net.parts}


@modules
def test_the_output_at_given_weights_is_the_modules_with_these_weights(make):
    """With the weights of the start, and with others."""
    module = make()
    plain = copy.deepcopy(module)
    start = plain(inputs())
    net = BayesianModule(module)
    assert net.weights.numel() == sum(param.numel() for param in plain.parameters())
    torch.testing.assert_close(net.apply_weights(net.weights, inputs()), start)

    weights = torch.randn(net.weights.shape)
    with torch.no_grad():
        for name, value in pieces(net, weights).items():
            plain.get_parameter(name).copy_(value)
    torch.testing.assert_close(net.apply_weights(weights, inputs()), plain(inputs()))


@modules
def test_the_gradient_at_given_weights_is_the_modules(make):
    module = make()
    plain, net = copy.deepcopy(module), BayesianModule(module)
    weights = net.weights.clone().requires_grad_()
    (net.apply_weights(weights, inputs()) ** 2).sum().backward()
    (plain(inputs()) ** 2).sum().backward()
    for name, value in pieces(net, weights.grad).items():
        torch.testing.assert_close(value, plain.get_parameter(name).grad)


@modules
def test_the_module_holds_nothing_twice(make):
    net = BayesianModule(make())
    assert not list(param for param in net.parameters() if param.device.type != "meta")
    covered = sorted((part.start, part.stop) for part in net.parts)
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == net.weights.numel()


@pytest.mark.parametrize(
    "prior_scale", [None, 0.7, lambda name, param: 0.1 + 0.1 * param.ndim], ids=["fan-in", "one", "own"]
)
def test_the_density_of_the_site_is_that_of_independent_normals(prior_scale):
    module = MODULES["layers"]()
    named = {name: param.detach().clone() for name, param in module.named_parameters()}
    net = BayesianModule(module, prior_scale, name="w")
    drawn = pyro.poutine.trace(net).get_trace(inputs()).nodes["w"]
    expected = 0.0
    for name, value in pieces(net, drawn["value"]).items():
        start = named[name]
        loc = start.mean() if start.ndim < 2 else torch.zeros(())
        if prior_scale is None:
            scale = 0.3 if start.ndim < 2 else start[0].numel() ** -0.5
        else:
            scale = prior_scale(name, start) if callable(prior_scale) else prior_scale
        expected = expected + dist.Normal(loc, scale).log_prob(value).sum()
    assert_allclose(drawn["fn"].log_prob(drawn["value"]), expected, rtol=1e-12)


def test_draws_of_the_prior_have_its_moments():
    net = BayesianModule(nn.Linear(4, 2), lambda name, param: 0.5 if param.ndim == 2 else 2.0)
    with torch.no_grad():
        drawn = torch.stack([pyro.poutine.trace(net).get_trace(torch.ones(1, 4)).nodes["weights"]["value"]
                             for _ in range(400)])  # fmt: skip
    for part in net.parts:
        values = drawn[:, part.start : part.stop]
        # within five standard errors of independent numbers
        assert abs(values.mean() - part.loc) < 5 * part.scale / values.numel() ** 0.5
        assert abs(values.std() / part.scale - 1) < 5 / (2 * values.numel()) ** 0.5


def regression(net):
    def model(x, y=None):
        mean = net(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    return model


def test_a_stock_guide_and_optimizer_train_it():
    """The mean and the scale of every weight of a line are those of the exact mean field."""
    net = BayesianModule(nn.Linear(1, 1), 1.0)
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    y = 2 * x.squeeze(-1) + 0.5
    model, bias = regression(net), next(part for part in net.parts if part.name == "bias")
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"weights": net.weights}), init_scale=0.05)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.985}), Trace_ELBO(num_particles=4))
    for _ in range(250):
        svi.step(x, y)
    found = pieces(net, guide.median()["weights"])
    precision = 1 + 4 / 0.1**2  # of both, orthogonal
    assert_allclose(found["weight"].item(), 8 / 0.1**2 / precision, atol=0.02)  # a third of a standard deviation
    assert_allclose(found["bias"].item(), (bias.loc + 2 / 0.1**2) / precision, atol=0.02)
    assert_allclose(guide.scales.weights.detach(), precision**-0.5, rtol=0.3)


def test_the_log_density_can_be_differentiated_twice():
    """As samplers and Laplace's method do."""
    net, x = BayesianModule(MODULES["layers"]()), inputs()

    def model():
        pyro.sample("y", dist.Normal(net(x), 1.0).to_event(2), obs=torch.zeros(5, 2))

    def log_density(weights):
        with pyro.condition(data={"weights": weights}):
            return pyro.poutine.trace(model).get_trace().log_prob_sum()

    weights = torch.randn(net.weights.shape)
    along = torch.randn(net.weights.shape)
    slope = torch.autograd.functional.jvp(log_density, weights, along)[1]
    # a central difference with an error of step² and rounding over step
    step = 1e-5
    assert_allclose((log_density(weights + step * along) - log_density(weights - step * along)) / (2 * step), slope,
                    rtol=1e-6)  # fmt: skip
    hessian = torch.autograd.functional.hessian(log_density, weights)
    torch.testing.assert_close(hessian, hessian.T)
    assert hessian.abs().sum() > net.weights.numel(), "more than the prior's"


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_are_the_same_and_their_own(way):
    net = BayesianModule(MODULES["layers"]())
    if way == "deepcopy":
        other = copy.deepcopy(net)
    elif way == "pickle":
        saved = io.BytesIO()
        torch.save(net, saved)
        saved.seek(0)
        other = torch.load(saved, weights_only=False)
    else:
        other = BayesianModule(MODULES["layers"]())
        assert other.parts != net.parts, "another start has other prior means of vectors"
        other.load_state_dict(net.state_dict())
    assert other.parts == net.parts
    torch.testing.assert_close(
        other.apply_weights(other.weights, inputs()), net.apply_weights(net.weights, inputs()), rtol=0, atol=0
    )
    before = net.weights.clone()
    other.weights.zero_()
    assert torch.equal(net.weights, before)


def test_the_state_of_a_guide_has_the_prior_means():
    """In a process in which the module started elsewhere, too."""
    nets = [BayesianModule(nn.Linear(2, 3)) for _ in range(2)]
    guides = [AutoWeights(regression(net), net) for net in nets]
    assert nets[0].parts != nets[1].parts
    guides[1].load_state_dict(guides[0].state_dict())
    assert nets[0].parts == nets[1].parts


def test_predictions_with_the_guide_moved_by_ivon():
    """The stock `Predictive` draws the weights from the guide: their spread is that of `scale()`."""
    net = BayesianModule(nn.Linear(1, 1), 1.0)
    model, x = regression(net), torch.tensor([[1.0], [2.0], [3.0]])
    guide = AutoWeights(model, net)
    svi = SVI(model, guide, IVON(), Trace_ELBO())
    for _ in range(3):
        svi.step(x, torch.tensor([2.0, 4.0, 6.0]))
    assert guide.loc.data_ptr() == net.weights.data_ptr(), "the module's own weights are the mean"
    drawn = Predictive(model, guide=guide, num_samples=400, return_sites=["weights", "y"])(x)
    weights = drawn["weights"].squeeze(1)
    # five standard errors
    assert (abs(weights.mean(0) - guide.loc) < 5 * guide.scale() / 20).all()
    assert (abs(weights.std(0) / guide.scale() - 1) < 5 / 800**0.5).all()
    assert torch.equal(guide.median()["weights"], net.weights)
    assert drawn["y"].shape == (400, 3)


def test_frozen_parameters_are_left_to_the_module():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    plain = copy.deepcopy(module)
    net = BayesianModule(module)
    assert {part.name for part in net.parts} == {"2.weight", "2.bias"}
    torch.testing.assert_close(net.apply_weights(net.weights, inputs()), plain(inputs()))
    assert torch.equal(net.module[0].weight, plain[0].weight)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.half, self.whole = nn.Linear(1, 1).float(), nn.Linear(1, 1)


REFUSED = {
    "no parameters": (nn.Tanh, None, TypeError, "Tanh has none"),
    "several dtypes": (Mixed, None, TypeError, r"one dtype; Mixed has torch.float32, torch.float64.*module.float\(\)"),
    "scale zero": (lambda: nn.Linear(1, 1), 0.0, ValueError, "positive and finite, got 0.0 for the parameter 'weight'"),
    "scale infinite": (lambda: nn.Linear(1, 1), np.inf, ValueError, "positive and finite, got inf"),
    "a scale of a name": (
        lambda: nn.Linear(1, 1), lambda name, _: -1.0 if name == "bias" else 1.0, ValueError,
        "got -1.0 for the parameter 'bias'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "prior_scale", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_what_came(make, prior_scale, error, message):
    with pytest.raises(error, match=message):
        BayesianModule(make(), prior_scale)


def test_auto_weights_with_another_optimizer_is_refused():
    net = BayesianModule(nn.Linear(1, 1))
    model = regression(net)
    svi = SVI(model, AutoWeights(model, net), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    with pytest.raises(RuntimeError, match="moved by IVON alone, and SVI has .*Use IVON, or AutoNormal"):
        svi.step(torch.ones(2, 1), torch.ones(2))


def test_a_module_within_a_plate_is_refused():
    """Every datum would have weights of its own, which no guide has."""
    net = BayesianModule(nn.Linear(1, 1))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(net(x).squeeze(-1), 1.0), obs=torch.zeros(len(x)))

    for guide in (AutoWeights(model, net), AutoNormal(model)):
        with pytest.raises(ValueError, match=r"one vector of weights for all data.*outside of plates"):
            SVI(model, guide, IVON(), Trace_ELBO()).step(torch.ones(3, 1))
