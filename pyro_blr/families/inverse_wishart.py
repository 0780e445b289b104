"""The inverse-Wishart distribution over D × D matrices, scale Ψ, n degrees of freedom: T(X) = (X⁻¹, log|X|).

X⁻¹ is Wishart distributed with scale Ψ⁻¹ and as many degrees of freedom, so that λ = (−Ψ/2, −(n + D + 1)/2). The sigma
points are the inverses of its points, and from the derivative of f in X⁻¹, −X ∇f X, follows c as it does there.

Source: Khan & Rue 2023, section 2; the Wishart distribution's file.
"""

from __future__ import annotations

from typing import ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ._natural import Natural, family
from .multivariate_normal import _cholesky, _inverse_cholesky
from .wishart import WishartNatural, _draw

__all__ = ["InverseWishart", "InverseWishartNatural"]


class InverseWishart(dist.TorchDistribution):
    """X with X⁻¹ Wishart distributed.

    Args:
        df: n > D − 1, of shape [*batch].
        scale_tril: the lower factor of Ψ, [*batch, D, D].
    """

    arg_constraints: ClassVar = {"df": constraints.positive, "scale_tril": constraints.lower_cholesky}
    support = constraints.positive_definite
    has_rsample = True

    def __init__(self, df, scale_tril, validate_args=None) -> None:
        df = torch.as_tensor(df, dtype=scale_tril.dtype, device=scale_tril.device)
        batch = torch.broadcast_shapes(df.shape, scale_tril.shape[:-2])
        self.df, self.scale_tril = df.expand(batch), scale_tril.expand(*batch, -1, -1)
        super().__init__(batch, scale_tril.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(InverseWishart, _instance)
        new.df, new.scale_tril = self.df.expand(batch_shape), self.scale_tril.expand(*batch_shape, -1, -1)
        super(InverseWishart, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()) -> Tensor:
        return _inverse(_draw(self.df, self._wishart().scale_tril, torch.Size(sample_shape)))

    def log_prob(self, value) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # of the change of variables X → X⁻¹
        jacobian = (value.shape[-1] + 1) * torch.linalg.slogdet(value)[1]
        return self._wishart().log_prob(_inverse(value)) - jacobian

    @property
    def mean(self) -> Tensor:
        excess = (self.df - self.event_shape[-1] - 1)[..., None, None]
        return torch.where(excess > 0, self.scale_tril @ self.scale_tril.mT / excess, torch.nan)

    def _wishart(self) -> dist.Wishart:
        """Of X⁻¹."""
        factor = _inverse_cholesky(self.scale_tril @ self.scale_tril.mT)
        return dist.Wishart(self.df, scale_tril=factor, validate_args=False)


@family(InverseWishart)
class InverseWishartNatural(Natural):
    """λ = (−Ψ/2, −(n + D + 1)/2), of shapes [*batch, D, D] and [*batch]; n > D − 1."""

    inverse: Tensor
    log_determinant: Tensor

    ranks = (2, 0)
    value_rank = 2
    host_parameters = (("df", "scale_tril"),)

    @property
    def degrees_of_freedom(self) -> Tensor:
        return -2 * self.log_determinant - self.inverse.shape[-1] - 1

    @property
    def scale_matrix(self) -> Tensor:
        return -(self.inverse + self.inverse.mT)

    @property
    def scale_tril(self) -> Tensor:
        return _cholesky(self.scale_matrix)

    @classmethod
    def from_distribution(cls, distribution: InverseWishart) -> Self:
        factor = distribution.scale_tril
        batch, dimension = distribution.batch_shape, factor.shape[-1]
        scale = factor @ factor.mT
        log_determinant = -(distribution.df + dimension + 1) / 2
        return cls(
            inverse=torch.broadcast_to(-scale / 2, (*batch, dimension, dimension)),
            log_determinant=torch.broadcast_to(log_determinant, batch),
        )

    def to_distribution(self) -> InverseWishart:
        return InverseWishart(self.degrees_of_freedom, scale_tril=self.scale_tril)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """X⁻¹ of mean `value`⁻¹, with a hundred degrees of freedom more than the least."""
        return cls._of_inverse(WishartNatural.from_value(_inverse(value)))

    def sufficient_statistics(self, value: Tensor):
        inverse = _inverse(value)
        log_determinant = -WishartNatural.sufficient_statistics(self._inverse(), inverse).log_determinant
        return self.Expectation(inverse=inverse, log_determinant=log_determinant)

    def log_partition(self) -> Tensor:
        return self._inverse().log_partition()

    def to_expectation(self):
        expectation = self._inverse().to_expectation()
        return self.Expectation(inverse=expectation.linear, log_determinant=-expectation.log_determinant)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        inverse = WishartNatural.Expectation(expectation.inverse, -expectation.log_determinant)
        return cls._of_inverse(WishartNatural.from_expectation(inverse))

    def in_domain(self) -> Tensor:
        return self._inverse().in_domain()

    def widened(self, factor: float) -> Self:
        return self._of_inverse(self._inverse().widened(factor))

    def fisher_solve(self, gradient) -> Self:
        solved = self._inverse().fisher_solve(WishartNatural.Expectation(gradient.inverse, -gradient.log_determinant))
        return type(self)(inverse=solved.linear, log_determinant=-solved.log_determinant)

    def sigma_points(self, signs: Tensor) -> Tensor:
        center = self.scale_matrix / self.degrees_of_freedom[..., None, None]
        return center / self._inverse().point_factors(signs)[..., None, None]

    @classmethod
    def along(cls, values: Tensor, gradients: Tensor) -> Tensor:
        """The symmetric part."""
        return (gradients + gradients.mT) / 2

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        matched = WishartNatural.match(_inverse(values), -values @ gradients @ values, signs)
        return cls(inverse=matched.linear, log_determinant=-matched.log_determinant)

    def _inverse(self) -> WishartNatural:
        """λ of X⁻¹."""
        dimension = self.inverse.shape[-1]
        return WishartNatural(linear=self.inverse, log_determinant=-self.log_determinant - (dimension + 1))

    @classmethod
    def _of_inverse(cls, natural: WishartNatural) -> Self:
        log_determinant = -natural.log_determinant - (natural.dimension + 1)
        return cls(inverse=natural.linear, log_determinant=log_determinant)


def _inverse(matrix: Tensor) -> Tensor:
    factor = _inverse_cholesky(matrix)
    return factor @ factor.mT
