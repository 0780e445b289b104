"""What the transformers of both hosts share: their sizes, weights, prior and learning rate, and what a checkpoint is.

Both start from the same numbers, made here by NumPy, so that with the same data their losses agree to rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

__all__ = ["SIZES", "Config", "Size", "Weight", "initial_weights", "layout", "load", "save", "schedule"]


@dataclass(frozen=True)
class Size:
    """The shape of a network, and the number of byte-pair tokens that goes with it."""

    layers: int
    heads: int
    width: int
    vocabulary: int


SIZES = {
    "test": Size(layers=2, heads=2, width=16, vocabulary=300),
    "tiny": Size(layers=4, heads=4, width=64, vocabulary=512),
    "small": Size(layers=4, heads=4, width=128, vocabulary=1024),
    "base": Size(layers=6, heads=6, width=384, vocabulary=4096),
    "gpt2": Size(layers=12, heads=12, width=768, vocabulary=50257),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """All that decides how a run goes, beside its text; a run resumes only under the same one."""

    host: str
    layers: int
    heads: int
    width: int
    vocabulary: int
    context: int
    positions: str  # "learned" or "rotary"
    tie: bool  # the last matrix is the embeddings of the tokens
    optimizer: str
    learning_rate: float  # at its highest
    warmup: float  # share of the steps over which the learning rate rises
    steps: int
    accumulate: int  # micro-batches to a step
    batch: int
    num_data: int  # tokens of the training text
    text_digest: str  # of those tokens
    dtype: str  # of the matrix products; the weights are float32
    device: str
    seed: int


@dataclass(frozen=True)
class Weight:
    """An array of weights: where it is, its shape as (inputs, outputs), and the Normals of its start and its prior."""

    name: str
    shape: tuple[int, ...]
    loc: float
    start_scale: float
    prior_scale: float


def layout(config: Config) -> list[Weight]:
    """Every array of weights. The priors are those of `pyro_blr.BayesianModule`: 1/√(inputs), and 1 ± 0.3 for gains."""
    width = config.width
    into_residual = (2 * config.layers) ** -0.5  # so that the sum of all that the layers add is of size one

    def norm(name: str) -> Weight:
        return Weight(name, (width,), 1.0, 0.0, 0.3)

    def matrix(name: str, rows: int, columns: int, factor: float = 1.0) -> Weight:
        return Weight(name, (rows, columns), 0.0, factor * rows**-0.5, rows**-0.5)

    def embedding(name: str, rows: int) -> Weight:
        return Weight(name, (rows, width), 0.0, 0.02, width**-0.5)

    weights = [embedding("tokens", config.vocabulary)]
    if config.positions == "learned":
        weights.append(embedding("positions", config.context))
    for layer in range(config.layers):
        weights += [
            norm(f"blocks_{layer}.norm_attention"),
            matrix(f"blocks_{layer}.attention_in", width, 3 * width),
            matrix(f"blocks_{layer}.attention_out", width, width, into_residual),
            norm(f"blocks_{layer}.norm_mlp"),
            matrix(f"blocks_{layer}.mlp_in", width, 4 * width),
            matrix(f"blocks_{layer}.mlp_out", 4 * width, width, into_residual),
        ]
    weights.append(norm("norm"))
    if not config.tie:
        weights.append(matrix("head", width, config.vocabulary))
    return weights


def initial_weights(config: Config) -> dict[str, np.ndarray]:
    random = np.random.default_rng(config.seed)
    return {
        weight.name: np.float32(weight.loc)
        + np.float32(weight.start_scale) * random.standard_normal(weight.shape, np.float32)
        for weight in layout(config)
    }


def schedule(config: Config, numpy: Any = np) -> Callable:
    """The learning rate at a step: a straight line up, then a cosine down to a tenth. For JAX, give its `numpy`."""
    num_warmup = max(round(config.warmup * config.steps), 1)
    num_decay = max(config.steps - num_warmup, 1)

    def learning_rate(step):
        progress = numpy.clip((step - num_warmup) / num_decay, 0, 1)
        decay = 0.55 + 0.45 * numpy.cos(math.pi * progress)
        return config.learning_rate * numpy.minimum((step + 1) / num_warmup, decay)

    return learning_rate


def save(path: Path, tensors: dict[str, np.ndarray], config: Config, counters: dict) -> None:
    """Write a checkpoint: tensors, and beside them as JSON the configuration and what was counted."""
    part = path.with_name(path.name + ".part")
    metadata = {"config": json.dumps(asdict(config)), "counters": json.dumps(counters)}
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, part, metadata)
    part.replace(path)  # whoever stops us while we write finds the previous checkpoint whole


def load(path: Path, config: Config) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors and the counters of a checkpoint, if it was made under the same configuration."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    was, now = json.loads(metadata["config"]), asdict(config)
    differences = [f"{name} was {was.get(name)!r} and is {now[name]!r}" for name in now if was.get(name) != now[name]]
    if differences:
        raise ValueError(
            f"{path} comes from another run: {'; '.join(differences)}. Give the options that it was started with."
        )
    return load_file(path), json.loads(metadata["counters"])
