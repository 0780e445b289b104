"""The contract of a Gaussian's natural parameters.

A Gaussian q(z) = N(z | m, S⁻¹) has natural parameters λ = (S m, −S/2) and expectation parameters
μ = (m, S⁻¹ + m mᵀ). Bonnet's and Price's theorems give ∇_μ E_q[ℓ] = (E[g] − E[H] m, E[H]/2) with g = ∇ℓ, H = ∇²ℓ, so

    λ ← (1 − ρ) λ − ρ ∇_μ E_q[ℓ]    reads    S ← (1 − ρ) S + ρ E[H],    m ← m − ρ S_new⁻¹ E[g]

(Khan & Rue 2023, section 3). The mean and the precision are stored rather than (S m, −S/2): the two are equal in
exact arithmetic, and S m loses the digits of m where S is ill-conditioned. `Precision` is the part that has a
geometry; a diagonal and a dense matrix differ in the verbs below and in nothing else.

The straight step stays in the domain for every positive semidefinite H and ρ in (0, 1], and then keeps at least
(1 − ρ) S. Estimates of H are not always semidefinite; a step that would keep less than half of that is corrected.

One precision over all coordinates serves every guide. A mean-field guide reads its diagonal, a full-rank guide all
of it, a guide of several blocks the blocks: E_q[H] restricted to a block is that block's fixed point. A guide of low
rank has the covariance that is closest to a block's inverse (`low_rank.py`). Off-diagonal entries that a guide does not
read still precondition its mean, which moves no fixed point (E[g] = 0) and spares the mean-field guide the ten thousand
steps that a diagonal natural gradient takes on a collinear regression.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

__all__ = ["Block", "Precision", "Structure"]

Structure = Literal["diagonal", "dense", "low rank", "fixed", "point"]


@dataclass(frozen=True)
class Block:
    """The coordinates of one site in the concatenated mean, and the covariance structure that its guide gives them.

    Attributes:
        start: first coordinate.
        shape: shape of the site's location; for `"dense"` the last axis is the event, all others are a batch.
        structure: `"diagonal"` reads a `scale`, `"dense"` a `scale_tril`, `"low rank"` (a | F) of diag(a²) + F Fᵀ;
            `"fixed"` has a covariance that is not learned here, and `"point"` has none (a `Delta`, the delta method of
            Khan & Rue 2023, section 1.3).
    """

    start: int
    shape: tuple[int, ...]
    structure: Structure

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def learned(self) -> bool:
        """Whether it has a covariance of its own that is learned."""
        return self.structure in ("diagonal", "dense", "low rank")


class Precision(Protocol):
    """S of N(m, S⁻¹) over all D coordinates. Every verb is a pure function; shapes are those of the whole vector."""

    @classmethod
    def from_scales(
        cls, blocks: tuple[Block, ...], scales: tuple[Tensor | None, ...], unlearned: float, like: Tensor
    ) -> Precision:
        """Block-diagonal S with S_b = (C_b C_bᵀ)⁻¹, and `unlearned`⁻² where a block has no scale.

        `like` gives the dtype and the device.
        """
        ...

    def blend(self, hessian: Tensor, rate: float) -> Precision:
        """(1 − ρ) S + ρ H, or with the negative curvature of H reflected where that would take too much of S."""
        ...

    def solve(self, vector: Tensor) -> Tensor:
        """S⁻¹ v, for one vector or each row [K, D]."""
        ...

    def scale(self, block: Block) -> Tensor:
        """The block's own factor C_b with C_b C_bᵀ = (S_bb)⁻¹, as its structure keeps it."""
        ...

    def complete(self, hessian: Tensor, weight: Tensor) -> Tensor:
        """H with the entries of S wherever `weight` is zero, and H / weight elsewhere: those coordinates stay."""
        ...
