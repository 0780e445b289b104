"""The posteriors with reference draws that `reference.py` measures on, read from the folder that `--data` names."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Posterior", "load"]


@dataclass(frozen=True, eq=False)
class Posterior:
    """A model's data and what is known of the answer.

    Attributes:
        name: of the file, and of the model in `_models_numpyro.py` and `_models_pyro.py`.
        dimension: free real numbers.
        data: the arrays and integers that the file has, by name; what a model asks for is `arguments`.
        draws: of the reference posterior by parameter, [500, *shape], on the constrained scale.
        mean, sd: by parameter, from 10,000 reference draws.
    """

    name: str
    dimension: int
    data: dict[str, Any]
    draws: dict[str, np.ndarray]
    mean: dict[str, np.ndarray]
    sd: dict[str, np.ndarray]

    def arguments(self, model: Callable, array: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """What `model` takes, floats made by `array`, integers as they are."""
        return {
            name: value if isinstance(value := self.data[name], int) else array(np.asarray(value, float))
            for name in inspect.signature(model).parameters
        }


def load(folder: Path) -> list[Posterior]:
    """Every posterior of the folder.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"no posterior (*.json) in {folder}: --data takes the folder of the ten posteriors of posteriordb, one "
            "JSON object a file with the entries name, data, unconstrained_dim, reference and draws."
        )
    return [_posterior(json.loads(file.read_text()), file.stem) for file in files]


def _posterior(record: dict[str, Any], name: str) -> Posterior:
    return Posterior(
        name=name,
        dimension=record["unconstrained_dim"],
        data=record["data"],
        draws={key: np.asarray(value, float) for key, value in record["draws"].items()},
        mean={key: np.asarray(value["mean"], float) for key, value in record["reference"].items()},
        sd={key: np.asarray(value["sd"], float) for key, value in record["reference"].items()},
    )
