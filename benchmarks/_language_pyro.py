"""The ways to train that `language_model.py` compares on Pyro, as runs of `examples/transformer_lm.py`."""

from __future__ import annotations

import gc
from typing import Any

import ivon
import numpy as np
import pyro.optim
import torch
from _transformer_pyro import IVON, AdamW, Config
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor
from torch.nn import functional as F

__all__ = ["METHODS", "persistent_bytes"]


class StockNormal(IVON):
    """A site for every tensor of the network, `AutoNormal` and the host's Adam: Pyro as it is."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        parts, net = self.bayesian.parts, self.bayesian

        def model(inputs: Tensor, targets: Tensor) -> None:
            pieces = []
            for part in parts:
                prior = pyro.distributions.Normal(inputs.new_tensor(part.loc, dtype=torch.float32), part.scale)
                site = pyro.sample(part.name.replace(".", "_"), prior.expand(part.shape).to_event(len(part.shape)))
                pieces.append(site.reshape(-1))
            logits = net.apply_weights(torch.cat(pieces), inputs)
            with pyro.poutine.scale(scale=config.num_data / inputs.numel()):
                pyro.sample("tokens", pyro.distributions.Categorical(logits=logits).to_event(2), obs=targets)

        start = {part.name.replace(".", "_"): part.of(net.weights) for part in parts}
        self.guide = AutoNormal(model, init_loc_fn=init_to_value(values=start), init_scale=0.003)
        self.optimizer = pyro.optim.Adam({"lr": config.learning_rate})
        self.svi = SVI(model, self.guide, self.optimizer, Trace_ELBO())

    def _logits(self, inputs: Tensor, draw: int | None) -> Tensor:
        pieces = []
        for number, part in enumerate(self.bayesian.parts):
            loc, scale = self.guide._get_loc_and_scale(part.name.replace(".", "_"))
            if draw is not None:
                generator = torch.Generator(self.device).manual_seed(1_000_003 * draw + number)
                loc = loc + scale * torch.randn(loc.shape, generator=generator, device=self.device)
            pieces.append(loc.reshape(-1))
        return self.bayesian.apply_weights(torch.cat(pieces), inputs)


class PackagedIVON(AdamW):
    """The plain network with the optimizer of the `ivon-opt` package."""

    has_draws = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.optimizer = ivon.IVON(self.net.parameters(), lr=config.learning_rate, ess=config.num_data, hess_init=0.1)

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.learning_rate(self.num_steps))
        total = torch.zeros((), device=self.device)
        for tokens, following in zip(self._tensor(inputs), self._tensor(targets), strict=True):
            with self.optimizer.sampled_params(train=True):
                self.optimizer.zero_grad()
                loss = F.cross_entropy(self.net(tokens).flatten(0, 1), following.flatten())
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.num_steps += 1
        return total / self.config.accumulate

    def _logits(self, inputs: Tensor, draw: int | None) -> Tensor:
        if draw is None:
            return self.net(inputs)
        with self.optimizer.sampled_params(train=False):
            return self.net(inputs)


METHODS: dict[str, Any] = {
    "AdamW": AdamW,
    "IVON": IVON,
    "ivon-opt": PackagedIVON,
    "AutoNormal and Adam": StockNormal,
}


def persistent_bytes() -> int:
    """Of the tensors that are alive between two steps."""
    storages = {}
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type != "meta":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())
