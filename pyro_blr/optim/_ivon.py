"""The rule of IVON: a diagonal Gaussian over many weights, moved by first-order gradients.

With q(w) = N(m, diag σ²), N data, ℓ̄ the loss averaged over them, a prior N(m₀, 1/(N δ)) and temperature τ:

    σ² = τ / (N (h + δ))                                   h is the curvature of ℓ̄, N δ the precision of the prior
    ĝ = ∇ℓ̄(m + σ ε)                                        the gradient at the drawn weights
    ĥ = ε ĝ / σ        or        ε (ĝ − ḡ) / σ − h (ε² − 1)                                  `curvature`
    ḡ ← β₁ ḡ + (1 − β₁) ĝ
    h ← β₂ h + (1 − β₂) ĥ,  kept in the domain, and faster at the start        `averaged_hessian`
    m ← m − α · direction                                                                    `step`

Both ĥ estimate E_q[diag ∇²ℓ̄] (Price's theorem). The second takes from ℓ̄ its quadratic surrogate ⟨ḡ, w⟩ + ½ h (w − m)²,
whose own share is known: what is left has no noise where the surrogate is exact, where ε ĝ / σ keeps |ĝ| / σ for ever.

Where a step has one draw, two steps are at an antithetic pair (`paired`): the second draws −ε with the same σ, and what
the noise adds to ĝ in the first order, ± H σ ε, cancels in the average. Only then does h move. ḡ has the first's ĝ in
it by then, with the noise of −ε and a share of s = (1 − β₁)/(1 − β₁ᵗ), hence

    ĥ = ε (ĝ − ḡ) / ((1 + s) σ) − h (ε² − 1),        h ← β₂² h + (1 − β₂²) ĥ                        `echo`

The posterior's precision and the preconditioner of the mean are two things: E_q[∇ℓ] = 0 is the same point for every
preconditioner. `"factored"` moves the mean by the root of the averaged squares of the gradient at the drawn weights. Of
a matrix it keeps the means of its rows and columns alone; where gradients are sparse, their product says little of an
element, and c = 10 is what bounds it. Its unit u is the standard deviation s₀ of the prior, as if the coordinates were
(w − m₀)/s₀, up to the s₀ = 1/√n of a matrix with n = 128 inputs; from there on it falls as s₀², since an output is a
sum over 1/s₀² inputs whose weights all move at once, and is not to move more in a wide network. A prior wider than 0.3
says that nothing is known of the weights, and not that they are as large:

    R, C ← β₃ (R, C) + (1 − β₃) mean over (columns, rows) of (ĝ + δ (m − m₀))²
    √v = √(R / mean(R)) √(C / (1 − β₃ᵗ))ᵀ                                            `roots_of`
    g̃ = β₁ ḡ/(1 − β₁ᵗ⁺¹) + (1 − β₁) ĝ/(1 − β₁ᵗ)                                      Nesterov momentum
    direction = u clip((g̃ + δ (m − m₀)) / √v, ±c)                              each factor of √v at least 10⁻⁸
    u = s min(1, √n s),   s = min(s₀, 0.3)                                           `unit_of`

`"posterior"` is the published recursion, in which the two coincide:

    direction = (h₀ + δ) clip((ḡ/(1 − β₁ᵗ) + δ (m − m₀)) / (h + δ), ±c)                        h₀ of `start_of`

Source: Shen et al. 2024, "Variational Learning is Effective for Large Deep Networks" (ICML), Algorithm 1; Shazeer &
Stern 2018, "Adafactor", section 3 (rows and columns); Dozat 2016 (Nesterov momentum for Adam); Yang et al. 2022,
"Tensor Programs V" (one rate for all widths); Khan & Rue 2023.
Paper's symbols: N = `num_data`, h = `hessian`, ḡ = `momentum`, α = `learning_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Prior",
    "Settings",
    "State",
    "curvature",
    "divergence_of_loc",
    "divergence_of_scale",
    "echo",
    "init",
    "precision_of",
    "residual",
    "scale_of",
    "start_of",
    "step",
]

Weights = dict[str, Tensor]  # by name of the part
Shapes = tuple[tuple[int, torch.Size], ...]  # (k, shape): k tensors of this shape, one after another
HESS_INIT, NARROW = 0.1, 8.0  # h₀, and s₀/σ₀ at least
WIDE, WIDEST = 128, 0.3  # n, the inputs from which on a matrix has a unit in proportion to s₀²; s₀ at most
START = 100  # steps in which h, over a part, is the plain mean of all ĥ
TINY = 1e-8  # as Adam's ε, what the root of the second moment of a gradient of the averaged loss is not below


class Prior(NamedTuple):
    """N(loc, 1/(N δ)) of a part, in the units of the averaged loss; δ = 0 where the loss holds the prior's term.

    Attributes:
        loc: m₀, a number or broadcast to the part.
        precision: δ, the precision over N, a number or broadcast to the part.
    """

    loc: Tensor | float
    precision: Tensor | float

    @property
    def known(self) -> bool:
        """Whether the rule has the prior's share exactly."""
        return isinstance(self.precision, Tensor) or self.precision > 0


