"""The von Mises–Fisher distribution on the sphere in R^p, direction m, concentration κ: T(z) = z, λ = κ m, |z| = 1.

    A = log ∫ e^(κ cos θ) dz,    μ = A'(κ) m,    F = A''(κ) m mᵀ + (A'(κ)/κ) (I − m mᵀ)

Every λ in R^p has its distribution, zero the uniform one. z = t m + √(1 − t²) u has E[t] = A'(κ), Var[t] = A''(κ); its
sigma points have two values of t, half a standard deviation apart or less, and u from p − 1 signs. Along the sphere
∇f = (I − z zᵀ) c: what is orthogonal to m follows from its mean, and c's part along m from its slope towards m.

Source: Mardia & Jupp 2000, "Directional Statistics"; Wood 1994 for the draws.
"""

from __future__ import annotations

from math import lgamma, log, pi
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.nn import logsumexp, softmax
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from ._natural import Natural, at_both, family, smallest_spread

__all__ = ["VonMisesFisher", "VonMisesFisherNatural"]

NUM_TERMS = 24


class VonMisesFisher(dist.Distribution):
    """On the unit sphere, with the density e^(κ m·z − A) relative to its surface.

    Args:
        mean_direction: m of shape [*batch, p], |m| = 1.
        concentration: κ of shape [*batch].
    """

    arg_constraints: ClassVar = {"mean_direction": constraints.sphere, "concentration": constraints.positive}
    support = constraints.sphere
    reparametrized_params: ClassVar[list[str]] = []

    def __init__(self, mean_direction, concentration, *, validate_args=None) -> None:
        batch = jnp.broadcast_shapes(jnp.shape(mean_direction)[:-1], jnp.shape(concentration))
        event = jnp.shape(mean_direction)[-1:]
        self.mean_direction = jnp.broadcast_to(mean_direction, batch + event)
        self.concentration = jnp.broadcast_to(concentration, batch)
        super().__init__(batch_shape=batch, event_shape=event, validate_args=validate_args)

    def sample(self, key, sample_shape=()) -> Array:
        key_tangent, key_height = jax.random.split(key)
        shape, dtype = sample_shape + self.batch_shape, self.mean_direction.dtype
        gap = self._draw_gap(key_height, shape, dtype)
        tangent = jax.random.normal(key_tangent, (*shape, self.event_shape[0] - 1), dtype)
        return _on_sphere(self.mean_direction, gap, tangent / jnp.linalg.norm(tangent, axis=-1, keepdims=True))

    def _draw_gap(self, key: Array, shape: tuple[int, ...], dtype) -> Array:
        """1 − m·z, by rejection from an envelope whose acceptance is at least a half."""
        degree = self.event_shape[0] - 1
        b = degree / (2 * self.concentration + jnp.sqrt(4 * self.concentration**2 + degree**2))
        least, mode = 2 * b / (1 + b), (1 - b) / (1 + b)

        def propose(state):
            key, gap, accepted = state
            key, key_beta, key_uniform = jax.random.split(key, 3)
            beta = jax.random.beta(key_beta, degree / 2, degree / 2, shape, dtype)
            proposal = 2 * b * beta / (1 - (1 - b) * beta)
            ratio = (least + mode * proposal) / (least * (1 + mode))
            log_ratio = self.concentration * (least - proposal) + degree * jnp.log(ratio)
            accept = jnp.log(jax.random.uniform(key_uniform, shape, dtype)) < log_ratio
            return key, jnp.where(accepted, gap, proposal), accepted | accept

        start = (key, jnp.zeros(shape, dtype), jnp.zeros(shape, bool))
        return jax.lax.while_loop(lambda state: ~state[2].all(), propose, start)[1]

    @validate_sample
    def log_prob(self, value) -> Array:
        inner = (self.mean_direction * value).sum(-1)
        return self.concentration * inner - log_normalizer(self.concentration, self.event_shape[0])

    @property
    def mean(self) -> Array:
        gap = moments(self.concentration, self.event_shape[0])[0]
        return (1 - gap)[..., None] * self.mean_direction


