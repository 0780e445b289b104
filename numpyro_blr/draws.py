"""Draws of a guide that was fitted, and their importance weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random
from numpyro.handlers import replay, seed
from numpyro.infer import SVI
from numpyro.infer.util import log_density

from .compiling import quick
from .optim._options import checked_count

__all__ = ["Draws"]

PAGE = 100  # draws


@dataclass(frozen=True, eq=False)
class Draws:
    """Fresh draws of a guide: num_draws -> the values by site of the model, and log p(D, z) − log q(z).

    The same at every call. They come in pages, so that they are compiled once for any number.

    Attributes:
        svi, params, args, kwargs: the guide, the model and what they are run with.
        rng_key: that all keys follow from.
    """

    svi: SVI
    params: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng_key: Array

    def __call__(self, num_draws: int) -> tuple[dict[str, Array], Array]:
        num_draws = checked_count("num_draws", num_draws)
        keys = random.split(random.fold_in(self.rng_key, num_draws), num_draws)
        keys = keys[np.minimum(np.arange(num_draws + -num_draws % PAGE), num_draws - 1)]  # the last page is filled up
        pages = [self._page(keys[start : start + PAGE]) for start in range(0, len(keys), PAGE)]
        return jax.tree.map(lambda *rows: jnp.asarray(np.concatenate(rows)[:num_draws]), *pages)

    @cached_property
    def _page(self) -> Callable[[Array], tuple[dict[str, Array], Array]]:
        def draw(rng_key: Array) -> tuple[dict[str, Array], Array]:
            guide_key, model_key = random.split(rng_key)
            guide, model = seed(self.svi.guide, guide_key), seed(self.svi.model, model_key)
            log_q, guide_trace = log_density(guide, self.args, self.kwargs, self.params)
            log_p, model_trace = log_density(replay(model, guide_trace), self.args, self.kwargs, self.params)
            values = {name: site["value"] for name, site in model_trace.items() if _is_drawn(site)}
            return values, log_p - log_q

        # one after the other: as little memory as a step
        return jax.jit(lambda keys: lax.map(draw, keys), compiler_options=quick(self.args, self.kwargs))


def _is_drawn(site: dict[str, Any]) -> bool:
    return site["type"] == "deterministic" or (site["type"] == "sample" and not site["is_observed"])
