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

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from ..families import Block, MultivariateNormalNatural, Natural, NormalNatural
from ..gradients import Draws, Extras, each_draw
from . import _svi, _sweep
from ._layout import gather, gather_members, undisturbed

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
    svi: SVI, *args: Any, plate: str | None = None, num_draws: int = 256, **kwargs: Any
) -> dict[str, dict[str, Natural]]:
    """∇_{μ_s} E_q[log p_f] / τ for every site s of the guide and every factor f of the model.

    Args:
        svi: after a fit with `BLR`.
        args, kwargs: the model's arguments.
        plate: split by the rows of this plate instead of by the model's sites; the contributions of the rows come as a
            batch with the rows in front, under the plate's name, and those of everything outside as `"rest"`.
        num_draws: antithetic draws for sites that are not conjugate, whose expectations are not exact.

    Returns:
        by site of the guide and by factor, natural parameters that sum to those of the fitted site where the fit has
        converged: exactly if the model is conjugate, within Monte Carlo error elsewhere.

    Raises:
        ValueError: the model has no plate of that name, or it is subsampled, or its curvature is that of secants, or it
            has no second derivative; `num_draws` is not even and positive.
        TypeError: the optimizer of `svi` is not `BLR`, or has taken no step.
    """
    from .blr import OptState  # the rule's state and temperature are all that is known of the rule

    opt_state = getattr(svi.optim, "state", None)
    if not isinstance(opt_state, OptState):
        raise TypeError(
            f"contributions are those of a fit with BLR; the optimizer {type(svi.optim).__name__} has no state of its "
            "steps. Take steps of `SVI(model, guide, BLR(), loss)` first."
        )
    if num_draws < 2 or num_draws % 2:
        raise ValueError(f"num_draws must be even and at least 2, got {num_draws}: draws come in antithetic pairs.")
    if opt_state.secants:
        raise ValueError(SECANTS)
    if any(block.structure == "low rank" for block in opt_state.layout.blocks):
        raise ValueError(LOW_RANK)
    if opt_state.differences:
        raise ValueError(
            "contributions are derivatives of the model's second derivatives, and it has an operation whose gradient "
            "has no derivative. Write that in operations of torch, or fit without the datum or the factor and subtract."
        )
    names, sizes = _factors(svi, args, kwargs)
    like = next(iter(opt_state.layout.tensors.values()))
    if plate is None:
        weights = {name: like.new_ones(()) for name in names}
    elif plate in sizes:
        weights = {plate: like.new_ones(sizes[plate])}
    else:
        raise ValueError(f"the model has no plate '{plate}'; its plates are {', '.join(map(repr, sizes)) or 'none'}.")

    totals = _targets(svi, opt_state, args, kwargs, num_draws, plate, weights)
    result: dict[str, dict[str, Natural]] = {}
    for site, (natural, by_weight) in totals.items():
        by_factor = dict(zip(names, _rows(by_weight), strict=True)) if plate is None else {plate: by_weight}
        if plate is not None:
            by_factor["rest"] = natural - _each_leaf(lambda leaf: leaf.sum(0), by_weight)
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
    with undisturbed(0), poutine.block(), torch.no_grad():
        trace: Any = poutine.trace(svi.model).get_trace(*args, **kwargs)
    names, sizes = [], {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or isinstance(site["fn"], _Subsample) or site["infer"].get("_deterministic"):
            continue
        names.append(name)
        for frame in site["cond_indep_stack"]:
            if not frame.vectorized:
                continue
            if frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"contributions need all rows, and the plate '{frame.name}' is subsampled ({frame.size} of "
                    f"{frame.full_size}). Pass arguments with which the model sees all its data."
                )
            sizes[frame.name] = frame.size
    return names, sizes


