"""Did coaching help in eight schools, and did it help some more than others?

Rubin's data (1981), the first example of hierarchical models, in the non-centred form: school j's effect is
mu + tau * theta_raw_j. The spread tau has a half-Cauchy prior on the positive reals, which the stock guide maps to
the line; `BLR` needs to know nothing of that. Long runs of MCMC give mu = 4.4 ± 3.3, and so does this fit, nearly.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from pyro_blr import BLR

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # on arrays this small a second thread costs more than it brings


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """The standard error and the estimate of each school's effect, in points of the test."""
    stderr = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    effect = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    return stderr, effect


def model(stderr, effect):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(stderr)):
        theta_raw = pyro.sample("theta_raw", dist.Normal(0.0, 1.0))
        pyro.sample("effect", dist.Normal(mu + tau * theta_raw, stderr), obs=effect)


def main() -> None:
    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, BLR(), Trace_ELBO())
    for _ in range(100):
        svi.step(*data())

    draws = Predictive(guide, num_samples=1000)(*data())
    mu, tau = draws["mu"], draws["tau"]
    theta = mu + tau * draws["theta_raw"]
    print(f"on average {mu.mean():.1f} ± {mu.std():.1f} points; spread between schools {tau.median():.1f} (median)")
    for school, column in zip("ABCDEFGH", theta.T, strict=True):
        print(f"school {school}: {column.mean():4.1f} ± {column.std():.1f}")
    assert abs(mu.mean() - 4.4) < 1.0
    assert abs(mu.std() - 3.3) < 1.0


if __name__ == "__main__":
    main()
