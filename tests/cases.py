"""Named cases with their traits: layouts of coordinates, problems ℓ(z), and models for the hosts.

Where a test would ask `if name == ...`, the case carries a field instead. Everything here is NumPy; the hosts' arrays
and distributions come in through the `backend` (problems) and the `host` (models and guides) argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import pytest

from . import reference

# ---------------------------------------------------------------------------------------------------------------------
# Layouts: four coordinates, cut up in every way that a guide can

DIMENSION = 4
FIXED_SCALE = 0.3  # of the coordinates whose covariance is not learned


@dataclass(frozen=True)
class Part:
    """What the packages call a `Block`."""

    start: int
    shape: tuple[int, ...]
    structure: str

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def groups(self) -> list[list[int]]:
        """The coordinates, by what is independent of what."""
        length = self.shape[-1] if self.structure == "dense" else 1
        return [list(range(i, i + length)) for i in range(self.start, self.start + self.size, length)]


LAYOUTS = {
    "diagonal": (Part(0, (4,), "diagonal"),),
    "diagonal, several": (Part(0, (), "diagonal"), Part(1, (3, 1), "diagonal")),
    "dense": (Part(0, (4,), "dense"),),
    "batched dense": (Part(0, (2, 2), "dense"),),
    "mixed": (Part(0, (2,), "dense"), Part(2, (), "diagonal"), Part(3, (1,), "diagonal")),
    "fixed": (Part(0, (2,), "fixed"), Part(2, (2,), "diagonal")),
    "point": (Part(0, (2,), "point"), Part(2, (1, 2), "dense")),
}
ONLY_DIAGONAL = ("diagonal", "diagonal, several", "fixed")

# ---------------------------------------------------------------------------------------------------------------------
# Problems: ℓ in the host's arrays, its derivatives by hand


@dataclass(frozen=True)
class Quadratic:
    """ℓ(z) = ½ (z − a)ᵀ A (z − a)."""

    matrix: np.ndarray
    optimum: np.ndarray

    def loss(self, backend: Any, z: Any) -> Any:
        residual = z - backend.array(self.optimum)
        return residual @ backend.array(self.matrix) @ residual / 2

    def value(self, z: np.ndarray) -> float:
        return (z - self.optimum) @ self.matrix @ (z - self.optimum) / 2

    def gradient(self, z: np.ndarray) -> np.ndarray:
        return self.matrix @ (z - self.optimum)

    def hessian(self, z: np.ndarray) -> np.ndarray:
        return self.matrix


@dataclass(frozen=True)
class PoissonRegression:
    """ℓ(z) = Σ_i exp(x_iᵀ z) − y_i x_iᵀ z + |z|²/2: convex, and E_q[exp(xᵀ z)] = exp(xᵀ m + xᵀ Σ x / 2)."""

    inputs: np.ndarray
    counts: np.ndarray

    def loss(self, backend: Any, z: Any) -> Any:
        log_rates = backend.array(self.inputs) @ z
        return (backend.xp.exp(log_rates) - backend.array(self.counts) * log_rates).sum() + z @ z / 2

    def value(self, z: np.ndarray) -> float:
        return (np.exp(self.inputs @ z) - self.counts * (self.inputs @ z)).sum() + z @ z / 2

    def gradient(self, z: np.ndarray) -> np.ndarray:
        return self.inputs.T @ (np.exp(self.inputs @ z) - self.counts) + z

    def hessian(self, z: np.ndarray) -> np.ndarray:
        return (self.inputs.T * np.exp(self.inputs @ z)) @ self.inputs + np.eye(len(z))

    def expected_derivatives(self, loc: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """E_q[g] and E_q[H] in closed form."""
        spread = np.einsum("nd,de,ne->n", self.inputs, covariance, self.inputs)
        rates = np.exp(self.inputs @ loc + spread / 2)
        return self.inputs.T @ (rates - self.counts) + loc, (self.inputs.T * rates) @ self.inputs + np.eye(len(loc))


@dataclass(frozen=True)
class StudentRegression:
    """ℓ(z) = Σ_i (ν + 1)/2 log(1 + r_i²/ν) + δ |z|²/2 with r = y − X z: its Hessian is indefinite far from the data."""

    inputs: np.ndarray
    targets: np.ndarray
    degrees: float = 3.0
    prior_precision: float = 0.05

    def loss(self, backend: Any, z: Any) -> Any:
        residuals = backend.array(self.targets) - backend.array(self.inputs) @ z
        heavy = (self.degrees + 1) / 2 * backend.xp.log1p(residuals**2 / self.degrees)
        return heavy.sum() + self.prior_precision * (z @ z) / 2

    def value(self, z: np.ndarray) -> float:
        residuals = self.targets - self.inputs @ z
        heavy = (self.degrees + 1) / 2 * np.log1p(residuals**2 / self.degrees)
        return heavy.sum() + self.prior_precision * (z @ z) / 2

    def gradient(self, z: np.ndarray) -> np.ndarray:
        r = self.targets - self.inputs @ z
        return -self.inputs.T @ ((self.degrees + 1) * r / (self.degrees + r**2)) + self.prior_precision * z

    def hessian(self, z: np.ndarray) -> np.ndarray:
        r = self.targets - self.inputs @ z
        weights = (self.degrees + 1) * (self.degrees - r**2) / (self.degrees + r**2) ** 2
        return (self.inputs.T * weights) @ self.inputs + self.prior_precision * np.eye(len(z))


def positive_definite(seed: int, dimension: int = DIMENSION) -> np.ndarray:
    """A well-conditioned random matrix: eigenvalues between 1 and about 10."""
    root = np.random.default_rng(seed).normal(size=(dimension, 2 * dimension))
    return np.eye(dimension) + root @ root.T / 4


def quadratic() -> Quadratic:
    return Quadratic(positive_definite(1), np.array([1.0, -2.0, 0.5, 3.0]))


def separable() -> Quadratic:
    """A quadratic whose Hessian is diagonal."""
    return Quadratic(np.diag([0.5, 2.0, 3.0, 40.0]), np.array([1.0, -2.0, 0.5, 3.0]))


def poisson() -> PoissonRegression:
    random = np.random.default_rng(2)
    inputs = random.normal(size=(8, DIMENSION)) / 2
    return PoissonRegression(inputs, random.poisson(np.exp(inputs @ np.array([0.5, -0.5, 1.0, 0.2]))))


def student() -> StudentRegression:
    random = np.random.default_rng(3)
    inputs = random.normal(size=(12, DIMENSION))
    targets = inputs @ np.array([2.0, -1.0, 0.5, 1.5]) + 0.3 * random.normal(size=12)
    targets[:2] += 15
    return StudentRegression(inputs, targets)


# ---------------------------------------------------------------------------------------------------------------------
# Models with a Gaussian posterior, for the stock SVI. Latent sites are named in alphabetical order, in which NumPyro
# concatenates them; Pyro takes the order of the model.


@dataclass(frozen=True)
class Model:
    """A model whose −log density is Σ_i (targets_i − rows_iᵀ z)² / (2 scales_i²) in unconstrained coordinates.

    Attributes:
        make: host -> the model, a function of `args`.
        factors: of the density, each (row, target, scale); the prior's are among them.
        sites: latent sites with their numbers of coordinates.
    """

    name: str
    make: Callable[[Any], Callable]
    args: tuple
    factors: tuple
    sites: dict[str, int]

    @cached_property
    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact mean and covariance."""
        rows, targets, scales = zip(*self.factors, strict=True)
        return reference.linear_gaussian(np.array(rows), np.array(targets), np.array(scales))

    @cached_property
    def negative_log_evidence(self) -> float:
        """−log ∫ Π_i N(targets_i | rows_iᵀ z, scales_i) dz: the loss of every draw from the exact posterior."""
        rows, targets, scales = map(np.array, zip(*self.factors, strict=True))
        mean, covariance = self.posterior
        residuals = (targets - rows @ mean) / scales
        log_joint = -0.5 * residuals @ residuals - np.log(scales).sum() - 0.5 * len(targets) * np.log(2 * np.pi)
        return -(log_joint + 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1])

    def __repr__(self) -> str:
        return self.name


