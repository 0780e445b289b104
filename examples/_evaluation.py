"""How good predictions of the next token are: their loss, their calibration, and how sure they are of themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["Calibration", "Prediction", "predict"]

NUM_BINS = 15

Batch = tuple[np.ndarray, np.ndarray]


class Prediction(NamedTuple):
    """p̄, the mean over draws of the weights of what each predicts, at every token of a text (one axis).

    The entropy of p̄ is all the uncertainty; what is left of it after the draws' own entropies, the mutual information
    of token and weights, is that which more data could remove.
    """

    log_likelihood: np.ndarray  # log p̄ of the token that came
    confidence: np.ndarray  # the largest p̄
    correct: np.ndarray  # whether that token came
    entropy: np.ndarray
    mutual_information: np.ndarray

    @property
    def loss(self) -> float:
        return -float(self.log_likelihood.mean(dtype=float))


class Predictor(Protocol):
    def predict(self, inputs: np.ndarray, targets: np.ndarray, draws: Sequence[int | None]) -> Prediction: ...


def predict(run: Predictor, batches: Iterable[Batch], draws: Sequence[int | None]) -> Prediction:
    """The predictions of `run` for all batches, inputs and targets, one after the other."""
    parts = [run.predict(inputs, targets, draws) for inputs, targets in batches]
    return Prediction(*map(np.concatenate, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Calibration:
    """Mean confidence, accuracy and share of the tokens in bins of equal width; those without a token are left out."""

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, prediction: Prediction) -> Calibration:
        bins = np.minimum((prediction.confidence * NUM_BINS).astype(int), NUM_BINS - 1)
        counts = np.bincount(bins, minlength=NUM_BINS)
        filled = counts > 0

        def mean(values: np.ndarray) -> np.ndarray:
            return np.bincount(bins, values, minlength=NUM_BINS)[filled] / counts[filled]

        return cls(mean(prediction.confidence), mean(prediction.correct), counts[filled] / counts.sum())

    @property
    def error(self) -> float:
        """The expected calibration error: Σ share · |accuracy − confidence|."""
        return float((self.share * np.abs(self.accuracy - self.confidence)).sum())
