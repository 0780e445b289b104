"""What `fit` returns: the answer, how far it can be trusted, and ways to look at it.

The importance weights w = p(D, z)/q(z) at draws of the guide q say how well q covers the posterior: the smaller the
shape k̂ of the generalised Pareto distribution of their tail, the better, and above 0.7 q misses a part of it.

Source: Yao, Vehtari, Simpson & Gelman 2018, "Yes, but did it work?"; Vehtari et al. 2024 for k̂.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numpy as np
from jax import Array, random
from numpyro.handlers import replay, seed, substitute, trace
from numpyro.infer import SVI
from numpyro.infer.util import log_density

from .draws import Draws

__all__ = ["Fit", "arviz_is_installed", "pareto_k"]

INSTALL_ARVIZ = "pip install 'arviz>=0.20,<1'"
MAX_PARETO_K = 0.7
EQUAL_WEIGHTS = 1e-3  # nats: a spread that is rounding has no tail


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A fit by `fit`; `print` shows its report.

    Attributes:
        params: as the host has them.
        losses: of every step, averaged over its draws.
        elbo: with its standard error `elbo_error`; exact where every site is summed out, else at fresh draws of the
            guide, as those that it was fitted to flatter it; without importance weights, of the last check.
        converged: whether, and `reason` why or why not.
        steps: taken.
        gradient_evaluations: of the Gaussian; a Hessian counts as its number of rows, a Hessian-vector product as 2,
            a loss as 1.
        history: arrays with a number for each check: step, elbo, elbo_error, residual r², error V, rate ρ, effective
            (draws that the recycled ones are worth), noise_cost (nats that noise costs), curvature (the smallest
            eigenvalue of S⁻¹ Ĥ), creep (nats that a slow drift of the mean still gains), drift (of the
            parameters of other optimizers).
        pareto_k: k̂ from a few draws; NaN where it was not computed.
        no_weights: why p(D, z)/q(z) is not to be had; empty where it is.
        site_residuals: (r², V) of each site's own coordinates, where draws are recycled.
        compiled: how the steps ran.
        svi, state: to continue, by `svi.update`.
        args, kwargs: of the model.
        rng_key: that the fit began with.
        draws: of the guide.
    """

    params: dict[str, Any]
    losses: np.ndarray
    elbo: float
    elbo_error: float
    converged: bool
    reason: str
    steps: int
    gradient_evaluations: int
    history: dict[str, np.ndarray]
    pareto_k: float
    no_weights: str
    site_residuals: dict[str, tuple[float, float]]
    compiled: str
    svi: SVI
    state: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rng_key: Array
    draws: Draws

    @property
    def guide(self) -> Any:
        return self.svi.guide

    def __str__(self) -> str:
        return self.report()

    def __repr__(self) -> str:
        return f"Fit(elbo={self.elbo:.4g}, elbo_error={self.elbo_error:.2g}, converged={self.converged})"

    def report(self) -> str:
        """The fit in a few lines of text."""
        rows = [
            ("ELBO", f"{_nats(self.elbo)} ± {self.elbo_error:.2g}"),
            ("converged", f"{'yes' if self.converged else 'no'}: {self.reason}"),
            ("steps", f"{self.steps:,}, {self.compiled}"),
            ("gradient evaluations", f"{self.gradient_evaluations:,}" if self.gradient_evaluations else "not counted"),
            ("Pareto k̂", self._described_pareto_k()),
        ]
        lines = [f"{name:<22}{text}" for name, text in rows]
        if self.site_residuals:
            width = max(20, *map(len, self.site_residuals))
            lines += ["", f"{'site':<{width}}  {'r²':>8}  {'its noise':>9}"]
            lines += [f"{name:<{width}}  {r2:8.1e}  {v:9.1e}" for name, (r2, v) in self.site_residuals.items()]
        return "\n".join(lines)

    def sample(self, num_draws: int = 1000) -> dict[str, Any]:
        """Draws of the guide by site of the model, [num_draws, *shape], constrained, with what the model makes of them.

        The same draws at every call.
        """
        return self.draws(num_draws)[0]

    def psis(self, num_draws: int = 1000) -> float:
        """The Pareto k̂ of the importance weights at draws of the guide; 0 where all weights are equal to rounding.

        Raises:
            ImportError: ArviZ is not installed.
            ValueError: the weights are not to be had.
        """
        _arviz()
        if self.no_weights:
            raise ValueError(f"psis() needs importance weights, which this fit does not have: {self.no_weights}.")
        return pareto_k(self.log_weights(num_draws))

    def log_weights(self, num_draws: int) -> np.ndarray:
        """log p(D, z) − log q(z) at fresh draws of the guide, [num_draws]; their mean is the ELBO."""
        return np.asarray(self.draws(num_draws)[1], float)

    def to_arviz(self, num_draws: int = 1000) -> Any:
        """An `arviz.InferenceData` with one chain of draws of the guide, and the observed data.

        Its `posterior` has the model's sites, constrained, and its deterministic sites; its `sample_stats` has
        `log_weight`, log p(D, z) − log q(z), where that is to be had.

        Raises:
            ImportError: ArviZ is not installed.
        """
        arviz = _arviz()
        values, log_weights = self.draws(num_draws)
        sample_stats = None if self.no_weights else {"log_weight": np.asarray(log_weights)[None]}
        return arviz.from_dict(
            posterior={name: np.asarray(value)[None] for name, value in values.items()},
            sample_stats=sample_stats,
            observed_data=self._observed() or None,
        )

    def plot(self) -> Any:
        """A matplotlib Figure of the ELBO, of the natural gradient's residual and of the rate over the steps.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("plot() draws with matplotlib: pip install 'matplotlib>=3.8'.") from error
        history, steps = self.history, self.history["step"]
        figure, (top, middle, bottom) = pyplot.subplots(3, 1, sharex=True, figsize=(7, 7), layout="constrained")
        top.plot(steps, history["elbo"])
        band = 2 * history["elbo_error"]
        top.fill_between(steps, history["elbo"] - band, history["elbo"] + band, alpha=0.3, label="± 2 standard errors")
        middle.plot(steps, history["residual"], label="r²")
        middle.plot(steps, history["error"], "--", label="its Monte Carlo error")
        bottom.plot(steps, history["rate"])
        for axes, label in zip((top, middle, bottom), ("ELBO", "residual", "rate ρ"), strict=True):
            axes.set_ylabel(label)
        positive = np.concatenate([history["residual"], history["error"]]) > 0
        middle.set_yscale("log" if positive.any() else "linear")
        top.legend()
        middle.legend()
        bottom.set_xlabel("step")
        return figure

    def _described_pareto_k(self) -> str:
        if math.isnan(self.pareto_k):
            return f"not computed: {self.no_weights or 'it needs ArviZ, ' + INSTALL_ARVIZ}"
        verdict = "the guide covers the posterior" if self.pareto_k <= MAX_PARETO_K else "the guide misses a part of it"
        return f"{self.pareto_k:.2f}: {verdict}"

    def _observed(self) -> dict[str, np.ndarray]:
        guide, model = seed(self.guide, random.key(0)), seed(self.svi.model, random.key(0))
        _, guide_trace = log_density(guide, self.args, self.kwargs, self.params)
        sites = trace(substitute(replay(model, guide_trace), self.params)).get_trace(*self.args, **self.kwargs)
        observed = {name: site for name, site in sites.items() if site["type"] == "sample" and site["is_observed"]}
        return {name: np.asarray(site["value"]) for name, site in observed.items()}


def _nats(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e12 else f"{value:.3g}"


def pareto_k(log_weights: np.ndarray) -> float:
    """k̂; 0 where all weights are equal to rounding, infinite where half of them are not finite."""
    arviz, finite = _arviz(), log_weights[np.isfinite(log_weights)]
    if len(finite) < len(log_weights) / 2:
        return math.inf
    return 0.0 if np.ptp(finite) < EQUAL_WEIGHTS else float(arviz.psislw(finite)[1])


def arviz_is_installed() -> bool:
    """In a version that has `psislw`, without importing it."""
    return find_spec("arviz") is not None and int(version("arviz").split(".")[0]) < 1


def _arviz() -> Any:
    if not arviz_is_installed():
        raise ImportError(f"this needs ArviZ before its version 1: {INSTALL_ARVIZ}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of version 1, at the first import of every other
        import arviz
    return arviz
