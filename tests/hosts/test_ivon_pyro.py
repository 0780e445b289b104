"""What only Pyro's IVON has: whole networks moved in place, checkpoints, interrupts, autocast, several processes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from .. import reference
from ..reference import IVONSettings, Weights

torch = pytest.importorskip("torch")
pyro = pytest.importorskip("pyro")
from pyro import distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import (  # noqa: E402
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoGuideList, AutoNormal, init_to_value  # noqa: E402
from pyro.optim import Adam  # noqa: E402
from torch import nn  # noqa: E402

from pyro_blr import BLR, IVON, AutoWeights, BayesianModule  # noqa: E402

pytestmark = pytest.mark.usefixtures("pyro_bridge")
SCALES = {"0.weight": 0.6, "0.bias": 0.5, "2.weight": 0.8, "2.bias": 0.5}


class Data:
    """Twelve rows, and the gradient of −log p(y | x, w) of a network by hand."""

    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.sin(x.sum(1))

    @staticmethod
    def gradient(net: BayesianModule, weights: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        leaf = torch.as_tensor(weights).requires_grad_()
        residual = (net.apply_weights(leaf, Data.x[rows]).squeeze(-1) - Data.y[rows]) / 0.5
        scale = len(Data.x) / len(residual)
        return torch.autograd.grad(scale * (residual**2).sum() / 2, leaf)[0].numpy()


class Expected:
    """The reference's recursion for the tensors of a network."""

    def __init__(self, fit: Fit, **options) -> None:
        self.parts, loc = fit.net.parts, fit.guide.loc.detach().numpy().copy()
        self.settings = {
            part.name: IVONSettings(
                num_data=12.0, weight_decay=1 / (12 * part.scale**2), prior_loc=part.loc, **{"beta2": 0.9, **options}
            )
            for part in self.parts
        }
        self.weights = {part.name: Weights.at(self.of(part, loc), 0.1) for part in self.parts}

    @staticmethod
    def of(part, vector: np.ndarray) -> np.ndarray:
        return vector[part.start : part.stop].reshape(part.shape)

    def step(self, draws: list, gradients: list, rate: float, preconditioner: str = "factored") -> None:
        """On the average of what was found at these draws."""
        for part in self.parts:
            weights, settings = self.weights[part.name], self.settings[part.name]
            found = [(self.of(part, w), self.of(part, g) / 12) for w, g in zip(draws, gradients, strict=True)]
            if preconditioner == "posterior":
                ((draw, slope),) = found
                self.weights[part.name] = reference.published_ivon(weights, draw, slope, rate, settings)
                continue
            estimates = [reference.factored_estimate(weights, draw, slope, settings) for draw, slope in found]
            slope = np.mean([slope for _, slope in found], 0)
            first = settings.paired and weights.count % 2 == 0
            estimate = None if first else np.mean(estimates, 0)
            self.weights[part.name] = reference.factored_ivon(weights, slope, estimate, rate, settings)

    def check(self, loc: np.ndarray, hessian: np.ndarray) -> None:
        for part in self.parts:  # rounding, through a network
            assert_allclose(self.of(part, loc), self.weights[part.name].loc, rtol=1e-10, atol=1e-11)
            assert_allclose(self.of(part, hessian), self.weights[part.name].hessian, rtol=1e-10, atol=1e-11)


