"""What an estimator is given and what it returns.

The objective is the host's loss as a function of the mean, at fixed standard-normal noise ε:

    L(m, C; ε) = ℓ(m + C ε) − log |C| + constant,    so that    ∇_m L = g(m + C ε),    ∇²_m L = H(m + C ε).

Averaged over ε these are E_q[g] = ∇_m E_q[ℓ] (Bonnet 1964) and E_q[H] = 2 ∇_Σ E_q[ℓ] (Price 1958). The entropy does not
depend on m, and a loss that integrates a part of itself analytically (`TraceMeanField_ELBO`) is covered as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "AtPoints",
    "Draws",
    "Estimate",
    "Extras",
    "Objective",
    "Split",
    "Transformation",
    "Vectorised",
    "at_every_draw",
    "average_over_pairs",
    "each_draw",
    "losses_of",
    "value_and_gradient",
]


class Draws(NamedTuple):
    """S draws of the noise as K = S/2 antithetic pairs: draw k and draw k + K are ε and −ε.

    Attributes:
        number: [S], which noise; the objective turns it into ε.
        sign: [S], +1 for the first half and −1 for the second.
        probes: [S, P, D] vectors for curvature products, Rademacher in each of P parts of the coordinates and zero in
            the others, or None where no estimator asks for them.
        members: the values of sites outside the Gaussian, for each of the S; passed through to the objective.
        noise: ε itself, [S, D], where the caller makes it; `number` and `sign` then play no part.
        chords: those of `secant.py`, or None for other estimators.
    """

    number: Any
    sign: Any
    probes: Tensor | None
    members: Any = None
    noise: Tensor | None = None
    chords: Any = None

    @classmethod
    def at(cls, noise: Tensor) -> Draws:
        """The draws at the rows of `noise`, [S, D]."""
        return cls(number=[None] * len(noise), sign=[None] * len(noise), probes=None, noise=noise)


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


Transformation = Callable[[Callable[..., Tensor], bool], Callable[..., tuple[Tensor, ...]]]
"""(L(m, C) of one draw, whether second derivatives are taken in forward mode) -> a function of m, C and that draw's row
of each column, in terms of `torch.func`."""


class Vectorised(ABC):
    """An objective that evaluates what an estimator needs at all draws at once, as one program without the host."""

    @property
    @abstractmethod
    def extras(self) -> Extras: ...

    @abstractmethod
    def at_all(
        self,
        transformation: Transformation,
        loc: Tensor,
        scales: tuple[Tensor | None, ...],
        draws: Draws | None,
        *columns: Tensor,
    ) -> tuple[Tensor, ...] | None:
        """What the transformed loss returns, each stacked over the draws; None where the program does not run there.

        Args:
            draws: None for the one draw of the host's own.
            columns: further inputs, one row a draw.
        """


class AtPoints(ABC):
    """An objective that can be evaluated at many means at once."""

    @abstractmethod
    def at_points(self, points: Tensor, scales: tuple[Tensor | None, ...], draw: Draws) -> tuple[Tensor, Tensor] | None:
        """(L [P], g [P, D]) with each of `points` [P, D] for m, at the noise of one draw; None where that fails."""


class Split(NamedTuple):
    """What a Hessian costs less by: most of its columns are those of a loss in which the others are constants.

    Whatever of the loss depends on the others alone, as a Gaussian process's covariance matrix and its Cholesky factor
    do on a few hyperparameters, is computed once then, and not differentiated along every coordinate.

    Attributes:
        held: the objective as a function of the `wide` coordinates alone; its derivatives in the others are zero.
        wide: their numbers, in order.
    """

    held: Objective
    wide: tuple[int, ...]

    def narrow(self, size: int) -> tuple[int, ...]:
        """The numbers of the others."""
        return tuple(sorted(set(range(size)) - set(self.wide)))


class Estimate(NamedTuple):
    """Averages over the draws.

    Attributes:
        loss: L averaged; `losses` [S] are the single ones.
        gradient: E_q[g], [D]; `pair_gradients` [K, D] are its averages over each antithetic pair.
        hessian: E_q[H] as [D, D], or its diagonal as [D].
        hessian_variance: of the diagonal as an average over the draws and their probes, [D]; None of a whole E_q[H].
        others: None: in Pyro the other parameters have their gradients from the host's own backward pass.
        extras: of the first draw.
        evaluations: gradients that it took; a Hessian counts as D, a Hessian-vector product as 2.
    """

    loss: Tensor
    losses: Tensor
    gradient: Tensor
    pair_gradients: Tensor
    hessian: Tensor
    others: Any
    extras: Extras
    evaluations: int = 0
    hessian_variance: Tensor | None = None


def each_draw(draws: Draws) -> list[Draws]:
    """One by one, without their chords."""
    columns = [[None] * len(draws.number) if column is None else column for column in draws._replace(chords=None)]
    return [Draws(*draw) for draw in zip(*columns, strict=True)]


def at_every_draw(
    objective: Objective,
    transformation: Transformation,
    at_draw: Callable[[Draws], tuple[Any, ...]],
    loc: Tensor,
    scales: tuple[Tensor | None, ...],
    draws: Draws,
    *columns: Tensor,
) -> tuple[tuple[Tensor, ...], Extras]:
    """Tensors with the draws along the first axis, and the extras of the first draw.

    Args:
        transformation: for an objective that takes all draws at once.
        at_draw: one draw -> (the same tensors, extras); for any other.
    """
    if isinstance(objective, Vectorised):
        found = objective.at_all(transformation, loc, scales, draws, *columns)
        if found is not None:
            return found, objective.extras
    *tensors, extras = zip(*map(at_draw, each_draw(draws)), strict=True)
    return tuple(map(torch.stack, tensors)), extras[0]


def losses_of(
    objective: Objective, loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draws: Draws
) -> Tensor:
    """L at every draw, [S]."""
    location = loc.detach().requires_grad_()  # TraceEnum_ELBO refuses a loss that cannot be differentiated

    def at_draw(draw: Draws):
        with torch.enable_grad():
            loss, extras = objective(location, scales, others, draw)
        return loss.detach(), extras

    (losses,), _ = at_every_draw(objective, _value, at_draw, loc, scales, draws)
    return losses


def _value(loss: Callable[..., Tensor], _: bool) -> Callable[..., tuple[Tensor, ...]]:
    return lambda loc, scales: (loss(loc, scales),)


def value_and_gradient(
    objective: Objective, loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draw: Draws
) -> tuple[Tensor, Extras, Tensor, Tensor]:
    """(L, extras, ∇_m L with its graph, the leaf m that it is differentiable in)."""
    location = loc.detach().requires_grad_()
    with torch.enable_grad():
        loss, extras = objective(location, scales, others, draw)
        (gradient,) = torch.autograd.grad(loss, location, create_graph=True, materialize_grads=True)
    return loss.detach(), extras, gradient, location


def average_over_pairs(losses: Tensor, gradients: Tensor, hessians: Tensor, extras: Extras, cost: int) -> Estimate:
    """The estimate from S draws stacked along the first axis, ordered as `Draws` orders them; `cost` of each."""
    num_pairs = len(losses) // 2
    return Estimate(
        loss=losses.mean(),
        losses=losses,
        gradient=gradients.mean(0),
        pair_gradients=(gradients[:num_pairs] + gradients[num_pairs:]) / 2,
        hessian=hessians.mean(0),
        others=None,
        extras=extras,
        evaluations=cost * len(losses),
        hessian_variance=hessians.var(0, correction=0) / (len(losses) - 1) if hessians.ndim == 2 else None,
    )
