"""The full-rank Gaussian N(m, S⁻¹): T(z) = (z, z zᵀ), natural parameters λ = (S m, −S/2).

Source: Khan & Rue 2023, "The Bayesian Learning Rule", section 3.1; `DensePrecision` is S, `hessian` is E_q[∇²ℓ].

Everything goes through Cholesky factors, whose errors do not depend on the units of the coordinates (van der Sluis
1969): a regression with unscaled columns is solved as exactly as the scaled one. Eigenvalues, which do depend on
the units, are taken only where the straight step is not positive definite, and then of the *whitened* Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.scipy.linalg import cho_solve, solve_triangular

from ._family import Block
from ._natural import Natural, family

__all__ = ["DensePrecision", "MultivariateNormalNatural"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DensePrecision:
    """S with `matrix` of shape [D, D], symmetric positive definite."""

    matrix: Array

    @classmethod
    def from_scales(
        cls, blocks: tuple[Block, ...], scales: tuple[Array | None, ...], unlearned: float, like: Array
    ) -> DensePrecision:
        parts = []
        for block, scale in zip(blocks, scales, strict=True):
            if scale is None:
                parts.append(jnp.eye(block.size, dtype=like.dtype) * unlearned**-2)
            elif block.structure == "dense":
                for scale_tril in scale.reshape(-1, *scale.shape[-2:]):
                    parts.append(cho_solve((scale_tril, True), jnp.eye(scale.shape[-1], dtype=scale.dtype)))
            else:
                parts.append(jnp.diag(jnp.ravel(scale) ** -2))
        return cls(jax.scipy.linalg.block_diag(*parts))

    def blend(self, hessian: Array, rate: Array) -> Self:
        """S ← (1 − ρ) S + ρ H wherever that keeps more than (1 − ρ) S / 2, as it does for every H ≥ 0.

        Elsewhere, with S = L Lᵀ and L⁻¹ H L⁻ᵀ = Q diag(w) Qᵀ: S ← L Q diag((1 − ρ) + ρ |w|) Qᵀ Lᵀ, in which a
        direction without positive curvature keeps at least a quarter of its precision. Positive definite for every H.
        """
        straight = (1 - rate) * self.matrix + rate * hessian
        margin = straight - (1 - rate) / 2 * self.matrix
        positive = jnp.isfinite(jnp.linalg.cholesky(margin)).all()
        return self.at(jax.lax.cond(positive, lambda: straight, lambda: _reflected(self.matrix, hessian, rate)))

    def at(self, matrix: Array) -> Self:
        """The precision of the same guide with another S."""
        return replace(self, matrix=matrix)

    def solve(self, vector: Array) -> Array:
        return cho_solve((jnp.linalg.cholesky(self.matrix), True), vector.T).T

    def scale(self, block: Block) -> Array:
        """σ = diag(S_bb)^(−1/2) for a mean-field block; the lower C with C Cᵀ = (S_bb)⁻¹ for a dense one."""
        if block.structure != "dense":
            return jnp.reshape(jnp.diagonal(self.matrix)[block.start : block.stop] ** -0.5, block.shape)
        size = block.shape[-1]
        rows = [
            _inverse_cholesky(self.matrix[start : start + size, start : start + size])
            for start in range(block.start, block.stop, size)
        ]
        return jnp.stack(rows).reshape(*block.shape, size)

    def complete(self, hessian: Array, weight: Array) -> Array:
        # A coordinate outside the batch keeps its row and column; a global one has weight 1, so the pair of a local
        # and a global coordinate is seen as often as the local one alone.
        pair = jnp.maximum(weight[:, None], weight[None, :])
        covered = (weight[:, None] > 0) & (weight[None, :] > 0)
        return jnp.where(covered, hessian / jnp.where(covered, pair, 1), self.matrix)


@family(dist.MultivariateNormal)
class MultivariateNormalNatural(Natural):
    """λ = (S m, −S/2) of shapes [*batch, D] and [*batch, D, D]; A = mᵀ S m/2 − log|S|/2 + D log(2π)/2.

    Sigma points m + C ε for ε in {−1, 1}^D with C Cᵀ = S⁻¹: as many as are needed for uncorrelated signs.
    """

    linear: Array
    quadratic: Array

    ranks = (1, 2)
    value_rank = 1
    host_parameters = (("loc", "scale_tril"),)

    @property
    def precision_matrix(self) -> Array:
        return -(self.quadratic + jnp.swapaxes(self.quadratic, -1, -2))

    @property
    def scale_tril(self) -> Array:
        return _inverse_cholesky(self.precision_matrix)

    @property
    def loc(self) -> Array:
        return _solve(self.precision_matrix, self.linear)

    @classmethod
    def from_distribution(cls, distribution: dist.MultivariateNormal) -> Self:
        factor = distribution.scale_tril
        precision = _solve_factor(factor, jnp.broadcast_to(jnp.eye(factor.shape[-1], dtype=factor.dtype), factor.shape))
        linear = jnp.squeeze(precision @ distribution.loc[..., None], -1)
        return cls(linear=linear, quadratic=-(precision + jnp.swapaxes(precision, -1, -2)) / 4)

    def to_distribution(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    @classmethod
    def from_value(cls, value: Array) -> Self:
        """Mean `value`, scale 0.1 in every direction, as the host's AutoMultivariateNormal starts."""
        identity = jnp.eye(value.shape[-1], dtype=value.dtype)
        quadratic = jnp.broadcast_to(-0.5 / 0.01 * identity, (*value.shape, value.shape[-1]))
        return cls(linear=value / 0.01, quadratic=quadratic)

    def sufficient_statistics(self, value: Array):
        return self.Expectation(linear=value, quadratic=value[..., :, None] * value[..., None, :])

    def log_partition(self) -> Array:
        factor = jnp.linalg.cholesky(self.precision_matrix)
        half = jnp.squeeze(_solve_lower(factor, self.linear[..., None]), -1)
        log_determinant = jnp.log(jnp.diagonal(factor, axis1=-2, axis2=-1)).sum(-1)
        return (half**2).sum(-1) / 2 - log_determinant + self.linear.shape[-1] * jnp.log(2 * jnp.pi) / 2

    def to_expectation(self):
        factor, loc = self.scale_tril, self.loc
        second = factor @ jnp.swapaxes(factor, -1, -2) + loc[..., :, None] * loc[..., None, :]
        return self.Expectation(linear=loc, quadratic=second)

    @classmethod
    def from_expectation(cls, expectation) -> Self:
        loc = expectation.linear
        covariance = expectation.quadratic - loc[..., :, None] * loc[..., None, :]
        covariance = (covariance + jnp.swapaxes(covariance, -1, -2)) / 2
        return cls.from_distribution(dist.MultivariateNormal(loc, scale_tril=jnp.linalg.cholesky(covariance)))

    def in_domain(self) -> Array:
        factor = jnp.linalg.cholesky(self.precision_matrix)
        return jnp.isfinite(factor).all((-2, -1)) & jnp.isfinite(self.linear).all(-1)

    def fisher_solve(self, gradient) -> Self:
        """F⁻¹ = ∂λ/∂μ: g changes Σ by dΣ = g₂ − g₁ mᵀ − m g₁ᵀ, and λ by (S g₁ − 2 Q m, Q) with Q = S dΣ S / 2."""
        precision, loc = self.precision_matrix, self.loc
        outer = gradient.linear[..., :, None] * loc[..., None, :]
        change = gradient.quadratic - outer - jnp.swapaxes(outer, -1, -2)
        quadratic = precision @ ((change + jnp.swapaxes(change, -1, -2)) / 2) @ precision / 2
        linear = jnp.squeeze(precision @ gradient.linear[..., None] - 2 * quadratic @ loc[..., None], -1)
        return type(self)(linear=linear, quadratic=quadratic)

    @property
    def num_signs(self) -> int:
        return self.linear.shape[-1]

    def sigma_points(self, signs: Array) -> Array:
        return self.loc + jnp.squeeze(self.scale_tril @ signs[..., None], -1)

    @classmethod
    def match(cls, values: Array, gradients: Array, signs: Array) -> Self:
        # f' = c₁ + 2 C₂ z at z = m + C ε: the averages of z εᵀ and f' εᵀ are C and 2 C₂ C
        factor = (values[..., :, None] * signs[..., None, :]).mean(0)
        slope = (gradients[..., :, None] * signs[..., None, :]).mean(0)
        hessian = jnp.swapaxes(jnp.linalg.solve(jnp.swapaxes(factor, -1, -2), jnp.swapaxes(slope, -1, -2)), -1, -2)
        hessian = (hessian + jnp.swapaxes(hessian, -1, -2)) / 2
        linear = gradients.mean(0) - jnp.squeeze(hessian @ values.mean(0)[..., None], -1)
        return cls(linear=linear, quadratic=hessian / 2)


