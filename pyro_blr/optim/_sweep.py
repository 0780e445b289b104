"""Coordinate ascent over the sites that have natural parameters of their own.

    λ_s ← (1 − ρ) λ_s − ρ ∇_{μ_s} E_q[ℓ(z)],        one site s after the other, those with the most cells first,

with E_q over a design of runs, in each of which every site has one value. How a site takes part is found, not declared
(`_conjugacy.py`):

    affine   ℓ is affine in T_s(z_s) whatever the other sites are. Its sigma points integrate it exactly, for the
             others too, and give ∇_{μ_s} E_q[ℓ] exactly (`gradients/sigma_points.py`).
    finite   z_s takes finitely many values: all are evaluated, weighted by their probabilities.
    drawn    anything else: draws from q (`gradients/drawn.py`), and the safe step.

The runs are the full factorial of the sites' values, so that affine and finite sites are independent in the design as
they are under q. If all sites are affine or finite, E_q is exact, a step at ρ = 1 is a sweep of coordinate ascent, and
on a conjugate model Bayes' rule.

Source: Khan & Rue 2023, section 5; Hoffman, Blei, Wang & Paisley 2013 for the local sites of subsampled plates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..families import Natural
from ..gradients import Extras
from ..gradients.drawn import directions, estimator_of, natural_gradients, samples
from ..gradients.sigma_points import matched_target, signs_of
from . import _rate
from ._svi import Members

__all__ = [
    "Design",
    "Role",
    "Sweep",
    "design_of",
    "init",
    "natural_gradient",
    "place",
    "seeds_of",
    "slopes_of",
    "sweep",
]

MAX_RUNS = 16_384
MAX_HALVINGS = 6


@dataclass(frozen=True)
class Role:
    """How a member takes part.

    Attributes:
        name: of the member.
        kind: `"affine"`, `"finite"` or `"drawn"`.
        independent: the axes of its batch along which its cells do not meet in any term of ℓ.
        local: whether it lies in a subsampled plate.
        factor: of the design; members that meet in no term of ℓ share one, and their runs.
    """

    name: str
    kind: str
    independent: tuple[int, ...] = ()
    local: bool = False
    factor: int = 0


@dataclass(frozen=True)
class Design:
    """The runs of a factorial design.

    Attributes:
        draw: [R], which draw each run takes of what is drawn; the slowest factor.
        level: for each affine or finite member which of its own points each run takes, [R].
        signs: for each affine member the signs of its points, [levels, *batch, n].
        num_draws: S.
    """

    draw: np.ndarray
    level: dict[str, np.ndarray]
    signs: dict[str, np.ndarray]
    num_draws: int


def design_of(roles: Sequence[Role], naturals: Mapping[str, Natural], num_draws: int) -> Design:
    """The full factorial of the draws, the signs of the affine members and the values of the finite ones.

    Raises:
        ValueError: more than 16,384 runs would be needed.
    """
    signs = {role.name: signs_of(naturals[role.name], role.independent) for role in roles if role.kind == "affine"}
    num_levels = {
        role.name: len(signs[role.name]) if role.kind == "affine" else naturals[role.name].num_values
        for role in roles
        if role.kind != "drawn"
    }
    factors = sorted({role.factor for role in roles if role.name in num_levels})
    sizes = [
        max(num_levels[role.name] for role in roles if role.name in num_levels and role.factor == factor)
        for factor in factors
    ]
    if num_draws * prod(sizes) > MAX_RUNS:
        described = ", ".join(f"'{name}': {number}" for name, number in num_levels.items())
        raise ValueError(
            f"an exact expectation over the sites would take {num_draws * prod(sizes)} evaluations of the model a step "
            f"({described}). Give the larger sites smaller events or plates around what is independent, or give some "
            "of them a Normal by `families` and fit them as one Gaussian (AutoMultivariateNormal, AutoNormal)."
        )
    grid = np.indices([num_draws, *sizes]).reshape(1 + len(sizes), -1)
    column = dict(zip(factors, grid[1:], strict=True))
    level = {role.name: column[role.factor] % num_levels[role.name] for role in roles if role.name in num_levels}
    return Design(draw=grid[0], level=level, signs=signs, num_draws=num_draws)


@dataclass(frozen=True)
class Sweep:
    """What the rule carries between steps.

    Attributes:
        rates: of each member, by name (`_rate.RateState`).
        skipped: steps so far in which an update was not finite or outside the domain, and left its member as it was.
    """

    rates: dict[str, _rate.RateState]
    skipped: int


def init(naturals: Mapping[str, Natural]) -> Sweep:
    rates = {name: replace(_rate.init(natural.flat()), last_gradient=natural * 0) for name, natural in naturals.items()}
    return Sweep(rates=rates, skipped=0)


def sweep(
    state: Sweep,
    naturals: dict[str, Natural],
    evaluate: Callable[[Members, Any], tuple[Tensor, Extras]],
    others: Any,
    roles: Sequence[Role],
    design: Design,
    seed: int,
    learning_rate: float | None,
    temperature: float,
) -> tuple[Sweep, dict[str, Natural], Tensor, Any, Extras]:
    """One update of every member in turn.

    Args:
        evaluate: (the members' values and weights in R runs, other parameters) -> (losses [R], extras): ℓ, and the
            log q of the sites that share a Gaussian.
        learning_rate: ρ; None for 1, falling where steps under noise oppose each other, searched for drawn members.

    Returns:
        the next state, the members, the loss where the step began, the gradient of `others` (None: the host's own
        backward pass has it), the extras.
    """
    seeds, members = seeds_of(roles, seed), place(naturals, roles, design, seed)
    rates, skipped, first = dict(state.rates), False, None
    for role in roles:
        name, natural = role.name, naturals[role.name]
        losses, extras, slopes, g_others = slopes_of(role, natural, evaluate, members, others)
        if first is None:
            first = losses.mean() - temperature * _entropy(naturals, extras), g_others, extras
        weight = extras.coverage[name].to(natural.flat().dtype)
        covered, weight = weight > 0, torch.where(weight > 0, weight, 1) * temperature

        if role.kind == "drawn":

            def losses_at(proposed: Natural, role: Role = role, members: Members = members) -> Tensor:
                moved = _moved(members, role, proposed, design, seeds[role.name])
                return _without_gradient(evaluate, moved, others)

            rates[name], proposed = _drawn_step(
                natural, rates[name], design, seeds[name], slopes, losses, weight, covered, learning_rate, losses_at
            )
        else:
            target = _target(role, natural, design, members.values[name], slopes, weight)
            noisy = extras.minibatch or design.num_draws > 1
            rate, rates[name] = _falling(rates[name], natural, target - natural, noisy, learning_rate, role.local)
            proposed = _towards(natural, target, rate)
        usable = proposed.in_domain()
        skipped |= bool((covered & ~usable).any())
        naturals = {**naturals, name: proposed.where(covered & usable, natural)}
        members = _moved(members, role, naturals[name], design, seeds[name])

    assert first is not None, "a sweep needs a member"
    return Sweep(rates, state.skipped + skipped), naturals, *first


def place(naturals: Mapping[str, Any], roles: Sequence[Role], design: Design, seed: int) -> Members:
    """The values of every member in every run [R, *batch, *event], and of finite ones the weights of their cells."""
    seeds, members = seeds_of(roles, seed), Members({}, {})
    for role in roles:
        members = _moved(members, role, naturals[role.name], design, seeds[role.name])
    return members


def _moved(members: Members, role: Role, natural: Any, design: Design, seed: int) -> Members:
    """The same runs with one member's own values and weights."""
    value, weight = _points(role, natural, design, seed)
    weights = members.weights if weight is None else {**members.weights, role.name: weight}
    return members._replace(values={**members.values, role.name: value}, weights=weights)


def _points(role: Role, natural: Any, design: Design, seed: int) -> tuple[Tensor, Tensor | None]:
    if role.kind == "drawn":
        return samples(natural, design.num_draws, seed)[design.draw], None
    level = design.level[role.name]
    if role.kind == "affine":
        signs = torch.as_tensor(design.signs[role.name]).to(natural.flat())
        return natural.sigma_points(signs)[level], None
    if role.kind == "finite":
        points = natural.to_distribution().enumerate_support()  # of the host's dtype
        return points[level], natural.num_values * natural.probabilities()[level]
    raise ValueError(f"a role is 'affine', 'finite' or 'drawn', got {role.kind!r}.")


def seeds_of(roles: Sequence[Role], seed: int) -> dict[str, int]:
    """One random seed for each member, below those of the Gaussian's noise (`_svi.py`)."""
    return {role.name: seed - 1 - index for index, role in enumerate(roles)}


def slopes_of(
    role: Role,
    natural: Natural,
    evaluate: Callable[[Members, Any], tuple[Tensor, Extras]],
    members: Members,
    others: Any,
) -> tuple[Tensor, Extras, Tensor, Any]:
    """Losses [R], extras, what the member's ∇_μ is made of in every run, and None for the gradient of `others`.

    That is ∇_z ℓ; for a finite member and where a score is taken ℓ(z) of each cell, the derivative with respect to
    the cell's weight; for a count its difference to ℓ(z + 1). Differentiable in the weights and factors that are.
    """
    estimator = estimator_of(natural) if role.kind == "drawn" else role.kind
    by_cell = estimator in ("finite", "score", "difference")
    ones = natural.flat().new_ones((len(members.values[role.name]), *natural.batch_shape))
    weights = {role.name: ones, **members.weights}
    given_weights = (*members.weights.values(), *(members.factors or {}).values())
    differentiable = any(weight.requires_grad for weight in given_weights)

    def slopes_at(values: dict[str, Tensor]) -> tuple[Tensor, Extras, Tensor]:
        own = (weights if by_cell else values)[role.name].detach().requires_grad_()
        given = {"weights": {**weights, role.name: own}} if by_cell else {"values": {**values, role.name: own}}
        with torch.enable_grad():
            losses, extras = evaluate(members._replace(**{"values": values, **given}), others)
            total = losses.sum() + 0 * own.sum()  # which need not be differentiable: a flat prior and no data
        (slopes,) = torch.autograd.grad(total, own, create_graph=differentiable)
        return losses.detach(), extras, slopes

    losses, extras, slopes = slopes_at(members.values)
    if estimator == "difference":
        above = {**members.values, role.name: members.values[role.name] + 1}
        slopes = slopes_at(above)[2] - slopes
    return losses, extras, slopes, None


def natural_gradient(
    role: Role, natural: Natural, design: Design, values: Tensor, slopes: Tensor, seed: int
) -> Natural:
    """∇_μ E_q[ℓ] of a member, linear in the slopes."""
    if role.kind != "drawn":
        return -_target(role, natural, design, values, slopes, slopes.new_ones(natural.batch_shape))
    first = np.unique(design.draw, return_index=True)[1]
    by_draw = natural_gradients(natural, _by_draw(design, slopes), values[first], seed)
    return _mean_of_draws(by_draw)


def _target(role: Role, natural: Natural, design: Design, values: Tensor, slopes: Tensor, weight: Tensor) -> Natural:
    """−∇_μ E_q[ℓ] / w, where the rule goes at ρ = 1; w is the weight of the member's entropy in the loss."""
    level = torch.as_tensor(design.level[role.name])
    if role.kind == "finite":
        table = torch.stack([slopes[level == value].mean(0) for value in range(natural.num_values)])
        return -natural.match_values(table) / weight
    signs = torch.as_tensor(design.signs[role.name]).to(slopes)[level]
    return matched_target(natural, role.independent, values, slopes, signs, weight)


def _towards(natural: Natural, target: Natural, rate: float) -> Natural:
    """(1 − ρ) λ + ρ λ', with half of ρ and less where rounding has put λ' of a proper posterior outside the domain."""
    proposed = natural.step(target, rate)
    for halvings in range(1, MAX_HALVINGS):
        proposed = proposed.where(proposed.in_domain(), natural.step(target, rate * 0.5**halvings))
    return proposed


def _falling(
    state: _rate.RateState,
    natural: Natural,
    direction: Natural,
    noisy: bool,
    learning_rate: float | None,
    local: bool,
) -> tuple[float, _rate.RateState]:
    """ρ of a conjugate member: 1, or under noise 2/(n + 2) after n steps that took back what the last one did.

    Noise comes from minibatches, and from sites elsewhere that are drawn. A local site sees all its data whenever it
    is seen, and takes ρ = 1 (Hoffman et al. 2013).
    """
    if local:
        return 1.0, state
    if learning_rate is not None:
        return learning_rate, state
    opposed = noisy and bool(direction.inner(natural.fisher_product(state.last_gradient)).sum() < 0)
    noisy_steps = state.noisy_steps + opposed
    rate = 2 / (noisy_steps + 2)
    return rate, replace(state, taken=rate, noisy_steps=noisy_steps, last_gradient=direction)


def _drawn_step(
    natural: Natural,
    state: _rate.RateState,
    design: Design,
    seed: int,
    slopes: Tensor,
    losses: Tensor,
    weight: Tensor,
    covered: Tensor,
    learning_rate: float | None,
    losses_at: Callable[[Natural], Tensor],
) -> tuple[_rate.RateState, Natural]:
    """The rate's next state and the next λ of a member without conjugacy, by the safe step."""
    by_draw = directions(natural, _by_draw(design, slopes), weight, seed)
    by_draw = by_draw.where(covered.expand(by_draw.batch_shape), by_draw * 0)
    direction = _mean_of_draws(by_draw)
    if learning_rate is not None:
        return state, natural.safe_step(direction, learning_rate)

    def entropy(natural: Natural) -> Tensor:
        return torch.where(covered, weight * natural.entropy(), 0).sum()

    def propose(rate: float) -> tuple[Natural, Tensor]:
        proposed = natural.safe_step(direction, rate).where(covered, natural)
        return proposed, _by_draw(design, losses_at(proposed)) - entropy(proposed)

    def squared_norm(direction: Natural) -> Tensor:
        return direction.inner(natural.fisher_product(direction)).sum()

    each = zip(*(leaf.unbind() for leaf in vars(by_draw).values()), strict=True)
    spread = sum(squared_norm(type(natural)(*leaves) - direction) for leaves in each)
    residual, variance = float(squared_norm(direction)), float(spread) / (design.num_draws * (design.num_draws - 1))
    noisy, most = residual < _rate.NOISE_RATIO * variance, residual + natural.flat().numel()
    before = _by_draw(design, losses) - entropy(natural)
    state, proposed, accepted, _ = _rate.search(state, before, state.noisy_steps + noisy, most, direction, propose)
    return state, proposed if accepted else natural


def _by_draw(design: Design, tensor: Tensor) -> Tensor:
    """[R, ...] averaged over the runs of each draw, [S, ...]."""
    return tensor.reshape(design.num_draws, -1, *tensor.shape[1:]).mean(1)


def _mean_of_draws(by_draw: Natural) -> Any:
    return type(by_draw)(*(leaf.mean(0) for leaf in vars(by_draw).values()))


def _without_gradient(evaluate: Callable, members: Members, others: Any) -> Tensor:
    # TraceEnum_ELBO refuses a loss that cannot be differentiated
    values = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in members.values.items()}
    with torch.enable_grad():
        return evaluate(members._replace(values=values), others)[0].detach()


def _entropy(naturals: Mapping[str, Natural], extras: Extras) -> Any:
    """Σ_s w_s H(q_s), each cell weighted as the loss weighs it."""
    return sum((extras.coverage[name] * natural.entropy()).sum() for name, natural in naturals.items())
