"""What may be passed to a learning rule, checked where the user passes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = [
    "OTHERS_RATE",
    "checked_count",
    "checked_estimator",
    "checked_memory",
    "checked_num_draws",
    "checked_positive",
    "checked_preconditioner",
    "checked_rate",
    "checked_schedule",
    "checked_schedule_value",
    "checked_temperature",
]

ESTIMATORS = ("auto", "hessian", "hutchinson", "secant", "gradient")
PRECONDITIONERS = ("factored", "posterior")
OTHERS_RATE = {"BLR": 0.01, "IVON": 0.001}  # of Adam, by rule: beside latents, or beside the weights of a network
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
    return checked_positive("temperature", temperature, hint="; 1 is Bayes")


def checked_positive(name: str, value: Any, *, finite: bool = True, hint: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a positive number, got {value!r}.")
    if not value > 0 or (finite and not math.isfinite(value)):
        raise ValueError(f"{name} must be positive{' and finite' if finite else ''}, got {value}{hint}.")
    return float(value)


def checked_schedule(name: str, value: Any, *, may_be_zero: bool) -> float | Callable:
    """A positive number, or a function of the step that is positive (or zero) at the steps 0, 1, 2, 4, ..., 2²⁰."""
    if not callable(value):
        return checked_positive(name, value)
    for count in SCHEDULE_PROBES:
        result = float(value(count))
        if not (math.isfinite(result) and (result > 0 or (may_be_zero and result == 0))):
            raise ValueError(f"a schedule of the {name} must stay positive, got {result} at step {count}.")
    return value


def checked_memory(name: str, value: Any) -> float:
    """β of an average over about 1/(1 − β) steps."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1), got {value!r}.")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}: an average remembers about 1/(1 - {name}) steps.")
    return float(value)


def checked_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def checked_preconditioner(preconditioner: Any) -> str:
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(
            f"preconditioner must be one of {', '.join(map(repr, PRECONDITIONERS))}; got {preconditioner!r}."
        )
    return preconditioner
