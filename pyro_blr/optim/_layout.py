"""Where the natural parameters of a Pyro guide are kept: its sites, and the parameters that hold them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import transform_to

from ..families import Block, MultivariateNormalNatural, Natural, family_of, natural_of
from ..gradients.drawn import seeded

__all__ = [
    "Layout",
    "Member",
    "Site",
    "axes_of",
    "constrained",
    "gather",
    "gather_members",
    "has_family",
    "has_rows",
    "joined",
    "moments",
    "plates_of",
    "rows_of",
    "scatter",
    "scatter_members",
    "subsampled",
    "unconstrained",
    "undisturbed",
    "unwrap",
]


JOINT = "natural_component"  # what a site's `infer` calls (parameter, index) where it is a component of a joint family


@dataclass(frozen=True)
class Site:
    """A Gaussian sample site of the guide whose arrays are parameters.

    Attributes:
        name: of the sample site, or of the parameter where it belongs to none and is a point of its own.
        loc: name of the location parameter.
        scale: names of the parameters of the scale: none where the covariance is not a parameter of its own, one, or
            the two whose product (rows scaled by the first) is the `scale_tril` of AutoMultivariateNormal, or the s
            and W of diag(s) (I + W Wᵀ) diag(s).
        block: its coordinates.
        family: of the parameters, where they are natural parameters; `loc` and `scale` name its fields.
    """

    name: str
    loc: str
    scale: tuple[str, ...]
    block: Block
    family: type[Any] | None = None

    @property
    def bare(self) -> bool:
        """Whether it is a parameter of no sample site."""
        return self.name == self.loc


@dataclass(frozen=True)
class Member:
    """A sample site of the guide whose natural parameters are parameters, or follow from parameters.

    Attributes:
        name: of the sample site, or of the several of a joint family with commas between.
        sites: the sample sites whose values a value of the family splits into.
        family: its class of natural parameters.
        params: the parameters that hold the fields of natural parameters, or those of the host's distribution.
        keys: their names in the host's distribution; none for natural parameters.
        distribution: the host's class, made of `params`.
        plates: (name, axis of the batch, full size) of each plate around it.
        local: whether one of the plates is subsampled.
    """

    name: str
    sites: tuple[str, ...]
    family: type[Natural]
    params: tuple[str, ...]
    keys: tuple[str, ...]
    distribution: type
    plates: tuple[tuple[str, int, int], ...]
    local: bool


@dataclass(frozen=True)
class Layout:
    """Every recognised site, the tensors and constraints of their parameters, and the tensors that belong to none.

    `sites` share one Gaussian over all their coordinates, `members` have natural parameters of their own. The guide
    itself makes scales of the parameters `made`, which are unconstrained, by the transform of their `constraints`.

    Attributes:
        small: latents of few coordinates beside others of many, the `wide` coordinates, by which Hessians are split
            (`gradients.Split`); none where they are not.
        held: those that are constants in the loss.
    """

    sites: tuple[Site, ...]
    members: tuple[Member, ...]
    tensors: dict[str, Tensor]
    constraints: dict[str, Any]
    others: dict[str, Tensor]
    made: frozenset[str] = frozenset()
    small: frozenset[str] = frozenset()
    wide: tuple[int, ...] = ()
    held: frozenset[str] = frozenset()

    @cached_property
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

    def covers(self, params: Iterable[Tensor]) -> bool:
        """Whether this is still the layout of the parameters of a step."""
        known = {id(tensor) for tensor in (*self.tensors.values(), *self.others.values())}
        return {id(param) for param in params if param.requires_grad and (param.numel() or id(param) in known)} == known

    def same_sites(self, other: Layout) -> bool:
        """Whether both have the same sites on the same tensors."""
        same = self.sites == other.sites and self.members == other.members
        return same and all(self.tensors[name] is other.tensors[name] for name in self.tensors)


@contextmanager
def undisturbed(seed: int | None = None, device: torch.device | None = None):
    """An evaluation that leaves the host's random state alone and does not raise where a proposal is out of range."""
    with seeded(seed, device), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|\\+?-?inf)")
        warnings.filterwarnings("ignore", "Singular sample detected")  # which torch's Wishart says of sound ones, too
        yield


def plates_of(message: Any) -> tuple[tuple[str, int, int], ...]:
    """(name, axis of the batch, full size) of each plate around a sample site."""
    rank = len(message["fn"].batch_shape)
    frames = [frame for frame in message["cond_indep_stack"] if frame.vectorized]
    return tuple((frame.name, frame.dim + rank, frame.full_size or frame.size) for frame in frames)


def gather(layout: Layout) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The concatenated mean [D] of the sites and each site's scale, from the unconstrained parameters."""
    locs, scales = [], []
    for site in layout.sites:
        if site.family is not None:
            distribution = _natural(site.family, (site.loc, *site.scale), layout).to_distribution()
            locs.append(distribution.loc)
            scales.append(distribution.scale if site.block.structure == "diagonal" else distribution.scale_tril)
            continue
        locs.append(layout.tensors[site.loc].detach())
        values = [transform_to(layout.constraints[name])(layout.tensors[name].detach()) for name in site.scale]
        if site.block.structure == "low rank":
            values[1] = torch.nn.functional.pad(values[1], (1, 0), value=1.0)
        scales.append(None if not values else values[0] if len(values) == 1 else values[0][..., None] * values[1])
    if not locs:
        return next(iter(layout.tensors.values())).detach().new_zeros(0), ()
    return torch.cat([loc.reshape(-1) for loc in locs]), tuple(scales)


