"""∇_μ E_q[ℓ] of a site without conjugacy, from draws of q; each estimate is unbiased and linear in ℓ.

    path        z = g(λ; ε):    ∇_μ E_q[f] = F⁻¹ E[(∂z/∂λ)ᵀ ∇_z f]
    difference  z a count:      ∇_μ E_q[f] = E[v(z) (f(z + 1) − f(z))], with v = 1 for the Poisson distribution
    score       no sampler that can be differentiated:    ∇_μ E_q[f] = F⁻¹ E[(T(z) − μ) f]

With f = ℓ/w + log q in place of ℓ/w the entropy is estimated from the same draws, and the noise of a path gradient
vanishes where q is the posterior. A count's base measure is part of f.

Source: Khan & Rue 2023, section 2; Roeder, Wu & Duvenaud 2017, "Sticking the Landing"; Figurnov, Mohamed & Mnih 2018
for the derivatives of samplers.
"""

from __future__ import annotations

import jax
from jax import Array

from ..families import Natural

__all__ = ["directions", "estimator_of", "natural_gradients", "samples"]


def estimator_of(natural: Natural) -> str:
    """`"path"`, `"difference"` or `"score"`."""
    if natural.discrete:
        return "difference"
    return "path" if natural.to_distribution().has_rsample else "score"


def samples(natural: Natural, num_draws: int, rng_key: Array) -> Array:
    """[S, *batch, *event]."""
    return jax.vmap(natural.to_distribution().sample)(jax.random.split(rng_key, num_draws))


def directions(natural: Natural, slopes: Array, weight: Array, rng_key: Array) -> Natural:
    """−∇_μ L / w for each draw, [S, *batch], whose average is unbiased.

    Args:
        slopes: at each of the `samples`: ∇_z ℓ, ℓ(z + 1) − ℓ(z), or ℓ(z) of each cell, as the estimator takes it.
        weight: w of each cell, with which its entropy enters the loss.
    """
    values = samples(natural, len(slopes), rng_key)
    estimator = estimator_of(natural)
    if estimator == "difference":
        base = jax.vmap(natural.log_base_measure)
        coefficient = natural_gradients(natural, slopes / weight + base(values + 1) - base(values), values, rng_key)
        return jax.tree.map(lambda c, leaf: -c - leaf, coefficient, natural)
    density = jax.vmap(natural.log_density)
    if estimator == "score":
        return -natural_gradients(natural, slopes / weight + density(values), values, rng_key)
    force = slopes / weight.reshape(*weight.shape, *[1] * natural.value_rank)
    return -natural_gradients(natural, force + jax.grad(lambda z: density(z).sum())(values), values, rng_key)


def natural_gradients(natural: Natural, slopes: Array, values: Array, rng_key: Array) -> Natural:
    """∇_μ E_q[f] for each draw, [S, *batch]."""
    estimator = estimator_of(natural)
    if estimator == "difference":
        return jax.vmap(natural.match_difference)(jax.vmap(natural.difference_weight)(values) * slopes)
    if estimator == "score":
        against_the_others = (slopes - slopes.mean(0)) * len(slopes) / (len(slopes) - 1)
        away = jax.vmap(lambda value: natural.sufficient_statistics(value) - natural.to_expectation())(values)
        return jax.vmap(natural.fisher_solve)(away * against_the_others)

    def pull(key: Array, slope: Array) -> Natural:
        back = jax.vjp(lambda natural: natural.to_distribution().sample(key), natural)[1]
        return natural.fisher_solve(natural.Expectation(*vars(back(slope)[0]).values()))

    return jax.vmap(pull)(jax.random.split(rng_key, len(slopes)), slopes)