def regression(
    name: str, x: np.ndarray, y: np.ndarray, prior_scale: np.ndarray, intercept_scale: float, noise_scale: float
) -> Model:
    """y ~ N(intercept + X coefficients, noise): two latent sites, one of them a vector."""
    length = x.shape[1]

    def make(host):
        def model(x, y, prior_scale):
            coefficients = host.sample("coefficients", host.dist.Normal(0.0, prior_scale).to_event(1))
            intercept = host.sample("intercept", host.dist.Normal(0.0, intercept_scale))
            with host.plate("data", x.shape[0]):
                host.sample("y", host.dist.Normal(intercept + (x * coefficients).sum(-1), noise_scale), obs=y)

        return model

    basis = np.eye(length + 1)
    prior = [(row, 0.0, scale) for row, scale in zip(basis, [*prior_scale, intercept_scale], strict=True)]
    likelihood = [(np.append(row, 1.0), target, noise_scale) for row, target in zip(x, y, strict=True)]
    sites = {"coefficients": length, "intercept": 1}
    return Model(name, make, (x, y, prior_scale), (*prior, *likelihood), sites)


@functools.cache
def linear() -> Model:
    """A small regression with correlated columns."""
    random = np.random.default_rng(4)
    x = random.normal(size=(10, 3)) @ np.array([[1.0, 0.8, 0.0], [0.0, 0.6, 0.3], [0.0, 0.0, 1.0]])
    y = x @ np.array([1.0, -2.0, 0.5]) + 3 + 0.5 * random.normal(size=10)
    return regression("linear", x, y, np.array([1.0, 2.0, 3.0]), 10.0, 0.5)


