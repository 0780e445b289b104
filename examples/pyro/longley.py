"""How did employment move with six economic series that all rise together?

Longley's table (1967), sixteen years of the United States, is the classic trial of a least-squares program: its
columns are nearly collinear and their units differ ten-thousandfold. With the noise known the posterior is Gaussian
and known in closed form, so the answer can be checked: `BLR` on the raw units gives each coefficient its exact mean
and standard deviation, all but the last few digits of float64. (The first of the hundred steps does.)
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from statsmodels.datasets import longley

from pyro_blr import BLR

torch.set_default_dtype(torch.float64)  # the columns' collinearity eats most of float32's digits
torch.set_num_threads(1)  # on arrays this small a second thread costs more than it brings

INTERCEPT_SCALE = 1000.0  # thousands of people in work, as the response
NOISE_SCALE = 304.85  # the residual standard deviation of ordinary least squares, taken as known


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The six series and employment, centred by their means but not scaled, and the coefficients' prior scales.

    A coefficient of 5 sd(y) / sd(x_j) is already a violent one: a series alone moving employment five times too far.
    """
    table = longley.load()
    x, y = table.exog.to_numpy(), table.endog.to_numpy()
    prior_scale = 5 * y.std() / x.std(axis=0)
    return torch.tensor(x - x.mean(axis=0)), torch.tensor(y - y.mean()), torch.tensor(prior_scale)


def model(x, y, prior_scale):
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, prior_scale).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, INTERCEPT_SCALE))
    with pyro.plate("years", len(x)):
        pyro.sample("employment", dist.Normal(intercept + x @ coefficients, NOISE_SCALE), obs=y)


def exact_posterior(x, y, prior_scale) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of (coefficients, intercept): Λ = XᵀX / σ² + diag(1 / s²), Λ m = Xᵀy / σ²."""
    design = torch.column_stack([x, torch.ones(len(x))])
    scale = torch.cat([prior_scale, torch.tensor([INTERCEPT_SCALE])])
    precision = design.T @ design / NOISE_SCALE**2 + torch.diag(scale**-2)
    return torch.linalg.solve(precision, design.T @ y / NOISE_SCALE**2), torch.linalg.inv(precision)


def main() -> None:
    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, BLR(), Trace_ELBO())
    for _ in range(100):
        svi.step(*data())
    posterior = guide.get_posterior()
    loc, scale = posterior.mean.detach(), posterior.stddev.detach()

    exact_loc, exact_covariance = exact_posterior(*data())
    exact_scale = exact_covariance.diag().sqrt()
    print("                   BLR             exact")
    names = [*longley.load().exog, "intercept"]
    for row in zip(names, loc, scale, exact_loc, exact_scale, strict=True):
        print("{:9} {:9.3f} ± {:7.3f}  {:9.3f} ± {:7.3f}".format(*row))
    np.testing.assert_array_less((loc - exact_loc).abs(), 1e-8 * exact_scale)
    np.testing.assert_allclose(scale, exact_scale, rtol=1e-8)


if __name__ == "__main__":
    main()
