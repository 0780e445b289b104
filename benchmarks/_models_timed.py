"""The models whose steps are timed (`steps.py`, `traced.py`) with their data, written once for both hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["REGRESSIONS", "hierarchy", "regressions"]

REGRESSIONS = ("logistic, 31 weights", "network, 751 weights")
NUM_GROUPS = 1000
Timed = dict[str, tuple[Callable, tuple[np.ndarray, ...]]]  # name -> model, and its arguments in NumPy


def regressions(host: Any, xp: Any) -> Timed:
    """A logistic regression on breast cancer, and a small network of 751 weights.

    Args:
        host: `numpyro` or `pyro`.
        xp: the module of its array functions.
    """
    from sklearn.datasets import load_breast_cancer, load_diabetes

    dist = host.distributions

    def logistic(x, y):
        weights = host.sample("weights", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        intercept = host.sample("intercept", dist.Normal(0, 10))
        with host.plate("data", len(y)):
            host.sample("y", dist.Bernoulli(logits=intercept + x @ weights), obs=y)

    def network(x, y):
        hidden = host.sample("hidden", dist.Normal(0, 1).expand([x.shape[1], 25]).to_event(2))
        middle = host.sample("middle", dist.Normal(0, 0.2).expand([25, 19]).to_event(2))
        out = host.sample("out", dist.Normal(0, 0.2).expand([19]).to_event(1))
        bias = host.sample("bias", dist.Normal(0, 1).expand([7]).to_event(1))
        mean = xp.tanh(xp.tanh(x @ hidden) @ middle) @ out + bias.sum()
        with host.plate("data", len(y)):
            host.sample("y", dist.Normal(mean, 0.7), obs=y)

    features, labels = load_breast_cancer(return_X_y=True)
    diabetes, progression = load_diabetes(return_X_y=True)
    breast_cancer = logistic, (standardised(features), labels.astype(float))
    progress = network, (standardised(diabetes), standardised(progression))
    return dict(zip(REGRESSIONS, (breast_cancer, progress), strict=True))


def hierarchy(host: Any) -> Timed:
    """A mean for each of 1,000 groups of five made-up observations: the group's number, and the response."""
    dist = host.distributions

    def hierarchical(group, y):
        mean, spread = host.sample("mean", dist.Normal(0, 5)), host.sample("spread", dist.HalfCauchy(2))
        with host.plate("groups", NUM_GROUPS):
            effect = host.sample("effect", dist.Normal(mean, spread))
        with host.plate("data", len(y)):
            host.sample("y", dist.Normal(effect[group], 1), obs=y)

    random = np.random.default_rng(0)
    group = np.repeat(np.arange(NUM_GROUPS), 5)
    response = random.normal(1, 2, NUM_GROUPS)[group] + random.normal(size=len(group))
    return {"hierarchical, 1,000 groups": (hierarchical, (group, response))}


def standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(0)) / values.std(0)
