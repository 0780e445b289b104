"""Which parameters `BLR` moves: the Gaussian's, all of them and no other; the others by the host's own optimizer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from .. import cases, reference

# ---------------------------------------------------------------------------------------------------------------------
# Guides with something that is no Gaussian of its own


def model_of_one(host):
    """z ~ N(0, 1), y ~ N(z, 1/2): with y = 1.5 the posterior is N(1.2, 1/5)."""

    def model(y):
        z = host.sample("z", host.dist.Normal(0.0, 1.0))
        host.sample("y", host.dist.Normal(z, 0.5), obs=y)

    return model


def model_with_parameter(host):
    """The same about a center that is an ordinary parameter."""

    def model(y):
        center = host.param("center", host.array(0.3))
        z = host.sample("z", host.dist.Normal(center, 1.0))
        host.sample("y", host.dist.Normal(z, 0.5), obs=y)

    return model


def fixed_scale(host, model):
    def guide(y):
        host.sample("z", host.dist.Normal(host.param("loc", host.array(0.0)), 0.3))

    return guide


def exponential(xp, root):
    return xp.exp(root)


def softplus(xp, root):
    return xp.log1p(xp.exp(root))


def computed_scale(host, model):
    """A scale that is some function of a parameter is no parameter of the Gaussian."""

    def guide(y):
        loc, root = host.param("loc", host.array(0.0)), host.param("root", host.array(0.7))
        host.sample("z", host.dist.Normal(loc, root**2))

    return guide


def normal(host, model):
    def guide(y):
        loc = host.param("loc", host.array(0.0))
        scale = host.param("scale", host.array(1.0), constraint=host.constraints.positive)
        host.sample("z", host.dist.Normal(loc, scale))

    return guide


def unused_parameter(host, model):
    inner = normal(host, model)

    def guide(y):
        host.param("unused", host.array(np.array([1.0, 2.0])))
        inner(y)

    return guide


def quietly(fit, num_steps):
    """Steps of a fit whose first has already said what it has to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fit.run(num_steps)


def start_warned(backend, names: str, make_model, make_guide, **options):
    """One step of a fit that warns, once, of the parameters `names`."""
    with pytest.warns(UserWarning, match="BLR: the parameters") as caught:
        fit = backend.start(make_model, make_guide, (1.5,), **options).run(1)
    (message,) = [str(warning.message) for warning in caught]
    assert f"the parameters {names} belong to no site" in message
    assert "others" in message
    return fit


def test_a_fixed_scale_stays_and_its_location_is_exact(backend):
    fit = backend.start(model_of_one, fixed_scale, (1.5,), learning_rate=1.0).run(1)
    ((loc, covariance),) = fit.gaussians().values()
    assert_allclose(loc, 1.2, rtol=1e-13)
    assert_allclose(covariance, 0.09, rtol=1e-15)


def test_a_parameter_of_the_model_goes_to_the_other_optimizer_with_one_warning(backend):
    """Adam's first step is its rate, against the sign of the gradient; the Gaussian moves in the same step."""
    fit = start_warned(backend, "center", model_with_parameter, normal, learning_rate=1.0)
    assert_allclose(fit.params["center"], 0.3 - 0.01, rtol=1e-6)  # q is about 0, and Adam adds an epsilon
    ((loc, _),) = fit.gaussians().values()
    assert_allclose(loc, (0.3 + 4 * 1.5) / 5, rtol=1e-13)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit.run(3)


def test_the_other_optimizer_is_the_one_given(backend):
    """A step of 0.5 down a gradient of E[center − z]: in the first step z is drawn about 0 and later about m."""
    fit = start_warned(
        backend, "center", model_with_parameter, normal, learning_rate=1.0, others=backend.gradient_descent(0.5)
    )
    fit = quietly(fit, 60)
    # gradient descent settles where the center is the mean of z, the maximum of the marginal likelihood: y itself
    assert_allclose(fit.params["center"], 1.5, atol=0.35)


def test_a_computed_scale_is_left_to_the_other_optimizer(backend):
    fit = start_warned(backend, "root", model_of_one, computed_scale, learning_rate=1.0)
    ((loc, _),) = fit.gaussians().values()
    assert_allclose(loc, 1.2, rtol=1e-13)
    assert_allclose(np.abs(fit.params["root"] - 0.7), 0.01, rtol=1e-6)


