"""Exact conjugacy, found and not declared: one step is Bayes' rule, a sweep is coordinate-ascent variational Bayes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from ..conjugate import CONDITIONAL, CONJUGATE, gamma_poisson, normal_wishart, regression

SWEEPS = 4


def sorted_by_time(makes, *, compiled_long=(), long=()):
    """The cases, some of them left out of a quick run in NumPyro, and some in both."""
    marks = {make: pytest.mark.slow_to_compile for make in compiled_long} | {make: pytest.mark.slow for make in long}
    return [pytest.param(make, marks=marks.get(make, ()), id=make.__name__) for make in makes]


def assert_natural(found: dict, expected: dict, rtol: float) -> None:
    assert found.keys() >= expected.keys()
    for site, leaves in expected.items():
        for actual, desired in zip(found[site], leaves, strict=True):
            scale = np.abs(desired).max() if np.ndim(desired) else abs(desired)
            np.testing.assert_allclose(actual, np.broadcast_to(desired, actual.shape), rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("make", sorted_by_time(CONJUGATE, compiled_long=[normal_wishart]))
def test_one_full_step_is_the_exact_posterior(backend, make):
    case = make()
    with backend.promotion(lax=case.lax):
        fit = backend.start_families(case.make, case.args, case.options, learning_rate=1.0)
        assert_natural(fit.run(1).naturals(), case.posterior, rtol=1e-8)


@pytest.mark.parametrize("make", [regression, gamma_poisson], ids=lambda make: make.__name__)
def test_the_exact_posterior_is_a_fixed_point_of_the_default_rule_and_its_loss_is_exact(backend, make):
    case = make()
    fit = backend.start_families(case.make, case.args, case.options).run(3)
    assert_natural(fit.naturals(), case.posterior, rtol=1e-8)
    # nothing is drawn: two losses at the same posterior are the same number
    np.testing.assert_allclose(fit.losses[1], fit.losses[2], rtol=1e-10)


@pytest.mark.parametrize("make", sorted_by_time(CONDITIONAL, compiled_long=CONDITIONAL[:1], long=CONDITIONAL[2:]))
def test_a_sweep_is_coordinate_ascent(backend, make):
    case = make()
    with backend.promotion(lax=case.lax):
        fit = backend.start_families(case.make, case.args, {"start": case.start}, learning_rate=1.0)
        expected = fit.naturals()
        for _ in range(SWEEPS):
            expected = {**expected, **case.sweep(expected)}
        found = fit.run(SWEEPS).naturals()
    assert_natural(found, {name: expected[name] for name in case.sweep(expected)}, rtol=1e-8)


def gamma_poisson_in_batches(host):
    def model(counts):
        rate = host.sample("rate", host.dist.Gamma(2.0, 0.5))
        with host.plate("data", 12, subsample_size=4) as rows:
            host.sample("counts", host.dist.Poisson(rate), obs=counts[rows])

    return model


@pytest.mark.parametrize("learning_rate", [1.0, 0.25])
def test_a_subsampled_plate_gives_the_stochastic_update(backend, learning_rate):
    """λ ← (1 − ρ) λ + ρ (λ₀ + N/M Σ_batch T), where the total of every batch of four is the same by construction."""
    counts = np.full(12, 3.0)
    fit = backend.start_families(gamma_poisson_in_batches, (counts,), {}, learning_rate=learning_rate)
    ((log, linear),) = fit.naturals().values()
    expected = (
        (1 - learning_rate) * log + learning_rate * (1 + 36),
        (1 - learning_rate) * linear + learning_rate * (-0.5 - 12),
    )
    assert_natural(fit.run(1).naturals(), {"rate": expected}, rtol=1e-10)


def test_local_sites_of_a_subsampled_plate_move_only_in_the_batch_and_all_the_way(backend):
    counts = np.arange(12.0)

    def make(host):
        def model(counts):
            with host.plate("data", 12, subsample_size=4) as rows:
                rate = host.sample("rate", host.dist.Gamma(2.0, 0.5))
                host.sample("counts", host.dist.Poisson(rate), obs=counts[rows])

        return model

    fit = backend.start_families(make, (counts,), {}, learning_rate=0.3)
    before = fit.naturals()["rate"]
    after = fit.run(1).naturals()["rate"]
    moved = after[0] != before[0]
    assert moved.sum() == 4
    np.testing.assert_allclose(after[0][moved], (1 + counts)[moved], rtol=1e-10)
    np.testing.assert_allclose(after[1][moved], np.full(4, -1.5), rtol=1e-10)
    np.testing.assert_array_equal(after[1][~moved], before[1][~moved])


def test_extreme_concentrations_and_counts(backend, random):
    """Prior concentrations from 1e-6 to 1e8 and up to a billion counts: two steps from a start that knows nothing."""

    def make(host):
        def model(a, b, successes, failures):
            share = host.sample("share", host.dist.Beta(a, b))
            rate = host.sample("rate", host.dist.Gamma(a, b))
            with host.plate("data", 1):
                log_likelihood = successes * (host.xp.log(share) + host.xp.log(rate))
                log_likelihood = log_likelihood + failures * (host.xp.log1p(-share) - rate)
                nothing = host.array(np.zeros(1))
                host.sample("y", host.dist.Delta(nothing, log_density=log_likelihood), obs=nothing)

        return model

    start = tuple(np.array(value) for value in (1.0, 1.0, 3.0, 2.0))
    fit = backend.start_families(make, start, {}, learning_rate=1.0)
    for _ in range(8):
        a, b = 10 ** random.uniform(-6, 8, size=2)
        successes, failures = 10 ** random.uniform(0, 9, size=2)
        found = fit.anew(a, b, successes, failures).run(2).naturals()
        np.testing.assert_allclose(found["share"], (a - 1 + successes, b - 1 + failures), rtol=1e-8)
        np.testing.assert_allclose(found["rate"], (a - 1 + successes, -b - failures), rtol=1e-8)


def test_a_hand_written_stock_guide_gets_the_same_updates(backend):
    """The coin of the hosts' tutorials on stochastic variational inference."""
    tosses = np.array([1.0] * 6 + [0.0] * 4)

    def make_model(host):
        def model(data):
            fairness = host.sample("latent_fairness", host.dist.Beta(10.0, 10.0))
            with host.plate("N", len(data)):
                host.sample("obs", host.dist.Bernoulli(fairness), obs=data)

        return model

    def make_guide(host, model):
        def guide(data):
            alpha = host.param("alpha_q", host.array(15.0), constraint=host.constraints.positive)
            beta = host.param("beta_q", host.array(15.0), constraint=host.constraints.positive)
            host.sample("latent_fairness", host.dist.Beta(alpha, beta))

        return guide

    fit = backend.start(make_model, make_guide, (tosses,), learning_rate=1.0).run(1)
    np.testing.assert_allclose([fit.params["alpha_q"], fit.params["beta_q"]], [16.0, 14.0], rtol=1e-10)


