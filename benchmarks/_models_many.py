"""Models of more than 256 coordinates on real data (`many_coordinates.py`), written once for both hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["MODELS", "models"]

MODELS = ("counties", "sunspots", "districts", "wine", "digits")
NUM_FACTORS = 3


def models(host: Any, xp: Any) -> dict[str, tuple[Callable, tuple[np.ndarray, ...]]]:
    """Each model with its arguments in NumPy, by name.

    Args:
        host: `numpyro` or `pyro`.
        xp: the module of its array functions.
    """
    import statsmodels.api as sm
    from sklearn.datasets import load_digits, load_wine

    dist = host.distributions

    def counties(deaths, expected):
        """Poisson counts, with a rate of its own for each county."""
        mean, spread = host.sample("mean", dist.Normal(0, 1)), host.sample("spread", dist.HalfNormal(1))
        with host.plate("counties", len(deaths)):
            effect = host.sample("effect", dist.Normal(0, 1))
            host.sample("deaths", dist.Poisson(expected * xp.exp(mean + spread * effect)), obs=deaths)

    def sunspots(counts):
        """Poisson counts, whose rate's logarithm walks at random."""
        first, spread = host.sample("first", dist.Normal(3, 2)), host.sample("spread", dist.HalfNormal(1))
        with host.plate("years", len(counts)):
            step = host.sample("step", dist.Normal(0, 1))
            host.sample("counts", dist.Poisson(xp.exp(first + spread * xp.cumsum(step, -1))), obs=counts)

    def districts(above, total, x):
        """Binomial counts given covariates, with an effect of its own for each district."""
        intercept, spread = host.sample("intercept", dist.Normal(0, 3)), host.sample("spread", dist.HalfNormal(1))
        weights = host.sample("weights", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
        with host.plate("districts", len(above)):
            effect = host.sample("effect", dist.Normal(0, 1))
            logits = intercept + x @ weights + spread * effect
            host.sample("above", dist.Binomial(total, logits=logits), obs=above)

    def wine(y):
        """Factor analysis: what is measured of a wine is linear in a few factors."""
        rows, columns = y.shape
        factors = host.sample("factors", dist.Normal(0, 1).expand([rows, NUM_FACTORS]).to_event(2))
        loadings = host.sample("loadings", dist.Normal(0, 1).expand([NUM_FACTORS, columns]).to_event(2))
        noise = host.sample("noise", dist.HalfNormal(1))
        host.sample("y", dist.Normal(factors @ loadings, noise).to_event(2), obs=y)

    def digits(x, y):
        """Softmax regression."""
        weights = host.sample("weights", dist.Normal(0, 1).expand([x.shape[1], 10]).to_event(2))
        with host.plate("images", len(y)):
            host.sample("y", dist.Categorical(logits=x @ weights), obs=y)

    cancer = table(sm.datasets.cancer.load_pandas().data)
    expected = cancer[:, 1] * cancer[:, 0].sum() / cancer[:, 1].sum()
    spots = table(sm.datasets.sunspots.load_pandas().data)[:, 1]
    schools = sm.datasets.star98.load_pandas()
    above, below = table(schools.endog).T
    images, labels = load_digits(return_X_y=True)
    return {
        "counties": (counties, (cancer[:, 0], expected)),
        "sunspots": (sunspots, (np.round(spots),)),
        "districts": (districts, (above, above + below, standardised(table(schools.exog)))),
        "wine": (wine, (standardised(load_wine().data),)),
        "digits": (digits, (np.column_stack([np.ones(len(images)), images / 16]), labels)),
    }


def table(frame: Any) -> np.ndarray:
    """The numbers of a data frame, which are not to be written to, as an array of their own."""
    return np.array(frame, float)


def standardised(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(0)) / values.std(0)
