"""Standard normal draws at right angles: D successive ones average a quadratic form with hardly any noise.

    ε_k = r_k u_k,    (u_1, ..., u_D) = Q of a matrix of normals,    r_k² ~ χ²_D independent of each other and of u

Each ε_k by itself is N(0, I), up to a sign that an antithetic pair does not see. Over the D draws of a *frame*
Σ_k u_k u_kᵀ = I, so that for any A

    Var(Σ_k ε_kᵀ A ε_k / D) = (2/D) (2 ‖A‖² + (tr A)²) / (D + 2),    of independent draws (2/D) ‖A‖²

in the Frobenius norm: nothing gained on A = I, a factor of 2/(D + 2) where tr A = 0. What antithetic pairs leave of the
noise of E_q[∇ℓ] and E_q[∇²ℓ] is quadratic in ε to leading order.

Source: Yu et al. 2016, "Orthogonal Random Features"; Rowland et al. 2018, "Geometrically Coupled Monte Carlo Sampling".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["Frame", "drawn", "init", "orthogonal"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Frame:
    """Draws made ahead.

    Attributes:
        rows: ε_k, [F, D], one frame after another.
        used: how many of the rows have been drawn.
    """

    rows: Array
    used: Array


def init(loc: Array, most: int) -> Frame:
    """None left, and room for as many whole frames as have `most` draws."""
    num_rows = -(-most // len(loc)) * len(loc)
    return Frame(rows=jnp.zeros((num_rows, len(loc)), loc.dtype), used=jnp.full((), num_rows, jnp.int32))


def drawn(frame: Frame, normals: Callable[[int], Array], num_draws: Array, most: int) -> tuple[Array, Frame]:
    """The next `num_draws` rows, the first of [`most`, D], and what is left.

    Args:
        normals: S -> standard normal noise, [S, D]; asked for where the rows do not suffice.
    """
    num_rows = len(frame.rows)
    short = frame.used + num_draws > num_rows
    following = lax.cond(short, lambda: orthogonal(normals(2 * num_rows)), lambda: frame.rows)
    noise = lax.dynamic_slice_in_dim(jnp.concatenate([frame.rows, following]), frame.used, most)
    used = frame.used + num_draws - jnp.where(short, num_rows, 0)
    return noise, Frame(rows=following, used=used)


def orthogonal(normals: Array) -> Array:
    """F draws [F, D] in frames of D: directions from the first half of `normals` [2 F, D], lengths from the other."""
    size = normals.shape[-1]
    first, second = jnp.split(normals, 2)
    directions = jnp.linalg.qr(first.reshape(-1, size, size))[0].reshape(first.shape)
    return directions * jnp.linalg.norm(second, axis=1, keepdims=True)
