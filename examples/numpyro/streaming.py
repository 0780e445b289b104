"""Can a posterior be put together, and taken apart again, without another look at the data?

Bayes' rule adds natural parameters: λ = λ_prior + Σ_i λ_i, one summand for each patient. So a fit can take its data in
batches (yesterday's posterior is today's prior), be merged from fits of parts of the data, forget a batch, and tell
what it would have been without any one patient: by sums and differences, which are held here against new fits.
For a linear regression (the area of a tumour's cell nuclei) all four are exact. For a logistic regression (is it
malignant?) λ_i is the conjugate stand-in for a patient's likelihood at the posterior. What such sums miss is a few
hundredths of a posterior standard deviation, a quarter of one for the merged parts, none of which saw the posterior of
all. Prints a table of the errors and draws `streaming.png`.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from matplotlib.figure import Figure
from numpyro.infer import SVI, Trace_ELBO
from rich.console import Console
from rich.table import Table
from scipy.stats import norm
from sklearn.datasets import load_breast_cancer

from numpyro_blr import BLR, AutoExponentialFamily, merge, site_contributions
from numpyro_blr.families import MultivariateNormalNatural, Natural

numpyro.enable_x64()

COLUMNS = ("mean texture", "mean smoothness", "mean compactness", "mean symmetry")
NUM_BATCHES, BATCH = 4, 142
NUM_STEPS = 40
SIZE = 1 + len(COLUMNS)
PRIOR = MultivariateNormalNatural(linear=jnp.zeros(SIZE), quadratic=-jnp.eye(SIZE) / 2 / 2.0**2)  # deviation 2


def data() -> dict[Callable, tuple[jax.Array, jax.Array]]:
    """For each model a constant and four measurements, standardised, and what they are to tell."""
    table = load_breast_cancer(as_frame=True)
    frame = table.frame.sample(NUM_BATCHES * BATCH, random_state=0)
    x, area = frame[list(COLUMNS)].to_numpy(), np.log(frame["mean area"].to_numpy())
    x, area = (x - x.mean(axis=0)) / x.std(axis=0), (area - area.mean()) / area.std()
    x = jnp.asarray(np.column_stack([np.ones(len(x)), x]))
    return {linear: (x, jnp.asarray(area)), logistic: (x, jnp.asarray(1.0 - frame["target"].to_numpy()))}


def linear(x, y, prior):
    weights = numpyro.sample("weights", prior.to_distribution())
    with numpyro.plate("patients", len(y)):
        numpyro.sample("area", dist.Normal(x @ weights, 0.8), obs=y)


def logistic(x, y, prior):
    weights = numpyro.sample("weights", prior.to_distribution())
    with numpyro.plate("patients", len(y)):
        numpyro.sample("malignant", dist.Bernoulli(logits=x @ weights), obs=y)


# of the means in standard deviations, and of these relatively: some two times what was measured
TOLERANCES = {linear: (1e-8, 1e-8, 1e-8, 1e-8), logistic: (0.15, 0.5, 0.1, 0.07)}


@functools.cache
def start(model: Callable):
    """The stock SVI, its start, which can serve for any part of the data, and a function that takes all the steps."""
    svi = SVI(model, AutoExponentialFamily(model), BLR(), Trace_ELBO())

    @jax.jit
    def steps(state, *args):
        return jax.lax.scan(lambda state, _: svi.update(state, *args), state, length=NUM_STEPS)[0]

    return svi, svi.init(jax.random.key(0), *data()[model], PRIOR), steps


def run(model: Callable, x, y, prior: Natural):
    """The stock SVI and its state after its steps."""
    svi, state, steps = start(model)
    return svi, steps(state, x, y, prior)


def fit(model: Callable, x, y, prior: Natural) -> Natural:
    """The natural parameters of the posterior."""
    svi, state = run(model, x, y, prior)
    return svi.guide.natural(svi.get_params(state))["weights"]


def summands(model: Callable, x, y, prior: Natural) -> Natural:
    """What each patient adds to the natural parameters, the patients in front."""
    svi, state = run(model, x, y, prior)
    return site_contributions(svi, state, x, y, prior, plate="patients")["weights"]["patients"]


def stack(naturals: Sequence[Natural]) -> Natural:
    """One batch of them."""
    return type(naturals[0])(*map(jnp.stack, zip(*(vars(q).values() for q in naturals), strict=True)))


def moments(natural: Natural) -> tuple[np.ndarray, np.ndarray]:
    """The means and the standard deviations of the coefficients."""
    covariance = np.linalg.inv(natural.precision_matrix)
    return np.asarray(natural.loc), np.diagonal(covariance, 0, -2, -1) ** 0.5


def error(natural: Natural, exact: Natural) -> tuple[float, float]:
    """The largest error of a mean, in standard deviations, and the largest relative one of a standard deviation."""
    (loc, scale), (exact_loc, exact_scale) = moments(natural), moments(exact)
    return np.max(np.abs(loc - exact_loc) / exact_scale), np.max(np.abs(scale / exact_scale - 1))


def study(model: Callable, num_refits: int) -> dict[str, tuple[Natural, Natural, Natural]]:
    """By sums and differences, by a new fit, and what one would have without either."""
    x, y = data()[model]
    batches = [(x[start : start + BATCH], y[start : start + BATCH]) for start in range(0, len(y), BATCH)]
    full = fit(model, x, y, PRIOR)
    each = summands(model, x, y, PRIOR)

    streamed = PRIOR
    for batch in batches:
        streamed = fit(model, *batch, streamed)
    parts = [fit(model, *batch, PRIOR) for batch in batches]
    forgotten = full - each[-BATCH:].sum()

    left_out = full - each  # all of them
    influence = np.abs((moments(left_out)[0] - moments(full)[0]) / moments(full)[1]).max(axis=-1)
    order = np.argsort(-influence)
    most, others = num_refits // 2, num_refits - num_refits // 2  # the influential ones, and some of all the rest
    chosen = np.append(order[:most], order[most :: len(y) // others])
    kept = [np.delete(np.arange(len(y)), i) for i in chosen]
    return {
        "batches one after another": (streamed, full, parts[0]),
        "parts merged": (merge(PRIOR, parts), full, parts[0]),
        "a batch forgotten": (forgotten, fit(model, x[:-BATCH], y[:-BATCH], PRIOR), full),
        "a patient left out": (left_out[chosen], stack([fit(model, x[i], y[i], PRIOR) for i in kept]), full),
    }


def draw(studied: dict[str, tuple[Natural, Natural, Natural]]) -> Figure:
    """Patients left out against new fits without them; the posteriors put together and taken apart."""
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    axes = figure.subplots(1, 4)
    left_out, refitted, full = studied["a patient left out"]
    loc, scale = moments(full)
    shifts, exact_shifts = ((moments(q)[0] - loc) / scale for q in (left_out, refitted))
    axes[0].axline((0, 0), slope=1, color="0.8")
    for name, shift, exact in zip(("constant", *COLUMNS), shifts.T, exact_shifts.T, strict=True):
        axes[0].plot(exact, shift, "o", markersize=4, label=name)
    axes[0].set(title="a patient left out: shift of the means", xlabel="new fit (sd)", ylabel="by subtraction (sd)")
    axes[0].legend(frameon=False, fontsize=8)
    for axis, coefficient in zip(axes[1:], (1, 2, 3), strict=True):
        grid = loc[coefficient] + np.linspace(-4, 4, 200) * scale[coefficient]
        lines = {
            "full fit": (full, "0.8", "-"),
            "one after another": (studied["batches one after another"][0], "#1f5fa8", "-"),
            "merged": (studied["parts merged"][0], "#c44e52", "-"),
            "without the last batch, new fit": (studied["a batch forgotten"][1], "0.8", "--"),
            "the last batch forgotten": (studied["a batch forgotten"][0], "#1f5fa8", "--"),
        }
        for label, (natural, color, style) in lines.items():
            density = norm.pdf(grid, *(moment[coefficient] for moment in moments(natural)))
            axis.plot(grid, density, style, color=color, linewidth=5 if color == "0.8" else 1.5, label=label)
        axis.set(title=COLUMNS[coefficient - 1], yticks=[])
    figure.legend(
        *axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, handlelength=4
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--refits", type=int, default=6, help="how many patients to leave out by a new fit as well")
    parser.add_argument("--figure", type=Path, default=Path("streaming.png"), help="where to write the figure")
    arguments = parser.parse_args()

    table = Table(title="errors against a new fit, and of doing nothing (the largest of all coefficients)")
    for column in ("model", "", "mean (sd)", "sd (relative)", "mean, nothing done (sd)"):
        table.add_column(column, justify="left" if column in ("model", "") else "right")
    for model, bounds in TOLERANCES.items():
        studied = study(model, arguments.refits)
        for (name, (natural, exact, nothing)), bound in zip(studied.items(), bounds, strict=True):
            mean_error, scale_error = error(natural, exact)
            before = error(nothing, exact)[0]
            table.add_row(model.__name__, name, f"{mean_error:.1e}", f"{scale_error:.1e}", f"{before:.2f}")
            assert mean_error < bound, (model.__name__, name, mean_error)
            assert scale_error < bound, (model.__name__, name, scale_error)
        table.add_section()
    Console(width=120).print(table)
    draw(studied).savefig(arguments.figure, dpi=150)
    print(f"figure: {arguments.figure}")


if __name__ == "__main__":
    main()
