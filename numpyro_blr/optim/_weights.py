"""NumPyro's model and loss, seen from a rule for many weights: part by part, at draws of its own.

A part is a site of the guide. Every array keeps the shape of its site: a vector of all weights costs a copy of them at
every step, and is no faster.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array, random
from numpyro.distributions import constraints
from numpyro.distributions.util import sum_rightmost
from numpyro.handlers import block, replay, seed, substitute, trace
from numpyro.infer import SVI
from numpyro.primitives import Messenger

from ._ivon import Prior, Weights, there
from ._layout import Layout, Site, subsampled, unwrap
from ._noise import bits, materialised_normals

__all__ = ["LogDensity", "Pair", "Perturb", "check_layout", "placeholders", "survey"]

GROUPS = 32  # of sites whose noise is one array
CHUNK = 2**18  # weights at which a group is full, if there are not more than `GROUPS` times as many


def check_layout(layout: Layout) -> None:
    """A rule for independent Normals takes no other family, and no Normal with one parameter for its two."""
    foreign = [site.name for site in layout.sites if site.block.structure != "diagonal" or site.scale is None]
    foreign += [member.name for member in layout.members]
    if foreign or not layout.sites:
        raise ValueError(
            "IVON expected a mean-field guide, whose sites are Normals with parameters for location and scale; "
            f"{', '.join(map(repr, foreign)) or 'no site'} is different. Use AutoNormal or AutoDiagonalNormal, or BLR."
        )


def placeholders(layout: Layout, loc: Weights) -> dict[str, Array]:
    """Values of the guide's own parameters, of which nothing depends once `Perturb` has given every site its value."""
    return {name: jnp.zeros_like(loc[site.name]) for site in layout.sites for name in (site.loc, site.scale) if name}


def survey(
    svi: SVI, args: tuple, kwargs: dict, layout: Layout, params: Mapping[str, Any], mutable_state: Mapping[str, Any]
) -> tuple[float, dict]:
    """N and the prior of each site, in the units of the averaged loss, read off the model.

    N is the number of data that the loss stands for: the sum over the observed sites of the scale (of a subsampled
    plate, or of a handler) of each of their elements. A site has a `Prior` of its own where the model gives it a Normal
    whose parameters are constants; elsewhere δ = 0, and the prior's term stays in the loss.
    """
    kwargs = {**kwargs, **svi.static_kwargs}
    constrained = {**svi.constrain_fn(dict(params)), **mutable_state}
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs, constrained))):
        raise TypeError(
            "IVON reads the number of data and the prior off the model in SVI.init, and was given traced values. "
            "Call svi.init (or svi.run) outside of jit and vmap; svi.update may be traced."
        )

    @jax.jit  # what is asked for is a handful of constants; the network itself is left out when compiled
    def look(key: Array) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        with block(), seed(rng_seed=key):
            guide_trace = trace(substitute(svi.guide, constrained)).get_trace(*args, **kwargs)
            model = replay(substitute(svi.model, constrained), guide_trace)
            model_trace = trace(model).get_trace(*args, **kwargs)
        for site, seen in ((site, seen) for site in layout.sites for seen in (guide_trace, model_trace)):
            if site.name in seen:
                _check_site(seen[site.name], seen)
        observed = [site for site in model_trace.values() if site["type"] == "sample" and site["is_observed"]]
        num_data = sum((_num_elements(site) for site in observed), start=jnp.zeros(()))
        return num_data, {
            site.name: (base.loc, base.scale)
            for site in layout.sites
            if site.name in model_trace and (base := _normal(model_trace[site.name])) is not None
        }

    (num_data, first), (_, second) = look(random.key(0)), look(random.key(1))
    if not num_data > 0:
        raise ValueError(
            "IVON found no data: the model has no observed site (`obs=`), or a scale of zero, and the rule "
            "averages over the data. Pass the data to svi.init as to svi.update, or use BLR."
        )
    priors = {}
    for site in layout.sites:
        loc, precision = jnp.zeros(()), jnp.zeros(())
        if site.name in first and _same(first[site.name], second[site.name]):
            loc, scale = first[site.name]
            precision = 1 / (num_data * scale**2)
        dtype = params[site.loc].dtype
        priors[site.name] = Prior(jnp.asarray(loc, dtype), jnp.asarray(precision, dtype))
    return float(num_data), priors