def _targets(
    svi: SVI, opt_state: Any, args: tuple, kwargs: Any, num_draws: int, plate: str | None, weights: dict[str, Tensor]
) -> dict[str, tuple[Natural, Natural]]:
    """∇_μ E_q[log p] / τ of every site, and its derivatives with respect to the weights, a batch [W, ...]."""
    layout, roles = opt_state.layout, opt_state.roles
    loc, scales = gather(layout)
    naturals = gather_members(layout)
    exact = not layout.sites and all(role.kind != "drawn" for role in roles)
    number = [0] if exact else 2 * list(range(num_draws // 2))
    sign = [1.0] if exact else [1.0] * (num_draws // 2) + [-1.0] * (num_draws // 2)
    design = _sweep.design_of(roles, naturals, len(number))
    seed = 2
    seeds = _sweep.seeds_of(roles, seed)
    objective = _svi.objective_of(svi, args, kwargs, layout, seed)
    members = _sweep.place(naturals, roles, design, seed)
    draws = Draws([number[draw] for draw in design.draw], [sign[draw] for draw in design.draw], None)
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    flat = tuple(weights.values())
    if plate is None:
        members = members._replace(factors=weights)
    else:
        rows = weights[plate].expand(len(design.draw), -1)  # the same in every run
        members = members._replace(weights={**members.weights, plate: rows})

    def loss_at(loc: Tensor, draw: Draws) -> tuple[Tensor, Extras]:
        return objective(loc, scales, None, draw)

    def evaluate(members: _svi.Members, others: Any) -> tuple[Tensor, Extras]:
        each = each_draw(draws._replace(members=members.each(len(design.draw))))
        losses, extras = zip(*(loss_at(loc, draw) for draw in each), strict=True)
        return torch.stack(losses), extras[0]

    result, factor = {}, -1 / svi.optim.temperature
    for role in roles:
        natural, values = naturals[role.name], members.values[role.name]
        slopes = _sweep.slopes_of(role, natural, evaluate, members, None)[2]
        with torch.enable_grad():
            target = factor * _sweep.natural_gradient(role, natural, design, values, slopes, seeds[role.name])
        result[role.name] = _each_leaf(Tensor.detach, target), _by_weight(target, flat)
    if layout.sites:
        each = each_draw(draws._replace(members=members.each(len(design.draw))))
        moments = zip(*(_moments(loss_at, loc, draw, flat) for draw in each), strict=True)
        gradient, hessian, gradients, hessians = (torch.stack(moment).mean(0) for moment in moments)
        for site in layout.sites:
            total = factor * _gaussian(site.block, loc, gradient, hessian)
            each_factor = [factor * _gaussian(site.block, loc, g, h) for g, h in zip(gradients, hessians, strict=True)]
            result[site.name] = total, _stacked(each_factor)
    return result


def _moments(
    loss_at: Callable[[Tensor, Draws], tuple[Tensor, Extras]], loc: Tensor, draw: Draws, weights: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∇ℓ and ∇²ℓ of one draw, and their derivatives with respect to the W weights, [W, D] and [W, D, D]."""
    with torch.enable_grad():
        location = loc.detach().requires_grad_()
        value, _ = loss_at(location, draw)
        (gradient,) = torch.autograd.grad(value, location, create_graph=True, materialize_grads=True)
        hessian = _jacobian(gradient, (location,), create_graph=True)
        num_weights, size = sum(weight.numel() for weight in weights), len(loc)
        if num_weights < size:  # of each factor its own gradient and Hessian
            by_factor = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
            factors = torch.cat([slope.reshape(-1) for slope in by_factor])
            gradients = _jacobian(factors, (location,), create_graph=True)
            hessians = _jacobian(gradients.reshape(-1), (location,)).reshape(num_weights, size, size)
        else:
            gradients = _jacobian(gradient, weights).T
            hessians = _jacobian(hessian.reshape(-1), weights).T.reshape(num_weights, size, size)
    return gradient.detach(), hessian.detach(), gradients.detach(), hessians.detach()


def _jacobian(
    outputs: Tensor, inputs: tuple[Tensor, ...], create_graph: bool = False, num_at_once: int = 256
) -> Tensor:
    """∂outputs/∂inputs, [numel of outputs, numel of inputs], a vectorised backward pass for many outputs at a time."""
    if not outputs.requires_grad:
        return outputs.new_zeros(len(outputs), sum(given.numel() for given in inputs))
    rows = []
    for part in outputs.split(num_at_once):
        identity = torch.eye(len(part), dtype=outputs.dtype, device=outputs.device)
        slopes = torch.autograd.grad(
            part,
            inputs,
            identity,
            retain_graph=True,
            create_graph=create_graph,
            is_grads_batched=True,
            materialize_grads=True,
        )
        rows.append(torch.cat([slope.reshape(len(part), -1) for slope in slopes], -1))
    return torch.cat(rows)


def _by_weight(natural: Natural, weights: tuple[Tensor, ...]) -> Natural:
    """The derivatives of natural parameters with respect to the W weights, with W in front."""
    slopes = []
    for leaf in vars(natural).values():
        jacobian = _jacobian(leaf.reshape(-1), weights)
        slopes.append(jacobian.T.reshape(-1, *leaf.shape).detach())
    return type(natural)(*slopes)


def _gaussian(block: Block, loc: Tensor, gradient: Tensor, hessian: Tensor) -> Any:
    """∇_μ E_q[ℓ] = (E[g] − E[H] m, E[H]/2) of a block's own Gaussian."""
    rows = slice(block.start, block.stop)
    mean, slope, matrix = loc[rows], gradient[rows], hessian[rows, rows]
    if block.structure != "dense":
        diagonal = matrix.diagonal()
        parts = (slope - diagonal * mean, diagonal / 2)
        return NormalNatural(*(part.reshape(block.shape) for part in parts))
    size = block.shape[-1]
    blocks = torch.stack([matrix[i : i + size, i : i + size] for i in range(0, block.size, size)])
    mean, slope = mean.reshape(-1, size), slope.reshape(-1, size)
    linear = slope - (blocks @ mean[..., None]).squeeze(-1)
    return MultivariateNormalNatural(linear.reshape(block.shape), (blocks / 2).reshape(*block.shape, size))


def _each_leaf(fn: Callable[[Tensor], Tensor], natural: Any) -> Any:
    return type(natural)(*map(fn, vars(natural).values()))


def _rows(natural: Natural) -> list[Natural]:
    """The natural parameters of a batch, one by one along its first axis."""
    return [type(natural)(*leaves) for leaves in zip(*(leaf.unbind() for leaf in vars(natural).values()), strict=True)]


def _stacked(naturals: list[Natural]) -> Any:
    leaves = zip(*(vars(natural).values() for natural in naturals), strict=True)
    return type(naturals[0])(*map(torch.stack, leaves))