@family(VonMisesFisher)
class VonMisesFisherNatural(Natural):
    """λ = κ m, of shape [*batch, p]."""

    linear: Array

    ranks = (1,)
    value_rank = 1
    host_parameters = (("mean_direction", "concentration"),)

    @property
    def concentration(self) -> Array:
        """κ, at least the least positive number: of zero it has no derivative."""
        return jnp.sqrt(jnp.maximum((self.linear**2).sum(-1), jnp.finfo(self.linear.dtype).tiny))

    @property
    def mean_direction(self) -> Array:
        """λ/κ; some direction where λ is zero."""
        direction = self.linear / self.concentration[..., None]
        norm = jnp.linalg.norm(direction, axis=-1, keepdims=True)
        return jnp.where(norm > 0.5, direction / jnp.where(norm > 0.5, norm, 1), _last_axis(direction))

    @classmethod
    def from_distribution(cls, distribution: VonMisesFisher) -> Self:
        return cls(distribution.concentration[..., None] * distribution.mean_direction)

    def to_distribution(self) -> VonMisesFisher:
        return VonMisesFisher(self.mean_direction, self.concentration)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Direction `value`, about a tenth of a radian around it in every direction."""
        return cls(100 * value)

    def sufficient_statistics(self, value: Array):
        return self.Expectation(value)

    def log_partition(self) -> Array:
        return log_normalizer(self.concentration, self.linear.shape[-1])

    def to_expectation(self):
        return self.Expectation(moments(self.concentration, self.linear.shape[-1])[1][..., None] * self.linear)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        """By Newton's method on κ, from the start of Banerjee et al. 2005."""
        dimension = expectation.linear.shape[-1]
        length = jnp.linalg.norm(expectation.linear, axis=-1)
        concentration = length * (dimension - length**2) / ((1 - length) * (1 + length))
        for _ in range(8):
            gap, _, variance = moments(concentration, dimension)
            concentration = jnp.maximum(concentration - ((1 - length) - gap) / variance, concentration / 4)
        return cls(expectation.linear / moments(concentration, dimension)[1][..., None])

    def in_domain(self) -> Array:
        return jnp.isfinite(self.linear).all(-1)

    def fisher_solve(self, gradient) -> Self:
        _, ratio, variance = moments(self.concentration, self.linear.shape[-1])
        direction = self.mean_direction
        radial = (direction * gradient.linear).sum(-1, keepdims=True) * direction
        return type(self)((gradient.linear - radial) / ratio[..., None] + radial / variance[..., None])

    @property
    def num_signs(self) -> int:
        return self.linear.shape[-1]

    def sigma_points(self, signs: Array) -> Array:
        """t = E[t] ± w with w² = Var[t], or what keeps t well below one; the last sign tells the two apart."""
        gap, _, variance = moments(self.concentration, self.linear.shape[-1])
        width = jnp.minimum(jnp.sqrt(variance), gap / jnp.sqrt(2.0))
        gap = jnp.maximum(gap - signs[..., -1] * width, smallest_spread(gap.dtype) ** 2)
        tangent = signs[..., :-1] / (self.linear.shape[-1] - 1) ** 0.5
        return _on_sphere(self.mean_direction, gap, tangent)

    @classmethod
    def along(cls, values: Array, gradients: Array) -> Array:
        return gradients - (gradients * values).sum(-1, keepdims=True) * values

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
        # the points of the nearer height average to a multiple of m, however small κ is
        near, _ = at_both(values, signs[..., -1:])
        direction = near / jnp.linalg.norm(near, axis=-1, keepdims=True)
        height = (values * direction).sum(-1, keepdims=True)
        tangent = values - height * direction
        sine = jnp.linalg.norm(tangent, axis=-1, keepdims=True)
        inwards = sine * direction - height * tangent / sine
        gradients = cls.along(values, gradients)
        radial = (gradients * inwards).sum(-1, keepdims=True).mean(0) / sine.mean(0)
        # orthogonal to m, the mean of (I − z zᵀ) c is (I − E[w wᵀ]) c with w the tangent part of z
        outer = (tangent[..., :, None] * tangent[..., None, :]).mean(0)
        mean = cls.along(direction, gradients.mean(0))
        across = jnp.linalg.solve(jnp.eye(outer.shape[-1], dtype=outer.dtype) - outer, mean[..., None])[..., 0]
        return cls(radial * direction + across)