def _check_site(message: dict, guide_trace: dict) -> None:
    if subsampled(message, guide_trace) or message["scale"] is not None:
        raise ValueError(
            f"IVON averages over all data, and the latent site '{message['name']}' is scaled or lies in a subsampled "
            "plate, whose rows come and go. Use BLR for local latents; for a cold posterior use `temperature`."
        )


def _num_elements(message: dict) -> Array:
    """Σ of the scale over the elements that are not masked; a batch that `to_event` made an event counts as a batch."""
    fn = message["fn"]
    weight = jnp.asarray(1.0 if message["scale"] is None else message["scale"], float) * jnp.ones(fn.batch_shape)
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            weight = jnp.where(fn._mask, weight, 0.0)
        elif isinstance(fn, dist.Independent):
            axes = fn.event_shape[: fn.reinterpreted_batch_ndims]
            weight = weight.reshape(weight.shape + (1,) * len(axes)) * jnp.ones(axes)
        fn = fn.base_dist
    return weight.sum()


def _normal(message: dict) -> Any:
    """The prior of a site, where it is a Normal for each of its elements, of which none is masked."""
    (base, transforms), fn = unwrap(message["fn"]), message["fn"]
    while fn is not base and not isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return base if fn is base and isinstance(base, dist.Normal) and not transforms else None


