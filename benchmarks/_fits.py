"""What `reference.py` asks of a method on either host, and what it gets: budgets, common noise, fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = ["GUIDES", "Budget", "Fit", "Setting", "antithetic", "checkpoints", "moment_errors"]

GUIDES = ("mean field", "full rank")


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        evaluations: gradients that a run of score matching may take.
        adam_checkpoints: ELBOs along a run of Adam or of score matching, about.
        adam_seeds: runs of Adam; the others take `seeds`.
        same_evaluations: Adam with several particles takes as many gradients as with one, and not as many steps.
        batches: of score matching.
        elbo_draws, moment_draws: of the Gaussian, for an ELBO and for the moments of the final fit.
        timings: repetitions of a timed run, of which the median counts.
    """

    seeds: int = 5
    steps: int = 100
    adam_steps: int = 10_000
    adam_seeds: int = 5
    adam_checkpoints: int = 80
    same_evaluations: bool = False
    rates: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)
    particles: tuple[int, ...] = (1, 10)
    evaluations: int = 10_000
    batches: tuple[int, ...] = (8, 32)
    elbo_draws: int = 4000
    moment_draws: int = 10_000
    timings: int = 3

    def adam_steps_of(self, particles: int) -> int:
        return max(self.adam_steps // particles, 1) if self.same_evaluations else self.adam_steps

    def quick(self) -> Budget:
        """Enough to see that everything runs."""
        return replace(
            self,
            seeds=min(self.seeds, 2),
            steps=min(self.steps, 15),
            adam_steps=min(self.adam_steps, 40),
            adam_seeds=1,
            adam_checkpoints=5,
            rates=self.rates[:1],
            particles=self.particles[:1],
            evaluations=min(self.evaluations, 160),
            batches=self.batches[:1],
            elbo_draws=200,
            moment_draws=200,
            timings=1,
        )


@dataclass(frozen=True)
class Setting:
    """A method as it was set: of each, the best setting is what the table shows."""

    method: str
    label: str = ""
    particles: int = 1

    def __str__(self) -> str:
        return f"{self.method}, {self.label}" if self.label else self.method


@dataclass(frozen=True, eq=False)
class Fit:
    """One setting of one method on one posterior, R seeds, at T checkpoints of which the first is the start.

    Attributes:
        steps: [T].
        evaluations: gradients of log p taken so far, [R, T].
        elbos: [R, T]; −∞ where it is not finite.
        seconds: of one run by itself up to each checkpoint, compiled, [T].
        start_up_seconds: of tracing and compilation, or what the first step took longer than the others.
        mean_errors, sd_errors: largest |mean − reference| / sd and |log sd / sd| over the parameters, [R].
    """

    posterior: str
    dimension: int
    guide: str
    host: str
    setting: Setting
    steps: np.ndarray
    evaluations: np.ndarray
    elbos: np.ndarray
    seconds: np.ndarray
    start_up_seconds: float
    mean_errors: np.ndarray
    sd_errors: np.ndarray

    @property
    def method(self) -> str:
        return self.setting.method

    def gaps(self, best: float) -> np.ndarray:
        return best - self.elbos

    def first(self, best: float, tolerance: float) -> list[int | None]:
        """The first checkpoint within the tolerance, by seed; None where there is none."""
        near = self.gaps(best) <= tolerance
        return [int(row.argmax()) if row.any() else None for row in near]

    def steps_to(self, best: float, tolerance: float) -> float:
        """Median over the seeds, ∞ where most do not come so close."""
        return _median(self.steps[index] if index is not None else math.inf for index in self.first(best, tolerance))

    def evaluations_to(self, best: float, tolerance: float) -> float:
        firsts = self.first(best, tolerance)
        return _median(
            self.evaluations[seed, index] if index is not None else math.inf for seed, index in enumerate(firsts)
        )

    def seconds_to(self, best: float, tolerance: float, start_up: bool = False) -> float:
        steps = self.steps_to(best, tolerance)
        seconds = float(np.interp(steps, self.steps, self.seconds)) if math.isfinite(steps) else math.inf
        return seconds + (self.start_up_seconds if start_up else 0)

    def final_gap(self, best: float) -> float:
        return _median(self.gaps(best)[:, -1])


def checkpoints(num_steps: int, number: int) -> np.ndarray:
    """0 and about `number` steps up to the last, evenly apart in their logarithm."""
    return np.concatenate([[0], np.unique(np.rint(np.geomspace(1, num_steps, number)).astype(int))])


def antithetic(num_draws: int, dimension: int, seed: int) -> np.ndarray:
    """Standard normal draws in pairs ε, −ε, [num_draws, dimension]: the same at every call."""
    half = np.random.default_rng(seed).standard_normal((num_draws // 2, dimension))
    return np.concatenate([half, -half])


def moment_errors(
    draws: Mapping[str, Any], mean: Mapping[str, np.ndarray], sd: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Largest |mean − reference| / sd and |log sd / sd| over the parameters; draws are [S, *shape], constrained."""
    mean_error, sd_error = 0.0, 0.0
    with np.errstate(all="ignore"):  # a fit that ran away overflows, and its error is then ∞ or not a number
        for name, reference in mean.items():
            values = np.asarray(draws[name], float)
            mean_error = max(mean_error, _largest((values.mean(0) - reference) / sd[name]))
            sd_error = max(sd_error, _largest(np.log(values.std(0) / sd[name])))
    return mean_error, sd_error


def _largest(errors: np.ndarray) -> float:
    largest = float(np.abs(errors).max())
    return largest if math.isfinite(largest) else math.inf


def _median(values) -> float:
    ordered: Sequence[float] = sorted(float(value) for value in values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
