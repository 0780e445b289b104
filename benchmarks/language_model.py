"""A Bayesian transformer against the plain one: step time, memory, and loss after equal steps, in one run.

    python benchmarks/language_model.py [--size tiny] [--host numpyro|pyro|both] [--device cpu|cuda] [--json FILE]

The transformer is that of `examples/transformer_lm.py`. The methods take turns at every step, and a ratio is that of
two steps of the same round, so that the drift of a shared machine cancels; the median over rounds is shown. Memory is
measured in a process for each method: the peak over a few steps, beyond what the process had before it made a network,
in copies of the weights. `--train STEPS` adds losses and calibration errors after that many steps of each.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from _evaluation import Calibration, predict
from _text import Corpus, read, windows
from _transformer import SIZES, Config, layout

HOSTS = {"numpyro": ("jax", "numpyro"), "pyro": ("torch", "pyro", "ivon")}
LEARNING_RATES = {"AdamW": 5e-3, "IVON": 0.05, "ivon-opt": 0.1, "AutoNormal and Adam": 5e-3}
WARM_UP = 3
RESET_PEAK = "5"  # what Linux takes in clear_refs to forget the peak of resident memory


def configure(options: argparse.Namespace, corpus: Corpus, host: str, method: str, steps: int) -> Config:
    size = SIZES[options.size]
    return Config(
        host=host,
        layers=size.layers,
        heads=size.heads,
        width=size.width,
        vocabulary=corpus.tokenizer.vocabulary,
        context=options.context,
        positions="learned",
        tie=False,
        optimizer=method,
        learning_rate=(options.learning_rates or {}).get(method, LEARNING_RATES[method]),
        warmup=0.05,
        steps=steps,
        accumulate=1,
        batch=options.batch,
        num_data=len(corpus.training),
        text_digest="",
        dtype=options.dtype,
        device=options.device,
        seed=options.seed,
    )


def ready(loss: Any) -> float:
    """The loss as a number, which waits for the step."""
    return float(loss)


def step(run: Any, corpus: Corpus, config: Config, number: int) -> None:
    ready(run.step(*corpus.batch((1, config.batch), config.context, config.seed, number)))


def time_steps(options: argparse.Namespace, corpus: Corpus, host: str) -> dict[str, list[float]]:
    """Seconds of each method's steps, in turns."""
    methods = importlib.import_module(f"_language_{host}").METHODS
    configs = {name: configure(options, corpus, host, name, options.rounds + WARM_UP) for name in methods}
    runs = {name: method(configs[name]) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + WARM_UP):
        for name, run in runs.items():
            start = time.perf_counter()
            step(run, corpus, configs[name], number)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def resident(field: str) -> int:
    """Bytes of resident memory of this process: `VmRSS` now, or `VmHWM` at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure_memory(options: argparse.Namespace, corpus: Corpus, host: str, method: str) -> dict[str, float]:
    """Peak and persistent bytes of one method, in a process that does nothing else."""
    module = importlib.import_module(f"_language_{host}")
    config = configure(options, corpus, host, method, 8)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what reading the text took, and the allocator keeps, would hide as much
    before = resident("VmRSS")
    run = module.METHODS[method](config)
    for number in range(WARM_UP):
        step(run, corpus, config, number)
    ctypes.CDLL(None).malloc_trim(0)  # what compiling took, and the allocator keeps, is not the steps'
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    for number in range(WARM_UP, WARM_UP + 3):
        step(run, corpus, config, number)
    peak = run.peak_memory() or resident("VmHWM") - before
    return {"peak": peak, "persistent": module.persistent_bytes()}


def train(options: argparse.Namespace, corpus: Corpus, host: str, method: str) -> dict[str, float]:
    """Loss and calibration on the validation text, at the mean of the weights and averaged over draws."""
    config = configure(options, corpus, host, method, options.train)
    run = importlib.import_module(f"_language_{host}").METHODS[method](config)
    for number in range(options.train):
        step(run, corpus, config, number)
    result = {}
    for name, draws in {"mean": [None], "averaged": list(range(8)) if run.has_draws else [None]}.items():
        batches = windows(corpus.validation, config.batch, config.context, options.evaluation_tokens)
        prediction = predict(run, batches, draws)
        result |= {f"loss_{name}": prediction.loss, f"calibration_{name}": Calibration.of(prediction).error}
    return result


def in_process(options: argparse.Namespace, host: str, work: str, method: str = "") -> dict[str, Any]:
    """What `work` finds, in a process of its own: one framework, and nothing left over from another method."""
    command = [sys.executable, __file__, *sys.argv[1:], "--host", host, "--work", work, "--method", method]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, host: str, num_parameters: int) -> list[dict[str, Any]]:
    seconds = in_process(options, host, "time")
    plain = seconds["AdamW"]
    rows = []
    for method, times in seconds.items():
        memory = in_process(options, host, "memory", method)
        ratios = [own / other for own, other in zip(times, plain, strict=True)]
        row = {"host": host, "method": method, "step_seconds": statistics.median(times)}
        row |= {"ratio": statistics.median(ratios), "tokens_per_second": options.batch * options.context}
        row["tokens_per_second"] /= row["step_seconds"]
        row |= {f"{name}_copies": value / (4 * num_parameters) for name, value in memory.items()}
        if options.train:
            row |= in_process(options, host, "train", method)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--host", choices=[*HOSTS, "both"], default="both")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of matrix products")
    parser.add_argument("--text", type=Path, help="default: the sources of Python's library")
    parser.add_argument("--limit", type=int, default=2_000_000, help="characters to read at most")
    parser.add_argument("--tokens", choices=["character", "bpe"], default="character")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS")
    parser.add_argument("--learning-rates", type=json.loads, help='by method, as JSON: {"AdamW": 0.002}')
    parser.add_argument("--evaluation-tokens", type=int, default=65_536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", choices=["time", "memory", "train"], help=argparse.SUPPRESS)
    parser.add_argument("--method", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()

    corpus = Corpus.of(read(options.text, options.limit), options.tokens, SIZES[options.size].vocabulary)
    if options.work:
        if options.work == "time":
            found: Any = time_steps(options, corpus, options.host)
        else:
            work = {"memory": measure_memory, "train": train}[options.work]
            found = work(options, corpus, options.host, options.method)
        print(json.dumps(found))
        return
    hosts = list(HOSTS) if options.host == "both" else [options.host]
    installed = [host for host in hosts if all(map(importlib.util.find_spec, HOSTS[host]))]
    if not installed:
        sys.exit(f"{options.host}: needs {HOSTS.get(options.host, HOSTS)}; pip install -e '.[examples,benchmarks]'.")
    example = configure(options, corpus, installed[0], "AdamW", 1)
    num_parameters = sum(int(np.prod(weight.shape)) for weight in layout(example))
    print(f"{options.size}, {num_parameters:,} weights, {options.batch} × {options.context} tokens, {options.device}\n")
    rows = [row for host in installed for row in measure(options, host, num_parameters)]
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"parameters": num_parameters, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