@dataclass(frozen=True)
class Settings:
    """What does not change from step to step.

    Attributes:
        num_data: N.
        preconditioner: `"factored"` or `"posterior"`.
        paired: whether two steps are at an antithetic pair of draws.
        beta1, beta2, beta3: memory of ḡ, h and v.
        hess_init: h₀, or None (`start_of`).
        clip_radius: c.
    """

    num_data: float
    preconditioner: str
    paired: bool
    beta1: float
    beta2: float
    beta3: float
    hess_init: float | None
    clip_radius: float


@dataclass(frozen=True)
class State:
    """The Gaussian and its averages, by name of the part. The tensors are written in place.

    A part is a site, or some tensors of a network, one after another in a vector, whose prior is the same.

    Attributes:
        count: t, steps so far.
        shapes: of the tensors that a part consists of.
        loc: m.
        momentum: ḡ.
        hessian: h.
        second_moment: of every k tensors of one shape, (R, C) of v, [k, rows, 1] and [k, 1, columns] of the tensors
            seen as matrices, or v alone where they are vectors; none where the preconditioner is the posterior.
        skipped: steps so far that left everything else as it was, because the loss or a gradient was not finite.
    """

    count: int
    shapes: dict[str, Shapes]
    loc: Weights
    momentum: Weights
    hessian: Weights
    second_moment: dict[str, list[tuple[Tensor, ...]]]
    skipped: int


def start_of(prior: Prior, settings: Settings) -> Tensor | float:
    """h₀: as it is given, or 0.1, and at least 63 δ for `"factored"`, by which σ is an eighth of s₀ at most."""
    if settings.hess_init is not None:
        return settings.hess_init
    if settings.preconditioner == "posterior":
        return HESS_INIT
    narrow = (NARROW**2 - 1) * prior.precision
    return narrow.clamp(min=HESS_INIT) if isinstance(narrow, Tensor) else max(HESS_INIT, narrow)


def init(
    loc: Mapping[str, Tensor],
    hessian: Mapping[str, Tensor],
    priors: Mapping[str, Prior],
    shapes: Mapping[str, Shapes],
    settings: Settings,
) -> State:
    """The state at m = `loc` and h = h₀; both are kept as they are given, and written from now on."""
    published = settings.preconditioner == "posterior"
    for name, value in hessian.items():
        value.copy_(as_tensor(start_of(priors[name], settings), value))
    return State(
        count=0,
        shapes=dict(shapes),
        loc=dict(loc),
        momentum={name: torch.zeros_like(value) for name, value in loc.items()},
        hessian=dict(hessian),
        second_moment={
            name: [] if published else [means(zeros) for zeros in stacks(torch.zeros_like(value), shapes[name])]
            for name, value in loc.items()
        },
        skipped=0,
    )


def precision_of(hessian: Tensor, prior: Prior, num_data: float, temperature: float) -> Tensor:
    """1/σ² = N (h + δ) / τ"""
    factor = num_data / temperature
    return torch.add(as_tensor(factor * prior.precision, hessian), hessian, alpha=factor)


def scale_of(hessian: Tensor, prior: Prior, num_data: float, temperature: float) -> Tensor:
    """σ"""
    return precision_of(hessian, prior, num_data, temperature).rsqrt_()


def echo(count: int, settings: Settings) -> float:
    """s, the share of the last step's ĝ in ḡ/(1 − β₁ᵗ), where this step draws at the mirror image of that one."""
    return (1 - settings.beta1) / debias(settings.beta1, max(count, 1)) if settings.paired else 0.0


