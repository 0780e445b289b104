"""Exponential families: natural coordinates, their geometry, and the way back to the host's parameters."""

from ._family import Block as Block
from ._family import Precision as Precision
from ._family import Structure as Structure
from .multivariate_normal import DensePrecision as DensePrecision
from .normal import DiagonalPrecision as DiagonalPrecision

__all__ = ["Block", "DensePrecision", "DiagonalPrecision", "Precision", "Structure"]
