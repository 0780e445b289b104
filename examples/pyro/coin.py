"""Is the coin fair, after six heads and four tails?

The coin, the model and the hand-written guide of the hosts' tutorials on stochastic variational inference. The prior is
Beta(10, 10), the posterior Beta(16, 14), and the guide is a Beta distribution, so that a fit can be exact. Adam takes
the tutorials' two thousand steps and stops near it. `BLR(learning_rate=1.0)` sees that the site is conjugate: its first
step is Bayes' rule, and the next ones stay where they are.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch.distributions import kl_divergence

from pyro_blr import BLR

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # on arrays this small a second thread costs more than it brings

ADAM_STEPS = (500, 2000)  # the tutorials take 2000, with a step size of 0.0005
ADAM_STEP_SIZE = 0.0005


def data() -> torch.Tensor:
    """Six heads, four tails."""
    return torch.tensor([1.0] * 6 + [0.0] * 4)


def model(tosses):
    fairness = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
    with pyro.plate("tosses", len(tosses)):
        pyro.sample("obs", dist.Bernoulli(fairness), obs=tosses)


def guide(tosses):
    alpha_q = pyro.param("alpha_q", torch.tensor(15.0), constraint=constraints.positive)
    beta_q = pyro.param("beta_q", torch.tensor(15.0), constraint=constraints.positive)
    pyro.sample("latent_fairness", dist.Beta(alpha_q, beta_q))


def exact_posterior(tosses) -> dist.Beta:
    """Every head adds one to alpha, every tail one to beta."""
    return dist.Beta(10.0 + tosses.sum(), 10.0 + (1 - tosses).sum())


def fit(optimizer, num_steps: int) -> dist.Beta:
    """The guide's distribution after `num_steps` steps of the stock SVI."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    for _ in range(num_steps):
        svi.step(data())
    return dist.Beta(pyro.param("alpha_q").detach(), pyro.param("beta_q").detach())


def main() -> None:
    exact = exact_posterior(data())
    fits = {f"Adam, {steps} steps": fit(Adam({"lr": ADAM_STEP_SIZE}), steps) for steps in ADAM_STEPS}
    fits |= {f"BLR, {steps} step{'s'[: steps > 1]}": fit(BLR(learning_rate=1.0), steps) for steps in (1, 10)}

    print("                   alpha    beta   P(heads)           KL to the posterior (nat)")
    for name, beta in {**fits, "exact": exact}.items():
        gap = max(float(kl_divergence(beta, exact)), 0.0)  # rounding makes some of the zeros negative
        numbers = beta.concentration1, beta.concentration0, beta.mean, beta.variance**0.5
        print("{:17} {:7.3f} {:7.3f}   {:.4f} ± {:.4f}    {:.1e}".format(name, *map(float, numbers), gap))
    for beta in (fits["BLR, 1 step"], fits["BLR, 10 steps"]):
        np.testing.assert_allclose([beta.concentration1, beta.concentration0], [16.0, 14.0], rtol=1e-10)
    assert kl_divergence(fits["Adam, 2000 steps"], exact) > 1e-6, "Adam is near, and not there"


if __name__ == "__main__":
    main()
