"""What `transformer_lm.py` asks of Pyro and torch: a transformer, steps of AdamW or of `IVON`, and predictions.

The twin `_transformer_numpyro.py` has the same names, so the command line never asks which host it is talking to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _evaluation import Prediction
from _transformer import Config, initial_weights, schedule
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.nn import functional as F

pyro.enable_validation(False)  # it looks at every value, and a GPU would be waited for

__all__ = ["RUNS", "Run", "Transformer", "find_device"]


def rotate(x: Tensor) -> Tensor:
    """Turn the pairs of coordinates of x (batch, heads, length, width) by angles that grow with the position."""
    half = x.shape[-1] // 2
    positions, pairs = torch.arange(x.shape[-2], device=x.device), torch.arange(half, device=x.device)
    angles = positions[:, None] * 10_000.0 ** (-pairs / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, left * sin + right * cos], -1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.attention_in(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        if self.rotary:
            queries, keys = rotate(queries), rotate(keys)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh"))


class Transformer(nn.Module):
    """Logits of the next token at every one of `tokens` (batch, length)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.dtype = getattr(torch, config.dtype)
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        rotary = config.positions == "rotary"
        self.blocks = nn.ModuleList(Block(config.width, config.heads, rotary) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = None if config.tie else nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        # autocast gives matrix products `dtype`, and leaves norms and the sum over the layers float32
        with torch.autocast(tokens.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.tokens(tokens)
            if self.positions is not None:
                x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
            for block in self.blocks:
                x = block(x)
            x = self.norm(x)
            logits = F.linear(x, self.tokens.weight) if self.head is None else self.head(x)
        return logits.float()


class NextToken(dist.TorchDistribution):
    """A Categorical with torch's cross-entropy for its density: one pass over the logits, where that makes several."""

    arg_constraints: ClassVar[dict] = {}
    support = dist.constraints.nonnegative_integer

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return -F.cross_entropy(self.logits.flatten(0, -2), value.flatten(), reduction="none").view(value.shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return dist.Categorical(logits=self.logits).sample(sample_shape)


def find_device(wanted: str | None) -> str:
    """The device to run on, "cpu" or "cuda": the latter where there is one."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and found == "cpu":
        raise ValueError("torch was asked for cuda and sees no such device: install its CUDA build, or leave it out.")
    return wanted or found


class Run(ABC):
    """A transformer in training."""

    has_draws: bool  # whether the weights have a distribution

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, torch.device(config.device)
        torch.manual_seed(config.seed)
        self.net = Transformer(config)
        _set_weights(self.net, initial_weights(config))
        self.net.to(self.device)

    @abstractmethod
    def step(self, inputs: np.ndarray, targets: np.ndarray) -> Tensor | float:
        """One step on micro-batches (accumulate, batch, context); the loss of a token."""

    @abstractmethod
    def _logits(self, inputs: Tensor, draw: int | None) -> Tensor:
        """At the mean of the weights, or the draw of that number."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """All that changes. No generator of torch's is part of it: batches are NumPy's, and IVON has a seed."""

    @abstractmethod
    def _set_state(self, state: dict[str, Any]) -> None: ...

    @torch.no_grad()
    def log_probabilities(self, inputs: np.ndarray, draw: int | None = None) -> Tensor:
        """Of the next token at every one of `inputs`: (batch, context, vocabulary)."""
        return self._logits(self._tensor(inputs), draw).log_softmax(-1)

    @torch.no_grad()
    def predict(self, inputs: np.ndarray, targets: np.ndarray, draws: Sequence[int | None]) -> Prediction:
        following = self._tensor(targets)
        probability, entropy, log_likelihoods = 0.0, 0.0, []
        for draw in draws:
            log_probability = self.log_probabilities(inputs, draw)
            log_likelihoods.append(log_probability.gather(-1, following[..., None]))
            probability += log_probability.exp() / len(draws)
            entropy -= (log_probability.exp() * log_probability).sum(-1) / len(draws)
        total = -torch.special.xlogy(probability, probability).sum(-1)
        confidence, best = probability.max(-1)
        prediction = Prediction(
            log_likelihood=torch.cat(log_likelihoods, -1).logsumexp(-1) - np.log(len(draws)),
            confidence=confidence,
            correct=best == following,
            entropy=total,
            mutual_information=total - entropy,
        )
        return Prediction(*(value.flatten().cpu().numpy() for value in prediction))

    def next_log_probabilities(self, tokens: np.ndarray, draws: Sequence[int | None]) -> np.ndarray:
        """Of what follows `tokens`, under each of the draws: (draws, vocabulary)."""
        return np.stack([self.log_probabilities(tokens[None], draw)[0, -1].cpu().numpy() for draw in draws])

    def pack(self) -> tuple[dict[str, np.ndarray], Any]:
        """All that changes, for a checkpoint: tensors, and what else there is as JSON."""
        tensors: dict[str, np.ndarray] = {}
        return tensors, _pack(self._state(), "", tensors)

    def unpack(self, tensors: dict[str, np.ndarray], rest: Any) -> None:
        self._set_state(_unpack(rest, tensors))

    def peak_memory(self) -> int | None:
        """Bytes of the accelerator, None without one."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def _tensor(self, tokens: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device, non_blocking=True).long()


class AdamW(Run):
    """The plain network, `torch.optim.AdamW`."""

    has_draws = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        weights = list(self.net.parameters())
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1]},
            {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},  # norms are free
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1)
        self.learning_rate, self.num_steps = schedule(config), 0

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.learning_rate(self.num_steps))
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for tokens, following in zip(self._tensor(inputs), self._tensor(targets), strict=True):
            loss = F.cross_entropy(self.net(tokens).flatten(0, 1), following.flatten()) / self.config.accumulate
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.num_steps += 1
        return total

    def _logits(self, inputs: Tensor, draw: int | None) -> Tensor:
        return self.net(inputs)

    def _state(self) -> dict[str, Any]:
        moments = self.optimizer.state_dict()["state"]  # the rest are settings
        return {"net": self.net.state_dict(), "moments": moments, "num_steps": self.num_steps}

    def _set_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        moments = {int(number): moment for number, moment in state["moments"].items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.num_steps = int(state["num_steps"])


class IVON(Run):
    """A Gaussian over the weights: the stock SVI with the optimizer swapped."""

    has_draws = True

    def __init__(self, config: Config) -> None:
        from pyro_blr import IVON as Optimizer
        from pyro_blr import AutoWeights, BayesianModule

        super().__init__(config)
        pyro.clear_param_store()
        self.bayesian = BayesianModule(self.net, name="weights")

        def model(inputs: Tensor, targets: Tensor) -> None:
            logits = self.bayesian(inputs)
            with pyro.poutine.scale(scale=config.num_data / inputs.numel()):  # a batch stands for all tokens
                pyro.sample("tokens", NextToken(logits).to_event(2), obs=targets)

        self.guide = AutoWeights(model, self.bayesian)
        self.optimizer = Optimizer(learning_rate=schedule(config), accumulation_steps=config.accumulate)
        self.svi = SVI(model, self.guide, self.optimizer, Trace_ELBO())

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> float:
        batches = zip(self._tensor(inputs), self._tensor(targets), strict=True)
        return sum(self.svi.step(*batch) for batch in batches) / (self.config.accumulate * self.config.num_data)

    def _logits(self, inputs: Tensor, draw: int | None) -> Tensor:
        weights = self.guide.loc
        if draw is not None:
            generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + draw)
            noise = torch.randn(weights.shape, generator=generator, device=self.device)
            weights = torch.addcmul(weights, self.guide.scale(), noise)
        return self.bayesian.apply_weights(weights, inputs)

    def _state(self) -> dict[str, Any]:
        return {"guide": self.guide.state_dict(), "optimizer": self.optimizer.get_state()}

    def _set_state(self, state: dict[str, Any]) -> None:
        self.guide.load_state_dict(state["guide"])
        self.optimizer.set_state(state["optimizer"])


RUNS = {"adamw": AdamW, "ivon": IVON}


@torch.no_grad()
def _set_weights(net: nn.Module, weights: dict[str, np.ndarray]) -> None:
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            weight = torch.from_numpy(weights[name.replace("blocks.", "blocks_")])
            module.weight.copy_(weight.T if isinstance(module, nn.Linear) else weight)


def _pack(value: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """`value` as JSON, its tensors put into `tensors` and in their place the names they have there."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().numpy()
        return {"tensor": name}
    if isinstance(value, dict):
        return {str(key): _pack(part, f"{name}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(part, f"{name}/{number}", tensors) for number, part in enumerate(value)]
    return value


def _unpack(value: Any, tensors: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return torch.from_numpy(tensors[value["tensor"]])
        return {key: _unpack(part, tensors) for key, part in value.items()}
    return [_unpack(part, tensors) for part in value] if isinstance(value, list) else value