def moments(layout: Layout, loc: Tensor, scales: tuple[Tensor | None, ...]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The location and the scale of every site; differentiable."""
    result = {}
    for site, scale in zip(layout.sites, scales, strict=True):
        dtype = layout.tensors[site.loc].dtype
        value = loc[site.block.start : site.block.stop].reshape(site.block.shape)
        if site.family is None:
            value = transform_to(layout.constraints[site.loc])(value)
        result[site.name] = value.to(dtype), None if scale is None else scale.to(dtype)
    return result


def constrained(layout: Layout, loc: Tensor, scales: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The value of every parameter of the sites as the guide sees it; differentiable."""
    values: dict[str, Tensor] = {}
    for site, (value, scale) in zip(layout.sites, moments(layout, loc, scales).values(), strict=True):
        if site.family is not None:
            assert scale is not None  # natural parameters have both
            dense = site.block.structure == "dense"
            distribution = dist.MultivariateNormal(value, scale_tril=scale) if dense else dist.Normal(value, scale)
            leaves = vars(site.family.from_distribution(distribution)).values()
            values.update(zip((site.loc, *site.scale), leaves, strict=True))
            continue
        values[site.loc] = value
        if scale is None:
            continue
        if site.block.structure == "low rank":
            values[site.scale[0]], values[site.scale[1]] = scale[..., 0], scale[..., 1:] / scale[..., :1]
        elif len(site.scale) == 2:
            diagonal = scale.diagonal(dim1=-2, dim2=-1)
            values[site.scale[0]], values[site.scale[1]] = diagonal, scale / diagonal[..., None]
        else:
            name = site.scale[0]
            values[name] = transform_to(layout.constraints[name]).inv(scale) if name in layout.made else scale
    return values


def unconstrained(layout: Layout, loc: Tensor, scales: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {
        name: value if name in layout.made else transform_to(layout.constraints[name]).inv(value)
        for name, value in constrained(layout, loc, scales).items()
    }


@torch.no_grad()
def scatter(layout: Layout, loc: Tensor, scales: tuple[Tensor | None, ...]) -> None:
    """Writes the Gaussian into the parameters, in place; the inverse of `gather`."""
    for name, value in unconstrained(layout, loc, scales).items():
        layout.tensors[name].copy_(value)


def gather_members(layout: Layout) -> dict[str, Natural]:
    """λ of every member, by site."""
    naturals = {}
    for member in layout.members:
        if not member.keys:
            naturals[member.name] = _natural(member.family, member.params, layout)
            continue
        values = {
            key: transform_to(layout.constraints[param])(layout.tensors[param].detach())
            for key, param in zip(member.keys, member.params, strict=True)
        }
        naturals[member.name] = natural_of(member.distribution(**values))
    return naturals


@torch.no_grad()
def scatter_members(layout: Layout, naturals: Mapping[str, Natural]) -> None:
    """Writes the members into the parameters, in place; the inverse of `gather_members`."""
    for member in layout.members:
        natural = naturals[member.name]
        if not member.keys:
            for param, leaf in zip(member.params, vars(natural).values(), strict=True):
                layout.tensors[param].copy_(leaf)
            continue
        distribution = natural.to_distribution()
        for key, param in zip(member.keys, member.params, strict=True):
            value = transform_to(layout.constraints[param]).inv(getattr(distribution, key))
            layout.tensors[param].copy_(value)


def _natural(family: type[Any], params: tuple[str, ...], layout: Layout) -> Natural:
    return family(*(layout.tensors[param].detach().clone() for param in params))


def joined(layout: Layout, names: Collection[str]) -> Layout:
    """The layout in which the Gaussian members `names` share the Gaussian of the sites."""
    sites, start = list(layout.sites), sum(site.block.size for site in layout.sites)
    for member in layout.members:
        if member.name not in names:
            continue
        linear, quadratic = member.params
        dense = member.family is MultivariateNormalNatural
        shape = tuple(layout.tensors[linear].shape)
        block = Block(start=start, shape=shape, structure="dense" if dense else "diagonal")
        sites.append(Site(member.name, linear, (quadratic,), block, member.family))
        start = block.stop
    rest = tuple(member for member in layout.members if member.name not in names)
    return replace(layout, sites=tuple(sites), members=rest)


def subsampled(message: Any) -> list[Any]:
    """The frames of the subsampled plates around a message."""
    return [
        frame for frame in message["cond_indep_stack"] if frame.vectorized and frame.full_size not in (None, frame.size)
    ]


def axes_of(num_axes: int, message: Any) -> list[tuple[Any, int]]:
    """The subsampled plates around a site, each with its axis, from the left, in the site's arrays over all rows."""
    event_dim = message["fn"].event_dim
    return [(frame, frame.dim - event_dim + num_axes) for frame in subsampled(message)]


def has_rows(value: Tensor, message: Any) -> bool:
    """Whether an array has all the rows of the subsampled plates."""
    return all(axis >= 0 and value.shape[axis] == frame.full_size for frame, axis in axes_of(value.ndim, message))


def rows_of(value: Tensor, num_axes: int, message: Any, indices: Mapping[str, Tensor]) -> Tensor:
    """The rows of an array over all rows that the subsampled plates let through."""
    for frame, axis in axes_of(num_axes, message):
        value = value.index_select(axis, indices[frame.name])
    return value


def unwrap(fn: Any) -> tuple[Any, tuple]:
    """The distribution under masks, expansions, `to_event` and transforms, with the transforms in order."""
    transforms: tuple = ()
    while True:
        if isinstance(fn, torch.distributions.TransformedDistribution) and not has_family(fn):
            transforms = (*fn.transforms, *transforms)
            fn = fn.base_dist
        elif isinstance(fn, (torch.distributions.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
            fn = fn.base_dist
        else:
            return fn, transforms


def has_family(base: Any) -> bool:
    """Whether the distribution is a member of an exponential family of ours."""
    return family_of(type(base), default=None) is not None
