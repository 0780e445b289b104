"""Score matching of a Gaussian, for `reference.py`: batch and match, and GSM by its authors' package.

Batch and match (BaM; Cai et al. 2024, arXiv 2402.14758) draws z_b from the current N(μ, Σ), b = 1, ..., B, takes the
scores g_b = ∇log p(z_b), and minimises a weighted ℓ² distance of the scores, regularised by λ⁻¹ KL to where it was:

    U = λ Γ + λ/(1 + λ) ḡ ḡᵀ                           Γ the covariance of the g_b, ḡ their mean
    V = Σ + λ C + λ/(1 + λ) (μ − z̄)(μ − z̄)ᵀ            C the covariance of the z_b, z̄ their mean
    Σ ← 2 V (I + (I + 4 U V)^½)⁻¹                       μ ← μ/(1 + λ) + λ/(1 + λ) (Σ ḡ + z̄)

GSM (Modi et al. 2023, arXiv 2307.07849) matches each draw's score exactly and averages the answers.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["Gaussian", "ScoreState", "bam_step", "bam_update", "gsm_step", "require_gsm"]


class Gaussian(NamedTuple):
    loc: Array
    covariance: Array


class ScoreState(NamedTuple):
    """Between updates; the count of them is a real number, as λ is computed from it."""

    gaussian: Gaussian
    count: Array
    rng_key: Array


def bam_update(gaussian: Gaussian, draws: Array, scores: Array, regularisation: Array) -> Gaussian:
    """The closed form above with λ = `regularisation`; draws and scores are [B, D].

    With V = L Lᵀ and A = Lᵀ U L the new covariance is 2 L (I + (I + 4 A)^½)⁻¹ Lᵀ, which is symmetric as computed.
    """
    share = regularisation / (1 + regularisation)
    z, g = draws.mean(0), scores.mean(0)
    u = regularisation * _covariance(scores) + share * jnp.outer(g, g)
    away = gaussian.loc - z
    v = gaussian.covariance + regularisation * _covariance(draws) + share * jnp.outer(away, away)
    factor = jnp.linalg.cholesky(v)
    values, vectors = jnp.linalg.eigh(factor.T @ u @ factor)
    root = factor @ (vectors * (2 / (1 + jnp.sqrt(1 + 4 * jnp.maximum(values, 0)))) ** 0.5)
    covariance = root @ root.T
    return Gaussian(gaussian.loc / (1 + regularisation) + share * (covariance @ g + z), covariance)


def bam_step(
    log_density: Callable[[Array], Array], batch: int, state: ScoreState, constant: Array | bool
) -> ScoreState:
    """One update; λ = B D throughout where `constant`, as for Gaussian targets, else B D / (t + 1) at t = 0, 1, ..."""
    initial = batch * state.gaussian.loc.shape[0]
    regularisation = initial / jnp.where(constant, 1.0, state.count + 1)
    return _step(log_density, batch, state, lambda *matched: bam_update(*matched, regularisation))


def gsm_step(log_density: Callable[[Array], Array], batch: int, state: ScoreState) -> ScoreState:
    """One update by `gsmvi`; as in its own loop, one that does not leave a covariance matrix is not made."""
    require_gsm()
    from gsmvi.gsm import gsm_update

    def update(gaussian: Gaussian, draws: Array, scores: Array) -> Gaussian:
        return Gaussian(*gsm_update(draws, scores, *gaussian))

    return _step(log_density, batch, state, update)


def require_gsm() -> None:
    """Raises ImportError where the package is missing."""
    if importlib.util.find_spec("gsmvi") is None:
        raise ImportError("the method GSM is the package gsmvi: `pip install gsmvi`, or leave GSM out of --methods")


def _step(
    log_density: Callable[[Array], Array], batch: int, state: ScoreState, update: Callable[..., Gaussian]
) -> ScoreState:
    rng_key, draw_key = jax.random.split(state.rng_key)
    loc, covariance = state.gaussian
    noise = jax.random.normal(draw_key, (batch, loc.shape[0]), loc.dtype)
    draws = loc + noise @ jnp.linalg.cholesky(covariance).T
    proposed = update(state.gaussian, draws, jax.vmap(jax.grad(log_density))(draws))
    usable = jnp.isfinite(proposed.loc).all() & jnp.isfinite(jnp.linalg.cholesky(proposed.covariance)).all()
    kept = jax.tree.map(lambda new, old: jnp.where(usable, new, old), proposed, state.gaussian)
    return ScoreState(kept, state.count + 1, rng_key)


def _covariance(values: Array) -> Array:
    centred = values - values.mean(0)
    return centred.T @ centred / len(values)
