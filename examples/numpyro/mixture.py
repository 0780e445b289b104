"""Are there three kinds of iris, by the length and the width of their petals?

A mixture of three Gaussians with unknown means, precision matrices and weights, as a model of some ten lines, against
scikit-learn's `BayesianGaussianMixture`, a program for this model alone. Both have the same priors and start at the
same k-means clusters. The guide finds by itself that a component's mean and precision matrix have a normal-Wishart
posterior together; a step of `BLR(learning_rate=1.0)` is then the sweep of coordinate ascent that scikit-learn wrote
out by hand, and both end at the same posterior: the same weights, means and evidence lower bound.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, TraceGraph_ELBO
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.mixture import BayesianGaussianMixture

from numpyro_blr import BLR, AutoExponentialFamily
from numpyro_blr.families import DirichletNatural, NormalWishart, NormalWishartNatural

numpyro.enable_x64()

NUM_COMPONENTS = 3
NUM_SWEEPS = 100
CONCENTRATION, KAPPA, DEGREES_OF_FREEDOM = 1.0, 0.01, 3.0  # of the priors, as are the next two
CENTER, RATE_MATRIX = np.array([4.0, 1.0]), 0.2 * np.eye(2)


def data() -> tuple[np.ndarray, np.ndarray]:
    """Petal length and width in centimetres, and the species, which the fits do not see."""
    measurements, species = load_iris(return_X_y=True)
    return measurements[:, 2:], species


def model(y):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.full(NUM_COMPONENTS, CONCENTRATION)))
    with numpyro.plate("components", NUM_COMPONENTS):
        matrix = numpyro.sample("matrix", dist.Wishart(DEGREES_OF_FREEDOM, rate_matrix=RATE_MATRIX))
        mu = numpyro.sample("mu", dist.MultivariateNormal(CENTER, precision_matrix=KAPPA * matrix))
    with numpyro.plate("flowers", len(y)):
        kind = numpyro.sample("kind", dist.Categorical(weights))
        numpyro.sample("y", dist.MultivariateNormal(mu[kind], precision_matrix=matrix[kind]), obs=y)


def normal_wishart(loc, kappa, rate_matrix, degrees_of_freedom) -> NormalWishartNatural:
    scale_tril = jnp.linalg.cholesky(jnp.linalg.inv(rate_matrix))
    return NormalWishartNatural.from_distribution(NormalWishart(loc, kappa, scale_tril, degrees_of_freedom))


@jax.jit
def log_evidence_bound(weights: DirichletNatural, components: NormalWishartNatural, y) -> jax.Array:
    """E_q[log p − log q] in closed form, at the best q(kind) there is for the given q(weights) and q(components)."""
    mu = components.to_expectation()  # E[log|X|], E[X], E[X m] and E[m' X m] of every component
    squares = jnp.einsum("ni,kij,nj->nk", y, mu.linear, y) - 2 * y @ mu.product.T + mu.quadratic
    log_joint = weights.to_expectation().log + (mu.log_determinant - squares) / 2 - jnp.log(2 * jnp.pi)
    prior_weights = DirichletNatural.from_distribution(dist.Dirichlet(jnp.full(NUM_COMPONENTS, CONCENTRATION)))
    prior_components = normal_wishart(CENTER, jnp.full(NUM_COMPONENTS, KAPPA), RATE_MATRIX, DEGREES_OF_FREEDOM)
    divergence = weights.kl_divergence(prior_weights) + components.kl_divergence(prior_components).sum()
    return jax.nn.logsumexp(log_joint, axis=-1).sum() - divergence


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
    return mixture.fit(y)


def main() -> None:
    y, species = data()
    cluster = KMeans(NUM_COMPONENTS, n_init=1, random_state=0).fit(y).labels_  # where scikit-learn starts
    clusters = [y[cluster == k] for k in range(NUM_COMPONENTS)]
    start = {
        "weights": np.array([len(rows) / len(y) for rows in clusters]),
        "mu": np.array([rows.mean(axis=0) for rows in clusters]),
        "matrix": np.array([np.linalg.inv(np.cov(rows.T)) for rows in clusters]),
    }
    guide = AutoExponentialFamily(model, start=start)
    svi = SVI(model, guide, BLR(learning_rate=1.0), TraceGraph_ELBO())
    result = svi.run(jax.random.key(0), NUM_SWEEPS, y, progress_bar=False)
    natural, posterior = guide.natural(result.params), guide.posterior(result.params)
    weights, components = natural["weights"], natural["mu,matrix"]
    print("the guide's sites:", ", ".join(f"{name} ({type(fn).__name__})" for name, fn in posterior.items()))

    theirs = fit_sklearn(y)
    their_weights = DirichletNatural.from_distribution(dist.Dirichlet(theirs.weight_concentration_))
    their_rates = theirs.covariances_ * theirs.degrees_of_freedom_[:, None, None]
    their_components = normal_wishart(theirs.means_, theirs.mean_precision_, their_rates, theirs.degrees_of_freedom_)
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
