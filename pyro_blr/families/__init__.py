"""Exponential families: natural coordinates, their geometry, and the way back to the host's parameters."""

from ._family import Block as Block
from ._family import Precision as Precision
from ._family import Structure as Structure
from ._natural import Expectation as Expectation
from ._natural import Natural as Natural
from ._natural import family as family
from ._natural import family_of as family_of
from ._natural import natural_of as natural_of
from .bernoulli import BernoulliNatural as BernoulliNatural
from .beta import BetaNatural as BetaNatural
from .categorical import CategoricalNatural as CategoricalNatural
from .dirichlet import DirichletNatural as DirichletNatural
from .exponential import ExponentialNatural as ExponentialNatural
from .gamma import GammaNatural as GammaNatural
from .geometric import GeometricNatural as GeometricNatural
from .inverse_gamma import InverseGammaNatural as InverseGammaNatural
from .inverse_gaussian import InverseGaussian as InverseGaussian
from .inverse_gaussian import InverseGaussianNatural as InverseGaussianNatural
from .inverse_wishart import InverseWishart as InverseWishart
from .inverse_wishart import InverseWishartNatural as InverseWishartNatural
from .low_rank import LowRankPrecision as LowRankPrecision
from .low_rank import factored as factored
from .multivariate_normal import DensePrecision as DensePrecision
from .multivariate_normal import MultivariateNormalNatural as MultivariateNormalNatural
from .normal import DiagonalPrecision as DiagonalPrecision
from .normal import NormalNatural as NormalNatural
from .normal_gamma import NormalGamma as NormalGamma
from .normal_gamma import NormalGammaNatural as NormalGammaNatural
from .normal_wishart import NormalWishart as NormalWishart
from .normal_wishart import NormalWishartNatural as NormalWishartNatural
from .poisson import PoissonNatural as PoissonNatural
from .von_mises import VonMisesNatural as VonMisesNatural
from .von_mises_fisher import VonMisesFisher as VonMisesFisher
from .von_mises_fisher import VonMisesFisherNatural as VonMisesFisherNatural
from .wishart import WishartNatural as WishartNatural

__all__ = [
    "BernoulliNatural",
    "BetaNatural",
    "Block",
    "CategoricalNatural",
    "DensePrecision",
    "DiagonalPrecision",
    "DirichletNatural",
    "Expectation",
    "ExponentialNatural",
    "GammaNatural",
    "GeometricNatural",
    "InverseGammaNatural",
    "InverseGaussian",
    "InverseGaussianNatural",
    "InverseWishart",
    "InverseWishartNatural",
    "LowRankPrecision",
    "MultivariateNormalNatural",
    "Natural",
    "NormalGamma",
    "NormalGammaNatural",
    "NormalNatural",
    "NormalWishart",
    "NormalWishartNatural",
    "PoissonNatural",
    "Precision",
    "Structure",
    "VonMisesFisher",
    "VonMisesFisherNatural",
    "VonMisesNatural",
    "WishartNatural",
    "factored",
    "family",
    "family_of",
    "natural_of",
]
