"""What may be passed to a learning rule, checked where the user passes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["checked_estimator", "checked_num_draws", "checked_rate", "checked_schedule_value", "checked_temperature"]

ESTIMATORS = ("auto", "hessian", "hutchinson", "gradient")
SCHEDULE_PROBES = (0, *(2**k for k in range(21)))


def checked_rate(learning_rate: Any, estimator: str) -> float | Callable | None:
    """ρ, a schedule, or None; a schedule is evaluated at the steps 0, 1, 2, 4, ..., 2²⁰."""
    if learning_rate is None:
        if estimator == "gradient":
            raise ValueError(
                "estimator='gradient' needs a learning_rate in (0, 1], for example 0.1 or a decreasing schedule: the "
                "automatic rate compares losses at common draws, which a single stock gradient does not have."
            )
        return None
    if callable(learning_rate):
        for count in SCHEDULE_PROBES:
            checked_schedule_value(learning_rate(count), count)
        return learning_rate
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, (int, float)):
        raise TypeError(
            f"learning_rate must be a number in (0, 1], a function of the step, or None; got {learning_rate!r}."
        )
    if not 0 < learning_rate <= 1:
        raise ValueError(
            f"learning_rate must lie in (0, 1], got {learning_rate}: 1 is a full step (Bayes' rule where the model is "
            "conjugate), and a longer one leaves the domain of the natural parameters."
        )
    return float(learning_rate)


def checked_schedule_value(rate: Any, count: int) -> float:
    value = float(rate)
    if not 0 < value <= 1:
        raise ValueError(
            f"a learning_rate schedule must stay in (0, 1], got {value} at step {count}. "
            "Let it end in a small positive value rather than in 0."
        )
    return value


def checked_estimator(estimator: Any) -> str:
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(map(repr, ESTIMATORS))}; got {estimator!r}.")
    return estimator


def checked_num_draws(num_draws: Any) -> int:
    if isinstance(num_draws, bool) or not isinstance(num_draws, int):
        raise TypeError(f"num_draws must be an even integer of at least 4, got {num_draws!r}.")
    if num_draws < 4 or num_draws % 2:
        raise ValueError(
            f"num_draws must be an even integer of at least 4, got {num_draws}: draws come in antithetic pairs, and "
            "their Monte Carlo error needs two pairs."
        )
    return num_draws


def checked_temperature(temperature: Any) -> float:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a positive number, got {temperature!r}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}; 1 is Bayes.")
    return float(temperature)
