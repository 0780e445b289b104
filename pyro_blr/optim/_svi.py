"""Pyro's SVI, seen from its optimizer: who is calling, and the loss as a function of the Gaussian and the noise.

`SVI.step` hands an optimizer tensors with gradients, and nothing else. The loss as a function is read off the calling
`SVI`, whose model, guide, loss and arguments are evaluated again at draws of our own.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from pyro.optim import PyroOptim
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..gradients import AtPoints, Draws, Extras, Objective
from ._layout import (
    Layout,
    Member,
    Site,
    axes_of,
    constrained,
    gather,
    moments,
    rows_of,
    unconstrained,
    undisturbed,
    unwrap,
)
from ._options import OTHERS_RATE

__all__ = [
    "Fingerprint",
    "Members",
    "Redraw",
    "Mapped",
    "Turns",
    "calling_svi",
    "check_loss",
    "check_not_modules_alone",
    "check_not_read",
    "check_params",
    "compiled_from",
    "evaluated",
    "frame_of",
    "host_gradients",
    "host_noise",
    "host_optimizer",
    "joint_noise",
    "objective_of",
    "read_by_the_program",
    "report_skipped",
    "noise_of",
    "seen",
    "standard_normal",
    "survey",
    "traceable_objective_of",
    "unchanged",
]

KINKED = torch.distributions.Laplace, dist.AsymmetricLaplace
DISTRIBUTIONS = torch.distributions.Distribution, dist.Distribution

SUPPORTED_LOSSES = (Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)
COMPILED_LOSSES: dict[type, Any] = {
    JitTrace_ELBO: Trace_ELBO,
    JitTraceMeanField_ELBO: TraceMeanField_ELBO,
    JitTraceGraph_ELBO: TraceGraph_ELBO,
    JitTraceEnum_ELBO: TraceEnum_ELBO,
}
# A compiled loss cannot be given other draws, so what it compiles is evaluated in its place. TraceGraph_ELBO is the
# ELBO of Trace_ELBO, with other gradients at draws that have no path, for which the rules have estimators.
EVALUATED_AS: dict[type, Any] = {**COMPILED_LOSSES, JitTraceGraph_ELBO: Trace_ELBO, TraceGraph_ELBO: Trace_ELBO}


def calling_svi(method: Callable, rule: str = "BLR") -> tuple[SVI, tuple, dict]:
    """The `SVI` object whose `method` is being executed, with the model's arguments.

    SVI hands an optimizer no program, but it calls the optimizer from its own methods: the caller's frame has it.
    """
    frame = frame_of(method)
    if frame is None:
        raise RuntimeError(
            f"{rule} must be called by SVI.{method.__name__}, which knows the guide and the loss; it was called "
            f"without one. Pass it to `SVI(model, guide, {rule}(), loss)` and call `svi.step`."
        )
    return frame.f_locals["self"], frame.f_locals["args"], frame.f_locals["kwargs"]


def frame_of(method: Callable) -> FrameType | None:
    """The innermost frame in which `method` is being executed; None where it is not."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not method.__code__:
        frame = frame.f_back
    return frame


def check_loss(svi: SVI, rule: str = "BLR") -> Any:
    """The ELBO object of `svi`. A rule for E_q[ℓ] − H(q) is wrong for any other objective."""
    loss = getattr(svi.loss, "__self__", svi.loss)
    if not isinstance(loss, SUPPORTED_LOSSES) or isinstance(loss, TraceTailAdaptive_ELBO):  # a bound of another kind
        raise TypeError(
            f"{rule} minimises the negative ELBO, E_q[-log p] - H(q); got {type(loss).__name__}. "
            f"Use one of {', '.join(kind.__name__ for kind in (*SUPPORTED_LOSSES, *COMPILED_LOSSES))}."
        )
    return loss


def compiled_from(loss: Any) -> Any:
    """The class of ELBO that a loss compiles; None where it compiles none."""
    return next((COMPILED_LOSSES[kind] for kind in type(loss).__mro__ if kind in COMPILED_LOSSES), None)


def evaluated(loss: Any) -> Any:
    """The ELBO that is evaluated for a loss: itself, or one of another class with the same attributes."""
    kind = next((EVALUATED_AS[kind] for kind in type(loss).__mro__ if kind in EVALUATED_AS), None)
    if kind is None:
        return loss
    twin = kind.__new__(kind)
    twin.__dict__ = vars(loss)  # not a copy: what the host finds out once, such as the nesting of plates, is kept there
    return twin


