"""More than 256 coordinates, on all data: BLR() and Adam through the stock SVI, on the host's AutoNormal.

    python benchmarks/many_coordinates.py [--host numpyro|pyro] [--models NAME ...] [--steps 1000] [--adam-steps 10000]
        [--seeds 3] [--json FILE]

Deaths from cancer in 301 counties (Poisson, an effect for each county), 309 years of sunspots (Poisson, a random walk)
and pupils above the median in 303 school districts (binomial, 20 covariates and an effect for each), data of
statsmodels; 178 wines × 13 measurements (three factors) and 1,797 digits × 64 (softmax), data of scikit-learn. Adam
has the rates 0.1, 0.03, 0.01 and 0.003, of which each column has the best in hindsight; BLR() is as it comes.

The ELBO is the host's own, at 256 draws that are the same throughout. The table says by how many nats it is below the
best that any run had, in the median over the seeds, and how long the steps took; compilation is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _models_many import MODELS, models

RATES = (0.1, 0.03, 0.01, 0.003)
MARKS = (10, 30, 100, 300, 1000, 3000, 10000, 30000)
DRAWS = 256


def numpyro_elbos(name: str, rate: float | None, marks: list[int], seed: int) -> Iterator[tuple[float, float]]:
    """(seconds so far, ELBO) after as many steps as each of the marks says; `BLR()` where the rate is None."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    from numpyro_blr import BLR

    model, data = models(numpyro, jnp)[name]
    data, guide = tuple(map(jnp.asarray, data)), AutoNormal(model)
    svi = SVI(model, guide, BLR() if rate is None else numpyro.optim.Adam(rate), Trace_ELBO())
    state, loss = svi.init(jax.random.key(seed), *data), Trace_ELBO(num_particles=DRAWS)

    @jax.jit
    def advance(state, num_steps):
        return jax.lax.fori_loop(0, num_steps, lambda _, state: svi.update(state, *data)[0], state)

    @jax.jit
    def elbo(state):
        return -loss.loss(jax.random.key(0), svi.get_params(state), model, guide, *data)

    jax.block_until_ready(advance(state, 0))
    seconds = 0.0
    for before, mark in zip([0, *marks], marks, strict=False):
        start = time.perf_counter()
        state = jax.block_until_ready(advance(state, mark - before))
        seconds += time.perf_counter() - start
        yield seconds, float(elbo(state))


def pyro_elbos(name: str, rate: float | None, marks: list[int], seed: int) -> Iterator[tuple[float, float]]:
    """The same in Pyro."""
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    from pyro_blr import BLR

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, data = models(pyro, torch)[name]
    data, guide = tuple(map(torch.as_tensor, data)), AutoNormal(model)
    svi = SVI(model, guide, BLR() if rate is None else pyro.optim.Adam({"lr": rate}), Trace_ELBO())
    loss = Trace_ELBO(num_particles=DRAWS)

    def elbo():
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            return -loss.loss(model, guide, *data)

    seconds = 0.0
    for before, mark in zip([0, *marks], marks, strict=False):
        start = time.perf_counter()
        for _ in range(mark - before):
            svi.step(*data)
        seconds += time.perf_counter() - start
        yield seconds, elbo()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("numpyro", "pyro"), default="numpyro")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--adam-steps", type=int, default=10000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.host == "numpyro":
        import numpyro

        numpyro.enable_x64()
    else:
        import torch

        torch.set_default_dtype(torch.float64)
    elbos = {"numpyro": numpyro_elbos, "pyro": pyro_elbos}[arguments.host]
    marks = {
        rate: [mark for mark in MARKS if mark < last] + [last]
        for rate, last in ((None, arguments.steps), *((rate, arguments.adam_steps) for rate in RATES))
    }
    columns = sorted({mark for several in marks.values() for mark in several})
    records: list[dict[str, Any]] = []
    print("| data | | " + " | ".join(f"{mark:,} steps" for mark in columns) + " | s |")
    print("|---|---|" + "---:|" * (len(columns) + 1))
    for name in arguments.models:
        runs = {
            rate: [list(elbos(name, rate, several, seed)) for seed in range(arguments.seeds)]
            for rate, several in marks.items()
        }
        best = max(value for several in runs.values() for run in several for _, value in run)
        short = {
            rate: [
                best - statistics.median(found)
                for found in zip(*([value for _, value in run] for run in several), strict=True)
            ]
            for rate, several in runs.items()
        }
        seconds = {rate: statistics.median(run[-1][0] for run in several) for rate, several in runs.items()}
        lowest = [min(gaps) for gaps in zip(*(short[rate] for rate in RATES), strict=True)]
        taken = statistics.median(seconds[rate] for rate in RATES)
        rows = (("`BLR()`", marks[None], short[None], seconds[None]), ("Adam", marks[RATES[0]], lowest, taken))
        for method, several, gaps, time_taken in rows:
            gap = dict(zip(several, gaps, strict=True))
            cells = (f"{gap[mark]:,.2f}" if mark in gap else "" for mark in columns)
            print(f"| {name} | {method} | " + " | ".join(cells) + f" | {time_taken:.2g} |", flush=True)
        records += [
            {"data": name, "rate": rate, "marks": marks[rate], "short": short[rate], "s": seconds[rate], "best": best}
            for rate in runs
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
