"""The mathematics in plain NumPy, written from the definitions: slow, obvious, and independent of both packages.

Matrices are formed, inverted and decomposed as the equations say; no triangular solves, no batching, no autodiff. The
derivatives of the problems in `cases.py` are written by hand. A `part` is a block of coordinates (`cases.Part`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg

# ---------------------------------------------------------------------------------------------------------------------
# The Gaussian's coordinates


def natural_of(loc: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """λ = (S m, −S/2)."""
    precision = np.linalg.inv(covariance)
    return precision @ loc, -precision / 2


def moments_of_natural(natural: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(m, Σ) of λ."""
    linear, quadratic = natural
    covariance = np.linalg.inv(-2 * quadratic)
    return covariance @ linear, covariance


def expectation_of(loc: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """μ = E_q[T(z)] = (m, Σ + m mᵀ) of the sufficient statistics T(z) = (z, z zᵀ)."""
    return loc, covariance + np.outer(loc, loc)


def natural_gradient(loc: np.ndarray, gradient: np.ndarray, hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """∇_μ E_q[ℓ] from E_q[g] (Bonnet) and E_q[H] (Price): the chain rule through Σ = μ₂ − μ₁ μ₁ᵀ."""
    return gradient - hessian @ loc, hessian / 2


def natural_step(natural: tuple, gradient: tuple, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """λ ← (1 − ρ) λ − ρ ∇_μ E_q[ℓ]."""
    return tuple((1 - rate) * value - rate * slope for value, slope in zip(natural, gradient, strict=True))


def moment_step(
    loc: np.ndarray, precision: np.ndarray, gradient: np.ndarray, hessian: np.ndarray, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same in (m, S): S ← (1 − ρ) S + ρ E[H], m ← m − ρ S_new⁻¹ E[g]."""
    precision = (1 - rate) * precision + rate * hessian
    return loc - rate * np.linalg.inv(precision) @ gradient, precision


def expectation(fn: Callable[[np.ndarray], np.ndarray], loc: np.ndarray, covariance: np.ndarray, num_nodes: int = 24):
    """E_q[fn(z)] by a tensor product of Gauss-Hermite rules."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    factor = np.linalg.cholesky(covariance)
    grid = np.stack(np.meshgrid(*[nodes] * len(loc), indexing="ij"), -1).reshape(-1, len(loc))
    mass = np.stack(np.meshgrid(*[weights / weights.sum()] * len(loc), indexing="ij"), -1).reshape(-1, len(loc))
    return sum(w * fn(loc + factor @ node) for w, node in zip(mass.prod(-1), grid, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Posteriors


def linear_gaussian(rows: np.ndarray, targets: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, Σ) of p(z) ∝ Π_i N(targets_i | rows_iᵀ z, scales_i): least squares on all factors, the prior's among them.

    By QR of the whitened rows with columns brought to length one, which loses no digits to the units of z.
    """
    whitened = rows / scales[:, None]
    units = np.linalg.norm(whitened, axis=0)
    orthogonal, upper = np.linalg.qr(whitened / units)
    loc = scipy.linalg.solve_triangular(upper, orthogonal.T @ (targets / scales)) / units
    root = scipy.linalg.solve_triangular(upper, np.eye(len(units))) / units[:, None]
    return loc, root @ root.T


def best_in_structure(covariance: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Covariance of the best Gaussian that is independent between `groups`: each group keeps its own block of S."""
    precision = np.linalg.inv(covariance)
    best = np.zeros_like(covariance)
    for group in groups:
        best[np.ix_(group, group)] = np.linalg.inv(precision[np.ix_(group, group)])
    return best


# ---------------------------------------------------------------------------------------------------------------------
# The safe step


def safe_precision(precision: np.ndarray, hessian: np.ndarray, rate: float) -> np.ndarray:
    """(1 − ρ) S + ρ H, or the same with the curvature of H relative to S corrected by `safe_blend`."""
    curvature, vectors = scipy.linalg.eigh(hessian, precision)  # H v = w S v, vᵀ S v = 1
    if is_safe(curvature, rate):
        return (1 - rate) * precision + rate * hessian
    duals = precision @ vectors
    return (duals * safe_blend(curvature, rate)) @ duals.T


def is_safe(curvature: np.ndarray, rate: float) -> bool:
    """Whether 1 blended with w keeps more than half of 1 − ρ everywhere, as it does for every w ≥ 0."""
    return bool(((1 - rate) + rate * curvature > (1 - rate) / 2).all())


def safe_blend(curvature: np.ndarray, rate: float) -> np.ndarray:
    """Otherwise w becomes |w|, and the blend at least 1/4 where w is not positive, beyond rounding."""
    if is_safe(curvature, rate):
        return (1 - rate) + rate * curvature
    blended = (1 - rate) + rate * np.abs(curvature)
    positive = curvature > 1e-15 * np.abs(curvature).max()
    return np.where(positive, blended, np.maximum(blended, 0.25))


def safe_diagonal(precision: np.ndarray, hessian: np.ndarray, rate: float | np.ndarray) -> np.ndarray:
    """The same, a coordinate at a time: each is a problem of dimension one, with a rate of its own if they differ."""
    triples = zip(precision, hessian, np.broadcast_to(rate, precision.shape), strict=True)
    return np.array([safe_precision(np.array([[s]]), np.array([[h]]), float(r)).item() for s, h, r in triples])


# ---------------------------------------------------------------------------------------------------------------------
# The rule, on given noise


@dataclass(frozen=True)
class State:
    """The names are those of the packages; `precision` is a matrix, or a vector for a diagonal one."""

    loc: np.ndarray
    precision: np.ndarray
    rate: float = 1.0
    taken: float = math.nan
    noisy_steps: float = 0.0
    rejected: int = 0
    last_gradient: np.ndarray | None = None  # zero before the first step
    radius: float = 1.0
    skipped: int = 0
    num_averaged: np.ndarray | None = None  # zero before the first step


@dataclass(frozen=True)
class Events:
    """What happened in a step, so that a test can tell that it exercised something."""

    tries: int
    reflected: bool
    inside_noise: bool
    accepted: bool
    turned: bool = False  # the mean, by conjugate gradients


@dataclass(frozen=True)
class Estimate:
    losses: np.ndarray
    pair_gradients: np.ndarray
    hessian: np.ndarray
    whole: np.ndarray | None = None  # E_q[H], where `hessian` is an estimate of its diagonal,
    hessian_variance: np.ndarray | None = None  # with this variance

    @property
    def gradient(self) -> np.ndarray:
        return self.pair_gradients.mean(0)


def as_matrix(precision: np.ndarray) -> np.ndarray:
    return np.diag(precision) if precision.ndim == 1 else precision


def factor_of(precision: np.ndarray, parts: Sequence, fixed_scale: float, radius: float = 1.0) -> np.ndarray:
    """C [D, D] with z = m + C ε, each part having the structure that its guide gives it; learned ones within radius."""
    matrix = as_matrix(precision)
    factor = np.zeros_like(matrix)
    for part in parts:
        for group in part.groups:
            at = np.ix_(group, group)
            if part.structure in ("diagonal", "dense"):
                factor[at] = radius * np.linalg.cholesky(np.linalg.inv(matrix[at]))
            elif part.structure == "fixed":
                factor[at] = fixed_scale * np.eye(len(group))
    return factor


def log_determinant(factor: np.ndarray, parts: Sequence) -> float:
    """log |C| over the parts whose scale is learned."""
    learned = [i for part in parts if part.structure in ("diagonal", "dense") for group in part.groups for i in group]
    return np.log(np.diagonal(factor)[learned]).sum()


def losses_at(problem, loc: np.ndarray, factor: np.ndarray, parts: Sequence, noise: np.ndarray) -> np.ndarray:
    """ℓ(m + C ε) − log |C| at each ε."""
    return np.array([problem.value(loc + factor @ eps) for eps in noise]) - log_determinant(factor, parts)


UNKNOWN_SCALE = 0.1  # of a point, and of a coordinate whose covariance is not learned


def second_order(problem, loc, factor, parts, noise, probes=None) -> Estimate:
    """Averages over ±ε of g and of H, or of Σ_p u_p ⊙ H (σ u_p) / σ with σ = C 1 and `probes` u_p, [S, P, D]."""
    signed = np.concatenate([noise, -noise])
    points = [loc + factor @ eps for eps in signed]
    gradients = np.array([problem.gradient(z) for z in points])
    hessians = np.array([problem.hessian(z) for z in points])
    diagonals: dict = {}
    if probes is not None:
        sigma = factor.sum(1)
        for part in (part for part in parts if part.structure not in ("diagonal", "dense")):
            sigma[part.start : part.start + part.size] = UNKNOWN_SCALE
        products = [(u * ((sigma * u) @ hessian)).sum(0) for u, hessian in zip(probes, hessians, strict=True)]
        diagonals = {"whole": hessians.mean(0)}
        hessians = np.array(products) / sigma
        diagonals |= {"hessian_variance": hessians.var(0, ddof=1) / len(hessians)}
    pairs = (gradients[: len(noise)] + gradients[len(noise) :]) / 2
    return Estimate(losses_at(problem, loc, factor, parts, signed), pairs, hessians.mean(0), **diagonals)


def first_order(problem, loc, factor, parts, eps) -> Estimate:
    """H of each part from one gradient: with W = tril(Cᵀ g εᵀ), H = C⁻ᵀ (W + Wᵀ − diag W) C⁻¹."""
    gradient = problem.gradient(loc + factor @ eps)
    hessian = np.zeros_like(factor)
    for part in parts:
        for group in part.groups:
            at = np.ix_(group, group)
            whitened = np.tril(factor[at].T @ np.tril(np.outer(gradient[group], eps[group])))
            whitened = whitened + whitened.T - np.diag(np.diag(whitened))
            inverse = np.linalg.inv(factor[at])
            hessian[at] = inverse.T @ whitened @ inverse
    return Estimate(losses_at(problem, loc, factor, parts, eps[None]), gradient[None], hessian)


def step(
    state: State,
    problem,
    parts: Sequence,
    estimate_fn: Callable,
    rate: float | None,
    fixed_scale: float,
    draws: np.ndarray,
    minibatch: bool = False,
    newton: bool = False,
) -> tuple[State, Events]:
    """One step of the Bayesian learning rule; `rate=None` searches for the rate.

    Args:
        estimate_fn: (loc, factor) -> `Estimate`.
        draws: all ε of the step, [S, D], at which the search evaluates its proposals, with the scales of the start.
        minibatch: whether a gradient opposed to the last one counts as noise in any case, and not inside V alone.
        newton: whether the mean moves by conjugate gradients, and a diagonal S at a rate of its own.
    """
    diagonal = state.precision.ndim == 1
    factor = factor_of(state.precision, parts, fixed_scale, state.radius)
    estimate = estimate_fn(state.loc, factor)
    hessian = estimate.hessian
    if diagonal and hessian.ndim == 2:
        hessian = np.diagonal(hessian)

    radius = min(1.0, 2 * state.radius)

    direction, gains, num_averaged = None, 1.0, state.num_averaged
    if newton and not minibatch:
        direction = newton_direction(estimate.whole, estimate.gradient, safe_diagonal(state.precision, hessian, 1.0))
    if direction is not None:
        gains, num_averaged = gain(estimate, state.precision, parts, state.num_averaged)

    def propose(rate: float) -> tuple[np.ndarray, np.ndarray, bool]:
        safe = safe_diagonal if diagonal else safe_precision
        if direction is not None:
            return state.loc - rate * direction, safe(state.precision, hessian, np.minimum(rate, gains)), False
        precision = safe(state.precision, hessian, rate)
        reflected = not np.allclose(precision, (1 - rate) * state.precision + rate * hessian)
        return state.loc - rate * np.linalg.inv(as_matrix(precision)) @ estimate.gradient, precision, reflected

    if rate is not None:
        loc, precision, reflected = propose(rate)
        return replace(state, loc=loc, precision=precision, radius=radius), Events(1, reflected, False, True)

    covariance = np.linalg.inv(as_matrix(state.precision))
    natural = covariance @ estimate.gradient if direction is None else direction
    opposed = state.last_gradient is not None and bool(natural @ state.last_gradient < 0)
    inside = inside_noise(estimate, covariance)
    noisy, average = opposed and (inside or minibatch), np.zeros(len(estimate.gradient))
    if state.last_gradient is not None and state.last_gradient.any():
        now, before = (vector @ covariance @ vector for vector in (estimate.gradient, state.last_gradient))
        average = min(1.0, (now / before) ** 0.5) * state.last_gradient
    state = replace(state, last_gradient=0.9 * average + 0.1 * estimate.gradient)
    going_on = inside and not opposed and not minibatch
    noisy_steps = max(0.0, state.noisy_steps + noisy - 0.5 * going_on)
    first = tried = min(state.rate, 2 / (noisy_steps + 2))
    for tries in range(1, 9):
        loc, precision, reflected = propose(tried)
        most = estimate.gradient @ covariance @ estimate.gradient + len(loc)
        if not_worse(estimate.losses, losses_at(problem, loc, factor, parts, draws), most):
            next_rate = min(1.0, 1.7 * tried) if tries == 1 else tried
            state = replace(state, rate=next_rate, taken=tried, noisy_steps=noisy_steps, num_averaged=num_averaged)
            event = Events(tries, reflected, noisy, True, direction is not None)
            return replace(state, loc=loc, precision=precision, radius=radius), event
        tried *= 0.4
    rejected = replace(state, rate=0.4 * first, noisy_steps=noisy_steps, rejected=state.rejected + 1)
    return rejected, Events(tries, reflected, noisy, False, direction is not None)


def newton_direction(hessian: np.ndarray, gradient: np.ndarray, diagonal: np.ndarray) -> np.ndarray | None:
    """d of (0.9 H + 0.1 diag s) d = g to a tenth of g, in the norm of diag s; None where there is negative curvature.

    The best d in the span of S⁻¹ g and of what the matrix makes of it, one dimension after the other.
    """
    matrix = 0.9 * hessian + 0.1 * np.diag(diagonal)
    direction, basis = np.zeros_like(gradient), np.zeros((len(gradient), 0))
    for _ in range(30):
        residual = gradient - matrix @ direction
        if residual @ (residual / diagonal) <= 0.01 * gradient @ (gradient / diagonal):
            break
        basis = np.linalg.qr(np.column_stack([basis, residual / diagonal]))[0]
        reduced = basis.T @ matrix @ basis
        if np.linalg.eigvalsh(reduced).min() <= 0:
            return None
        direction = basis @ np.linalg.solve(reduced, basis.T @ gradient)
    return direction


def gain(estimate: Estimate, precision: np.ndarray, parts: Sequence, num_averaged: np.ndarray) -> tuple:
    """(γ, n) of each coordinate: 1 − noise/change² of its part, or, where less than half, 2 / (n + 2)."""
    gains, counts = np.ones_like(precision), np.array(num_averaged)
    for part in parts:
        here = slice(part.start, part.start + part.size)
        change = (((estimate.hessian - precision) / precision)[here] ** 2).sum()
        noise = (estimate.hessian_variance / precision**2)[here].sum()
        counts[here] = 0 if change > 2 * noise else counts[here] + 1
        gains[here] = 1 - noise / change if change > 2 * noise else 2 / (counts[here] + 2)
    return gains, counts


def inside_noise(estimate: Estimate, covariance: np.ndarray) -> bool:
    """r² < 2 V with r² = gᵀ S⁻¹ g, V the variance of the mean of g over pairs in the same norm."""
    deviations = estimate.pair_gradients - estimate.gradient
    num_pairs = len(deviations)
    variance = sum(d @ covariance @ d for d in deviations) / (num_pairs - 1) / num_pairs
    return bool(estimate.gradient @ covariance @ estimate.gradient < 2 * variance)


def not_worse(before: np.ndarray, after: np.ndarray, most: float) -> bool:
    """Whether the mean paired difference is at most its standard error, or `most`, plus 64 units of rounding."""
    num_pairs = len(before) // 2
    change = ((after - before)[:num_pairs] + (after - before)[num_pairs:]) / 2
    standard_error = change.std(ddof=1) / num_pairs**0.5
    rounding = 64 * np.finfo(np.float64).eps * np.abs(before).mean()
    return bool(np.isfinite(after).all() and change.mean() <= min(standard_error, most) + rounding)


# ---------------------------------------------------------------------------------------------------------------------
# IVON, an array of weights at a time


@dataclass(frozen=True)
class IVONSettings:
    """Of the recursion; N and the memories by the names of the packages.

    `weight_decay` is δ, `prior_loc` m₀, each a number or an array like the weights. Temperature τ is N/ess.
    """

    num_data: float
    weight_decay: np.ndarray | float
    prior_loc: np.ndarray | float = 0.0
    temperature: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    beta3: float = 0.99
    hess_init: float = 0.1
    clip_radius: float = float("inf")
    paired: bool = False


@dataclass(frozen=True)
class Weights:
    """m, ḡ, h, and the averages over columns and rows of the squared gradient: the vector itself, and 1, for a vector.

    `count` is the number of steps so far.
    """

    loc: np.ndarray
    momentum: np.ndarray
    hessian: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    count: int = 0

    @staticmethod
    def at(loc: np.ndarray, hess_init: float) -> Weights:
        rows, columns = rows_and_columns(np.zeros_like(loc))
        return Weights(loc, np.zeros_like(loc), np.full_like(loc, hess_init), rows, columns)

    def scale(self, settings: IVONSettings) -> np.ndarray:
        """σ = 1/√(ess (h + δ))"""
        ess = settings.num_data / settings.temperature
        return 1 / np.sqrt(ess * (self.hessian + settings.weight_decay))


def kl_divergence(loc: np.ndarray, scale: np.ndarray, prior_loc: np.ndarray, prior_scale: np.ndarray) -> float:
    """KL(q ‖ p) of independent Normals."""
    ratio = (scale / prior_scale) ** 2
    return float(np.sum(ratio + ((loc - prior_loc) / prior_scale) ** 2 - 1 - np.log(ratio)) / 2)


def as_two_axes(array: np.ndarray) -> np.ndarray:
    """A matrix from an array of two or more axes, as square as a cut between two of them can make it."""
    cuts = [(int(np.prod(array.shape[:axis])), int(np.prod(array.shape[axis:]))) for axis in range(1, array.ndim)]
    return array.reshape(cuts[int(np.argmin([abs(rows - columns) for rows, columns in cuts]))])


def rows_and_columns(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if squares.ndim < 2:
        return squares, np.ones(1)
    matrix = as_two_axes(squares)
    return matrix.mean(axis=1), matrix.mean(axis=0)


def published_ivon(weights: Weights, draw: np.ndarray, gradient: np.ndarray, rate: float, s: IVONSettings) -> Weights:
    """Shen et al. 2024, Algorithm 1, as its authors' code has it, with the decay towards m₀.

    The rate is rescaled by h₀ + δ, ḡ is debiased and h is not, the direction is clipped before the rate.

    Args:
        draw, gradient: w, and ∇ℓ̄ at it.
    """
    offset, ess = draw - weights.loc, s.num_data / s.temperature
    estimate = gradient * offset * ess * (weights.hessian + s.weight_decay)
    momentum = s.beta1 * weights.momentum + (1 - s.beta1) * gradient
    hessian = (
        s.beta2 * weights.hessian
        + (1 - s.beta2) * estimate
        + 0.5 * (1 - s.beta2) ** 2 * (weights.hessian - estimate) ** 2 / (weights.hessian + s.weight_decay)
    )
    debiased = momentum / (1 - s.beta1 ** (weights.count + 1))
    ascent = (debiased + s.weight_decay * (weights.loc - s.prior_loc)) / (hessian + s.weight_decay)
    loc = weights.loc - rate * (s.hess_init + s.weight_decay) * np.clip(ascent, -s.clip_radius, s.clip_radius)
    return replace(weights, loc=loc, momentum=momentum, hessian=hessian, count=weights.count + 1)


def factored_estimate(weights: Weights, draw: np.ndarray, gradient: np.ndarray, s: IVONSettings) -> np.ndarray:
    """ĥ = ε (ĝ − ḡ)/((1 + s) σ) − h (ε² − 1), with the debiased ḡ of the steps before, and s that of a pair."""
    scale = weights.scale(s)
    noise = (draw - weights.loc) / scale
    debiased = 1 - s.beta1 ** max(weights.count, 1)
    echo = (1 - s.beta1) / debiased if s.paired else 0.0
    return noise * (gradient - weights.momentum / debiased) / (1 + echo) / scale - weights.hessian * (noise**2 - 1)


def factored_ivon(
    weights: Weights, gradient: np.ndarray, estimate: np.ndarray | None, rate: float, s: IVONSettings
) -> Weights:
    """The default recursion, from ĝ and ĥ, or none; a step has a unit of s = min(s₀, 0.3), √128 s² if that is less."""
    count = weights.count + 1
    momentum = s.beta1 * weights.momentum + (1 - s.beta1) * gradient
    hessian, steps = weights.hessian, 2 if s.paired else 1
    if estimate is not None:
        memory = s.beta2**steps
        straight, mean = memory * hessian + (1 - memory) * estimate, hessian.mean()
        if count <= 100:
            straight = straight + max((estimate.mean() - mean) / np.ceil(count / steps), s.hess_init - mean)
        hessian = np.maximum(straight, (hessian + s.weight_decay) / 2 - s.weight_decay)
    pull = s.weight_decay * (weights.loc - s.prior_loc)
    rows, columns = (
        s.beta3 * old + (1 - s.beta3) * new
        for old, new in zip((weights.rows, weights.columns), rows_and_columns((gradient + pull) ** 2), strict=True)
    )
    known = 1 - s.beta3**count
    if gradient.ndim < 2:
        root = np.maximum(np.sqrt(rows / known), 1e-8)
    else:
        of_rows, of_columns = (np.maximum(np.sqrt(x), 1e-8) for x in (rows / rows.mean(), columns / known))
        root = np.outer(of_rows, of_columns).reshape(gradient.shape)
    nesterov = (
        s.beta1 * momentum / (1 - s.beta1 ** (count + 1)) + (1 - s.beta1) * gradient / (1 - s.beta1**count) + pull
    )
    direction = nesterov / root
    decay = np.asarray(s.weight_decay)
    prior_scale = 1 / np.sqrt(s.num_data * np.where(decay > 0, decay, 1e-9))
    scale = np.minimum(prior_scale, 0.3)
    unit = np.minimum(scale, np.sqrt(128) * scale**2)
    return Weights(
        loc=weights.loc - rate * unit * np.clip(direction, -s.clip_radius, s.clip_radius),
        momentum=momentum,
        hessian=hessian,
        rows=rows,
        columns=columns,
        count=count,
    )
