"""NumPyro's SVI, seen from its optimizer: who is calling, and the loss as a function of the Gaussian and the noise."""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import numpyro.optim
from jax import Array, lax, random
from jax.extend.core import ClosedJaxpr, Jaxpr
from numpyro.handlers import seed, trace
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.util import log_density
from numpyro.optim import _NumPyroOptim
from numpyro.primitives import Messenger

from ..gradients import Draws, Extras, Objective
from ._layout import Layout, Member, Site, gather, rows_of, scatter, subsampled, unwrap
from ._options import OTHERS_RATE

__all__ = [
    "Members",
    "Redraw",
    "arguments_of_step",
    "bends",
    "calling_svi",
    "check_loss",
    "check_params",
    "checked_state",
    "frame_of",
    "host_optimizer",
    "joint_noise",
    "key_of",
    "loss_of",
    "mutable_state",
    "objective_of",
    "report_skipped",
    "standard_normal",
    "survey",
]

BENDS = {"abs", "max", "min", "clamp"}
KINKED = dist.Laplace, dist.AsymmetricLaplace, dist.AsymmetricLaplaceQuantile
NUMERIC = (jax.Array, np.ndarray, np.generic, bool, int, float)
SUPPORTED_LOSSES = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)


def calling_svi(method: Callable, rule: str = "BLR") -> tuple[SVI, tuple, dict]:
    """The `SVI` object whose `method` is being executed, with the model's arguments.

    SVI hands an optimizer no program, but it calls the optimizer from its own methods: the caller's frame has it.
    """
    frame = frame_of(method)
    if frame is None:
        raise RuntimeError(
            f"{rule} must be initialised by SVI.{method.__name__}, which knows the guide; it was called without one. "
            f"Pass it to `SVI(model, guide, {rule}(), loss)` and call `svi.init` or `svi.run`."
        )
    return frame.f_locals["self"], frame.f_locals["args"], frame.f_locals["kwargs"]


def frame_of(method: Callable) -> FrameType | None:
    """The innermost frame in which `method` is being executed; None where it is not."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not method.__code__:
        frame = frame.f_back
    return frame


def mutable_state() -> dict[str, Any]:
    """What SVI.init has found of the host's mutable state, such as the averages of a BatchNorm, by site.

    A copy: modules write into it when they are evaluated.
    """
    frame = frame_of(SVI.init)
    state = None if frame is None else frame.f_locals.get("mutable_state")
    return jax.tree.map(jnp.asarray, state or {})


def check_loss(loss: Any, rule: str = "BLR") -> None:
    """A rule for E_q[ℓ] − H(q) is wrong for any other objective, however small its gradient."""
    if not isinstance(loss, SUPPORTED_LOSSES):
        raise TypeError(
            f"{rule} minimises the negative ELBO, E_q[-log p] - H(q); got {type(loss).__name__}. "
            f"Use one of {', '.join(kind.__name__ for kind in SUPPORTED_LOSSES)}."
        )
    if getattr(loss, "multi_sample_guide", False):
        raise TypeError(f"{rule} draws its own samples: use `num_particles` instead of `multi_sample_guide=True`.")


def check_params(params: Mapping[str, Any], rule: str = "BLR") -> None:
    for name, value in params.items():
        for leaf in jax.tree.leaves(value):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"{rule} updates real floating-point parameters; '{name}' has dtype {jnp.result_type(leaf)}. "
                    "Give it a floating-point initial value, or make it an argument of the model."
                )


def checked_state(state: Any, kind: type, rule: str = "BLR") -> tuple[Array, Any]:
    """(step, optimizer state), or the reason why this is none."""
    if not (isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], kind)):
        raise TypeError(
            f"{rule} cannot continue from an optimizer state of type {type(state[-1] if state else state).__name__}: "
            f"pass an `init_state` that came from SVI with {rule}, or start anew with `init_params`."
        )
    return state


def report_skipped(count: Any, skipped: Any, rule: str = "BLR") -> None:
    """Warn of steps that were not finite; raise once ten or more were taken and nothing else."""
    if isinstance(skipped, jax.core.Tracer) or not (skipped > 0).any():
        return
    count, skipped = np.asarray(count), np.asarray(skipped)
    described = f"{skipped} of {count} steps had a loss or gradient that is not finite"
    if (skipped == count).all() and (count >= 10).all():
        raise FloatingPointError(
            f"{rule}: {described}, so the guide is where it started. Start it elsewhere (`init_loc_fn`, for example "
            "init_to_value or init_to_median), or find the site with `numpyro.validation_enabled()`."
        )
    warnings.warn(f"{rule}: {described}; they left the guide as it was.", stacklevel=4)


def host_optimizer(others: Any, rule: str = "BLR") -> _NumPyroOptim:
    """NumPyro's own optimizers as they are, optax ones wrapped as `SVI` wraps them."""
    if others is None:
        return numpyro.optim.Adam(OTHERS_RATE[rule])
    if isinstance(others, _NumPyroOptim):
        return others
    if hasattr(others, "init") and hasattr(others, "update"):
        return numpyro.optim.optax_to_numpyro(others)
    raise TypeError(f"others must be a numpyro.optim or an optax optimizer, got {others!r}.")


