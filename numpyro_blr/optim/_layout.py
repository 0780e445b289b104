"""Where the natural parameters of a NumPyro guide are kept: its sites, and the parameters that hold them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to

from ..families import Block, MultivariateNormalNatural, Natural, family_of, natural_of

__all__ = [
    "Layout",
    "Member",
    "Site",
    "gather",
    "gather_members",
    "has_family",
    "joined",
    "natural_rows",
    "rows_of",
    "scatter",
    "scatter_members",
    "subsampled",
    "unwrap",
]


EVENT_DIM = "natural_event_dim"  # how a natural parameter says what part of its batch is the site's event


JOINT = "natural_component"  # what a site's `infer` calls (parameter, index) where it is a component of a joint family


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Site:
    """A Gaussian sample site of the guide whose arrays are parameters.

    Attributes:
        name: of the sample site, or of the parameter where it belongs to none and is a point of its own.
        loc, scale: names of its parameters; `scale` is None where the covariance is not a parameter of its own.
        factor: name of W, where the covariance is diag(s) (I + W Wᵀ) diag(s) with the scale s.
        block: its coordinates.
        constraint: of the scale parameter; SVI keeps parameters unconstrained. Where the guide makes the scale of an
            unconstrained parameter, the constraint whose transform is what it does.
        family: of the parameter, where it is one of natural parameters, that both `loc` and `scale` name.
    """

    name: str = field(metadata={"static": True})
    loc: str = field(metadata={"static": True})
    scale: str | None = field(metadata={"static": True})
    block: Block = field(metadata={"static": True})
    constraint: Any
    family: type[Natural] | None = field(metadata={"static": True}, default=None)
    factor: str | None = field(metadata={"static": True}, default=None)

    @property
    def params(self) -> tuple[str, ...]:
        """The names of its parameters."""
        return tuple(name for name in (self.loc, self.scale, self.factor) if name is not None)

    @property
    def bare(self) -> bool:
        """Whether it is a parameter of no sample site."""
        return self.name == self.loc


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Member:
    """A sample site of the guide whose natural parameters are parameters, or follow from parameters.

    Attributes:
        name: of the sample site, or of the several of a joint family with commas between.
        sites: the sample sites whose values a value of the family splits into.
        family: its class of natural parameters.
        params: the one parameter that holds natural parameters, or those of the host's distribution.
        keys: their names in the host's distribution; none for natural parameters.
        distribution: the host's class, made of `params`.
        plates: (name, axis of the batch, full size) of each plate around it.
        local: whether one of the plates is subsampled.
        constraints: of `params`.
    """

    name: str = field(metadata={"static": True})
    sites: tuple[str, ...] = field(metadata={"static": True})
    family: type[Natural] = field(metadata={"static": True})
    params: tuple[str, ...] = field(metadata={"static": True})
    keys: tuple[str, ...] = field(metadata={"static": True})
    distribution: type = field(metadata={"static": True})
    plates: tuple[tuple[str, int, int], ...] = field(metadata={"static": True})
    local: bool = field(metadata={"static": True})
    constraints: tuple[Any, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Every recognised site, and the names of the parameters that belong to none.

    `sites` share one Gaussian over all their coordinates, `members` have natural parameters of their own.

    Attributes:
        small: latents of few coordinates beside others of many, the `wide` coordinates, by which Hessians are split
            (`gradients.Split`); none where they are not.
        held: those that are constants in the loss.
    """

    sites: tuple[Site, ...]
    members: tuple[Member, ...]
    others: tuple[str, ...] = field(metadata={"static": True})
    small: frozenset[str] = field(metadata={"static": True}, default=frozenset())
    wide: tuple[int, ...] = field(metadata={"static": True}, default=())
    held: frozenset[str] = field(metadata={"static": True}, default=frozenset())

    @property
    def holding(self) -> Layout:
        """The same of a loss in which the `small` latents are constants."""
        return replace(self, held=self.small)

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(site.block for site in self.sites)

    @property
    def bare(self) -> np.ndarray:
        """Which coordinates are parameters of no sample site, [D]."""
        return np.repeat([site.bare for site in self.sites], [site.block.size for site in self.sites])


def plates_of(message: dict, guide_trace: dict) -> tuple[tuple[str, int, int], ...]:
    """(name, axis of the batch, full size) of each plate around a sample site."""
    rank = len(message["fn"].batch_shape)
    frames = [frame for frame in message["cond_indep_stack"] if frame.name in guide_trace]
    return tuple((frame.name, frame.dim + rank, guide_trace[frame.name]["args"][0]) for frame in frames)


def subsampled(message: dict, guide_trace: dict) -> list[tuple[int, int, Array]]:
    """(axis counted from the right of the batch, full size, indices) of each subsampled plate around a message."""
    plates = [(frame, guide_trace[frame.name]) for frame in message["cond_indep_stack"] if frame.name in guide_trace]
    return [(frame.dim, plate["args"][0], plate["value"]) for frame, plate in plates if frame.size != plate["args"][0]]