def log_normalizer(concentration: Array, dimension: int) -> Array:
    """A(κ): by quadrature over the angle for moderate κ, by the integral of the series of A' in 1/κ beyond."""
    logits, _ = _angles(concentration, dimension)
    circle = log(2) + (dimension - 1) / 2 * log(pi) - lgamma((dimension - 1) / 2)
    moderate = concentration + circle + logsumexp(logits, -1)
    bound, terms = _series(dimension)
    far = jnp.maximum(concentration, bound)
    scaled = [term * bound / (1 - k) for k, term in enumerate(terms) if k > 1]
    rest = _polynomial(bound / far, [0.0, *scaled])
    large = far - (dimension - 1) / 2 * jnp.log(far / (2 * pi)) + rest
    return jnp.where(concentration > bound, large, moderate)


def moments(concentration: Array, dimension: int) -> tuple[Array, Array, Array]:
    """1 − A'(κ), A'(κ)/κ and A''(κ), none of which cancels."""
    logits, gap = _angles(concentration, dimension)
    weights = softmax(logits, -1)
    mean_gap = (weights * gap).sum(-1)
    variance = (weights * (gap - mean_gap[..., None]) ** 2).sum(-1)
    ratio = (weights * gap * (2 - gap)).sum(-1) / (dimension - 1)  # κ E[sin² θ] = (p − 1) E[cos θ], by parts
    bound, terms = _series(dimension)
    far = jnp.maximum(concentration, bound)
    large_gap = -_polynomial(bound / far, [0.0, *terms[1:]])
    large_variance = _polynomial(bound / far, [0.0, 0.0, *(-k * term / bound for k, term in enumerate(terms) if k)])
    beyond = concentration > bound
    return (
        jnp.where(beyond, large_gap, mean_gap),
        jnp.where(beyond, (1 - large_gap) / far, ratio),
        jnp.where(beyond, large_variance, variance),
    )


def _angles(concentration: Array, dimension: int) -> tuple[Array, np.ndarray]:
    """At Gauss–Legendre nodes θ: log weights of ∫ sin^(p − 2) θ e^(κ (cos θ − 1)) dθ, and 1 − cos θ."""
    nodes, weights = np.polynomial.legendre.leggauss(40 + 7 * int(np.ceil((3 * dimension + 40) ** 0.5)))
    angles = pi / 2 * (nodes + 1)
    dtype = concentration.dtype
    gap = (2 * np.sin(angles / 2) ** 2).astype(dtype)
    surface = (np.log(pi / 2 * weights) + (dimension - 2) * np.log(np.sin(angles))).astype(dtype)
    moderate = jnp.minimum(concentration, _series(dimension)[0])
    return surface - moderate[..., None] * gap, gap


def _series(dimension: int) -> tuple[float, list[float]]:
    """A'(κ) = Σ_k c_k κ^(−k) where κ is beyond the bound: the bound, and c_k in powers of it.

    r = A' obeys r' = 1 − r² − (p − 1) r/κ, whose powers of 1/κ are matched one after the other.
    """
    bound, terms = 40.0 + 2 * dimension, [1.0]
    for k in range(1, NUM_TERMS):
        products = sum(terms[i] * terms[k - i] for i in range(1, k))
        terms.append(((k - dimension) * terms[k - 1] / bound - products) / 2)
    return bound, terms


def _polynomial(x: Array, terms: list[float]) -> Array:
    result = jnp.zeros_like(x)
    for term in reversed(terms):
        result = result * x + term
    return result


def _on_sphere(direction: Array, gap: Array, tangent: Array) -> Array:
    """t m + √(1 − t²) u with t = 1 − gap, by the reflection that takes the last axis to ∓m."""
    side = jnp.where(direction[..., -1:] >= 0, 1.0, -1.0).astype(direction.dtype)
    normal = direction + _last_axis(direction) * side
    sine, height = jnp.sqrt(gap * (2 - gap))[..., None], (1 - gap)[..., None]
    point = jnp.concatenate([sine * tangent, jnp.broadcast_to(-side * height, (*tangent.shape[:-1], 1))], -1)
    return point - 2 * (normal * point).sum(-1, keepdims=True) / (normal**2).sum(-1, keepdims=True) * normal


def _last_axis(like: Array) -> Array:
    return jnp.concatenate([jnp.zeros_like(like[..., 1:]), jnp.ones_like(like[..., :1])], -1)
