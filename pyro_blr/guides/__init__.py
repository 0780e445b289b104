"""Guides whose parameters are natural parameters."""

from .auto_exponential_family import AutoExponentialFamily as AutoExponentialFamily
from .bayesian_module import AutoWeights as AutoWeights
from .bayesian_module import BayesianModule as BayesianModule
from .natural_param import natural_param as natural_param

__all__ = ["AutoExponentialFamily", "AutoWeights", "BayesianModule", "natural_param"]
