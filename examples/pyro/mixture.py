"""Are there three kinds of iris, by the length and the width of their petals?

A mixture of three Gaussians with unknown means, precision matrices and weights, as a model of some ten lines, against
scikit-learn's `BayesianGaussianMixture`, a program for this model alone. Both have the same priors and start at the
same k-means clusters. The guide finds by itself that a component's mean and precision matrix have a normal-Wishart
posterior together; a step of `BLR(learning_rate=1.0)` is then the sweep of coordinate ascent that scikit-learn wrote
out by hand, and both end at the same posterior: the same weights, means and evidence lower bound.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.mixture import BayesianGaussianMixture

from pyro_blr import BLR, AutoExponentialFamily
from pyro_blr.families import DirichletNatural, NormalWishart, NormalWishartNatural

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # on arrays this small a second thread costs more than it brings

NUM_COMPONENTS = 3
NUM_SWEEPS = 100
CONCENTRATION, KAPPA, DEGREES_OF_FREEDOM = 1.0, 0.01, 3.0  # of the priors, as are the next two
CENTER, RATE_MATRIX = torch.tensor([4.0, 1.0]), 0.2 * torch.eye(2)


def data() -> tuple[torch.Tensor, np.ndarray]:
    """Petal length and width in centimetres, and the species, which the fits do not see."""
    measurements, species = load_iris(return_X_y=True)
    return torch.tensor(measurements[:, 2:]), species


def model(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((NUM_COMPONENTS,), CONCENTRATION)))
    with pyro.plate("components", NUM_COMPONENTS):
        matrix = pyro.sample("matrix", dist.Wishart(torch.tensor(DEGREES_OF_FREEDOM), precision_matrix=RATE_MATRIX))
        mu = pyro.sample("mu", dist.MultivariateNormal(CENTER, precision_matrix=KAPPA * matrix))
    with pyro.plate("flowers", len(y)):
        kind = pyro.sample("kind", dist.Categorical(weights))
        pyro.sample("y", dist.MultivariateNormal(mu[kind], precision_matrix=matrix[kind]), obs=y)


def normal_wishart(loc, kappa, rate_matrix, degrees_of_freedom) -> NormalWishartNatural:
    scale_tril = torch.linalg.cholesky(torch.linalg.inv(rate_matrix))
    return NormalWishartNatural.from_distribution(NormalWishart(loc, kappa, scale_tril, degrees_of_freedom))


def log_evidence_bound(weights: DirichletNatural, components: NormalWishartNatural, y) -> torch.Tensor:
    """E_q[log p − log q] in closed form, at the best q(kind) there is for the given q(weights) and q(components)."""
    mu = components.to_expectation()  # E[log|X|], E[X], E[X m] and E[m' X m] of every component
    squares = torch.einsum("ni,kij,nj->nk", y, mu.linear, y) - 2 * y @ mu.product.T + mu.quadratic
    log_joint = weights.to_expectation().log + (mu.log_determinant - squares) / 2 - np.log(2 * np.pi)
    prior_weights = DirichletNatural.from_distribution(dist.Dirichlet(torch.full((NUM_COMPONENTS,), CONCENTRATION)))
    prior_components = normal_wishart(CENTER, torch.full((NUM_COMPONENTS,), KAPPA), RATE_MATRIX, DEGREES_OF_FREEDOM)
    divergence = weights.kl_divergence(prior_weights) + components.kl_divergence(prior_components).sum()
    return torch.logsumexp(log_joint, dim=-1).sum() - divergence


def fit_sklearn(y) -> BayesianGaussianMixture:
    mixture = BayesianGaussianMixture(
        n_components=NUM_COMPONENTS,
        covariance_type="full",
        weight_concentration_prior_type="dirichlet_distribution",
        weight_concentration_prior=CONCENTRATION,
        mean_precision_prior=KAPPA,
        mean_prior=CENTER,
        degrees_of_freedom_prior=DEGREES_OF_FREEDOM,
        covariance_prior=RATE_MATRIX,
        reg_covar=0.0,
        tol=1e-9,
        max_iter=1000,
        random_state=0,
    )
    return mixture.fit(y.numpy())


def main() -> None:
    y, species = data()
    cluster = KMeans(NUM_COMPONENTS, n_init=1, random_state=0).fit(y).labels_  # where scikit-learn starts
    clusters = [y[cluster == k] for k in range(NUM_COMPONENTS)]
    start = {
        "weights": torch.tensor([len(rows) / len(y) for rows in clusters]),
        "mu": torch.stack([rows.mean(dim=0) for rows in clusters]),
        "matrix": torch.stack([torch.linalg.inv(torch.cov(rows.T)) for rows in clusters]),
    }
    pyro.set_rng_seed(0)
    guide = AutoExponentialFamily(model, start=start)
    svi = SVI(model, guide, BLR(learning_rate=1.0), Trace_ELBO())
    for _ in range(NUM_SWEEPS):
        svi.step(y)
    natural, posterior = guide.natural(), guide.posterior()
    weights, components = natural["weights"], natural["mu,matrix"]
    print("the guide's sites:", ", ".join(f"{name} ({type(fn).__name__})" for name, fn in posterior.items()))

    theirs = fit_sklearn(y)
    their_weights = DirichletNatural.from_distribution(dist.Dirichlet(torch.tensor(theirs.weight_concentration_)))
    their_rates = theirs.covariances_ * theirs.degrees_of_freedom_[:, None, None]
    theirs_all = (theirs.means_, theirs.mean_precision_, their_rates, theirs.degrees_of_freedom_)
    their_components = normal_wishart(*map(torch.tensor, theirs_all))
    print("               weight   petal length   petal width")
    for k in range(NUM_COMPONENTS):
        print("BLR           {:.5f} {:14.5f} {:13.5f}".format(posterior["weights"].mean[k], *components.loc[k]))
        print("scikit-learn  {:.5f} {:14.5f} {:13.5f}".format(theirs.weights_[k], *theirs.means_[k]))
    bound = log_evidence_bound(weights, components, y)
    their_bound = log_evidence_bound(their_weights, their_components, y)
    print(
        f"evidence lower bound: BLR {bound:.6f}, scikit-learn {their_bound:.6f}, difference {bound - their_bound:.1e}"
    )
    kind = np.asarray(posterior["kind"].probs).argmax(axis=-1)
    alike = sum(np.bincount(species[kind == k]).max() for k in range(NUM_COMPONENTS))
    print(f"{alike} of {len(y)} flowers are in the component of their species")

    assert abs(bound - their_bound) <= 1e-3
    assert bound >= their_bound - 1e-6
    np.testing.assert_allclose(posterior["weights"].mean, theirs.weights_, rtol=1e-4)
    np.testing.assert_allclose(components.loc, theirs.means_, rtol=1e-4)
    assert alike > 0.9 * len(y)


if __name__ == "__main__":
    main()
