"""Which sites are conjugate, found by asking the loss and not by reading the model.

A site is conditionally conjugate if, whatever the other sites are, ℓ(z) + log h(z) = ⟨c, T(z)⟩ + constant. Then
gradients at its sigma points determine c, and predict the gradient everywhere else: at fresh points, drawn cell by
cell. Cells of a plate may share their signs only if no term of ℓ has two of them, which the fresh points, independent
between cells, tell as well; a Normal site whose cells do meet is tried again as one quadratic over all of them.

A discrete site is summed cell by cell, which is right if the part of ℓ within a cell depends on that cell alone: the
parts that were noted with all cells alike must come back where the cells differ.

All this is asked at several points of the other sites, and has to hold at each: a switch that is off hides a term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..families import Natural, NormalNatural
from ..gradients.sigma_points import matched_gradient, signs_of
from ._layout import Member
from ._recognition import check_not_traced
from ._sweep import Role

__all__ = ["are_jointly_quadratic", "find_roles"]

NUM_FRESH = 2
NUM_BASES = 6  # points of the other members, which a switch among them may have on or off
MAX_COUPLED = 256
WIDER = 0.1  # of the start's information; a narrow start would make any smooth function look affine


def find_roles(
    members: Sequence[Member],
    naturals: Mapping[str, Natural],
    evaluate_at: Callable[[dict[str, Array]], tuple[Array, dict[str, Array]]],
) -> tuple[Role, ...]:
    """The role of every member, those with the most cells first: latents of the data before what they share.

    Args:
        evaluate_at: values of every member in T runs -> ℓ [T], and its derivatives with respect to the values of
            continuous members and to the weights of the cells of discrete ones.

    Raises:
        ValueError: the cells of a discrete member meet in a term of ℓ, or lie outside its plates.
        TypeError: the values are traced.
    """
    random = np.random.default_rng(0)
    candidates = [role for member in members for role in _candidates(member, naturals[member.name])]

    @jax.jit  # one compilation and not one an operation
    def verdicts(naturals: dict[str, Natural], base: Array) -> tuple[Array, Array]:
        wide = {name: natural.widened(WIDER) for name, natural in naturals.items()}
        fresh = {name: _fresh(natural.widened(WIDER / 3), random) for name, natural in naturals.items()}
        trials = [_trial(role, wide[role.name], fresh, base) for role in candidates]
        losses, slopes = evaluate_at({name: jnp.concatenate([trial[name] for trial in trials]) for name in fresh})
        ends = np.cumsum([len(trial[role.name]) for role, trial in zip(candidates, trials, strict=True)])
        holds, meets = [], []
        for role, trial, end in zip(candidates, trials, ends, strict=True):
            rows = slice(end - len(trial[role.name]), end)
            values, own = trial[role.name], slopes[role.name][rows]
            if role.kind == "affine":
                holds.append(_is_affine(role, wide[role.name], values, own))
            else:
                holds.append(_is_separable(values, own, losses[rows]))
            meets.append([_varies(slopes[name][rows]) for name in fresh])
        return jnp.asarray(holds), jnp.asarray(meets)

    at_bases = [verdicts(dict(naturals), jnp.asarray(base)) for base in range(NUM_BASES)]
    check_not_traced(at_bases[0])
    holds = np.all([holds for holds, _ in at_bases], axis=0)
    meets = np.any([meets for _, meets in at_bases], axis=0)
    found: dict[str, Role] = {}
    for role, held in zip(candidates, holds, strict=True):
        if held:
            found.setdefault(role.name, role)
        elif role.kind != "affine":
            raise ValueError(
                f"the discrete site '{role.name}' is summed cell by cell, but a term of the model depends on several "
                "of its cells. Put what depends on a cell into the site's plates, or sum the site out in the model "
                "(`infer={'enumerate': 'parallel'}` with TraceEnum_ELBO)."
            )
    together = {
        (role.name, name)
        for role, row in zip(candidates, meets, strict=True)
        for name, met in zip(naturals, row, strict=True)
        if met
    }
    roles = [found.get(member.name, _other_role(member, naturals[member.name])) for member in members]
    num_cells = {member.name: prod(size for _, _, size in member.plates) for member in members}
    return _with_factors(sorted(roles, key=lambda role: -num_cells[role.name]), together)


def are_jointly_quadratic(
    naturals: Mapping[str, Natural], evaluate_at: Callable[[dict[str, Array]], tuple[Array, dict[str, Array]]]
) -> bool:
    """Whether ∇ℓ is affine along a line through the values of all members at once, as that of a quadratic is."""
    random = np.random.default_rng(1)

    @jax.jit
    def bends(naturals: dict[str, Natural]) -> Array:
        ends = {name: _fresh(natural.widened(WIDER), random)[:2] for name, natural in naturals.items()}
        line = {name: jnp.stack([value[0], value.mean(0), value[1]]) for name, value in ends.items()}
        slopes = evaluate_at(line)[1].values()
        return jnp.stack([
            jnp.abs(slope[0] - 2 * slope[1] + slope[2]).max() > _tolerance(slope.dtype) * jnp.abs(slope).max()
            for slope in slopes
        ])  # fmt: skip

    return not bends(dict(naturals)).any()


def _tolerance(dtype: Any) -> float:
    """Relative; rounding stays well below, curvature over a wide start well above."""
    return 20 * float(np.sqrt(jnp.finfo(dtype).eps))


def _with_factors(roles: Sequence[Role], together: set[tuple[str, str]]) -> tuple[Role, ...]:
    """Each role in the first factor of the design in which it meets no other: a greedy colouring."""
    placed: list[Role] = []
    for role in roles:
        factor = 0
        while any(
            other.factor == factor
            and (
                (role.name, other.name) in together
                or (other.name, role.name) in together
                or "finite" in (role.kind, other.kind)
            )
            for other in placed
        ):
            factor += 1
        placed.append(replace(role, factor=factor))
    return tuple(placed)


def _varies(slopes: Array) -> Array:
    """Whether the gradient depends on the member that the trial varied."""
    return jnp.abs(slopes - slopes[0]).max() > _tolerance(slopes.dtype) * jnp.abs(slopes).max()


def _candidates(member: Member, natural: Natural) -> list[Role]:
    plates = tuple(axis for _, axis, _ in member.plates)
    if natural.discrete:
        if len(plates) != len(natural.batch_shape):
            raise ValueError(
                f"the discrete site '{member.name}' of shape {natural.batch_shape} is summed cell by cell, and only "
                f"{len(plates)} of its axes are plates. Put a plate around each axis, not `expand` or `to_event`."
            )
        return [_other_role(member, natural)]
    roles = [Role(member.name, "affine", plates, member.local)]
    if isinstance(natural, NormalNatural) and plates and natural.flat().size <= MAX_COUPLED:
        roles.append(Role(member.name, "affine", (), member.local))
    return roles


def _other_role(member: Member, natural: Natural) -> Role:
    kind = "finite" if natural.discrete and natural.num_values is not None else "drawn"
    return Role(member.name, kind, tuple(axis for _, axis, _ in member.plates), member.local)


def _fresh(natural: Natural, random: np.random.Generator) -> Array:
    """Points at which nothing was matched, each cell for itself: sigma points of another width, or any values."""
    shape = (NUM_BASES + NUM_FRESH, *natural.batch_shape)
    if natural.discrete:
        return jnp.asarray(_every_value(random, shape, _num_tried(natural)))
    return natural.sigma_points(jnp.asarray(random.choice([-1.0, 1.0], size=(*shape, natural.num_signs))))


def _every_value(random: np.random.Generator, shape: tuple[int, ...], num_values: int) -> np.ndarray:
    """Values of which each cell takes as many as there are bases, in an order of its member's own."""
    shifts = random.permutation(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (random.integers(0, num_values, size=shape[1:]) + shifts) % num_values


def _num_tried(natural: Natural) -> int:
    return natural.num_values or 4


def _trial(role: Role, natural: Natural, fresh: Mapping[str, Array], base: Array) -> dict[str, Array]:
    """The member at its sigma points or values and at fresh points, all other members at their base."""
    if natural.discrete:
        points = jnp.arange(_num_tried(natural)).reshape(-1, *[1] * len(natural.batch_shape))
        points = jnp.broadcast_to(points, (_num_tried(natural), *natural.batch_shape))
    else:
        points = natural.sigma_points(jnp.asarray(signs_of(natural, role.independent)))
    own = jnp.concatenate([points, fresh[role.name][NUM_BASES:]])
    return {
        name: own if name == role.name else jnp.broadcast_to(value[base], (len(own), *value.shape[1:]))
        for name, value in fresh.items()
    }


def _is_affine(role: Role, natural: Natural, values: Array, slopes: Array) -> Array:
    num_points, slopes = len(values) - NUM_FRESH, slopes + natural.base_slope(values)
    signs = jnp.asarray(signs_of(natural, role.independent), slopes.dtype)
    fresh = values[num_points:]
    predicted = matched_gradient(natural, role.independent, values[:num_points], slopes[:num_points], signs, fresh)
    error = natural.along(fresh, predicted) - natural.along(fresh, slopes[num_points:])
    size = jnp.abs(natural.along(values, slopes)).max()
    return jnp.abs(error).max() <= _tolerance(slopes.dtype) * size


def _is_separable(values: Array, parts: Array, losses: Array) -> Array:
    """Whether each cell's part of ℓ is that of its own value, and what is outside the cells is the same for all."""
    num_values = len(values) - NUM_FRESH
    table, fresh = parts[:num_values], values[num_values:]
    expected = jnp.take_along_axis(table, fresh, 0)
    outside = losses - parts.sum(tuple(range(1, parts.ndim)))
    tolerance = _tolerance(parts.dtype) * (jnp.abs(parts).max() + jnp.abs(losses).max())
    return (jnp.abs(parts[num_values:] - expected).max() <= tolerance) & (jnp.ptp(outside) <= tolerance)
