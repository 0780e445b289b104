"""Regressions on minibatches: BLR() and Adam through the stock SVI, on the host's AutoNormal.

    python benchmarks/minibatches.py [--host numpyro|pyro] [--steps 3000] [--seeds 3] [--json FILE]

Visits to doctors in the RAND experiment (20,190 × 9, negative binomial) and affairs (6,366 × 8, logistic, the columns
as they come), data of statsmodels, and the digits of scikit-learn (1,797 × 64, softmax, 650 weights), in a subsampled
plate of 200, 100 and 100 rows. Adam has the rates 0.1, 0.03, 0.01 and 0.003, of which each column has the best in
hindsight; BLR() is as it comes.

The ELBO on all data is one NumPy formula of the guide's means and scales, at 256 draws that are the same throughout.
The table says by how many nats it is below the best that any run had, in the median over the seeds, and what a step
takes; compilation is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import gammaln

RATES = (0.1, 0.03, 0.01, 0.003)
DRAWS = 256
WIDE, PRIOR = 3.0, {"visits": 3.0, "affairs": 3.0, "digits": 1.0}  # standard deviations


class Problem(NamedTuple):
    """Inputs x [N, P], targets y [N], rows in a batch, and the weights' shape."""

    name: str
    x: np.ndarray
    y: np.ndarray
    batch: int
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Means and scales of the guide, by site."""

    locs: dict[str, np.ndarray]
    scales: dict[str, np.ndarray]


def problem(name: str) -> Problem:
    import statsmodels.api as sm
    from sklearn.datasets import load_digits

    if name == "digits":
        x, y = load_digits(return_X_y=True)
        return Problem(name, with_ones(x / 16), y, 100, (65, 10))
    if name == "affairs":
        data = sm.datasets.fair.load_pandas().data
        y = (data.pop("affairs").to_numpy() > 0).astype(float)
        return Problem(name, with_ones(data.to_numpy(float)), y, 100, (9,))
    data = sm.datasets.randhie.load_pandas().data
    y, x = data.pop("mdvis").to_numpy(float), data.to_numpy(float)
    return Problem(name, with_ones((x - x.mean(0)) / x.std(0)), y, 200, (10,))


def with_ones(x: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(x)), x])


def log_density(problem: Problem, values: dict[str, np.ndarray]) -> float:
    """log p(y, z) of unconstrained z, up to a constant."""
    weights, x, y = values["weights"], problem.x, problem.y
    scores = x @ weights
    found = -((weights / PRIOR[problem.name]) ** 2).sum() / 2
    if problem.name == "digits":
        peak = scores.max(1)
        norms = peak + np.log(np.exp(scores - peak[:, None]).sum(1))
        return found + (scores[np.arange(len(y)), y] - norms).sum()
    if problem.name == "affairs":
        return found - np.logaddexp(0, np.where(y > 0, -scores, scores)).sum()
    log_size = values["size"]
    size, total = np.exp(log_size), np.logaddexp(log_size, scores)
    found += log_size - (size / WIDE) ** 2 / 2  # log |d size / d log size|
    return found + (gammaln(y + size) - gammaln(size) + size * (log_size - total) + y * (scores - total)).sum()


def elbo(problem: Problem) -> Callable[[Place], float]:
    random = np.random.default_rng(0)
    half = {
        name: random.standard_normal((DRAWS // 2, *shape)) for name, shape in (("weights", problem.shape), ("size", ()))
    }
    noise = {name: np.concatenate([draws, -draws]) for name, draws in half.items()}

    def at(place: Place) -> float:
        values = {name: loc + place.scales[name] * noise[name] for name, loc in place.locs.items()}
        densities = [log_density(problem, {name: draws[k] for name, draws in values.items()}) for k in range(DRAWS)]
        return float(np.mean(densities) + sum(np.log(scale).sum() for scale in place.scales.values()))

    return at


def numpyro_places(problem: Problem, rate: float | None, marks: list[int], seed: int) -> Iterator[tuple[float, Place]]:
    """(seconds so far, place) after as many steps as each of the marks says; `BLR()` where the rate is None."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    from numpyro_blr import BLR

    def model(x, y):
        prior = dist.Normal(0.0, PRIOR[problem.name]).expand(problem.shape)
        weights = numpyro.sample("weights", prior.to_event(len(problem.shape)))
        size = numpyro.sample("size", dist.HalfNormal(WIDE)) if problem.name == "visits" else None
        with numpyro.plate("data", len(y), subsample_size=problem.batch):
            x, y = numpyro.subsample(x, event_dim=1), numpyro.subsample(y, event_dim=0)
            scores = x @ weights
            if problem.name == "digits":
                likelihood = dist.Categorical(logits=scores)
            elif problem.name == "affairs":
                likelihood = dist.Bernoulli(logits=scores)
            else:
                likelihood = dist.NegativeBinomial2(jnp.exp(scores), size)
            numpyro.sample("y", likelihood, obs=y)

    guide = AutoNormal(model)
    svi = SVI(model, guide, BLR() if rate is None else numpyro.optim.Adam(rate), Trace_ELBO())
    data = jnp.asarray(problem.x), jnp.asarray(problem.y)
    state = svi.init(jax.random.key(seed), *data)

    @jax.jit
    def advance(state, num_steps):
        return jax.lax.fori_loop(0, num_steps, lambda _, state: svi.update(state, *data)[0], state)

    jax.block_until_ready(advance(state, 0))
    seconds = 0.0
    for before, mark in zip([0, *marks], marks, strict=False):
        start = time.perf_counter()
        state = jax.block_until_ready(advance(state, mark - before))
        seconds += time.perf_counter() - start
        params = {name: np.asarray(value) for name, value in svi.get_params(state).items()}
        sites = [name.removesuffix("_auto_loc") for name in params if name.endswith("_auto_loc")]
        yield (
            seconds,
            Place(
                {name: params[f"{name}_auto_loc"] for name in sites},
                {name: params[f"{name}_auto_scale"] for name in sites},
            ),
        )


