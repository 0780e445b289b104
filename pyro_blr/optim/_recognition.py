"""Which parameters of a Pyro guide are which natural parameters.

`SVI` hands an optimizer tensors, and not which one is the location of which site. `recognise` asks the guide itself:
it runs the guide once with random parameter values and looks for them in the distributions that come out.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.constraints import softplus_positive
from pyro.infer import SVI
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import constraints, transform_to

from ..families import Block, MultivariateNormalNatural, Natural, NormalNatural, Structure, natural_of
from ._layout import (
    JOINT,
    Layout,
    Member,
    Site,
    has_family,
    has_rows,
    plates_of,
    rows_of,
    subsampled,
    undisturbed,
    unwrap,
)
from ._options import OTHERS_RATE

__all__ = ["halved", "recognise"]

MANY = 16


def recognise(
    svi: SVI,
    loss: Any,
    args: tuple,
    kwargs: dict,
    params: Iterable[Tensor],
    *,
    learned_scales_only: bool,
    rule: str = "BLR",
    alone: bool = True,
    points: int = 0,
) -> Layout:
    """The sites of `svi.guide` that are members of exponential families and the parameters that feed them.

    A parameter feeds an array if a random value given to the parameter comes back as that array, all of it or the
    rows of a subsampled plate, or as its exp or softplus where it is to be a scale. Other derived arrays (a neural
    network's output) do not come back and are left to the other optimizer, or, where there are at most `points`
    coordinates in all, are points beside the sites. Messages call the optimizer `rule`; where it is not `alone` with
    these sites, there may be none.
    """
    params = [param for param in params if param.requires_grad]
    with _random_values(params), pyro.poutine.block(), Probe(params) as probe, undisturbed(), torch.no_grad():
        svi.guide(*args, **kwargs)
        matches = {name: _match(name, message, probe) for name, message in probe.samples.items()}
        members = _joint_members(probe)
        joint = {site for member in members for site in member.sites}
        rest = [name for name in probe.samples if name not in joint]
        single = [_match_member(probe.samples[name], probe) for name in rest if matches[name] is None]
    found = _without_repeated_points(
        [
            (name, match)
            for name, match in matches.items()
            if match is not None and name not in joint and not (learned_scales_only and not match.scale)
        ]
    )
    members += [member for member in single if member is not None]

    uses = Counter(param for _, match in found for param in (match.loc, *match.scale))
    uses.update(param for member in members for param in member.params)
    sites: list[Site] = []
    start = 0
    made: dict[str, Any] = {}
    for name, match in found:
        if any(uses[param] > 1 for param in (match.loc, *match.scale)):
            continue  # one parameter for several sites is no Gaussian of its own
        block = Block(start=start, shape=tuple(probe.tensors[match.loc].shape), structure=match.structure)
        sites.append(Site(name=name, loc=match.loc, scale=match.scale, block=block))
        if match.made is not None:
            made[match.scale[0]] = match.made
        start = block.stop
    members = [member for member in members if all(uses[param] == 1 for param in member.params)]

    claimed = [param for site in sites for param in (site.loc, *site.scale)]
    claimed += [param for member in members for param in member.params]
    tensors = {name: probe.tensors[name] for name in claimed}
    taken = {id(tensor) for tensor in tensors.values()}
    store = pyro.get_param_store()
    names = {id(tensor): name for name, tensor in (*probe.tensors.items(), *store.named_parameters())}
    others = {
        names.get(id(param), f"unnamed parameter {index} of shape {tuple(param.shape)}"): param
        for index, param in enumerate(params)
        if id(param) not in taken and param.numel()
    }
    layout = Layout(
        sites=tuple(sites),
        members=tuple(members),
        tensors=tensors,
        constraints={name: made.get(name, probe.constraints[name]) for name in claimed},
        others=dict(sorted(others.items())),
        made=frozenset(made),
    )
    known = {site.name for site in sites} | {site for member in members for site in member.sites}
    # for maximum likelihood there is no site at all
    if (sites or not probe.samples) and not _draws(probe, known):
        layout = _with_points(layout, points)
    _report(layout, probe, rule, alone)
    if rule == "BLR":  # IVON has its own word for subsampled sites
        _check_plates(loss, layout, probe, learned_scales_only)
    return layout


def halved(layout: Layout, guide: Any) -> Layout:
    """The layout that says which latents are small beside others, for `gradients.Split`.

    A latent is small if it has at most half as many coordinates as the largest, which has at least sixteen.
    """
    latents = {name: numbers for site in layout.sites for name, numbers in _latents_of(site, guide).items()}
    largest = max(map(len, latents.values()), default=0)
    small = frozenset(name for name, numbers in latents.items() if 2 * len(numbers) <= largest)
    if layout.members or largest < MANY or not small:
        return layout
    wide = sorted(number for name, numbers in latents.items() if name not in small for number in numbers)
    return replace(layout, small=small, wide=tuple(wide))


def _latents_of(site: Site, guide: Any) -> dict[str, list[int]]:
    """The coordinates of every latent that a site of the guide draws: its own, or all of the model's together."""
    own = list(range(site.block.start, site.block.stop))
    for part in guide.modules() if isinstance(guide, torch.nn.Module) else ():
        if isinstance(part, AutoContinuous) and site.name == f"_{part._pyro_name}_latent":
            parts = part._unpack_latent(torch.arange(len(own)))
            return {latent["name"]: [own[int(i)] for i in numbers.reshape(-1)] for latent, numbers in parts}
    return {site.name: own}


def _draws(probe: Probe, known: set[str]) -> bool:
    """Whether the guide draws values by itself at other sites than the known ones; a Newton step would follow them."""
    unknown = (message for name, message in probe.samples.items() if name not in known)
    return any(not isinstance(unwrap(message["fn"])[0], dist.Delta) for message in unknown)


def _with_points(layout: Layout, most: int) -> Layout:
    """With the parameters of no site as sites of no width, if the coordinates of all are at most so many."""
    named, others = dict(pyro.get_param_store().named_parameters()), layout.others
    start = sum(site.block.size for site in layout.sites)
    fits = start + sum(tensor.numel() for tensor in others.values()) <= most
    known = all(named.get(name) is tensor for name, tensor in others.items())
    if not (fits and known) or layout.members:
        return layout
    if len({tensor.dtype for tensor in (*layout.tensors.values(), *others.values())}) > 1:
        return layout  # one Gaussian has one precision of its numbers
    points = []
    for name, tensor in others.items():
        block = Block(start=start, shape=tuple(tensor.shape), structure="point")
        points.append(Site(name=name, loc=name, scale=(), block=block))
        start = block.stop
    stored = pyro.get_param_store()._constraints
    return replace(
        layout,
        sites=(*layout.sites, *points),
        tensors={**layout.tensors, **others},
        constraints={**layout.constraints, **{name: stored.get(name, constraints.real) for name in others}},
        others={},
    )


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
        self.indices: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        name, tensor = msg["name"], msg["value"].unconstrained()
        if id(tensor) not in self.trainable:
            return
        stored = pyro.get_param_store()._constraints  # the public get_state() strips the parameters of what SVI needs
        self.tensors[name] = tensor
        self.constraints[name] = stored.get(name, msg["kwargs"].get("constraint", constraints.real))
        self.constrained[name] = msg["value"]
        self.messages[name] = msg  # plates further in replace its value by their rows

    def rows(self) -> dict[str, Tensor]:
        """What the guide was given for every parameter, all of it or the rows of a subsampled plate."""
        return {param: msg["value"].detach() for param, msg in self.messages.items()}

    def fed(self, message: Any) -> list[tuple[str, Tensor]]:
        """What a site may be fed: parameters, but for natural ones, and the rows of its plates, if taken by hand."""
        fed = [
            (param, value) for param, value in self.rows().items() if not hasattr(self.tensors[param], "natural_field")
        ]
        if subsampled(message):
            fed += [
                (param, rows_of(value, value.ndim, message, self.indices))
                for param, value in fed
                if has_rows(value, message)
            ]
        return fed

    def naturals(self) -> list[tuple[tuple[str, ...], Natural]]:
        """The parameters that hold the fields of natural parameters, with what the guide was given for them."""
        groups: dict[tuple[str, type[Natural]], dict[str, str]] = {}
        for param, tensor in self.tensors.items():
            noted = getattr(tensor, "natural_field", None)
            if noted is not None:
                family, key = noted
                groups.setdefault((param.removesuffix(f".{key}"), family), {})[key] = param
        rows = self.rows()
        result = []
        for (_, family), group in groups.items():
            names = [item.name for item in fields(family)]  # type: ignore[arg-type]
            if set(names) == group.keys():
                result.append((tuple(group[key] for key in names), family(*(rows[group[key]] for key in names))))
        return result

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self.indices[msg["name"]] = msg["value"]
        elif not msg["is_observed"]:
            self.samples[msg["name"]] = msg


@contextmanager
def _random_values(params: list[Tensor]):
    """Random values in the parameters, for a while: a module's own `nn.Parameter` can be given them in no other way."""
    generator = torch.Generator().manual_seed(0)
    before = [param.detach().clone() for param in params]
    try:
        naturals: dict[str, dict[str, Tensor]] = {}
        families: dict[str, type[Natural]] = {}
        for param in params:
            noise = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            noted = getattr(param, "natural_field", None)
            if noted is None:
                param.data.copy_(0.1 * noise)
                continue
            name = str(pyro.get_param_store().param_name(param)).removesuffix(f".{noted[1]}")
            families[name] = noted[0]
            naturals.setdefault(name, {})[noted[1]] = param
        for name, parts in naturals.items():
            other = _other_than(families[name](**{key: part.data for key, part in parts.items()}), generator)
            for key, part in parts.items():
                part.data.copy_(getattr(other, key))
        yield
    finally:
        for param, value in zip(params, before, strict=True):
            param.data.copy_(value)


def _other_than(natural: Natural, generator: torch.Generator) -> Natural:
    """A member that is like none of another site: on the ray to λ, or beside λ where no ray leads away from it.

    That is so at λ = 0, and of finitely many values at any constant λ; λ is then free to go to all sides.
    """
    leaves = {item.name: getattr(natural, item.name) for item in fields(natural)}  # type: ignore[arg-type]
    finite = natural.discrete and natural.num_values is not None
    if any(leaf.any() for leaf in leaves.values()) and not finite:
        return natural.widened(float(0.5 + 0.5 * torch.rand((), generator=generator)))
    noise = {name: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for name, leaf in leaves.items()}
    return type(natural)(**{name: leaf + 0.1 * noise[name].to(leaf.device) for name, leaf in leaves.items()})


class _Match(NamedTuple):
    """What feeds a Gaussian site: its parameters, and the constraint whose transform the guide makes the scale by."""

    loc: str
    scale: tuple[str, ...]
    structure: Structure
    made: Any = None


def _match(name: str, message: Any, probe: Probe) -> _Match | None:
    """The parameters that feed a site, if any do, and they are no natural parameters."""
    fed = probe.fed(message)

    def source(array: Tensor, made: Callable[[Tensor], Tensor] = lambda value: value) -> str | None:
        for param, value in fed:
            if value.shape == array.shape and _same(made(value), array):
                return param
        return None

    def sources(scale_tril: Tensor) -> tuple[str, ...]:
        param = source(scale_tril)
        if param is not None:
            return (param,)
        for diagonal, first in fed:
            for unit, second in fed:
                rows_scaled = second.shape == scale_tril.shape and first.shape == second.shape[:-1]
                if rows_scaled and torch.equal(first[..., None] * second, scale_tril.detach()):
                    return (diagonal, unit)
        return ()

    def low_rank_sources(base: Any) -> tuple[str, str]:
        """s and W, of the covariance diag(s) (I + W Wᵀ) diag(s)."""
        scale = source(base.cov_diag, torch.square)
        if scale is not None:
            factor = source(base.cov_factor, lambda value: base.cov_diag.sqrt()[..., None] * value)
            if factor is not None and _identity(probe.constraints[factor]):
                return scale, factor
        raise ValueError(
            f"The low-rank covariance of site '{name}' is not recognised: expected cov_diag = s² and cov_factor = "
            "s[..., None] * W of two parameters s and W, as AutoLowRankMultivariateNormal has them. Use that guide, or "
            "a MultivariateNormal (full rank)."
        )

    def scale_source(scale: Tensor) -> tuple[str | None, Any]:
        param = source(scale)
        if param is not None:
            return param, None
        for constraint in (constraints.positive, softplus_positive):  # exp and softplus
            param = source(scale, transform_to(constraint))
            if param is not None and _identity(probe.constraints[param]):
                return param, constraint
        return None, None

    base, _ = unwrap(message["fn"])
    if isinstance(base, dist.Delta):
        # to the last bit: a draw of another site, too, may come within rounding of a parameter
        loc = next((param for param, value in fed if torch.equal(value, base.v.detach())), None)
        return None if loc is None else _Match(loc, (), "point")
    if not isinstance(
        base, (torch.distributions.Normal, dist.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)
    ):
        return None
    loc = source(base.loc)
    if loc is None or _identity(probe.constraints[loc]) is False:
        return None
    if isinstance(base, torch.distributions.LowRankMultivariateNormal):
        return _Match(loc, low_rank_sources(base), "low rank")
    if isinstance(base, torch.distributions.MultivariateNormal):
        scale = sources(base.scale_tril)
        return _Match(loc, scale, "dense" if scale else "fixed")
    parameter, made = scale_source(base.scale)
    if parameter is None or probe.constrained[parameter].shape != probe.constrained[loc].shape:
        return _Match(loc, (), "fixed")
    return _Match(loc, (parameter,), "diagonal", made)


def _without_repeated_points(found: list[tuple[str, _Match]]) -> list[tuple[str, _Match]]:
    """The sites without the Deltas at a parameter that an earlier Delta is at: all of them are one point.

    AutoLaplaceApproximation draws all latents in one Delta, and gives a latent vector that is all there is on as it is.
    """
    first: dict[str, str] = {}
    points = {name: first.setdefault(match.loc, name) for name, match in found if match.structure == "point"}
    return [site for site in found if points.get(site[0], site[0]) == site[0]]


def _match_member(message: Any, probe: Probe) -> Member | None:
    """The site as a member of a family, if all that determines it comes from parameters."""
    fn = message["fn"]
    base, transforms = unwrap(fn)
    if transforms or not has_family(base) or base.shape() != fn.shape():
        return None  # one member for many draws of a plate is no batch of its own
    if message["infer"].get("enumerate") is not None:
        return None  # the loss sums it out
    natural = natural_of(base)
    sources = _natural_source(natural, probe) or _host_sources(base, type(natural), probe, message)
    if sources is None:
        return None
    params, keys = sources
    return Member(
        name=message["name"],
        sites=(message["name"],),
        family=type(natural),
        params=params,
        keys=keys,
        distribution=type(base),
        plates=plates_of(message),
        local=bool(subsampled(message)),
    )


def _joint_members(probe: Probe) -> list[Member]:
    """The members of joint families, whose sites say of which parameter they are which component (`JOINT`)."""
    components: dict[str, dict[int, Any]] = {}
    for message in probe.samples.values():
        if JOINT in message["infer"]:
            param, index = message["infer"][JOINT]
            components.setdefault(param, {})[index] = message
    members = []
    for params, natural in probe.naturals():
        messages = components.get(params[0].rpartition(".")[0])
        if messages is None:
            continue
        sites = tuple(messages[index]["name"] for index in sorted(messages))
        members.append(
            Member(
                name=",".join(sites),
                sites=sites,
                family=type(natural),
                params=params,
                keys=(),
                distribution=type(natural.to_distribution()),
                plates=plates_of(messages[0]),
                local=bool(subsampled(messages[0])),
            )
        )
    return members


def _natural_source(natural: Natural, probe: Probe) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    for params, value in probe.naturals():
        # both by way of the host, which normalises where a family's λ is determined up to a constant
        if type(value) is type(natural) and _same(natural_of(value.to_distribution()).flat(), natural.flat()):
            return params, ()
    return None


def _host_sources(
    base: Any, family: type[Natural], probe: Probe, message: Any
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The parameters that feed all parameters of the host's distribution, in one of the ways that it has."""
    if family in (NormalNatural, MultivariateNormalNatural):
        return None  # a site of the Gaussian, or none
    fed = probe.fed(message)

    def source(keys: tuple[str, ...], key: str) -> str | None:
        array = getattr(base, key)
        for param, value in fed:
            # logits and probs come back normalised
            if value.shape == array.shape and (
                _same(value, array) or (len(keys) == 1 and _same(getattr(type(base)(**{key: value}), key), array))
            ):
                return param
        return None

    for keys in family.host_parameters:
        if not all(hasattr(base, key) for key in keys):
            continue
        params = tuple(source(keys, key) for key in keys)
        shapes = {probe.constrained[param].shape for param in params if param is not None}
        if None not in params and len(shapes) == 1:
            return params, keys  # type: ignore[return-value]
    return None


def _same(value: Tensor, other: Tensor) -> bool:
    # equal but for rounding; the probes are random, so nothing else is this close
    return value.shape == other.shape and torch.allclose(value, other.detach(), rtol=1e-5, atol=0)


def _identity(constraint: Any) -> bool:
    return constraint in (constraints.real, constraints.real_vector) or (
        isinstance(constraint, constraints.independent) and _identity(constraint.base_constraint)
    )


WANTED = {  # by rule: sites, and guides that have them
    "BLR": (
        "sites of exponential families (Normal, MultivariateNormal, Delta, Gamma, Beta, Dirichlet, Categorical, ...)",
        "AutoNormal, AutoMultivariateNormal or AutoExponentialFamily",
    ),
    "IVON": ("sites that are independent Normals", "AutoNormal or AutoDiagonalNormal"),
}


def _report(layout: Layout, probe: Probe, rule: str, alone: bool) -> None:
    if alone and not layout.sites and not layout.members:
        sites = {name: unwrap(message["fn"])[0] for name, message in probe.samples.items()}
        described = ", ".join(f"'{name}': {_described(fn)}" for name, fn in sites.items()) or "no site at all"
        sites_of_rule, guides_of_rule = WANTED[rule]
        raise ValueError(
            f"{rule} expected a guide with {sites_of_rule} whose parameters are parameters of their own, not "
            f"slices or functions of some; the guide has {described}. "
            f"Use {guides_of_rule}, or pyro.optim.Adam for this guide."
        )
    if layout.others:
        warnings.warn(
            f"{rule}: the parameters {', '.join(layout.others)} belong to no site that {rule} recognises; they are "
            f"updated by `others` (pyro.optim.Adam({{'lr': {OTHERS_RATE[rule]}}}) unless given) from the same "
            "gradients.",
            stacklevel=5,
        )


def _described(fn: Any) -> str:
    """A distribution of a site that was not recognised."""
    return f"{type(fn).__name__} (not of parameters alone)" if has_family(fn) else type(fn).__name__


def _check_plates(loss: Any, layout: Layout, probe: Probe, learned_scales_only: bool) -> None:
    sites = [site.name for site in layout.sites if not site.bare]
    local = [name for name in sites if subsampled(probe.samples[name])]
    local += [site for member in layout.members if member.local for site in member.sites]
    if local and loss.num_particles > 1 and not loss.vectorize_particles:
        raise ValueError(
            f"The latent sites {', '.join(local)} lie in a subsampled plate: every particle would see other rows. "
            "Use num_particles=1; BLR takes several draws a step of its own (`num_draws`)."
        )
    weighted = [name for name in sites if probe.samples[name]["scale"] != 1]
    if learned_scales_only and weighted:
        raise ValueError(
            f"estimator='gradient' cannot tell how often the sites {', '.join(weighted)} of a subsampled or scaled "
            "plate enter the stock gradients. Use the default estimator for this guide."
        )
