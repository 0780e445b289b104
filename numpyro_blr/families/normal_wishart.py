"""The normal-Wishart distribution of (x, X): X Wishart with scale V and n degrees of freedom, x | X normal about m.

    T = (log|X|, X, X x, xᵀ X x),    λ = ((n − D)/2, −V⁻¹/2 − κ m mᵀ/2, κ m, −κ/2)

The precision of x is κ X. A is the Wishart distribution's plus D log(2π/κ)/2. Its sigma points are the Wishart
distribution's two in X, each with x = m + (κ X)^(−1/2) ε. From X⁻¹ f_x = c₃ + 2 c₄ x over the signs ε follow c₃ and c₄;
what they leave of f_X is the Wishart distribution's.

Source: Bishop 2006, "Pattern Recognition and Machine Learning", appendix B.
"""

from __future__ import annotations

from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample

from ._natural import Natural, family
from .multivariate_normal import _inverse_cholesky
from .wishart import WishartNatural

__all__ = ["NormalWishart", "NormalWishartNatural"]


class RealAndPositiveDefinite(constraints.Constraint):
    """Of [D, D + 1]: the columns after the first are symmetric and positive definite."""

    event_dim = 2

    def __call__(self, x):
        return jnp.isfinite(x[..., 0]).all(-1) & constraints.positive_definite(x[..., 1:])

    def feasible_like(self, prototype):
        dimension = jnp.shape(prototype)[-2]
        return jnp.broadcast_to(jnp.eye(dimension, dimension + 1, 1), jnp.shape(prototype))

    def tree_flatten(self):
        return (), ((), {})

    def eq(self, other, static=False):
        return isinstance(other, RealAndPositiveDefinite)


