"""Bayes' rule as addition: what each factor or each datum contributes to the natural parameters of a fitted guide.

At the fixed point of the Bayesian learning rule, λ = Σ_f ∇_μ E_q[log p_f(z)] / τ, over the factors f of the model, the
prior's among them, and with the temperature τ, 1 for Bayes. Each summand is the natural parameter of a conjugate
stand-in for its factor, exact where the model is conjugate: what is taken away from λ forgets the factor, what is added
learns it, and posteriors fitted on disjoint data merge as λ₀ + Σ_k (λ_k − λ₀).

The summands are the derivatives of ∇_μ E_q[log p] with respect to weights on the factors, in which it is linear.

Source: Khan & Rue 2023, section 2; Khan 2025, arXiv 2509.15641; Nickl, Xu, Tailor, Möllenhoff & Khan 2023, "The
Memory-Perturbation Equation", for leaving data out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from numpyro import handlers
from numpyro.infer import SVI

from ..families import Block, MultivariateNormalNatural, Natural, NormalNatural
from ..gradients import Draws, Extras, hessian
from . import _svi, _sweep
from ._layout import gather, gather_members

__all__ = ["merge", "site_contributions"]

SECANTS = (
    "contributions are made of Hessians, which do not know the curvature of a log density with kinks, or that bends in "
    "narrow places, here taken from secants. Fit without the datum or the factor, and subtract."
)
LOW_RANK = (
    "contributions are natural parameters, and the low-rank site has none: its Gaussians are no exponential family. "
    "Use AutoMultivariateNormal (full rank) or AutoNormal (mean field)."
)


def site_contributions(
    svi: SVI, state: Any, *args: Any, plate: str | None = None, num_draws: int = 256, **kwargs: Any
) -> dict[str, dict[str, Natural]]:
    """∇_{μ_s} E_q[log p_f] / τ for every site s of the guide and every factor f of the model.

    Args:
        state: the SVI state of a fit with `BLR`, for example `svi.run(...).state`.
        args, kwargs: the model's arguments.
        plate: split by the rows of this plate instead of by the model's sites; the contributions of the rows come as a
            batch with the rows in front, under the plate's name, and those of everything outside as `"rest"`.
        num_draws: antithetic draws for sites that are not conjugate, whose expectations are not exact.

    Returns:
        by site of the guide and by factor, natural parameters that sum to those of the fitted site where the fit has
        converged: exactly if the model is conjugate, within Monte Carlo error elsewhere.

    Raises:
        ValueError: the model has no plate of that name, or it is subsampled, or its curvature is that of secants;
            `num_draws` is not even and positive.
        TypeError: the optimizer of `svi` is not `BLR`, or the state is not its.
    """
    from .blr import BLR, OptState  # the rule's state and temperature are all that is known of the rule

    if not isinstance(svi.optim, BLR):
        raise TypeError(f"contributions are those of a fit with BLR; svi has the optimizer {type(svi.optim).__name__}.")
    _, opt_state = _svi.checked_state(state.optim_state, OptState)
    if num_draws < 2 or num_draws % 2:
        raise ValueError(f"num_draws must be even and at least 2, got {num_draws}: draws come in antithetic pairs.")
    if opt_state.secants:
        raise ValueError(SECANTS)
    if any(block.structure == "low rank" for block in opt_state.layout.blocks):
        raise ValueError(LOW_RANK)
    names, sizes = _factors(svi, args, kwargs)
    if plate is None:
        weights = {name: jnp.ones(()) for name in names}
    elif plate in sizes:
        weights = {plate: jnp.ones(sizes[plate])}
    else:
        raise ValueError(f"the model has no plate '{plate}'; its plates are {', '.join(map(repr, sizes)) or 'none'}.")

    targets = _targets(svi, opt_state, args, kwargs, num_draws, by_plate=plate is not None)
    total = jax.jit(targets)(weights)
    size = sum(leaf.size for leaf in jax.tree.leaves(total))
    split = jax.jacrev if plate is not None and size < sizes[plate] else jax.jacfwd
    slopes = jax.jit(split(targets))(weights)
    result: dict[str, dict[str, Natural]] = {}
    for site, natural in total.items():
        by_factor = _by_factor(natural, slopes[site])
        if plate is not None:
            by_factor[plate] = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, -1, 0), by_factor[plate])
            by_factor["rest"] = natural - jax.tree.map(lambda leaf: leaf.sum(0), by_factor[plate])
        result[site] = by_factor
    return result


def merge(prior: Natural, posteriors: Iterable[Natural]) -> Natural:
    """λ₀ + Σ_k (λ_k − λ₀): the posterior from posteriors fitted on disjoint data under the same prior."""
    merged = prior
    for posterior in posteriors:
        merged = merged + (posterior - prior)
    return merged


def _factors(svi: SVI, args: tuple, kwargs: Mapping[str, Any]) -> tuple[list[str], dict[str, int]]:
    """The model's sample sites, and its plates with their sizes."""
    with handlers.block():
        trace = handlers.trace(handlers.seed(svi.model, 0)).get_trace(*args, **kwargs, **svi.static_kwargs)
    sizes = {}
    for name, site in trace.items():
        if site["type"] == "plate":
            size, subsample_size = site["args"]
            if subsample_size is not None and subsample_size < size:
                raise ValueError(
                    f"contributions need all rows, and the plate '{name}' is subsampled ({subsample_size} of {size}). "
                    "Pass arguments with which the model sees all its data."
                )
            sizes[name] = size
    return [name for name, site in trace.items() if site["type"] == "sample"], sizes


