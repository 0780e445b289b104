"""The identities of exponential families, on every family: one line of `CASES` for each.

The referees are the host's distribution, SciPy's, automatic differentiation of the log-partition function, and
quadrature or draws where the host and SciPy have nothing to say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import ceil, log2
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

TOLERANCES = {"float64": 1e-8, "float32": 1e-3}  # of the largest component; torch's trigamma function has nine digits
SETTINGS = [((2, 3), "float64"), ((2,), "float32"), ((), "float64")]  # a compilation each; the first is for all tests
MODERATE = (-0.2, 0.4)  # decades of the parameters in which quadrature is exact and float32 has some digits
NUM_VALUES, NUM_DRAWS, NUM_STEPS = 8, 2000, 10_000


# torch's test of its own draws is turned round: it warns of the regular ones
pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")


@dataclass(frozen=True)
class Case:
    """A family and what its referees need.

    Args:
        parameters: (random, batch shape, lowest decade, highest decade) -> of the host's distribution, in NumPy.
        make: (the host's distributions, parameters as the backend's arrays) -> distribution of the batch.
        support: where quadrature integrates; None for families of vectors, whose expectations are then drawn.
        scipy: SciPy's distribution from the parameters of one of the batch.
        rule: how c is found, from gradients at sigma "points" or from all the "values".
        decades: of the parameters from which steps start.
        slack: of the host's own density, in tolerances.
        entropy_elsewhere: whether the host's and SciPy's entropies and divergences are right.
    """

    family: str
    parameters: Callable[..., dict[str, np.ndarray]]
    make: Callable[[Any, SimpleNamespace], Any]
    support: str | None = None
    scipy: Callable[[SimpleNamespace], Any] | None = None
    rule: str | None = "points"
    decades: tuple[float, float] = (-6, 8)
    slack: float = 1.0
    entropy_elsewhere: bool = True

    def natural(self, backend, shape, dtype="float64", member=0):
        """λ of one of two batches; the smaller batches are the first of the larger ones."""
        taken = {key: first_of(value, shape) for key, value in self.given(member).items()}
        return backend.natural_of(self.distribution(backend, taken, dtype))

    def given(self, member):
        return self.parameters(np.random.default_rng(member), (2, 3), *MODERATE)

    def distribution(self, backend, parameters, dtype="float64"):
        arrays = {key: backend.array(value, dtype) for key, value in parameters.items()}
        return self.make(Distributions(backend), SimpleNamespace(**arrays))


class Distributions:
    """The host's, and those of the families' own that it lacks."""

    def __init__(self, backend):
        self.places = backend.host.dist, backend.families

    def __getattr__(self, name):
        return next(getattr(place, name) for place in self.places if hasattr(place, name))


def positive(random, shape, low, high):
    return 10 ** random.uniform(low, high, shape)


def real(random, shape, low, high):
    return random.choice([-1, 1], shape) * positive(random, shape, low, high)


def direction(random, shape):
    value = random.normal(size=shape)
    return value / np.linalg.norm(value, axis=-1, keepdims=True)


def scale_tril(random, shape, low, high):
    """Lower factors of matrices of correlations from mild to strong, in the given units."""
    lower = np.tril(random.normal(size=shape), -1) + np.eye(shape[-1])
    return lower * positive(random, shape[:-1], low, high)[..., None]


CASES = [
    Case(
        "GammaNatural",
        lambda *r: {"concentration": positive(*r), "rate": positive(*r)},
        lambda dist, p: dist.Gamma(p.concentration, p.rate),
        support="positive",
        scipy=lambda p: scipy.stats.gamma(p.concentration, scale=1 / p.rate),
    ),
    Case(
        "BetaNatural",
        lambda *r: {"one": positive(*r), "zero": positive(*r)},
        lambda dist, p: dist.Beta(p.one, p.zero),
        support="unit",
        scipy=lambda p: scipy.stats.beta(p.one, p.zero),
    ),
    Case(
        "DirichletNatural",
        lambda random, shape, *decades: {"concentration": positive(random, (*shape, 4), *decades)},
        lambda dist, p: dist.Dirichlet(p.concentration),
        scipy=lambda p: scipy.stats.dirichlet(p.concentration),
    ),
    Case(
        "NormalNatural",
        lambda *r: {"loc": real(*r), "scale": positive(*r)},
        lambda dist, p: dist.Normal(p.loc, p.scale),
        support="real",
        scipy=lambda p: scipy.stats.norm(p.loc, p.scale),
        decades=(-3, 3),
    ),
    Case(
        "MultivariateNormalNatural",
        lambda random, shape, *decades: {
            "loc": real(random, (*shape, 3), *decades),
            "scale_tril": scale_tril(random, (*shape, 3, 3), *decades),
        },
        lambda dist, p: dist.MultivariateNormal(p.loc, scale_tril=p.scale_tril),
        scipy=lambda p: scipy.stats.multivariate_normal(p.loc, p.scale_tril @ p.scale_tril.T),
        decades=(-1, 1),
    ),
    Case(
        "BernoulliNatural",
        lambda *r: {"logits": real(*r)},
        lambda dist, p: dist.Bernoulli(logits=p.logits),
        support="two",
        scipy=lambda p: scipy.stats.bernoulli(scipy.special.expit(p.logits)),
        rule="values",
    ),
    Case(
        "CategoricalNatural",
        lambda random, shape, *decades: {"logits": real(random, (*shape, 4), *decades)},
        lambda dist, p: dist.Categorical(logits=p.logits),
        support="four",
        rule="values",
    ),
    Case(
        "InverseGammaNatural",
        lambda *r: {"concentration": positive(*r), "rate": positive(*r)},
        lambda dist, p: dist.InverseGamma(p.concentration, p.rate),
        support="positive",
        scipy=lambda p: scipy.stats.invgamma(p.concentration, scale=p.rate),
    ),
    Case(
        "ExponentialNatural",
        lambda *r: {"rate": positive(*r)},
        lambda dist, p: dist.Exponential(p.rate),
        support="positive",
        scipy=lambda p: scipy.stats.expon(scale=1 / p.rate),
    ),
    Case(
        "InverseGaussianNatural",
        lambda *r: {"loc": positive(*r), "concentration": positive(*r)},
        lambda dist, p: dist.InverseGaussian(p.loc, p.concentration),
        support="positive",
        scipy=lambda p: scipy.stats.invgauss(p.loc / p.concentration, scale=p.concentration),
        decades=(-3, 3),
    ),
    Case(
        "PoissonNatural",
        lambda *r: {"rate": positive(*r)},
        lambda dist, p: dist.Poisson(p.rate),
        support="counts",
        scipy=lambda p: scipy.stats.poisson(p.rate),
        rule=None,
    ),
    Case(
        "GeometricNatural",
        lambda *r: {"logits": real(*r)},
        lambda dist, p: dist.Geometric(logits=p.logits),
        support="counts",
        scipy=lambda p: scipy.stats.geom(scipy.special.expit(p.logits), loc=-1),
        rule=None,
        decades=(-6, 0.5),
    ),
    Case(
        "VonMisesNatural",
        lambda *r: {"loc": real(*r), "concentration": positive(*r)},
        lambda dist, p: dist.VonMises(p.loc, p.concentration),
        support="circle",
        scipy=lambda p: scipy.stats.vonmises(p.concentration, p.loc),
        slack=10,  # torch's Bessel functions have seven digits
    ),
    Case(
        "VonMisesFisherNatural",
        lambda random, shape, *decades: {
            "mean_direction": direction(random, (*shape, 3)),
            "concentration": positive(random, shape, *decades),
        },
        lambda dist, p: dist.VonMisesFisher(p.mean_direction, p.concentration),
        scipy=lambda p: scipy.stats.vonmises_fisher(p.mean_direction, p.concentration),
    ),
    Case(
        "WishartNatural",
        lambda random, shape, *decades: {
            "df": 3 + positive(random, shape, *decades),
            "scale_tril": scale_tril(random, (*shape, 3, 3), *decades),
        },
        lambda dist, p: dist.Wishart(p.df, scale_tril=p.scale_tril),
        scipy=lambda p: scipy.stats.wishart(p.df, p.scale_tril @ p.scale_tril.T),
        entropy_elsewhere=False,  # torch's divergence mixes the batch; NumPyro's entropy is not strict in its dtypes
        decades=(-1, 1),
    ),
    Case(
        "InverseWishartNatural",
        lambda random, shape, *decades: {
            "df": 3 + positive(random, shape, *decades),
            "scale_tril": scale_tril(random, (*shape, 3, 3), *decades),
        },
        lambda dist, p: dist.InverseWishart(p.df, scale_tril=p.scale_tril),
        scipy=lambda p: scipy.stats.invwishart(p.df, p.scale_tril @ p.scale_tril.T),
        entropy_elsewhere=False,  # SciPy's is not that of its own density
        decades=(-1, 1),
    ),
    Case(
        "NormalGammaNatural",
        lambda *r: {"loc": real(*r), **{name: positive(*r) for name in ("kappa", "concentration", "rate")}},
        lambda dist, p: dist.NormalGamma(p.loc, p.kappa, p.concentration, p.rate),
        decades=(-1, 1),
    ),
    Case(
        "NormalWishartNatural",
        lambda random, shape, *decades: {
            "loc": real(random, (*shape, 3), *decades),
            "kappa": positive(random, shape, *decades),
            "scale_tril": scale_tril(random, (*shape, 3, 3), *decades),
            "df": 3 + positive(random, shape, *decades),
        },
        lambda dist, p: dist.NormalWishart(p.loc, p.kappa, p.scale_tril, p.df),
        decades=(-0.5, 0.5),
    ),
]

every_case = pytest.mark.parametrize("case", CASES, ids=[case.family for case in CASES])
every_setting = pytest.mark.parametrize(
    ("shape", "dtype"),
    [SETTINGS[0], *(pytest.param(*setting, marks=pytest.mark.slow) for setting in SETTINGS[1:])],
    ids=[f"{dtype}{shape}" for shape, dtype in SETTINGS],
)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES)
with_points = pytest.mark.parametrize(
    "case", [case for case in CASES if case.rule == "points"], ids=lambda case: case.family
)
with_values = pytest.mark.parametrize(
    "case", [case for case in CASES if case.rule == "values"], ids=lambda case: case.family
)
scalar = pytest.mark.parametrize("case", [case for case in CASES if case.support], ids=lambda case: case.family)
vector = pytest.mark.parametrize("case", [case for case in CASES if not case.support], ids=lambda case: case.family)
with_scipy = pytest.mark.parametrize("case", [case for case in CASES if case.scipy], ids=lambda case: case.family)


def first_of(value, shape):
    """The first of a batch of shape (2, 3), as a batch of the shape; an event stays."""
    return value[(0,) * (2 - len(shape))] if len(shape) != 1 else value[:, 0]


def assert_near(actual, expected, dtype="float64", factor=1.0):
    """To the dtype's digits of the largest component, along the last axis."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    size = np.maximum(np.abs(expected), 1) if expected.ndim == 0 else np.abs(expected).max(-1, keepdims=True) + 1
    assert_allclose(actual / size, expected / size, rtol=0, atol=factor * TOLERANCES[dtype])


