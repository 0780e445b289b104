"""IVON in both hosts: the recursions, their estimates, their fixed point, and what is read off the model."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from .. import cases, reference
from ..cases import MEAN_FIELD
from ..reference import IVONSettings, Weights

PRECONDITIONERS = ("factored", "posterior")
preconditioners = pytest.mark.parametrize("preconditioner", PRECONDITIONERS)


# ---------------------------------------------------------------------------------------------------------------------
# The rule on given statistics

SHAPES = {"matrix": (3, 4), "column": (6, 1), "kernel": (4, 3, 2, 2), "vector": (5,), "scalar": ()}


def given_statistics(random, num_steps: int = 20):
    """A start, and ĝ and ĥ of every step: some ĥ so negative that the straight step would leave the domain."""
    loc = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
    gradients = [{name: random.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(num_steps)]
    estimates = [{name: 5 * random.normal(size=shape) for name, shape in SHAPES.items()} for _ in range(num_steps)]
    return loc, gradients, estimates


def priors_of(random) -> dict[str, tuple]:
    """(m₀, δ): of each element, of all, and none where the prior is not known."""
    return {
        "matrix": (random.normal(size=(3, 4)), random.uniform(0.01, 0.1, size=(3, 4))),
        "column": (np.zeros(()), np.full((), 0.05)),
        "kernel": (np.zeros(()), np.full((), 5.0)),  # a standard deviation of 0.063, below that of 128 inputs
        "vector": (np.full((), 0.3), random.uniform(0.01, 0.1, size=5)),
        "scalar": (np.zeros(()), np.zeros(())),
    }


OPTIONS = {
    "num_data": 50.0,
    "paired": False,
    "beta1": 0.8,
    "beta2": 0.9,
    "beta3": 0.95,
    "hess_init": 0.2,
    "clip_radius": 1.5,
}


def run_rule(bridge, preconditioner: str, random, paired: bool = False):
    loc, gradients, estimates = given_statistics(random)
    settings = bridge.ivon.Settings(preconditioner=preconditioner, **{**OPTIONS, "paired": paired})
    priors = {name: bridge.ivon.Prior(*map(bridge.array, pair)) for name, pair in priors_of(random).items()}
    priors["scalar"] = bridge.ivon_unknown_prior()
    state = bridge.ivon_init(loc, priors, settings)
    for count, (gradient, estimate) in enumerate(zip(gradients, estimates, strict=True)):
        found = None if paired and count % 2 == 0 else estimate
        state = bridge.ivon_step(state, gradient, found, priors, 0.3 / (1 + count), settings)
    return state


@pytest.mark.parametrize("paired", [False, True], ids=["alone", "paired"])
def test_twenty_factored_steps_equal_the_reference(backend, paired):
    loc, gradients, estimates = given_statistics(np.random.default_rng(3))
    random = np.random.default_rng(3)
    given_statistics(random)
    priors = priors_of(random)
    state = run_rule(backend, "factored", np.random.default_rng(3), paired)
    assert int(state.count) == 20
    halved = 0
    for name in SHAPES:
        options = {**OPTIONS, "paired": paired}
        settings = IVONSettings(prior_loc=priors[name][0], weight_decay=priors[name][1], **options)
        weights = Weights.at(loc[name], settings.hess_init)
        for count in range(20):
            before = weights.hessian
            estimate = None if paired and count % 2 == 0 else estimates[count][name]
            weights = reference.factored_ivon(weights, gradients[count][name], estimate, 0.3 / (1 + count), settings)
            halved += np.isclose(weights.hessian + settings.weight_decay, (before + settings.weight_decay) / 2).sum()
        # rounding of twenty steps on numbers of order one
        assert_allclose(backend.to_numpy(state.loc[name]), weights.loc, rtol=1e-12, atol=1e-13)
        assert_allclose(backend.to_numpy(state.momentum[name]), weights.momentum, rtol=1e-12, atol=1e-13)
        assert_allclose(backend.to_numpy(state.hessian[name]), weights.hessian, rtol=1e-12, atol=1e-13)
    assert halved > (10 if paired else 20), "the test met steps that would have left the domain"


def test_weights_without_a_gradient_stay_where_they_are(backend):
    """A row, a column and a whole site of which no gradient was ever seen, at the prior's mean: 0/0 is no direction."""
    gradient = {"some": np.ones((3, 4)), "none": np.zeros((2, 2)), "vector": np.array([1.0, 0.0])}
    gradient["some"][1] = gradient["some"][:, 2] = 0.0
    settings = backend.ivon.Settings(preconditioner="factored", **OPTIONS)
    priors = {name: backend.ivon.Prior(backend.array(0.0), backend.array(0.05)) for name in gradient}
    state = backend.ivon_init({name: np.zeros_like(value) for name, value in gradient.items()}, priors, settings)
    for _ in range(3):
        estimate = {name: np.full_like(value, 0.2) for name, value in gradient.items()}
        state = backend.ivon_step(state, gradient, estimate, priors, 0.1, settings)
    for name, value in gradient.items():
        loc = backend.to_numpy(state.loc[name])
        assert np.isfinite(loc).all()
        assert_array_equal(loc < 0, value > 0)
        assert_array_equal(loc[value == 0], 0.0)


