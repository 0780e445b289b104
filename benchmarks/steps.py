"""What one step costs: BLR against the host's Adam, the same stock guide, the same stock SVI, in one run.

    python benchmarks/steps.py [--host numpyro|pyro|both] [--rounds 9] [--json FILE]

The optimizers take turns within each round, and a ratio is taken within a round, so that the drift of a shared
machine cancels; the table shows the median over rounds with its quartiles. Compilation is not counted. `gradient` uses
one stock gradient a step, as Adam does; the default takes Hessians at two to eight draws and uses them again, which it
wins back in steps (`make demo`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from _models_timed import REGRESSIONS, regressions

STEPS = {"numpyro": 200, "pyro": 20}
LABELS = ("Adam", "BLR(0.1, estimator='gradient')", "BLR(estimator='hutchinson')", "BLR()")


def numpyro_runs(name: str) -> dict[str, Callable[[], None]]:
    """Compiled loops of STEPS updates of a regression, by optimizer."""
    import jax
    import jax.numpy as jnp
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    from numpyro_blr import BLR

    optimizers = {
        "Adam": numpyro.optim.Adam(0.01),
        LABELS[1]: BLR(0.1, estimator="gradient"),
        LABELS[2]: BLR(estimator="hutchinson"),
        LABELS[3]: BLR(),
    }
    model, args = regressions(numpyro, jnp)[name]
    x, y = map(jnp.asarray, args)
    runs = {}
    for label, optimizer in optimizers.items():
        svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO())
        state = svi.init(jax.random.key(0), x, y)

        @jax.jit
        def loop(state, svi=svi):
            return jax.lax.scan(lambda state, _: svi.update(state, x, y), state, length=STEPS["numpyro"])

        jax.block_until_ready(loop(state))
        runs[label] = lambda loop=loop, state=state: jax.block_until_ready(loop(state))
    return runs


def pyro_runs(name: str) -> dict[str, Callable[[], None]]:
    """Loops of STEPS calls of `svi.step` on a regression, by optimizer, each with a parameter store of its own."""
    import pyro
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    from pyro_blr import BLR

    torch.set_num_threads(1)

    optimizers = {
        "Adam": pyro.optim.Adam({"lr": 0.01}),
        LABELS[1]: BLR(0.1, estimator="gradient"),
        LABELS[2]: BLR(estimator="hutchinson"),
        LABELS[3]: BLR(),
    }
    model, args = regressions(pyro, torch)[name]
    x, y = (torch.as_tensor(values, dtype=torch.get_default_dtype()) for values in args)
    runs = {}
    for label, optimizer in optimizers.items():
        store = {"params": {}, "constraints": {}}
        svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO())

        def loop(svi=svi, store=store):
            with pyro.get_param_store().scope(store):
                for _ in range(STEPS["pyro"]):
                    svi.step(x, y)

        loop()
        runs[label] = loop
    return runs


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round."""
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[label].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("numpyro", "pyro", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of interleaved runs (default 9)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    hosts = ["numpyro", "pyro"] if arguments.host == "both" else [arguments.host]
    figures = []
    print(f"{'host':8} {'model':22} {'optimizer':32} {'ms a step':>10} {'/ Adam':>8}  quartiles")
    for host in hosts:
        if importlib.util.find_spec(host) is None:
            print(f"{host:8} not installed")
            continue
        for name in REGRESSIONS:
            runs = {"numpyro": numpyro_runs, "pyro": pyro_runs}[host](name)
            seconds = interleaved(runs, arguments.rounds)
            for label, values in seconds.items():
                ratios = [value / adam for value, adam in zip(values, seconds["Adam"], strict=True)]
                low, ratio, high = statistics.quantiles(ratios, n=4)
                milliseconds = 1e3 * statistics.median(values) / STEPS[host]
                print(f"{host:8} {name:22} {label:32} {milliseconds:10.3f} {ratio:8.2f}  {low:.2f} to {high:.2f}")
                figures.append({"host": host, "model": name, "optimizer": label, "ms": milliseconds, "ratio": ratio})
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