def test_a_parameter_of_no_site_is_a_point_beside_the_sites(backend):
    """−log p is quadratic in (z, center), so one step is exact: the evidence N(y | center, 1.25) is largest at y."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = backend.start(model_with_parameter, normal, (1.5,)).run(1)
    assert_allclose(fit.params["center"], 1.5, rtol=1e-12)
    loc, covariance = fit.gaussians()["z"]
    assert_allclose([loc.item(), covariance.item()], [1.5, 0.2], rtol=1e-12)


def test_a_scale_of_the_prior_is_found_where_adam_has_hardly_begun(backend):
    """z_i ~ N(0, τ), y_i ~ N(z_i, 1): the evidence N(y_i | 0, 1 + τ²) is largest at τ² = mean(y²) − 1."""

    def make_model(host):
        def model(y):
            tau = host.param("tau", host.array(5.0), constraint=host.constraints.positive)
            with host.plate("rows", 12):
                z = host.sample("z", host.dist.Normal(0.0, tau))
                host.sample("y", host.dist.Normal(z, 1.0), obs=y)

        return model

    y = 2 * np.random.default_rng(0).normal(size=12)
    fit = backend.start(make_model, lambda host, model: host.autoguide.AutoNormal(model), (y,)).run(40)

    def evidence(variance):
        return -(np.log(variance) + y**2 / variance).sum() / 2

    assert evidence(1 + fit.params["tau"] ** 2) > evidence((y**2).mean()) - 0.1
    assert evidence(1 + 5.0**2) < evidence((y**2).mean()) - 8, "where it began"


def test_maximum_likelihood_is_newtons_method(backend):
    """A guide without a site: the mean and the standard deviation of the data, to rounding."""

    def make_model(host):
        def model(y):
            loc = host.param("loc", host.array(0.0))
            scale = host.param("scale", host.array(1.0), constraint=host.constraints.positive)
            with host.plate("rows", 9):
                host.sample("y", host.dist.Normal(loc, scale), obs=y)

        return model

    y = 2 + 0.5 * np.random.default_rng(0).normal(size=9)
    fit = backend.start(make_model, lambda host, model: lambda y: None, (y,)).run(15)
    assert_allclose([fit.params["loc"], fit.params["scale"]], [y.mean(), y.std()], rtol=1e-10)


@pytest.mark.parametrize(
    ("size", "options"),
    [(300, {}), (3, {"learning_rate": 0.5}), (3, {"others": "given"})],
    ids=["many", "rate", "others"],
)
def test_many_parameters_of_no_site_and_those_of_a_given_optimizer_are_no_points(backend, size, options):
    def make_model(host):
        def model(y):
            weights = host.param("weights", host.array(np.full(size, 0.1)))
            z = host.sample("z", host.dist.Normal(weights.sum() / size, 1.0))
            host.sample("y", host.dist.Normal(z, 0.5), obs=y)

        return model

    options = {key: backend.gradient_descent(0.01) if value == "given" else value for key, value in options.items()}
    start_warned(backend, "weights", make_model, normal, **options)


def test_parameters_of_a_site_that_the_guide_draws_by_itself_are_no_points(backend):
    """A Newton step in them would follow that site's noise: in AutoHierarchicalNormalMessenger to where all is lost."""

    def make_model(host):
        def model(y):
            center = host.sample("center", host.dist.Normal(0.0, 2.0))
            z = host.sample("z", host.dist.Normal(center, 1.0))
            host.sample("y", host.dist.Normal(z, 0.5), obs=y)

        return model

    def make_guide(host, model):
        def guide(y):
            positive = host.constraints.positive
            scale = host.param("scale", host.array(0.8), constraint=positive)
            center = host.sample("center", host.dist.Normal(host.param("loc", host.array(0.0)), scale))
            shift, width = (
                host.param("shift", host.array(0.0)),
                host.param("width", host.array(0.9), constraint=positive),
            )
            host.sample("z", host.dist.Normal(shift + 0.8 * center, width))

        return guide

    fit = start_warned(backend, "shift, width", make_model, make_guide)
    assert_allclose(np.abs(fit.params["shift"]), 0.01, rtol=1e-3)  # a step of Adam