def test_the_draws_begin_much_narrower_than_the_prior(backend):
    """h₀ = 63 δ where that is more than 0.1: σ₀ = s₀/8, elementwise; of an unknown prior 0.1; or as it is given."""
    make, prior = backend.ivon.Settings, backend.ivon.Prior(backend.array(0.0), backend.array([0.001, 0.1]))
    options = {**OPTIONS, "hess_init": None}
    loc, priors = {"w": np.zeros(2), "v": np.zeros(3)}, {"w": prior, "v": backend.ivon_unknown_prior()}
    for settings, w, v in (
        (make(preconditioner="factored", **options), [0.1, 6.3], 0.1),
        (make(preconditioner="posterior", **options), 0.1, 0.1),
        (make(preconditioner="factored", **{**options, "hess_init": 0.05}), 0.05, 0.05),
    ):
        state = backend.ivon_init(loc, priors, settings)
        assert_allclose(backend.to_numpy(state.hessian["w"]), np.broadcast_to(w, 2), rtol=1e-12)
        assert_allclose(backend.to_numpy(state.hessian["v"]), np.broadcast_to(v, 3), rtol=1e-12)


@preconditioners
def test_both_packages_take_the_same_steps_from_the_same_statistics(both, preconditioner):
    first, second = (run_rule(bridge, preconditioner, np.random.default_rng(4)) for bridge in both)
    for name in SHAPES:
        for field in ("loc", "momentum", "hessian"):
            left, right = (
                bridge.to_numpy(getattr(state, field)[name])
                for bridge, state in zip(both, (first, second), strict=True)
            )
            assert_allclose(left, right, rtol=1e-12, atol=1e-13)  # rounding of twenty steps


