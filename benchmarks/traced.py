"""What one step costs in Pyro once the loss is traced: BLR on Pyro's handlers and on a graph, against the host's Adam.

    python benchmarks/traced.py [--rounds 9] [--inductor] [--json FILE]

All take the same stock AutoNormal under the same loss, in turns within each round; a ratio is taken within a round, so
that the drift of a shared machine cancels, and the table shows the median over rounds with its quartiles. Tracing and
compilation are not counted; their seconds are printed beside. A traced step is `optimizer.advance(svi, ...)`, which
leaves out the host's own evaluation of the loss; every other is `svi.step`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from _models_timed import hierarchy, regressions
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from steps import interleaved

from pyro_blr import BLR

STEPS = 8
WARM_UP = 9  # a graph is checked at its 1st, 2nd, 4th and 8th use, and then not before its 16th


def models() -> dict[str, tuple[Callable, tuple[torch.Tensor, ...]]]:
    return {
        name: (model, tuple(map(as_tensor, args)))
        for name, (model, args) in (regressions(pyro, torch) | hierarchy(pyro)).items()
    }


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """In the default precision, but for integers."""
    return torch.as_tensor(values, dtype=torch.get_default_dtype() if values.dtype.kind == "f" else None)


def optimizers(inductor: bool) -> dict[str, tuple[Any, bool | str]]:
    """By label: the optimizer, and its `compile`."""
    choices: dict[str, tuple[Any, bool | str]] = {
        "Adam": (pyro.optim.Adam({"lr": 0.01}), False),
        "gradient": (BLR(0.1, estimator="gradient"), False),
        "gradient, traced": (BLR(0.1, estimator="gradient"), True),
        "default": (BLR(), False),
        "default, traced": (BLR(), True),
    }
    if inductor:
        choices["gradient, inductor"] = BLR(0.1, estimator="gradient"), "inductor"
        choices["default, inductor"] = BLR(), "inductor"
    return choices


def runs(model: Callable, args: tuple[torch.Tensor, ...], inductor: bool) -> dict[str, Callable[[], None]]:
    """Loops of STEPS steps by optimizer, each with a parameter store of its own."""
    loops = {}
    for label, (optimizer, compile) in optimizers(inductor).items():
        store: dict[str, dict] = {"params": {}, "constraints": {}}
        svi = SVI(model, AutoNormal(model), optimizer, Trace_ELBO())
        if compile:
            optimizer.compile = compile

        def loop(num_steps: int = STEPS, svi=svi, store=store, traced=bool(compile)):
            with pyro.get_param_store().scope(store):
                for _ in range(num_steps):
                    svi.optim.advance(svi, *args) if traced else svi.step(*args)

        start = time.perf_counter()
        try:
            loop(WARM_UP)
        except Exception as error:  # inductor needs a C++ compiler that works
            print(f"{label}: left out, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        print(f"{label}: {time.perf_counter() - start:.1f} s for the first {WARM_UP} steps")
        loops[label] = loop
    return loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of interleaved runs (default 9)")
    parser.add_argument("--inductor", action="store_true", help="also compile the graphs, which takes minutes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    for name, (model, args) in models().items():
        print(f"\n{name}")
        seconds = interleaved(runs(model, args, arguments.inductor), arguments.rounds)
        print(f"{'optimizer':20} {'ms a step':>10} {'/ Adam':>8}  quartiles")
        for label, values in seconds.items():
            ratios = [value / adam for value, adam in zip(values, seconds["Adam"], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4)
            milliseconds = 1e3 * statistics.median(values) / STEPS
            print(f"{label:20} {milliseconds:10.3f} {ratio:8.2f}  {low:.2f} to {high:.2f}")
            figures.append(
                {"model": name, "optimizer": label, "ms": milliseconds, "ratio": ratio, "quartiles": [low, high]}
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
