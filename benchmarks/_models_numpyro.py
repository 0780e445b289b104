"""The ten posteriors of `reference.py` as NumPyro models. Each takes the posterior's data, arrays by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

__all__ = ["MODELS"]


def flat(support=constraints.real, shape: tuple[int, ...] = ()) -> dist.Distribution:
    """A constant density on the support: what Stan means by a parameter without a prior."""
    return dist.ImproperUniform(support, (), event_shape=shape)


def ar5(K: int, y: Array) -> None:
    alpha = numpyro.sample("alpha", dist.Normal(0, 10))
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([K]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lagged = jnp.stack([y[K - 1 - k : len(y) - 1 - k] for k in range(K)], axis=-1)
    with numpyro.plate("times", len(y) - K):
        numpyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y[K:])


def blr_correlated(X: Array, y: Array) -> None:
    beta = numpyro.sample("beta", dist.Normal(0, 10).expand([X.shape[1]]).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def flat_regression(x: Array, y: Array) -> None:
    beta = numpyro.sample("beta", flat(constraints.real_vector, (x.shape[1],)))
    sigma = numpyro.sample("sigma", flat(constraints.positive))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def earnings_interaction(earn: Array, height: Array, male: Array) -> None:
    flat_regression(jnp.stack([jnp.ones_like(height), height, male, height * male], axis=-1), jnp.log(earn))


def mesquite_log(
    weight: Array, diam1: Array, diam2: Array, canopy_height: Array, total_height: Array, density: Array, group: Array
) -> None:
    logs = [jnp.log(column) for column in (diam1, diam2, canopy_height, total_height, density)]
    flat_regression(jnp.stack([jnp.ones_like(group), *logs, group], axis=-1), jnp.log(weight))


def nes2000(
    partyid7: Array,
    real_ideo: Array,
    race_adj: Array,
    age_discrete: Array,
    educ1: Array,
    gender: Array,
    income: Array,
) -> None:
    ages = [jnp.where(age_discrete == age, 1.0, 0.0) for age in (2, 3, 4)]
    columns = [jnp.ones_like(income), real_ideo, race_adj, *ages, educ1, gender, income]
    flat_regression(jnp.stack(columns, axis=-1), partyid7)


def kidiq_momhsiq(kid_score: Array, mom_hs: Array, mom_iq: Array) -> None:
    beta = numpyro.sample("beta", flat(constraints.real_vector, (3,)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq
    with numpyro.plate("children", len(kid_score)):
        numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def eight_schools_centered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Array, sigma: Array) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", len(y)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gp_regression(x: Array, y: Array) -> None:
    rho = numpyro.sample("rho", dist.Gamma(25, 4))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1))
    kernel = alpha**2 * jnp.exp(-((x[:, None] - x) ** 2) / (2 * rho**2))
    covariance = kernel + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def hmm_two_state(y: Array) -> None:
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu = numpyro.sample("mu", flat(constraints.positive_ordered_vector, (2,)))
    numpyro.factor("prior", dist.Normal(jnp.array([3.0, 10.0]), 1).log_prob(mu).sum())
    transition = jnp.log(jnp.stack([theta1, theta2]))
    emission = dist.Normal(mu, 1).log_prob(y[:, None])

    def forward(log_alpha: Array, log_likelihood: Array) -> tuple[Array, None]:
        return log_likelihood + jax.nn.logsumexp(log_alpha[:, None] + transition, axis=0), None

    log_alpha, _ = jax.lax.scan(forward, emission[0], emission[1:])
    numpyro.factor("states", jax.nn.logsumexp(log_alpha))


MODELS = {
    "ar5": ar5,
    "blr_correlated": blr_correlated,
    "earnings_interaction": earnings_interaction,
    "eight_schools_centered": eight_schools_centered,
    "eight_schools_noncentered": eight_schools_noncentered,
    "gp_regression": gp_regression,
    "hmm_two_state": hmm_two_state,
    "kidiq_momhsiq": kidiq_momhsiq,
    "mesquite_log": mesquite_log,
    "nes2000": nes2000,
}