def test_every_family_of_a_stock_guide_by_hand_is_recognised(backend):
    """By concentrations, by logits and by probabilities; the model has no data, so that the prior is the answer."""

    def make_model(host):
        def model():
            host.sample("shares", host.dist.Dirichlet(host.array([1.0, 2.0, 3.0])))
            host.sample("rate", host.dist.Gamma(host.array(2.0), 0.5))
            host.sample("which", host.dist.Categorical(host.array([0.2, 0.3, 0.5])))
            host.sample("other", host.dist.Categorical(host.array([0.5, 0.5])))
            host.sample("switch", host.dist.Bernoulli(host.array(0.3)))

        return model

    def make_guide(host, model):
        def guide():
            positive, simplex = host.constraints.positive, host.constraints.simplex
            shares = host.param("shares_concentration", host.array(np.ones(3)), constraint=positive)
            host.sample("shares", host.dist.Dirichlet(shares))
            concentration = host.param("concentration", host.array(1.0), constraint=positive)
            host.sample(
                "rate", host.dist.Gamma(concentration, host.param("rate_", host.array(1.0), constraint=positive))
            )
            host.sample("which", host.dist.Categorical(logits=host.param("logits", host.array(np.zeros(3)))))
            probs = host.param("probs", host.array([0.4, 0.6]), constraint=simplex)
            host.sample("other", host.dist.Categorical(probs))
            host.sample("switch", host.dist.Bernoulli(logits=host.param("logit", host.array(0.0))))

        return guide

    with backend.promotion(lax=True):
        loss = backend.loss(backend.discrete_loss)
        params = backend.start(make_model, make_guide, (), loss=loss, learning_rate=1.0).run(1).params
    np.testing.assert_allclose(params["shares_concentration"], [1.0, 2.0, 3.0], rtol=1e-8)
    np.testing.assert_allclose([params["concentration"], params["rate_"]], [2.0, 0.5], rtol=1e-8)
    logits = np.exp(params["logits"])
    np.testing.assert_allclose(logits / logits.sum(), [0.2, 0.3, 0.5], rtol=1e-8)
    np.testing.assert_allclose(params["probs"], [0.5, 0.5], rtol=1e-8)
    np.testing.assert_allclose(params["logit"], np.log(0.3 / 0.7), rtol=1e-8)