def check_params(params: Iterable[Tensor], rule: str = "BLR") -> None:
    for param in params:
        if not param.dtype.is_floating_point:
            name = pyro.get_param_store().param_name(param)
            raise TypeError(
                f"{rule} updates real floating-point parameters; '{name}' has dtype {param.dtype}. "
                "Give it a floating-point initial value, or make it an argument of the model."
            )


def report_skipped(count: int, skipped: int, rule: str = "BLR") -> None:
    """Warn of steps that were not finite; raise once ten or more were taken and nothing else."""
    described = f"{skipped} of {count} steps had a loss or gradient that is not finite"
    if skipped == count >= 10:
        raise FloatingPointError(
            f"{rule}: {described}, so the guide is where it started. Start it elsewhere (`init_loc_fn`, for example "
            "init_to_value or init_to_median), or find the site with `pyro.enable_validation()`."
        )
    if skipped & (skipped - 1) == 0:  # the 1st, 2nd, 4th, 8th, ...: a fit with many has no warning for each
        warnings.warn(f"{rule}: {described}; they left the guide as it was.", stacklevel=4)


def host_optimizer(others: Any, rule: str = "BLR") -> PyroOptim:
    if others is None:
        return PyroOptim(torch.optim.Adam, {"lr": OTHERS_RATE[rule]})
    if isinstance(others, PyroOptim):
        return others
    raise TypeError(
        f"others must be a pyro.optim.PyroOptim, for example pyro.optim.Adam({{'lr': 0.01}}); got {others!r}."
    )


class Turns:
    """That an optimizer serves one `SVI` after the other, and does not come back: it has the state of one alone."""

    def __init__(self) -> None:
        self.served: weakref.WeakSet[SVI] = weakref.WeakSet()
        self.last: Callable[[], SVI | None] = lambda: None

    def __reduce__(self) -> tuple[type, tuple]:
        return Turns, ()  # a copy has served nobody

    def take(self, svi: SVI, rule: str) -> None:
        if self.last() is svi:
            return
        if svi in self.served:
            raise ValueError(
                f"this {rule} has served another SVI since its last step with this one, whose state it no longer has. "
                f"Give each SVI a {rule} of its own."
            )
        self.served.add(svi)
        self.last = weakref.ref(svi)


class Fingerprint:
    """Tells the model's arguments of one step from those of another; tensors that are still the same are not read."""

    def __init__(self) -> None:
        self.digest = 0
        self.seen: list[tuple[Any, Any]] = []  # each argument and its version; kept, so that its identity is

    def of(self, args: tuple, kwargs: dict) -> int:
        """A number that two lists of arguments hardly share unless they are the same, bit for bit."""
        now = [(leaf, _version_of(leaf)) for leaf in pytree.tree_leaves((args, kwargs))]
        same = len(now) == len(self.seen) and all(
            leaf is known and version == then for (leaf, version), (known, then) in zip(now, self.seen, strict=True)
        )
        if not same:
            self.seen, self.digest = now, 0
            for leaf, _ in now:
                self.digest = zlib.crc32(_bytes_of(leaf), self.digest)
        return self.digest


def _version_of(leaf: Any) -> Any:
    """What is the same as long as the value is."""
    if isinstance(leaf, np.ndarray) or (isinstance(leaf, Tensor) and leaf.is_inference()):
        return object()  # nothing tells when it is written to
    return leaf._version if isinstance(leaf, Tensor) else None


def _bytes_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
        return leaf.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy() if leaf.numel() else b""
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
        return leaf.tobytes()
    return repr(leaf).encode() if isinstance(leaf, (bool, int, float, str)) else b""


class Members(NamedTuple):
    """What one evaluation of the loss is given for the sites outside the Gaussian, by name.

    Attributes:
        values: of each site, over all rows of its plates.
        weights: of each cell of a site's plates, or of a plate, factors of the terms of the loss within those plates.
        factors: of each of the model's own sites, factors of its term of the loss.
    """

    values: dict[str, Tensor]
    weights: dict[str, Tensor]
    factors: dict[str, Tensor] | None = None

    def each(self, num_runs: int) -> list[Members]:
        """One for each of the runs, which are the first axis; all have the same `factors`."""
        values = {name: value.unbind() for name, value in self.values.items()}
        weights = {name: weight.unbind() for name, weight in self.weights.items()}
        return [
            Members(
                values={name: value[run] for name, value in values.items()},
                weights={name: weight[run] for name, weight in weights.items()},
                factors=self.factors,
            )
            for run in range(num_runs)
        ]


