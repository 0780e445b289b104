"""Price's theorem at first order: E_q[H] from the gradient that stock SVI already has, with respect to the scale.

With z = m + C ε and L = ℓ(z) − w log |C| (w: the weight of the entropy, 1 unless a plate is subsampled),

    ∂L/∂σ = g ε − w/σ      gives    h = (∂L/∂σ + w/σ) / σ,                          E[h] = E_q[diag H];
    ∂L/∂C = tril(g εᵀ) − w diag(1/C_ii)    gives    W = tril(Cᵀ (∂L/∂C + w diag(1/C_ii))),
                                            H = C⁻ᵀ (W + Wᵀ − diag W) C⁻¹,           E[H] = E_q[H].

One gradient at the host's own draws, no other evaluation. The price is noise of size |g|/σ in the curvature, which
does not vanish on a quadratic: use it with a small learning rate, or with many particles.

Source: Khan & Rue 2023, section 4.1 ("first-order"); `scales` are σ and C.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.linalg import block_diag, solve_triangular

from ..families import Block
from ._estimate import Estimate, Objective, value_and_gradients

__all__ = ["reparameterized"]


def reparameterized(
    objective: Objective,
    loc: Array,
    scales: tuple[Array, ...],
    others: Any,
    blocks: tuple[Block, ...],
    *,
    dense: bool,
    forward: bool = False,
) -> Estimate:
    """E_q[g] and the first-order estimate of E_q[H], block by block, from one evaluation at the host's own draws."""
    evaluate = value_and_gradients(objective, (0, 1, 2), forward)
    (loss, extras), (gradient, g_scales, g_others) = evaluate(loc, scales, others, None)
    weight = jnp.ones_like(loc) if extras.weight is None else extras.weight
    parts = []
    for block, scale, g_scale in zip(blocks, scales, g_scales, strict=True):
        block_weight = weight[block.start : block.stop].reshape(block.shape)
        if block.structure == "dense":
            curvature = _dense_curvature(scale, g_scale, block_weight)
            parts += list(curvature.reshape(-1, *curvature.shape[-2:]))
        else:
            curvature = jnp.ravel((g_scale + block_weight / scale) / scale)
            parts.append(jnp.diag(curvature) if dense else curvature)
    return Estimate(
        loss=loss,
        losses=loss[None],
        gradient=gradient,
        pair_gradients=gradient[None],
        hessian=block_diag(*parts) if dense else jnp.concatenate(parts),
        others=g_others,
        extras=extras,
        evaluations=1,
    )


def _dense_curvature(scale_tril: Array, g_scale_tril: Array, weight: Array) -> Array:
    """C⁻ᵀ W C⁻¹ for each matrix of a batch [*batch, d, d]."""
    entropy = jax.vmap(jnp.diag)((weight / jnp.diagonal(scale_tril, axis1=-2, axis2=-1)).reshape(-1, weight.shape[-1]))
    score = jnp.tril(g_scale_tril) + entropy.reshape(scale_tril.shape)
    lower = jnp.tril(jnp.swapaxes(scale_tril, -1, -2) @ score)
    whitened = lower + jnp.swapaxes(jnp.tril(lower, -1), -1, -2)
    half = solve_triangular(scale_tril, whitened, trans=1, lower=True)
    return jnp.swapaxes(solve_triangular(scale_tril, jnp.swapaxes(half, -1, -2), trans=1, lower=True), -1, -2)
