"""Which parameters of a NumPyro guide are which natural parameters.

`SVI` tells an optimizer the names and values of the parameters, and not which one is the location of which site.
`recognise` asks the guide itself: it runs the guide once with random parameter values and looks for them in the
distributions that come out.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import block, seed, substitute, trace
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoContinuous

from ..families import Block, Natural, Structure, natural_of
from ._layout import (
    EVENT_DIM,
    JOINT,
    Layout,
    Member,
    Site,
    has_family,
    natural_rows,
    plates_of,
    rows_of,
    subsampled,
    unwrap,
)
from ._options import OTHERS_RATE

__all__ = ["check_not_traced", "halved", "recognise"]

MANY = 16


def recognise(
    svi: SVI,
    args: tuple,
    kwargs: dict,
    params: Mapping[str, Any],
    *,
    learned_scales_only: bool,
    rule: str = "BLR",
    points: int = 0,
) -> Layout:
    """The sites of `svi.guide` that are members of exponential families and the parameters that feed them.

    A parameter feeds an array if a random value given to the parameter comes back as that array, all of it or the
    rows of a subsampled plate, or as its exp or softplus where it is to be a scale. Other derived arrays (a neural
    network's output) do not come back and are left to the other optimizer, or, where there are at most `points`
    coordinates in all, are points beside the sites. Messages call the optimizer `rule`.
    """
    kwargs, found = {**kwargs, **svi.static_kwargs}, []
    guide_trace, fed, arrays, naturals = _probe(svi, args, kwargs, params, any_family=False)
    for name in [name for name in guide_trace if name in arrays]:  # in the order of the guide, which jit has sorted
        match = _match(name, unwrap(guide_trace[name]["fn"])[0], arrays[name], fed[name], guide_trace)
        if match is not None and not (learned_scales_only and match.scale is None):
            found.append((name, match))
    found = _without_repeated_points(found)
    if any(has_family(unwrap(guide_trace[name]["fn"])[0]) for name in set(arrays) - {site for site, _ in found}):
        guide_trace, fed, arrays, naturals = _probe(svi, args, kwargs, params, any_family=True)
    members = _joint_members(guide_trace, params)
    joint = {site for member in members for site in member.sites}
    for name in [name for name in guide_trace if name in naturals]:
        member = _match_member(guide_trace[name], naturals[name], arrays[name], fed[name], guide_trace)
        if member is not None and name not in joint | {site for site, _ in found}:
            members.append(member)

    uses = Counter(param for _, match in found for param in match.params)
    uses.update(param for member in members for param in member.params)
    sites, start = [], 0
    for name, match in found:
        if any(uses[param] > 1 for param in match.params):
            continue  # one parameter for several sites is no Gaussian of its own
        block = Block(start=start, shape=params[match.loc].shape, structure=match.structure)
        sites.append(Site(name, match.loc, match.scale, block, match.constraint, factor=match.factor))
        start = block.stop
    members = [member for member in members if all(uses[param] == 1 for param in member.params)]
    claimed = {param for site in sites for param in site.params}
    claimed |= {param for member in members for param in member.params}
    others = tuple(name for name in params if name not in claimed and not _is_empty(params[name]))
    layout = Layout(tuple(sites), tuple(members), others)
    known = {site.name for site in sites} | {site for member in members for site in member.sites}
    # for maximum likelihood there is no site at all
    if (sites or not arrays) and not _draws(guide_trace, set(arrays) - known):
        layout = _with_points(layout, params, points)
    _report(layout, guide_trace, params, rule)
    if rule == "BLR":  # IVON has its own word for subsampled sites
        _check_plates(svi, layout, guide_trace)
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
    for part in (guide, *getattr(guide, "_guides", ())):
        if isinstance(part, AutoContinuous) and site.name == f"_{part.prefix}_latent" and part.latent_dim == len(own):
            with jax.ensure_compile_time_eval():
                parts = part._unpack_latent(jnp.arange(len(own), dtype=float))
                return {name: [own[int(i)] for i in np.ravel(numbers)] for name, numbers in parts.items()}
    return {site.name: own}


def _draws(guide_trace: dict, unknown: set[str]) -> bool:
    """Whether the guide draws values by itself at sites that are not known; a Newton step would follow them."""
    return any(not isinstance(unwrap(guide_trace[name]["fn"])[0], dist.Delta) for name in unknown)


def _with_points(layout: Layout, params: Mapping[str, Any], most: int) -> Layout:
    """With the parameters of no site as sites of no width, if the coordinates of all are at most so many."""
    arrays = {name: params[name] for name in layout.others if isinstance(params[name], jax.Array)}
    start = sum(site.block.size for site in layout.sites)
    fits = start + sum(array.size for array in arrays.values()) <= most
    if not fits or layout.members or len(arrays) < len(layout.others):
        return layout
    if len({params[site.loc].dtype for site in layout.sites} | {array.dtype for array in arrays.values()}) > 1:
        return layout  # one Gaussian has one precision of its numbers
    points = []
    for name, array in arrays.items():
        block = Block(start=start, shape=array.shape, structure="point")
        points.append(Site(name=name, loc=name, scale=None, block=block, constraint=None))
        start = block.stop
    return Layout((*layout.sites, *points), (), ())


def _is_empty(param: Any) -> bool:
    """Whether there is no number in it to move, as in the weights of a regression without covariates."""
    leaves = jax.tree.leaves(param)
    return bool(leaves) and not any(np.size(leaf) for leaf in leaves)


def _probe(
    svi: SVI, args: tuple, kwargs: dict, params: Mapping[str, Any], *, any_family: bool
) -> tuple[dict, dict, dict, dict]:
    """The guide's trace and, by sample site, the random values that parameters have there and what was made of them.

    These are the arrays of Gaussians and, with `any_family`, the natural parameters of all members of a family, which
    take longer to compile than the guide.
    """
    messages: dict[str, dict] = {}

    def run(probes: dict[str, Any]) -> tuple[dict, dict, dict, dict]:
        messages.update(
            trace(substitute(seed(svi.guide, 0), substitute_fn=partial(_constrained, probes))).get_trace(
                *args, **kwargs
            )
        )
        values = {
            name: _fed_rows(message, messages)
            for name, message in messages.items()
            if message["type"] == "param" and name in probes
        }
        bases = {
            name: unwrap(message["fn"])[0]
            for name, message in messages.items()
            if message["type"] == "sample" and not message["is_observed"]
        }
        naturals = {name: natural_of(base) for name, base in bases.items() if any_family and has_family(base)}
        keys = {name: [key for keys in natural.host_parameters for key in keys] for name, natural in naturals.items()}
        by_hand = {name: _rows_by_hand(values, messages[name], messages) for name in bases}
        arrays = {
            name: {key: getattr(base, key) for key in _ARRAYS.get(type(base), keys.get(name, ()))}
            for name, base in bases.items()
        }
        return values, by_hand, arrays, naturals

    generator = np.random.default_rng(0)
    probes: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Natural):
            check_not_traced(value)
            probes[name] = _other_than(value, generator)
        elif isinstance(value, jax.Array):
            probes[name] = generator.normal(scale=0.1, size=value.shape).astype(value.dtype)
    # compiled ahead of time, so that the values are concrete even where SVI.init itself is being traced by jit or vmap
    with block():
        compiled = jax.jit(run).lower(probes).compile()
    values, by_hand, arrays, naturals = compiled(probes)
    return messages, {name: [values, rows] for name, rows in by_hand.items()}, arrays, naturals


def _other_than(natural: Natural, generator: np.random.Generator) -> Natural:
    """A member that is like none of another site: on the ray to λ, or beside λ where no ray leads away from it.

    That is so at λ = 0, and of finitely many values at any constant λ; λ is then free to go to all sides.
    """
    finite = natural.discrete and natural.num_values is not None
    if any(np.any(leaf) for leaf in jax.tree.leaves(natural)) and not finite:
        return natural.widened(generator.uniform(0.5, 1.0))
    return jax.tree.map(lambda leaf: leaf + generator.normal(scale=0.1, size=leaf.shape).astype(leaf.dtype), natural)


def check_not_traced(arrays: Any) -> None:
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(arrays)):
        raise TypeError(
            "how the sites of an exponential-family guide take part is found by evaluating the loss: call `svi.init` "
            "(or `svi.run`) outside jit, vmap and scan. `svi.update` runs inside them."
        )


def _constrained(probes: dict[str, Any], message: dict) -> Any:
    if message["type"] != "param" or message["name"] not in probes:
        return None
    probe, constraint = probes[message["name"]], _constraint(message)
    if isinstance(probe, Natural):
        return probe
    if constraint in _LOWER_CHOLESKY:
        size = math.isqrt(2 * probe.shape[-1])  # of D (D + 1)/2 numbers
        rows = np.random.default_rng(1).normal(scale=0.1, size=(*probe.shape[:-1], size, size))
        return np.tril(rows + np.eye(size)).astype(probe.dtype)  # itself: the transform takes long to compile
    return biject_to(constraint)(probe)


_LOWER_CHOLESKY = (
    constraints.lower_cholesky,
    constraints.scaled_unit_lower_cholesky,
    constraints.softplus_lower_cholesky,
)


class _Match(NamedTuple):
    """What feeds a Gaussian site: its parameters, and how the scale comes from what SVI keeps of it."""

    loc: str
    scale: str | None
    structure: Structure
    constraint: Any = None
    factor: str | None = None

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(name for name in (self.loc, self.scale, self.factor) if name is not None)


def _without_repeated_points(found: list[tuple[str, _Match]]) -> list[tuple[str, _Match]]:
    """The sites without the Deltas at a parameter that an earlier Delta is at: all of them are one point.

    AutoLaplaceApproximation draws all latents in one Delta, and gives a latent vector that is all there is on as it is.
    """
    first: dict[str, str] = {}
    points = {name: first.setdefault(match.loc, name) for name, match in found if match.structure == "point"}
    return [site for site in found if points.get(site[0], site[0]) == site[0]]


def _match_member(
    message: dict, natural: Natural, arrays: dict[str, Array], fed: list[dict[str, Any]], guide_trace: dict
) -> Member | None:
    """The site as a member of a family, if all that determines it comes from parameters."""
    fn = message["fn"]
    base, transforms = unwrap(fn)
    if transforms or base.shape() != _base_value_shape(message):
        return None  # one member for many draws of a plate is no batch of its own
    sources = _natural_source(natural, fed) or _host_sources(type(natural), arrays, fed, guide_trace)
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
        plates=plates_of(message, guide_trace),
        local=bool(subsampled(message, guide_trace)),
        constraints=tuple(_constraint(guide_trace[param]) for param in params),
    )


def _joint_members(guide_trace: dict, params: Mapping[str, Any]) -> list[Member]:
    """The members of joint families, whose sites say of which parameter they are which component (`JOINT`)."""
    components: dict[str, dict[int, dict]] = {}
    for message in guide_trace.values():
        if message["type"] == "sample" and JOINT in message["infer"]:
            param, index = message["infer"][JOINT]
            components.setdefault(param, {})[index] = message
    members = []
    for param, messages in components.items():
        sites = tuple(messages[index]["name"] for index in sorted(messages))
        members.append(
            Member(
                name=",".join(sites),
                sites=sites,
                family=type(params[param]),
                params=(param,),
                keys=(),
                distribution=type(params[param].to_distribution()),
                plates=plates_of(messages[0], guide_trace),
                local=bool(subsampled(messages[0], guide_trace)),
                constraints=(constraints.real,),
            )
        )
    return members


def _natural_source(natural: Natural, fed: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    for param, value in fed[0].items():
        # both by way of the host, which normalises where a family's λ is determined up to a constant
        if type(value) is type(natural) and _same(natural_of(value.to_distribution()).flat(), natural.flat()):
            return (param,), ()
    return None


def _host_sources(
    family: type[Natural], arrays: dict[str, Array], fed: list[dict[str, Any]], guide_trace: dict
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The parameters that feed all parameters of the host's distribution, in one of the ways that it has."""
    for keys in family.host_parameters:
        params = tuple(_source(arrays[key], fed) for key in keys if key in arrays)
        shapes = {jnp.shape(guide_trace[param]["value"]) for param in params if param is not None}
        if len(params) == len(keys) and None not in params and len(shapes) == 1:
            return params, keys  # type: ignore[return-value]
    return None


def _source(
    array: Array, fed: list[dict[str, Any]], made: Callable[[Array], Array] = lambda value: value
) -> str | None:
    """The parameter of which the guide has `made` this array."""
    for values in fed:
        for param, value in values.items():
            if not isinstance(value, Natural) and value.shape == array.shape and _same(made(value), array):
                return param
    return None


def _same(value: Array, other: Array) -> bool:
    # equal but for the rounding of a fused computation; the probes are random, so nothing else is this close, and the
    # first few numbers say so of all others but one
    one, two = np.asarray(value), np.asarray(other)
    parts = (slice(8), slice(8, None))
    return one.shape == two.shape and all(
        np.allclose(one.ravel()[part], two.ravel()[part], rtol=1e-5, atol=0) for part in parts
    )


def _match(
    name: str, base: Any, arrays: dict[str, Array], fed: list[dict[str, Any]], guide_trace: dict
) -> _Match | None:
    """The parameters that feed a site, if any do."""
    if isinstance(base, dist.Delta):
        loc = _source(arrays["v"], fed)
        return None if loc is None else _Match(loc, None, "point")
    if not isinstance(base, (dist.Normal, dist.MultivariateNormal, dist.LowRankMultivariateNormal)):
        return None
    loc = _source(arrays["loc"], fed)
    if loc is None or not _unconstrained(guide_trace[loc]):
        return None
    if isinstance(base, dist.LowRankMultivariateNormal):
        return _match_low_rank(name, loc, arrays, fed, guide_trace)
    if isinstance(base, dist.MultivariateNormal):
        scale = _source(arrays["scale_tril"], fed)
        return (
            _Match(loc, None, "fixed")
            if scale is None
            else _Match(loc, scale, "dense", _constraint(guide_trace[scale]))
        )
    if base.shape() != _base_value_shape(guide_trace[name]):
        return None  # one location for many draws of a plate
    scale, constraint = _scale_source(arrays["scale"], fed, guide_trace)
    if scale is None or guide_trace[scale]["value"].shape != guide_trace[loc]["value"].shape:
        return _Match(loc, None, "fixed")
    return _Match(loc, scale, "diagonal", constraint)


def _match_low_rank(
    name: str, loc: str, arrays: dict[str, Array], fed: list[dict[str, Any]], guide_trace: dict
) -> _Match:
    """Of the covariance diag(s) (I + W Wᵀ) diag(s) whose s and W are parameters."""
    scale = _source(arrays["cov_diag"], fed, jnp.square)
    if scale is not None:
        made = jnp.sqrt(arrays["cov_diag"])
        factor = _source(arrays["cov_factor"], fed, lambda value: made[..., None] * value)
        if factor is not None and _unconstrained(guide_trace[factor]):
            return _Match(loc, scale, "low rank", _constraint(guide_trace[scale]), factor)
    raise ValueError(
        f"The low-rank covariance of site '{name}' is not recognised: expected cov_diag = s² and cov_factor = "
        "s[..., None] * W of two parameters s and W, as AutoLowRankMultivariateNormal has them. Use that guide, or a "
        "MultivariateNormal (full rank)."
    )


def _scale_source(array: Array, fed: list[dict[str, Any]], guide_trace: dict) -> tuple[str | None, Any]:
    """The parameter that is a scale, or that the guide makes one of, and its constraint or what does the same."""
    scale = _source(array, fed)
    if scale is not None:
        return scale, _constraint(guide_trace[scale])
    for constraint in (constraints.positive, constraints.softplus_positive):  # exp and softplus
        scale = _source(array, fed, biject_to(constraint))
        if scale is not None and _unconstrained(guide_trace[scale]):
            return scale, constraint
    return None, None


def _unconstrained(message: dict) -> bool:
    return isinstance(biject_to(_constraint(message)), _IDENTITIES)


_IDENTITIES = (type(biject_to(constraints.real)), type(biject_to(constraints.real_vector)))


_ARRAYS = {
    dist.Normal: ("loc", "scale"),
    dist.MultivariateNormal: ("loc", "scale_tril"),
    dist.LowRankMultivariateNormal: ("loc", "cov_factor", "cov_diag"),
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


def _fed_rows(message: dict, guide_trace: dict) -> Any:
    """The rows of a parameter that the subsampled plates let through, as `numpyro.plate` takes them."""
    value, event_dim = message["value"], message["kwargs"].get("event_dim")
    if isinstance(value, Natural):
        return natural_rows(value, message["kwargs"].get(EVENT_DIM, 0), subsampled(message, guide_trace))
    return value if event_dim is None else rows_of(value, event_dim, subsampled(message, guide_trace))


def _rows_by_hand(values: dict[str, Any], message: dict, guide_trace: dict) -> dict[str, Array]:
    """The rows that a guide may take of each parameter to feed a site in subsampled plates."""
    frames = subsampled(message, guide_trace)
    arrays = {name: value for name, value in values.items() if frames and not isinstance(value, Natural)}
    return {name: rows_of(value, len(message["fn"].event_shape), frames) for name, value in arrays.items()}


WANTED = {  # by rule: sites, and guides that have them
    "BLR": (
        "sites of exponential families (Normal, MultivariateNormal, Delta, Gamma, Beta, Dirichlet, Categorical, ...)",
        "AutoNormal, AutoMultivariateNormal or AutoExponentialFamily",
    ),
    "IVON": ("sites that are independent Normals", "AutoNormal or AutoDiagonalNormal"),
}


def _report(layout: Layout, guide_trace: dict, params: Mapping[str, Any], rule: str) -> None:
    sites = {
        name: unwrap(message["fn"])[0]
        for name, message in guide_trace.items()
        if message["type"] == "sample" and not message["is_observed"]
    }
    if not layout.sites and not layout.members:
        described = ", ".join(f"'{name}': {_described(fn)}" for name, fn in sites.items()) or "no site at all"
        sites_of_rule, guides_of_rule = WANTED[rule]
        raise ValueError(
            f"{rule} expected a guide with {sites_of_rule} whose parameters are parameters of their own, not "
            f"slices or functions of some; the guide has {described}. "
            f"Use {guides_of_rule}, or numpyro.optim.Adam for this guide."
        )
    others = [name for name in layout.others if jax.tree.leaves(params[name])]  # a module's shapes alone need no one
    if others:
        warnings.warn(
            f"{rule}: the parameters {', '.join(others)} belong to no site that {rule} recognises; they are "
            f"updated by `others` (numpyro.optim.Adam({OTHERS_RATE[rule]}) unless given) from the same gradients.",
            stacklevel=5,
        )


def _described(fn: Any) -> str:
    """A distribution of a site that was not recognised."""
    return f"{type(fn).__name__} (not of parameters alone)" if has_family(fn) else type(fn).__name__


def _check_plates(svi: SVI, layout: Layout, guide_trace: dict) -> None:
    sites = [site.name for site in layout.sites if not site.bare]
    local = [name for name in sites if subsampled(guide_trace[name], guide_trace)]
    local += [site for member in layout.members if member.local for site in member.sites]
    if local and svi.loss.num_particles > 1:
        raise ValueError(
            f"The latent sites {', '.join(local)} lie in a subsampled plate: every particle would see other rows. "
            "Use num_particles=1; BLR takes several draws a step of its own (`num_draws`)."
        )
