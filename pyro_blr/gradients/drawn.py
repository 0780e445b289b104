"""∇_μ E_q[ℓ] of a site without conjugacy, from draws of q; each estimate is unbiased and linear in ℓ.

    path        z = g(λ; ε):    ∇_μ E_q[f] = F⁻¹ E[(∂z/∂λ)ᵀ ∇_z f]
    difference  z a count:      ∇_μ E_q[f] = E[v(z) (f(z + 1) − f(z))], with v = 1 for the Poisson distribution
    score       no sampler that can be differentiated:    ∇_μ E_q[f] = F⁻¹ E[(T(z) − μ) f]

With f = ℓ/w + log q in place of ℓ/w the entropy is estimated from the same draws, and the noise of a path gradient
vanishes where q is the posterior. A count's base measure is part of f.

Source: Khan & Rue 2023, section 2; Roeder, Wu & Duvenaud 2017, "Sticking the Landing"; Figurnov, Mohamed & Mnih 2018
for the derivatives of samplers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..families import Natural

__all__ = ["directions", "estimator_of", "natural_gradients", "samples", "seeded"]


def estimator_of(natural: Natural) -> str:
    """`"path"`, `"difference"` or `"score"`."""
    if natural.discrete:
        return "difference"
    return "path" if natural.to_distribution().has_rsample else "score"


def samples(natural: Natural, num_draws: int, seed: int) -> Tensor:
    """[S, *batch, *event]."""
    return _drawn(_repeated(natural, num_draws), seed)


def directions(natural: Natural, slopes: Tensor, weight: Tensor, seed: int) -> Natural:
    """−∇_μ L / w for each draw, [S, *batch], whose average is unbiased.

    Args:
        slopes: at each of the `samples`: ∇_z ℓ, ℓ(z + 1) − ℓ(z), or ℓ(z) of each cell, as the estimator takes it.
        weight: w of each cell, with which its entropy enters the loss.
    """
    values, repeated = samples(natural, len(slopes), seed), _repeated(natural, len(slopes))
    estimator = estimator_of(natural)
    if estimator == "difference":
        base = repeated.log_base_measure
        coefficient = natural_gradients(natural, slopes / weight + base(values + 1) - base(values), values, seed)
        return -coefficient - repeated
    if estimator == "score":
        return -natural_gradients(natural, slopes / weight + repeated.log_density(values), values, seed)
    with torch.enable_grad():
        point = values.detach().requires_grad_()
        (force,) = torch.autograd.grad(repeated.log_density(point).sum(), point, materialize_grads=True)
    force = force + slopes / weight.reshape((*weight.shape, *[1] * natural.value_rank))
    return -natural_gradients(natural, force, values, seed)


def natural_gradients(natural: Natural, slopes: Tensor, values: Tensor, seed: int) -> Natural:
    """∇_μ E_q[f] for each draw, [S, *batch]."""
    estimator, repeated = estimator_of(natural), _repeated(natural, len(slopes))
    if estimator == "difference":
        return repeated.match_difference(repeated.difference_weight(values) * slopes)
    if estimator == "score":
        against_the_others = (slopes - slopes.mean(0)) * len(slopes) / (len(slopes) - 1)
        away = repeated.sufficient_statistics(values) - repeated.to_expectation()
        return repeated.fisher_solve(away * against_the_others)

    with torch.enable_grad():
        leaves = tuple(leaf.clone().requires_grad_() for leaf in vars(repeated).values())
        paths = _drawn(type(natural)(*leaves), seed)
    pulled = torch.autograd.grad(paths, leaves, slopes, create_graph=slopes.requires_grad, materialize_grads=True)
    return repeated.fisher_solve(natural.Expectation(*pulled))


def _repeated(natural: Natural, num_draws: int) -> Any:
    return type(natural)(*(leaf.expand((num_draws, *leaf.shape)) for leaf in vars(natural).values()))


def _drawn(natural: Natural, seed: int) -> Tensor:
    """One draw of each of a batch, the same for the same seed, and differentiable in λ where the host's is."""
    distribution = natural.to_distribution()
    with seeded(seed, natural.flat().device), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Singular sample detected")  # which torch's Wishart says of sound ones, too
        return distribution.rsample() if distribution.has_rsample else distribution.sample()


@contextmanager
def seeded(seed: int | None, device: torch.device | None) -> Iterator[None]:
    """The host's random numbers from a seed on, if there is one; after it they go on as if nothing had been drawn.

    They are those of the CPU and of one GPU, if there is one: `device`, or the one that is current. `torch.manual_seed`
    would seed every device, of which these states alone are kept, and take a millisecond.
    """
    if device is None and torch.cuda.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            for each in devices:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
        yield