class LowerTriangleOfLast(Transform):
    """[D + D (D + 1)/2], x and the host's vector for X, to [D, D + 1]."""

    domain = constraints.real_vector
    codomain = RealAndPositiveDefinite()

    def __call__(self, x):
        dimension = self.inverse_shape_of(jnp.shape(x)[-1])
        matrix = biject_to(constraints.positive_definite)(x[..., dimension:])
        return jnp.concatenate([x[..., :dimension, None], matrix], -1)

    def _inverse(self, y):
        return jnp.concatenate([y[..., 0], biject_to(constraints.positive_definite).inv(y[..., 1:])], -1)

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        dimension = jnp.shape(y)[-2]
        return biject_to(constraints.positive_definite).log_abs_det_jacobian(x[..., dimension:], y[..., 1:])

    @staticmethod
    def inverse_shape_of(size: int) -> int:
        """D of D + D (D + 1)/2."""
        return round(((9 + 8 * size) ** 0.5 - 3) / 2)

    def forward_shape(self, shape):
        dimension = self.inverse_shape_of(shape[-1])
        return (*shape[:-1], dimension, dimension + 1)

    def inverse_shape(self, shape):
        return (*shape[:-2], shape[-2] + shape[-2] * (shape[-2] + 1) // 2)

    def tree_flatten(self):
        return (), ((), {})

    def eq(self, other, static=False):
        return isinstance(other, LowerTriangleOfLast)


biject_to.register(RealAndPositiveDefinite, lambda constraint: LowerTriangleOfLast())


class NormalWishart(dist.Distribution):
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
    reparametrized_params: ClassVar = ["loc", "kappa", "scale_tril"]

    def __init__(self, loc, kappa, scale_tril, df, *, validate_args=None) -> None:
        dimension = jnp.shape(scale_tril)[-1]
        shapes = jnp.shape(loc)[:-1], jnp.shape(kappa), jnp.shape(scale_tril)[:-2], jnp.shape(df)
        batch = jnp.broadcast_shapes(*shapes)
        self.loc = jnp.broadcast_to(loc, (*batch, dimension))
        self.scale_tril = jnp.broadcast_to(scale_tril, (*batch, dimension, dimension))
        self.kappa, self.df = jnp.broadcast_to(kappa, batch), jnp.broadcast_to(df, batch)
        super().__init__(batch_shape=batch, event_shape=(dimension, dimension + 1), validate_args=validate_args)

    def sample(self, key, sample_shape=()) -> Array:
        key_precision, key_mean = jax.random.split(key)
        precision = dist.Wishart(self.df, scale_tril=self.scale_tril).sample(key_precision, sample_shape)
        noise = jax.random.normal(key_mean, precision.shape[:-1], precision.dtype)
        shift = jnp.squeeze(_inverse_cholesky(precision) @ noise[..., None], -1) / jnp.sqrt(self.kappa)[..., None]
        return jnp.concatenate([(self.loc + shift)[..., None], precision], -1)

    @validate_sample
    def log_prob(self, value) -> Array:
        x, precision = value[..., 0], value[..., 1:]
        shift, dimension = x - self.loc, x.shape[-1]
        distance = self.kappa * (_times(precision, shift) * shift).sum(-1)
        log_determinant = jnp.linalg.slogdet(precision)[1] + dimension * jnp.log(self.kappa / (2 * jnp.pi))
        wishart = dist.Wishart(self.df, scale_tril=self.scale_tril).log_prob(precision)
        return wishart + (log_determinant - distance) / 2

    def marginal(self) -> dist.Wishart:
        """Of X."""
        return dist.Wishart(self.df, scale_tril=self.scale_tril)

    def conditional(self, precision: Array) -> dist.MultivariateNormal:
        """Of x given X."""
        return dist.MultivariateNormal(self.loc, precision_matrix=self.kappa[..., None, None] * precision)

    @property
    def mean(self) -> Array:
        scale = self.scale_tril @ jnp.swapaxes(self.scale_tril, -1, -2)
        return jnp.concatenate([self.loc[..., None], self.df[..., None, None] * scale], -1)


@family(NormalWishart)
class NormalWishartNatural(Natural):
    """λ = ((n − D)/2, −V⁻¹/2 − κ m mᵀ/2, κ m, −κ/2), of shapes [*batch], [*batch, D, D], [*batch, D] and [*batch]."""

    log_determinant: Array
    linear: Array
    product: Array
    quadratic: Array

    ranks = (0, 2, 1, 0)
    value_rank = 2
    host_parameters = (("loc", "kappa", "scale_tril", "df"),)

    @property
    def loc(self) -> Array:
        return self.product / self.kappa[..., None]

    @property
    def kappa(self) -> Array:
        return -2 * self.quadratic

    @classmethod
    def from_distribution(cls, distribution: NormalWishart) -> Self:
        wishart = dist.Wishart(distribution.df, scale_tril=distribution.scale_tril)
        return cls._of(distribution.loc, distribution.kappa, WishartNatural.from_distribution(wishart))

    def to_distribution(self) -> NormalWishart:
        precision = self._precision()
        return NormalWishart(self.loc, self.kappa, precision.scale_tril, precision.degrees_of_freedom)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Mean `value`, x about a tenth of its own standard deviation X^(−1/2) around it."""
        kappa = jnp.full_like(value[..., 0, 0], 100.0)
        return cls._of(value[..., 0], kappa, WishartNatural.from_value(value[..., 1:]))

    def sufficient_statistics(self, value: Array):
        x, precision = value[..., 0], self._precision().sufficient_statistics(value[..., 1:])
        product = _times(precision.linear, x)
        return self.Expectation(precision.log_determinant, precision.linear, product, (product * x).sum(-1))

    def log_partition(self) -> Array:
        dimension = self.product.shape[-1]
        return self._precision().log_partition() + dimension * jnp.log(2 * jnp.pi / self.kappa) / 2

    def to_expectation(self):
        precision, loc = self._precision().to_expectation(), self.loc
        product = _times(precision.linear, loc)
        quadratic = loc.shape[-1] / self.kappa + (product * loc).sum(-1)
        return self.Expectation(precision.log_determinant, precision.linear, product, quadratic)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        factor = _inverse_cholesky(expectation.linear)
        loc = _times(factor @ jnp.swapaxes(factor, -1, -2), expectation.product)
        precision = WishartNatural.Expectation(expectation.linear, expectation.log_determinant)
        kappa = loc.shape[-1] / (expectation.quadratic - (expectation.product * loc).sum(-1))
        return cls._of(loc, kappa, WishartNatural.from_expectation(precision))

    def in_domain(self) -> Array:
        finite = jnp.isfinite(self.flat()).all(-1)
        return finite & (self.quadratic < 0) & self._precision().in_domain()

    def fisher_solve(self, gradient) -> Self:
        # F⁻¹ = ∂λ/∂μ, with m = μ₂⁻¹ μ₃ and D/κ = μ₄ − μ₃ᵀ m beside the Wishart distribution's (μ₂, μ₁)
        loc, kappa, precision = self.loc, self.kappa, self._precision()
        matrix = (gradient.linear + jnp.swapaxes(gradient.linear, -1, -2)) / 2
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
    def split(cls, value: Array) -> tuple[Array, Array]:
        """(x, X)."""
        return value[..., 0], value[..., 1:]

    @classmethod
    def join(cls, *values: Array) -> Array:
        """The inverse of `split`."""
        loc, precision = values
        return jnp.concatenate([loc[..., None], precision], -1)

    @property
    def num_signs(self) -> int:
        return self.product.shape[-1] + 1

    def sigma_points(self, signs: Array) -> Array:
        """The last sign is that of X."""
        precision = self._precision().sigma_points(signs[..., -1:])
        shift = _times(_inverse_cholesky(self.kappa[..., None, None] * precision), signs[..., :-1])
        return jnp.concatenate([(self.loc + shift)[..., None], precision], -1)

    @classmethod
    def along(cls, values: Array, gradients: Array) -> Array:
        """The symmetric part of what X has."""
        return jnp.concatenate([gradients[..., :1], WishartNatural.along(values, gradients[..., 1:])], -1)

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
        x, precision = values[..., 0], values[..., 1:]
        factor = _inverse_cholesky(precision)
        slopes = _times(factor @ jnp.swapaxes(factor, -1, -2), gradients[..., 0])
        contrasts = jnp.swapaxes(signs[..., None, :-1], -1, -2)
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
    def _of(cls, loc: Array, kappa: Array, precision: WishartNatural) -> Self:
        product = kappa[..., None] * loc
        linear = precision.linear - product[..., :, None] * loc[..., None, :] / 2
        return cls(precision.log_determinant + 0.5, linear, product, -kappa / 2)


def _times(matrix: Array, vector: Array) -> Array:
    return jnp.squeeze(matrix @ vector[..., None], -1)
