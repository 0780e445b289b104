"""Pyro's model and loss, seen from a rule for many weights: part by part, at draws of its own.

A part is a Gaussian site of the guide, or some tensors of a `BayesianModule` with the same prior; the module is one
site. Few parts make few operations, and small ones little memory beside the weights: `PART_SIZE` is between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, ClassVar, NamedTuple, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from . import _ivon
from ._ivon import Prior, Settings, State, Weights
from ._layout import Layout, subsampled, undisturbed, unwrap
from ._recognition import recognise
from ._svi import frame_of

__all__ = [
    "LogDensity",
    "Pair",
    "Perturb",
    "Program",
    "Target",
    "check_layout",
    "find_layout",
    "scale",
    "statistics",
    "survey",
]


def check_layout(layout: Layout) -> None:
    """A rule for independent Normals takes no other family, and no Normal with one parameter for its two."""
    foreign = [site.name for site in layout.sites if site.block.structure != "diagonal" or len(site.scale) != 1]
    foreign += [member.name for member in layout.members]
    if foreign:
        raise ValueError(
            "IVON expected a mean-field guide, whose sites are Normals with parameters for location and scale; "
            f"{', '.join(map(repr, foreign))} is different. Use AutoNormal or AutoDiagonalNormal, or BLR."
        )


# One tensor of a module: `name`, `shape`, its elements from `start` to `stop`, `loc` and `scale` of its prior.
Part = Any


class WeightsGuide(Protocol):
    """A guide of a whole network, as `AutoWeights`: q(w) that says `moved_in_place`, and what is to be moved.

    Attributes:
        net: its `name` is the site's, its `weights` the mean's storage, its `parts` the tensors within.
        loc: m, the parameter.
        hessian: h.
        num_data: N.
        temperature: τ.

    `tie` makes m the network's weights again, where a conversion has parted them.
    """

    moved_in_place: bool
    net: Any
    loc: Tensor
    hessian: Tensor
    num_data: Tensor
    temperature: Tensor

    def tie(self) -> None: ...


PART_SIZE = 2**18  # elements of a part of several tensors, at most


@dataclass(frozen=True)
class Target:
    """A site of the guide that the rule draws, and what it is in the model.

    Attributes:
        site: its name in the guide.
        parts: of each of its parts, in order: its name, and the tensors of the module that it consists of.
        latent: the name of the model's site that has its value, where the prior of that one is known; else None.
        guide: that of the whole network that the site is; None where it is a Normal of a stock guide.
    """

    site: str
    parts: dict[str, list[Part]]
    latent: str | None
    guide: WeightsGuide | None


def find_layout(
    svi: SVI, loss: Any, args: tuple, kwargs: dict, params: list[Tensor]
) -> tuple[Layout, list[WeightsGuide]]:
    """The Gaussian sites of stock guides, and the guides of whole networks, that `svi.guide` consists of."""
    if isinstance(svi.guide, torch.nn.Module):
        found: list[Any] = list(svi.guide.modules())
    else:  # the draw of a network's guide says whose it is
        with pyro.poutine.block(), undisturbed(0), torch.no_grad():
            nodes = pyro.poutine.trace(svi.guide).get_trace(*args, **kwargs).nodes
        found = [getattr(site["fn"], "guide", None) for site in nodes.values() if site["type"] == "sample"]
    guides: list[Any] = [guide for guide in found if getattr(guide, "moved_in_place", False)]
    for guide in guides:
        guide.tie()
    own = {id(guide.loc) for guide in guides}
    if not own <= {id(param) for param in params}:
        raise ValueError(
            "the parameter store has the mean of another AutoWeights under this one's name, and training would move "
            "that one. Call pyro.clear_param_store() before, or keep each fit in a `pyro.get_param_store().scope()`."
        )
    rest = [param for param in params if id(param) not in own]
    if guides and not rest:
        return Layout(sites=(), members=(), tensors={}, constraints={}, others={}), guides
    layout = recognise(svi, loss, args, kwargs, rest, learned_scales_only=True, rule="IVON", alone=not guides)
    check_layout(layout)
    return layout, guides


@torch.no_grad()
def survey(
    svi: SVI, args: tuple, kwargs: dict, layout: Layout, guides: list[WeightsGuide]
) -> tuple[float, dict[str, Prior], tuple[Target, ...]]:
    """N, the prior of each part in the units of the averaged loss, and the sites to draw, read off the model.

    N is the number of data that the loss stands for: the sum over the observed sites of the scale (of a subsampled
    plate, or of a handler) of each of their elements. A part has a `Prior` of its own where the model gives it a Normal
    whose parameters are constants; elsewhere δ = 0, and the prior's term stays in the loss.
    """
    (guide_trace, model_trace), (_, again) = (_traces(svi, args, kwargs, seed) for seed in (0, 1))
    observed = [site for site in model_trace.nodes.values() if site["type"] == "sample" and site["is_observed"]]
    num_data = float(sum(_num_elements(site) for site in observed))
    if not num_data > 0:
        raise ValueError(
            "IVON found no data: the model has no observed site (`obs=`), or a scale of zero, and the rule "
            "averages over the data. Pass the data to svi.step, or use BLR."
        )
    priors: dict[str, Prior] = {}
    targets = []
    for site in layout.sites:
        _check_site(guide_trace.nodes[site.name])
        latent = _latent_of(guide_trace.nodes[site.name]["value"], model_trace)
        if latent is not None:
            _check_site(model_trace.nodes[latent])
        prior = None if latent is None else _known(model_trace.nodes[latent], again.nodes[latent])
        priors[site.name] = Prior(0.0, 0.0) if prior is None else Prior(prior[0], 1 / (num_data * prior[1] ** 2))
        targets.append(Target(site.name, {site.name: []}, None if prior is None else latent, None))
    for guide in guides:
        name = guide.net.name
        _check_site(guide_trace.nodes[name])
        parts = {f"{name}[{group[0].start}:{group[-1].stop}]": group for group in _groups(guide.net.parts)}
        for key, group in parts.items():
            priors[key] = Prior(group[0].loc, 1 / (num_data * group[0].scale ** 2))
        targets.append(Target(name, parts, name, guide))
    return num_data, priors, tuple(targets)


def _groups(parts: list[Part]) -> list[list[Part]]:
    """Neighbours of the same prior, together no larger than `PART_SIZE` where they are several."""
    groups: list[list[Part]] = []
    for part in parts:
        fits = groups and groups[-1][0][-2:] == part[-2:] and part.stop - groups[-1][0].start <= PART_SIZE
        if fits:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _traces(svi: SVI, args: tuple, kwargs: dict, seed: int) -> tuple[Any, Any]:
    with pyro.poutine.block(), undisturbed(seed):
        guide_trace = pyro.poutine.trace(svi.guide).get_trace(*args, **kwargs)
        model_trace = pyro.poutine.trace(pyro.poutine.replay(svi.model, trace=guide_trace)).get_trace(*args, **kwargs)
    return guide_trace, model_trace


def _check_site(message: Any) -> None:
    if subsampled(message) or not _is_one(message["scale"]):
        raise ValueError(
            f"IVON averages over all data, and the latent site '{message['name']}' is scaled or lies in a subsampled "
            "plate, whose rows come and go. Use BLR for local latents; for a cold posterior use `temperature`."
        )


def _is_one(scale: Any) -> bool:
    return bool((torch.as_tensor(scale) == 1).all())


def _num_elements(message: Any) -> float:
    """Σ of the scale over the elements that are not masked; a batch that `to_event` made an event counts as a batch."""
    fn, mask = message["fn"], message["mask"]
    weight = torch.as_tensor(message["scale"]).cpu() * torch.ones(fn.batch_shape, dtype=torch.float64)
    weight = weight * torch.as_tensor(True if mask is None else mask).cpu()
    while isinstance(fn, (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        if isinstance(fn, dist.MaskedDistribution):
            weight = weight * torch.as_tensor(fn._mask).cpu()
        elif isinstance(fn, torch.distributions.Independent):
            axes = fn.event_shape[: fn.reinterpreted_batch_ndims]
            weight = weight.reshape(*weight.shape, *len(axes) * [1]).expand(*weight.shape, *axes)
        fn = fn.base_dist
    return float(weight.sum())


def _latent_of(value: Tensor, model_trace: Any) -> str | None:
    """The model's latent site that has this very value."""
    for name, site in model_trace.nodes.items():
        latent = site["type"] == "sample" and not site["is_observed"] and isinstance(site["value"], Tensor)
        if latent and site["value"].shape == value.shape and torch.equal(site["value"], value):
            return name
    return None


