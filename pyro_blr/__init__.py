"""Natural-gradient variational inference for Pyro by the Bayesian learning rule."""

from .optim.blr import BLR as BLR

__all__ = ["BLR"]