def objective_of(svi: SVI, args: tuple, kwargs: dict, layout: Layout, seed: int) -> Objective:
    """SVI's loss as a function of (mean, scales) at noise and at values of the members that the caller chooses.

    Everything random is a function of `seed`: all evaluations see the same minibatch, and the same noise for the same
    draw. The host's random state and its parameters are left as they are. A member's own log q is no part of it: what
    is left of the loss is its −log p. Sites that are `layout.held` are constants.
    """
    elbo = evaluated(check_loss(svi))

    def objective(loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draw: Draws):
        redraw = Redraw(layout, loc, scales, draw, seed)
        with redraw, undisturbed(seed, loc.device):
            try:
                loss = elbo.differentiable_loss(svi.model, svi.guide, *args, **kwargs)
            except torch.linalg.LinAlgError:
                # a matrix of the model has no Cholesky factor at this draw; the rule refuses what is not finite
                given = (*redraw.values.values(), *redraw.given.values(), *redraw.cell_weights.values())
                loss = torch.nan * sum(value.sum() for value in given)
        return loss, Extras(None, redraw.weight(loc), redraw.minibatch, redraw.coverage)

    return objective


def read_by_the_program(svi: SVI, args: tuple, kwargs: dict, layout: Layout) -> set[str]:
    """The parameters of sites that the loss depends on beside what `objective_of` gives it for them.

    A parameter that the program asks for by `pyro.param` is given as a function of the Gaussian wherever it is used; a
    module may read its own without asking.
    """
    objective, (loc, scales) = objective_of(svi, args, kwargs, layout, seed=0), gather(layout)
    tensors = {name: layout.tensors[name] for site in layout.sites for name in (site.loc, *site.scale)}
    with torch.enable_grad():
        loss, _ = objective(loc.detach().requires_grad_(), scales, None, Draws(0, 1.0, None))
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name for name, slope in zip(tensors, gradients, strict=True) if slope is not None and slope.any()}


def check_not_modules_alone(names: set[str], layout: Layout) -> None:
    """Without a site there is nothing for BLR to do beside the parameters that it cannot set."""
    if all(site.bare for site in layout.sites):
        raise ValueError(
            f"the guide has no site, and BLR expected to find the maximum likelihood by setting the parameters where "
            f"the model asks for them by pyro.param; the modules of {', '.join(sorted(names))} read these themselves. "
            "Make them a pyro.nn.PyroParam of a PyroModule, or use pyro.optim.Adam."
        )


def check_not_read(names: set[str]) -> None:
    """E_q[∇ℓ(z)] is the gradient only where the loss knows the parameters of a site by its draw and its density."""
    if names:
        raise ValueError(
            f"BLR expected the parameters {', '.join(sorted(names))} to act on the loss by the draws of their site "
            "alone, and the model reads them itself, as the variational models of pyro.contrib.gp do. Use "
            "BLR(learning_rate=0.1, estimator='gradient'), which takes the gradient of the whole loss, or "
            "pyro.optim.Adam."
        )


class Survey(NamedTuple):
    """What the rule has to know of the loss before its first step.

    Attributes:
        fixed: whether it is −log p(D, z) + log q(z) of a fixed ℓ at a draw: one particle, all data, no analytic KL.
            Then the draws of earlier steps serve later ones.
        kinked: whether a site is known to have a log density with kinks.
        minibatch: whether a plate is subsampled.
    """

    fixed: bool
    kinked: bool
    minibatch: bool


def survey(svi: SVI, args: tuple, kwargs: dict, layout: Layout) -> Survey:
    elbo = evaluated(check_loss(svi))
    one_density = type(elbo) in (Trace_ELBO, TraceEnum_ELBO) and elbo.num_particles == 1
    drawn = all(block.learned for block in layout.blocks)
    alone = not (layout.members or layout.others)
    loc, scales = gather(layout)
    location = loc.detach().requires_grad_()  # TraceEnum_ELBO refuses a loss that cannot be differentiated
    with torch.enable_grad(), Kinks() as kinks:
        objective = objective_of(svi, args, kwargs, layout, seed=0)
        extras = objective(location, scales, None, Draws(0, 1.0, None))[1]
    minibatch = bool(extras.minibatch)
    return Survey(one_density and drawn and alone and extras.weight is None and not minibatch, kinks.found, minibatch)