def arguments_of_step() -> list[Array]:
    """The arrays and numbers among the model's arguments in the step that is being taken."""
    frame = frame_of(SVI.update) or frame_of(SVI.stable_update)
    arguments = () if frame is None else (frame.f_locals["args"], frame.f_locals["kwargs"])
    return [_digestible(leaf) for leaf in jax.tree.leaves(arguments) if isinstance(leaf, NUMERIC)]


def _digestible(leaf: Any) -> Array:
    """As an array; of labels, dates and integers that no array holds a checksum."""
    if isinstance(leaf, Array):
        return leaf
    value = np.asarray(leaf)
    if value.dtype.kind in "biufc":
        return jnp.asarray(value)
    return jnp.asarray(np.uint32(zlib.crc32(repr(value.tolist()).encode())))


def loss_of(svi: SVI, args: tuple, kwargs: dict) -> Callable:
    """SVI's loss before its first step, as the function of the unconstrained parameters that it hands an optimizer."""

    def fn(params: Mapping[str, Any]) -> tuple[Array, None]:
        constrained = svi.constrain_fn(params) | mutable_state()
        key = random.key(0)
        return svi.loss.loss(key, constrained, svi.model, svi.guide, *args, **kwargs, **svi.static_kwargs), None

    return fn


class Members(NamedTuple):
    """What one evaluation of the loss is given for the sites outside the Gaussian, by name.

    Attributes:
        values: of each site, over all rows of its plates.
        weights: of each cell of a site's plates, or of a plate, factors of the terms of the loss within those plates.
        factors: of each of the model's own sites, factors of its term of the loss.
    """

    values: dict[str, Array]
    weights: dict[str, Array]
    factors: dict[str, Array] | None = None


def objective_of(fn: Callable, layout: Layout, params: Mapping[str, Any]) -> Objective:
    """SVI's loss as a function of (mean, scales, others) at noise and at values of the members that the caller chooses.

    `fn` closes over one random key, so all evaluations see the same minibatch, and the same noise for the same draw.
    A member's own log q is no part of it: what is left of the loss is its −log p. Sites that are `layout.held` are
    constants. The host's program is traced once for all evaluations that are alike.
    """

    @jax.jit
    def objective(loc: Array, scales: tuple[Array | None, ...], others: Mapping[str, Any], draw: Draws | None):
        values = {**scatter(layout, loc, scales, params), **others}
        locs = [site.loc for site in layout.sites if site.name in layout.held]
        values |= {name: lax.stop_gradient(values[name]) for name in locs}
        redraw = Redraw(layout, draw)
        with redraw:
            loss, aux = fn(values)
        minibatch = jnp.asarray(redraw.minibatch)
        return loss, Extras(aux, redraw.weight(loc), minibatch, redraw.coverage)

    return objective


class Survey(NamedTuple):
    """What the rule has to know of the loss before its first step.

    Attributes:
        fixed: whether it is −log p(D, z) + log q(z) of a fixed ℓ at a draw: one particle, all data, no analytic KL, and
            no state of the host's that a step is to change. Then the draws of earlier steps serve later ones.
        kinked: whether a site is known to have a log density with kinks.
        minibatch: whether a plate is subsampled.
    """

    fixed: bool
    kinked: bool
    minibatch: bool


def survey(svi: SVI, args: tuple, kwargs: dict, layout: Layout, params: Mapping[str, Any]) -> Survey:
    one_density = type(svi.loss) in (Trace_ELBO, TraceEnum_ELBO) and svi.loss.num_particles == 1
    drawn = all(block.learned for block in layout.blocks)
    alone = not (layout.members or layout.others)
    kinks, subsampled, mutable = Kinks(), [], []

    def evaluate(params: Mapping[str, Any]) -> Array | None:
        loc, scales = gather(layout, params)
        redraw = Redraw(layout, None)
        with redraw, kinks:
            loss_of(svi, args, kwargs)({**params, **scatter(layout, loc, scales, params)})
        subsampled.append(redraw.minibatch)
        mutable.append(redraw.mutable)
        return redraw.weight(loc)

    weight = jax.eval_shape(evaluate, dict(params))
    minibatch = any(subsampled)
    fixed = one_density and drawn and alone and weight is None and not (minibatch or any(mutable))
    return Survey(fixed, kinks.found, minibatch)


