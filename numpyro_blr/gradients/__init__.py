"""Estimators of ∇_μ E_q[ℓ] for Gaussian q: the averages of g = ∇ℓ and H = ∇²ℓ over draws (Bonnet, Price)."""

from ._estimate import Draws as Draws
from ._estimate import Estimate as Estimate
from ._estimate import Extras as Extras
from ._estimate import Objective as Objective
from ._estimate import Split as Split
from .curvatures import curvatures_at as curvatures_at
from .hessian import hessian as hessian
from .hutchinson import hutchinson as hutchinson
from .hutchinson import parted as parted
from .hutchinson import product as product
from .reparameterized import reparameterized as reparameterized
from .secant import Chords as Chords
from .secant import chords as chords
from .secant import secant as secant

__all__ = [
    "Chords",
    "Draws",
    "Estimate",
    "Extras",
    "Objective",
    "chords",
    "curvatures_at",
    "hessian",
    "hutchinson",
    "parted",
    "product",
    "reparameterized",
    "secant",
]
