"""Which parameters of a NumPyro guide are which coordinates of a Gaussian.

`SVI` tells an optimizer the names and values of the parameters, and not which one is the location of which site.
`recognise` asks the guide itself: it runs the guide once with random parameter values and looks for them in the
distributions that come out.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer import SVI

from ..families import Block, Structure

__all__ = ["Layout", "Site", "gather", "recognise", "scatter", "subsampled", "unwrap"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Site:
    """A Gaussian sample site of the guide whose arrays are parameters.

    Attributes:
        name: of the sample site.
        loc, scale: names of its parameters; `scale` is None where the covariance is not a parameter of its own.
        block: its coordinates.
        constraint: of the scale parameter; SVI keeps parameters unconstrained.
    """

    name: str = field(metadata={"static": True})
    loc: str = field(metadata={"static": True})
    scale: str | None = field(metadata={"static": True})
    block: Block = field(metadata={"static": True})
    constraint: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Every recognised site, and the names of the parameters that belong to none."""

    sites: tuple[Site, ...]
    others: tuple[str, ...] = field(metadata={"static": True})

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(site.block for site in self.sites)


def recognise(svi: SVI, args: tuple, kwargs: dict, params: Mapping[str, Any], *, learned_scales_only: bool) -> Layout:
    """The Gaussian sites of `svi.guide` and the parameters that feed them.

    A parameter feeds an array if a random value given to the parameter comes back as that array, all of it or the
    rows of a subsampled plate. Derived arrays (a scale that is computed in the guide, a neural network's output) do
    not come back and are left to the other optimizer.
    """
    guide_trace, fed, arrays = _probe(svi, args, {**kwargs, **svi.static_kwargs}, params)
    found = []
    for name, candidates in arrays.items():
        match = _match(name, unwrap(guide_trace[name]["fn"])[0], candidates, fed, guide_trace)
        if match is not None and not (learned_scales_only and match[1] is None):
            found.append((name, *match))

    uses = Counter(param for _, loc, scale, _ in found for param in (loc, scale) if param is not None)
    sites, start = [], 0
    for name, loc, scale, structure in found:
        if uses[loc] > 1 or (scale is not None and uses[scale] > 1):
            continue  # one parameter for several sites is no Gaussian of its own
        coordinates = Block(start=start, shape=params[loc].shape, structure=structure)
        constraint = None if scale is None else _constraint(guide_trace[scale])
        sites.append(Site(name=name, loc=loc, scale=scale, block=coordinates, constraint=constraint))
        start = coordinates.stop
    claimed = {param for site in sites for param in (site.loc, site.scale)}
    layout = Layout(tuple(sites), tuple(name for name in params if name not in claimed))
    _report(layout, guide_trace)
    _check_particles(svi, layout, guide_trace)
    return layout


def _probe(svi: SVI, args: tuple, kwargs: dict, params: Mapping[str, Any]) -> tuple[dict, dict, dict]:
    """The guide's trace, the random values that its parameters were given, and the arrays of its sample sites."""
    messages: dict[str, dict] = {}

    def run(probes: dict[str, Array]) -> tuple[dict, dict]:
        messages.update(
            trace(substitute(seed(svi.guide, 0), substitute_fn=partial(_constrained, probes))).get_trace(
                *args, **kwargs
            )
        )
        fed = {
            name: _rows(message["value"], message, messages)
            for name, message in messages.items()
            if message["type"] == "param" and name in probes
        }
        arrays = {
            name: {key: getattr(base, key) for key in _ARRAYS.get(type(base), ())}
            for name, message in messages.items()
            if message["type"] == "sample" and not message["is_observed"]
            for base in [unwrap(message["fn"])[0]]
        }
        return fed, arrays

    generator = np.random.default_rng(0)
    probes = {
        name: generator.normal(scale=0.1, size=value.shape).astype(value.dtype)
        for name, value in params.items()
        if isinstance(value, jax.Array)
    }
    # compiled ahead of time, so that the values are concrete even where SVI.init itself is being traced by jit or vmap
    with block():
        compiled = jax.jit(run).lower(probes).compile()
    fed, arrays = compiled(probes)
    return messages, fed, arrays


def _constrained(probes: dict[str, Array], message: dict) -> Array | None:
    if message["type"] != "param" or message["name"] not in probes:
        return None
    return biject_to(_constraint(message))(probes[message["name"]])


def _match(
    name: str, base: Any, arrays: dict[str, Array], fed: dict[str, Array], guide_trace: dict
) -> tuple[str, str | None, Structure] | None:
    """(loc, scale, structure) of a site fed by parameters."""

    def source(key: str) -> str | None:
        for param, value in fed.items():
            # equal but for the rounding of a fused computation; the probes are random, so nothing else is this close
            if value.shape == arrays[key].shape and np.allclose(value, arrays[key], rtol=1e-5, atol=0):
                return param
        return None

    if isinstance(base, dist.Delta):
        loc = source("v")
        return None if loc is None else (loc, None, "point")
    if not isinstance(base, (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)):
        return None
    loc = source("loc")
    if loc is None or not isinstance(biject_to(_constraint(guide_trace[loc])), _IDENTITIES):
        return None
    if isinstance(base, dist.LowRankMultivariateNormal):
        raise ValueError(
            f"BLR has no natural gradient for the low-rank covariance of site '{name}' yet. "
            "Use AutoMultivariateNormal (full rank) or AutoNormal (mean field, preconditioned by a dense precision)."
        )
    if isinstance(base, dist.MultivariateNormal):
        scale = source("scale_tril")
        return (loc, scale, "fixed" if scale is None else "dense")
    if base.shape() != _base_value_shape(guide_trace[name]):
        return None  # one location for many draws of a plate
    scale = source("scale")
    if scale is None or guide_trace[scale]["value"].shape != guide_trace[loc]["value"].shape:
        return (loc, None, "fixed")
    return (loc, scale, "diagonal")