def _known(message: Any, again: Any) -> tuple[Tensor, Tensor] | None:
    """(m₀, s₀) of a Normal prior, not masked, that is the same for two values of all other sites."""
    (base, transforms), (other, _), fn = unwrap(message["fn"]), unwrap(again["fn"]), message["fn"]
    while fn is not base and not isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    masked = fn is not base or message["mask"] is not None
    if masked or transforms or not isinstance(base, torch.distributions.Normal):
        return None
    same = torch.equal(base.loc, other.loc) and torch.equal(base.scale, other.scale)
    return (base.loc.detach().clone(), base.scale.detach().clone()) if same else None


class LogDensity(TorchDistribution):
    """Stands for a distribution in the loss, by a log density that is known already, [*batch]."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real
    has_rsample = True

    def __init__(self, log_density: Tensor, event_shape: torch.Size) -> None:
        self.log_density = log_density
        super().__init__(log_density.shape, event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_density


class Drawn(NamedTuple):
    """A part at a draw: w, its tensors as the leaves in which gradients arrive, and whether a model was `shown` it."""

    value: Tensor
    leaves: list[Tensor]
    shown: bool

    def take_offset(self, m: Tensor) -> Tensor:
        """w − m, written over w where no model has seen it."""
        return self.value - m if self.shown else self.value.sub_(m)

    def take_gradient(self) -> Tensor:
        """∇ of the loss with respect to w, once: zero for a weight that took no part in it."""
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        gradients = [gradient.to_dense() if gradient.is_sparse else gradient for gradient in gradients]
        for leaf in self.leaves:
            leaf.grad = None
        if len(gradients) == 1:
            return gradients[0].reshape(self.value.shape)
        return torch.cat([gradient.reshape(-1) for gradient in gradients])


@dataclass(frozen=True)
class Pair:
    """The second draw of an antithetic pair, made when the first had moved m.

    Attributes:
        values: m − σ ε, by the guide's site.
        spreads: of each part, the share of the KL divergence that is σ's.
    """

    values: Weights
    spreads: Weights


class Perturb(Messenger):
    """Gives each target of the guide the value m + σ ε, and its KL divergence from the prior in place of its log q.

    Every call of the guide is a draw of its own, from a generator seeded by `seed` and the number of the draw; or it is
    the second of a `pair`.
    """

    def __init__(
        self,
        targets: tuple[Target, ...],
        state: State,
        priors: Mapping[str, Prior],
        settings: Settings,
        temperature: float,
        seed: int,
        pair: Pair | None,
    ) -> None:
        super().__init__()
        self.targets = {target.site: target for target in targets}
        self.state, self.priors, self.settings, self.temperature = state, priors, settings, temperature
        self.seed, self.second = seed, pair is not None
        self.values = {} if pair is None else dict(pair.values)  # the last draw of a site, or the next
        self.spreads = {} if pair is None else dict(pair.spreads)
        self.draws: list[dict[str, Drawn]] = []
        self.generator: torch.Generator | None = None

    def __enter__(self) -> Any:
        self.draws.append({})
        self.generator = None
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.targets and msg["value"] is None and not msg["done"]:
            target = self.targets[msg["name"]]
            with torch.no_grad():
                value, divergence = self._draw(target)
            batch_shape = msg["fn"].batch_shape
            share = divergence / max(1, batch_shape.numel())
            msg["value"], msg["fn"] = value, LogDensity(share.expand(batch_shape), msg["fn"].event_shape)
            msg["done"] = True

    def _draw(self, target: Target) -> tuple[Tensor, Tensor]:
        draw, num_data = self.draws[-1], self.settings.num_data
        mean = self.state.loc[target.site] if target.guide is None else target.guide.net.weights
        weights = self.values[target.site] if self.second else self._noise(mean)
        divergence, leaves = mean.new_zeros(()), {}
        for name, tensors in target.parts.items():
            m, prior = self.state.loc[name], self.priors[name]
            value = weights[tensors[0].start : tensors[-1].stop] if tensors else weights
            if not self.second:
                sigma = scale(self.state, self.priors, self.settings, self.temperature, name)
                self.spreads[name] = _ivon.divergence_of_scale(sigma, prior, num_data)
                torch.addcmul(m, value, sigma, out=value)
            divergence += self.spreads[name] + _ivon.divergence_of_loc(m, prior, num_data)
            for tensor in tensors:
                leaves[tensor.name] = tensor.of(weights).detach().requires_grad_()
            own = [leaves[tensor.name] for tensor in tensors] or [weights.detach().requires_grad_()]
            draw[name] = Drawn(value, own, shown=target.guide is None)
        self.values[target.site] = weights
        if target.guide is None:
            return draw[target.site].leaves[0], divergence
        weights.leaves = leaves  # type: ignore[attr-defined]
        return weights, divergence

    def _noise(self, mean: Tensor) -> Tensor:
        if self.generator is None:
            self.generator = torch.Generator(mean.device).manual_seed(self.seed + len(self.draws))
        return torch.randn(mean.shape, generator=self.generator, dtype=mean.dtype, device=mean.device)

    def offsets(self) -> Weights:
        """σ ε of each part at the last draw, while m is what it was; the draw is used up."""
        return {name: drawn.take_offset(self.state.loc[name]) for name, drawn in self.draws[-1].items()}

    def mirrored(self, offsets: Weights) -> Pair:
        """The draw at the mirror image, now that m has moved; written over the `offsets`."""
        for name, offset in offsets.items():
            torch.sub(self.state.loc[name], offset, out=offset)
        whole = {site for site, target in self.targets.items() if target.guide is not None}
        values = {site: self.values[site].detach() if site in whole else offsets[site] for site in self.targets}
        return Pair(values, self.spreads)


class Silence(Messenger):
    """Leaves out of the loss the model's terms for the sites whose prior is known."""

    def __init__(self, latents: frozenset[str]) -> None:
        super().__init__()
        self.latents = latents

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.latents:  # whose value the guide's trace, further out, is about to give
            msg["fn"] = LogDensity(torch.zeros(msg["fn"].batch_shape), msg["fn"].event_shape)


