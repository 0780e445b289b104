"""What `reference.py` prints, draws and saves of its fits: a Markdown table with aggregates, a figure, JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _fits import Fit
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

__all__ = ["Comparison", "aggregates", "compare", "draw", "record", "table"]

COARSE, FINE, SAME = 1.0, 0.1, 0.05  # nats: the tolerances of the table, and of "fits within"
OWN = "BLR()"
COLORS = {
    "BLR()": "#1f5fa8",
    "Adam": "#c44e52",
    "ClippedAdam": "#dd8452",
    "GSM": "#55a868",
    "BaM": "#8172b3",
}
LINE_STYLES = {"numpyro": "-", "pyro": (0, (4, 1.5))}
NAMES = {"numpyro": "NumPyro", "pyro": "Pyro"}

Measure = Callable[[Fit, float, float], float]
MEASURES: dict[str, tuple[Measure, Callable[[Fit], float]]] = {
    "steps": (Fit.steps_to, lambda fit: float(fit.steps[-1])),
    "gradient evaluations": (Fit.evaluations_to, lambda fit: float(fit.evaluations[:, -1].max())),
    "seconds": (Fit.seconds_to, lambda fit: float(fit.seconds[-1])),
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """All settings of one method on one host, for a posterior and a guide.

    Attributes:
        best: ELBO that any method has had here, on any host.
        chosen: the setting with the fewest gradients to 0.1 nat, or, where none comes there, the smallest final gap.
    """

    settings: list[Fit]
    best: float
    chosen: Fit


def compare(fits: Iterable[Fit]) -> list[Comparison]:
    groups: dict[tuple[str, str], dict[tuple[str, str], list[Fit]]] = {}
    for fit in fits:
        here = groups.setdefault((fit.posterior, fit.guide), {})
        here.setdefault((fit.host, fit.method), []).append(fit)
    found = []
    for methods in groups.values():
        best = max(float(fit.elbos.max()) for settings in methods.values() for fit in settings)
        for settings in methods.values():
            chosen = min(settings, key=lambda fit: (fit.evaluations_to(best, FINE), fit.final_gap(best)))
            found.append(Comparison(settings, best, chosen))
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    header = [
        "posterior",
        "guide",
        "host",
        "method",
        "steps to 0.1 nat",
        "gradients to 1 nat",
        "gradients to 0.1 nat",
        "s to 1 nat",
        "s to 0.1 nat",
        "with compilation",
        "final gap",
        "seeds within 0.05",
        "mean error / sd",
        "log sd ratio",
    ]
    lines = [_row(header), _row(["---"] * 4 + ["---:"] * (len(header) - 4))]
    for comparison in comparisons:
        fit, best = comparison.chosen, comparison.best
        lines.append(
            _row(
                [
                    fit.posterior,
                    fit.guide,
                    NAMES[fit.host],
                    str(fit.setting),
                    _count(fit.steps_to(best, FINE)),
                    _count(fit.evaluations_to(best, COARSE)),
                    _count(fit.evaluations_to(best, FINE)),
                    _figures(fit.seconds_to(best, COARSE)),
                    _figures(fit.seconds_to(best, FINE)),
                    _figures(fit.seconds_to(best, FINE, start_up=True)),
                    _gap(fit.final_gap(best)),
                    f"{(fit.gaps(best)[:, -1] <= SAME).sum()} of {len(fit.elbos)}",
                    _figures(statistics.median(fit.mean_errors)),
                    _figures(statistics.median(fit.sd_errors)),
                ]
            )
        )
    return "\n".join(lines)


def aggregates(comparisons: Sequence[Comparison]) -> list[str]:
    """Sentences, by host and guide."""
    lines = []
    kinds = dict.fromkeys((comparison.chosen.host, comparison.chosen.guide) for comparison in comparisons)
    for host, guide in kinds:
        here = [c for c in comparisons if (c.chosen.host, c.chosen.guide) == (host, guide)]
        methods = {method: {c.chosen.posterior: c for c in here if c.chosen.method == method} for method in COLORS}
        own = methods.pop(OWN)
        if not own:
            continue
        prefix = f"{NAMES[host]}, {guide}"
        for method, others in methods.items():
            shared = [name for name in own if name in others]
            if shared:
                pairs = [(others[name], own[name]) for name in shared]
                lines.append(f"{prefix}, {method} / {OWN} to {FINE} nat: {_ratios(pairs)}.")
        gaps = [gap for comparison in own.values() for gap in comparison.chosen.gaps(comparison.best)[:, -1]]
        near = sum(gap <= SAME for gap in gaps)
        lines.append(f"{prefix}: {near} of {len(gaps)} fits of {OWN} end within {SAME} nat of the best ELBO.")
    return lines


def draw(comparisons: Sequence[Comparison]) -> Figure:
    """A row for each posterior, a column for each guide: the gap against gradients, the median seed and the range."""
    posteriors = list(dict.fromkeys(comparison.chosen.posterior for comparison in comparisons))
    guides = list(dict.fromkeys(comparison.chosen.guide for comparison in comparisons))
    result = Figure(figsize=(6 * len(guides), 2.4 * len(posteriors) + 0.8), layout="constrained")
    axes = result.subplots(len(posteriors), len(guides), squeeze=False)
    for row, posterior in zip(axes, posteriors, strict=True):
        for axis, guide in zip(row, guides, strict=True):
            axis.set_title(f"{posterior}, {guide}", fontsize=10)
            axis.axhline(FINE, color="0.5", linestyle=":", linewidth=1)
            for comparison in comparisons:
                if (comparison.chosen.posterior, comparison.chosen.guide) == (posterior, guide):
                    _draw_path(axis, comparison)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylim(bottom=1e-3)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("gap to the best ELBO (nat)")
    for axis in axes[-1]:
        axis.set_xlabel("gradient evaluations")
    keys = dict.fromkeys((comparison.chosen.method, comparison.chosen.host) for comparison in comparisons)
    handles = [
        Line2D([], [], color=COLORS[method], linestyle=LINE_STYLES[host], label=f"{method}, {NAMES[host]}")
        for method, host in keys
    ]
    result.legend(handles=handles, loc="outside lower center", ncols=2 * len(guides), frameon=False, fontsize=9)
    return result


def record(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """For JSON: figures of every setting, and of the best one the ELBOs along the way."""
    return [
        {
            "posterior": comparison.chosen.posterior,
            "dimension": comparison.chosen.dimension,
            "guide": comparison.chosen.guide,
            "host": comparison.chosen.host,
            "method": comparison.chosen.method,
            "best_elbo": comparison.best,
            "chosen": comparison.chosen.setting.label,
            "curve": {
                "steps": comparison.chosen.steps.tolist(),
                "gradient_evaluations": comparison.chosen.evaluations.tolist(),
                "elbos": [[_finite(elbo) for elbo in row] for row in comparison.chosen.elbos],
            },
            "settings": {fit.setting.label: _record_setting(fit, comparison.best) for fit in comparison.settings},
        }
        for comparison in comparisons
    ]


def _record_setting(fit: Fit, best: float) -> dict[str, Any]:
    """Medians over the seeds; null where most seeds do not come so close."""
    figures: dict[str, Any] = {
        "steps": int(fit.steps[-1]),
        "gradient_evaluations": float(np.median(fit.evaluations[:, -1])),
        "seconds": float(fit.seconds[-1]),
        "start_up_seconds": fit.start_up_seconds,
        "final_gaps": [_finite(gap) for gap in fit.gaps(best)[:, -1]],
        "mean_errors": [_finite(error) for error in fit.mean_errors],
        "log_sd_errors": [_finite(error) for error in fit.sd_errors],
    }
    for tolerance in (COARSE, FINE):
        for name, (measure, _) in MEASURES.items():
            figures[f"{name.replace(' ', '_')}_to_{tolerance:g}"] = _finite(measure(fit, best, tolerance))
    return figures


def _ratios(pairs: Sequence[tuple[Comparison, Comparison]]) -> str:
    """Medians of the ratios over the posteriors on which one of the two comes within the tolerance.

    Where the other method does not, the smallest budget of its settings bounds the ratio from below: each of them
    needs more than its own. Where BLR does not, the ratio counts as 0.
    """
    parts = []
    for name, (measure, budget) in MEASURES.items():
        values, bounds = [], []
        for other, own in pairs:
            needed = measure(other.chosen, other.best, FINE)
            taken = measure(own.chosen, own.best, FINE)
            bounded = math.isinf(needed)
            if bounded and math.isinf(taken):
                continue
            spent = min(map(budget, other.settings)) if bounded else needed
            values.append(spent / taken if taken > 0 else math.inf)  # 0 where the start is within the tolerance
            bounds.append(bounded)
        if not values:
            return "neither comes there"
        median = statistics.median(values)
        sign = ">" if any(bound and value <= median for value, bound in zip(values, bounds, strict=True)) else ""
        more = sum(value < 1 and not bound for value, bound in zip(values, bounds, strict=True))
        parts.append(f"{name} {sign}{_figures(median)} (BLR needs more on {more})")
    never = sum(math.isinf(own.chosen.evaluations_to(own.best, FINE)) for _, own in pairs)
    unreached = sum(math.isinf(other.chosen.evaluations_to(other.best, FINE)) for other, _ in pairs)
    total = len(pairs)
    return f"median {', '.join(parts)}; not reached on {unreached} of {total}, by BLR on {never}"


def _draw_path(axis: Any, comparison: Comparison) -> None:
    fit = comparison.chosen
    gaps = np.maximum(fit.gaps(comparison.best), 1e-3)
    gaps = np.where(np.isfinite(gaps), gaps, np.nan)
    x = np.maximum(np.median(fit.evaluations, axis=0), 1)
    usable = np.isfinite(gaps).all(0)
    style = {"color": COLORS[fit.method], "linestyle": LINE_STYLES[fit.host]}
    axis.plot(x[usable], np.median(gaps, axis=0)[usable], linewidth=1.6, **style)
    axis.fill_between(
        x[usable], gaps.min(0)[usable], gaps.max(0)[usable], color=COLORS[fit.method], alpha=0.15, linewidth=0
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _count(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def _figures(value: float) -> str:
    """Two or three significant figures."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _gap(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