class Kinks(Messenger):
    """Notes whether a site has a distribution with kinks, or one that is made of such."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def _pyro_sample(self, msg: Any) -> None:
        self.found |= has_kinks(msg["fn"])


def has_kinks(fn: Any) -> bool:
    """Whether a distribution, or one that it is made of, has the density of an absolute value."""
    parts = [
        part
        for value in getattr(fn, "__dict__", {}).values()
        for part in (value if isinstance(value, (list, tuple)) else [value])
    ]
    return isinstance(fn, KINKED) or any(has_kinks(part) for part in parts if isinstance(part, DISTRIBUTIONS))


@dataclass
class Mapped(AtPoints):
    """The objective of one step, at many means at once under `torch.func.vmap`, and the host's evaluation at one.

    Attributes:
        host: the host's evaluation.
        mapped: the same without its looks at values, of which vmap has many.
        checked: whether the two have been found equal.
    """

    host: Objective
    mapped: Objective
    checked: bool = False

    def __call__(self, loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draw: Draws):
        return self.host(loc, scales, others, draw)

    def at_points(self, points: Tensor, scales: tuple[Tensor | None, ...], draw: Draws) -> tuple[Tensor, Tensor] | None:
        def loss(point: Tensor) -> Tensor:
            return self.mapped(point, scales, None, draw)[0]

        try:
            gradients, losses = torch.func.vmap(torch.func.grad_and_value(loss), randomness="same")(points)
        except Exception:  # whatever a model does that is no operation on tensors, or a matrix without a factor
            return None
        if not self.checked:
            with torch.enable_grad():  # TraceEnum_ELBO refuses a loss that cannot be differentiated
                expected, _ = self.host(points[0].detach().requires_grad_(), scales, None, draw)
            self.checked = torch.allclose(losses[0], expected.detach(), equal_nan=True)
        return (losses, gradients) if self.checked else None


def traceable_objective_of(svi: SVI, args: tuple, kwargs: dict, layout: Layout, seed: int = 0) -> Objective:
    """`objective_of` without the host's looks at a value (a warning of NaN), for `make_fx` and vmap."""
    elbo = evaluated(check_loss(svi))

    def objective(loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draw: Draws):
        with undisturbed(seed, loc.device), unchecked(), ItemsAreTensors(), Redraw(layout, loc, scales, draw, seed):
            pairs = elbo._get_traces(svi.model, svi.guide, args, kwargs)
            if isinstance(elbo, TraceEnum_ELBO):
                losses = [-_compute_dice_elbo(*pair) for pair in pairs]
            else:
                losses = [elbo._differentiable_loss_particle(*pair)[1] for pair in pairs]
        return sum(losses) / elbo.num_particles, Extras(None)

    return objective


@contextmanager
def unchecked():
    """No distribution looks at the values that it is given, be it asked to when it was made, as `expand` does."""
    check = torch.distributions.Distribution._validate_sample
    torch.distributions.Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.distributions.Distribution._validate_sample = check  # type: ignore[method-assign]


