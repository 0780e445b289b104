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

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, logsumexp, softmax

from ._natural import Natural, at_both, family, smallest_spread

__all__ = ["VonMisesFisher", "VonMisesFisherNatural"]

NUM_TERMS = 24


class VonMisesFisher(dist.TorchDistribution):
    """On the unit sphere, with the density e^(κ m·z − A) relative to its surface.

    Args:
        mean_direction: m of shape [*batch, p], |m| = 1.
        concentration: κ of shape [*batch].
    """

    arg_constraints: ClassVar = {"mean_direction": constraints.sphere, "concentration": constraints.positive}
    support = constraints.sphere

    def __init__(self, mean_direction, concentration, validate_args=None) -> None:
        concentration = torch.as_tensor(concentration, dtype=mean_direction.dtype, device=mean_direction.device)
        batch = torch.broadcast_shapes(mean_direction.shape[:-1], concentration.shape)
        self.mean_direction, self.concentration = mean_direction.expand(*batch, -1), concentration.expand(batch)
        super().__init__(batch, mean_direction.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(VonMisesFisher, _instance)
        new.mean_direction = self.mean_direction.expand(*batch_shape, -1)
        new.concentration = self.concentration.expand(batch_shape)
        super(VonMisesFisher, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @torch.no_grad()
    def sample(self, sample_shape=()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        tangent = torch.randn(
            *shape, self.event_shape[0] - 1, dtype=self.mean_direction.dtype, device=self.mean_direction.device
        )
        tangent = tangent / torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
        direction = self.mean_direction.expand(*shape, -1)
        return _on_sphere(direction, self._draw_gap(shape), tangent)

    def _draw_gap(self, shape: torch.Size) -> Tensor:
        """1 − m·z, by rejection from an envelope whose acceptance is at least a half."""
        degree = self.event_shape[0] - 1
        b = degree / (2 * self.concentration + torch.sqrt(4 * self.concentration**2 + degree**2))
        least, mode = 2 * b / (1 + b), (1 - b) / (1 + b)
        half = torch.full_like(b, degree / 2).expand(shape)
        gap, accepted = torch.zeros_like(half), torch.zeros_like(half, dtype=torch.bool)
        while not accepted.all():
            beta = torch.distributions.Beta(half, half).sample()
            proposal = 2 * b * beta / (1 - (1 - b) * beta)
            ratio = (least + mode * proposal) / (least * (1 + mode))
            log_ratio = self.concentration * (least - proposal) + degree * torch.log(ratio)
            accept = torch.log(torch.rand_like(gap)) < log_ratio
            gap, accepted = torch.where(accepted, gap, proposal), accepted | accept
        return gap

    def log_prob(self, value) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inner = (self.mean_direction * value).sum(-1)
        return self.concentration * inner - log_normalizer(self.concentration, self.event_shape[0])

    @property
    def mean(self) -> Tensor:
        gap = moments(self.concentration, self.event_shape[0])[0]
        return (1 - gap)[..., None] * self.mean_direction


@family(VonMisesFisher, dist.VonMises3D)
class VonMisesFisherNatural(Natural):
    """λ = κ m, of shape [*batch, p]."""

    linear: Tensor

    ranks = (1,)
    value_rank = 1
    host_parameters = (("mean_direction", "concentration"),)

    @property
    def concentration(self) -> Tensor:
        """κ, at least the least positive number: of zero it has no derivative."""
        return torch.sqrt((self.linear**2).sum(-1).clamp(min=torch.finfo(self.linear.dtype).tiny))

    @property
    def mean_direction(self) -> Tensor:
        """λ/κ; some direction where λ is zero."""
        direction = self.linear / self.concentration[..., None]
        norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        return torch.where(norm > 0.5, direction / torch.where(norm > 0.5, norm, 1.0), _last_axis(direction))

    @classmethod
    def from_distribution(cls, distribution: VonMisesFisher | dist.VonMises3D) -> Self:
        if isinstance(distribution, dist.VonMises3D):  # its concentration is κ m
            return cls(distribution.concentration)
        return cls(distribution.concentration[..., None] * distribution.mean_direction)

    def to_distribution(self) -> VonMisesFisher:
        return VonMisesFisher(self.mean_direction, self.concentration)

    @classmethod
    def from_value(cls, value: Tensor) -> Self:
        """Direction `value`, about a tenth of a radian around it in every direction."""
        return cls(100 * value)

    def sufficient_statistics(self, value: Tensor):
        return self.Expectation(value)

    def log_partition(self) -> Tensor:
        return log_normalizer(self.concentration, self.linear.shape[-1])

    def to_expectation(self):
        return self.Expectation(moments(self.concentration, self.linear.shape[-1])[1][..., None] * self.linear)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        """By Newton's method on κ, from the start of Banerjee et al. 2005."""
        dimension = expectation.linear.shape[-1]
        length = torch.linalg.vector_norm(expectation.linear, dim=-1)
        concentration = length * (dimension - length**2) / ((1 - length) * (1 + length))
        for _ in range(8):
            gap, _, variance = moments(concentration, dimension)
            concentration = torch.maximum(concentration - ((1 - length) - gap) / variance, concentration / 4)
        return cls(expectation.linear / moments(concentration, dimension)[1][..., None])

    def in_domain(self) -> Tensor:
        return self.linear.isfinite().all(-1)

    def fisher_solve(self, gradient) -> Self:
        _, ratio, variance = moments(self.concentration, self.linear.shape[-1])
        direction = self.mean_direction
        radial = (direction * gradient.linear).sum(-1, keepdim=True) * direction
        return type(self)((gradient.linear - radial) / ratio[..., None] + radial / variance[..., None])

    @property
    def num_signs(self) -> int:
        return self.linear.shape[-1]

    def sigma_points(self, signs: Tensor) -> Tensor:
        """t = E[t] ± w with w² = Var[t], or what keeps t well below one; the last sign tells the two apart."""
        gap, _, variance = moments(self.concentration, self.linear.shape[-1])
        width = torch.minimum(torch.sqrt(variance), gap / 2**0.5)
        gap = (gap - signs[..., -1] * width).clamp(min=smallest_spread(gap.dtype) ** 2)
        tangent = signs[..., :-1] / (self.linear.shape[-1] - 1) ** 0.5
        return _on_sphere(self.mean_direction, gap, tangent)

    @classmethod
    def along(cls, values: Tensor, gradients: Tensor) -> Tensor:
        return gradients - (gradients * values).sum(-1, keepdim=True) * values

    @classmethod
    def match(cls, values: Tensor, gradients: Tensor, signs: Tensor) -> Self:
        # the points of the nearer height average to a multiple of m, however small κ is
        near, _ = at_both(values, signs[..., -1:])
        direction = near / torch.linalg.vector_norm(near, dim=-1, keepdim=True)
        height = (values * direction).sum(-1, keepdim=True)
        tangent = values - height * direction
        sine = torch.linalg.vector_norm(tangent, dim=-1, keepdim=True)
        inwards = sine * direction - height * tangent / sine
        gradients = cls.along(values, gradients)
        radial = (gradients * inwards).sum(-1, keepdim=True).mean(0) / sine.mean(0)
        # orthogonal to m, the mean of (I − z zᵀ) c is (I − E[w wᵀ]) c with w the tangent part of z
        outer = (tangent[..., :, None] * tangent[..., None, :]).mean(0)
        identity = torch.eye(outer.shape[-1], dtype=outer.dtype, device=outer.device)
        mean = cls.along(direction, gradients.mean(0))
        across = torch.linalg.solve_ex(identity - outer, mean[..., None])[0].squeeze(-1)
        return cls(radial * direction + across)


def log_normalizer(concentration: Tensor, dimension: int) -> Tensor:
    """A(κ): by quadrature over the angle for moderate κ, by the integral of the series of A' in 1/κ beyond."""
    logits, _ = _angles(concentration, dimension)
    circle = log(2) + (dimension - 1) / 2 * log(pi) - lgamma((dimension - 1) / 2)
    moderate = concentration + circle + logsumexp(logits, -1)
    bound, terms = _series(dimension)
    far = concentration.clamp(min=bound)
    scaled = [term * bound / (1 - k) for k, term in enumerate(terms) if k > 1]
    rest = _polynomial(bound / far, [0.0, *scaled])
    large = far - (dimension - 1) / 2 * torch.log(far / (2 * pi)) + rest
    return torch.where(concentration > bound, large, moderate)


def moments(concentration: Tensor, dimension: int) -> tuple[Tensor, Tensor, Tensor]:
    """1 − A'(κ), A'(κ)/κ and A''(κ), none of which cancels."""
    logits, gap = _angles(concentration, dimension)
    weights = softmax(logits, -1)
    mean_gap = (weights * gap).sum(-1)
    variance = (weights * (gap - mean_gap[..., None]) ** 2).sum(-1)
    ratio = (weights * gap * (2 - gap)).sum(-1) / (dimension - 1)  # κ E[sin² θ] = (p − 1) E[cos θ], by parts
    bound, terms = _series(dimension)
    far = concentration.clamp(min=bound)
    large_gap = -_polynomial(bound / far, [0.0, *terms[1:]])
    large_variance = _polynomial(bound / far, [0.0, 0.0, *(-k * term / bound for k, term in enumerate(terms) if k)])
    beyond = concentration > bound
    return (
        torch.where(beyond, large_gap, mean_gap),
        torch.where(beyond, (1 - large_gap) / far, ratio),
        torch.where(beyond, large_variance, variance),
    )


def _angles(concentration: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    """At Gauss–Legendre nodes θ: log weights of ∫ sin^(p − 2) θ e^(κ (cos θ − 1)) dθ, and 1 − cos θ."""
    nodes, weights = np.polynomial.legendre.leggauss(40 + 7 * int(np.ceil((3 * dimension + 40) ** 0.5)))
    angles = pi / 2 * (nodes + 1)
    gap = torch.as_tensor(2 * np.sin(angles / 2) ** 2).to(concentration)
    surface = torch.as_tensor(np.log(pi / 2 * weights) + (dimension - 2) * np.log(np.sin(angles))).to(concentration)
    moderate = concentration.clamp(max=_series(dimension)[0])
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


def _polynomial(x: Tensor, terms: list[float]) -> Tensor:
    result = torch.zeros_like(x)
    for term in reversed(terms):
        result = result * x + term
    return result


def _on_sphere(direction: Tensor, gap: Tensor, tangent: Tensor) -> Tensor:
    """t m + √(1 − t²) u with t = 1 − gap, by the reflection that takes the last axis to ∓m."""
    side = torch.where(direction[..., -1:] >= 0, 1.0, -1.0).to(direction.dtype)
    normal = direction + _last_axis(direction) * side
    sine, height = torch.sqrt(gap * (2 - gap))[..., None], (1 - gap)[..., None]
    point = torch.cat([sine * tangent, (-side * height).expand(*tangent.shape[:-1], 1)], -1)
    return point - 2 * (normal * point).sum(-1, keepdim=True) / (normal**2).sum(-1, keepdim=True) * normal


def _last_axis(like: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(like[..., 1:]), torch.ones_like(like[..., :1])], -1)
