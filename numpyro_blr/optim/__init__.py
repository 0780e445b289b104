"""Learning rules: an estimate of the natural gradient in, the next state out."""

from .blr import BLR as BLR

__all__ = ["BLR"]