def hadamard(num_signs):
    """Balanced and uncorrelated ±1, [R, n]."""
    runs, columns = np.arange(2 ** ceil(log2(num_signs + 1))), np.arange(num_signs)
    return np.array([[(-1.0) ** int(run & (column + 1)).bit_count() for column in columns] for run in runs])


@functools.cache
def draws(backend, case):
    """Values of the distributions of the first batch of shape (2, 3), [NUM_DRAWS, 2, 3, *event]."""
    return backend.sample(case.distribution(backend, case.given(0)), NUM_DRAWS)


def values_of(backend, case, shape, dtype, natural):
    values = np.moveaxis(draws(backend, case)[:NUM_VALUES], 0, 2)
    values = np.moveaxis(first_of(values, shape), len(shape), 0)
    return backend.array(values, str(values.dtype) if values.dtype.kind == "i" else dtype)


@functools.cache
def facts(backend, case, shape, dtype):
    """Both sides of all identities as NumPy arrays, compiled into one program."""
    natural, other = (case.natural(backend, shape, dtype, member) for member in (0, 1))
    values = values_of(backend, case, shape, dtype, natural)
    signs = hadamard(natural.num_signs) if case.rule == "points" else np.ones((1, 1))
    signs = np.broadcast_to(signs.reshape(len(signs), *[1] * len(shape), -1), (len(signs), *shape, signs.shape[-1]))

    def both_sides(natural, other, values, signs):
        def slope(natural):
            return backend.gradient_of(lambda natural: natural.log_partition(), natural)

        direction, expectation = other - natural, natural.to_expectation()
        change = other.to_expectation() - expectation
        found = {
            "natural": natural,
            "direction": direction,
            "expectation": expectation,
            "slope": slope(natural),
            "curvature": backend.derivative(lambda t: slope(natural + direction * t).flat(), natural.flat()),
            "fisher_product": natural.fisher_product(direction),
            "change": change,
            "fisher_solve": natural.fisher_product(natural.fisher_solve(change)),
            "from_expectation": natural.from_expectation(expectation),
            "natural_of": backend.natural_of(natural.to_distribution()),
            "log_density": natural.log_density(values),
            "log_prob": backend.log_prob(natural.to_distribution(), values),
            "entropy": natural.entropy(),
            "kl_divergence": natural.kl_divergence(other),
            "in_domain": natural.in_domain(),
            "step": natural.step(other, 1.0),
        }
        if case.rule == "points":
            points = natural.sigma_points(signs)
            statistics = natural.sufficient_statistics(points)
            gradients = backend.gradient(
                lambda points: direction.inner(natural.sufficient_statistics(points)).sum(), points
            )
            found |= {"points": statistics.flat().mean(0), "match": natural.match(points, gradients, signs)}
        return {name: value.flat() if hasattr(value, "ranks") else value for name, value in found.items()}

    found = backend.compiled(both_sides)(natural, other, values, backend.array(signs, dtype))
    return SimpleNamespace(**{name: backend.to_numpy(value) for name, value in found.items()})


