"""Is a tumour malignant, judged by thirty measurements of its cell nuclei?

Bayesian logistic regression on the Wisconsin breast cancer data (569 patients). The measurements come in groups that
say nearly the same (radius, perimeter, area), so the posterior is strongly correlated and only roughly Gaussian.
A hundred steps of `BLR` fit it on four patients out of five; the answer is how many of the others are told right.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from sklearn.datasets import load_breast_cancer

from numpyro_blr import BLR

numpyro.enable_x64()


def data() -> tuple[jax.Array, jax.Array]:
    """The measurements, standardised, and 1 where the tumour was malignant."""
    x, benign = load_breast_cancer(return_X_y=True)
    return jnp.asarray((x - x.mean(axis=0)) / x.std(axis=0)), jnp.asarray(1.0 - benign)


def model(x, y=None):
    coefficients = numpyro.sample("coefficients", dist.Normal(0.0, jnp.ones(x.shape[1])).to_event(1))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 10.0))
    with numpyro.plate("patients", len(x)):
        numpyro.sample("malignant", dist.Bernoulli(logits=intercept + x @ coefficients), obs=y)


def main() -> None:
    x, y = data()
    held_out = np.arange(len(y)) % 5 == 0

    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, BLR(), Trace_ELBO())
    result = svi.run(jax.random.key(0), 100, x[~held_out], y[~held_out], progress_bar=False)

    predictive = Predictive(model, guide=guide, params=result.params, num_samples=1000)
    probability = predictive(jax.random.key(1), x[held_out])["malignant"].mean(axis=0)
    right = (probability > 0.5) == y[held_out]
    print(f"{right.sum()} of {held_out.sum()} held-out patients told right")
    assert right.mean() > 0.95


if __name__ == "__main__":
    main()
