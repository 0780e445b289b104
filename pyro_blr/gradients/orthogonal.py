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

import torch
from torch import Tensor

__all__ = ["Frame", "drawn", "init", "orthogonal"]


@dataclass(frozen=True)
class Frame:
    """Draws made ahead.

    Attributes:
        rows: ε_k, [F, D], one frame after another.
        used: how many of the rows have been drawn.
    """

    rows: Tensor
    used: int


def init(loc: Tensor, most: int) -> Frame:
    """None left, and room for as many whole frames as have `most` draws."""
    num_rows = -(-most // len(loc)) * len(loc)
    return Frame(rows=loc.new_zeros(num_rows, len(loc)), used=num_rows)


def drawn(frame: Frame, normals: Callable[[int], Tensor], num_draws: int, most: int) -> tuple[Tensor, Frame]:
    """The next `num_draws` rows, the first of [`most`, D], and what is left.

    Args:
        normals: S -> standard normal noise, [S, D]; asked for where the rows do not suffice.
    """
    num_rows = len(frame.rows)
    short = frame.used + num_draws > num_rows
    following = orthogonal(normals(2 * num_rows)) if short else frame.rows
    noise = torch.cat([frame.rows, following])[frame.used : frame.used + most]
    used = frame.used + num_draws - (num_rows if short else 0)
    return noise, Frame(rows=following, used=used)


def orthogonal(normals: Tensor) -> Tensor:
    """F draws [F, D] in frames of D: directions from the first half of `normals` [2 F, D], lengths from the other."""
    size = normals.shape[-1]
    first, second = normals.chunk(2)
    directions = torch.linalg.qr(first.reshape(-1, size, size))[0].reshape(first.shape)
    return directions * second.norm(dim=1, keepdim=True)