@pytest.mark.parametrize("options", [{}, {"learning_rate": 1.0}], ids=["automatic", "rate 1"])
@pytest.mark.parametrize("made", [exponential, softplus], ids=lambda made: made.__name__)
def test_a_scale_that_the_guide_makes_by_exp_or_softplus_is_the_gaussians(backend, made, options):
    def make_guide(host, model):
        def guide(y):
            loc, root = host.param("loc", host.array(0.0)), host.param("root", host.array(0.7))
            host.sample("z", host.dist.Normal(loc, made(host.xp, root)))

        return guide

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = backend.start(model_of_one, make_guide, (np.array(1.5),), **options).run(1)
    ((loc, covariance),) = fit.gaussians().values()
    assert_allclose([loc.item(), covariance.item()], [1.2, 0.2], rtol=1e-12)
    assert_allclose(made(np, fit.params["root"]), 0.2**0.5, rtol=1e-12)


def test_an_unused_parameter_stays(backend):
    fit = quietly(backend.start(model_of_one, unused_parameter, (1.5,)), 4)
    assert_array_equal(fit.params["unused"], [1.0, 2.0])
    ((loc, covariance),) = fit.gaussians().values()
    assert_allclose([loc.item(), covariance.item()], [1.2, 0.2], rtol=1e-12)


def test_one_parameter_for_two_sites_is_no_gaussian_of_its_own(backend):
    def two_latents(host):
        def model(y):
            a = host.sample("a", host.dist.Normal(0.0, 1.0))
            b = host.sample("b", host.dist.Normal(0.0, 1.0))
            c = host.sample("c", host.dist.Normal(0.0, 1.0))
            host.sample("y", host.dist.Normal(a + b + c, 0.5), obs=y)

        return model

    def shared(host, model):
        def guide(y):
            loc = host.param("shared", host.array(0.1))
            host.sample("a", host.dist.Normal(loc, 0.3))
            host.sample("b", host.dist.Normal(loc, 0.3))
            host.sample("c", host.dist.Normal(host.param("own", host.array(0.2)), 0.3))

        return guide

    start_warned(backend, "shared", two_latents, shared, learning_rate=1.0)


def test_one_parameter_for_two_points_is_one_point(backend, random):
    """AutoLaplaceApproximation's latent vector and the model's are one array where the model has no other latent."""
    x, y = random.normal(size=(6, 3)), random.normal(size=6)

    def make(host):
        def model(x, y):
            weights = host.sample("weights", host.dist.Normal(host.array(np.zeros(3)), 2.0).to_event(1))
            with host.plate("data", 6):
                host.sample("y", host.dist.Normal((x * weights).sum(-1), 0.5), obs=y)

        return model

    fit = backend.start(make, lambda host, model: host.autoguide.AutoLaplaceApproximation(model), (x, y)).run(1)
    (point,) = fit.params.values()
    rows, targets = np.vstack([np.eye(3), x]), np.append(np.zeros(3), y)
    mean, _ = reference.linear_gaussian(rows, targets, np.repeat([2.0, 0.5], [3, 6]))
    assert_allclose(point, mean, rtol=1e-12)


def test_a_guide_without_a_gaussian_is_refused(backend):
    def gamma_model(host):
        def model(y):
            rate = host.sample("rate", host.dist.Gamma(2.0, 2.0))
            host.sample("y", host.dist.Poisson(rate), obs=y)

        return model

    def gamma_guide(host, model):
        def guide(y):
            concentration = host.param("concentration", host.array(2.0), constraint=host.constraints.positive)
            host.sample("rate", host.dist.Gamma(concentration, 2.0))

        return guide

    with pytest.raises(ValueError, match=r"expected a guide with sites.*the guide has 'rate': Gamma.*AutoNormal"):
        backend.start(gamma_model, gamma_guide, (3.0,)).run(1)