class ItemsAreTensors(TorchFunctionMode):
    """`tensor.item()` stays in the graph: the host adds up numbers of which the traced loss needs none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0].detach() if func is torch.Tensor.item else func(*args, **(kwargs or {}))


def seen(svi: SVI) -> tuple[Any, ...]:
    """What `SVI.step` would learn of its parameters: every one that the host knows, and whether it is trained."""
    return svi, *((param, param.requires_grad) for _, param in pyro.get_param_store().named_parameters())


def unchanged(before: tuple[Any, ...], svi: SVI) -> bool:
    """Whether a step of `svi` would find the parameters that were `seen` before."""
    now = seen(svi)
    same = len(now) == len(before) and now[0] is before[0]
    return same and all(
        param is known and trained == then for (param, trained), (known, then) in zip(now[1:], before[1:], strict=True)
    )


def host_gradients(layout: Layout) -> Objective:
    """A function of (mean, scales) whose gradient is the one that the host's backward pass left in the parameters.

    It is Σ_p ⟨∂L/∂p, p(m, C)⟩ over the unconstrained parameters p, so that differentiating it applies the chain rule
    through their constraints. Its value is not the loss.
    """
    gradients = {
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()
        for name, tensor in layout.tensors.items()
    }

    def objective(loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draw: None):
        values = unconstrained(layout, loc, scales)
        return sum((gradients[name] * value).sum() for name, value in values.items()), Extras(None)

    return objective


class Redraw(Messenger):
    """Gives each recognised site our Gaussian for its distribution, and loc ± C ε for its value.

    Noise k is drawn from a generator of its own, seeded by k, in the order in which the guide asks: particles, which
    ask one after the other, keep draws of their own. In place of k a draw may have what `noise_of` returns. A member
    gets the draw's value for it, by a distribution without a density of its own.
    """

    def __init__(self, layout: Layout, loc: Tensor, scales: tuple[Tensor | None, ...], draw: Draws, seed: int) -> None:
        super().__init__()
        self.sites = {site.name: site for site in layout.sites}
        self.members = {member.name: member for member in layout.members}
        self.components = {
            site: (member, index) for member in layout.members for index, site in enumerate(member.sites)
        }
        held = {name for site in layout.sites if site.name in layout.held for name in (site.loc, *site.scale)}
        self.held = layout.held
        self.values = {
            name: value.detach() if name in held else value for name, value in constrained(layout, loc, scales).items()
        }
        self.moments = {
            name: (loc.detach() if name in layout.held else loc, scale)
            for name, (loc, scale) in moments(layout, loc, scales).items()
        }
        self.draw = draw
        given: Members = Members({}, {}) if draw.members is None else draw.members
        self.given, self.cell_weights, self.factors = given
        self.noise = draw.number
        if draw.noise is None and not callable(draw.number):
            self.noise = noise_of(seed, draw.number, loc.device)
        self.indices: dict[str, Tensor] = {}
        self.weights: dict[str, Any] = {}
        self.coverage: dict[str, Tensor] = {}
        self.minibatch = False

    def _pyro_param(self, msg: Any) -> None:
        # a parameter may be used beside its site as well; a module's own nn.Parameter does not pass through here
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
            # where a plate notes the rows that it took; the parameter itself is not to be written on
            msg["value"]._pyro_unconstrained_param = SimpleNamespace()

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            self.indices[msg["name"]] = msg["value"]

    def _pyro_sample(self, msg: Any) -> None:
        # one that is iterated over, too
        self.minibatch |= any(frame.full_size not in (None, frame.size) for frame in msg["cond_indep_stack"])
        if isinstance(msg["fn"], _Subsample):
            return
        if not msg["done"] and msg["value"] is None:  # in the model the value is there already, replayed from the guide
            if msg["name"] in self.components and self.given:
                self._give(msg, *self.components[msg["name"]])
            elif msg["name"] in self.sites:
                self._draw(msg, self.sites[msg["name"]])
            elif msg["name"] in self.held:  # which the guide makes of a part of one of our draws
                fn = msg["fn"]
                log_density = torch.as_tensor(fn.log_density).detach()
                msg["fn"] = dist.Delta(fn.v.detach(), log_density, fn.event_dim)
        self._weigh(msg)

    def _give(self, msg: Any, member: Member, index: int) -> None:
        value = self.given[member.name]
        shape, part = value.shape[: value.ndim - member.family.value_rank], member.family.split(value)[index]
        weight = torch.as_tensor(_entropy_weight(shape, part.ndim, msg, self.indices), device=value.device)
        self.coverage.setdefault(member.name, weight.expand(shape))
        rows = rows_of(part, part.ndim, msg, self.indices).expand(msg["fn"].shape())
        msg["fn"] = dist.Delta(rows, event_dim=msg["fn"].event_dim)
        msg["value"], msg["done"] = rows, True

    def _weigh(self, msg: Any) -> None:
        frames = {frame.name: frame for frame in msg["cond_indep_stack"] if frame.vectorized}
        if self.factors is not None and msg["name"] in self.factors:
            msg["scale"] = self.factors[msg["name"]] * msg["scale"]
        for name, weight in self.cell_weights.items():
            plates = self.members[name].plates if name in self.members else ((name, 0, len(weight)),)
            if not all(plate in frames for plate, _, _ in plates):
                continue
            for plate, axis, size in plates:
                if frames[plate].size != size:
                    weight = weight.index_select(axis, self.indices[plate])
            outer_first = sorted(plates, key=lambda plate: frames[plate[0]].dim)
            weight = weight.permute([axis for _, axis, _ in outer_first])
            shape = [1] * max((-frames[plate].dim for plate, _, _ in plates), default=0)
            for (plate, _, _), size in zip(outer_first, weight.shape, strict=True):
                shape[frames[plate].dim] = size
            msg["scale"] = weight.reshape(shape) * msg["scale"]

    def _draw(self, msg: Any, site: Site) -> None:
        num_axes = len(site.block.shape)
        self.weights[site.name] = _entropy_weight(site.block.shape, num_axes, msg, self.indices)
        loc, scale = self.moments[site.name]
        scale = None if scale is None else rows_of(scale, num_axes, msg, self.indices)
        msg["fn"] = _replaced(msg["fn"], rows_of(loc, num_axes, msg, self.indices), scale)
        base, transforms = unwrap(msg["fn"])
        if site.block.structure == "point":
            return
        value = base.loc + _affine(base, self._noise(site, base))
        for transform in transforms:
            value = transform(value)
        msg["value"], msg["done"] = value, True

    def _noise(self, site: Site, base: Any) -> Tensor:
        shape = base.batch_shape + base.event_shape
        if self.draw.noise is not None:
            return self.draw.noise[site.block.start : site.block.stop].reshape(shape)
        return self.draw.sign * self.noise(shape, base.loc, site.block)

    def weight(self, loc: Tensor) -> Tensor | None:
        """The weight of each coordinate's entropy in the loss, [D]; None where no plate or scale changes it."""
        if all(isinstance(weight, float) and weight == 1 for weight in self.weights.values()):
            return None
        parts = [
            torch.as_tensor(self.weights.get(name, 1.0), dtype=loc.dtype, device=loc.device)
            .expand(site.block.shape)
            .reshape(-1)
            for name, site in self.sites.items()
        ]
        return torch.cat(parts)


