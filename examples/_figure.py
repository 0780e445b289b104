"""The figure of `demo.py`: for each problem the way to the optimum under each guide, and a few marginals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.stats import gaussian_kde

if TYPE_CHECKING:
    from demo import Comparison, Draws, Problem

__all__ = ["figure"]

COLORS = {"Adam": "#c44e52", "BLR": "#1f5fa8"}
LINE_STYLES = {"numpyro": "-", "pyro": (0, (4, 1.5))}
EXACT = "0.82"


def figure(
    comparisons: Sequence[Comparison],
    references: dict[Problem, Draws],
    names: dict[str, str],
    guides: Sequence[str],
    tolerance: float,
) -> Figure:
    """A row for each problem: the gap under each of `guides`, then marginals of the fit under the last of them."""
    result = Figure(figsize=(15, 2.9 * len(references) + 0.6), layout="constrained")
    axes = result.subplots(len(references), len(guides) + 3, squeeze=False)
    for row, (problem, exact) in zip(axes, references.items(), strict=True):
        here = [comparison for comparison in comparisons if comparison.problem is problem]
        for axis, guide in zip(row, guides, strict=False):
            axis.set_title(f"{problem.title}, {guide}", fontsize=10)
            _draw_gaps(axis, [comparison for comparison in here if comparison.guide == guide], tolerance)
        fits = {comparison.host: comparison.marginals for comparison in here if comparison.guide == guides[-1]}
        for axis, quantity in zip(row[len(guides) :], problem.quantities, strict=True):
            axis.set_title(quantity, fontsize=10)
            _draw_marginal(axis, exact.get(quantity), {host: marginals[quantity] for host, marginals in fits.items()})
        row[0].set_ylabel("gap to the best ELBO (nat)")
    for axis in axes[-1, : len(guides)]:
        axis.set_xlabel("steps")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)

    handles = [
        Line2D([], [], color=color, linestyle=LINE_STYLES[host], linewidth=1.8, label=f"{method}, {name}")
        for host, name in names.items()
        for method, color in COLORS.items()
    ]
    handles.append(Line2D([], [], color="0.5", linestyle=":", linewidth=1, label=f"{tolerance} nat"))
    handles.append(Patch(color=EXACT, label="exact posterior (closed form or NUTS)"))
    result.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
    return result


def _draw_gaps(axis: Axes, comparisons: Sequence[Comparison], tolerance: float) -> None:
    floor = tolerance / 10  # below it a gap is Monte Carlo noise, and the best of all is zero
    axis.axhline(tolerance, color="0.5", linewidth=1, linestyle=":")
    for comparison in comparisons:
        for run in comparison.runs:
            gap = np.maximum(comparison.gap(run), floor)
            axis.plot(run.steps, gap, color=COLORS[run.method], linestyle=LINE_STYLES[comparison.host], linewidth=1.8)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_yscale("log")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0.8 * floor)


def _draw_marginal(axis: Axes, exact: np.ndarray | None, fits: Draws) -> None:
    low, high = np.quantile(next(iter(fits.values())) if exact is None else exact, [0.001, 0.999])
    grid = np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 200)
    if exact is not None:
        axis.hist(exact, bins=30, range=(low, high), density=True, color=EXACT)
    for host, draws in fits.items():
        axis.plot(grid, gaussian_kde(draws)(grid), color=COLORS["BLR"], linestyle=LINE_STYLES[host], linewidth=1.8)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
