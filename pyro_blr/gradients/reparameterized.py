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

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from ..families import Block
from ._estimate import Estimate, Objective, Vectorised

__all__ = ["reparameterized"]


def reparameterized(
    objective: Objective,
    loc: Tensor,
    scales: tuple[Tensor, ...],
    others: Any,
    blocks: tuple[Block, ...],
    *,
    dense: bool,
) -> Estimate:
    """E_q[g] and the first-order estimate of E_q[H], block by block, from one evaluation at the host's own draws."""
    found = objective.at_all(_first_order, loc, scales, None) if isinstance(objective, Vectorised) else None
    if found is not None:
        (loss, gradient, *g_scales), extras = (tensor[0] for tensor in found), objective.extras
    else:
        location = loc.detach().requires_grad_()
        scales = tuple(scale.detach().requires_grad_() for scale in scales)
        with torch.enable_grad():
            loss, extras = objective(location, scales, others, None)
            gradient, *g_scales = torch.autograd.grad(loss, (location, *scales), materialize_grads=True)
    weight = torch.ones_like(gradient) if extras.weight is None else extras.weight
    parts = []
    for block, scale, g_scale in zip(blocks, scales, g_scales, strict=True):
        scale = scale.detach()
        block_weight = weight[block.start : block.stop].reshape(block.shape)
        if block.structure == "dense":
            curvature = _dense_curvature(scale, g_scale, block_weight)
            parts += list(curvature.reshape(-1, *curvature.shape[-2:]))
        else:
            curvature = ((g_scale + block_weight / scale) / scale).reshape(-1)
            parts.append(torch.diag(curvature) if dense else curvature)
    loss = loss.detach()
    return Estimate(
        loss=loss,
        losses=loss[None],
        gradient=gradient,
        pair_gradients=gradient[None],
        hessian=torch.block_diag(*parts) if dense else torch.cat(parts),
        others=None,
        extras=extras,
        evaluations=1,
    )


def _first_order(loss: Callable[..., Tensor], _: bool) -> Callable[..., tuple[Tensor, ...]]:
    """(L, ∇_m L, ∇_C L of every block) of one draw."""

    def at_draw(loc: Tensor, scales: tuple[Tensor, ...]):
        (gradient, g_scales), value = torch.func.grad_and_value(loss, argnums=(0, 1))(loc, scales)
        return value, gradient, *g_scales

    return at_draw


def _dense_curvature(scale_tril: Tensor, g_scale_tril: Tensor, weight: Tensor) -> Tensor:
    """C⁻ᵀ W C⁻¹ for each matrix of a batch [*batch, d, d]."""
    entropy = torch.diag_embed(weight / scale_tril.diagonal(dim1=-2, dim2=-1))
    lower = (scale_tril.mT @ (g_scale_tril.tril() + entropy)).tril()
    whitened = lower + lower.tril(-1).mT
    half = solve_triangular(scale_tril.mT, whitened, upper=True)
    return solve_triangular(scale_tril.mT, half.mT, upper=True).mT
