"""Is a tumour malignant, judged by thirty measurements of its cell nuclei?

Bayesian logistic regression on the Wisconsin breast cancer data (569 patients). The measurements come in groups that
say nearly the same (radius, perimeter, area), so the posterior is strongly correlated and only roughly Gaussian.
A hundred steps of `BLR` fit it on four patients out of five; the answer is how many of the others are told right.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal
from sklearn.datasets import load_breast_cancer

from pyro_blr import BLR

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # on arrays this small a second thread costs more than it brings


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """The measurements, standardised, and 1 where the tumour was malignant."""
    x, benign = load_breast_cancer(return_X_y=True)
    return torch.tensor((x - x.mean(axis=0)) / x.std(axis=0)), torch.tensor(1.0 - benign)


def model(x, y=None):
    coefficients = pyro.sample("coefficients", dist.Normal(0.0, torch.ones(x.shape[1])).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    with pyro.plate("patients", len(x)):
        pyro.sample("malignant", dist.Bernoulli(logits=intercept + x @ coefficients), obs=y)


def main() -> None:
    x, y = data()
    held_out = torch.arange(len(y)) % 5 == 0

    pyro.set_rng_seed(0)
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, BLR(), Trace_ELBO())
    for _ in range(100):
        svi.step(x[~held_out], y[~held_out])

    predictive = Predictive(model, guide=guide, num_samples=1000)
    probability = predictive(x[held_out])["malignant"].mean(dim=0)
    right = (probability > 0.5) == y[held_out]
    print(f"{right.sum()} of {held_out.sum()} held-out patients told right")
    assert right.double().mean() > 0.95


if __name__ == "__main__":
    main()