def joint_noise(seed: int, num_draws: int, like: Tensor) -> Tensor:
    """Standard normal noise for all coordinates, [S, D]."""
    return noise_of(seed, 0, like.device)((num_draws * len(like),), like).reshape(num_draws, *like.shape)


def noise_of(seed: int, number: Any, device: torch.device) -> Callable[..., Tensor]:
    """(shape, like, block) -> the next array of noise number `number`, from a generator of its own."""
    generator = torch.Generator(device).manual_seed(seed + 1 + int(number))
    return lambda shape, like, _=None: standard_normal(generator, number, shape, like)


def host_noise(shape: tuple[int, ...], like: Tensor, _: Any = None) -> Tensor:
    """The array that the host's own Normal would draw next."""
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def standard_normal(generator: torch.Generator, number: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The next array of noise number `number`, which seeded the generator; dtype and device of `like`."""
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _entropy_weight(shape: tuple[int, ...], num_axes: int, message: Any, indices: dict[str, Tensor]) -> Any:
    """The scale of the site in the loss, spread over the rows, in an array of shape `shape`, that the batch covers."""
    weight = message["scale"]
    for frame, axis in axes_of(num_axes, message):
        rows = indices[frame.name]
        covered = torch.zeros(frame.full_size, device=rows.device).index_fill_(0, rows, 1.0)
        weight = weight * covered.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return float(weight) if isinstance(weight, (int, float)) else weight


def _replaced(fn: Any, loc: Tensor, scale: Tensor | None) -> Any:
    """`fn` with another location, and another scale unless that is None, under the same wrappers."""
    if isinstance(fn, torch.distributions.Independent):
        return _replaced(fn.base_dist, loc, scale).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return _replaced(fn.base_dist, loc, scale).mask(fn._mask)
    if isinstance(fn, dist.ExpandedDistribution):
        return _replaced(fn.base_dist, loc, scale).expand(fn.batch_shape)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        return dist.TransformedDistribution(_replaced(fn.base_dist, loc, scale), fn.transforms)
    if isinstance(fn, dist.Delta):
        return dist.Delta(loc.expand_as(fn.v), fn.log_density, fn.event_dim)
    if isinstance(fn, torch.distributions.LowRankMultivariateNormal):
        assert scale is not None  # or it would not be one of our sites
        return dist.LowRankMultivariateNormal(loc, scale[..., 1:], scale[..., 0] ** 2)
    if isinstance(fn, torch.distributions.MultivariateNormal):
        factor = fn.scale_tril if scale is None else scale.expand_as(fn.scale_tril)
        return dist.MultivariateNormal(loc.expand_as(fn.loc), scale_tril=factor)
    return dist.Normal(loc.expand_as(fn.loc), fn.scale if scale is None else scale.expand_as(fn.scale))


def _affine(base: Any, noise: Tensor) -> Tensor:
    if isinstance(base, (torch.distributions.MultivariateNormal, torch.distributions.LowRankMultivariateNormal)):
        return (base.scale_tril @ noise[..., None]).squeeze(-1)
    return base.scale * noise
