"""Natural-gradient variational inference for Pyro by the Bayesian learning rule."""

from .fitting import fit as fit
from .guides import AutoExponentialFamily as AutoExponentialFamily
from .guides import AutoWeights as AutoWeights
from .guides import BayesianModule as BayesianModule
from .guides import natural_param as natural_param
from .optim.blr import BLR as BLR
from .optim.contributions import merge as merge
from .optim.contributions import site_contributions as site_contributions
from .optim.ivon import IVON as IVON

__all__ = [
    "BLR",
    "IVON",
    "AutoExponentialFamily",
    "AutoWeights",
    "BayesianModule",
    "fit",
    "merge",
    "natural_param",
    "site_contributions",
]