def test_a_stopped_fit_goes_on_as_if_it_had_not_stopped(backend):
    """With minibatches, whose rate the state carries."""
    counts = np.random.default_rng(0).poisson(4.0, size=12).astype(float)
    whole = backend.start_families(gamma_poisson_in_batches, (counts,), {}).run(6)
    parts = backend.start_families(gamma_poisson_in_batches, (counts,), {}).run(3)
    np.testing.assert_array_equal(parts.stopped_and_resumed().run(3).naturals()["rate"], whole.naturals()["rate"])


def test_natural_param_in_a_guide_by_hand(backend):
    counts = np.array([3.0, 5.0, 2.0])

    def make_model(host):
        def model(counts):
            with host.plate("data", 3):
                rate = host.sample("rate", host.dist.Gamma(2.0, 0.5))
                host.sample("counts", host.dist.Poisson(rate), obs=counts)

        return model

    def make_guide(host, model):
        def guide(counts):
            with host.plate("data", 3):
                start = host.dist.Gamma(host.array(np.ones(3)), host.array(np.ones(3)))
                host.sample("rate", backend.natural_param("rate_natural", start))

        return guide

    fit = backend.start(make_model, make_guide, (counts,), learning_rate=1.0).run(1)
    log, linear = backend.natural_leaves(fit, "rate_natural")
    np.testing.assert_allclose(log, 1 + counts, rtol=1e-10)
    np.testing.assert_allclose(linear, np.full(3, -1.5), rtol=1e-10)


def test_natural_param_starts_at_a_distribution_that_is_expanded_and_moved_to_the_event(backend):
    y = np.array([1.0, 2.0, 4.0])

    def make_model(host):
        def model(y):
            weights = host.sample("w", start(host))
            host.sample("y", host.dist.Normal(weights, 0.5).to_event(1), obs=y)

        return model

    def start(host):
        return host.dist.Normal(host.array(0.0), host.array(1.0)).expand((3,)).to_event(1)

    def make_guide(host, model):
        return lambda y: host.sample("w", backend.natural_param("w_natural", start(host)))

    fit = backend.start(make_model, make_guide, (y,), learning_rate=1.0).run(1)
    linear, quadratic = backend.natural_leaves(fit, "w_natural")
    np.testing.assert_allclose(linear, 4 * y, rtol=1e-10)
    np.testing.assert_allclose(quadratic, np.full(3, -2.5), rtol=1e-10)