def rows_of(value: Array, event_dim: int, frames: list[tuple[int, int, Array]]) -> Array:
    """The rows of an array in the subsampled plates `frames`, as `subsampled` gives them."""
    for dim, size, indices in frames:
        axis = dim - event_dim
        if value.ndim >= -axis and value.shape[axis] == size:
            value = jnp.take(value, indices, axis)
    return value


def natural_rows(natural: Natural, event_dim: int, frames: list[tuple[int, int, Array]]) -> Natural:
    """The rows of a batch of natural parameters."""
    leaves = zip(vars(natural).values(), natural.ranks, strict=True)
    return type(natural)(*(rows_of(leaf, rank + event_dim, frames) for leaf, rank in leaves))


def gather(layout: Layout, params: Mapping[str, Any]) -> tuple[Array, tuple[Array | None, ...]]:
    """The concatenated mean [D] of the sites and each site's scale, from SVI's unconstrained parameters."""
    locs, scales = [], []
    for site in layout.sites:
        if site.family is not None:
            distribution = params[site.loc].to_distribution()
            locs.append(distribution.loc)
            scales.append(distribution.scale if site.block.structure == "diagonal" else distribution.scale_tril)
            continue
        locs.append(params[site.loc])
        scale: Any = None if site.scale is None else biject_to(site.constraint)(params[site.scale])
        if site.factor is not None:
            scale = scale[..., None] * jnp.concatenate([jnp.ones_like(scale)[..., None], params[site.factor]], -1)
        scales.append(scale)
    return jnp.concatenate([jnp.ravel(loc) for loc in locs] or [jnp.zeros(0)]), tuple(scales)


def scatter(layout: Layout, loc: Array, scales: tuple[Array | None, ...], params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the Gaussian's in place; the inverse of `gather`."""
    result = dict(params)
    for site, scale in zip(layout.sites, scales, strict=True):
        value = loc[site.block.start : site.block.stop].reshape(site.block.shape)
        if site.family is not None:
            dense = site.block.structure == "dense"
            distribution = dist.MultivariateNormal(value, scale_tril=scale) if dense else dist.Normal(value, scale)
            result[site.loc] = jax.tree.map(
                lambda new, old: new.astype(old.dtype), site.family.from_distribution(distribution), params[site.loc]
            )
            continue
        result[site.loc] = value.astype(params[site.loc].dtype)
        if site.factor is not None:
            assert scale is not None  # with the factor
            scale, factor = scale[..., 0], scale[..., 1:] / scale[..., :1]
            result[site.factor] = factor.astype(params[site.factor].dtype)
        if site.scale is not None:
            result[site.scale] = biject_to(site.constraint).inv(scale).astype(params[site.scale].dtype)
    return result


def gather_members(layout: Layout, params: Mapping[str, Any]) -> dict[str, Natural]:
    """λ of every member, by site."""
    naturals = {}
    for member in layout.members:
        if not member.keys:
            naturals[member.name] = params[member.params[0]]
            continue
        values = {
            key: biject_to(constraint)(params[param])
            for key, param, constraint in zip(member.keys, member.params, member.constraints, strict=True)
        }
        naturals[member.name] = natural_of(member.distribution(**values))
    return naturals


def scatter_members(layout: Layout, naturals: Mapping[str, Natural], params: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the members' in place; the inverse of `gather_members`."""
    result = dict(params)
    for member in layout.members:
        natural = naturals[member.name]
        if not member.keys:
            result[member.params[0]] = natural
            continue
        distribution = natural.to_distribution()
        for key, param, constraint in zip(member.keys, member.params, member.constraints, strict=True):
            value = biject_to(constraint).inv(getattr(distribution, key))
            result[param] = value.astype(params[param].dtype)
    return result


def joined(layout: Layout, names: Collection[str], params: Mapping[str, Any]) -> Layout:
    """The layout in which the Gaussian members `names` share the Gaussian of the sites."""
    sites, start = list(layout.sites), sum(site.block.size for site in layout.sites)
    for member in layout.members:
        if member.name not in names:
            continue
        param = member.params[0]
        dense = member.family is MultivariateNormalNatural
        shape = params[param].linear.shape
        block = Block(start=start, shape=shape, structure="dense" if dense else "diagonal")
        sites.append(Site(member.name, param, param, block, member.constraints[0], member.family))
        start = block.stop
    rest = tuple(member for member in layout.members if member.name not in names)
    return Layout(tuple(sites), rest, layout.others)


def unwrap(fn: Any) -> tuple[Any, tuple]:
    """The distribution under masks, expansions, `to_event` and transforms, with the transforms in order."""
    transforms: tuple = ()
    while True:
        if isinstance(fn, dist.TransformedDistribution) and not has_family(fn):
            transforms = (*fn.transforms, *transforms)
            fn = fn.base_dist
        elif isinstance(fn, (dist.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
            fn = fn.base_dist
        else:
            return fn, transforms


def has_family(base: Any) -> bool:
    """Whether the distribution is a member of an exponential family of ours."""
    return family_of(type(base), default=None) is not None
