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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ._gaussian import select

__all__ = [
    "Prior",
    "Settings",
    "State",
    "curvature",
    "echo",
    "init",
    "kl_divergence",
    "precision_of",
    "scale_of",
    "start_of",
    "step",
    "surrogate",
]

Weights = dict[str, Array]  # by site
HESS_INIT, NARROW = 0.1, 8.0  # h₀, and s₀/σ₀ at least
WIDE, WIDEST = 128, 0.3  # n, the inputs from which on a matrix has a unit in proportion to s₀²; s₀ at most
START = 100  # steps in which h, over a part, is the plain mean of all ĥ
TINY = 1e-8  # as Adam's ε, what the root of the second moment of a gradient of the averaged loss is not below


class Prior(NamedTuple):
    """N(loc, 1/(N δ)) of a site, in the units of the averaged loss; δ = 0 where the loss holds the prior's term.

    Attributes:
        loc: m₀, broadcast to the site.
        precision: δ, the precision over N, broadcast to the site.
    """

    loc: Array
    precision: Array


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The Gaussian and its averages, by site.

    Attributes:
        count: t, steps so far.
        loc: m.
        momentum: ḡ.
        hessian: h.
        second_moment: (R, C) of v, [rows, 1] and [1, columns] of the site seen as a matrix, or v alone where it is a
            vector; without entries where the preconditioner is the posterior.
        skipped: steps so far that left everything else as it was, because the loss or a gradient was not finite.
    """

    count: Array
    loc: Weights
    momentum: Weights
    hessian: Weights
    second_moment: dict[str, tuple[Array, ...]]
    skipped: Array


def start_of(prior: Prior, settings: Settings) -> Array | float:
    """h₀: as it is given, or 0.1, and at least 63 δ for `"factored"`, by which σ is an eighth of s₀ at most."""
    if settings.hess_init is not None:
        return settings.hess_init
    if settings.preconditioner == "posterior":
        return HESS_INIT
    return jnp.maximum(HESS_INIT, (NARROW**2 - 1) * prior.precision)


def init(loc: Mapping[str, Array], priors: Mapping[str, Prior], settings: Settings) -> State:
    """The state at m = `loc` and h = h₀."""
    published = settings.preconditioner == "posterior"
    return State(
        count=jnp.zeros((), jnp.int32),
        loc={name: jnp.array(value) for name, value in loc.items()},
        momentum={name: jnp.zeros_like(value) for name, value in loc.items()},
        hessian={name: jnp.full_like(value, start_of(priors[name], settings)) for name, value in loc.items()},
        second_moment=({} if published else {name: means(jnp.zeros_like(value)) for name, value in loc.items()}),
        skipped=jnp.zeros((), jnp.int32),
    )


def precision_of(hessian: Array, prior: Prior, num_data: float, temperature: Array | float) -> Array:
    """1/σ² = N (h + δ) / τ"""
    return (num_data / temperature * (hessian + prior.precision)).astype(hessian.dtype)


def scale_of(hessian: Array, prior: Prior, num_data: float, temperature: Array | float) -> Array:
    """σ"""
    return 1 / jnp.sqrt(precision_of(hessian, prior, num_data, temperature))


def echo(count: Array, settings: Settings, dtype: jnp.dtype) -> Array:
    """s, the share of the last step's ĝ in ḡ/(1 − β₁ᵗ), where this step draws at the mirror image of that one."""
    share = (1 - settings.beta1) / debias(settings.beta1, jnp.maximum(count, 1), dtype)
    return share if settings.paired else jnp.zeros((), dtype)


def surrogate(state: State, settings: Settings) -> dict[str, tuple[Array, Array]]:
    """(ḡ/(1 − β₁ᵗ), (1 + s) h) of each site, which the surrogate ⟨ḡ, w⟩ + ½ h (w − m)² takes from ĝ; as published 0."""
    if settings.preconditioner == "posterior":
        return {name: (jnp.zeros((), m.dtype), jnp.zeros((), m.dtype)) for name, m in state.loc.items()}
    count = jnp.maximum(state.count, 1)
    return {
        name: (
            state.momentum[name] / debias(settings.beta1, count, m.dtype),
            (1 + echo(state.count, settings, m.dtype)) * state.hessian[name],
        )
        for name, m in state.loc.items()
    }