@every_case
@every_setting
class TestIdentities:
    def test_the_gradient_of_the_log_partition_is_the_expectation(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.expectation, found.slope, dtype)

    def test_the_fisher_information_is_its_second_derivative(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.fisher_product, found.curvature, dtype)

    def test_fisher_solve_inverts_fisher_product(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.fisher_solve, found.change, dtype)

    def test_from_expectation_inverts_to_expectation(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.from_expectation, found.natural, dtype)

    def test_natural_of_inverts_to_distribution(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.natural_of, found.natural, dtype)
        assert found.natural.shape[:-1] == shape

    def test_the_density_is_the_hosts(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.log_density, found.log_prob, dtype, case.slack)

    def test_a_full_step_lands_on_the_target(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.step - found.natural, found.direction, dtype)

    def test_a_proper_distribution_is_in_the_domain(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_array_equal(found.in_domain, np.ones(shape, bool))

    def test_entropy_and_divergence_keep_shape_and_dtype(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert found.entropy.shape == found.kl_divergence.shape == shape
        assert found.entropy.dtype == found.kl_divergence.dtype == dtype
        exact = facts(backend, case, (2, 3), "float64")  # the smaller batches are the first of it
        assert_near(found.entropy, first_of(exact.entropy, shape).astype(dtype), dtype)
        assert_near(found.kl_divergence, first_of(exact.kl_divergence, shape).astype(dtype), dtype)
        assert (found.kl_divergence > 0).all()


@with_points
@every_setting
class TestSigmaPoints:
    def test_the_average_of_the_statistics_is_the_expectation(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.points, found.expectation, dtype)

    def test_match_finds_the_coefficients_of_the_statistics(self, backend, case, shape, dtype):
        found = facts(backend, case, shape, dtype)
        assert_near(found.match, found.direction, dtype)


@with_values
@every_setting
def test_match_values_finds_the_coefficients_of_the_statistics(backend, case, shape, dtype):
    natural, other = (case.natural(backend, shape, dtype, member) for member in (0, 1))
    direction = other - natural
    values = np.broadcast_to(np.arange(natural.num_values).reshape(-1, *[1] * len(shape)), (natural.num_values, *shape))
    values = backend.array(values, "int64")
    statistics = natural.sufficient_statistics(values)
    loss = backend.to_numpy(direction.inner(statistics)) + 3
    matched = natural.match_values(backend.array(loss, dtype))
    again = backend.to_numpy(matched.inner(statistics))
    assert_near(again - again[0], (loss - loss[0]).astype(dtype), dtype)
    probabilities = backend.to_numpy(natural.probabilities())
    assert_near(np.exp(backend.to_numpy(natural.log_density(values))), probabilities, dtype)


def host_or_none(fn, *args):
    try:
        return fn(*args)
    except NotImplementedError:
        return None


@pytest.mark.parametrize("case", [case for case in CASES if case.entropy_elsewhere], ids=lambda case: case.family)
def test_entropy_and_divergence_are_the_hosts(backend, case):
    """Where it has them."""
    found = facts(backend, case, (2, 3), "float64")
    first, second = (case.distribution(backend, case.given(member)) for member in (0, 1))
    entropy = host_or_none(backend.entropy, first)
    if entropy is not None:
        assert_near(found.entropy, backend.to_numpy(entropy))
    divergence = host_or_none(backend.kl_divergence, first, second)
    if divergence is not None:
        assert_near(found.kl_divergence, backend.to_numpy(divergence))


@with_scipy
def test_density_and_entropy_are_those_of_scipy(backend, case):
    found = facts(backend, case, (2, 3), "float64")
    values = draws(backend, case)[:NUM_VALUES]
    for index in np.ndindex(2, 3):
        expected = case.scipy(SimpleNamespace(**{key: value[index] for key, value in case.given(0).items()}))
        log_density = expected.logpmf if hasattr(expected, "logpmf") else expected.logpdf
        here = values[(slice(None), *index)]
        assert_near(found.log_density[(slice(None), *index)], np.array([log_density(value) for value in here]))
        if case.entropy_elsewhere and hasattr(expected, "entropy"):
            assert_near(found.entropy[index], np.asarray(expected.entropy()))


def quadrature(support):
    """Points and their weights; the trapezoidal rule in a coordinate in which densities fall off exponentially."""
    if support in ("two", "four", "counts"):
        points = np.arange({"two": 2, "four": 4, "counts": 500}[support])
        return points, np.ones(len(points))
    if support == "circle":
        points = np.linspace(-np.pi, np.pi, 2000, endpoint=False)
        return points, np.full(len(points), points[1] - points[0])
    line = np.linspace(-34, 34, 6801)
    points, slope = {
        "real": (line, np.ones_like(line)),
        "positive": (np.exp(line), np.exp(line)),
        "unit": (scipy.special.expit(line), scipy.special.expit(line) * scipy.special.expit(-line)),
    }[support]
    return points, slope * (line[1] - line[0])


@scalar
def test_expectations_are_integrals(backend, case):
    natural, other = (case.natural(backend, (2, 3), "float64", member) for member in (0, 1))
    points, weights = quadrature(case.support)
    points = np.broadcast_to(points[:, None, None], (len(points), 2, 3))
    points = backend.array(points, "int64" if natural.discrete else "float64")

    def evaluate(natural, other, points):
        statistics = natural.sufficient_statistics(points)
        return natural.log_density(points), other.log_density(points), statistics.flat()

    log_density, log_other, statistics = map(backend.to_numpy, backend.compiled(evaluate)(natural, other, points))
    mass = np.exp(log_density) * weights[:, None, None]
    found = facts(backend, case, (2, 3), "float64")
    assert_allclose(mass.sum(0), 1, rtol=1e-7)
    assert_allclose((mass[..., None] * statistics).sum(0), found.expectation, rtol=1e-6, atol=1e-6)
    assert_allclose(-(mass * log_density).sum(0), found.entropy, rtol=1e-6, atol=1e-6)
    assert_allclose((mass * (log_density - log_other)).sum(0), found.kl_divergence, rtol=1e-6, atol=1e-6)


@vector
def test_expectations_are_averages_over_draws(backend, case):
    natural, other = (case.natural(backend, (2, 3), "float64", member) for member in (0, 1))
    values = backend.array(draws(backend, case))

    def evaluate(natural, other, values):
        statistics = natural.sufficient_statistics(values)
        return natural.log_density(values), other.log_density(values), statistics.flat()

    log_density, log_other, statistics = map(backend.to_numpy, backend.compiled(evaluate)(natural, other, values))
    found = facts(backend, case, (2, 3), "float64")
    for drawn, expected in [
        (statistics, found.expectation),
        (-log_density, found.entropy),
        (log_density - log_other, found.kl_divergence),
    ]:
        standard_error = drawn.std(0) / len(drawn) ** 0.5
        assert (np.abs(drawn.mean(0) - expected) < 5 * standard_error + 1e-9).all()


@every_case
def test_a_value_starts_a_member_around_it(backend, case):
    natural = case.natural(backend, (2, 3))
    values = backend.array(draws(backend, case)[0], "float64")
    if natural.discrete:
        return
    started = type(natural).from_value(values)
    assert backend.to_numpy(started.in_domain()).all()
    assert started.batch_shape == (2, 3)


def test_members_add_with_their_like_alone(backend):
    gamma, beta = (case.natural(backend, (2,)) for case in CASES[:2])
    flat = backend.to_numpy(gamma.flat())
    for combined, expected in [
        (gamma + gamma, 2 * flat),
        (gamma - 0.5 * gamma, flat / 2),
        (gamma * 3, 3 * flat),
        (gamma / 4, flat / 4),
        (-gamma, -flat),
        (gamma * backend.array([1.0, 2.0]), flat * np.array([[1.0], [2.0]])),
    ]:
        assert type(combined) is type(gamma)
        assert_allclose(backend.to_numpy(combined.flat()), expected)
    for other in (beta, gamma.to_expectation(), 1.0):
        with pytest.raises(TypeError, match="adds to its like"):
            gamma + other
        with pytest.raises(TypeError, match="adds to its like"):
            gamma - other
    with pytest.raises(TypeError, match="adds to its like"):
        gamma.kl_divergence(beta)


def test_a_number_for_each_of_the_batch_scales_vectors_and_matrices(backend):
    (case,) = [case for case in CASES if case.family == "MultivariateNormalNatural"]
    natural = case.natural(backend, (2,))
    scaled = natural * backend.array([1.0, 2.0])
    for item in fields(natural):
        before, after = (backend.to_numpy(getattr(member, item.name)) for member in (natural, scaled))
        assert_array_equal(after, np.stack([before[0], 2 * before[1]]))


def test_a_distribution_without_a_family_is_refused(backend):
    distribution = backend.host.dist.Cauchy(backend.array(0.0), backend.array(1.0))
    with pytest.raises(TypeError, match="Cauchy belongs to no registered exponential family"):
        backend.natural_of(distribution)


def test_members_of_a_batch_are_indexed_and_summed(backend):
    dist, array = backend.host.dist, backend.array
    scales = np.array([[[2.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.5, 3.0]]])
    natural = backend.natural_of(dist.MultivariateNormal(array(np.ones((2, 2))), scale_tril=array(scales)))
    first, second = natural[0], natural[1]
    assert tuple(first.batch_shape) == ()
    for total, one, other in zip(*map(backend.leaves, (natural.sum(), first, second)), strict=True):
        np.testing.assert_allclose(total, one + other, rtol=1e-12)


@every_case
def test_like_inverts_flat(backend, case):
    natural = case.natural(backend, (2, 3))
    again = natural.like(natural.flat())
    for item in fields(natural):
        first, second = (backend.to_numpy(getattr(member, item.name)) for member in (natural, again))
        assert_array_equal(first, second)


@every_case
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow_to_compile)])
def test_no_step_leaves_the_domain(backend, case, dtype):
    """Extreme states, directions up to a million times their size, every rate; and directions that are not finite."""
    random = np.random.default_rng(2)
    parameters = case.parameters(random, (NUM_STEPS,), *case.decades)
    natural = backend.natural_of(case.distribution(backend, parameters, dtype))
    start = backend.to_numpy(natural.flat())
    assert backend.to_numpy(natural.in_domain()).all()
    length = positive(random, (NUM_STEPS, 1), -3, 6)
    flat = random.normal(size=start.shape) * (np.abs(start) + random.integers(0, 2, start.shape)) * length
    rate = random.choice([1.0, 0.5, *random.uniform(size=3)], NUM_STEPS)
    flat[:3, 0] = np.nan, np.inf, -np.inf

    def step(natural, direction, rate):
        moved, straight = natural.safe_step(direction, rate), natural + direction * rate
        well_inside = straight.in_domain() & (natural + direction * (2 * rate / (1 + rate))).in_domain()
        return moved.flat(), moved.in_domain(), straight.flat(), well_inside

    # in parts: jaxlib 0.10 on two cores waits for ever in triangular solves of ten thousand matrices at once
    step, parts = backend.compiled(step), []
    for part in np.split(np.arange(NUM_STEPS), 10):
        here, direction = (natural.like(backend.array(value[part], dtype)) for value in (start, flat))
        parts.append([backend.to_numpy(value) for value in step(here, direction, backend.array(rate[part], dtype))])
    moved, inside, straight, well_inside = map(np.concatenate, zip(*parts, strict=True))
    assert moved.dtype == dtype
    assert inside.all()
    assert np.isfinite(moved).all()
    assert_array_equal(moved[:3], start[:3])
    assert_array_equal(moved[well_inside], straight[well_inside])
    assert well_inside.mean() > 0.05
    assert (moved != start).any(-1).mean() > 0.9


