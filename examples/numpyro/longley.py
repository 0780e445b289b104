"""How did employment move with six economic series that all rise together?

Longley's table (1967), sixteen years of the United States, is the classic trial of a least-squares program: its
columns are nearly collinear and their units differ ten-thousandfold. With the noise known the posterior is Gaussian
and known in closed form, so the answer can be checked: `BLR` on the raw units gives each coefficient its exact mean
and standard deviation, all but the last few digits of float64. (The first of the hundred steps does.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from statsmodels.datasets import longley

from numpyro_blr import BLR

numpyro.enable_x64()  # the columns' collinearity eats most of float32's digits

INTERCEPT_SCALE = 1000.0  # thousands of people in work, as the response
NOISE_SCALE = 304.85  # the residual standard deviation of ordinary least squares, taken as known


def data() -> tuple[jax.Array, jax.Array, jax.Array]:
    """The six series and employment, centred by their means but not scaled, and the coefficients' prior scales.

    A coefficient of 5 sd(y) / sd(x_j) is already a violent one: a series alone moving employment five times too far.
    """
    table = longley.load()
    x, y = table.exog.to_numpy(), table.endog.to_numpy()
    prior_scale = 5 * y.std() / x.std(axis=0)
    return jnp.asarray(x - x.mean(axis=0)), jnp.asarray(y - y.mean()), jnp.asarray(prior_scale)


def model(x, y, prior_scale):
    coefficients = numpyro.sample("coefficients", dist.Normal(0.0, prior_scale).to_event(1))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, INTERCEPT_SCALE))
    with numpyro.plate("years", len(x)):
        numpyro.sample("employment", dist.Normal(intercept + x @ coefficients, NOISE_SCALE), obs=y)


def exact_posterior(x, y, prior_scale) -> tuple[jax.Array, jax.Array]:
    """Mean and covariance of (coefficients, intercept): Λ = XᵀX / σ² + diag(1 / s²), Λ m = Xᵀy / σ²."""
    design = jnp.column_stack([x, jnp.ones(len(x))])
    scale = jnp.append(prior_scale, INTERCEPT_SCALE)
    precision = design.T @ design / NOISE_SCALE**2 + jnp.diag(scale**-2)
    return jnp.linalg.solve(precision, design.T @ y / NOISE_SCALE**2), jnp.linalg.inv(precision)


def main() -> None:
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, BLR(), Trace_ELBO())
    result = svi.run(jax.random.key(0), 100, *data(), progress_bar=False)
    posterior = guide.get_posterior(result.params)
    loc, scale = posterior.mean, jnp.sqrt(posterior.variance)

    exact_loc, exact_covariance = exact_posterior(*data())
    exact_scale = jnp.sqrt(jnp.diag(exact_covariance))
    print("                   BLR             exact")
    names = [*longley.load().exog, "intercept"]
    for row in zip(names, loc, scale, exact_loc, exact_scale, strict=True):
        print("{:9} {:9.3f} ± {:7.3f}  {:9.3f} ± {:7.3f}".format(*row))
    np.testing.assert_array_less(jnp.abs(loc - exact_loc), 1e-8 * exact_scale)
    np.testing.assert_allclose(scale, exact_scale, rtol=1e-8)


if __name__ == "__main__":
    main()