def _solve_lower(factor: Array, right: Array) -> Array:
    return jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)


def _solve_factor(factor: Array, right: Array) -> Array:
    """(C Cᵀ)⁻¹ b for batches of matrices."""
    half = _solve_lower(factor, right)
    return jax.lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)


def _solve(matrix: Array, vector: Array) -> Array:
    return jnp.squeeze(_solve_factor(jnp.linalg.cholesky(matrix), vector[..., None]), -1)


def _reflected(matrix: Array, hessian: Array, rate: Array) -> Array:
    factor = jnp.linalg.cholesky(matrix)
    half = solve_triangular(factor, hessian, lower=True)
    whitened = solve_triangular(factor, half.T, lower=True)
    eigenvalues, vectors = jnp.linalg.eigh((whitened + whitened.T) / 2)
    blended = (1 - rate) + rate * jnp.abs(eigenvalues)
    rounding = len(matrix) * jnp.finfo(matrix.dtype).eps * jnp.abs(eigenvalues).max()
    blended = jnp.where(eigenvalues > rounding, blended, jnp.maximum(blended, 0.25))
    root = factor @ (vectors * jnp.sqrt(blended))
    return root @ root.T


def _inverse_cholesky(matrix: Array) -> Array:
    """Lower C with C Cᵀ = S⁻¹, from S = U Uᵀ with U upper: C = U⁻ᵀ. S is never inverted."""
    upper = jnp.linalg.cholesky(matrix[..., ::-1, ::-1])[..., ::-1, ::-1]
    identity = jnp.broadcast_to(jnp.eye(matrix.shape[-1], dtype=matrix.dtype), matrix.shape)
    return _solve_lower(jnp.swapaxes(upper, -1, -2), identity)