def _same(pair: tuple[Array, Array], other: tuple[Array, Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(pair, other, strict=True))


class LogDensity(dist.Distribution):
    """Stands for a distribution in the loss, by a log density that is known already, [*batch]."""

    support = constraints.real
    pytree_data_fields = ("log_density",)

    def __init__(self, log_density: Array, event_shape: tuple[int, ...] = ()) -> None:
        self.log_density = log_density
        super().__init__(jnp.shape(log_density), event_shape)

    def log_prob(self, value: Array) -> Array:
        return self.log_density


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pair:
    """What the second draw of an antithetic pair takes from the first.

    Attributes:
        words: of which its noise is a function.
        due: whether the next draw is the second.
    """

    words: Array
    due: Array


@jax.custom_vjp
def perturbed(loc: Array, stretch: Array, offset: Array) -> Array:
    """w = m + (1 + r) σ ε at r = 0, of the `offset` σ ε, which is not kept for the gradient: it is w − m."""
    return loc + offset


def _perturbed_forward(loc: Array, stretch: Array, offset: Array) -> tuple[Array, tuple]:
    value = perturbed(loc, stretch, offset)
    return value, (value, loc)


def _perturbed_backward(saved: tuple, cotangent: Array) -> tuple:
    value, loc = saved
    return cotangent, cotangent * (value - loc), jnp.zeros_like(value)


perturbed.defvjp(_perturbed_forward, _perturbed_backward)


@jax.custom_vjp
def without(value: Array, loc: Array, stretch: Array, slope: Array, curvature: Array) -> Array:
    """0, with the gradient of −⟨a, w − m⟩ − ½ b (w − m)² with respect to r alone: its value, nobody asks for."""
    return 0 * value.reshape(-1)[0]  # of the value, so that every particle has its own under vmap


def _without_forward(value: Array, loc: Array, stretch: Array, slope: Array, curvature: Array) -> tuple[Array, tuple]:
    return without(value, loc, stretch, slope, curvature), (value, loc, slope, curvature)


def _without_backward(saved: tuple, cotangent: Array) -> tuple:
    value, loc, slope, curvature = saved
    offset = value - loc
    stretched = -cotangent * (slope + curvature * offset) * offset
    return (*map(jnp.zeros_like, (value, loc)), stretched, *map(jnp.zeros_like, (slope, curvature)))


without.defvjp(_without_forward, _without_backward)


class Perturb(Messenger):
    """Gives each site of the guide the value w = m + σ ε; its log q, and the terms of `known` priors, leave the loss.

    `stretch` is r = 0 for each weight, for the gradient with respect to (1 + r) σ, from which that of ⟨a, w − m⟩ +
    ½ b (w − m)² is taken, with a site's `surrogate` (a, b).

    ε of a group of sites is one array, cut into theirs: a generator for each takes twice as long to compile, and one
    for all a copy of the weights. It is a function of two `words`: those of `pair` where it is due, and the draw is the
    mirror image of the last, m − σ ε; else of the key that the host gives the first site, so that particles have draws
    of their own, and of the position on `axis_name`, so that workers have.
    """

    def __init__(
        self,
        layout: Layout,
        loc: Weights,
        stretch: Weights,
        scale: Weights,
        surrogate: Mapping[str, tuple[Array, Array]],
        pair: Pair,
        known: Collection[str],
        axis_name: Any,
    ) -> None:
        super().__init__(None)
        self.sites = {site.name: site for site in layout.sites}
        self.loc, self.stretch, self.scale, self.surrogate = loc, stretch, scale, surrogate
        self.known = known
        self.axis_name = axis_name
        self.pair = pair
        self.words: list[Array] = []  # one pair of them each time the guide is traced, as `TraceGraph_ELBO` does twice
        self.groups = grouped({site.name: loc[site.name].size for site in layout.sites})  # as the guide draws them
        self.noise: Weights = {}  # of sites that are yet to be drawn
        self.latest = next(iter(loc.values()))  # what was drawn last

    def process_message(self, msg: dict) -> None:
        if msg["type"] != "sample" or msg["name"] not in self.sites:
            return
        if msg["value"] is None:
            self._draw(msg, self.sites[msg["name"]])
        elif msg["name"] in self.known:
            msg["fn"] = LogDensity(jnp.zeros(msg["fn"].batch_shape), msg["fn"].event_shape)

    def _draw(self, msg: dict, site: Site) -> None:
        _, transforms = unwrap(msg["fn"])
        loc, stretch = self.loc[site.name], self.stretch[site.name]
        if site.name not in self.noise:
            self.noise |= self._noise_of_group(site.name, msg["kwargs"]["rng_key"])
        self.latest = value = perturbed(loc, stretch, self.scale[site.name] * self.noise.pop(site.name))
        log_density = jnp.zeros(msg["fn"].batch_shape, loc.dtype)
        event_shape, share = msg["fn"].event_shape, without(value, loc, stretch, *self.surrogate[site.name])
        log_density += share / max(1, log_density.size)
        for transform in transforms:
            inner, value = value, transform(value)
            jacobian = transform.log_abs_det_jacobian(inner, value)
            log_density = log_density - sum_rightmost(jacobian, jacobian.ndim - log_density.ndim)
        msg["value"], msg["fn"], msg["intermediates"] = value, LogDensity(log_density, event_shape), []

    def _noise_of_group(self, first: str, rng_key: Array) -> Weights:
        """±ε of the sites that share an array with the `first` of them, made once what was drawn before is there."""
        number, names = next((number, group) for number, group in enumerate(self.groups) if first in group)
        if number == 0:
            if self.axis_name is not None:
                rng_key = random.fold_in(rng_key, jax.lax.axis_index(self.axis_name))
            self.words.append(jnp.where(self.pair.due, self.pair.words, bits(rng_key, 2)))
        rng_key = random.fold_in(random.wrap_key_data(self.words[-1], impl="threefry2x32"), number)
        locs = [self.loc[name] for name in names]
        ends = np.cumsum([loc.size for loc in locs])
        zero = jnp.where(there(jax.lax.stop_gradient(self.latest)), 0, jnp.nan).astype(jnp.result_type(*locs))
        pieces = jnp.split(materialised_normals(rng_key, int(ends[-1]), zero), ends[:-1])
        sign = jnp.where(self.pair.due, -1, 1)
        return {
            name: (sign * piece).reshape(loc.shape).astype(loc.dtype)
            for name, piece, loc in zip(names, pieces, locs, strict=True)
        }


def grouped(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names, in order, in groups of about the same size together: some `GROUPS`, or as few as `CHUNK` allows."""
    groups: list[list[str]] = []
    limit, room = max(CHUNK, sum(sizes.values()) // GROUPS), 0
    for name, size in sizes.items():
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups
