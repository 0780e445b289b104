"""Sparse Gaussian processes: BLR through the stock SVI, and the natural gradients of GPyTorch with Adam beside them.

    python benchmarks/gaussian_processes.py [--host numpyro|pyro] [--steps 1000] [--json FILE]

Classification of breast cancers (569 × 30) and regression of the progress of diabetes (442 × 10), data of scikit-learn,
with 50 inducing points and whitened inducing values u ~ N(0, I) of a full-rank Gaussian. The likelihood's expectation
over f given u is exact, or by 20 nodes, and is the same for all. The hyperparameters (variance, length, noise) are
constants, or are learned: by BLR as points beside the Gaussian, in GPyTorch by Adam at 0.1 or 0.01 in turn with NGD at
the rates 1, 0.3 and 0.1. Here are the best of these six for each question, in hindsight; BLR() is as it comes.

The ELBO after every step is one NumPy formula of the mean, the covariance and the hyperparameters, outside the time.
"steps" and "seconds" are those to within 1 and 0.1 nat of the best ELBO that any of them had; compilation is not
counted. Needs `pip install '.[benchmarks]'`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import cholesky, solve_triangular

INDUCING, JITTER, NODES = 50, 1e-6, 20
RATES, ADAM_RATES = (1.0, 0.3, 0.1), (0.1, 0.01)
BLR_STEPS, TOLERANCES = 60, (1.0, 0.1)
NOISE = 0.5


class Problem(NamedTuple):
    """Inputs x [N, P], inducing points z [M, P], targets y [N]; labels 0 and 1 where it is a classification."""

    x: np.ndarray
    z: np.ndarray
    y: np.ndarray
    labels: bool
    learned: bool

    @property
    def start(self) -> dict[str, float]:
        values = {"variance": 1.0, "length": self.x.shape[1] ** 0.5}
        return values if self.labels else {**values, "noise": NOISE}


class Place(NamedTuple):
    """Where an optimizer is: N(loc, scale_tril scale_trilᵀ) of u, and the hyperparameters."""

    loc: np.ndarray
    scale_tril: np.ndarray
    values: dict[str, float]


def problem(kind: str, learned: bool) -> Problem:
    from sklearn.datasets import load_breast_cancer, load_diabetes

    labels = kind == "classification"
    x, y = (load_breast_cancer if labels else load_diabetes)(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    y = y.astype(float) if labels else (y - y.mean()) / y.std()
    return Problem(x, x[np.random.default_rng(0).permutation(len(x))[:INDUCING]], y, labels, learned)


def distances(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Squared, between inducing points [M, M], and from them to the inputs [M, N]."""
    both = [((problem.z[:, None] - other) ** 2).sum(-1) for other in (problem.z, problem.x)]
    return both[0], both[1]


def projected(xp: Any, solve: Callable, within: Any, across: Any, values: dict[str, Any]) -> tuple[Any, Any]:
    """A and v of f | u ~ N(A u, diag(v)): A = K_xz L⁻ᵀ with K_zz = L Lᵀ, v = diag K_xx − diag A Aᵀ."""
    variance, length = values["variance"], values["length"]
    kernel = [variance * xp.exp(-squared / (2 * length**2)) for squared in (within, across)]
    factor = xp.linalg.cholesky(kernel[0] + JITTER * variance * xp.eye(len(within)))
    columns = solve(factor, kernel[1])
    return columns.T, variance * (1 + JITTER) - (columns**2).sum(0)


def expected(xp: Any, softplus: Callable, y: Any, loc: Any, variance: Any, noise: Any, labels: bool) -> Any:
    """Σ_n E[log p(y_n | f_n)] with f_n ~ N(loc, variance): closed for a Normal, and by quadrature for a Bernoulli."""
    if not labels:
        return (-((y - loc) ** 2 + variance) / (2 * noise) - xp.log(2 * np.pi * noise) / 2).sum()
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    signs = (1 - 2 * y)[:, None]
    f = [loc[:, None] + variance[:, None] ** 0.5 * float(node) for node in nodes]
    return -sum(
        softplus(signs * column).sum() * float(weight)
        for column, weight in zip(f, weights / weights.sum(), strict=True)
    )


def elbo(problem: Problem) -> Callable[[Place], float]:
    within, across = distances(problem)

    def at(place: Place) -> float:
        solve = lambda factor, right: solve_triangular(factor, right, lower=True)  # noqa: E731
        a, variance = projected(np, solve, within, across, place.values)
        spread = variance + ((a @ place.scale_tril) ** 2).sum(1)
        noise = place.values.get("noise")
        likelihood = expected(np, lambda f: np.logaddexp(0, f), problem.y, a @ place.loc, spread, noise, problem.labels)
        divergence = (place.scale_tril**2).sum() + place.loc @ place.loc - len(place.loc)
        return float(likelihood - divergence / 2 + np.log(np.diag(place.scale_tril)).sum())

    return at


def numpyro_steps(problem: Problem) -> Iterator[tuple[float, Place]]:
    """(seconds, place) of each step of `BLR()` in NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI, Trace_ELBO, init_to_value
    from numpyro.infer.autoguide import AutoMultivariateNormal

    from numpyro_blr import BLR

    within, across = map(jnp.asarray, distances(problem))

    def model(y):
        values = dict(problem.start)
        if problem.learned:
            positive = dist.constraints.positive
            values = {
                name: numpyro.param(name, jnp.array(start), constraint=positive) for name, start in values.items()
            }
        solve = lambda factor, right: jax.scipy.linalg.solve_triangular(factor, right, lower=True)  # noqa: E731
        a, variance = projected(jnp, solve, within, across, values)
        u = numpyro.sample("u", dist.Normal(jnp.zeros(INDUCING), 1.0).to_event(1))
        noise = jnp.asarray(values.get("noise", 1.0))
        numpyro.factor("y", expected(jnp, jax.nn.softplus, y, a @ u, variance, noise, problem.labels))

    origin = init_to_value(values={"u": jnp.zeros(INDUCING)})
    guide = AutoMultivariateNormal(model, init_loc_fn=origin, init_scale=1.0)
    svi, y = SVI(model, guide, BLR(), Trace_ELBO()), jnp.asarray(problem.y)
    state = svi.init(jax.random.key(0), y)
    update = jax.jit(svi.update).lower(state, y).compile()
    for _ in range(BLR_STEPS):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(update(state, y))
        seconds, params = time.perf_counter() - start, svi.get_params(state)
        values = {name: float(params.get(name, value)) for name, value in problem.start.items()}
        yield seconds, Place(np.asarray(params["auto_loc"]), np.asarray(params["auto_scale_tril"]), values)


def pyro_steps(problem: Problem) -> Iterator[tuple[float, Place]]:
    """(seconds, place) of each step of `BLR()` in Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoMultivariateNormal, init_to_value

    from pyro_blr import BLR

    within, across = map(torch.as_tensor, distances(problem))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model(y):
        values: dict[str, Any] = {name: torch.tensor(start) for name, start in problem.start.items()}
        if problem.learned:
            positive = dist.constraints.positive
            values = {name: pyro.param(name, start, constraint=positive) for name, start in values.items()}
        solve = lambda factor, right: torch.linalg.solve_triangular(factor, right, upper=False)  # noqa: E731
        a, variance = projected(torch, solve, within, across, values)
        u = pyro.sample("u", dist.Normal(torch.zeros(INDUCING), 1.0).to_event(1))
        softplus, noise = torch.nn.functional.softplus, values.get("noise")
        pyro.factor("y", expected(torch, softplus, y, a @ u, variance, noise, problem.labels))

    origin = init_to_value(values={"u": torch.zeros(INDUCING)})
    guide = AutoMultivariateNormal(model, init_loc_fn=origin, init_scale=1.0)
    svi, y = SVI(model, guide, BLR(), Trace_ELBO()), torch.as_tensor(problem.y)
    for _ in range(BLR_STEPS):
        start = time.perf_counter()
        svi.step(y)
        seconds, posterior = time.perf_counter() - start, guide.get_posterior()
        store = pyro.get_param_store()
        values = {name: store[name].item() if name in store else value for name, value in problem.start.items()}
        yield seconds, Place(posterior.loc.detach().numpy(), posterior.scale_tril.detach().numpy(), values)