def test_cells_that_meet_in_a_term_cannot_be_summed_one_by_one(backend):
    def make(host):
        def model(y):
            with host.plate("switches", 3):
                switch = host.sample("switch", host.dist.Bernoulli(0.3))
            host.sample("y", host.dist.Normal(1.0 * switch.sum(), 1.0), obs=y)

        return model

    with backend.promotion(lax=True), pytest.raises(ValueError, match="'switch' is summed cell by cell"):
        backend.start_families(make, (np.array(2.0),), {}).run(1)


def test_temperature_divides_the_natural_parameters(backend):
    """λ = −∇_μ E_q[ℓ] / τ minimises E_q[ℓ] − τ H(q)."""
    case = gamma_poisson()
    fit = backend.start_families(case.make, case.args, {}, learning_rate=1.0, temperature=2.0)
    cold = {"rate": tuple(leaf / 2 for leaf in case.posterior["rate"])}
    assert_natural(fit.run(1).naturals(), cold, rtol=1e-8)


def test_the_analytic_loss_of_the_host_gives_the_same(backend):
    case = gamma_poisson()

    def make_guide(host, model):
        return backend.guides.AutoExponentialFamily(model)

    loss = backend.loss("TraceMeanField_ELBO")
    fit = backend.start(case.make, make_guide, case.args, loss=loss, learning_rate=1.0)
    assert_natural(fit.run(1).naturals(), case.posterior, rtol=1e-8)


def test_a_parameter_of_the_model_is_moved_beside_the_members(backend):
    """rate ~ Gamma(2, b) with b a parameter, whose best value has E_q[rate] = 2/b."""
    counts = np.array([3.0, 5.0, 4.0])

    def make(host):
        def model(counts):
            scale = host.param("scale", host.array(1.0), constraint=host.constraints.positive)
            rate = host.sample("rate", host.dist.Gamma(2.0, scale))
            with host.plate("data", 3):
                host.sample("counts", host.dist.Poisson(rate), obs=counts)

        return model

    with pytest.warns(UserWarning, match="the parameters scale belong to no site"):
        fit = backend.start_families(make, (counts,), {}, others=backend.gradient_descent(0.1)).run(60)
    scale = fit.params["scale"]
    log, linear = fit.naturals()["rate"]
    np.testing.assert_allclose(linear, -scale - 3, rtol=0.02)  # of the step before
    assert abs(2 / scale - (log + 1) / -linear) < 0.2


# name -> (latents of the host, the likelihood given them, the one observation that all rows have, λ with 12 rows of it)
SUBSAMPLED = {
    "normal": (
        lambda host: host.sample("mu", host.dist.Normal(1.0, 10.0)),
        lambda host, mu: host.dist.Normal(mu, 2.0),
        0.7,
        {"mu": (0.01 + 12 * 0.7 / 4, -(0.01 + 3) / 2)},
    ),
    "beta": (
        lambda host: host.sample("share", host.dist.Beta(2.0, 3.0)),
        lambda host, share: host.dist.Bernoulli(share),
        1.0,
        {"share": (13.0, 2.0)},
    ),
    "exponential": (
        lambda host: host.sample("rate", host.dist.Gamma(2.0, 0.5)),
        lambda host, rate: host.dist.Exponential(rate),
        0.7,
        {"rate": (13.0, -0.5 - 12 * 0.7)},
    ),
    "normal-gamma": (
        lambda host: normal_and_gamma(host),
        lambda host, pair: host.dist.Normal(pair[0], pair[1] ** -0.5),
        0.7,
        {"mu,tau": (1.5 + 6, -1.25 - 6 * 0.49, 0.5 + 12 * 0.7, -12.5 / 2)},
    ),
}


def normal_and_gamma(host):
    tau = host.sample("tau", host.dist.Gamma(2.0, 1.0))
    return host.sample("mu", host.dist.Normal(1.0, (0.5 * tau) ** -0.5)), tau


