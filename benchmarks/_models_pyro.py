"""The ten posteriors of `reference.py` as Pyro models. Each takes the posterior's data, tensors by name."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

__all__ = ["MODELS"]


def flat(support=constraints.real, shape: tuple[int, ...] = ()) -> dist.Distribution:
    """A constant density on the support: what Stan means by a parameter without a prior."""
    return dist.ImproperUniform(support, (), shape)


def ar5(K: int, y: Tensor) -> None:
    alpha = pyro.sample("alpha", dist.Normal(0, 10))
    beta = pyro.sample("beta", dist.Normal(0, 10).expand([K]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lagged = torch.stack([y[K - 1 - k : len(y) - 1 - k] for k in range(K)], dim=-1)
    with pyro.plate("times", len(y) - K):
        pyro.sample("y", dist.Normal(alpha + lagged @ beta, sigma), obs=y[K:])


def blr_correlated(X: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(0, 10).expand([X.shape[1]]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


def flat_regression(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", flat(constraints.real_vector, (x.shape[1],)))
    sigma = pyro.sample("sigma", flat(constraints.positive))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def earnings_interaction(earn: Tensor, height: Tensor, male: Tensor) -> None:
    flat_regression(torch.stack([torch.ones_like(height), height, male, height * male], dim=-1), earn.log())


def mesquite_log(
    weight: Tensor,
    diam1: Tensor,
    diam2: Tensor,
    canopy_height: Tensor,
    total_height: Tensor,
    density: Tensor,
    group: Tensor,
) -> None:
    logs = [column.log() for column in (diam1, diam2, canopy_height, total_height, density)]
    flat_regression(torch.stack([torch.ones_like(group), *logs, group], dim=-1), weight.log())


def nes2000(
    partyid7: Tensor,
    real_ideo: Tensor,
    race_adj: Tensor,
    age_discrete: Tensor,
    educ1: Tensor,
    gender: Tensor,
    income: Tensor,
) -> None:
    ages = [(age_discrete == age).to(income.dtype) for age in (2, 3, 4)]
    columns = [torch.ones_like(income), real_ideo, race_adj, *ages, educ1, gender, income]
    flat_regression(torch.stack(columns, dim=-1), partyid7)


def kidiq_momhsiq(kid_score: Tensor, mom_hs: Tensor, mom_iq: Tensor) -> None:
    beta = pyro.sample("beta", flat(constraints.real_vector, (3,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq
    with pyro.plate("children", len(kid_score)):
        pyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def eight_schools_centered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(5))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(y: Tensor, sigma: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0, 5))
    tau = pyro.sample("tau", dist.HalfCauchy(5))
    with pyro.plate("schools", len(y)):
        theta_trans = pyro.sample("theta_trans", dist.Normal(0, 1))
        theta = pyro.deterministic("theta", mu + tau * theta_trans)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def gp_regression(x: Tensor, y: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25, 4))
    alpha = pyro.sample("alpha", dist.HalfNormal(2))
    sigma = pyro.sample("sigma", dist.HalfNormal(1))
    kernel = alpha**2 * torch.exp(-((x[:, None] - x) ** 2) / (2 * rho**2))
    covariance = kernel + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=y)


def hmm_two_state(y: Tensor) -> None:
    theta1 = pyro.sample("theta1", dist.Dirichlet(torch.ones(2)))
    theta2 = pyro.sample("theta2", dist.Dirichlet(torch.ones(2)))
    mu = pyro.sample("mu", flat(constraints.positive_ordered_vector, (2,)))
    pyro.factor("prior", dist.Normal(torch.tensor([3.0, 10.0]), 1).log_prob(mu).sum())
    transition = torch.stack([theta1, theta2]).log()
    emission = dist.Normal(mu, 1).log_prob(y[:, None])
    log_alpha = emission[0]
    for log_likelihood in emission[1:]:
        log_alpha = log_likelihood + (log_alpha[:, None] + transition).logsumexp(0)
    pyro.factor("states", log_alpha.logsumexp(0))


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
