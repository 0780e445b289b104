"""Models and helpers of the tests of what only Pyro has."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pyro = pytest.importorskip("pyro")
from pyro import distributions as dist  # noqa: E402
from pyro.infer import SVI, Trace_ELBO  # noqa: E402

from pyro_blr import BLR  # noqa: E402

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


def scalar_guide(*_, loc: float = 0.3):
    """z ~ N(loc, 2²), whatever the model's arguments."""
    loc, scale = pyro.param("loc", torch.tensor(loc)), pyro.param("scale", torch.tensor(2.0), constraint=positive)
    pyro.sample("z", dist.Normal(loc, scale))


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