@functools.cache
def longley() -> Model:
    """Longley's regression in its raw units: columns of 1 to 100,000, nearly collinear."""
    datasets = pytest.importorskip("statsmodels.datasets")
    table = datasets.longley.load()
    x, y = table.exog.to_numpy(), table.endog.to_numpy()
    prior_scale = 5 * y.std() / x.std(axis=0)
    return regression("longley", x - x.mean(axis=0), y - y.mean(), prior_scale, 1000.0, 304.85)


@functools.cache
def plates() -> Model:
    """A hierarchy: effects within a plate of groups, observations within a second plate across it."""
    y = np.random.default_rng(5).normal(1.0, 1.0, size=(4, 3))

    def make(host):
        def model(y):
            center = host.sample("a_center", host.dist.Normal(0.0, 2.0))
            with host.plate("groups", 3, dim=-1):
                effects = host.sample("b_effects", host.dist.Normal(center, 0.7))
                with host.plate("repeats", 4, dim=-2):
                    host.sample("y", host.dist.Normal(effects, 0.5), obs=y)

        return model

    basis = np.eye(4)
    prior = [(basis[0], 0.0, 2.0), *((basis[i] - basis[0], 0.0, 0.7) for i in (1, 2, 3))]
    likelihood = [(basis[1 + j], y[i, j], 0.5) for i in range(4) for j in range(3)]
    return Model("plates", make, (y,), (*prior, *likelihood), {"a_center": 1, "b_effects": 3})


