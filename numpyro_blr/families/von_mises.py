"""The von Mises distribution on the circle, location m, concentration κ: T(z) = (cos z, sin z), λ = κ (cos m, sin m).

The von Mises–Fisher distribution of (cos z, sin z); A = log(2π I₀(κ)). Four points, of two angles on either side of m.

Source: Mardia & Jupp 2000, "Directional Statistics", section 3.5.
"""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array

from ._natural import Natural, family
from .von_mises_fisher import VonMisesFisherNatural

__all__ = ["VonMisesNatural"]


@family(dist.VonMises)
class VonMisesNatural(Natural):
    """λ = κ (cos m, sin m), each of the batch's shape."""

    cos: Array
    sin: Array

    ranks = (0, 0)
    host_parameters = (("loc", "concentration"),)

    @property
    def loc(self) -> Array:
        return jnp.arctan2(self.sin, self.cos)

    @property
    def concentration(self) -> Array:
        return self._on_circle().concentration

    @classmethod
    def from_distribution(cls, distribution: dist.VonMises) -> Self:
        loc, concentration = jnp.broadcast_arrays(distribution.loc, distribution.concentration)
        return cls(cos=concentration * jnp.cos(loc), sin=concentration * jnp.sin(loc))

    def to_distribution(self) -> dist.VonMises:
        return dist.VonMises(self.loc, self.concentration)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Location `value`, about a tenth of a radian around it."""
        return cls(cos=100 * jnp.cos(value), sin=100 * jnp.sin(value))

    def sufficient_statistics(self, value: Array):
        return self.Expectation(cos=jnp.cos(value), sin=jnp.sin(value))

    def log_partition(self) -> Array:
        return self._on_circle().log_partition()

    def to_expectation(self):
        expectation = self._on_circle().to_expectation().linear
        return self.Expectation(cos=expectation[..., 0], sin=expectation[..., 1])

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        pair = jnp.stack([expectation.cos, expectation.sin], -1)
        return cls._from_circle(VonMisesFisherNatural.from_expectation(VonMisesFisherNatural.Expectation(pair)))

    def in_domain(self) -> Array:
        return self._on_circle().in_domain()

    def fisher_solve(self, gradient) -> Self:
        pair = jnp.stack([gradient.cos, gradient.sin], -1)
        return self._from_circle(self._on_circle().fisher_solve(VonMisesFisherNatural.Expectation(pair)))

    @property
    def num_signs(self) -> int:
        return 2

    def sigma_points(self, signs: Array) -> Array:
        points = self._on_circle().sigma_points(signs)
        return jnp.arctan2(points[..., 1], points[..., 0])

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
        cos, sin = jnp.cos(values), jnp.sin(values)
        along = gradients[..., None] * jnp.stack([-sin, cos], -1)
        return cls._from_circle(VonMisesFisherNatural.match(jnp.stack([cos, sin], -1), along, signs))

    def _on_circle(self) -> VonMisesFisherNatural:
        return VonMisesFisherNatural(jnp.stack([self.cos, self.sin], -1))

    @classmethod
    def _from_circle(cls, natural: VonMisesFisherNatural) -> Self:
        return cls(cos=natural.linear[..., 0], sin=natural.linear[..., 1])
