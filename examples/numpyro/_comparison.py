"""What `demo.py` asks of NumPyro: fit a model and time the steps, score the parameters on the way, draw from the end.

The twin in `pyro/` has the same names, so the demo never asks which host it is talking to.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
import numpyro
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from numpyro.infer.svi import SVIState
from numpyro.optim import Adam

from numpyro_blr import BLR

numpyro.enable_x64()

__all__ = ["BLR", "GUIDES", "NAME", "Fit", "Inference", "adam", "nuts"]

NAME = "NumPyro"
GUIDES = {"mean field": AutoNormal, "full rank": AutoMultivariateNormal}


def adam(rate: float) -> Adam:
    return Adam(rate)


class Fit(NamedTuple):
    """The guide's parameters, and the seconds spent in steps, after each number of `steps`, of which the first is 0."""

    steps: Sequence[int]
    parameters: list[dict]
    seconds: list[float]
    compile_seconds: float


class Inference:
    """One model on its data under one kind of guide."""

    def __init__(self, model: Callable, data: tuple, guide_class: type) -> None:
        self.model, self.data, self.guide = model, data, guide_class(model)

    def fit(self, steps: Sequence[int], make_optimizer: Callable, *settings: float) -> Fit:
        """Run the stock SVI as far as `steps[-1]` and keep the parameters it had after each number of `steps`."""
        svi = SVI(self.model, self.guide, make_optimizer(*settings), Trace_ELBO())
        state = svi.init(jax.random.key(0), *self.data)
        get_params = jax.jit(svi.get_params)
        start = time.perf_counter()
        jax.block_until_ready(self._update(make_optimizer, settings, state, self.data))
        compile_seconds = time.perf_counter() - start

        parameters, seconds, elapsed = [get_params(state)], [0.0], 0.0
        for step in range(1, steps[-1] + 1):
            start = time.perf_counter()
            state = jax.block_until_ready(self._update(make_optimizer, settings, state, self.data))
            elapsed += time.perf_counter() - start
            if step in steps:
                parameters.append(get_params(state))
                seconds.append(elapsed)
        return Fit(steps, parameters, seconds, compile_seconds)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _update(self, make_optimizer: Callable, settings: tuple, state: SVIState, data: tuple) -> SVIState:
        """`svi.update`, with the optimizer's settings as an argument: Adam's four rates compile once."""
        svi = SVI(self.model, self.guide, make_optimizer(*settings), Trace_ELBO())
        svi.init(jax.random.key(0), *data)  # tells `svi` the parameters' constraints; its numbers are dropped
        return svi.update(state, *data)[0]

    def log_weights(self, parameters: dict, num_draws: int) -> np.ndarray:
        """log p(x, z) − log q(z) at draws z ~ q, whose mean is the ELBO; the same noise whatever the parameters."""
        return np.asarray(self._log_weights(jax.random.split(jax.random.key(1), num_draws), parameters, self.data))

    @functools.partial(jax.jit, static_argnums=0)
    def _log_weights(self, rng_keys: jax.Array, parameters: dict, data: tuple) -> jax.Array:
        def log_weight(rng_key: jax.Array) -> jax.Array:
            return -Trace_ELBO().loss(rng_key, parameters, self.model, self.guide, *data)

        return jax.vmap(log_weight)(rng_keys)

    def draw(self, parameters: dict, num_draws: int) -> dict[str, np.ndarray]:
        draws = self.guide.sample_posterior(jax.random.key(2), parameters, sample_shape=(num_draws,))
        return {name: np.asarray(value) for name, value in draws.items()}


def nuts(model: Callable, data: tuple, num_warmup: int, num_samples: int) -> dict[str, np.ndarray]:
    """Draws from the exact posterior, near enough."""
    mcmc = MCMC(NUTS(model), num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(3), *data)
    return {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