def bends(svi: SVI, args: tuple, kwargs: dict) -> bool:
    """Whether the model computes an absolute value or a maximum, and so may have curvature in narrow places.

    The log density of classes, of logits or of a mixture has one in its softplus or `logsumexp`, and so have a ReLU and
    most kinks of one's own. Nothing is evaluated; what this says no to takes a shorter program.
    """
    kwargs = {**kwargs, **svi.static_kwargs}

    def drawn() -> dict[str, Array]:
        guide_trace = trace(seed(svi.guide, random.key(0))).get_trace(*args, **kwargs)
        return {name: site["value"] for name, site in guide_trace.items() if site["type"] == "sample"}

    def joint(values: dict[str, Array]) -> Array:
        return log_density(seed(svi.model, random.key(0)), args, kwargs, values)[0]

    return not BENDS.isdisjoint(primitives_of(jax.make_jaxpr(joint)(jax.eval_shape(drawn))))


def primitives_of(program: Any) -> Iterator[str]:
    """The names of the operations of a program, and of those within it."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(list(equation.params.values())):
            if isinstance(inner, (Jaxpr, ClosedJaxpr)):
                yield from primitives_of(inner)


class Kinks(Messenger):
    """Notes whether a site has a distribution with kinks, or one that is made of such."""

    def __init__(self) -> None:
        super().__init__(None)
        self.found = False

    def process_message(self, msg: dict) -> None:
        self.found |= msg["type"] == "sample" and has_kinks(msg["fn"])


def has_kinks(fn: Any) -> bool:
    """Whether a distribution, or one that it is made of, has the density of an absolute value."""
    parts = [
        part
        for value in getattr(fn, "__dict__", {}).values()
        for part in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return isinstance(fn, KINKED) or any(has_kinks(part) for part in parts if isinstance(part, dist.Distribution))


class Redraw(Messenger):
    """Replaces the value that the guide draws at each recognised site by one of ours.

    A site of the Gaussian gets loc ± C ε, with ε the draw's own noise: noise k of a site is a function of the key that
    the host gives the site and of k, so that particles, which have keys of their own, keep draws of their own. With
    `draw=None` the host's values stay, and only the weights are noted. A member gets the draw's value for it, by a
    distribution without a density of its own.
    """

    def __init__(self, layout: Layout, draw: Draws | None) -> None:
        super().__init__(None)
        self.held = layout.held
        self.sites = {site.name: site for site in layout.sites}
        self.members = {member.name: member for member in layout.members}
        self.components = {
            site: (member, index) for member in layout.members for index, site in enumerate(member.sites)
        }
        self.draw = draw
        given = None if draw is None else draw.members
        members: Members = Members({}, {}) if given is None else given
        self.values, self.cell_weights, self.factors = members
        self.plates: dict[str, dict] = {}
        self.weights: dict[str, Any] = {}
        self.coverage: dict[str, Array] = {}
        self.minibatch = False
        self.mutable = False

    def process_message(self, msg: dict) -> None:
        self.mutable |= msg["type"] == "mutable"
        if msg["type"] == "plate":
            self.plates[msg["name"]] = msg
            size, subsample_size = msg["args"]
            self.minibatch |= subsample_size is not None and subsample_size < size
        if msg["type"] != "sample":
            return
        if msg["value"] is not None:
            self._weigh(msg)  # a term of the model; its latents have their values already, replayed from the guide
        elif msg["name"] in self.components and self.values:
            self._give(msg, *self.components[msg["name"]])
        elif msg["name"] in self.sites:
            self._draw(msg, self.sites[msg["name"]])
        elif msg["name"] in self.held:  # which the guide makes of a part of one of our draws
            fn = msg["fn"]
            v, log_density = lax.stop_gradient((fn.v, fn.log_density))
            msg["fn"] = dist.Delta(v, log_density=log_density, event_dim=fn.event_dim)

    def _give(self, msg: dict, member: Member, index: int) -> None:
        value = self.values[member.name]
        shape = value.shape[: value.ndim - member.family.value_rank]
        scale = _entropy_weight(shape, msg, self.plates)
        # TraceGraph_ELBO runs the guide a second time, for its dependencies, and only the first run's values are ours
        self.coverage.setdefault(member.name, jnp.broadcast_to(1.0 if scale is None else scale, shape))
        rows = rows_of(member.family.split(value)[index], len(msg["fn"].event_shape), subsampled(msg, self.plates))
        msg["value"] = rows
        msg["fn"] = dist.Delta(rows, event_dim=len(msg["fn"].event_shape))
        self._weigh(msg)

    def _weigh(self, msg: dict) -> None:
        frames = {frame.name: frame for frame in msg["cond_indep_stack"]}
        weights = [] if self.factors is None or msg["name"] not in self.factors else [self.factors[msg["name"]]]
        for name, weight in self.cell_weights.items():
            plates = self.members[name].plates if name in self.members else ((name, 0, len(weight)),)
            if not all(plate in frames for plate, _, _ in plates):
                continue
            for plate, axis, size in plates:
                if frames[plate].size != size:
                    weight = jnp.take(weight, self.plates[plate]["value"], axis)
            outer_first = sorted(plates, key=lambda plate: frames[plate[0]].dim)
            weight = jnp.transpose(weight, [axis for _, axis, _ in outer_first])
            shape = [1] * max((-frames[plate].dim for plate, _, _ in plates), default=0)
            for (plate, _, _), size in zip(outer_first, weight.shape, strict=True):
                shape[frames[plate].dim] = size
            weights.append(weight.reshape(shape))
        for weight in weights:
            msg["scale"] = weight if msg["scale"] is None else weight * msg["scale"]

    def _draw(self, msg: dict, site: Site) -> None:
        self.weights.setdefault(site.name, _entropy_weight(site.block.shape, msg, self.plates))
        self._weigh(msg)  # an analytic KL takes its scale from the guide; elsewhere the weights average to one
        if self.draw is None or site.block.structure == "point":
            return
        base, transforms = unwrap(msg["fn"])
        value: Array = base.loc + _affine(base, self._noise(msg, site, base))
        intermediates = []
        for transform in transforms:
            inner, (value, inside) = value, transform.call_with_intermediates(value)
            intermediates.append([inner, inside])
        msg["value"] = value
        # only a TransformedDistribution itself takes its intermediates back in log_prob; under a wrapper it inverts
        msg["intermediates"] = intermediates if isinstance(msg["fn"], dist.TransformedDistribution) else []

    def weight(self, loc: Array) -> Array | None:
        """The weight of each coordinate's entropy in the loss, [D]; None where no plate or scale changes it."""
        if all(weight is None for weight in self.weights.values()):
            return None
        parts = []
        for site in self.sites.values():
            weight = self.weights.get(site.name)
            parts.append(jnp.ravel(jnp.broadcast_to(1.0 if weight is None else weight, site.block.shape)))
        return jnp.concatenate(parts).astype(loc.dtype)

    def _noise(self, msg: dict, site: Site, base: Any) -> Array:
        draw: Any = self.draw
        if draw.noise is not None:
            return draw.noise[site.block.start : site.block.stop].reshape(base.shape())
        return draw.sign * standard_normal(msg["kwargs"]["rng_key"], draw.number, base.shape(), base.loc.dtype)


