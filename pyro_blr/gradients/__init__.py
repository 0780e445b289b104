"""Estimators of ∇_μ E_q[ℓ] for Gaussian q: the averages of g = ∇ℓ and H = ∇²ℓ over draws (Bonnet, Price)."""

from ._estimate import AtPoints as AtPoints
from ._estimate import Draws as Draws
from ._estimate import Estimate as Estimate
from ._estimate import Extras as Extras
from ._estimate import Objective as Objective
from ._estimate import Split as Split
from ._estimate import Transformation as Transformation
from ._estimate import Vectorised as Vectorised
from ._estimate import each_draw as each_draw
from ._estimate import losses_of as losses_of
from ._second import has_second_derivative as has_second_derivative
from .curvatures import curvatures_at as curvatures_at
from .hessian import hessian as hessian
from .hutchinson import Graphs as Graphs
from .hutchinson import hutchinson as hutchinson
from .hutchinson import parted as parted
from .hutchinson import product as product
from .reparameterized import reparameterized as reparameterized
from .secant import Chords as Chords
from .secant import chords as chords
from .secant import secant as secant

__all__ = [
    "AtPoints",
    "Chords",
    "Draws",
    "Estimate",
    "Extras",
    "Graphs",
    "Objective",
    "Transformation",
    "Vectorised",
    "chords",
    "curvatures_at",
    "each_draw",
    "has_second_derivative",
    "hessian",
    "hutchinson",
    "losses_of",
    "parted",
    "product",
    "reparameterized",
    "secant",
]