class Program:
    """The model and the guide of one SVI while it steps: the guide's draws are the rule's, the known priors are silent.

    Outside `SVI.step`, and in that of another optimizer, both are what they were.

    Args:
        optimizer: whose program it is.
        next_perturb: what draws the weights of the next step; None where the optimizer is to begin anew.
    """

    def __init__(
        self, svi: SVI, optimizer: Any, targets: tuple[Target, ...], next_perturb: Callable[[], Perturb | None]
    ) -> None:
        self.model, self.guide = original(svi.model), original(svi.guide)
        self.optimizer, self.next_perturb = optimizer, next_perturb
        self.silence = Silence(frozenset(target.latent for target in targets if target.latent is not None))
        self.perturb: Perturb | None = None
        self.frame: FrameType | None = None
        svi.model, svi.guide = Handled(self, "model"), Handled(self, "guide")

    def handler(self, role: str) -> Messenger | None:
        """What the model or the guide is to be run under, if `SVI.step` is asking."""
        frame = frame_of(SVI.step)
        if frame is None or frame.f_locals["self"].optim is not self.optimizer:
            return None
        if frame is not self.frame:  # another step than that of the draws so far, which an exception may have left here
            self.frame, self.perturb = frame, self.next_perturb()
        if self.perturb is None:
            return None
        return self.silence if role == "model" else self.perturb

    def take(self) -> Perturb:
        """What drew the weights of the step that is being taken, which begins anew."""
        perturb = self.perturb
        assert perturb is not None, "SVI.step ran the guide"
        self.frame, self.perturb = None, None
        return perturb


