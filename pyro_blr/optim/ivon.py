"""IVON as an optimizer for Pyro's SVI: a diagonal Gaussian over the weights of large networks.

The rule is `_ivon.py`; `_weights.py` says what it is told of the model.

Source: Shen et al. 2024, "Variational Learning is Effective for Large Deep Networks" (ICML); Khan & Rue 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pyro.optim
import torch
import torch.distributed
from pyro.infer import SVI
from torch import Tensor
from torch.distributions import transform_to
from torch.utils import _pytree as pytree

from . import _ivon, _options, _svi, _weights
from ._gaussian import all_finite
from ._ivon import Prior, Settings, State
from ._layout import Layout

__all__ = ["IVON", "IVONState"]

LEARNING_RATES = {"factored": 0.05, "posterior": 0.1}
CLIP_RADII = {"factored": 10.0, "posterior": float("inf")}
MEMORIES = {"factored": 0.9999, "posterior": 0.99999}  # of the curvature

Statistics = list[tuple[str, Tensor, Tensor]]


@dataclass(frozen=True)
class IVONState:
    """What the optimizer carries from one `SVI.step` to the next.

    Attributes:
        weights: the Gaussian and its averages (`_ivon.State`).
        priors: of each part.
        sums: Σ ĝ and Σ ĥ of each part over the updates since the last step; empty where every update is a step.
        updates: so far; a step is taken at each `accumulation_steps`-th.
        pair: after the first of two draws that are an antithetic pair, the second.
        layout: which parameter is which stock site's, and the parameters of no site.
        guides: those of whole networks within the guide.
        targets: the sites that the rule draws.
        settings: what does not change, N among them.
        seed: of all draws, from the host's random state at the first step.
    """

    weights: State
    priors: dict[str, Prior]
    sums: Statistics
    updates: int
    pair: _weights.Pair | None
    layout: Layout
    guides: tuple[_weights.WeightsGuide, ...]
    targets: tuple[_weights.Target, ...]
    settings: Settings
    seed: int

    @property
    def skipped(self) -> int:
        """Updates so far in which something was not finite, which left the weights as they were."""
        return self.weights.skipped

    def covers(self, params: list[Tensor]) -> bool:
        """Whether this is still the state of the parameters of a step."""
        own = {id(guide.loc) for guide in self.guides}
        return own <= {id(param) for param in params} and self.layout.covers(
            param for param in params if id(param) not in own
        )


class IVON(pyro.optim.PyroOptim):
    """Variational online Newton for networks: swap the optimizer of the stock `SVI`, change nothing else.

    A diagonal Gaussian over many weights at the cost of AdamW: one gradient a step, at one draw of the weights, which
    every second time is the mirror image of the one before (not as published, nor where a step averages over particles,
    updates or workers). Takes the mean-field guides of the host (`AutoNormal`, `AutoDiagonalNormal`, hand-written
    `Normal` sites fed by parameters), and `AutoWeights`, the one for whole networks. The number of data is the model's:
    the scale of the observed sites, from plates or handlers; the precision of the prior is the prior's, and its share
    of gradient and curvature is exact where it is a Normal with constant parameters. What the guide says of the scales
    at the start is replaced by `hess_init`.

        σ² = τ / (N (h + δ)),   h ← β₂ h + (1 − β₂) ĥ,   m ← m − α · direction        (`_ivon.py` has every equation)

    Args:
        learning_rate: α > 0, or a schedule, a function of the step 0, 1, 2, ...; None (the default) is 0.05 for
            `preconditioner="factored"`, in units of min(s, √128 s²) with s the prior's standard deviation, at most
            0.3; 0.1 for `"posterior"`.
        preconditioner: of the mean. `"factored"`: root of the averaged squared gradients at the drawn weights, kept by
            rows and columns, with Nesterov momentum. `"posterior"`: the posterior's own; the published recursion.
        beta1: memory of the gradient's average.
        beta2: memory of the curvature's average; None is 0.9999 for `"factored"`, 0.99999 for `"posterior"`.
        beta3: memory of the averaged squares, for `"factored"`.
        hess_init: h₀ > 0, the curvature of the averaged loss at the start: σ₀ = 1/√(N (h₀ + δ)). None: 0.1, and for
            `"factored"` so much that σ₀ is at most an eighth of the prior's; wider draws hide few data.
        clip_radius: c, the longest element of the preconditioned gradient that a step takes; None is 10 for
            `"factored"`, ∞ for `"posterior"`.
        temperature: τ > 0 of E_q[ℓ] − τ H(q), or a function of the step. 1 is Bayes.
        accumulation_steps: updates whose gradients, each at a draw of its own, are averaged into one step.
        process_group: of `torch.distributed`: every worker draws weights of its own, and the gradients are averaged
            over all, those of the parameters of `others` too. True for the default group.
        others: optimizer of the parameters that belong to no site, a `pyro.optim.PyroOptim`;
            `pyro.optim.Adam({"lr": 1e-3})` if None.

    Raises:
        TypeError, ValueError: at construction for arguments out of range; at the first `svi.step` for a loss that is no
            ELBO, a guide with sites that are not independent Normals, a model without data, local latents.
        FloatingPointError: from `svi.step` once ten updates and nothing but updates with a loss or gradient that is not
            finite have been made. Single ones are reported in a warning.

    Example:
        >>> svi = SVI(model, AutoNormal(model), IVON(), Trace_ELBO())
        >>> for _ in range(1000):
        ...     svi.step(x, y)
    """

    moves_weights = True  # what a guide that is moved in place asks of an optimizer

    def __init__(
        self,
        learning_rate: float | Callable[[int], float] | None = None,
        *,
        preconditioner: str = "factored",
        beta1: float = 0.9,
        beta2: float | None = None,
        beta3: float = 0.99,
        hess_init: float | None = None,
        clip_radius: float | None = None,
        temperature: float | Callable[[int], float] = 1.0,
        accumulation_steps: int = 1,
        process_group: Any = None,
        others: Any = None,
    ) -> None:
        self.preconditioner = _options.checked_preconditioner(preconditioner)
        rate = LEARNING_RATES[preconditioner] if learning_rate is None else learning_rate
        self.learning_rate = _options.checked_schedule("learning_rate", rate, may_be_zero=True)
        self.beta1 = _options.checked_memory("beta1", beta1)
        self.beta2 = _options.checked_memory("beta2", MEMORIES[preconditioner] if beta2 is None else beta2)
        self.beta3 = _options.checked_memory("beta3", beta3)
        self.hess_init = None if hess_init is None else _options.checked_positive("hess_init", hess_init)
        radius = CLIP_RADII[preconditioner] if clip_radius is None else clip_radius
        self.clip_radius = _options.checked_positive("clip_radius", radius, finite=False)
        self.temperature = _options.checked_schedule("temperature", temperature, may_be_zero=False)
        self.accumulation_steps = _options.checked_count("accumulation_steps", accumulation_steps)
        self.process_group = _checked_group(process_group)
        self.others = _svi.host_optimizer(others, "IVON")
        self.state: IVONState | None = None
        self._program: _weights.Program | None = None
        self._turns = _svi.Turns()
        self._loaded: dict[str, Any] = {}

    def init(self, svi: SVI, args: tuple, kwargs: dict, params: list[Tensor]) -> IVONState:
        """The state for the parameters of `svi.guide` as they are now, or the one that was loaded for them."""
        _svi.check_params(params, "IVON")
        loss = _svi.check_loss(svi, "IVON")
        if uncompiled := _svi.compiled_from(loss):
            raise TypeError(
                f"IVON draws the weights of every step anew; got {type(loss).__name__}, which records the draws of the "
                f"first. Use {uncompiled.__name__}."
            )
        if loss.vectorize_particles and loss.num_particles > 1:
            raise ValueError(
                f"IVON draws weights for one particle after the other; got {type(loss).__name__} with "
                "vectorize_particles=True. Leave that out."
            )
        layout, guides = _weights.find_layout(svi, loss, args, kwargs, params)
        num_data, priors, targets = _weights.survey(svi, args, kwargs, layout, guides)
        alone = loss.num_particles == self.accumulation_steps == 1 and self.process_group is None
        settings = Settings(
            num_data=num_data,
            preconditioner=self.preconditioner,
            paired=self.preconditioner == "factored" and alone,
            beta1=self.beta1,
            beta2=self.beta2,
            beta3=self.beta3,
            hess_init=self.hess_init,
            clip_radius=self.clip_radius,
        )
        loc = {site.name: layout.tensors[site.loc].detach() for site in layout.sites}
        hessian = {name: torch.empty_like(value) for name, value in loc.items()}
        shapes: dict[str, _ivon.Shapes] = {name: ((1, value.shape),) for name, value in loc.items()}
        for target in targets:
            for name, tensors in target.parts.items():
                if target.guide is not None:
                    part = slice(tensors[0].start, tensors[-1].stop)
                    loc[name], hessian[name] = target.guide.loc.detach()[part], target.guide.hessian[part]
                    alike = groupby(tensor.shape for tensor in tensors)
                    shapes[name] = tuple((len(list(group)), shape) for shape, group in alike)
        weights = _ivon.init(loc, hessian, priors, shapes, settings)
        accumulates = self.accumulation_steps > 1
        state = IVONState(
            weights=weights,
            priors=priors,
            sums=[(name, torch.zeros_like(m), torch.zeros_like(m)) for name, m in loc.items()] if accumulates else [],
            updates=0,
            pair=None,
            layout=layout,
            guides=tuple(guides),
            targets=targets,
            settings=settings,
            seed=self._loaded["seed"] if self._loaded else int(torch.randint(2**62, ())),
        )
        state = self._resumed(state) if self._loaded else self._shared(state)
        self._write_scales(state)
        return state

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One update, from the gradients that `SVI.step` left in the draws; called by `SVI.step`."""
        params = list(params)
        svi, model_args, model_kwargs = _svi.calling_svi(SVI.step, "IVON")
        self._turns.take(svi, "IVON")
        if self.state is None or not self.state.covers(params):
            self._begin(svi, model_args, model_kwargs, params)
        assert self.state is not None and self._program is not None
        state, perturb = self.state, self._program.take()
        with torch.no_grad():
            self.state = self._updated(state, perturb)
        if self.state.skipped != state.skipped:
            _svi.report_skipped(self.state.updates + self.state.skipped, self.state.skipped, "IVON")

    def _begin(self, svi: SVI, args: tuple, kwargs: dict, params: list[Tensor]) -> None:
        """The state, and the first step's gradients once more, at draws of the rule."""
        handled = svi.model, svi.guide  # by another program, of this optimizer or of one before
        svi.model, svi.guide = map(_weights.original, handled)
        for param in params:
            param.grad = None
        try:
            self.state = self.init(svi, args, kwargs, params)
        except BaseException:
            svi.model, svi.guide = handled
            raise
        self._program = _weights.Program(svi, self, self.state.targets, self._perturb)
        svi.loss_and_grads(svi.model, svi.guide, *args, **kwargs)

    def _perturb(self) -> _weights.Perturb | None:
        """The draws of the next update; None where it is to begin anew."""
        if self.state is None:
            return None
        state, temperature = self.state, self._temperature(self.state)
        generator = torch.Generator().manual_seed(state.seed + state.updates + state.skipped)
        rank = 0 if self.process_group is None else torch.distributed.get_rank(self.process_group)
        # one after the other and not at a distance: torch's generator looks at 32 bits of a seed
        seed = int(torch.randint(2**62, (rank + 1,), generator=generator)[rank])
        return _weights.Perturb(
            state.targets, state.weights, state.priors, state.settings, temperature, seed, state.pair
        )

    def _updated(self, state: IVONState, perturb: _weights.Perturb) -> IVONState:
        """The next state: a step, or one more update on the way to it."""
        others = list(state.layout.others.values())
        at_draws = [{name: drawn.take_gradient() for name, drawn in draw.items()} for draw in perturb.draws]
        sums = [gradient.sum() for draw in at_draws for gradient in draw.values()]
        found: Any = _weights.statistics(perturb, at_draws)
        if self.process_group is not None:
            found = self._averaged(list(found), others)
            usable = all_finite(*(tensor for _, *pair in found for tensor in pair))
        else:
            usable = all_finite(torch.stack(sums))
        if not (usable and all_finite(*(param.grad for param in others if param.grad is not None))):
            return replace(state, weights=replace(state.weights, skipped=state.weights.skipped + 1), pair=None)

        updates = state.updates + 1
        if others:
            self.others(others)
        if self.accumulation_steps > 1:
            for (_, gradients, estimates), (_, gradient, estimate) in zip(state.sums, found, strict=True):
                gradients += gradient
                estimates += estimate
            if updates % self.accumulation_steps:
                return replace(state, updates=updates)
            steps = self.accumulation_steps
            found = [(name, gradients / steps, estimates / steps) for name, gradients, estimates in state.sums]
            for _, *totals in state.sums:
                for total in totals:
                    total.zero_()
        rate = self.learning_rate(state.weights.count) if callable(self.learning_rate) else self.learning_rate
        first = state.settings.paired and not perturb.second
        offsets = perturb.offsets() if first else {}
        weights = _ivon.step(state.weights, found, state.priors, float(rate), state.settings)
        pair = perturb.mirrored(offsets) if first else None
        state = replace(state, weights=weights, updates=updates, pair=pair)
        self._write_scales(state)
        return state

    def _averaged(self, found: Statistics, others: list[Tensor]) -> Statistics:
        """The statistics, and the gradients of the other parameters, averaged over the workers."""
        tensors = [tensor for _, *pair in found for tensor in pair]
        tensors += [param.grad for param in others if param.grad is not None]
        for tensor in tensors:
            torch.distributed.all_reduce(tensor, group=self.process_group)
            tensor.div_(torch.distributed.get_world_size(self.process_group))
        return found

    def _shared(self, state: IVONState) -> IVONState:
        """The first worker's start and seed, at every worker."""
        if self.process_group is None:
            return state
        device = next(iter(state.weights.loc.values())).device  # what the group's engine can send
        seed = torch.tensor(state.seed, device=device)
        others = [param.detach() for param in state.layout.others.values()]
        first = torch.distributed.get_global_rank(self.process_group, 0)
        for tensor in (seed, *state.weights.loc.values(), *others):
            torch.distributed.broadcast(tensor, src=first, group=self.process_group)
        return replace(state, seed=int(seed))

    def _temperature(self, state: IVONState) -> float:
        count = state.weights.count - (state.pair is not None)  # one for both draws of a pair
        return float(self.temperature(count) if callable(self.temperature) else self.temperature)

    @torch.no_grad()
    def _write_scales(self, state: IVONState) -> None:
        """What the guide is to know of σ: the parameters of stock sites, N/τ of an `AutoWeights`."""
        temperature = self._temperature(state)
        for site in state.layout.sites:
            scale = _weights.scale(state.weights, state.priors, state.settings, temperature, site.name)
            constraint = state.layout.constraints[site.scale[0]]
            state.layout.tensors[site.scale[0]].copy_(transform_to(constraint).inv(scale))
        for guide in state.guides:
            guide.num_data.fill_(state.settings.num_data)
            guide.temperature.fill_(temperature)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which begin at this state: its tensors are the guide's own, and theirs are others."""
        return {**vars(self), "state": None, "_program": None, "_loaded": self.get_state()}

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue, beside Pyro's parameter store and the guide: tensors and numbers by name.

        They are copies, which later steps leave as they are.
        """
        if self.state is None:
            return dict(self._loaded)
        weights = self.state.weights
        tensors = {
            "momentum": weights.momentum,
            "hessian": weights.hessian,
            "second_moment": weights.second_moment,
            "sums": self.state.sums,
            "pair": {} if self.state.pair is None else vars(self.state.pair),
        }
        return {
            "count": weights.count,
            "updates": self.state.updates,
            "skipped": weights.skipped,
            "seed": self.state.seed,
            **pytree.tree_map_only(Tensor, Tensor.clone, tensors),
            "others": self.others.get_state(),
        }

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Continue from `get_state()`; taken up at the next step, when the guide's parameters are there."""
        of_weights = {"count", "updates", "skipped", "momentum", "hessian", "second_moment"}
        expected = of_weights | {"seed", "sums", "pair", "others"}
        if state_dict and set(state_dict) != expected:
            raise ValueError(
                f"IVON cannot continue from a state with the entries {sorted(map(str, state_dict))}: it expected "
                f"{sorted(expected)}, as `IVON.get_state()` returns them."
            )
        self._loaded, self.state = dict(state_dict), None

    def _resumed(self, fresh: IVONState) -> IVONState:
        loaded, weights = self._loaded, fresh.weights
        shapes = {name: tuple(value.shape) for name, value in weights.hessian.items()}
        stored = {name: tuple(value.shape) for name, value in loaded["hessian"].items()}
        lengths = [len(loaded["second_moment"].get(name, ())) for name in shapes]
        same = shapes == stored and lengths == [len(weights.second_moment[name]) for name in shapes]
        device = next(iter(weights.loc.values())).device
        half = {
            key: {name: value.to(device, copy=True) for name, value in of.items()} for key, of in loaded["pair"].items()
        }
        pair = _weights.Pair(**half) if half else None
        same &= pair is None or (fresh.settings.paired and pair.spreads.keys() == shapes.keys())
        if not same or len(loaded["sums"]) != len(fresh.sums):
            raise ValueError(
                f"the loaded IVON state belongs to the weights {stored} or to other options; this guide has {shapes}. "
                "Load it for the guide and the options that it was saved with, or start with a new IVON()."
            )
        self._loaded = {}
        self.others.set_state(loaded["others"])
        with torch.no_grad():
            for name in shapes:
                weights.momentum[name].copy_(loaded["momentum"][name])
                weights.hessian[name].copy_(loaded["hessian"][name])
            for name, moments in weights.second_moment.items():
                for factors, values in zip(moments, loaded["second_moment"][name], strict=True):
                    for factor, value in zip(factors, values, strict=True):
                        factor.copy_(value)
            for (_, *totals), (_, *values) in zip(fresh.sums, loaded["sums"], strict=True):
                for total, value in zip(totals, values, strict=True):
                    total.copy_(value)
        weights = replace(weights, count=loaded["count"], skipped=loaded["skipped"])
        return replace(fresh, weights=weights, updates=loaded["updates"], pair=pair)


def _checked_group(process_group: Any) -> Any:
    if process_group is None or process_group is False:
        return None
    if not torch.distributed.is_initialized():
        raise ValueError(
            "process_group needs torch.distributed, which is not initialised: call "
            "torch.distributed.init_process_group (under torchrun), or leave process_group out."
        )
    return torch.distributed.group.WORLD if process_group is True else process_group