def test_a_site_without_numbers_is_left_alone(backend):
    """The weights of a regression without covariates: no warning, and draws are kept as without it."""

    def make(host):
        def model(x, y):
            host.sample("weights", host.dist.Normal(host.array(np.zeros(0)), 1.0).to_event(1))
            center = host.sample("center", host.dist.Normal(0.0, 1.0))
            host.sample("y", host.dist.Normal(center + x.sum(), 0.5), obs=y)

        return model

    fit = backend.start(make, lambda host, model: host.autoguide.AutoNormal(model), (np.zeros(0), 1.5)).run(2)
    assert_allclose(fit.params[fit.param_names("center")[0]], 1.2, rtol=1e-10)
    assert fit.gaussian_state().recycling is not None


def test_hutchinson_is_refused_for_a_full_rank_guide(backend):
    model = cases.linear()
    with pytest.raises(ValueError, match=r"full-rank or a low-rank site.*Use estimator='hessian'"):
        backend.start(model.make, cases.FULL_RANK.make, model.args, estimator="hutchinson").run(1)


# ---------------------------------------------------------------------------------------------------------------------
# Latents in a subsampled plate

ROWS = np.array([0.5, -1.0, 2.0, 0.3, 1.5, -0.3])
ROW_MEANS, ROW_SCALE = 4 * ROWS / 5, 0.2**0.5  # of z ~ N(0, 1), y ~ N(z, 1/2) in each row


def local_model(host):
    def model(y):
        with host.plate("rows", 6, subsample_size=2) as rows:
            z = host.sample("z", host.dist.Normal(0.0, 1.0))
            host.sample("y", host.dist.Normal(z, 0.5), obs=y[rows])

    return model


def global_and_local_model(host):
    def model(y):
        center = host.sample("a_center", host.dist.Normal(0.0, 1.0))
        with host.plate("rows", 6, subsample_size=2) as rows:
            z = host.sample("z", host.dist.Normal(center, 1.0))
            host.sample("y", host.dist.Normal(z, 0.5), obs=y[rows])

    return model


def auto_normal(host, model):
    return host.autoguide.AutoNormal(model, create_plates=lambda y: host.plate("rows", 6, subsample_size=2))


def rows_by_the_plate(host, model):
    """The plate itself takes the rows of a parameter with an `event_dim`."""

    def guide(y):
        with host.plate("rows", 6, subsample_size=2):
            loc = host.param("loc", host.array(np.linspace(-1.0, 1.0, 6)), event_dim=0)
            positive = host.constraints.positive
            scale = host.param("scale", host.array(np.full(6, 0.7)), constraint=positive, event_dim=0)
            host.sample("z", host.dist.Normal(loc, scale))

    return guide


def rows_by_hand(host, model):
    """The guide takes the rows of parameters that it has outside the plate, and exp of one of them."""

    def guide(y):
        loc = host.param("loc", host.array(np.linspace(-1.0, 1.0, 6)))
        log_scale = host.param("root", host.array(np.zeros(6)))
        with host.plate("rows", 6, subsample_size=2) as rows:
            host.sample("z", host.dist.Normal(loc[rows], host.xp.exp(log_scale[rows])))

    return guide


@pytest.mark.parametrize("guide", [auto_normal, rows_by_the_plate, rows_by_hand], ids=lambda make: make.__name__)
def test_rows_in_the_batch_get_their_own_posterior_and_the_others_stay(backend, guide):
    """N/M scales a row's prior, likelihood and entropy alike, so the row sees its data once; others, bit for bit."""
    fit = backend.start(local_model, guide, (ROWS,), learning_rate=1.0)
    loc, scale = sorted(fit.params)
    row_scale = np.log(ROW_SCALE) if guide is rows_by_hand else ROW_SCALE
    before = fit.params
    after = fit.run(1).params
    seen = np.abs(after[loc] - ROW_MEANS) < 1e-12
    assert seen.sum() == 2, "the rows of the batch"
    assert_array_equal(after[loc][~seen], before[loc][~seen])
    # to the precision and back, the first time
    assert_allclose(after[scale][~seen], before[scale][~seen], rtol=1e-15, atol=1e-15)
    for _ in range(15):
        before, after = after, fit.run(1).params
        moved = (after[loc] != before[loc]) | (after[scale] != before[scale])
        assert moved.sum() <= 2
        seen |= moved
        assert_allclose(after[loc][seen], ROW_MEANS[seen], rtol=1e-12)
        assert_allclose(after[scale][seen], row_scale, rtol=1e-12)
    assert seen.all()