def pyro_places(problem: Problem, rate: float | None, marks: list[int], seed: int) -> Iterator[tuple[float, Place]]:
    """The same in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    from pyro_blr import BLR

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)

    def model(x, y):
        prior = dist.Normal(0.0, PRIOR[problem.name]).expand(problem.shape)
        weights = pyro.sample("weights", prior.to_event(len(problem.shape)))
        size = pyro.sample("size", dist.HalfNormal(WIDE)) if problem.name == "visits" else None
        with pyro.plate("data", len(y), subsample_size=problem.batch) as rows:
            scores, y = x[rows] @ weights, y[rows]
            if problem.name == "digits":
                likelihood = dist.Categorical(logits=scores)
            elif problem.name == "affairs":
                likelihood = dist.Bernoulli(logits=scores)
            else:
                likelihood = dist.NegativeBinomial(size, logits=scores - size.log())
            pyro.sample("y", likelihood, obs=y)

    guide = AutoNormal(model)
    svi = SVI(model, guide, BLR() if rate is None else pyro.optim.Adam({"lr": rate}), Trace_ELBO())
    data = torch.as_tensor(problem.x), torch.as_tensor(problem.y)
    seconds = 0.0
    for before, mark in zip([0, *marks], marks, strict=False):
        start = time.perf_counter()
        for _ in range(mark - before):
            svi.step(*data)
        seconds += time.perf_counter() - start
        sites = ["weights", *(["size"] if problem.name == "visits" else [])]
        places = (getattr(guide, part) for part in ("locs", "scales"))
        yield seconds, Place(*({name: getattr(part, name).detach().numpy() for name in sites} for part in places))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("numpyro", "pyro"), default="numpyro")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.host == "numpyro":
        import numpyro

        numpyro.enable_x64()
    else:
        import torch

        torch.set_default_dtype(torch.float64)
    places = {"numpyro": numpyro_places, "pyro": pyro_places}[arguments.host]
    marks = [mark for mark in (10, 100, 1000) if mark < arguments.steps] + [arguments.steps]
    records: list[dict[str, Any]] = []
    print("| data | | " + " | ".join(f"{mark:,} steps" for mark in marks) + " | ms a step |")
    print("|---|---|" + "---:|" * (len(marks) + 1))
    for name in ("visits", "affairs", "digits"):
        task = problem(name)
        at = elbo(task)
        runs: dict[float | None, list[list[tuple[float, float]]]] = {
            rate: [
                [(seconds, at(place)) for seconds, place in places(task, rate, marks, seed)]
                for seed in range(arguments.seeds)
            ]
            for rate in (None, *RATES)
        }
        best = max(value for several in runs.values() for run in several for _, value in run)
        short = {
            rate: [best - statistics.median(run[k][1] for run in several) for k in range(len(marks))]
            for rate, several in runs.items()
        }
        pace = {
            rate: 1e3 * statistics.median(run[-1][0] for run in several) / marks[-1] for rate, several in runs.items()
        }
        lowest = [min(short[rate][k] for rate in RATES) for k in range(len(marks))]
        for method, gaps, ms in (("BLR()", short[None], pace[None]), ("Adam", lowest, pace[RATES[0]])):
            print(f"| {name} | {method} | " + " | ".join(f"{gap:,.1f}" for gap in gaps) + f" | {ms:.2g} |", flush=True)
        records += [
            {"data": name, "rate": rate, "marks": marks, "short": short[rate], "ms": pace[rate], "best": best}
            for rate in runs
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
