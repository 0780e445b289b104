"""Whether the Hessians at a step's draws say what E_q[∇²ℓ] is, or miss most of it.

For a pair of draws m ± C ε let t be the mean of tr Cᵀ H C over the two, and u = ½ (C ε)ᵀ (g(m + C ε) − g(m − C ε)):

    E[t] = tr Cᵀ E_q[∇²ℓ] C = E[u]

by Price 1958 where ℓ is smooth, and by Stein 1981 wherever it is continuous. On a quadratic t is constant. Where ℓ is
straight but for places that are narrow beside q, as the log likelihood of a logistic regression is whose classes a
hyperplane separates, under a wide prior, most draws have next to nothing of the curvature and a few have a multiple of
it; at a kink, as of |z|, no draw has any. A step *misses* curvature where, over its pairs,

    median of t < ¼ mean of u > 0;

a step of one pair says nothing. Once a fifth of the last steps did, in an average over sixteen, the curvature is that
of secants from the next step on (`gradients/secant.py`), whose chords are as long as q is wide. The draws that were
kept are forgotten with what they missed, and so is the noise that the rate was cut for.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["Missed", "after", "init", "misses"]

SHORT, OFTEN, MEMORY = 0.25, 0.2, 16.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Missed:
    """Carried between steps.

    Attributes:
        share: of the last steps, those that missed curvature.
        secants: whether it is that of secants from now on.
    """

    share: Array
    secants: Array


def init(like: Array) -> Missed:
    return Missed(share=jnp.zeros((), like.dtype), secants=jnp.zeros((), bool))


def misses(traces: Array, chords: Array, there: Array) -> Array:
    """Whether a step does, from t and u of its pairs, [K], those that are `there`."""
    traces, chords = (jnp.where(there, values, jnp.nan) for values in (traces, chords))
    mean = jnp.nanmean(chords)
    return (mean > 0) & (jnp.nanmedian(traces) < SHORT * mean)


def after(missed: Missed, step: Array) -> Missed:
    """The next state, after a step that did or did not."""
    share = missed.share + (step.astype(missed.share.dtype) - missed.share) / MEMORY
    return Missed(share=share, secants=missed.secants | (share > OFTEN))
