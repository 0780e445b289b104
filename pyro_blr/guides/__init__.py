"""Guides whose parameters are natural parameters."""

from .auto_exponential_family import AutoExponentialFamily as AutoExponentialFamily
from .natural_param import natural_param as natural_param

__all__ = ["AutoExponentialFamily", "natural_param"]
