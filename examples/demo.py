"""Swap Adam for `BLR()` in the stock SVI, on real data: how many steps, how many seconds, and is the answer right?

Three models, each with the hosts' stock mean-field and full-rank guides and the stock one-particle ELBO:

- Longley's regression: six nearly collinear columns in their raw units, posterior known in closed form;
- breast cancer: logistic regression on thirty correlated measurements;
- eight schools: the non-centred hierarchical model.

Adam runs at four rates and is judged at the best of them; `BLR()` runs once, as it comes. Every ELBO of a guide is
computed from the same noise, so that differences are far surer than each value's standard error. Prints a table for
each host and draws `demo.png`: the gap to the best ELBO against steps, and marginals under the full-rank guide
against the exact posterior (closed form or NUTS). Seconds are of steps alone; what NumPyro compiles before them has
its own column.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from _figure import figure
from rich.console import Console
from rich.table import Table

HOSTS = ("numpyro", "pyro")
ADAM_RATES = (0.1, 0.03, 0.01, 0.003)
TOLERANCE = 0.1  # nat

Draws = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Problem:
    """A script present under every host, and the scalars of its posterior that the figure shows."""

    script: str
    title: str
    quantities: dict[str, Callable[[Draws], np.ndarray]]

    def of_interest(self, draws: Draws) -> Draws:
        return {name: quantity(draws) for name, quantity in self.quantities.items()}


PROBLEMS = (
    Problem(
        "longley",
        "Longley",
        {
            "GNP coefficient": lambda z: z["coefficients"][:, 1],
            "population coefficient": lambda z: z["coefficients"][:, 4],
            "year coefficient": lambda z: z["coefficients"][:, 5],
        },
    ),
    Problem(
        "breast_cancer",
        "breast cancer",
        {
            "radius error coefficient": lambda z: z["coefficients"][:, 10],
            "worst texture coefficient": lambda z: z["coefficients"][:, 21],
            "intercept": lambda z: z["intercept"],
        },
    ),
    Problem(
        "eight_schools",
        "eight schools",
        {
            "mean effect mu": lambda z: z["mu"],
            "log spread log(tau)": lambda z: np.log(z["tau"]),
            "effect of school A": lambda z: z["mu"] + z["tau"] * z["theta_raw"][:, 0],
        },
    ),
)


@dataclass(frozen=True)
class Effort:
    """How much of everything to do."""

    problems: Sequence[Problem]
    guides: Sequence[str]
    adam_steps: int
    blr_steps: int
    elbo_draws: int
    marginal_draws: int
    nuts_draws: int


FULL = Effort(
    problems=PROBLEMS,
    guides=("mean field", "full rank"),
    adam_steps=1000,
    blr_steps=100,
    elbo_draws=1000,
    marginal_draws=20_000,
    nuts_draws=2000,
)
TINY = Effort(
    problems=PROBLEMS[:1],
    guides=("full rank",),
    adam_steps=10,
    blr_steps=10,
    elbo_draws=20,
    marginal_draws=100,
    nuts_draws=20,
)


@dataclass(frozen=True)
class Run:
    """One method's way: its ELBO (with standard error) and the seconds spent after each number of `steps`."""

    method: str
    rate: float | None
    steps: np.ndarray
    seconds: np.ndarray
    compile_seconds: float
    elbo: np.ndarray
    standard_error: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Adam and `BLR` on one problem under one guide of one host."""

    host: str
    problem: Problem
    guide: str
    runs: Sequence[Run]
    marginals: Draws

    def gap(self, run: Run) -> np.ndarray:
        """How far `run` is from the best ELBO that any run here has seen."""
        return max(np.nanmax(other.elbo) for other in self.runs) - run.elbo


def load(host: str, script: str) -> ModuleType:
    """Import a neighbour by its path: as a package, the folder `numpyro` would stand in for NumPyro itself."""
    path = Path(__file__).parent / host / f"{script}.py"
    spec = importlib.util.spec_from_file_location(f"{host}_{script}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_record(last: int) -> list[int]:
    """The steps after which to look: each of the first twenty, then a tenth further every time."""
    steps = [0]
    while steps[-1] < last:
        steps.append(min(max(steps[-1] + 1, int(1.1 * steps[-1])), last))
    return steps


def compare(host: str, toolbox: ModuleType, problem: Problem, guide: str, effort: Effort) -> Comparison:
    """Fit the problem both ways, timed, then score every parameter on record with the same noise."""
    example = load(host, problem.script)
    inference = toolbox.Inference(example.model, example.data(), toolbox.GUIDES[guide])

    def elbo(parameters: dict) -> tuple[float, float]:
        log_weights = inference.log_weights(parameters, effort.elbo_draws)
        return log_weights.mean(), log_weights.std() / len(log_weights) ** 0.5

    def run(method: str, rate: float | None, fit: Any, compile_seconds: float) -> Run:
        path = np.array([elbo(parameters) for parameters in fit.parameters])
        return Run(method, rate, np.array(fit.steps), np.array(fit.seconds), compile_seconds, *path.T)

    adam_fits = {rate: inference.fit(on_record(effort.adam_steps), toolbox.adam, rate) for rate in ADAM_RATES}
    rate = max(ADAM_RATES, key=lambda rate: np.nan_to_num(elbo(adam_fits[rate].parameters[-1])[0], nan=-np.inf))
    adam_compile_seconds = max(fit.compile_seconds for fit in adam_fits.values())  # the first rate compiles for all
    blr_fit = inference.fit(on_record(effort.blr_steps), toolbox.BLR)
    return Comparison(
        host=host,
        problem=problem,
        guide=guide,
        runs=[
            run("Adam", rate, adam_fits[rate], adam_compile_seconds),
            run("BLR", None, blr_fit, blr_fit.compile_seconds),
        ],
        marginals=problem.of_interest(inference.draw(blr_fit.parameters[-1], effort.marginal_draws)),
    )


def reference(toolboxes: dict[str, ModuleType], problem: Problem, effort: Effort) -> Draws:
    """Draws from the exact posterior: closed form where the example has one, else NUTS, else none."""
    host, *_ = toolboxes
    example = load(host, problem.script)
    if hasattr(example, "exact_posterior"):
        loc, covariance = map(np.asarray, example.exact_posterior(*example.data()))
        z = np.random.default_rng(0).multivariate_normal(loc, covariance, effort.marginal_draws)
        return problem.of_interest({"coefficients": z[:, :-1], "intercept": z[:, -1]})
    if hasattr(toolboxes[host], "nuts"):
        draws = toolboxes[host].nuts(example.model, example.data(), effort.nuts_draws // 2, effort.nuts_draws)
        return problem.of_interest(draws)
    return {}


def table(name: str, comparisons: Sequence[Comparison]) -> Table:
    """A row for each method; arrival is the first step on record that comes within the tolerance of the best ELBO."""
    result = Table(title=f"{name}: BLR() against Adam at its best of the rates {', '.join(map(str, ADAM_RATES))}")
    for column in ("model", "guide", "optimizer"):
        result.add_column(f"\n{column}", no_wrap=True)
    near = f"{TOLERANCE} nat"
    for column in (
        "\nsteps",
        "\nELBO",
        "gap\n(nat)",
        f"steps to\n{near}",
        f"seconds to\n{near}",
        "seconds to\ncompile",
    ):
        result.add_column(column, justify="right", no_wrap=True)
    for comparison in comparisons:
        for run in comparison.runs:
            gap = comparison.gap(run)
            arrival = next(iter(np.flatnonzero(gap < TOLERANCE)), None)
            result.add_row(
                comparison.problem.title,
                comparison.guide,
                run.method if run.rate is None else f"{run.method} {run.rate}",
                str(run.steps[-1]),
                f"{run.elbo[-1]:.2f} ± {run.standard_error[-1]:.2f}",
                f"{gap[-1]:.2f}",
                "-" if arrival is None else f"{run.steps[arrival]}",
                "-" if arrival is None else f"{run.seconds[arrival]:.3f}",
                f"{run.compile_seconds:.1f}",
                style="bold" if run.method == "BLR" else None,
                end_section=run is comparison.runs[-1],
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", choices=[*HOSTS, "both"], default="both")
    parser.add_argument("--tiny", action="store_true", help="a few steps of one model, to see that everything runs")
    parser.add_argument("--figure", type=Path, default=Path("demo.png"), help="where to write the figure")
    arguments = parser.parse_args()
    effort = TINY if arguments.tiny else FULL
    console = Console(width=max(Console().width, 120))  # the table's own width, also where output goes to a file

    toolboxes = {}
    for host in HOSTS if arguments.host == "both" else [arguments.host]:
        try:
            toolboxes[host] = load(host, "_comparison")
        except ModuleNotFoundError as error:
            console.print(f"{host} is left out: {error}")
    if not toolboxes:
        sys.exit("No host to run: install NumPyro or Pyro, and this project for it.")

    comparisons = []
    for host, toolbox in toolboxes.items():
        for problem in effort.problems:
            for guide in effort.guides:
                with console.status(f"{toolbox.NAME}: {problem.title}, {guide}"):
                    comparisons.append(compare(host, toolbox, problem, guide, effort))
        console.print(table(toolbox.NAME, [c for c in comparisons if c.host == host]))

    with console.status("the exact posteriors"):
        references = {problem: reference(toolboxes, problem, effort) for problem in effort.problems}
    names = {host: toolbox.NAME for host, toolbox in toolboxes.items()}
    figure(comparisons, references, names, effort.guides, TOLERANCE).savefig(arguments.figure, dpi=150)
    console.print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