@functools.cache
def local_matrices() -> Model:
    """A latent with two event dimensions, and one with an event and a plate."""
    y = np.random.default_rng(6).normal(size=(2, 2))

    def make(host):
        def model(y):
            matrix = host.sample("a_matrix", host.dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
            with host.plate("rows", 2):
                vectors = host.sample("b_vectors", host.dist.Normal(host.array([0.5, -0.5]), 2.0).to_event(1))
                host.sample("y", host.dist.Normal(matrix + vectors, 0.3).to_event(1), obs=y)

        return model

    basis = np.eye(8)
    prior = [(basis[i], 0.0, 1.0) for i in range(4)] + [(basis[4 + i], [0.5, -0.5][i % 2], 2.0) for i in range(4)]
    likelihood = [(basis[i] + basis[4 + i], y.ravel()[i], 0.3) for i in range(4)]
    return Model("local matrices", make, (y,), (*prior, *likelihood), {"a_matrix": 4, "b_vectors": 4})


@functools.cache
def masked() -> Model:
    """Observations behind a mask and observations counted twice."""
    y = np.random.default_rng(7).normal(size=6)
    mask = np.array([True, False, True, True, False, True])

    def make(host):
        def model(y, mask):
            z = host.sample("z", host.dist.Normal(0.0, 1.0))
            with host.plate("data", 6), host.mask(mask):
                host.sample("once", host.dist.Normal(z, 0.5), obs=y)
            with host.plate("again", 6), host.scale(2.0):
                host.sample("twice", host.dist.Normal(z, 0.8), obs=y)

        return model

    one = np.ones(1)
    once = [(one, target, 0.5) for target in y[mask]]
    twice = [(one, target, 0.8) for target in y for _ in range(2)]
    return Model("masked", make, (y, mask), ((one, 0.0, 1.0), *once, *twice), {"z": 1})


@functools.cache
def positive() -> Model:
    """A positive latent that is Gaussian on the scale on which guides work, its logarithm."""
    y = np.random.default_rng(8).normal(0.5, 0.4, size=5)

    def make(host):
        def model(y):
            rate = host.sample("rate", host.dist.LogNormal(host.array([0.3, -0.2]), 0.9).to_event(1))
            with host.plate("data", 5):
                host.sample("y", host.dist.Normal(host.xp.log(rate).sum(-1), 0.4), obs=y)

        return model

    prior = [(np.array([1.0, 0.0]), 0.3, 0.9), (np.array([0.0, 1.0]), -0.2, 0.9)]
    likelihood = [(np.ones(2), target, 0.4) for target in y]
    return Model("positive", make, (y,), (*prior, *likelihood), {"rate": 2})


@functools.cache
def equal_batches() -> Model:
    """A subsampled plate whose minibatches all say the same, so that N/M times one of them is exactly all the data."""

    def make(host):
        def model(y):
            z = host.sample("z", host.dist.Normal(host.array([0.0, 1.0]), 1.5).to_event(1))
            with host.plate("data", 12, subsample_size=3) as rows:
                host.sample("y", host.dist.Normal((z * host.array([1.0, 2.0])).sum(-1), 0.6), obs=y[rows])

        return model

    prior = [(np.array([1.0, 0.0]), 0.0, 1.5), (np.array([0.0, 1.0]), 1.0, 1.5)]
    likelihood = [(np.array([1.0, 2.0]), 0.7, 0.6)] * 12
    return Model("equal batches", make, (np.full(12, 0.7),), (*prior, *likelihood), {"z": 2})


GAUSSIAN_MODELS = (plates, local_matrices, masked, positive, equal_batches)

# ---------------------------------------------------------------------------------------------------------------------
# Guides


@dataclass(frozen=True)
class Guide:
    """A guide, and the Gaussian that is the best of its kind.

    Attributes:
        make: (host, model) -> guide.
        groups: sites' sizes -> the coordinates by what the guide correlates; none for a guide of points.
    """

    name: str
    make: Callable[[Any, Callable], Any]
    groups: Callable[[list[int]], list[list[int]]]

    def covariance(self, model: Model) -> np.ndarray:
        """Of the best Gaussian of this guide's structure: its groups' blocks of the posterior precision."""
        return reference.best_in_structure(model.posterior[1], self.groups(list(model.sites.values())))

    def parts(self, model: Model) -> tuple[Part, ...]:
        """Its groups as parts, each with a matrix of its own."""
        return tuple(Part(group[0], (len(group),), "dense") for group in self.groups(list(model.sites.values())))

    def __repr__(self) -> str:
        return self.name


def every_coordinate(sizes: list[int]) -> list[list[int]]:
    return [[i] for i in range(sum(sizes))]


def all_together(sizes: list[int]) -> list[list[int]]:
    return [list(range(sum(sizes)))]


def no_coordinate(sizes: list[int]) -> list[list[int]]:
    return []


def every_site(sizes: list[int]) -> list[list[int]]:
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


def stock(name: str, groups: Callable) -> Guide:
    return Guide(name, lambda host, model: getattr(host.autoguide, name)(model), groups)


def guide_list(host, model):
    """Full rank for the coefficients of a regression, mean field for the rest."""
    guide = host.autoguide.AutoGuideList(model)
    guide.append(host.autoguide.AutoMultivariateNormal(host.block(model, hide=["intercept"])))
    guide.append(host.autoguide.AutoNormal(host.block(model, hide=["coefficients"])))
    return guide


def written_normal(host, model):
    """Mean field for a regression, by hand."""

    def guide(x, y, prior_scale):
        length = x.shape[-1]
        loc = host.param("loc", host.array(np.zeros(length)))
        scale = host.param("scale", host.array(np.ones(length)), constraint=host.constraints.positive)
        host.sample("coefficients", host.dist.Normal(loc, scale).to_event(1))
        loc = host.param("intercept_loc", host.array(1.0))
        scale = host.param("intercept_scale", host.array(2.0), constraint=host.constraints.positive)
        host.sample("intercept", host.dist.Normal(loc, scale))

    return guide


def written_multivariate_normal(host, model):
    """Full rank for the coefficients of a regression, mean field for the rest, by hand."""

    def guide(x, y, prior_scale):
        length = x.shape[-1]
        loc = host.param("loc", host.array(np.zeros(length)))
        factor = host.param("factor", host.array(np.eye(length)), constraint=host.constraints.lower_cholesky)
        host.sample("coefficients", host.dist.MultivariateNormal(loc, scale_tril=factor))
        loc = host.param("intercept_loc", host.array(1.0))
        scale = host.param("intercept_scale", host.array(2.0), constraint=host.constraints.positive)
        host.sample("intercept", host.dist.Normal(loc, scale))

    return guide


def started(name: str, values: dict[str, np.ndarray]) -> Callable:
    """A stock guide whose locations start at `values`, in both hosts alike."""
    return lambda host, model: getattr(host.autoguide, name)(model, init_loc_fn=host.init_to_value(values))


MEAN_FIELD = stock("AutoNormal", every_coordinate)
FULL_RANK = stock("AutoMultivariateNormal", all_together)
GUIDES = (
    MEAN_FIELD,
    stock("AutoDiagonalNormal", every_coordinate),
    FULL_RANK,
    stock("AutoDelta", no_coordinate),
    Guide("AutoGuideList", guide_list, every_site),
    Guide("Normal by hand", written_normal, every_coordinate),
    Guide("MultivariateNormal by hand", written_multivariate_normal, every_site),
)


# ---------------------------------------------------------------------------------------------------------------------
# Networks and what else has many weights


@dataclass(frozen=True)
class Network:
    """y ~ N(tanh(x A + b) c + d, 0.5) with a Normal prior on every weight, and the derivatives of it by hand.

    Attributes:
        inputs, targets: x [N, 3] and y [N].
        priors: (m₀, s₀) of each site.
    """

    inputs: np.ndarray
    targets: np.ndarray
    priors: dict[str, tuple[Any, Any]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"a_weight": (3, 4), "b_bias": (4,), "c_weight": (4,), "d_bias": ()}

    def make(self, host: Any) -> Callable:
        def model(x, y):
            weights = {}
            for name, shape in self.shapes.items():
                loc, scale = (host.array(np.broadcast_to(value, shape)) for value in self.priors[name])
                weights[name] = host.sample(name, host.dist.Normal(loc, scale).to_event(len(shape)))
            host.record(weights)
            a, b, c, d = weights.values()
            with host.plate("data", len(x)):
                host.sample("y", host.dist.Normal(host.xp.tanh(x @ a + b) @ c + d, 0.5), obs=y)

        return model

    @property
    def args(self) -> tuple[np.ndarray, np.ndarray]:
        return self.inputs, self.targets

    def value(self, weights: dict[str, np.ndarray]) -> float:
        """−log p(y | x, w)."""
        a, b, c, d = weights.values()
        residual = (np.tanh(self.inputs @ a + b) @ c + d - self.targets) / 0.5
        return (residual**2 / 2 + np.log(0.5) + np.log(2 * np.pi) / 2).sum()

    def gradient(self, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Of −log p(y | x, w), the prior left out."""
        a, b, c, d = weights.values()
        hidden = np.tanh(self.inputs @ a + b)
        residual = (hidden @ c + d - self.targets) / 0.5**2
        inner = np.outer(residual, c) * (1 - hidden**2)
        return dict(
            zip(weights, (self.inputs.T @ inner, inner.sum(0), hidden.T @ residual, residual.sum()), strict=True)
        )


@functools.cache
def network() -> Network:
    random = np.random.default_rng(9)
    x = random.normal(size=(12, 3))
    y = np.sin(x.sum(1)) + 0.3 * random.normal(size=12)
    priors = {
        "a_weight": (0.0, 0.6),
        "b_bias": (0.2, 0.5),
        "c_weight": (0.0, np.array([0.5, 1.0, 1.5, 2.0])),  # of each element
        "d_bias": (0.4, 0.3),
    }
    return Network(x, y, priors)


def poisson_model(problem: PoissonRegression) -> Callable:
    """host -> the model of a `PoissonRegression`, whose prior is the standard Normal."""

    def make(host):
        def model(x, y):
            z = host.sample("z", host.dist.Normal(host.array(np.zeros(x.shape[1])), 1.0).to_event(1))
            host.record({"z": z})
            with host.plate("data", len(x)):
                host.sample("y", host.dist.Poisson(host.xp.exp(x @ z)), obs=y)

        return model

    return make


MEANS = {"loc": (0.5, 0.0, 0.0), "scale": (1.0, 0.7, 2.0)}  # of the priors of the models below


def means(name: str, make: Callable, y: np.ndarray, repeats: int = 1) -> Model:
    """y_ij ~ N(z_j, 0.5), each `repeats` times: a posterior whose precision is diagonal."""
    basis = np.eye(3)
    prior = [(row, loc, scale) for row, loc, scale in zip(basis, MEANS["loc"], MEANS["scale"], strict=True)]
    likelihood = [(basis[j], y[i, j], 0.5) for i in range(len(y)) for j in range(3)] * repeats
    return Model(name, make, (y,), (*prior, *likelihood), {"z": 3})


def rows_of_three(num_rows: int) -> np.ndarray:
    return np.random.default_rng(10).normal([1.0, -2.0, 0.5], 0.5, size=(num_rows, 3))


def prior_of_means(host: Any) -> Any:
    return host.dist.Normal(host.array(MEANS["loc"]), host.array(MEANS["scale"])).to_event(1)


@functools.cache
def separable_means() -> Model:
    """N is 15, and the curvature of ℓ̄ is 5/(15 · 0.5²) = 4/3."""

    def make(host):
        def model(y):
            z = host.sample("z", prior_of_means(host))
            with host.plate("rows", 5, dim=-2), host.plate("columns", 3, dim=-1):
                host.sample("y", host.dist.Normal(z, 0.5), obs=y)

        return model

    return means("separable means", make, rows_of_three(5))


@functools.cache
def subsampled_means() -> Model:
    """Minibatches of two rows of eight, which all say the same."""

    def make(host):
        def model(y):
            z = host.sample("z", prior_of_means(host))
            with host.plate("rows", 8, subsample_size=2) as rows:
                host.sample("y", host.dist.Normal(z, 0.5).to_event(1), obs=y[rows])

        return model

    return means("subsampled means", make, np.repeat(rows_of_three(1), 8, axis=0))


@functools.cache
def positive_means() -> Model:
    """The same in exp(z), whose prior is no Normal and whose support is the half line."""

    def make(host):
        def model(y):
            prior = host.dist.LogNormal(host.array(MEANS["loc"]), host.array(MEANS["scale"])).to_event(1)
            rate = host.sample("z", prior)
            with host.plate("rows", 5):
                host.sample("y", host.dist.Normal(host.xp.log(rate), 0.5).to_event(1), obs=y)

        return model

    return means("positive means", make, rows_of_three(5))


@functools.cache
def weighted_means() -> Model:
    """Every term counts twice, but for the masked ones, which do not count."""
    y = rows_of_three(5)
    mask = np.array([True, False, True, True, False])

    def make(host):
        def model(y):
            z = host.sample("z", prior_of_means(host))
            with host.plate("rows", 5), host.mask(host.integer(mask)), host.scale(2.0):
                host.sample("y", host.dist.Normal(z, 0.5).to_event(1), obs=y)

        return model

    made = means("weighted means", make, y[mask], repeats=2)
    return Model(made.name, made.make, (y,), made.factors, made.sites)


def means_by_hand(host, model):
    """Mean field for the models above."""

    def guide(y):
        loc = host.param("loc", host.array(np.zeros(3)))
        scale = host.param("scale", host.array(np.ones(3)), constraint=host.constraints.positive)
        host.sample("z", host.dist.Normal(loc, scale).to_event(1))

    return guide