def test_a_global_latent_beside_local_ones(backend):
    """Rows that all say the same make every minibatch exact at the optimum, so it is reached and not circled around.

    Few draws are as good as many, on a quadratic.
    """
    start = backend.start(global_and_local_model, auto_normal, (np.full(6, 1.3),), learning_rate=0.3, num_draws=4)
    fit = start.run(200)
    basis = np.eye(7)
    rows = [basis[0], *(basis[1:] - basis[0]), *basis[1:]]
    targets, scales = np.repeat([0.0, 1.3], [7, 6]), np.repeat([1.0, 0.5], [7, 6])
    mean, covariance = reference.linear_gaussian(np.array(rows), targets, scales)
    best = np.sqrt(np.diag(reference.best_in_structure(covariance, [[i] for i in range(7)])))
    center_loc, center_scale, locs, row_scales = (fit.params[name] for name in fit.param_names("a_center", "z"))
    # a row is seen every third step, and each that it is not seen at the center's side undoes part of the way
    assert_allclose(np.append(center_loc, locs), mean, rtol=1e-5)
    assert_allclose(np.append(center_scale, row_scales), best, rtol=1e-5)


def all_rows_model(host):
    def model(y):
        center = host.sample("a_center", host.dist.Normal(0.0, 1.0))
        with host.plate("rows", 6):
            z = host.sample("z", host.dist.Normal(center, 1.0))
            host.sample("y", host.dist.Normal(z, 0.5), obs=y)

    return model


@pytest.mark.parametrize(
    ("model", "guide", "options", "expected"),
    [
        (global_and_local_model, auto_normal, {}, 4),
        (global_and_local_model, auto_normal, {"num_draws": 6}, 6),
        (all_rows_model, lambda host, model: host.autoguide.AutoNormal(model), {}, 8),
    ],
    ids=["minibatch", "minibatch, given", "all data"],
)
def test_a_step_on_a_minibatch_takes_half_the_draws(backend, model, guide, options, expected):
    """More would say more of its own noise, and not of that which the draws share; a Hessian and a gradient a draw."""
    fit = backend.start(model, guide, (ROWS,), learning_rate=0.3, **options).run(1)
    assert fit.optimizer_state.gradient_evaluations == expected * (7 + 1)


def test_rows_outside_the_batch_stay_beside_a_global_latent(backend):
    """As `completed` promises: a row that the batch does not cover keeps its mean and its scale."""
    fit = backend.start(global_and_local_model, auto_normal, (ROWS,), learning_rate=0.3).run(12)
    _, _, loc, scale = fit.param_names("a_center", "z")
    before = fit.params
    after = fit.run(1).params
    assert (after[scale] != before[scale]).sum() <= 2
    assert (after[loc] != before[loc]).sum() <= 2


@pytest.mark.slow
def test_rows_and_a_global_latent_arrive_at_the_rate_that_is_chosen(backend):
    """The best mean field of all data, though the draws of a step have rows of a third of them."""
    fit = backend.start(global_and_local_model, auto_normal, (ROWS,)).run(400)
    basis = np.eye(7)
    rows = [basis[0], *(basis[1:] - basis[0]), *basis[1:]]
    targets, scales = np.concatenate([np.zeros(7), ROWS]), np.repeat([1.0, 0.5], [7, 6])
    mean, covariance = reference.linear_gaussian(np.array(rows), targets, scales)
    best = np.sqrt(np.diag(reference.best_in_structure(covariance, [[i] for i in range(7)])))
    center_loc, center_scale, locs, row_scales = (fit.params[name] for name in fit.param_names("a_center", "z"))
    assert_allclose(np.append(center_scale, row_scales), best, rtol=0.05)
    assert (np.abs(np.append(center_loc, locs) - mean) / best < 0.4).all()  # of the noise of the last batches


def test_particles_are_refused_where_each_would_see_other_rows(backend):
    with pytest.raises(ValueError, match=r"latent sites z.* lie in a subsampled plate.*Use num_particles=1"):
        backend.start(local_model, auto_normal, (ROWS,), loss=backend.loss(num_particles=2, vectorized=False)).run(1)
