"""The normal-Wishart distribution of (x, X): X Wishart with scale V and n degrees of freedom, x | X normal about m.

    T = (log|X|, X, X x, xᵀ X x),    λ = ((n − D)/2, −V⁻¹/2 − κ m mᵀ/2, κ m, −κ/2)

The precision of x is κ X. A is the Wishart distribution's plus D log(2π/κ)/2. Its sigma points are the Wishart
distribution's two in X, each with x = m + (κ X)^(−1/2) ε. From X⁻¹ f_x = c₃ + 2 c₄ x over the signs ε follow c₃ and c₄;
what they leave of f_X is the Wishart distribution's.

Source: Bishop 2006, "Pattern Recognition and Machine Learning", appendix B.
"""

from __future__ import annotations

from math import pi
from typing import ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.distributions.transforms import Transform

from ._natural import Natural, family
from .multivariate_normal import _inverse_cholesky
from .wishart import Wishart, WishartNatural, _draw

__all__ = ["NormalWishart", "NormalWishartNatural"]


class RealAndPositiveDefinite(constraints.Constraint):
    """Of [D, D + 1]: the columns after the first are symmetric and positive definite."""

    event_dim = 2

    def check(self, value):
        return value[..., 0].isfinite().all(-1) & constraints.positive_definite.check(value[..., 1:])


class LowerTriangleOfLast(Transform):
    """[D, D + 1], x and the host's matrix for X, to [D, D + 1]; as the host's own, it ignores the upper triangle."""

    domain = constraints.independent(constraints.real, 2)
    codomain = RealAndPositiveDefinite()

    def __eq__(self, other):
        return isinstance(other, LowerTriangleOfLast)

    def _call(self, x):
        return torch.cat([x[..., :1], transform_to(constraints.positive_definite)(x[..., 1:])], -1)

    def _inverse(self, y):
        return torch.cat([y[..., :1], transform_to(constraints.positive_definite).inv(y[..., 1:])], -1)


transform_to.register(RealAndPositiveDefinite, lambda constraint: LowerTriangleOfLast())