@preconditioners
def test_the_precision_stays_positive_whatever_the_estimates(backend, preconditioner):
    state = run_rule(backend, preconditioner, np.random.default_rng(5))
    priors = priors_of(np.random.default_rng(5))
    for name in set(SHAPES) - {"matrix", "vector"}:  # whose δ differs from element to element
        assert (backend.to_numpy(state.hessian[name]) + priors[name][1] > 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Twenty steps of the stock SVI, at the draws that the model was given

HOST_OPTIONS = {"beta1": 0.8, "beta2": 0.95, "beta3": 0.9, "hess_init": 0.3, "clip_radius": 0.8}


def reference_settings(prior: tuple, num_data: float, **options) -> IVONSettings:
    return IVONSettings(
        num_data=num_data, weight_decay=1 / (num_data * np.asarray(prior[1]) ** 2), prior_loc=prior[0], **options
    )


def start_network(backend, preconditioner: str, **options):
    """A fit of the network, and where its weights start."""
    network, random = cases.network(), np.random.default_rng(6)
    start = {name: 0.5 * random.normal(size=shape) for name, shape in network.shapes.items()}
    guide = cases.started("AutoNormal", start)
    options = {"preconditioner": preconditioner, **HOST_OPTIONS, **options}
    return backend.start(network.make, guide, network.args, rule="IVON", **options), start


@preconditioners
def test_twenty_steps_equal_the_recursion(backend, preconditioner):
    """At draws from the guide, with a schedule of the rate, one of the temperature, and a clip that bites.

    The loss of an update is −log p(y | w) at its draw and the KL divergence of q from the prior, which is exact.
    """
    network, num_data = cases.network(), 12.0
    fit, start = start_network(
        backend,
        preconditioner,
        learning_rate=backend.schedule(lambda count: 0.2 / (1 + 0.1 * count)),
        temperature=backend.schedule(lambda count: 2 / (1 + 0.2 * count)),
    )
    weights = {name: Weights.at(value, HOST_OPTIONS["hess_init"]) for name, value in start.items()}
    paired = preconditioner == "factored"
    clipped, noise = 0, []
    for count in range(20):
        second = paired and count % 2 == 1
        fit.run(1)
        rate, temperature = 0.2 / (1 + 0.1 * count), 2 / (1 + 0.2 * (count - second))
        options = {"temperature": temperature, "paired": paired, **HOST_OPTIONS}
        gradient, loss = network.gradient(fit.drawn), network.value(fit.drawn)
        noise.append([])
        for name, draw in fit.drawn.items():
            settings = reference_settings(network.priors[name], num_data, **options)
            loss += reference.kl_divergence(weights[name].loc, weights[name].scale(settings), *network.priors[name])
            slope, before = gradient[name] / num_data, weights[name].loc
            noise[-1] += np.ravel((draw - before) / weights[name].scale(settings)).tolist()
            if preconditioner == "posterior":
                weights[name] = reference.published_ivon(weights[name], draw, slope, rate, settings)
                unit = settings.hess_init + settings.weight_decay
            else:
                estimate = reference.factored_estimate(weights[name], draw, slope, settings) if second else None
                weights[name] = reference.factored_ivon(weights[name], slope, estimate, rate, settings)
                unit = np.minimum(network.priors[name][1], np.sqrt(128) * network.priors[name][1] ** 2)
            clipped += np.isclose(np.abs(before - weights[name].loc), rate * unit * settings.clip_radius).sum()
        if count > 0:  # Pyro's first is the host's, at a draw of its own
            assert_allclose(fit.losses[-1], loss, rtol=1e-10)
    assert clipped > 0
    if paired:
        assert_allclose(noise[1::2], -np.array(noise[::2]), rtol=1e-9, atol=1e-9)
        noise = noise[::2]
    noise = np.ravel(noise)  # 210 or 420 standard normal numbers: their moments within four standard errors
    assert abs(noise.mean()) < 4 / noise.size**0.5
    assert abs((noise**2).mean() - 1) < 4 * (2 / noise.size) ** 0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / noise.size**0.5
    for name, expected in weights.items():
        # twenty steps through a network, which stretches rounding a few hundredfold
        for field in ("loc", "momentum", "hessian"):
            assert_allclose(fit.ivon_arrays(field)[name], getattr(expected, field), rtol=1e-10, atol=1e-11)
        settings = reference_settings(network.priors[name], num_data, temperature=2 / (1 + 0.2 * 20), **HOST_OPTIONS)
        names = fit.param_names(name)
        assert_allclose(fit.params[names[0]], expected.loc, rtol=1e-10, atol=1e-11)
        assert_allclose(fit.params[names[1]], expected.scale(settings), rtol=1e-10)


def test_accumulated_updates_are_one_step_on_their_average(backend):
    network, num_data = cases.network(), 12.0
    fit, start = start_network(backend, "factored", accumulation_steps=3, learning_rate=0.1)
    weights = {name: Weights.at(value, HOST_OPTIONS["hess_init"]) for name, value in start.items()}
    for _ in range(2):
        found: dict[str, list] = {name: [] for name in weights}
        for update in range(3):
            before = fit.ivon_arrays("loc")
            fit.run(1)
            gradient = network.gradient(fit.drawn)
            for name, draw in fit.drawn.items():
                settings = reference_settings(network.priors[name], num_data, **HOST_OPTIONS)
                slope = gradient[name] / num_data
                found[name].append((slope, reference.factored_estimate(weights[name], draw, slope, settings)))
            if update < 2:
                assert all(np.array_equal(before[name], value) for name, value in fit.ivon_arrays("loc").items())
        for name, pairs in found.items():
            settings = reference_settings(network.priors[name], num_data, **HOST_OPTIONS)
            slope, estimate = np.mean([pair[0] for pair in pairs], 0), np.mean([pair[1] for pair in pairs], 0)
            weights[name] = reference.factored_ivon(weights[name], slope, estimate, 0.1, settings)
    state = fit.optimizer_state
    assert (int(state.weights.count), int(state.updates)) == (2, 6)
    for name, expected in weights.items():
        for field in ("loc", "momentum", "hessian"):  # rounding, through a network
            assert_allclose(fit.ivon_arrays(field)[name], getattr(expected, field), rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# The estimates


def statistics_of_updates(fit, num_updates: int) -> tuple[np.ndarray, np.ndarray]:
    """ĝ and ĥ of site z at each of these updates, none of which is a step."""
    sums = [fit.ivon_sums("z")]
    for _ in range(num_updates):
        fit.run(1)
        sums.append(fit.ivon_sums("z"))
    gradients, estimates = zip(*sums, strict=True)
    return np.diff(gradients, axis=0), np.diff(estimates, axis=0)


@pytest.mark.parametrize(
    ("preconditioner", "num_particles"), [("factored", 1), ("factored", 2), ("posterior", 1)], ids=str
)
def test_gradient_and_curvature_are_unbiased(backend, preconditioner, num_particles):
    """Against E_q[∇ℓ̄] and E_q[diag ∇²ℓ̄] in closed form, on a problem that is no quadratic, with ḡ ≠ 0 and h ≠ H."""
    problem, num_updates = cases.poisson(), 300

    def make(host):
        host = host if num_particles == 1 else replace_record(host)
        return cases.poisson_model(problem)(host)

    fit = backend.start(
        make,
        cases.started("AutoNormal", {"z": np.array([0.6, -0.4, 0.3, 0.5])}),
        (problem.inputs, problem.counts.astype(float)),
        loss=backend.loss(num_particles=num_particles, vectorized=False),
        rule="IVON",
        preconditioner=preconditioner,
        accumulation_steps=num_updates,
        learning_rate=1e-3,
        hess_init=0.4,
        beta2=0.9,
    )
    fit.run(num_updates)
    assert int(fit.optimizer_state.weights.count) == 1, "ḡ is there"
    loc, hessian = fit.ivon_arrays("loc")["z"], fit.ivon_arrays("hessian")["z"]
    gradients, estimates = statistics_of_updates(fit, num_updates - 1)
    covariance = np.diag(1 / (8 * hessian + 1))
    gradient, curvature = problem.expected_derivatives(loc, covariance)
    for draws, expected in ((gradients, gradient - loc), (estimates, np.diagonal(curvature) - 1)):  # less the prior's
        errors = draws.std(0) / len(draws) ** 0.5
        assert (np.abs(draws.mean(0) - expected / 8) < 4.5 * errors).all()
        assert (errors < 0.3 * np.abs(expected / 8).max()).all(), "the test can tell"


def start_at_rest(backend, make, args, start: np.ndarray, **options):
    """A fit whose mean stays where it is."""
    guide = cases.started("AutoNormal", {"z": start})
    return backend.start(
        make, guide, args, rule="IVON", learning_rate=backend.schedule(lambda count: 0.0 * count), **options
    )


def test_a_pair_of_draws_has_no_noise_of_the_first_order(backend):
    """On a quadratic the two gradients of a pair average E_q[∇ℓ̄], and ĥ is H whatever h and ḡ are."""
    model, loc, beta1, beta2 = cases.separable_means(), np.array([0.3, 0.3, -1.0]), 0.7, 0.9
    curvature = 5 / 0.5**2 / 15
    slope = curvature * (loc - model.args[0].mean(0))
    fit = start_at_rest(backend, model.make, model.args, loc, hess_init=0.4, beta1=beta1, beta2=beta2)
    fit.run(100)  # in which h is the plain mean
    for _ in range(3):
        momenta, hessians = [fit.ivon_arrays("momentum")["z"]], [fit.ivon_arrays("hessian")["z"]]
        for _ in range(2):
            fit.run(1)
            momenta.append(fit.ivon_arrays("momentum")["z"])
            hessians.append(fit.ivon_arrays("hessian")["z"])
        first, second = ((after - beta1 * before) / (1 - beta1) for before, after in pairwise(momenta))
        assert np.abs(first - slope).max() > 0.01, "each by itself has noise"
        assert_allclose((first + second) / 2, slope, rtol=1e-9)
        assert_array_equal(hessians[1], hessians[0])


def test_the_curvature_of_pairs_is_unbiased(backend):
    """Against E_q[diag ∇²ℓ̄] in closed form, on a problem that is no quadratic, where ḡ has half of the first's ĝ."""
    problem, loc, beta2, num_pairs = cases.poisson(), np.array([0.6, -0.4, 0.3, 0.5]), 0.999, 600
    args = (problem.inputs, problem.counts.astype(float))
    fit = start_at_rest(backend, cases.poisson_model(problem), args, loc, hess_init=0.4, beta1=0.5, beta2=beta2)
    fit.run(100)
    errors = []
    for _ in range(num_pairs):
        before = fit.ivon_arrays("hessian")["z"]
        fit.run(2)
        estimate = (fit.ivon_arrays("hessian")["z"] - beta2**2 * before) / (1 - beta2**2)
        _, curvature = problem.expected_derivatives(loc, np.diag(1 / (8 * before + 1)))
        expected = (np.diagonal(curvature) - 1) / 8  # less the prior's
        errors.append((estimate - expected) / expected)
    bound = 4.5 * np.std(errors, 0) / num_pairs**0.5
    assert (np.abs(np.mean(errors, 0)) < bound).all()
    assert bound.max() < 0.4, "the test can tell: half more, if the first's share in ḡ were forgotten"


def replace_record(host):
    """NumPyro has no mutable state beside several particles."""
    return SimpleNamespace(**{**vars(host), "record": lambda values: None})


def test_the_default_curvature_has_no_noise_where_the_surrogate_is_exact(backend):
    """On a diagonal quadratic with h = H and ḡ = E_q[∇ℓ̄]; the prior, known exactly, has no share in the estimates."""
    model, loc = cases.separable_means(), np.array([0.3, 0.3, -1.0])
    curvature = 5 / 0.5**2 / 15
    slope = curvature * (loc - model.args[0].mean(0))
    spread = {}
    for preconditioner in PRECONDITIONERS:
        fit = backend.start(
            model.make,
            cases.started("AutoNormal", {"z": loc}),
            model.args,
            rule="IVON",
            preconditioner=preconditioner,
            accumulation_steps=30,
            hess_init=curvature,
            beta1=0.9,
        ).with_ivon_momentum("z", 0.1 * slope)  # before the first step ḡ is debiased as after it
        _, estimates = statistics_of_updates(fit, 20)
        spread[preconditioner] = np.abs(estimates - curvature).max()
    assert spread["factored"] < 1e-12, "rounding alone"
    assert spread["posterior"] > 0.1, "the published estimate is not as lucky"


def test_particles_are_averaged(backend):
    """With a linear ℓ every draw has the same gradient, and two particles have it as well: not its double."""
    slope = np.array([1.0, -2.0])

    def make(host):
        def model():
            z = host.sample("z", host.dist.Normal(host.array(np.zeros(2)), 1.0).to_event(1))
            host.factor("linear", -(host.array(slope) * z).sum(-1))

        return model

    loss = backend.loss(num_particles=2, vectorized=backend.name == "numpyro")
    fit = backend.start(make, MEAN_FIELD.make, (), loss=loss, rule="IVON", beta1=0.75).run(1)
    assert_allclose(fit.ivon_arrays("momentum")["z"], 0.25 * slope, rtol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# The fixed point


def falling(backend, start: float, num_steps: int):
    """A rate that goes linearly to nearly nothing."""
    return backend.schedule(lambda count: start * (1 - count / (num_steps + 1)) ** 2 + 1e-6 * start)


def mean_field_optimum(model) -> tuple[np.ndarray, np.ndarray]:
    """The posterior mean, and the diagonal of the posterior precision."""
    mean, covariance = model.posterior
    return mean, np.diagonal(np.linalg.inv(covariance))


GUIDES = {guide.name: guide.make for guide in cases.GUIDES}
FITS = {
    "factored": (cases.separable_means, MEAN_FIELD.make, {}),
    "posterior": (cases.separable_means, MEAN_FIELD.make, {"preconditioner": "posterior"}),
    "tempered": (cases.separable_means, MEAN_FIELD.make, {"temperature": 2.0}),
    "a site that is none of the model's": (cases.separable_means, GUIDES["AutoDiagonalNormal"], {}),
    "by hand": (cases.separable_means, cases.means_by_hand, {}),
    "a prior that depends on another site": (cases.plates, MEAN_FIELD.make, {}),
    "a positive site": (cases.positive_means, MEAN_FIELD.make, {}),
    "minibatches": (cases.subsampled_means, MEAN_FIELD.make, {}),
    "masked and scaled": (cases.weighted_means, MEAN_FIELD.make, {}),
}
SETTINGS = {  # num_steps, first rate, β₂
    "factored": (300, 0.3, 0.97),
    "posterior": (1000, 0.5, 0.99),
}


@pytest.mark.parametrize(("make", "make_guide", "options"), FITS.values(), ids=FITS)
def test_the_mean_field_optimum_is_reached(backend, make, make_guide, options):
    """E_q[∇ℓ] = 0 and s_i = E_q[∇²ℓ]_ii/τ, in closed form for a Gaussian posterior."""
    model = make()
    temperature = options.get("temperature", 1.0)
    num_steps, rate, beta2 = SETTINGS[options.get("preconditioner", "factored")]
    fit = backend.start(
        model.make,
        make_guide,
        model.args,
        rule="IVON",
        learning_rate=falling(backend, rate, num_steps),
        beta2=beta2,
        hess_init=1.0,
        **options,
    ).run(num_steps)
    mean, precision = mean_field_optimum(model)
    gaussians = fit.gaussians()
    loc = np.concatenate([gaussians[name][0] for name in sorted(gaussians)])
    variances = np.concatenate([np.diagonal(gaussians[name][1]) for name in sorted(gaussians)])
    # four standard errors of draws of size σ, averaged over some hundred steps; an average of some tens of curvatures
    assert_allclose(loc, mean, rtol=0, atol=0.5 * (temperature / precision.max()) ** 0.5)
    assert_allclose(variances * precision / temperature, 1, atol=0.2)


def test_a_start_that_is_far_too_wide_is_left_at_once(backend):
    """The memory of 10,000 steps alone would have come one part in a hundred of the way."""
    model = cases.separable_means()
    fit = backend.start(model.make, MEAN_FIELD.make, model.args, rule="IVON", hess_init=0.01).run(100)
    assert_allclose(fit.ivon_arrays("hessian")["z"].mean(), 4 / 3, rtol=0.2)


@preconditioners
def test_the_loss_is_an_unbiased_estimate_of_the_negative_elbo(backend, preconditioner):
    """At a q that does not move, against its closed form, and against the host's own."""
    model, loc = cases.separable_means(), np.array([0.3, 0.3, -1.0])
    fit = backend.start(
        model.make,
        cases.started("AutoNormal", {"z": loc}),
        model.args,
        rule="IVON",
        preconditioner=preconditioner,
        learning_rate=backend.schedule(lambda count: 0.0 * count),
        beta2=1 - 1e-12,
        hess_init=100.0,  # more than the model has, so that nothing lifts it
    ).run(200)
    losses, (mean, precision) = np.array(fit.losses[1:]), mean_field_optimum(model)  # Pyro's first is the host's
    variances = 1 / (15 * (100.0 + 1 / (15 * np.array(cases.MEANS["scale"]) ** 2)))
    # KL(q ‖ posterior) − log p(y)
    distance = 0.5 * (precision * (variances + (loc - mean) ** 2) - np.log(precision * variances) - 1).sum()
    expected = distance + model.negative_log_evidence
    host = fit.evaluate(200)
    for values in (losses, host):
        assert abs(values.mean() - expected) < 4 * values.std() / len(values) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# What is read off the model


def observed(make_fn):
    """(host -> model): a mean z, and data that `make_fn(host, z)` observes."""

    def make(host):
        def model():
            make_fn(host, host.sample("z", host.dist.Normal(0.0, 1.0)))

        return model

    return make


def data(host, shape):
    return host.array(np.zeros(shape))


def plated(host, z):
    with host.plate("data", 6):
        host.sample("y", host.dist.Normal(z, 1.0), obs=data(host, 6))


def minibatch(host, z):
    with host.plate("data", 12, subsample_size=3):
        host.sample("y", host.dist.Normal(z, 1.0), obs=data(host, 3))


def scaled(host, z):
    with host.scale(2.5), host.plate("data", 6):
        host.sample("y", host.dist.Normal(z, 1.0), obs=data(host, 6))


def event(host, z):
    with host.plate("data", 5):
        host.sample("y", host.dist.Normal(z * data(host, (5, 3)), 1.0).to_event(1), obs=data(host, (5, 3)))


def expanded_event(host, z):
    with host.plate("data", 5):
        host.sample("y", host.dist.Normal(0 * z, 1.0).expand([3]).to_event(1), obs=data(host, (5, 3)))


def vectors(host, z):
    with host.plate("data", 4):
        host.sample("y", host.dist.MultivariateNormal(z + data(host, 3), host.array(np.eye(3))), obs=data(host, (4, 3)))


def mask_of_rows(host, z):
    with host.plate("data", 6), host.mask(host.integer(np.arange(6) < 4)):
        host.sample("y", host.dist.Normal(z, 1.0), obs=data(host, 6))


def mask_of_events(host, z):
    with host.plate("data", 5), host.mask(host.integer(np.arange(5) < 2)):
        host.sample("y", host.dist.Normal(z * data(host, (5, 3)), 1.0).to_event(1), obs=data(host, (5, 3)))


def mask_by_method(host, z):
    with host.plate("data", 6):
        host.sample("y", host.dist.Normal(z, 1.0).mask(host.integer(np.arange(6) < 4)), obs=data(host, 6))


def mask_of_a_minibatch(host, z):
    with host.plate("data", 12, subsample_size=3), host.mask(host.integer(np.array([True, False, True]))):
        host.sample("y", host.dist.Normal(z, 1.0), obs=data(host, 3))


def two_sites(host, z):
    plated(host, z)
    with host.scale(0.5):
        host.sample("x", host.dist.Normal(z, 1.0), obs=data(host, ()))


def nested(host, z):
    with host.plate("columns", 4, dim=-1), host.plate("rows", 10, subsample_size=2, dim=-2):
        host.sample("y", host.dist.Normal(z, 1.0), obs=data(host, (2, 4)))


NUM_DATA = {
    plated: 6, minibatch: 12, scaled: 15, event: 15, expanded_event: 15, vectors: 4, mask_of_rows: 4,
    mask_of_events: 6, mask_by_method: 4, mask_of_a_minibatch: 8, two_sites: 6.5, nested: 40,
}  # fmt: skip


@pytest.mark.parametrize(("make_fn", "num_data"), NUM_DATA.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_number_of_data_is_the_models(backend, make_fn, num_data):
    fit = backend.start(observed(make_fn), MEAN_FIELD.make, (), rule="IVON")
    assert fit.optimizer_state.settings.num_data == num_data


def several_priors(host):
    def model():
        center = host.sample("a", host.dist.Normal(0.5, 2.0))
        scale = host.sample("b", host.dist.LogNormal(0.0, 1.0))
        vector = host.sample("c", host.dist.Normal(host.array([0.0, 1.0]), host.array([1.0, 3.0])).to_event(1))
        child = host.sample("d", host.dist.Normal(center, 1.0))
        other = host.sample("e", host.dist.Normal(0.0, scale))
        heavy = host.sample("f", host.dist.StudentT(4.0, 0.0, 1.0))
        wide = host.sample("g", host.dist.Normal(0.0, 0.25).expand([2, 2]).to_event(2))
        with host.mask(host.integer(False)):
            flat = host.sample("h", host.dist.Normal(0.0, 1.0))
        total = center + vector.sum() + child + other + heavy + wide.sum() + flat
        with host.plate("data", 10):
            host.sample("y", host.dist.Normal(total, 1.0), obs=host.array(np.ones(10)))

    return model


def test_the_prior_is_the_models_where_it_is_a_normal_with_constant_parameters(backend):
    """m₀ and N δ = 1/s₀²; δ = 0 where the prior depends on another site, is masked, or is no Normal."""
    state = backend.start(several_priors, MEAN_FIELD.make, (), rule="IVON").optimizer_state
    priors = {name.removesuffix("_unconstrained"): prior for name, prior in state.priors.items()}
    for name, loc, precision in (("a", 0.5, 1 / 4), ("c", [0, 1], [1, 1 / 9]), ("g", np.zeros((2, 2)), 16.0)):
        assert_allclose(backend.to_numpy(priors[name].loc), loc, rtol=0, atol=0)
        assert_allclose(10 * backend.to_numpy(priors[name].precision) * np.ones_like(loc), precision, rtol=1e-14)
    assert all(float(priors[name].precision) == 0 for name in "bdefh")


def test_a_site_that_takes_no_part_in_the_likelihood_goes_to_its_prior(backend):
    """Its gradient is zero, or there is none; h decays, and the precision of the prior is left."""

    def make(host):
        def model():
            host.sample("idle", host.dist.Normal(1.0, 0.5))
            plated(host, host.sample("z", host.dist.Normal(0.0, 1.0)))

        return model

    fit = backend.start(
        make,
        cases.started("AutoNormal", {"idle": np.array(0.0), "z": np.array(0.0)}),
        (),
        rule="IVON",
        preconditioner="posterior",
        learning_rate=0.05,
        beta2=0.9,
        hess_init=0.1,
    ).run(250)
    loc, scale = (fit.params[name] for name in fit.param_names("idle"))
    # m goes by 0.05 (0.1 + δ)/(h + δ) of the distance a step, δ = 2/3: 0.95²⁵⁰ = 3e-6 is left. What h decays to is zero
    # but for the always positive second-order term
    assert_allclose(loc, 1.0, atol=1e-4)
    assert_allclose(scale, 0.5, rtol=0.02)


SEEN = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.01, 0.0]])


@pytest.mark.parametrize("prior_scale", [0.2, 10.0])
def test_no_element_of_a_step_is_out_of_proportion(backend, prior_scale):
    """Rows and columns say little of an element that few data see; a wide prior does not make the steps as wide.

    With no bound but the prior's, elements moved by thousands of units, and of 10 each.
    """

    def make(host):
        def model(x, y):
            first = host.sample("first", host.dist.Normal(host.array(np.zeros((4, 3))), prior_scale).to_event(2))
            second = host.sample("second", host.dist.Normal(host.array(np.zeros(3)), prior_scale).to_event(1))
            with host.plate("data", 4):
                host.sample("y", host.dist.Normal(host.xp.tanh(x @ first) @ second, 0.1), obs=y)

        return model

    start = {"first": np.linspace(-0.5, 0.5, 12).reshape(4, 3), "second": np.array([0.4, -0.2, 0.1])}
    guide = cases.started("AutoNormal", start)
    fit = backend.start(make, guide, (SEEN, np.array([1.0, -1.0, 0.5, 2.0])), rule="IVON")
    unit, longest, before = min(prior_scale, 0.3), 0.0, start
    for _ in range(25):
        params = fit.run(1).params
        after = {name: params[fit.param_names(name)[0]] for name in start}
        steps = [np.abs(after[name] - before[name]).max() / (0.05 * unit) for name in start]
        longest, before = max(longest, *steps), after
    assert 1 < longest <= 10 * (1 + 1e-12)
    assert max(np.abs(value).max() for value in before.values()) < 2


def test_the_parameters_of_no_site_move_by_the_other_optimizer(backend):
    """By the gradient of the loss itself, at the draw of the step."""
    y = np.array([1.5, 2.0, 3.0])

    def make(host):
        def model(y):
            shift = host.param("shift", host.array(0.3))
            z = host.sample("z", host.dist.Normal(0.0, 1.0))
            host.record({"z": z})
            with host.plate("data", 3):
                host.sample("y", host.dist.Normal(z + shift, 0.5), obs=y)

        return model

    with pytest.warns(UserWarning, match="IVON: the parameters shift belong to no site that IVON recognises"):
        fit = backend.start(make, MEAN_FIELD.make, (y,), rule="IVON", others=backend.gradient_descent(0.01)).run(1)
    gradient = ((fit.drawn["z"] + 0.3 - y) / 0.25).sum()
    assert_allclose(fit.params["shift"], 0.3 - 0.01 * gradient, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping, and what is not finite


@pytest.mark.parametrize(
    "options",
    [{}, {"preconditioner": "posterior"}, {"accumulation_steps": 3}],
    ids=["factored", "posterior", "accumulated"],
)
def test_resumed_equals_not_stopping_bit_for_bit(backend, options):
    """Debiasing goes on where it was, and so do the draws, half a pair, and the sums of an unfinished step."""
    fit, _ = start_network(backend, **{"preconditioner": "factored", **options})
    straight = fit.again(seed=0).run(8).params
    fit.again(seed=0).run(5)
    resumed = fit.stopped_and_resumed().run(3).params
    for name, value in straight.items():
        assert_array_equal(resumed[name], value)


def breakable(host):
    def model(y, trap):
        z = host.sample("z", host.dist.Normal(0.0, 1.0))
        with host.plate("data", 3):
            host.sample("y", host.dist.Normal(z, 0.5), obs=y)
        host.factor("trap", -host.xp.exp(trap + z**2))  # nothing, or minus infinity

    return model


SAFE, BROKEN = (np.ones(3), np.array(-1000.0)), (np.ones(3), np.array(800.0))


def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(backend):
    """But for the number of such updates, of which a warning tells; the next update goes on from there."""
    fit = backend.start(breakable, cases.started("AutoNormal", {"z": np.array(0.2)}), SAFE, rule="IVON").run(3)
    fields = ("loc", "momentum", "hessian")
    before, params = {field: fit.ivon_arrays(field) for field in fields}, fit.params
    safe, fit.args = fit.args, tuple(map(backend.argument, BROKEN))
    with pytest.warns(UserWarning, match="IVON: 1 of 4 steps had a loss or gradient that is not finite"):
        after = fit.run(1).params
    for field in fields:
        assert_array_equal(fit.ivon_arrays(field)["z"], before[field]["z"])
    assert all(np.array_equal(after[name], value) for name, value in params.items())
    state = fit.optimizer_state
    assert (int(state.weights.count), int(state.skipped)) == (3, 1)
    fit.args = safe
    fit.run(1)
    state = fit.optimizer_state
    assert (int(state.weights.count), int(state.skipped)) == (4, 1)
    assert np.isfinite(fit.ivon_arrays("loc")["z"]) and fit.ivon_arrays("loc")["z"] != before["loc"]["z"]
    assert_array_equal(fit.ivon_arrays("hessian")["z"], before["hessian"]["z"], "a new pair, whose first has no ĥ")


@pytest.mark.filterwarnings("ignore:Encountered:UserWarning", "ignore:IVON:UserWarning")
def test_ten_updates_of_which_none_is_finite_raise(backend):
    fit = backend.start(breakable, cases.started("AutoNormal", {"z": np.array(0.2)}), SAFE, rule="IVON")
    fit.args = tuple(map(backend.argument, BROKEN))
    assert np.isfinite(fit.run(9).ivon_arrays("loc")["z"])
    with pytest.raises(FloatingPointError, match=r"IVON: 10 of 10 steps.*init_to_median"):
        fit.run(1).params  # noqa: B018


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def no_data(host):
    return lambda: host.sample("z", host.dist.Normal(0.0, 1.0))


def local_latents(host):
    def model():
        with host.plate("data", 6, subsample_size=2):
            z = host.sample("z", host.dist.Normal(0.0, 1.0))
            host.sample("y", host.dist.Normal(z, 1.0), obs=data(host, 2))

    return model


def scaled_latent(host):
    def model():
        with host.scale(0.5):
            z = host.sample("z", host.dist.Normal(0.0, 1.0))
        plated(host, z)

    return model


def local_guide(host, model):
    def guide():
        with host.plate("data", 6, subsample_size=2):
            loc = host.param("loc", host.array(np.zeros(6)), event_dim=0)
            scale = host.param("scale", host.array(np.ones(6)), constraint=host.constraints.positive, event_dim=0)
            host.sample("z", host.dist.Normal(loc, scale))

    return guide


def gamma_guide(host, model):
    def guide():
        shape = host.param("shape", host.array(2.0), constraint=host.constraints.positive)
        rate = host.param("rate", host.array(2.0), constraint=host.constraints.positive)
        host.sample("z", host.dist.Gamma(shape, rate))

    return guide


def positive_plated(host):
    def model():
        plated(host, host.sample("z", host.dist.Gamma(2.0, 2.0)))

    return model


MODEL = observed(plated)
REFUSED = {
    "full rank": (MODEL, GUIDES["AutoMultivariateNormal"], r"mean-field guide.*is different.*AutoNormal"),
    "a point": (MODEL, GUIDES["AutoDelta"], r"with sites that are independent Normals.*'z': Delta.*AutoDiagonalNormal"),
    "another family": (positive_plated, gamma_guide, r"mean-field guide.*'z' is different.*AutoNormal"),
    "no data": (no_data, MEAN_FIELD.make, r"no data.*obs=.*BLR"),
    "local latents": (local_latents, local_guide, r"the latent site 'z' is scaled or lies in a subsampled.*BLR"),
    "a scaled latent": (scaled_latent, MEAN_FIELD.make, r"the latent site 'z' is scaled.*temperature"),
}


@pytest.mark.parametrize(("make", "make_guide", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why_and_what_to_take(backend, make, make_guide, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        backend.start(make, make_guide, (), rule="IVON").run(1)