def gpytorch_steps(problem: Problem, num_steps: int, rate: float, adam: float) -> Iterator[tuple[float, Place]]:
    """(seconds, place) of each step of GPyTorch's NGD, and of Adam on the hyperparameters where they are learned."""
    import gpytorch
    import torch

    class Process(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            natural = gpytorch.variational.NaturalVariationalDistribution(INDUCING)
            points = torch.as_tensor(problem.z)
            super().__init__(
                gpytorch.variational.VariationalStrategy(
                    self, points, natural, learn_inducing_locations=False, jitter_val=JITTER
                )
            )
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())
            self.covar_module.outputscale = problem.start["variance"]
            self.covar_module.base_kernel.lengthscale = problem.start["length"]

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    class Logit(gpytorch.likelihoods.likelihood._OneDimensionalLikelihood):
        def forward(self, f, **_):
            return torch.distributions.Bernoulli(logits=f)

    process, likelihood = Process(), Logit() if problem.labels else gpytorch.likelihoods.GaussianLikelihood()
    if not problem.labels:
        likelihood.noise = NOISE
    process.train(), likelihood.train()
    x, y = torch.as_tensor(problem.x), torch.as_tensor(problem.y)
    optimizers = [gpytorch.optim.NGD(process.variational_parameters(), num_data=len(y), lr=rate)]
    if problem.learned:
        optimizers.append(torch.optim.Adam([*process.hyperparameters(), *likelihood.parameters()], lr=adam))
    bound = gpytorch.mlls.VariationalELBO(likelihood, process, num_data=len(y))
    for _ in range(num_steps):
        start = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (-bound(process(x), y)).backward()
        for optimizer in optimizers:
            optimizer.step()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            u = process.variational_strategy._variational_distribution()
            kernel = process.covar_module
            values = {"variance": float(kernel.outputscale), "length": float(kernel.base_kernel.lengthscale)}
            if not problem.labels:
                values["noise"] = float(likelihood.noise)
            yield seconds, Place(u.mean.numpy(), cholesky(u.covariance_matrix.numpy(), lower=True), values)


def run(steps: Iterator[tuple[float, Place]], at: Callable[[Place], float]) -> list[tuple[float, float]]:
    """(seconds so far, ELBO) after each step; up to where a matrix has no Cholesky factor."""
    found: list[tuple[float, float]] = []
    try:
        for seconds, place in steps:
            found.append((seconds + (found[-1][0] if found else 0.0), at(place)))
    except (RuntimeError, np.linalg.LinAlgError) as error:  # GPyTorch's NotPSDError is a RuntimeError
        print(f"ended at step {len(found) + 1}: {type(error).__name__}")
    return found


def reached(runs: list[list[tuple[float, float]]], target: float) -> tuple[int | None, float | None]:
    """The fewest steps and the fewest seconds of any of the runs to an ELBO of `target`."""
    firsts = [next((i for i, (_, value) in enumerate(run) if value >= target), None) for run in runs]
    there = [(first + 1, run[first][0]) for first, run in zip(firsts, runs, strict=True) if first is not None]
    return (min(steps for steps, _ in there), min(seconds for _, seconds in there)) if there else (None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", choices=("numpyro", "pyro"), default="numpyro")
    parser.add_argument("--steps", type=int, default=1000, help="of GPyTorch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    import torch

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if arguments.host == "numpyro":
        import numpyro

        numpyro.enable_x64()
    records: list[dict[str, Any]] = []
    print("| process | hyperparameters | | steps to 1 nat | seconds | steps to 0.1 nat | seconds | gap | ms a step |")
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for kind in ("classification", "regression"):
        for learned in (False, True):
            task = problem(kind, learned)
            at = elbo(task)
            ours = {"numpyro": numpyro_steps, "pyro": pyro_steps}[arguments.host]
            runs = {"BLR()": [run(ours(task), at)]}
            adams = ADAM_RATES if learned else (0.0,)
            theirs = [run(gpytorch_steps(task, arguments.steps, rate, adam), at) for rate in RATES for adam in adams]
            runs["GPyTorch NGD"] = [found for found in theirs if found]
            best = max(value for several in runs.values() for each in several for _, value in each)
            for name, several in runs.items():
                columns = [reached(several, best - tolerance) for tolerance in TOLERANCES]
                gap = best - max(each[-1][1] for each in several)
                pace = 1e3 * sum(each[-1][0] for each in several) / sum(map(len, several))
                cells = " | ".join("– | –" if steps is None else f"{steps:,} | {s:.3g}" for steps, s in columns)
                print(f"| {kind} | {'learned' if learned else 'fixed'} | {name} | {cells} | {gap:.3f} | {pace:.2g} |")
                records.append(
                    {"process": kind, "learned": learned, "method": name, "reached": columns, "gap": gap, "ms": pace}
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