class Fit:
    """A small network, its model, its guide, and the stock SVI."""

    def __init__(self, guide: str = "AutoWeights", loss=None, num_rows: int = 12, **options) -> None:
        pyro.clear_param_store()
        torch.manual_seed(5)
        module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.net = BayesianModule(module, lambda name, _: SCALES[name])
        self.rows = slice(0, num_rows)
        self.interrupted, self.draws = False, []  # the last two draws
        if guide == "AutoWeights":
            self.guide = AutoWeights(self.model, self.net)
        else:
            self.guide = AutoNormal(self.model, init_loc_fn=init_to_value(values={"weights": self.net.weights}))
        self.svi = SVI(self.model, self.guide, IVON(**{"hess_init": 0.1, **options}), loss or Trace_ELBO())

    def model(self):
        x, y = Data.x[self.rows], Data.y[self.rows]
        with poutine.trace() as found:
            mean = self.net(x).squeeze(-1)
        self.draws = [*self.draws[-1:], found.trace.nodes["weights"]["value"].detach().numpy().copy()]
        if self.interrupted:
            raise KeyboardInterrupt
        with pyro.plate("data", len(Data.x), subsample_size=len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    def run(self, num_steps: int) -> list[float]:
        return [self.svi.step() for _ in range(num_steps)]

    def state(self) -> dict:
        """A copy of all that moves."""
        return copy.deepcopy((self.guide.state_dict(), self.svi.optim.get_state()))


def check_same(left, right) -> None:
    """Trees of tensors and numbers: bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        left, right = list(left.values()), list(right.values())
    if isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            check_same(a, b)
    else:
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


# ---------------------------------------------------------------------------------------------------------------------
# A network moved in place


@pytest.mark.parametrize("preconditioner", ["factored", "posterior"])
def test_twenty_steps_of_a_network_equal_the_recursion(preconditioner):
    """Tensor by tensor, each with its prior, though neighbours with the same prior are one part."""
    fit = Fit(preconditioner=preconditioner, learning_rate=lambda count: 0.1 / (1 + count), beta2=0.9)
    expected = Expected(fit, paired=preconditioner == "factored")
    for count in range(20):
        fit.run(1)
        draw = fit.draws[-1]
        expected.step([draw], [Data.gradient(fit.net, draw)], 0.1 / (1 + count), preconditioner)
    expected.check(fit.guide.loc.detach().numpy(), fit.guide.hessian.numpy())
    for part in fit.net.parts:
        scale = expected.weights[part.name].scale(expected.settings[part.name])
        assert_allclose(part.of(fit.guide.scale()), scale, rtol=1e-9)
    assert torch.equal(fit.net.weights, fit.guide.loc)


def test_particles_of_a_network_are_averaged():
    fit = Fit(loss=Trace_ELBO(num_particles=2), learning_rate=0.1, beta2=0.9)
    expected = Expected(fit)
    for _ in range(3):
        fit.run(1)
        assert not np.array_equal(*fit.draws)
        expected.step(fit.draws, [Data.gradient(fit.net, draw) for draw in fit.draws], 0.1)
    expected.check(fit.guide.loc.detach().numpy(), fit.guide.hessian.numpy())


@pytest.mark.parametrize("guide", ["AutoWeights", "AutoNormal"])
def test_the_module_may_be_under_either_guide(guide):
    """The loss falls by nats that no draw explains, from far away."""
    fit = Fit(guide, learning_rate=0.05, hess_init=3.0, beta2=0.98)
    losses = fit.run(150)
    assert np.mean(losses[-50:]) < np.mean(losses[:5]) - 5


def test_the_host_s_own_loss_is_as_ever():
    """Outside of a step nothing is perturbed, and nothing moves."""
    fit = Fit()
    fit.run(2)
    before = fit.state()
    pyro.set_rng_seed(3)
    loss = fit.svi.evaluate_loss()
    pyro.set_rng_seed(3)
    assert loss == Trace_ELBO().loss(fit.model, fit.guide)
    check_same(fit.state(), before)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


OPTIONS = {"factored": {}, "posterior": {"preconditioner": "posterior"}, "accumulated": {"accumulation_steps": 3}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_network_resumed_from_files_equals_not_stopping_bit_for_bit(options, tmp_path):
    """Guide and optimizer through files, into new objects; the host's random numbers need not be those."""
    fit = Fit(**options)
    fit.run(5)  # half a pair of draws, or an unfinished step
    torch.save(fit.guide.state_dict(), tmp_path / "guide.pt")
    fit.svi.optim.save(tmp_path / "optimizer.pt")
    losses = fit.run(3)
    straight = fit.state()

    later = Fit(**options)
    later.guide.load_state_dict(torch.load(tmp_path / "guide.pt"))
    later.svi.optim.load(tmp_path / "optimizer.pt")
    pyro.set_rng_seed(77)
    assert later.run(3)[1:] == losses[1:]  # the first is the host's, at a draw of its own
    check_same(later.state(), straight)


def test_a_state_may_be_taken_back_between_steps(tmp_path):
    """In the same process, in the middle of a pair."""
    fit = Fit()
    fit.run(3)
    saved = copy.deepcopy(fit.guide.state_dict())
    fit.svi.optim.save(tmp_path / "ivon.pt")
    fit.run(3)
    there = fit.state()
    fit.guide.load_state_dict(saved)
    fit.svi.optim.load(tmp_path / "ivon.pt")
    fit.run(3)
    check_same(fit.state(), there)


@pytest.mark.parametrize(
    ("optimizer", "num_steps"),
    [(lambda: Adam({"lr": 0.05}), 200), (BLR, 5), (lambda: IVON(0.2), 200)],
    ids=["Adam", "BLR", "IVON"],
)
def test_another_optimizer_may_take_over(optimizer, num_steps):
    """In the same SVI, or in one that is made of its model and guide."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(20))

    for again in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoNormal(model)
        svi = SVI(model, guide, IVON(1e-6), Trace_ELBO())
        svi.step()
        svi = SVI(svi.model, svi.guide, optimizer(), Trace_ELBO()) if again else svi
        svi.optim = optimizer()
        for _ in range(num_steps):
            svi.step()
        assert abs(float(guide.median()["z"]) - 20 / 21) < 0.3


def test_a_copy_of_an_svi_goes_its_own_way():
    fit = Fit()
    fit.run(3)
    twin = copy.deepcopy(fit.svi)
    before = fit.guide.loc.detach().clone()
    with pytest.raises(ValueError, match="another AutoWeights under this one's name.*clear_param_store"):
        twin.step()
    pyro.clear_param_store()
    twin.step()
    assert torch.equal(fit.guide.loc, before)
    assert not torch.equal(twin.guide.loc, before)


def test_a_network_s_guide_may_be_within_a_function():
    whole, within = Fit(), Fit()
    guide = within.guide
    within.svi.guide = lambda: guide()
    for fit in (whole, within):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        fit.run(4)
    assert torch.equal(whole.guide.loc, guide.loc)


def test_a_network_and_its_guide_may_be_converted(monkeypatch):
    fit = Fit()
    fit.net.float()
    with pytest.raises(TypeError, match="a mean of torch.float64.*network weights of torch.float32.*Convert both"):
        fit.svi.step()
    fit.guide.float()
    monkeypatch.setattr(Data, "x", Data.x.float())
    monkeypatch.setattr(Data, "y", Data.y.float())
    fit.run(3)
    assert fit.guide.loc.dtype == torch.float32
    assert torch.equal(fit.net.weights, fit.guide.loc)


def test_sparse_gradients_are_gradients():
    tables = []
    for sparse in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        net = BayesianModule(nn.Embedding(5, 2, sparse=sparse))

        def model(net=net):
            values = net(torch.tensor([0, 2, 2]))
            with pyro.plate("data", 3):
                pyro.sample("y", dist.Normal(values, 1.0).to_event(1), obs=torch.ones(3, 2))

        guide = AutoWeights(model, net)
        svi = SVI(model, guide, IVON(), Trace_ELBO())
        for _ in range(3):
            svi.step()
        tables.append(guide.loc.detach())
    assert torch.equal(*tables)


def test_a_state_that_was_taken_stays_as_it_was():
    fit = Fit()
    fit.run(3)
    taken = fit.svi.optim.get_state()
    before = copy.deepcopy(taken)
    fit.run(3)
    check_same(taken, before)
    fresh = IVON()
    fresh.set_state(taken)
    check_same(fresh.get_state(), taken)


@pytest.mark.parametrize("guide", ["AutoWeights", "AutoNormal"])
def test_an_interrupt_within_a_step_leaves_everything_as_it_was(guide):
    """The mean is in the module, not the draw; the next step is the one that would have been."""
    fit = Fit(guide)
    fit.run(5)
    straight = fit.state()
    output = fit.net.apply_weights(fit.net.weights, Data.x)

    fit = Fit(guide)
    fit.run(3)
    before = fit.state()
    fit.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        fit.run(1)
    fit.interrupted = False
    check_same(fit.state(), before)
    assert all(param.device.type == "meta" for param in fit.net.module.parameters()), "no draw is left in the module"
    fit.run(2)
    check_same({**fit.state()[1], "seed": 0}, {**straight[1], "seed": 0})
    check_same(fit.state()[0], straight[0])
    torch.testing.assert_close(fit.net.apply_weights(fit.net.weights, Data.x), output, rtol=0, atol=0)


def test_states_that_do_not_belong_here_are_refused():
    fit = Fit()
    fit.run(1)
    state = fit.svi.optim.get_state()
    with pytest.raises(ValueError, match=r"cannot continue from a state with the entries .*IVON.get_state"):
        IVON().set_state({"step": 3})
    for options in ({"guide": "AutoNormal"}, {"preconditioner": "posterior"}, {"accumulation_steps": 2}):
        other = Fit(**options)
        other.svi.optim.set_state(state)
        with pytest.raises(ValueError, match="belongs to the weights .* or to other options; this guide has"):
            other.run(1)
    assert IVON().get_state() == {}


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes, other sites


@pytest.mark.parametrize("preconditioner", ["factored", "posterior"])
def test_a_single_network_with_a_double_site_and_a_half_forward_pass(preconditioner):
    """AutoWeights for the network, AutoNormal for the rest; the state of each has its own dtype."""
    net = BayesianModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).float())
    x = Data.x.float()

    def model():
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mean = net(x).squeeze(-1)
        assert mean.dtype == torch.bfloat16
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean.double() + shift.sum(), 0.5), obs=Data.y + 3)

    guide = AutoGuideList(model)
    guide.append(AutoWeights(poutine.block(model, expose=["weights"]), net))
    guide.append(AutoNormal(poutine.block(model, hide=["weights"])))
    svi = SVI(model, guide, IVON(preconditioner=preconditioner, learning_rate=0.1), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:3]) - 10
    state = svi.optim.state.weights
    for values in (state.loc, state.momentum, state.hessian):
        assert {value.dtype for name, value in values.items() if "weights" in name} == {torch.float32}
        assert {value.dtype for name, value in values.items() if "shift" in name} == {torch.float64}
    assert svi.optim.state.settings.num_data == 12
    assert np.isfinite(svi.evaluate_loss())


# ---------------------------------------------------------------------------------------------------------------------
# The host's losses, and what is refused


@pytest.mark.parametrize("kind", [TraceMeanField_ELBO, TraceGraph_ELBO])
def test_every_elbo_gives_the_same_steps(kind):
    ends = []
    for loss in (Trace_ELBO(), kind()):
        pyro.set_rng_seed(0)
        fit = Fit("AutoNormal", loss)
        fit.run(3)
        ends.append(fit.state()[1])
    for field in ("momentum", "hessian"):
        for name, value in ends[0][field].items():
            torch.testing.assert_close(value, ends[1][field][name], rtol=1e-10, atol=1e-12)


def test_what_pyro_alone_can_ask_for_is_refused():
    with pytest.raises(TypeError, match="IVON minimises the negative ELBO.*got RenyiELBO"):
        Fit("AutoNormal", RenyiELBO(num_particles=2)).run(1)
    with pytest.raises(ValueError, match="process_group needs torch.distributed"):
        IVON(process_group=True)
    with pytest.raises(RuntimeError, match=r"called by SVI.step.*SVI\(model, guide, IVON\(\), loss\)"):
        IVON()([torch.zeros(2, requires_grad=True)])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    vectorized = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0)
    with pytest.raises(ValueError, match="one particle after the other; got Trace_ELBO with vectorize_particles=True"):
        SVI(model, AutoNormal(model), IVON(), vectorized).step()


def test_a_draw_that_the_model_keeps_stays_as_it_was():
    """The update is made in place, but not in what a model has been given."""
    kept = []

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        kept.append((z, z.detach().clone()))
        pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.ones(3, dtype=torch.float64))

    svi = SVI(model, AutoNormal(model), IVON(), Trace_ELBO(num_particles=2))
    svi.step()
    kept.clear()  # where the guide starts, which it moves
    for _ in range(3):
        svi.step()
    assert len(kept) == 6
    for value, copied in kept:
        assert_allclose(value.detach(), copied, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # Pyro's own use of TorchScript
def test_a_compiled_loss_is_refused():
    """It would run the program that it has recorded, with the draws of the first step for ever."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(TypeError, match="got JitTrace_ELBO.*Trace_ELBO"):
        SVI(model, AutoNormal(model), IVON(), JitTrace_ELBO(ignore_jit_warnings=True)).step()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

WORKER = """
import sys, warnings
import numpy as np, pyro, torch
import torch.distributed as distributed
from pyro.infer.autoguide import AutoNormal
from pyro_blr import IVON
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
from tests.hosts.test_ivon_pyro import Fit
rank, folder = int(sys.argv[1]), sys.argv[2]
ROWS = slice(6 * rank - 6, 6 * rank)


def group(name):
    # the last two of three processes, so that the first worker of the group is not the first of all
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=3)
    return distributed.new_group([1, 2])


def start(workers):
    pyro.set_rng_seed(100 + rank)  # the first worker's counts
    fit = Fit(process_group=workers, num_rows=6, learning_rate=0.1, beta2=0.9)
    fit.rows = ROWS
    if rank == 2 and not resumed:
        fit.net.weights.add_(1.0)  # so does its start
    return fit


def start_of_others(workers):  # a parameter of the model that starts at random
    pyro.clear_param_store()
    pyro.set_rng_seed(rank)

    def model():
        z = pyro.sample("z", pyro.distributions.Normal(0.0, 1.0))
        shift = pyro.param("shift", lambda: torch.randn(()))
        pyro.sample("y", pyro.distributions.Normal(z + shift, 1.0), obs=torch.tensor(2.0))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the parameter is no site's
        svi = pyro.infer.SVI(model, AutoNormal(model), IVON(process_group=workers), pyro.infer.Trace_ELBO())
        svi.step()
    return pyro.param("shift").detach()


def run(fit, num_steps):
    draws = []
    for _ in range(num_steps):
        fit.svi.step()
        draws.append(fit.draws[-1])
    return draws


workers = group("first")
if rank == 0:
    distributed.destroy_process_group()
    sys.exit()
resumed = False
fit = start(workers)
draws = run(fit, 3)
saved = fit.state()
run(fit, 3)
straight, others = fit.state(), start_of_others(workers)
distributed.destroy_process_group(workers)

workers = distributed.new_group([1, 2], use_local_synchronization=True)
resumed = True
later = start(workers)
later.guide.load_state_dict(saved[0])
later.svi.optim.set_state(saved[1])
run(later, 3)
torch.save([draws, saved, straight, others, later.state()], f"{folder}/{rank}.pt")
distributed.barrier(workers)
distributed.destroy_process_group()  # a process that ends with its threads of communication at work may abort
"""


def test_workers_average_what_they_find_and_resume(tmp_path):
    """Two of three processes with halves of the data: draws of their own, and one step, the reference's on average."""
    root = Path(__file__).parent.parent.parent
    (tmp_path / "worker.py").write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    workers = [
        subprocess.Popen([sys.executable, tmp_path / "worker.py", str(rank), tmp_path], cwd=root, env=environment,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == 3 * [0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (1, 2))
    check_same(first[1:], second[1:])  # means, curvatures, seeds and counts, at every worker, and other parameters
    check_same(first[4], first[2])  # a group that was started anew from a checkpoint

    fit = Fit()
    expected = Expected(fit)
    for draws in zip(first[0], second[0], strict=True):
        assert not np.array_equal(*draws)
        gradients = [
            Data.gradient(fit.net, draw, rows) for draw, rows in zip(draws, (slice(6), slice(6, 12)), strict=True)
        ]
        expected.step(list(draws), gradients, 0.1)
    guide = first[1][0]
    expected.check(guide["loc"].numpy(), guide["hessian"].numpy())