def _targets(svi: SVI, opt_state: Any, args: tuple, kwargs: Any, num_draws: int, by_plate: bool) -> Any:
    """weights of factors -> ∇_μ E_q[log p] / τ of every site, linear in the weights."""
    layout, params, roles = opt_state.layout, opt_state.params, opt_state.roles
    objective = _svi.objective_of(_svi.loss_of(svi, args, kwargs), layout, params)
    others = {name: params[name] for name in layout.others}
    loc, scales = gather(layout, params)
    naturals = gather_members(layout, params)
    exact = not layout.sites and all(role.kind != "drawn" for role in roles)
    number = jnp.zeros(1, int) if exact else jnp.tile(jnp.arange(num_draws // 2), 2)
    sign = jnp.ones(1) if exact else jnp.repeat(jnp.array([1.0, -1.0], loc.dtype), num_draws // 2)
    design = _sweep.design_of(roles, naturals, len(number))
    rng_key = jax.random.key(2)
    keys = _sweep.keys_of(roles, rng_key)
    members = _sweep.place(naturals, roles, design, rng_key)
    draws = Draws(number[design.draw], sign[design.draw], None)

    def targets(weights: dict[str, Array]) -> dict[str, Natural]:
        given = {"weights": {**members.weights, **spread(weights)}} if by_plate else {"factors": spread(weights)}
        weighed = members._replace(**given)

        def loss_at(loc: Array, draw: Draws) -> tuple[Array, Extras]:
            return objective(loc, scales, others, draw)

        def evaluate(members: _svi.Members, others: Any) -> tuple[Array, Extras]:
            return jax.vmap(loss_at, (None, 0))(loc, draws._replace(members=members))

        result = {}
        for role in roles:
            natural, values = naturals[role.name], members.values[role.name]
            slopes = _sweep.slopes_of(role, natural, evaluate, weighed, others)[2]
            result[role.name] = _sweep.natural_gradient(role, natural, design, values, slopes, keys[role.name])
        if layout.sites:
            runs = draws._replace(members=weighed)
            estimate = hessian(objective, loc, scales, others, runs, layout.blocks)
            for site in (site for site in layout.sites if not site.bare):
                result[site.name] = _gaussian(site.block, loc, estimate.gradient, estimate.hessian)
        return {name: -natural / svi.optim.temperature for name, natural in result.items()}

    def spread(weights: dict[str, Array]) -> dict[str, Array]:
        """The same weights in every run."""
        return {name: jnp.broadcast_to(weight, (len(design.draw), *weight.shape)) for name, weight in weights.items()}

    return targets


def _gaussian(block: Block, loc: Array, gradient: Array, hessian: Array) -> Natural:
    """∇_μ E_q[ℓ] = (E[g] − E[H] m, E[H]/2) of a block's own Gaussian."""
    rows = slice(block.start, block.stop)
    mean, slope, matrix = loc[rows], gradient[rows], hessian[rows, rows]
    if block.structure != "dense":
        diagonal = jnp.diagonal(matrix)
        parts = (slope - diagonal * mean, diagonal / 2)
        return NormalNatural(*(part.reshape(block.shape) for part in parts))
    size = block.shape[-1]
    blocks = jnp.stack([matrix[i : i + size, i : i + size] for i in range(0, block.size, size)])
    mean, slope = mean.reshape(-1, size), slope.reshape(-1, size)
    linear = slope - jnp.squeeze(blocks @ mean[..., None], -1)
    return MultivariateNormalNatural(linear.reshape(block.shape), (blocks / 2).reshape(*block.shape, size))


def _by_factor(natural: Natural, slopes: Any) -> dict[str, Natural]:
    """From a natural parameter whose leaves are dictionaries by factor to the dictionary of natural parameters."""
    leaves = vars(slopes)
    names = next(iter(leaves.values()))
    return {name: type(natural)(*(leaf[name] for leaf in leaves.values())) for name in names}