def key_of(fn: Callable, layout: Layout, params: Mapping[str, Any]) -> Array:
    """The random key of a step, which `fn` closes over.

    Where a version of the host keeps it elsewhere, it is the key that `fn` gives the guide's first site: every key that
    follows from another takes as long to compile as the noise.
    """
    rng_key = inspect.getclosurevars(fn).nonlocals.get("rng_key") if inspect.isfunction(fn) else None
    if rng_key is None:
        names = [site.name for site in layout.sites] + [site for member in layout.members for site in member.sites]
        given = KeyOfSite(frozenset(names))
        with given:
            fn(dict(params))  # for its key: what else it computes is used by nobody, and left out when compiled
        rng_key = given.rng_key
    return rng_key


def joint_noise(rng_key: Array, num_draws: int, like: Array) -> Array:
    """Standard normal noise for all coordinates, [S, D]; bits of a matrix take four times as long as those of a row."""
    noise = standard_normal(rng_key, jnp.zeros((), int), (num_draws * len(like),), like.dtype)
    return noise.reshape(num_draws, *like.shape)


class KeyOfSite(Messenger):
    """Notes the random key of the first of some sites."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(None)
        self.names = names
        self.rng_key: Any = None

    def process_message(self, msg: dict) -> None:
        if self.rng_key is None and msg["type"] == "sample" and msg["name"] in self.names and msg["value"] is None:
            self.rng_key = msg["kwargs"]["rng_key"]


def standard_normal(rng_key: Array, number: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Noise number `number` of the site that was given `rng_key`."""
    return random.normal(random.fold_in(rng_key, number), shape, dtype)


def _entropy_weight(shape: tuple[int, ...], message: dict, plates: dict[str, dict]) -> Any:
    """The scale of the site in the loss, spread over the rows of its parameter, of shape `shape`, in the batch."""
    frames = subsampled(message, plates)
    if not frames:
        return message["scale"]
    weight = jnp.ones(shape)
    for dim, size, indices in frames:
        axis = dim + len(message["fn"].batch_shape)
        covered = jnp.zeros(size).at[indices].set(1.0)
        weight = weight * covered.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    return weight * (1.0 if message["scale"] is None else message["scale"])


def _affine(base: Any, noise: Array) -> Array:
    if isinstance(base, (dist.MultivariateNormal, dist.LowRankMultivariateNormal)):
        return jnp.squeeze(base.scale_tril @ noise[..., None], -1)
    return base.scale * noise
