"""What `demo.py` asks of Pyro: fit a model and time the steps, score the parameters on the way, draw from the end.

The twin in `numpyro/` has the same names, so the demo never asks which host it is talking to.
"""

import copy
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam

from pyro_blr import BLR

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # on arrays this small a second thread costs more than it brings
pyro.enable_validation(False)  # it slows every step, and asks a batch for its truth, which vmap forbids

__all__ = ["BLR", "GUIDES", "NAME", "Fit", "Inference", "adam"]

NAME = "Pyro"
GUIDES = {"mean field": AutoNormal, "full rank": AutoMultivariateNormal}


def adam(rate: float) -> Adam:
    return Adam({"lr": rate})


class Fit(NamedTuple):
    """The guide's parameters, and the seconds spent in steps, after each number of `steps`, of which the first is 0."""

    steps: Sequence[int]
    parameters: list[dict]
    seconds: list[float]
    compile_seconds: float


class Inference:
    """One model on its data under one kind of guide."""

    def __init__(self, model: Callable, data: tuple, guide_class: type) -> None:
        self.model, self.data, self.guide_class = model, data, guide_class

    def fit(self, steps: Sequence[int], make_optimizer: Callable, *settings: float) -> Fit:
        """Run the stock SVI as far as `steps[-1]` and keep the parameters it had after each number of `steps`."""
        guide = self._new_guide()
        svi = SVI(self.model, guide, make_optimizer(*settings), Trace_ELBO())
        parameters, seconds, elapsed = [copy.deepcopy(guide.state_dict())], [0.0], 0.0
        for step in range(1, steps[-1] + 1):
            start = time.perf_counter()
            svi.step(*self.data)
            elapsed += time.perf_counter() - start
            if step in steps:
                parameters.append(copy.deepcopy(guide.state_dict()))
                seconds.append(elapsed)
        return Fit(steps, parameters, seconds, compile_seconds=0.0)  # Pyro compiles nothing

    def log_weights(self, parameters: dict, num_draws: int) -> np.ndarray:
        """log p(x, z) − log q(z) at draws z ~ q, whose mean is the ELBO; the same noise whatever the parameters."""
        guide = self._new_guide(parameters)

        def log_weight(draw: dict) -> torch.Tensor:
            guide_trace = poutine.trace(poutine.condition(guide, draw)).get_trace(*self.data)
            model_trace = poutine.trace(poutine.replay(self.model, guide_trace)).get_trace(*self.data)
            return model_trace.log_prob_sum() - guide_trace.log_prob_sum()

        # A stock guide draws in auxiliary sites and derives the model's from them: to know the first is enough.
        sites = guide(*self.data)
        draws = {name: value for name, value in self._draw(guide, num_draws).items() if name not in sites}
        with torch.no_grad():
            return torch.vmap(log_weight)(draws).numpy()

    def draw(self, parameters: dict, num_draws: int) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self._draw(self._new_guide(parameters), num_draws).items()}

    def _draw(self, guide: torch.nn.Module, num_draws: int) -> dict[str, torch.Tensor]:
        pyro.set_rng_seed(1)
        one = poutine.trace(guide).get_trace(*self.data).nodes
        with torch.no_grad():
            draws = Predictive(guide, num_samples=num_draws, parallel=True)(*self.data)
        return {name: value.reshape(num_draws, *one[name]["value"].shape) for name, value in draws.items()}

    def _new_guide(self, parameters: dict | None = None) -> torch.nn.Module:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = self.guide_class(self.model)
        guide(*self.data)  # a stock guide makes its parameters at its first call
        if parameters is not None:
            guide.load_state_dict(parameters)
        return guide
