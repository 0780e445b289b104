"""What an estimator is given and what it returns.

The objective is the host's loss as a function of the mean, at fixed standard-normal noise ε:

    L(m, C; ε) = ℓ(m + C ε) − log |C| + constant,    so that    ∇_m L = g(m + C ε),    ∇²_m L = H(m + C ε).

Averaged over ε these are E_q[g] = ∇_m E_q[ℓ] (Bonnet 1964) and E_q[H] = 2 ∇_Σ E_q[ℓ] (Price 1958). The entropy does not
depend on m, and a loss that integrates a part of itself analytically (`TraceMeanField_ELBO`) is covered as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Draws", "Estimate", "Extras", "Objective", "average_over_pairs", "each_draw", "value_and_gradient"]


class Draws(NamedTuple):
    """S draws of the noise as K = S/2 antithetic pairs: draw k and draw k + K are ε and −ε.

    Attributes:
        number: [S], which noise; the objective turns it into ε.
        sign: [S], +1 for the first half and −1 for the second.
        probes: [S, D] Rademacher vectors for curvature products, or None where no estimator asks for them.
        members: the values of sites outside the Gaussian, for each of the S; passed through to the objective.
    """

    number: Any
    sign: Any
    probes: Tensor | None
    members: Any = None


class Extras(NamedTuple):
    """What the objective returns beside the loss.

    Attributes:
        aux: nothing in Pyro; the twin package passes the host's mutable state through here.
        weight: [D], the factor with which each coordinate's entropy enters this loss: 1, N/M for a row of a
            subsampled plate that is in the batch, 0 for one that is not; None where all are 1.
        minibatch: whether a plate is subsampled, so that the loss is itself a random function from step to step.
        coverage: the same factor for each cell of each site outside the Gaussian, by name.
    """

    aux: Any
    weight: Tensor | None = None
    minibatch: Any = False
    coverage: Any = None


Objective = Callable[[Tensor, tuple[Tensor | None, ...], Any, Any], tuple[Tensor, Extras]]
"""(mean [D], a scale per block, other parameters, one draw) -> (loss, extras)."""


class Estimate(NamedTuple):
    """Averages over the draws.

    Attributes:
        loss: L averaged; `losses` [S] are the single ones.
        gradient: E_q[g], [D]; `pair_gradients` [K, D] are its averages over each antithetic pair.
        hessian: E_q[H] as [D, D], or its diagonal as [D].
        others: None: in Pyro the other parameters have their gradients from the host's own backward pass.
        extras: of the first draw.
    """

    loss: Tensor
    losses: Tensor
    gradient: Tensor
    pair_gradients: Tensor
    hessian: Tensor
    others: Any
    extras: Extras


def each_draw(draws: Draws) -> list[Draws]:
    columns = [[None] * len(draws.number) if column is None else column for column in draws]
    return [Draws(*draw) for draw in zip(*columns, strict=True)]


def value_and_gradient(
    objective: Objective, loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draw: Draws
) -> tuple[Tensor, Extras, Tensor, Tensor]:
    """(L, extras, ∇_m L with its graph, the leaf m that it is differentiable in)."""
    location = loc.detach().requires_grad_()
    with torch.enable_grad():
        loss, extras = objective(location, scales, others, draw)
        (gradient,) = torch.autograd.grad(loss, location, create_graph=True, materialize_grads=True)
    return loss.detach(), extras, gradient, location


def average_over_pairs(
    losses: list[Tensor], gradients: list[Tensor], hessians: list[Tensor], extras: list[Extras]
) -> Estimate:
    """The estimate from S draws, ordered as `Draws` orders them."""
    num_pairs = len(losses) // 2
    stacked, gradient = torch.stack(losses), torch.stack(gradients)
    return Estimate(
        loss=stacked.mean(),
        losses=stacked,
        gradient=gradient.mean(0),
        pair_gradients=(gradient[:num_pairs] + gradient[num_pairs:]) / 2,
        hessian=torch.stack(hessians).mean(0),
        others=None,
        extras=extras[0],
    )