class NormalWishart(dist.TorchDistribution):
    """The conjugate prior of a multivariate normal distribution's mean x and precision X, value [*batch, D, D + 1].

    The first column of a value is x, the others are X.

    Args:
        loc: m of shape [*batch, D].
        kappa: κ, how many draws' worth of precision the mean has.
        scale_tril: the lower factor of V, [*batch, D, D].
        df: n > D − 1.
    """

    arg_constraints: ClassVar = {
        "loc": constraints.real_vector,
        "kappa": constraints.positive,
        "scale_tril": constraints.lower_cholesky,
        "df": constraints.positive,
    }
    support = RealAndPositiveDefinite()
    has_rsample = True

    def __init__(self, loc, kappa, scale_tril, df, validate_args=None) -> None:
        kappa, df = (torch.as_tensor(item, dtype=loc.dtype, device=loc.device) for item in (kappa, df))
        batch = torch.broadcast_shapes(loc.shape[:-1], kappa.shape, scale_tril.shape[:-2], df.shape)
        self.loc, self.scale_tril = loc.expand(*batch, -1), scale_tril.expand(*batch, -1, -1)
        self.kappa, self.df = kappa.expand(batch), df.expand(batch)
        dimension = scale_tril.shape[-1]
        super().__init__(batch, torch.Size([dimension, dimension + 1]), validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(NormalWishart, _instance)
        new.loc, new.scale_tril = self.loc.expand(*batch_shape, -1), self.scale_tril.expand(*batch_shape, -1, -1)
        new.kappa, new.df = self.kappa.expand(batch_shape), self.df.expand(batch_shape)
        super(NormalWishart, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()) -> Tensor:
        precision = _draw(self.df, self.scale_tril, torch.Size(sample_shape))
        noise = torch.randn_like(precision[..., 0])
        shift = _times(_inverse_cholesky(precision), noise) / torch.sqrt(self.kappa)[..., None]
        return torch.cat([(self.loc + shift)[..., None], precision], -1)

    def log_prob(self, value) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x, precision = value[..., 0], value[..., 1:]
        shift, dimension = x - self.loc, x.shape[-1]
        distance = self.kappa * (_times(precision, shift) * shift).sum(-1)
        log_determinant = torch.linalg.slogdet(precision)[1] + dimension * torch.log(self.kappa / (2 * pi))
        wishart = dist.Wishart(self.df, scale_tril=self.scale_tril).log_prob(precision)
        return wishart + (log_determinant - distance) / 2

    def marginal(self) -> dist.Wishart:
        """Of X."""
        return Wishart(self.df, scale_tril=self.scale_tril)

    def conditional(self, precision: Tensor) -> dist.MultivariateNormal:
        """Of x given X."""
        return dist.MultivariateNormal(self.loc, precision_matrix=self.kappa[..., None, None] * precision)

    @property
    def mean(self) -> Tensor:
        scale = self.scale_tril @ self.scale_tril.mT
        return torch.cat([self.loc[..., None], self.df[..., None, None] * scale], -1)


@family(NormalWishart)
class NormalWishartNatural(Natural):
    """λ = ((n − D)/2, −V⁻¹/2 − κ m mᵀ/2, κ m, −κ/2), of shapes [*batch], [*batch, D, D], [*batch, D] and [*batch]."""

    log_determinant: Tensor
    linear: Tensor
    product: Tensor
    quadratic: Tensor

    ranks = (0, 2, 1, 0)
    value_rank = 2
    host_parameters = (("loc", "kappa", "scale_tril", "df"),)

    @property
    def loc(self) -> Tensor:
        return self.product / self.kappa[..., None]

    @property
    def kappa(self) -> Tensor:
        return -2 * self.quadratic

    @classmethod
    def from_distribution(cls, distribution: NormalWishart) -> Self:
        wishart = dist.Wishart(distribution.df, scale_tril=distribution.scale_tril)
        return cls._of(distribution.loc, distribution.kappa, WishartNatural.from_distribution(wishart))

    def to_distribution(self) -> NormalWishart:
        precision = self._precision()
        return NormalWishart(self.loc, self.kappa, precision.scale_tril, precision.degrees_of_freedom)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Mean `value`, x about a tenth of its own standard deviation X^(−1/2) around it."""
        kappa = torch.full_like(value[..., 0, 0], 100.0)
        return cls._of(value[..., 0], kappa, WishartNatural.from_value(value[..., 1:]))

    def sufficient_statistics(self, value: Tensor):
        x, precision = value[..., 0], self._precision().sufficient_statistics(value[..., 1:])
        product = _times(precision.linear, x)
        return self.Expectation(precision.log_determinant, precision.linear, product, (product * x).sum(-1))

    def log_partition(self) -> Tensor:
        dimension = self.product.shape[-1]
        return self._precision().log_partition() + dimension * torch.log(2 * pi / self.kappa) / 2

    def to_expectation(self):
        precision, loc = self._precision().to_expectation(), self.loc
        product = _times(precision.linear, loc)
        quadratic = loc.shape[-1] / self.kappa + (product * loc).sum(-1)
        return self.Expectation(precision.log_determinant, precision.linear, product, quadratic)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        factor = _inverse_cholesky(expectation.linear)
        loc = _times(factor @ factor.mT, expectation.product)
        precision = WishartNatural.Expectation(expectation.linear, expectation.log_determinant)
        kappa = loc.shape[-1] / (expectation.quadratic - (expectation.product * loc).sum(-1))
        return cls._of(loc, kappa, WishartNatural.from_expectation(precision))

    def in_domain(self) -> Tensor:
        finite = self.flat().isfinite().all(-1)
        return finite & (self.quadratic < 0) & self._precision().in_domain()

    def fisher_solve(self, gradient) -> Self:
        # F⁻¹ = ∂λ/∂μ, with m = μ₂⁻¹ μ₃ and D/κ = μ₄ − μ₃ᵀ m beside the Wishart distribution's (μ₂, μ₁)
        loc, kappa, precision = self.loc, self.kappa, self._precision()
        matrix = (gradient.linear + gradient.linear.mT) / 2
        solved = precision.fisher_solve(WishartNatural.Expectation(matrix, gradient.log_determinant))
        moved, rate = _times(matrix, loc), precision.rate_matrix / precision.degrees_of_freedom[..., None, None]
        shift = _times(rate, gradient.product - moved)
        inner = gradient.quadratic + (loc * (moved - 2 * gradient.product)).sum(-1)
        change = -(kappa**2) * inner / loc.shape[-1]
        product = change[..., None] * loc + kappa[..., None] * shift
        cross = product[..., :, None] * loc[..., None, :] + loc[..., :, None] * product[..., None, :]
        outer = change[..., None, None] * loc[..., :, None] * loc[..., None, :]
        linear = solved.linear - (cross - outer) / 2
        return type(self)(solved.log_determinant, linear, product, -change / 2)

    @classmethod
    def split(cls, value: Tensor) -> tuple[Tensor, Tensor]:
        """(x, X)."""
        return value[..., 0], value[..., 1:]

    @classmethod
    def join(cls, *values: Tensor) -> Tensor:
        """The inverse of `split`."""
        loc, precision = values
        return torch.cat([loc[..., None], precision], -1)

    @property
    def num_signs(self) -> int:
        return self.product.shape[-1] + 1

    def sigma_points(self, signs: Tensor) -> Tensor:
        """The last sign is that of X."""
        precision = self._precision().sigma_points(signs[..., -1:])
        shift = _times(_inverse_cholesky(self.kappa[..., None, None] * precision), signs[..., :-1])
        return torch.cat([(self.loc + shift)[..., None], precision], -1)

    @classmethod
    def along(cls, values: Tensor, gradients: Tensor) -> Tensor:
        """The symmetric part of what X has."""
        return torch.cat([gradients[..., :1], WishartNatural.along(values, gradients[..., 1:])], -1)

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        x, precision = values[..., 0], values[..., 1:]
        factor = _inverse_cholesky(precision)
        slopes = _times(factor @ factor.mT, gradients[..., 0])
        contrasts = torch.swapaxes(signs[..., None, :-1], -1, -2)
        along, across = (contrasts * x[..., None, :]).mean(0), (contrasts * slopes[..., None, :]).mean(0)
        weighted = along @ precision.mean(0)
        quadratic = (weighted * across).sum((-2, -1)) / (weighted * along).sum((-2, -1)) / 2
        product = slopes.mean(0) - 2 * quadratic[..., None] * x.mean(0)
        half = product + quadratic[..., None] * x
        rest = gradients[..., 1:] - half[..., :, None] * x[..., None, :]
        matched = WishartNatural.match(precision, rest, signs[..., -1:])
        return cls(matched.log_determinant, matched.linear, product, quadratic)

    def _precision(self) -> WishartNatural:
        """λ of X."""
        loc = self.loc
        linear = self.linear + self.product[..., :, None] * loc[..., None, :] / 2
        return WishartNatural(linear=linear, log_determinant=self.log_determinant - 0.5)

    @classmethod
    def _of(cls, loc: Tensor, kappa: Tensor, precision: WishartNatural) -> Self:
        product = kappa[..., None] * loc
        linear = precision.linear - product[..., :, None] * loc[..., None, :] / 2
        return cls(precision.log_determinant + 0.5, linear, product, -kappa / 2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None]).squeeze(-1)