_IDENTITIES = (type(biject_to(constraints.real)), type(biject_to(constraints.real_vector)))


_ARRAYS = {
    dist.Normal: ("loc", "scale"),
    dist.MultivariateNormal: ("loc", "scale_tril"),
    dist.LowRankMultivariateNormal: ("loc",),
    dist.Delta: ("v",),
}


def _constraint(message: dict) -> Any:
    return message["kwargs"].get("constraint", constraints.real)


def _base_value_shape(message: dict) -> tuple[int, ...]:
    fn = message["fn"]
    _, transforms = unwrap(fn)
    shape = fn.shape()
    for transform in reversed(transforms):
        shape = transform.inverse_shape(shape)
    return shape


def subsampled(message: dict, guide_trace: dict) -> list[tuple[int, int, Array]]:
    """(axis counted from the right of the batch, full size, indices) of each subsampled plate around a message."""
    plates = [(frame, guide_trace[frame.name]) for frame in message["cond_indep_stack"] if frame.name in guide_trace]
    return [(frame.dim, plate["args"][0], plate["value"]) for frame, plate in plates if frame.size != plate["args"][0]]


def _rows(value: Array, message: dict, guide_trace: dict) -> Array:
    """The rows of a parameter that a subsampled plate lets through, as `numpyro.plate` takes them."""
    event_dim = message["kwargs"].get("event_dim")
    if event_dim is None:
        return value
    for dim, size, indices in subsampled(message, guide_trace):
        axis = dim - event_dim
        if value.ndim >= -axis and value.shape[axis] == size:
            value = jnp.take(value, indices, axis)
    return value


def _report(layout: Layout, guide_trace: dict) -> None:
    sites = {
        name: unwrap(message["fn"])[0]
        for name, message in guide_trace.items()
        if message["type"] == "sample" and not message["is_observed"]
    }
    if not layout.sites:
        described = ", ".join(f"'{name}': {type(fn).__name__}" for name, fn in sites.items()) or "no site at all"
        raise ValueError(
            "BLR expected a guide with a Normal, MultivariateNormal or Delta site whose loc (and scale or scale_tril) "
            f"are parameters; the guide has {described}. "
            "Use AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, or numpyro.optim.Adam for this guide."
        )
    if layout.others:
        warnings.warn(
            f"BLR: the parameters {', '.join(layout.others)} belong to no Gaussian site that BLR recognises; they are "
            "updated by `others` (numpyro.optim.Adam(1e-3) unless given) from the same gradients.",
            stacklevel=5,
        )


def _check_particles(svi: SVI, layout: Layout, guide_trace: dict) -> None:
    local = [site.name for site in layout.sites if subsampled(guide_trace[site.name], guide_trace)]
    if local and svi.loss.num_particles > 1:
        raise ValueError(
            f"The latent sites {', '.join(local)} lie in a subsampled plate: every particle would see other rows. "
            "Use num_particles=1; BLR takes several draws a step of its own (`num_draws`)."
        )


def gather(layout: Layout, params: Mapping[str, Array]) -> tuple[Array, tuple[Array | None, ...]]:
    """The concatenated mean [D] and each site's scale, from SVI's unconstrained parameters."""
    loc = jnp.concatenate([jnp.ravel(params[site.loc]) for site in layout.sites])
    scales = tuple(
        None if site.scale is None else biject_to(site.constraint)(params[site.scale]) for site in layout.sites
    )
    return loc, scales


def scatter(layout: Layout, loc: Array, scales: tuple[Array | None, ...], params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the Gaussian's in place; the inverse of `gather`."""
    result = dict(params)
    for site, scale in zip(layout.sites, scales, strict=True):
        value = loc[site.block.start : site.block.stop].reshape(site.block.shape)
        result[site.loc] = value.astype(params[site.loc].dtype)
        if site.scale is not None:
            result[site.scale] = biject_to(site.constraint).inv(scale).astype(params[site.scale].dtype)
    return result


def unwrap(fn: Any) -> tuple[Any, tuple]:
    """The distribution under masks, expansions, `to_event` and transforms, with the transforms in order."""
    transforms: tuple = ()
    while True:
        if isinstance(fn, dist.TransformedDistribution) and not isinstance(fn, dist.MultivariateNormal):
            transforms = (*fn.transforms, *transforms)
            fn = fn.base_dist
        elif isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
            fn = fn.base_dist
        else:
            return fn, transforms
