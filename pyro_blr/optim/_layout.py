"""Which parameters of a Pyro guide are which coordinates of a Gaussian.

`SVI` hands an optimizer tensors, and not which one is the location of which site. `recognise` asks the guide itself:
it runs the guide once with random parameter values and looks for them in the distributions that come out.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import constraints, transform_to

from ..families import Block, Structure

__all__ = [
    "Layout",
    "Site",
    "constrained",
    "gather",
    "recognise",
    "scatter",
    "subsampled",
    "unconstrained",
    "undisturbed",
    "unwrap",
]


@dataclass(frozen=True)
class Site:
    """A Gaussian sample site of the guide whose arrays are parameters.

    Attributes:
        name: of the sample site.
        loc: name of the location parameter.
        scale: names of the parameters of the scale: none where the covariance is not a parameter of its own, one, or
            the two whose product (rows scaled by the first) is the `scale_tril` of AutoMultivariateNormal.
        block: its coordinates.
    """

    name: str
    loc: str
    scale: tuple[str, ...]
    block: Block


@dataclass(frozen=True)
class Layout:
    """Every recognised site, the tensors and constraints of their parameters, and the tensors that belong to none."""

    sites: tuple[Site, ...]
    tensors: dict[str, Tensor]
    constraints: dict[str, Any]
    others: dict[str, Tensor]

    @property
    def blocks(self) -> tuple[Block, ...]:
        return tuple(site.block for site in self.sites)

    def covers(self, params: Iterable[Tensor]) -> bool:
        """Whether this is still the layout of the parameters of a step."""
        known = {id(tensor) for tensor in (*self.tensors.values(), *self.others.values())}
        return {id(param) for param in params if param.requires_grad} == known

    def same_gaussian(self, other: Layout) -> bool:
        """Whether both have the same sites on the same tensors."""
        return self.sites == other.sites and all(self.tensors[name] is other.tensors[name] for name in self.tensors)


def recognise(
    svi: SVI, loss: Any, args: tuple, kwargs: dict, params: Iterable[Tensor], *, stock_gradients: bool
) -> Layout:
    """The Gaussian sites of `svi.guide` and the parameters that feed them.

    A parameter feeds an array if a random value given to the parameter comes back as that array, all of it or the
    rows of a subsampled plate. Derived arrays (a scale that is computed in the guide, a neural network's output) do
    not come back and are left to the other optimizer.
    """
    params = [param for param in params if param.requires_grad]
    with _random_values(params), pyro.poutine.block(), Probe(params) as probe, undisturbed(), torch.no_grad():
        svi.guide(*args, **kwargs)
        matches = {name: _match(name, message, probe) for name, message in probe.samples.items()}
    found = [
        (name, *match)
        for name, match in matches.items()
        if match is not None and not (stock_gradients and not match[1])
    ]

    uses = Counter(param for _, loc, scale, _ in found for param in (loc, *scale))
    sites: list[Site] = []
    start = 0
    for name, loc, scale, structure in found:
        if any(uses[param] > 1 for param in (loc, *scale)):
            continue  # one parameter for several sites is no Gaussian of its own
        shape = tuple(probe.tensors[loc].shape)
        sites.append(Site(name=name, loc=loc, scale=scale, block=Block(start=start, shape=shape, structure=structure)))
        start = sites[-1].block.stop

    claimed = [param for site in sites for param in (site.loc, *site.scale)]
    tensors = {name: probe.tensors[name] for name in claimed}
    taken = {id(tensor) for tensor in tensors.values()}
    store = pyro.get_param_store()
    names = {id(tensor): name for name, tensor in (*probe.tensors.items(), *store.named_parameters())}
    others = {
        names.get(id(param), f"unnamed parameter {index} of shape {tuple(param.shape)}"): param
        for index, param in enumerate(params)
        if id(param) not in taken
    }
    layout = Layout(
        sites=tuple(sites),
        tensors=tensors,
        constraints={name: probe.constraints[name] for name in claimed},
        others=dict(sorted(others.items())),
    )
    _report(layout, probe)
    _check_plates(loss, layout, probe, stock_gradients)
    return layout


@contextmanager
def undisturbed(seed: int | None = None, device: torch.device | None = None):
    """An evaluation that leaves the host's random state alone and does not raise where a proposal is out of range."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|\\+?-?inf)")
        if seed is not None:
            torch.manual_seed(seed)
        yield


class Probe(Messenger):
    """Notes the parameters that the guide asks for and the distributions that it makes of them."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        self.trainable = {id(param) for param in params}
        self.tensors: dict[str, Tensor] = {}
        self.constraints: dict[str, Any] = {}
        self.constrained: dict[str, Tensor] = {}
        self.messages: dict[str, Any] = {}
        self.samples: dict[str, Any] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        name, tensor = msg["name"], msg["value"].unconstrained()
        if id(tensor) not in self.trainable:
            return
        stored = pyro.get_param_store()._constraints  # the public get_state() strips the parameters of what SVI needs
        self.tensors[name] = tensor
        self.constraints[name] = stored.get(name, msg["kwargs"].get("constraint", constraints.real))
        self.constrained[name] = msg["value"]
        self.messages[name] = msg  # plates further in replace its value by their rows

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not isinstance(msg["fn"], _Subsample):
            self.samples[msg["name"]] = msg


@contextmanager
def _random_values(params: list[Tensor]):
    """Random values in the parameters, for a while: a module's own `nn.Parameter` can be given them in no other way."""
    generator = torch.Generator().manual_seed(0)
    before = [param.detach().clone() for param in params]
    try:
        for param in params:
            noise = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            param.data.copy_(0.1 * noise)
        yield
    finally:
        for param, value in zip(params, before, strict=True):
            param.data.copy_(value)


def _match(name: str, message: Any, probe: Probe) -> tuple[str, tuple[str, ...], Structure] | None:
    """(loc, scale, structure) of a site fed by parameters."""
    rows = {param: msg["value"].detach() for param, msg in probe.messages.items()}

    def source(array: Tensor) -> str | None:
        for param, value in rows.items():
            if value.shape == array.shape and torch.equal(value, array.detach()):
                return param
        return None

    def sources(scale_tril: Tensor) -> tuple[str, ...]:
        param = source(scale_tril)
        if param is not None:
            return (param,)
        for diagonal, first in rows.items():
            for unit, second in rows.items():
                rows_scaled = second.shape == scale_tril.shape and first.shape == second.shape[:-1]
                if rows_scaled and torch.equal(first[..., None] * second, scale_tril.detach()):
                    return (diagonal, unit)
        return ()

    base, _ = unwrap(message["fn"])
    if isinstance(base, dist.Delta):
        loc = source(base.v)
        return None if loc is None else (loc, (), "point")
    if not isinstance(
        base, (torch.distributions.Normal, dist.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)
    ):
        return None
    loc = source(base.loc)
    if loc is None or _identity(probe.constraints[loc]) is False:
        return None
    if isinstance(base, torch.distributions.LowRankMultivariateNormal):
        raise ValueError(
            f"BLR has no natural gradient for the low-rank covariance of site '{name}' yet. "
            "Use AutoMultivariateNormal (full rank) or AutoNormal (mean field, preconditioned by a dense precision)."
        )
    if isinstance(base, torch.distributions.MultivariateNormal):
        scale = sources(base.scale_tril)
        return (loc, scale, "dense" if scale else "fixed")
    parameter = source(base.scale)
    if parameter is None or probe.constrained[parameter].shape != probe.constrained[loc].shape:
        return (loc, (), "fixed")
    return (loc, (parameter,), "diagonal")


def _identity(constraint: Any) -> bool:
    return constraint in (constraints.real, constraints.real_vector) or (
        isinstance(constraint, constraints.independent) and _identity(constraint.base_constraint)
    )


def _report(layout: Layout, probe: Probe) -> None:
    if not layout.sites:
        described = (
            ", ".join(f"'{name}': {type(unwrap(msg['fn'])[0]).__name__}" for name, msg in probe.samples.items())
            or "no site at all"
        )
        raise ValueError(
            "BLR expected a guide with a Normal, MultivariateNormal or Delta site whose loc (and scale or scale_tril) "
            f"are parameters; the guide has {described}. "
            "Use AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, or pyro.optim.Adam for this guide."
        )
    if layout.others:
        warnings.warn(
            f"BLR: the parameters {', '.join(layout.others)} belong to no Gaussian site that BLR recognises; they are "
            "updated by `others` (pyro.optim.Adam({'lr': 1e-3}) unless given) from the same gradients.",
            stacklevel=5,
        )


def _check_plates(loss: Any, layout: Layout, probe: Probe, stock_gradients: bool) -> None:
    sites = [site.name for site in layout.sites]
    local = [name for name in sites if subsampled(probe.samples[name])]
    if local and loss.num_particles > 1 and not loss.vectorize_particles:
        raise ValueError(
            f"The latent sites {', '.join(local)} lie in a subsampled plate: every particle would see other rows. "
            "Use num_particles=1; BLR takes several draws a step of its own (`num_draws`)."
        )
    weighted = [name for name in sites if probe.samples[name]["scale"] != 1]
    if stock_gradients and weighted:
        raise ValueError(
            f"estimator='gradient' cannot tell how often the sites {', '.join(weighted)} of a subsampled or scaled "
            "plate enter the stock gradients. Use the default estimator for this guide."
        )


def gather(layout: Layout) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The concatenated mean [D] and each site's scale, from the unconstrained parameters."""
    loc = torch.cat([layout.tensors[site.loc].detach().reshape(-1) for site in layout.sites])
    scales = []
    for site in layout.sites:
        values = [transform_to(layout.constraints[name])(layout.tensors[name].detach()) for name in site.scale]
        scales.append(None if not values else values[0] if len(values) == 1 else values[0][..., None] * values[1])
    return loc, tuple(scales)


def constrained(layout: Layout, loc: Tensor, scales: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The value of every parameter as the guide sees it; differentiable."""
    values = {}
    for site, scale in zip(layout.sites, scales, strict=True):
        value = loc[site.block.start : site.block.stop].reshape(site.block.shape)
        values[site.loc] = transform_to(layout.constraints[site.loc])(value)
        if scale is None:
            continue
        if len(site.scale) == 2:
            diagonal = scale.diagonal(dim1=-2, dim2=-1)
            values[site.scale[0]], values[site.scale[1]] = diagonal, scale / diagonal[..., None]
        else:
            values[site.scale[0]] = scale
    return {name: value.to(layout.tensors[name].dtype) for name, value in values.items()}


def unconstrained(layout: Layout, loc: Tensor, scales: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    return {
        name: transform_to(layout.constraints[name]).inv(value)
        for name, value in constrained(layout, loc, scales).items()
    }


@torch.no_grad()
def scatter(layout: Layout, loc: Tensor, scales: tuple[Tensor | None, ...]) -> None:
    """Writes the Gaussian into the parameters, in place; the inverse of `gather`."""
    for name, value in unconstrained(layout, loc, scales).items():
        layout.tensors[name].copy_(value)


def subsampled(message: Any) -> list[Any]:
    """The frames of the subsampled plates around a message."""
    return [
        frame for frame in message["cond_indep_stack"] if frame.vectorized and frame.full_size not in (None, frame.size)
    ]


def unwrap(fn: Any) -> tuple[Any, tuple]:
    """The distribution under masks, expansions, `to_event` and transforms, with the transforms in order."""
    transforms: tuple = ()
    while True:
        if isinstance(fn, torch.distributions.TransformedDistribution):
            transforms = (*fn.transforms, *transforms)
            fn = fn.base_dist
        elif isinstance(fn, (torch.distributions.Independent, dist.ExpandedDistribution, dist.MaskedDistribution)):
            fn = fn.base_dist
        else:
            return fn, transforms
