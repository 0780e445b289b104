"""What `transformer_lm.py` asks of NumPyro and JAX: a transformer, steps of AdamW or of `IVON`, and predictions.

The twin `_transformer_pyro.py` has the same names, so the command line never asks which host it is talking to.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _evaluation import Prediction
from _transformer import Config, initial_weights, layout, schedule
from jax import Array
from numpyro.contrib.module import random_flax_module
from numpyro.infer import SVI, Trace_ELBO, init_to_value
from numpyro.infer.autoguide import AutoNormal

numpyro.enable_validation(False)  # it looks at every value in a computation of its own

__all__ = ["RUNS", "Run", "Transformer", "find_device"]

# the weights at the start come from `initial_weights`; what flax would draw is not even compiled
Dense = functools.partial(nn.Dense, use_bias=False, kernel_init=nn.initializers.zeros)
Embed = functools.partial(nn.Embed, embedding_init=nn.initializers.zeros)
Norm = functools.partial(nn.LayerNorm, use_bias=False, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32)


def rotate(x: Array) -> Array:
    """Turn the pairs of coordinates of x (batch, length, heads, width) by angles that grow with the position."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], -1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The matrix products have `dtype`; what they add to is float32.

    x (batch · length, width) has a row for each token: on the CPU, XLA is slower at products of more than two axes.
    """

    heads: int
    length: int
    rotary: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        dense = functools.partial(Dense, dtype=self.dtype)

        heads = dense(3 * width, name="attention_in")(Norm(name="norm_attention")(x))
        heads = heads.reshape(-1, self.length, 3, self.heads, width // self.heads)
        queries, keys, values = jnp.moveaxis(heads, 2, 0)
        if self.rotary:
            queries, keys = rotate(queries), rotate(keys)
        attended = jax.nn.dot_product_attention(queries, keys, values, is_causal=True).reshape(x.shape)
        x = x + dense(width, name="attention_out")(attended).astype(x.dtype)

        hidden = nn.gelu(dense(4 * width, name="mlp_in")(Norm(name="norm_mlp")(x)), approximate=True)
        return x + dense(width, name="mlp_out")(hidden).astype(x.dtype)


class Transformer(nn.Module):
    """Logits of the next token at every one of `tokens` (batch, length)."""

    config: Config

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        config, dtype, length = self.config, jnp.dtype(self.config.dtype), tokens.shape[1]
        embed = Embed(config.vocabulary, config.width, name="tokens")
        x = embed(tokens)
        if config.positions == "learned":
            x = x + Embed(config.context, config.width, name="positions")(jnp.arange(length))
        x = x.reshape(-1, config.width)
        for layer in range(config.layers):
            x = Block(config.heads, length, config.positions == "rotary", dtype, name=f"blocks_{layer}")(x)
        x = Norm(name="norm")(x)
        if config.tie:
            logits = x.astype(dtype) @ embed.embedding.T.astype(dtype)
        else:
            logits = Dense(config.vocabulary, dtype=dtype, name="head")(x)
        return logits.astype(jnp.float32).reshape(*tokens.shape, config.vocabulary)


def find_device(wanted: str | None) -> str:
    """The device that JAX takes, "cpu" or "cuda"; to be called before JAX has done anything."""
    if wanted == "cpu":
        jax.config.update("jax_platforms", "cpu")
    found = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if wanted not in (None, found):
        raise ValueError(f"JAX was asked for {wanted} and has {jax.devices()}: install jax[{wanted}], or leave it out.")
    return found


class Run(ABC):
    """A transformer in training: `state` is all that changes, a tree of arrays."""

    has_draws: bool  # whether the weights have a distribution
    state: Any

    def __init__(self, config: Config) -> None:
        # the host runs a model once before anything is compiled; the network is one computation there all the same
        self.config, self.net = config, nn.jit(Transformer)(config)
        tokens = jnp.zeros((1, config.context), jnp.int32)
        self.shapes = jax.eval_shape(self.net.init, jax.random.key(0), tokens)["params"]

    def initial_weights(self) -> dict:
        weights = initial_weights(self.config)
        return jax.tree.map_with_path(lambda path, _: jnp.asarray(weights[_module(path)]), self.shapes)

    @abstractmethod
    def step(self, inputs: np.ndarray, targets: np.ndarray) -> Array:
        """One step on micro-batches (accumulate, batch, context); the loss of a token, which nothing waits for."""

    @abstractmethod
    def _weights(self, state: Any, draw: Array | None) -> dict:
        """The weights at their mean, or the draw of that number."""

    def log_probabilities(self, inputs: np.ndarray, draw: int | None = None) -> Array:
        """Of the next token at every one of `inputs`: (batch, context, vocabulary)."""
        return self._log_probabilities(self.state, inputs, draw)

    @functools.partial(jax.jit, static_argnums=0)
    def _log_probabilities(self, state: Any, inputs: Array, draw: Array | None) -> Array:
        return jax.nn.log_softmax(self.net.apply({"params": self._weights(state, draw)}, inputs))

    def predict(self, inputs: np.ndarray, targets: np.ndarray, draws: Sequence[int | None]) -> Prediction:
        numbers = None if list(draws) == [None] else np.array(draws)
        prediction = self._predict(self.state, inputs, targets, numbers)
        return Prediction(*(np.asarray(value).ravel() for value in prediction))

    @functools.partial(jax.jit, static_argnums=0)
    def _predict(self, state: Any, inputs: Array, targets: Array, draws: Array | None) -> Prediction:
        num_draws = 1 if draws is None else len(draws)

        def add(sums: tuple[Array, Array], draw: Array | None) -> tuple[tuple[Array, Array], Array]:
            log_probability = self._log_probabilities(state, inputs, draw)
            probability = jnp.exp(log_probability)
            likelihood = jnp.take_along_axis(log_probability, targets[..., None], -1)[..., 0]
            return (sums[0] + probability, sums[1] - (probability * log_probability).sum(-1)), likelihood

        zeros = (jnp.zeros((*inputs.shape, self.config.vocabulary)), jnp.zeros(inputs.shape))
        sums, log_likelihoods = jax.lax.scan(add, zeros, draws, length=num_draws)
        probability, entropy = sums[0] / num_draws, sums[1] / num_draws
        total = -jax.scipy.special.xlogy(probability, probability).sum(-1)
        return Prediction(
            log_likelihood=jax.nn.logsumexp(log_likelihoods, 0) - np.log(num_draws),
            confidence=probability.max(-1),
            correct=probability.argmax(-1) == targets,
            entropy=total,
            mutual_information=total - entropy,
        )

    def next_log_probabilities(self, tokens: np.ndarray, draws: Sequence[int | None]) -> np.ndarray:
        """Of what follows `tokens`, under each of the draws: (draws, vocabulary)."""
        padded = np.zeros((1, self.config.context), np.int32)  # one shape compiles once; no token looks to its right
        padded[0, : len(tokens)] = tokens
        return np.stack([self._last(self.state, padded, len(tokens) - 1, draw) for draw in draws])

    @functools.partial(jax.jit, static_argnums=0)
    def _last(self, state: Any, inputs: Array, position: Array, draw: Array | None) -> Array:
        return self._log_probabilities(state, inputs, draw)[0, position]

    def pack(self) -> tuple[dict[str, np.ndarray], Any]:
        """All that changes, for a checkpoint: tensors, and what else there is as JSON, here nothing."""
        leaves = jax.tree.leaves_with_path(self.state)
        return {jax.tree_util.keystr(path): np.asarray(_key_data(leaf)) for path, leaf in leaves}, None

    def unpack(self, tensors: dict[str, np.ndarray], rest: Any) -> None:
        def unpacked(path: tuple, leaf: Any) -> Array:
            value = jnp.asarray(tensors[jax.tree_util.keystr(path)])
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else value

        self.state = jax.tree.map_with_path(unpacked, self.state)

    def peak_memory(self) -> int | None:
        """Bytes of the accelerator, None without one."""
        statistics = jax.local_devices()[0].memory_stats()
        return statistics and statistics["peak_bytes_in_use"]


class AdamW(Run):
    """The plain network, `optax.adamw`."""

    has_draws = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.optimizer = optax.adamw(
            schedule(config, jnp),
            b1=0.9,
            b2=0.99,
            weight_decay=0.1,
            mask=lambda weights: jax.tree.map(lambda w: w.ndim > 1, weights),  # norms are free
        )
        weights = self.initial_weights()
        self.state = (weights, self.optimizer.init(weights))

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> Array:
        self.state, loss = self._step(self.state, inputs, targets)
        return loss

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def _step(self, state: tuple, inputs: Array, targets: Array) -> tuple[tuple, Array]:
        weights, optimizer_state = state

        def loss_fn(weights: dict, inputs: Array, targets: Array) -> Array:
            logits = self.net.apply({"params": weights}, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        def add(sums: tuple, batch: tuple) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(loss_fn)(weights, *batch)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, weights))
        sums, _ = jax.lax.scan(add, zeros, (inputs, targets))
        loss, gradient = jax.tree.map(lambda total: total / self.config.accumulate, sums)
        updates, optimizer_state = self.optimizer.update(gradient, optimizer_state, weights)
        return (optax.apply_updates(weights, updates), optimizer_state), loss

    def _weights(self, state: tuple, draw: Array | None) -> dict:
        return state[0]


class IVON(Run):
    """A Gaussian over the weights: the stock SVI with the optimizer swapped."""

    has_draws = True

    def __init__(self, config: Config) -> None:
        from numpyro_blr import IVON as Optimizer

        super().__init__(config)
        net, weights = self.net, {weight.name: weight for weight in layout(config)}

        def prior(name: str, shape: tuple[int, ...]) -> dist.Distribution:
            weight = weights[name.rpartition(".")[0]]
            return dist.Normal(weight.loc, weight.prior_scale)

        def model(inputs: Array, targets: Array) -> None:
            logits = random_flax_module("net", net, prior, inputs)(inputs)
            with numpyro.handlers.scale(scale=config.num_data / inputs.size):  # a batch stands for all tokens
                numpyro.sample("tokens", dist.Categorical(logits=logits).to_event(2), obs=targets)

        start = jax.tree.leaves_with_path(self.initial_weights())
        sites = {f"net/{_name(path)}": value for path, value in start}
        guide = AutoNormal(model, init_loc_fn=init_to_value(values=sites))
        optimizer = Optimizer(learning_rate=schedule(config, jnp), accumulation_steps=config.accumulate)
        self.svi = SVI(model, guide, optimizer, Trace_ELBO())
        tokens = jnp.zeros((1, config.context), jnp.int32)
        self.state = self.svi.init(jax.random.key(config.seed), tokens, tokens)
        jax.clear_caches()  # of hundreds of small computations, which nothing needs again
        self._update = jax.jit(self.svi.update, donate_argnums=0)

    def step(self, inputs: np.ndarray, targets: np.ndarray) -> Array:
        total = 0.0
        for micro_batch in zip(inputs, targets, strict=True):
            self.state, loss = self._update(self.state, *micro_batch)
            total += loss
        return total / (self.config.accumulate * self.config.num_data)

    def _weights(self, state: Any, draw: Array | None) -> dict:
        params = self.svi.get_params(state)
        rng_key = None if draw is None else jax.random.fold_in(jax.random.key(self.config.seed), draw)

        def weight(path: tuple, _: Any) -> Array:
            loc, scale = (params[f"net/{_name(path)}_auto_{kind}"] for kind in ("loc", "scale"))
            if rng_key is None:
                return loc
            return loc + scale * jax.random.normal(jax.random.fold_in(rng_key, numbers[_name(path)]), loc.shape)

        numbers = {_name(path): number for number, (path, _) in enumerate(jax.tree.leaves_with_path(self.shapes))}
        return jax.tree.map_with_path(weight, self.shapes)


RUNS = {"adamw": AdamW, "ivon": IVON}


def _name(path: tuple) -> str:
    return ".".join(entry.key for entry in path)


def _module(path: tuple) -> str:
    """The name of a weight in `layout`, which leaves out flax's last word: kernel, embedding or scale."""
    return _name(path[:-1])


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _key_data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf
