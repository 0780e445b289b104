"""The ways to train that `language_model.py` compares on NumPyro, as runs of `examples/transformer_lm.py`."""

from __future__ import annotations

from typing import Any

import jax
import numpyro
from _transformer_numpyro import IVON, AdamW, Config
from numpyro.infer import SVI

__all__ = ["METHODS", "persistent_bytes"]


class StockNormal(IVON):
    """The same model and the same guide, `AutoNormal`, moved by the host's Adam."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.svi = SVI(self.svi.model, self.svi.guide, numpyro.optim.Adam(config.learning_rate), self.svi.loss)
        tokens = jax.numpy.zeros((1, config.context), jax.numpy.int32)
        self.state = self.svi.init(jax.random.key(config.seed), tokens, tokens)
        self._update = jax.jit(self.svi.update, donate_argnums=0)


METHODS: dict[str, Any] = {"AdamW": AdamW, "IVON": IVON, "AutoNormal and Adam": StockNormal}


def persistent_bytes() -> int:
    """Of the arrays that are alive between two steps."""
    return sum(array.nbytes for array in jax.live_arrays())
