"""Ten posteriors with reference draws: `BLR()` as it comes, tuned Adam, and score matching, from the same start.

    python benchmarks/reference.py --data DIR [--host numpyro|pyro|both] [--posteriors NAME ...]
        [--guides "mean field" "full rank"] [--methods NAME ...] [--seeds 5] [--steps 100] [--adam-steps 10000]
        [--pyro-adam-steps 2000] [--keep DIR] [--json FILE] [--markdown FILE] [--figure FILE] [--quick]

DIR has the posteriors as JSON files (`_posteriors.py`). A pair of a posterior and a guide takes minutes: with `--keep`
its fits are left in that folder, and a run that was stopped goes on from there.

The methods, all in float64, each seed from the stock guide's own start, uniform in (−2, 2) in the unconstrained space
with scale 0.1:

- `BLR()`: in the stock SVI, with AutoNormal (mean field) or AutoMultivariateNormal (full rank) and Trace_ELBO.
- `Adam`, `ClippedAdam`: the host's, the same otherwise, at the rates 0.1, 0.03, 0.01 and 0.003 with 1 and with 10
  particles. In Pyro, where a step costs milliseconds: fewer steps, a tenth of them with 10 particles, and one seed.
- `GSM`: Gaussian score matching by the update of the package `gsmvi`, 2, 8 or 32 draws a step. NumPyro, full rank.
- `BaM`: batch and match, 8 or 32 draws a step, λ = B D and λ = B D/(t + 1). NumPyro, full rank. Both kinds of score
  matching take as many gradients as Adam has steps.

Of several settings the table has the one that takes the fewest gradients to 0.1 nat, or else ends nearest. Figures are
medians over the seeds, of the first time that a run comes there, though it may leave again; "–" stands where most seeds
do not. A gap is to the best ELBO that any method had at any checkpoint for that posterior and guide. All ELBOs of a
guide use the same antithetic draws. Every step of BLR is a checkpoint; the others have about 80 (30 in Pyro), evenly
apart in their logarithm, so that theirs round up by a tenth or so. A gradient evaluation is one gradient of log p: a
Hessian in D dimensions counts D, a Hessian-vector product 2.

Seconds are those of one run by itself, compiled; "with compilation" adds tracing and compiling, in Pyro what the first
step took longer. The last two columns are the largest error of a posterior mean in its standard deviations and of a log
standard deviation, of the final fit on the constrained scale against the reference; a mean-field fit cannot have small
ones on a correlated posterior.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import _posteriors
import _report
from _fits import GUIDES, Budget, Fit
from _posteriors import Posterior
from rich.console import Console
from rich.markdown import Markdown

HOSTS = ("numpyro", "pyro")
METHODS = ("BLR()", "Adam", "ClippedAdam", "GSM", "BaM")


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    hosts = HOSTS if options.host == "both" else (options.host,)
    posteriors = _posteriors.load(options.data)
    names = [posterior.name for posterior in posteriors]
    if unknown := set(options.posteriors or ()) - set(names):
        parser.error(f"no posterior {', '.join(sorted(unknown))} in {options.data}, which has {', '.join(names)}")
    if missing := [host for host in hosts if importlib.util.find_spec(host) is None]:
        parser.error(f"{missing[0]} is not installed: choose the other with --host, or `pip install '.[{missing[0]}]'`")
    if "numpyro" in hosts and "GSM" in options.methods:
        from _score_matching import require_gsm

        require_gsm()

    console = Console()
    fits = []
    for posterior in posteriors:
        if options.posteriors and posterior.name not in options.posteriors:
            continue
        for guide in options.guides:
            for host in hosts:
                with console.status("") as status:
                    for fit in fits_of(posterior, guide, host, options):
                        fits.append(fit)
                        status.update(f"{posterior.name}, {guide}, {host}: {fit.setting}")

    comparisons = _report.compare(fits)
    text = "\n\n".join([conditions(options, hosts), _report.table(comparisons), *_report.aggregates(comparisons)])
    console.print(Markdown(text) if console.is_terminal else text, soft_wrap=not console.is_terminal, markup=False)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        options.json.write_text(json.dumps(_report.record(comparisons), indent=1))
    if options.figure:
        _report.draw(comparisons).savefig(options.figure, dpi=120)


def fits_of(posterior: Posterior, guide: str, host: str, options: argparse.Namespace) -> Iterator[Fit]:
    """Of every method, one after the other; with `--keep` those that an earlier run of the same kind has left.

    Raises:
        ValueError: what is kept is of other methods or of another budget.
    """
    wanted = (tuple(options.methods), budget(options, host))
    file = options.keep and options.keep / f"{posterior.name}, {guide}, {host}.pickle"
    if file and file.exists():
        made, fits = pickle.loads(file.read_bytes())
        if made != wanted:
            raise ValueError(f"{file} has the fits of {made}, wanted are those of {wanted}: name another --keep")
        yield from fits
        return
    fits = []
    for fit in importlib.import_module(f"_methods_{host}").fits(posterior, guide, options.methods, wanted[1]):
        fits.append(fit)
        yield fit
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps((wanted, fits)))


def budget(options: argparse.Namespace, host: str) -> Budget:
    made = Budget(
        seeds=options.seeds,
        steps=options.steps,
        adam_steps=options.adam_steps,
        adam_seeds=options.seeds,
        evaluations=options.adam_steps,
    )
    if host == "pyro":
        made = replace(made, adam_steps=options.pyro_adam_steps, adam_seeds=1, same_evaluations=True)
    return made.quick() if options.quick else made


def conditions(options: argparse.Namespace, hosts: tuple[str, ...]) -> str:
    """What the figures were measured with."""
    sentences = []
    for host in hosts:
        made = budget(options, host)
        each = f"{made.adam_steps:,} steps" + (" divided by the number of particles" if made.same_evaluations else "")
        rates, particles = (" and ".join(map(str, values)) for values in (made.rates, made.particles))
        sentences.append(
            f"{_report.NAMES[host]}: BLR {made.steps} steps, seeds {made.seeds}; Adam {each} at the rates {rates}, "
            f"number of particles {particles}, seeds {made.adam_seeds}."
        )
    return " ".join(sentences)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the posteriors")
    parser.add_argument("--host", choices=(*HOSTS, "both"), default="both")
    parser.add_argument("--posteriors", nargs="+", help="names (default all)")
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=GUIDES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of BLR")
    parser.add_argument("--adam-steps", type=int, default=10_000, help="in NumPyro, and gradients of score matching")
    parser.add_argument("--pyro-adam-steps", type=int, default=2000, help="in Pyro, with one particle")
    parser.add_argument("--keep", type=Path, help="a folder for the fits of each pair, from which a later run goes on")
    parser.add_argument("--json", type=Path, help="also write the figures, setting by setting, to this file")
    parser.add_argument("--markdown", type=Path, help="also write what is printed to this file")
    parser.add_argument("--figure", type=Path, help="draw the gaps to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps and one rate: a check, no measurement")
    return parser


if __name__ == "__main__":
    main()
