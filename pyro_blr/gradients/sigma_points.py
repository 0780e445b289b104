"""∇_μ E_q[ℓ] of a conjugate site, from gradients at its sigma points: exact where ℓ is affine in its statistics.

A site is a batch of cells. Cells along the `independent` axes of the batch meet in no term of ℓ and share their signs;
all others get signs of their own, the columns of a Hadamard matrix, balanced and pairwise uncorrelated. The average of
T over the runs is then μ, and that of a product of two cells' statistics the product of theirs.

A Normal site whose cells do meet is a quadratic in all of them: ∇_μ is that of the best mean-field member for the
whole quadratic, whose mean S⁻¹ h is solved for at once (`NormalNatural.from_joint`), as dense curvature would.

Source: Khan & Rue 2023, section 2; Hedayat, Sloane & Stufken 1999, "Orthogonal Arrays", for the signs.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from ..families import MultivariateNormalNatural, Natural, NormalNatural

__all__ = ["matched_gradient", "matched_target", "signs_of"]


def signs_of(natural: Natural, independent: tuple[int, ...]) -> np.ndarray:
    """±1 for every sign of every cell, [R, *batch, n], the same along independent axes."""
    cells = [1 if axis in independent else size for axis, size in enumerate(natural.batch_shape)]
    num_signs = prod(cells) * natural.num_signs
    num_runs = 1
    while num_runs < num_signs + 1:
        num_runs *= 2
    codes = np.arange(num_runs)[:, None] & np.arange(1, num_signs + 1)
    signs = (1.0 - 2.0 * (np.bitwise_count(codes) % 2)).reshape(num_runs, *cells, natural.num_signs)
    return np.broadcast_to(signs, (num_runs, *natural.batch_shape, natural.num_signs)).copy()


def matched_target(
    natural: Natural, independent: tuple[int, ...], values: Tensor, slopes: Tensor, signs: Tensor, weight: Tensor
) -> Natural:
    """−∇_μ E_q[ℓ] / w, where the rule goes at ρ = 1.

    Args:
        values, slopes: z and ∇_z ℓ in every run, [R, *batch, *event].
        weight: w of each cell, with which its entropy enters the loss.
    """
    coupled = _coupled_axes(natural, independent)
    if not coupled:
        force = slopes / weight.reshape((*weight.shape, *[1] * natural.value_rank))
        return -natural.match(values, force + natural.base_slope(values), signs)
    joint = -_match_jointly(coupled, values, slopes, signs) / _coupled_last(weight[None], coupled)[0, ..., 0]
    mean_field = NormalNatural.from_joint(joint)
    return NormalNatural(*(_coupled_back(leaf, coupled, natural.batch_shape) for leaf in vars(mean_field).values()))


def matched_gradient(
    natural: Natural, independent: tuple[int, ...], values: Tensor, slopes: Tensor, signs: Tensor, at: Tensor
) -> Tensor:
    """∇⟨c, T(z)⟩ at the points `at` [K, *batch, *event], with c matched to the slopes at the sigma points."""
    coupled = _coupled_axes(natural, independent)
    if not coupled:
        matched, point = natural.match(values, slopes, signs), at.detach().requires_grad_()
        with torch.enable_grad():
            inner = matched.inner(natural.sufficient_statistics(point)).sum()
            return torch.autograd.grad(inner, point, materialize_grads=True)[0]
    joint = _match_jointly(coupled, values, slopes, signs)
    slope = joint.linear + 2 * (joint.quadratic @ _coupled_last(at, coupled)[..., None]).squeeze(-1)
    return torch.stack([_coupled_back(row, coupled, natural.batch_shape) for row in slope])


def _coupled_axes(natural: Natural, independent: tuple[int, ...]) -> list[int]:
    """The axes over which a Normal site is one quadratic in several coordinates."""
    coupled = [axis for axis in range(len(natural.batch_shape)) if axis not in independent]
    several = prod(natural.batch_shape[axis] for axis in coupled) > 1
    return coupled if isinstance(natural, NormalNatural) and several else []


def _match_jointly(coupled: list[int], values: Tensor, slopes: Tensor, signs: Tensor) -> MultivariateNormalNatural:
    arrays = (values, slopes, signs[..., 0])
    return MultivariateNormalNatural.match(*(_coupled_last(array, coupled) for array in arrays))


def _coupled_last(tensor: Tensor, coupled: list[int]) -> Tensor:
    """[R, *batch] with the coupled axes of the batch merged into the last one."""
    moved = tensor.movedim([axis + 1 for axis in coupled], list(range(tensor.ndim - len(coupled), tensor.ndim)))
    return moved.reshape(*moved.shape[: tensor.ndim - len(coupled)], -1)


def _coupled_back(tensor: Tensor, coupled: list[int], shape: tuple[int, ...]) -> Tensor:
    sizes = [shape[axis] for axis in coupled]
    rest = [size for axis, size in enumerate(shape) if axis not in coupled]
    return tensor.reshape(*rest, *sizes).movedim(list(range(len(rest), len(shape))), coupled)
