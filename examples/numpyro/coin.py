"""Is the coin fair, after six heads and four tails?

The coin, the model and the hand-written guide of the hosts' tutorials on stochastic variational inference. The prior is
Beta(10, 10), the posterior Beta(16, 14), and the guide is a Beta distribution, so that a fit can be exact. Adam takes
the tutorials' two thousand steps and stops near it. `BLR(learning_rate=1.0)` sees that the site is conjugate: its first
step is Bayes' rule, and the next ones stay where they are.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import Adam

from numpyro_blr import BLR

numpyro.enable_x64()

ADAM_STEPS = (500, 2000)  # the tutorials take 2000, with a step size of 0.0005
ADAM_STEP_SIZE = 0.0005


def data() -> jax.Array:
    """Six heads, four tails."""
    return jnp.array([1.0] * 6 + [0.0] * 4)


def model(tosses):
    fairness = numpyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
    with numpyro.plate("tosses", len(tosses)):
        numpyro.sample("obs", dist.Bernoulli(fairness), obs=tosses)


def guide(tosses):
    alpha_q = numpyro.param("alpha_q", jnp.array(15.0), constraint=constraints.positive)
    beta_q = numpyro.param("beta_q", jnp.array(15.0), constraint=constraints.positive)
    numpyro.sample("latent_fairness", dist.Beta(alpha_q, beta_q))


def exact_posterior(tosses) -> dist.Beta:
    """Every head adds one to alpha, every tail one to beta."""
    return dist.Beta(10.0 + tosses.sum(), 10.0 + (1 - tosses).sum())


def fit(optimizer, num_steps: int) -> dist.Beta:
    """The guide's distribution after `num_steps` steps of the stock SVI."""
    svi = SVI(model, guide, optimizer, Trace_ELBO())
    params = svi.run(jax.random.key(0), num_steps, data(), progress_bar=False).params
    return dist.Beta(params["alpha_q"], params["beta_q"])


def main() -> None:
    exact = exact_posterior(data())
    fits = {f"Adam, {steps} steps": fit(Adam(ADAM_STEP_SIZE), steps) for steps in ADAM_STEPS}
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
