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

Far from the optimum q may be too wide for a curvature that is none of its own there, and secants have noise where
Hessians have none, in directions that are flat at every draw. So every sixth step is a *look*: beside the secants that
it takes, the Hessians at its draws. It shows the curvature where each of its pairs has some, of what the others see and
of the D that there is at the fixed point, S = E_q[∇²ℓ]:

    least t ≥ mean of u / 5  and  ≥ D / 20,

and the next one comes after one step then. After four in a row that did Hessians are back, and the rule begins anew as
before; every time it takes four times as many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

__all__ = ["Missed", "after", "init", "misses"]

SHORT, OFTEN, MEMORY = 0.25, 0.2, 16.0
LOOKS, LONGER, SOON, LATER = 4, 4, 1, 5


@dataclass(frozen=True)
class Missed:
    """Carried between steps.

    Attributes:
        share: of the last steps by Hessians, those that missed curvature; 0 during secants.
        secants: whether it is that of secants from now on.
        wait: steps before the next look.
        shown: looks in a row, the last ones, that showed curvature.
        needed: so many bring Hessians back.
    """

    share: float
    secants: bool
    wait: int
    shown: int
    needed: int

    @property
    def look(self) -> bool:
        """Whether the next step is one."""
        return self.secants and self.wait == 0


def init() -> Missed:
    return Missed(share=0.0, secants=False, wait=LATER, shown=0, needed=LOOKS)


def misses(missed: Missed, traces: Tensor, chords: Tensor, size: int) -> bool:
    """Whether a step by Hessians does, or at a look they would, in `size` coordinates.

    Args:
        traces, chords: t and u of the pairs, [K].
    """
    mean = chords.mean()
    if missed.secants:
        return not bool(traces.min() >= (mean / 5).clamp(min=size / 20))
    return bool((mean > 0) & (traces.quantile(0.5) < SHORT * mean))


def after(missed: Missed, step: bool) -> Missed:
    """The next state, after a step that did or did not."""
    if not missed.secants:
        share = missed.share + (step - missed.share) / MEMORY
        return replace(missed, share=share, secants=share > OFTEN)
    if not missed.look:
        return replace(missed, share=0.0, wait=missed.wait - 1)
    shown = 0 if step else missed.shown + 1
    if shown == missed.needed:
        return replace(init(), needed=LONGER * missed.needed)
    return replace(missed, wait=SOON if shown else LATER, shown=shown)