def curvature(product: Array, precision: Array, hessian: Array, count: Array, settings: Settings) -> Array:
    """ĥ = h + σ ε (ĝ − ḡ − (1 + s) h σ ε) / ((1 + s) σ²), from the `product` over σ², averaged over particles.

    The product is σ times the gradient, with respect to σ, of ℓ̄ less its surrogate. `precision` is 1/σ². Without a
    surrogate h and ḡ are 0.
    """
    if settings.preconditioner == "posterior":
        return product * precision
    return hessian + product * precision / (1 + echo(count, settings, hessian.dtype))


def averaged_hessian(hessian: Array, estimate: Array, prior: Prior, settings: Settings, count: Array) -> Array:
    """h ← β₂ h + (1 − β₂) ĥ, and what keeps h + δ positive.

    The published recursion always adds (1 − β₂)² (h − ĥ)² / (2 (h + δ)), a Riemannian step that can never leave the
    domain, at the price of a bias upwards by (1 − β₂) Var(ĥ) / (2 (h + δ)) in the long run. The other takes the
    straight step wherever that keeps half of the precision, and half of it elsewhere. An average with a long memory
    would be long in learning that h₀ is far too small, with draws too wide to learn from: in the first `START` steps,
    h ← h + max(mean(ĥ − h)/n, h₀ − mean(h)), by which the mean of h over the part is that of n ĥ so far, if over h₀.
    """
    steps = 2 if settings.paired else 1  # of one ĥ
    forgotten = 1 - settings.beta2**steps
    straight = hessian + forgotten * (estimate - hessian)
    if settings.preconditioner == "posterior":
        return straight + 0.5 * (forgotten * (hessian - estimate)) ** 2 / (hessian + prior.precision)

    def shift() -> Array:
        mean = hessian.mean()
        number = -(-count // steps)
        least = jnp.mean(jnp.asarray(start_of(prior, settings), mean.dtype)) - mean
        return jnp.maximum((estimate.mean() - mean) / number.astype(mean.dtype), least)

    straight += jax.lax.cond(count <= START, shift, lambda: jnp.zeros((), hessian.dtype))
    return jnp.maximum(straight, 0.5 * (hessian - prior.precision))


def step(
    state: State,
    gradient: Mapping[str, Array],
    estimate: Mapping[str, Array],
    usable: Array,
    estimated: Array,
    priors: Mapping[str, Prior],
    learning_rate: Array | float,
    settings: Settings,
) -> State:
    """One step of every site from ĝ = `gradient` and ĥ = `estimate`, of the part of ℓ̄ that the priors are not.

    Where they are not `usable`, everything stays as it is, and h where it is not `estimated`, as in the first step of a
    pair. Site after site, and h before m before ḡ: each is written over when nobody is going to read it (`there`).
    """
    count, ready = state.count + 1, usable
    loc, momentum, hessian, second_moment = dict(state.loc), dict(state.momentum), dict(state.hessian), {}
    for name, prior in priors.items():
        m, h, g_average = loc[name], hessian[name], momentum[name]
        h_estimate = jnp.where(ready, estimate[name], h)
        averaged = averaged_hessian(h, h_estimate, prior, settings, count)
        hessian[name] = jnp.where(ready & estimated, averaged, h)
        ready &= there(hessian[name])

        g, dtype = jnp.where(ready, gradient[name], 0), m.dtype
        pull = prior.precision * (m - prior.loc)
        momentum[name] = average(g_average, g, settings.beta1)
        if settings.preconditioner == "posterior":
            ascent = momentum[name] / debias(settings.beta1, count, dtype) + pull
            unit, root = start_of(prior, settings) + prior.precision, hessian[name] + prior.precision
        else:
            moments = tuple(
                average(old, new, settings.beta3)
                for old, new in zip(state.second_moment[name], means((g + pull) ** 2), strict=True)
            )
            second_moment[name] = select(usable, moments, state.second_moment[name])
            ahead = settings.beta1 * momentum[name] / debias(settings.beta1, count + 1, dtype)
            ascent = ahead + (1 - settings.beta1) * g / debias(settings.beta1, count, dtype) + pull
            unit = unit_of(prior, settings.num_data)
            roots = roots_of(moments, debias(settings.beta3, count, dtype))
            root = math.prod(roots, start=jnp.ones((), dtype)).reshape(m.shape)
        direction = unit * jnp.clip(ascent / root, -settings.clip_radius, settings.clip_radius)
        loc[name] = jnp.where(ready, (m - learning_rate * direction).astype(dtype), m)
        ready &= there(loc[name])
        momentum[name] = jnp.where(ready, momentum[name], g_average)
        ready &= there(momentum[name])
    count = jnp.where(usable, count, state.count)
    return replace(state, count=count, loc=loc, momentum=momentum, hessian=hessian, second_moment=second_moment)


def there(value: Array) -> Array:
    """Whether the first element of `value` is a number. It is; but what depends on that is computed after `value`.

    XLA on its own computes what it can as early as it can, holds all of it at once, and keeps a copy of what would be
    written over too early. `jax.lax.optimization_barrier` is gone by the time it decides.
    """
    first = value.ravel()[0]
    return first == first


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of an array seen as a matrix: its axes are parted where the two sides are most alike."""
    parts = [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape))]
    return min(parts, key=lambda part: max(part))


def means(squares: Array) -> tuple[Array, ...]:
    """The means over columns, [rows, 1], and over rows, [1, columns]; of a vector, the vector."""
    if squares.ndim < 2:
        return (squares,)
    matrix = squares.reshape(matrix_shape(squares.shape))
    return matrix.mean(1, keepdims=True), matrix.mean(0, keepdims=True)


def roots_of(factors: Sequence[Array], known: Array) -> list[Array]:
    """√(R / mean(R)) and √C, whose product is √v, of averages that are `known` times what they are of."""
    if len(factors) == 1:
        squares = [factors[0] / known]
    else:
        rows, columns = factors
        squares = [rows / jnp.maximum(rows.mean(), jnp.finfo(rows.dtype).tiny), columns / known]
    return [jnp.maximum(jnp.sqrt(square), TINY) for square in squares]


def average(old: Array, new: Array, memory: float) -> Array:
    return memory * old + (1 - memory) * new


def debias(memory: float, count: Array, dtype: jnp.dtype) -> Array:
    """1 − βᵗ: how much of an average that began at zero is data."""
    return 1 - jnp.asarray(memory, dtype) ** count.astype(dtype)


def unit_of(prior: Prior, num_data: float) -> Array:
    """u = s min(1, √n s), s = min(s₀, 0.3), s₀ = 1/√(N δ), or ∞ where the prior is not known."""
    scale = jnp.minimum(1 / jnp.sqrt(num_data * prior.precision), WIDEST)
    return scale * jnp.minimum(1, math.sqrt(WIDE) * scale)


def kl_divergence(loc: Array, precision: Array, prior: Prior, num_data: float) -> Array:
    """KL(q ‖ prior) = ½ Σ (σ² + (m − m₀)²) N δ + log(1/σ² / (N δ)) − 1; −H(q) where the prior is not known.

    Of 1/σ², which is what h gives: its root and what follows from that would take as long again.
    """
    known = num_data * prior.precision > 0
    scaled = jnp.where(known, num_data * prior.precision, 1.0)
    expected = jnp.where(known, scaled * (1 / precision + (loc - prior.loc) ** 2), -jnp.log(2 * jnp.pi))
    return 0.5 * jnp.sum(expected + jnp.log(precision / scaled) - 1)
