"""What an estimator is given and what it returns.

The objective is the host's loss as a function of the mean, at fixed standard-normal noise ε:

    L(m, C; ε) = ℓ(m + C ε) − log |C| + constant,    so that    ∇_m L = g(m + C ε),    ∇²_m L = H(m + C ε).

Averaged over ε these are E_q[g] = ∇_m E_q[ℓ] (Bonnet 1964) and E_q[H] = 2 ∇_Σ E_q[ℓ] (Price 1958). The entropy does not
depend on m, and a loss that integrates a part of itself analytically (`TraceMeanField_ELBO`) is covered as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

__all__ = ["Draws", "Estimate", "Extras", "Objective", "Split", "average_over_pairs", "value_and_gradients"]


class Draws(NamedTuple):
    """S draws of the noise as K = S/2 antithetic pairs: draw k and draw k + K are ε and −ε.

    Attributes:
        number: [S], which noise; the objective turns it into ε.
        sign: [S], +1 for the first half and −1 for the second.
        probes: [S, P, D] vectors for curvature products, Rademacher in each of P parts of the coordinates and zero in
            the others, or None where no estimator asks for them.
        members: the values of sites outside the Gaussian, each with S in front; passed through to the objective.
        noise: ε itself, [S, D], where the caller makes it; `number` and `sign` then play no part.
        chords: those of `secant.py`, or None for other estimators.
    """

    number: Any
    sign: Any
    probes: Array | None
    members: Any = None
    noise: Array | None = None
    chords: Any = None

    @classmethod
    def at(cls, noise: Array) -> Draws:
        """The draws at the rows of `noise`, [S, D], or at one noise, [D]."""
        return cls(number=None, sign=None, probes=None, noise=noise)


class Extras(NamedTuple):
    """What the objective returns beside the loss.

    Attributes:
        aux: the host's auxiliary output (NumPyro's mutable state), passed through.
        weight: [D], the factor with which each coordinate's entropy enters this loss: 1, N/M for a row of a
            subsampled plate that is in the batch, 0 for one that is not; None where all are 1.
        minibatch: whether a plate is subsampled, so that the loss is itself a random function from step to step.
        coverage: the same factor for each cell of each site outside the Gaussian, by name.
    """

    aux: Any
    weight: Array | None = None
    minibatch: Any = False
    coverage: Any = None


Objective = Callable[[Array, tuple[Array | None, ...], Any, Any], tuple[Array, Extras]]
"""(mean [D], a scale per block, other parameters, one draw) -> (loss, extras)."""


class Split(NamedTuple):
    """What a Hessian costs less by: most of its columns are those of a loss in which the others are constants.

    Whatever of the loss depends on the others alone, as a Gaussian process's covariance matrix and its Cholesky factor
    do on a few hyperparameters, is computed once then, and not differentiated along every coordinate.

    Attributes:
        held: the objective as a function of the `wide` coordinates alone; its derivatives in the others are zero.
        wide: their numbers, in order.
    """

    held: Objective
    wide: np.ndarray

    def narrow(self, size: int) -> np.ndarray:
        """The numbers of the others."""
        return np.setdiff1d(np.arange(size), self.wide)


class Estimate(NamedTuple):
    """Averages over the draws.

    Attributes:
        loss: L averaged; `losses` [S] are the single ones.
        gradient: E_q[g], [D]; `pair_gradients` [K, D] are its averages over each antithetic pair.
        hessian: E_q[H] as [D, D], or its diagonal as [D].
        hessian_variance: of the diagonal as an average over the draws and their probes, [D]; None of a whole E_q[H].
        others: gradient with respect to the other parameters, from the same backward passes.
        extras: of the first draw.
        evaluations: gradients that it took; a Hessian counts as D, a Hessian-vector product as 2.
    """

    loss: Array
    losses: Array
    gradient: Array
    pair_gradients: Array
    hessian: Array
    others: Any
    extras: Extras
    evaluations: Any = 0
    hessian_variance: Any = None


def value_and_gradients(objective: Objective, argnums: tuple[int, ...], forward: bool) -> Callable:
    """`jax.value_and_grad` with auxiliary output, or the same by forward mode for models that allow no other."""
    if not forward:
        return jax.value_and_grad(objective, argnums=argnums, has_aux=True)

    def evaluate(*args):
        def with_value(*args):
            loss, extras = objective(*args)
            return loss, (loss, extras)

        gradients, value = jax.jacfwd(with_value, argnums=argnums, has_aux=True)(*args)
        return value, gradients

    return evaluate


def average_over_pairs(
    losses: Array, gradients: Array, hessian: Array, others: Any, extras: Extras, cost: Any
) -> Estimate:
    """The estimate from S draws stacked along the first axis, ordered as `Draws` orders them; `cost` of each."""
    num_pairs = len(losses) // 2
    return Estimate(
        loss=losses.mean(),
        losses=losses,
        gradient=gradients.mean(0),
        pair_gradients=(gradients[:num_pairs] + gradients[num_pairs:]) / 2,
        hessian=hessian.mean(0),
        others=jax.tree.map(lambda leaf: leaf.mean(0), others),
        extras=jax.tree.map(lambda leaf: leaf[0], extras),
        evaluations=cost * len(losses),
        hessian_variance=hessian.var(0) / (len(losses) - 1) if hessian.ndim == 2 else None,
    )