def residual(gradient: Tensor, offset: Tensor, state: State, name: str, share: float, settings: Settings) -> Tensor:
    """ĝ − ḡ/(1 − β₁ᵗ) − (1 + s) h (w − m) at w = m + `offset`: what the surrogate ⟨ḡ, w⟩ + ½ h (w − m)² leaves of ĝ.

    A draw that is a `share` of the average has that share of the surrogate. As published there is none.
    """
    if settings.preconditioner == "posterior":
        return gradient.clone()
    slope, curved = share / debias(settings.beta1, max(state.count, 1)), share * (1 + echo(state.count, settings))
    return torch.sub(gradient, state.momentum[name], alpha=slope).addcmul_(state.hessian[name], offset, value=-curved)


def curvature(product: Tensor, precision: Tensor, hessian: Tensor, count: int, settings: Settings) -> Tensor:
    """ĥ = h + σ ε (ĝ − ḡ − (1 + s) h σ ε) / ((1 + s) σ²), from the `product` over σ², averaged over particles.

    The product is σ times the gradient, with respect to σ, of ℓ̄ less its surrogate; it is written over. `precision` is
    1/σ². Without a surrogate h and ḡ are 0.
    """
    if settings.preconditioner == "posterior":
        return product.mul_(precision)
    return torch.addcmul(hessian, product, precision, value=1 / (1 + echo(count, settings)), out=product)