class Handled:
    """`SVI`'s model or guide under the handlers of a program; everything else about it is the original's."""

    def __init__(self, program: Program, role: str) -> None:
        self._program, self._role = program, role
        self.__wrapped__: Any = getattr(program, role)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handler = self._program.handler(self._role)
        if handler is None:
            return self.__wrapped__(*args, **kwargs)
        with handler:
            return self.__wrapped__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # which a copy asks of an object that has nothing yet
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)


def original(part: Any) -> Any:
    """A model or guide without the handlers of a program."""
    return part.__wrapped__ if isinstance(part, Handled) else part


def statistics(perturb: Perturb, gradients: list[Weights]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, ĝ, ĥ) of each part, from the draws and the gradients of the loss there, both of which are used up.

    The first draw of a pair has no ĥ.
    """
    draws, state, settings = perturb.draws, perturb.state, perturb.settings
    share = 1 / len(draws)  # ELBOs average over particles
    for name, m in state.loc.items():
        slopes = [at_draw.pop(name).div_(settings.num_data) for at_draw in gradients]
        gradient = sum(slopes[1:], start=slopes[0])
        if settings.paired and not perturb.second:
            yield name, gradient, None
            continue
        offsets = [draw.pop(name).take_offset(m) for draw in draws]
        products = [
            _ivon.residual(slope, offset, state, name, share, settings).mul_(offset)
            for slope, offset in zip(slopes, offsets, strict=True)
        ]
        product = sum(products[1:], start=products[0])
        hessian = state.hessian[name]
        precision = _ivon.precision_of(hessian, perturb.priors[name], settings.num_data, perturb.temperature)
        estimate = _ivon.curvature(product, precision, hessian, state.count, settings)
        del offsets, slopes, products, product, precision  # before the step asks for memory of its own
        yield name, gradient, estimate


def scale(state: State, priors: Mapping[str, Prior], settings: Settings, temperature: float, name: str) -> Tensor:
    """σ of a part."""
    return _ivon.scale_of(state.hessian[name], priors[name], settings.num_data, temperature)
