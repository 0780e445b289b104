"""The inverse-Wishart distribution over D × D matrices, scale Ψ, n degrees of freedom: T(X) = (X⁻¹, log|X|).

X⁻¹ is Wishart distributed with scale Ψ⁻¹ and as many degrees of freedom, so that λ = (−Ψ/2, −(n + D + 1)/2). The sigma
points are the inverses of its points, and from the derivative of f in X⁻¹, −X ∇f X, follows c as it does there.

Source: Khan & Rue 2023, section 2; the Wishart distribution's file.
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from ._natural import Natural, family
from .multivariate_normal import _inverse_cholesky
from .wishart import WishartNatural

__all__ = ["InverseWishartNatural"]


@family(dist.InverseWishart)
class InverseWishartNatural(Natural):
    """λ = (−Ψ/2, −(n + D + 1)/2), of shapes [*batch, D, D] and [*batch]; n > D − 1."""

    inverse: Array
    log_determinant: Array

    ranks = (2, 0)
    value_rank = 2
    host_parameters = (("concentration", "scale_tril"),)

    @property
    def degrees_of_freedom(self) -> Array:
        return -2 * self.log_determinant - self.inverse.shape[-1] - 1

    @property
    def scale_matrix(self) -> Array:
        return -(self.inverse + jnp.swapaxes(self.inverse, -1, -2))

    @property
    def scale_tril(self) -> Array:
        return jnp.linalg.cholesky(self.scale_matrix)

    @classmethod
    def from_distribution(cls, distribution: dist.InverseWishart) -> Self:
        factor = distribution.scale_tril
        batch, dimension = distribution.batch_shape, factor.shape[-1]
        scale = factor @ jnp.swapaxes(factor, -1, -2)
        log_determinant = -(jnp.asarray(distribution.concentration) + dimension + 1) / 2
        return cls(
            inverse=jnp.broadcast_to(-scale / 2, (*batch, dimension, dimension)),
            log_determinant=jnp.broadcast_to(log_determinant, batch),
        )

    def to_distribution(self) -> dist.InverseWishart:
        return dist.InverseWishart(self.degrees_of_freedom, scale_tril=self.scale_tril)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """X⁻¹ of mean `value`⁻¹, with a hundred degrees of freedom more than the least."""
        return cls._of_inverse(WishartNatural.from_value(_inverse(value)))

    def sufficient_statistics(self, value: Array):
        inverse = _inverse(value)
        log_determinant = -WishartNatural.sufficient_statistics(self._inverse(), inverse).log_determinant
        return self.Expectation(inverse=inverse, log_determinant=log_determinant)

    def log_partition(self) -> Array:
        return self._inverse().log_partition()

    def to_expectation(self):
        expectation = self._inverse().to_expectation()
        return self.Expectation(inverse=expectation.linear, log_determinant=-expectation.log_determinant)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        inverse = WishartNatural.Expectation(expectation.inverse, -expectation.log_determinant)
        return cls._of_inverse(WishartNatural.from_expectation(inverse))

    def in_domain(self) -> Array:
        return self._inverse().in_domain()

    def widened(self, factor: float) -> Self:
        return self._of_inverse(self._inverse().widened(factor))

    def fisher_solve(self, gradient) -> Self:
        solved = self._inverse().fisher_solve(WishartNatural.Expectation(gradient.inverse, -gradient.log_determinant))
        return type(self)(inverse=solved.linear, log_determinant=-solved.log_determinant)

    def sigma_points(self, signs: Array) -> Array:
        center = self.scale_matrix / self.degrees_of_freedom[..., None, None]
        return center / self._inverse().point_factors(signs)[..., None, None]

    @classmethod
    def along(cls, values: Array, gradients: Array) -> Array:
        """The symmetric part."""
        return (gradients + jnp.swapaxes(gradients, -1, -2)) / 2

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
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


def _inverse(matrix: Array) -> Array:
    factor = _inverse_cholesky(matrix)
    return factor @ jnp.swapaxes(factor, -1, -2)