def averaged_hessian(hessian: Tensor, estimate: Tensor, prior: Prior, settings: Settings, count: int) -> Tensor:
    """h ← β₂ h + (1 − β₂) ĥ, in place, and what keeps h + δ positive.

    The published recursion always adds (1 − β₂)² (h − ĥ)² / (2 (h + δ)), a Riemannian step that can never leave the
    domain, at the price of a bias upwards by (1 − β₂) Var(ĥ) / (2 (h + δ)) in the long run. The other takes the
    straight step wherever that keeps half of the precision, and half of it elsewhere. An average with a long memory
    would be long in learning that h₀ is far too small, with draws too wide to learn from: in the first `START` steps,
    h ← h + max(mean(ĥ − h)/n, h₀ − mean(h)), by which the mean of h over the part is that of n ĥ so far, if over h₀.
    """
    steps = 2 if settings.paired else 1  # of one ĥ
    forgotten = 1 - settings.beta2**steps
    if settings.preconditioner == "posterior":
        bend = (hessian - estimate).square_().div_(hessian + prior.precision)
        return hessian.lerp_(estimate, forgotten).add_(bend, alpha=0.5 * forgotten**2)
    least = torch.lerp(as_tensor(-prior.precision, hessian), hessian, 0.5)
    shift = None
    if count <= START:
        mean, start = hessian.mean(), as_tensor(start_of(prior, settings), hessian).mean()
        shift = torch.maximum((estimate.mean() - mean) / -(-count // steps), start - mean)
    straight = hessian.lerp_(estimate, forgotten)
    if shift is not None:
        straight += shift
    return torch.maximum(straight, least, out=straight)


def step(
    state: State,
    statistics: Iterable[tuple[str, Tensor, Tensor | None]],
    priors: Mapping[str, Prior],
    learning_rate: float,
    settings: Settings,
) -> State:
    """One step of every part from its (name, ĝ, ĥ), of the part of ℓ̄ that the priors are not; ĥ is written over.

    The first step of a pair has no ĥ, and leaves h alone.
    """
    count = state.count + 1
    for name, gradient, estimate in statistics:
        m, momentum, hessian, prior = state.loc[name], state.momentum[name], state.hessian[name], priors[name]
        pull = offset_from(m, prior.loc) * prior.precision
        momentum.lerp_(gradient, 1 - settings.beta1)
        if estimate is not None:
            averaged_hessian(hessian, estimate, prior, settings, count)
        if settings.preconditioner == "posterior":
            ascent = pull.add_(momentum, alpha=1 / debias(settings.beta1, count)).div_(hessian + prior.precision)
            unit = start_of(prior, settings) + prior.precision
        else:
            squares = torch.add(gradient, pull, out=estimate).square_()  # a new tensor where there is no ĥ
            ascent = pull.add_(momentum, alpha=settings.beta1 / debias(settings.beta1, count + 1))
            ascent.add_(gradient, alpha=(1 - settings.beta1) / debias(settings.beta1, count))
            pieces = zip(stacks(squares, state.shapes[name]), stacks(ascent, state.shapes[name]), strict=True)
            for (square, piece), factors in zip(pieces, state.second_moment[name], strict=True):
                for factor, new in zip(factors, means(square), strict=True):
                    factor.lerp_(new, 1 - settings.beta3)
                for root in roots_of(factors, debias(settings.beta3, count)):
                    piece.div_(root)
            unit = unit_of(prior, settings.num_data)
        direction = ascent
        if math.isfinite(settings.clip_radius):
            direction.clamp_(-settings.clip_radius, settings.clip_radius)
        m.addcmul_(direction, as_tensor(unit, m), value=-learning_rate)
    return replace(state, count=count)


def stacks(part: Tensor, shapes: Shapes) -> list[Tensor]:
    """The tensors of a part, as views of it: [k, rows, columns] of k that are seen as matrices, [k, length] of vectors.

    A matrix has its axes parted where the two sides are most alike.
    """
    pieces = part.view(-1).split([count * shape.numel() for count, shape in shapes])
    return [piece.view(count, *matrix_shape(shape)) for piece, (count, shape) in zip(pieces, shapes, strict=True)]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(rows, columns) of a tensor seen as a matrix; (length,) of a vector."""
    if len(shape) < 2:
        return (math.prod(shape),)
    parts = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape))]
    return min(parts, key=lambda part: max(part))


def means(squares: Tensor) -> tuple[Tensor, ...]:
    """The means over columns, [k, rows, 1], and over rows, [k, 1, columns]; of vectors, the vectors."""
    if squares.ndim < 3:
        return (squares.clone(),)
    return squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)


def roots_of(factors: tuple[Tensor, ...], known: float) -> list[Tensor]:
    """√(R / mean(R)) and √C, whose product is √v, of averages that are `known` times what they are of."""
    if len(factors) == 1:
        squares = [factors[0] / known]
    else:
        rows, columns = factors
        average = rows.mean(-2, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny)
        squares = [rows / average, columns / known]
    return [square.sqrt_().clamp_min_(TINY) for square in squares]


def debias(memory: float, count: int) -> float:
    """1 − βᵗ: how much of an average that began at zero is data."""
    return 1 - memory**count


def unit_of(prior: Prior, num_data: float) -> Tensor | float:
    """u = s min(1, √n s), s = min(s₀, 0.3), s₀ = 1/√(N δ), or ∞ where the prior is not known."""
    scale = at_most(WIDEST, (num_data * prior.precision) ** -0.5) if prior.known else WIDEST
    return scale * at_most(1.0, math.sqrt(WIDE) * scale)


def at_most(limit: float, value: Tensor | float) -> Tensor | float:
    return value.clamp(max=limit) if isinstance(value, Tensor) else min(limit, value)


def divergence_of_loc(loc: Tensor, prior: Prior, num_data: float) -> Tensor:
    """½ Σ (m − m₀)² N δ, the share that m has in KL(q ‖ prior); 0 where the prior is not known."""
    if not prior.known:
        return loc.new_zeros(())
    return 0.5 * weighted_square(offset_from(loc, prior.loc), as_tensor(num_data * prior.precision, loc))


def divergence_of_scale(scale: Tensor, prior: Prior, num_data: float) -> Tensor:
    """½ Σ σ² N δ − log(σ² N δ) − 1, the share that σ has; −H(q) where the prior is not known."""
    log_scale, size = scale.log().sum(), scale.numel()
    if not prior.known:
        return -log_scale - 0.5 * size * (math.log(2 * math.pi) + 1)
    precision = as_tensor(num_data * prior.precision, scale)
    return 0.5 * (weighted_square(scale, precision) - size * (1 + precision.log().mean())) - log_scale


def weighted_square(x: Tensor, weight: Tensor) -> Tensor:
    """Σ w x², of one weight for all or one for each."""
    weighted, x = (x if weight.ndim == 0 else weight * x).reshape(-1), x.reshape(-1)
    total = torch.dot(weighted, x)
    return weight * total if weight.ndim == 0 else total


def offset_from(m: Tensor, loc: Tensor | float) -> Tensor:
    """m − m₀, not to be written to: where m₀ is the number 0, as that of every matrix, it is m."""
    return m if isinstance(loc, float) and loc == 0 else m - loc


def as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """A number as a tensor on the device of another, without waiting for it."""
    return value if isinstance(value, Tensor) else like.new_full((), value)