SOME = settings(max_examples=25)


@functools.cache
def compiled_rules(backend, case):
    def rules(natural, other, rate):
        expectation = natural.to_expectation()
        mixture = natural.step(other, rate)
        return {
            "again": natural.from_expectation(expectation).to_expectation().flat(),
            "expectation": expectation.flat(),
            "divergence": natural.kl_divergence(other),
            "inside": mixture.in_domain(),
            # of the Bregman divergence: three points on a line
            "there": natural.kl_divergence(mixture),
            "monotone": (other - natural).inner(other.to_expectation() - expectation),
        }

    return backend.compiled(rules)


@pytest.mark.slow
@every_case
@SOME
@given(seed=st.integers(0, 2**32 - 1), decades=st.floats(0, 1.5), rate=st.floats(0, 1))
def test_the_divergence_is_that_of_a_convex_function(backend, case, seed, decades, rate):
    random = np.random.default_rng(seed)
    natural, other = (
        backend.natural_of(case.distribution(backend, case.parameters(random, (3,), -decades, decades)))
        for _ in range(2)
    )
    found = compiled_rules(backend, case)(natural, other, backend.array(rate))
    found = SimpleNamespace(**{name: backend.to_numpy(value) for name, value in found.items()})
    assert found.inside.all()
    rounding = 1e-8 * (1 + np.abs(found.divergence))
    assert (found.divergence >= -rounding).all()
    assert (found.monotone >= -rounding).all()
    assert (found.there <= found.divergence + rounding).all()
    assert_near(found.again, found.expectation, factor=10)