@pytest.mark.parametrize("name", SUBSAMPLED)
def test_minibatches_that_say_the_same_as_all_data_give_the_exact_posterior(backend, name):
    latents, likelihood, value, posterior = SUBSAMPLED[name]

    def make(host):
        def model(y):
            latent = latents(host)
            with host.plate("data", 12, subsample_size=3) as rows:
                host.sample("y", likelihood(host, latent), obs=y[rows])

        return model

    fit = backend.start_families(make, (np.full(12, value),), {}, learning_rate=1.0)
    assert_natural(fit.run(1).naturals(), posterior, rtol=1e-8)


def test_sites_that_start_at_the_same_natural_parameters_are_told_apart(backend):
    """At λ = 0, which no factor moves: two fair coins that have data, and two dice that have none."""

    def make(host):
        def model(y):
            coins = [host.sample(f"coin_{name}", host.dist.Bernoulli(host.array(0.5))) for name in "ab"]
            for name in "ab":
                host.sample(f"die_{name}", host.dist.Categorical(host.array([0.5] * 2)))
            host.sample("y", host.dist.Normal(2.0 * coins[0] - 3.0 * coins[1], 1.0), obs=y)

        return model

    with backend.promotion(lax=True), warnings.catch_warnings():
        warnings.filterwarnings("error", ".*belong to no site")
        naturals = backend.start_families(make, (np.array(2.0),), {}, learning_rate=1.0).run(15).naturals()
    density = -((2.0 - np.array([[0.0, -3.0], [2.0, -1.0]])) ** 2) / 2  # of y, by both coins
    logits = np.array([naturals["coin_a"][0], naturals["coin_b"][0]])
    (not_a, not_b), (a, b) = 1 / (1 + np.exp(logits)), 1 / (1 + np.exp(-logits))
    assert_natural(
        naturals,
        {
            "coin_a": ((density[1] - density[0]) @ [not_b, b],),  # coordinate ascent's fixed point
            "coin_b": ((density[:, 1] - density[:, 0]) @ [not_a, a],),
        },
        rtol=1e-8,
    )
    for name in "ab":
        assert np.ptp(naturals[f"die_{name}"][0]) < 1e-12


def test_sites_that_meet_under_one_value_of_a_switch_alone_are_not_taken_for_strangers(backend):
    """y ~ N(s μ, 1/τ) with s ~ Bernoulli(1/2), which starts at either value: a sweep against coordinate ascent."""
    y = np.array([1.0, 2.5, 0.5])

    def make(host):
        def model(y):
            switch = host.sample("switch", host.dist.Bernoulli(host.array(0.5)))
            mu = host.sample("mu", host.dist.Normal(host.array(0.0), 3.0))
            tau = host.sample("tau", host.dist.Gamma(host.array(2.0), 1.0))
            with host.plate("data", 3):
                host.sample("y", host.dist.Normal(switch * mu, tau**-0.5), obs=y)

        return model

    def sweep(natural):
        """Sites without plates are taken in the order of the model."""
        (linear, quadratic), (log, rate) = natural["mu"], natural["tau"]
        loc, variance, precision = linear / (-2 * quadratic), 1 / (-2 * quadratic), (log + 1) / -rate
        logit = precision * (y.sum() * loc - 3 * (loc**2 + variance) / 2)
        on = 1 / (1 + np.exp(-logit))
        quadratic = -(1 / 9 + 3 * on * precision) / 2
        linear = on * precision * y.sum()
        loc, variance = linear / (-2 * quadratic), 1 / (-2 * quadratic)
        error = (y**2).sum() - 2 * on * y.sum() * loc + 3 * on * (loc**2 + variance)
        return {"switch": (logit,), "mu": (linear, quadratic), "tau": (2.5, -1 - error / 2)}

    with backend.promotion(lax=True):
        fit = backend.start_families(make, (y,), {}, learning_rate=1.0)
        expected = sweep(sweep(fit.naturals()))
        assert_natural(fit.run(2).naturals(), expected, rtol=1e-8)
