"""The Bayesian learning rule for Gaussian guides.

With q(z) = N(z | m, S⁻¹), ℓ(z) = −log p(D, z) and temperature τ:

    S ← (1 − ρ) S + ρ E_q[∇²ℓ] / τ          precision.blend
    m ← m − ρ S_new⁻¹ E_q[∇ℓ] / τ           precision.solve

which is λ ← (1 − ρ) λ − (ρ/τ) ∇_μ E_q[ℓ] in the natural parameters λ = (S m, −S/2) (`families/_family.py` has the two
lines between). The *new* S in the second line makes ρ = 1 Bayes' rule wherever ℓ is quadratic.

Source: Khan & Rue 2023, "The Bayesian Learning Rule", equations 9 to 12; Khan 2025, arXiv 2509.15641.
Paper's symbols: ρ = `learning_rate`, m = `loc`, S = `precision`, τ = `temperature`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pyro.optim
import torch
from pyro.infer import SVI
from torch import Tensor

from ..families import Block, DensePrecision, DiagonalPrecision, Precision
from ..gradients import Draws, Estimate, Objective, each_draw, hessian, hutchinson, reparameterized
from . import _options, _rate, _svi
from ._layout import Layout, gather, recognise, scatter

__all__ = ["BLR", "OptState", "State", "init", "step"]

MAX_DENSE_DIMENSION = 256
UNLEARNED_SCALE = 0.1


@dataclass(frozen=True)
class State:
    """The Gaussian and what the rule carries with it.

    Attributes:
        loc: m, [D].
        precision: S.
        rate: of the automatic mode (`_rate.RateState`).
        radius: in (0, 1], by which the draws are drawn towards m after a loss that was not finite there.
        skipped: steps so far that left everything else as it was, because the loss or a gradient was not finite.
    """

    loc: Tensor
    precision: Precision
    rate: _rate.RateState
    radius: float
    skipped: int


def init(loc: Tensor, precision: Precision) -> State:
    """The state at N(loc, precision⁻¹)."""
    return State(loc=loc, precision=precision, rate=_rate.init(loc), radius=1.0, skipped=0)


def step(
    state: State,
    objective: Objective,
    blocks: tuple[Block, ...],
    others: Any,
    draws: Draws | None,
    estimator: Callable[..., Estimate],
    learning_rate: float | None = None,
) -> tuple[State, Estimate, bool]:
    """One step of the rule.

    Args:
        objective: L(m, C; ε), see `gradients/_estimate.py`.
        others: parameters of the objective that are no part of the Gaussian; passed through.
        learning_rate: ρ; None lets the draws choose it (`_rate.py`).

    Returns:
        the next state, the estimate, and whether the Gaussian moved. Where the loss, a gradient or the proposed state
        is not finite, nothing moves, the step is counted in `skipped`, and the next draws are taken closer to m.
    """
    scales = scales_of(state.precision, blocks, state.radius)
    estimate = completed(estimator(objective, state.loc, scales, others, draws), state.precision)
    unusable = replace(state, radius=state.radius / 2, skipped=state.skipped + 1)
    if not all_finite(estimate.losses, estimate.gradient, estimate.hessian):
        return unusable, estimate, False

    assert estimate.extras.weight is not None  # `completed` fills it in
    covered = estimate.extras.weight > 0

    def propose(rate: float) -> tuple[Tensor, Precision]:
        precision = state.precision.blend(estimate.hessian, rate)
        direction = torch.where(covered, precision.solve(estimate.gradient), 0.0)
        return state.loc - rate * direction, precision

    def propose_and_evaluate(rate: float) -> tuple[tuple[Tensor, Precision], Tensor]:
        loc, precision = propose(rate)
        proposed_scales = scales_of(precision, blocks, state.radius)
        return (loc, precision), losses_at(objective, loc, proposed_scales, others, draws)

    if learning_rate is None:
        rate, (loc, precision), moved = _rate.search(state.rate, estimate, state.precision, propose_and_evaluate)
    else:
        rate, (loc, precision) = state.rate, propose(learning_rate)
        moved = all_finite(loc, field_of(precision), *scales_of(precision, blocks, state.radius))
        if not moved:
            return unusable, estimate, False

    radius = min(1.0, 2 * state.radius)
    accepted = replace(state, loc=loc, precision=precision, rate=rate, radius=radius)
    rejected = replace(state, rate=rate)
    return (accepted if moved else rejected), estimate, moved


def scales_of(precision: Precision, blocks: tuple[Block, ...], radius: float) -> tuple[Tensor | None, ...]:
    """C_b of every block that has one of its own."""
    return tuple(
        radius * precision.scale(block) if block.structure in ("diagonal", "dense") else None for block in blocks
    )


def losses_at(objective: Objective, loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draws: Any) -> Tensor:
    """L at every draw, [S]; NaN where the proposal itself is not finite."""
    if not all_finite(loc, *scales):
        return torch.full((len(draws.number),), torch.nan, dtype=loc.dtype, device=loc.device)
    location = loc.detach().requires_grad_()  # TraceEnum_ELBO refuses a loss that cannot be differentiated
    with torch.enable_grad():
        return torch.stack([objective(location, scales, others, draw)[0].detach() for draw in each_draw(draws)])


def completed(estimate: Estimate, precision: Precision) -> Estimate:
    """The estimate with what it says nothing about left as it is.

    A coordinate whose entropy enters the loss w times is solved for ℓ/w: the row of a subsampled plate sees its own
    term once and not N/M times. A row outside the batch, and a coordinate that the loss does not depend on, stay.
    """
    diagonal = estimate.hessian.diagonal() if estimate.hessian.ndim == 2 else estimate.hessian
    weight = torch.ones_like(estimate.gradient) if estimate.extras.weight is None else estimate.extras.weight
    weight = torch.where((estimate.gradient == 0) & (diagonal == 0), 0.0, weight)
    gradient_weight = torch.where(weight > 0, weight, 1.0)
    return estimate._replace(
        gradient=estimate.gradient / gradient_weight,
        pair_gradients=estimate.pair_gradients / gradient_weight,
        hessian=precision.complete(estimate.hessian, weight),
        extras=estimate.extras._replace(weight=weight),
    )


def tempered(objective: Objective, blocks: tuple[Block, ...], temperature: float) -> Objective:
    """L/τ with the entropy kept whole: E_q[ℓ]/τ − H(q), whose fixed point is that of E_q[ℓ] − τ H(q)."""
    if temperature == 1:
        return objective

    def tempered_objective(loc, scales, others, draw):
        loss, extras = objective(loc, scales, others, draw)
        if extras.weight is not None:
            raise ValueError("temperature != 1 needs a guide without subsampled or scaled latent sites.")
        log_determinant = sum(
            (scale.diagonal(dim1=-2, dim2=-1) if block.structure == "dense" else scale).log().sum()
            for block, scale in zip(blocks, scales, strict=True)
            if scale is not None
        )
        return loss / temperature + (1 / temperature - 1) * log_determinant, extras

    return tempered_objective


def all_finite(*tensors: Tensor | None) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor is not None)


@dataclass(frozen=True)
class OptState:
    """What the optimizer carries from one `SVI.step` to the next.

    Attributes:
        count: steps so far.
        gaussian: the rule's own state.
        layout: which parameter is which coordinate of the Gaussian.
    """

    count: int
    gaussian: State
    layout: Layout


class BLR(pyro.optim.PyroOptim):
    """The Bayesian learning rule as an optimizer for the stock `SVI`: swap the optimizer, change nothing else.

    Recognises the Gaussian sites of the guide (`AutoNormal`, `AutoDiagonalNormal`, `AutoMultivariateNormal`,
    `AutoGuideList` of these, `AutoDelta`, hand-written `Normal` and `MultivariateNormal` sites fed by parameters) and
    moves them by λ ← (1 − ρ) λ − ρ ∇_μ E_q[ℓ]. On a linear-Gaussian model one step is the exact posterior.

    Args:
        learning_rate: ρ in (0, 1], or a schedule, a function of the step 0, 1, 2, ... None (the default) chooses ρ at
            every step from the draws: as long as the loss at common draws supports, shorter once the natural gradient
            is inside its own Monte Carlo error.
        estimator: of E_q[∇²ℓ]. `"hessian"`: dense Hessians, the choice of `"auto"` up to 256 coordinates and for
            full-rank guides; D + 1 gradients a draw, won back in steps. `"hutchinson"`: the diagonal from
            Hessian-vector products, about 3 gradients a draw; the choice of `"auto"` beyond. `"gradient"`: the stock
            gradient alone, at the host's own draws; noisy, so it needs a `learning_rate`.
        num_draws: draws a step and particle, in antithetic pairs; even. Not used by `estimator="gradient"`.
        temperature: τ > 0 of E_q[ℓ] − τ H(q). 1 is Bayes.
        others: optimizer of the parameters that belong to no recognised site, a `pyro.optim.PyroOptim`;
            `pyro.optim.Adam({"lr": 1e-3})` if None. They get their gradient from the host's own backward pass.

    Raises:
        TypeError, ValueError: at construction for arguments out of range; at the first `svi.step` for a loss that is
            no ELBO, a guide without a Gaussian site, parameters that are not real floating-point tensors, and a
            loaded state of another guide.
        FloatingPointError: from `svi.step` once ten steps and nothing but steps with a loss or gradient that is not
            finite have been taken. Single ones are reported in a warning.

    Example:
        >>> svi = SVI(model, AutoMultivariateNormal(model), BLR(), Trace_ELBO())
        >>> for _ in range(100):
        ...     svi.step(x, y)
    """

    def __init__(
        self,
        learning_rate: float | Callable[[int], float] | None = None,
        *,
        estimator: str = "auto",
        num_draws: int = 8,
        temperature: float = 1.0,
        others: Any = None,
    ) -> None:
        # `PyroOptim.__init__` makes one torch optimizer a tensor, which would part a location from its scale
        self.learning_rate = _options.checked_rate(learning_rate, estimator)
        self.estimator = _options.checked_estimator(estimator)
        self.num_draws = _options.checked_num_draws(num_draws)
        self.temperature = _options.checked_temperature(temperature)
        self.others = _svi.host_optimizer(others)
        self.state: OptState | None = None
        self._loaded: dict[str, Any] = {}

    def init(self, svi: SVI, args: tuple, kwargs: dict, params: list[Tensor]) -> OptState:
        """The state for the parameters of `svi.guide` as they are now, or the one that was loaded for them."""
        _svi.check_params(params)
        loss = _svi.check_loss(svi)
        layout = recognise(svi, loss, args, kwargs, params, stock_gradients=self.estimator == "gradient")
        full_rank = any(block.structure == "dense" for block in layout.blocks)
        if full_rank and self.estimator == "hutchinson":
            raise ValueError(
                "estimator='hutchinson' gives the diagonal of the Hessian, and the guide has a full-rank site. "
                "Use estimator='hessian', or a mean-field guide."
            )
        dimension = sum(block.size for block in layout.blocks)
        small = self.estimator == "hessian" or (self.estimator == "auto" and dimension <= MAX_DENSE_DIMENSION)
        family = DensePrecision if full_rank or small else DiagonalPrecision
        loc, scales = gather(layout)
        gaussian = init(loc, family.from_scales(layout.blocks, scales, UNLEARNED_SCALE, like=loc))
        state = OptState(count=0, gaussian=gaussian, layout=layout)
        return self._resumed(state) if self._loaded else state

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One step, from the gradients of `SVI.step` and draws of its own; called by `SVI.step`."""
        params = list(params)
        svi, model_args, model_kwargs = _svi.calling_svi(SVI.step)
        state = self.state
        if state is None or not state.layout.covers(params):
            fresh = self.init(svi, model_args, model_kwargs, params)
            # a parameter of the model that appears later does not start the Gaussian anew
            keep = state is not None and state.layout.same_gaussian(fresh.layout)
            state = OptState(state.count, state.gaussian, fresh.layout) if state is not None and keep else fresh
        before, layout = state.gaussian, state.layout
        if self.estimator == "gradient":
            objective, draws = _svi.host_gradients(layout), None
        else:
            seed = int(torch.randint(2**62, ()))
            objective, draws = _svi.objective_of(svi, model_args, model_kwargs, layout, seed), self._draws(before, seed)
        gaussian, _, moved = step(
            before,
            tempered(objective, layout.blocks, self.temperature),
            layout.blocks,
            None,
            draws,
            self._estimator(before.precision, layout.blocks),
            self._rate(state.count),
        )
        if moved:
            scatter(layout, gaussian.loc, scales_of(gaussian.precision, layout.blocks, 1.0))
        others = list(layout.others.values())
        used = gaussian.skipped == before.skipped
        if others and used and all_finite(*(param.grad for param in others)):
            self.others(others)
        self.state = OptState(count=state.count + 1, gaussian=gaussian, layout=layout)
        if not used:
            _svi.report_skipped(self.state.count, gaussian.skipped)

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue: tensors and numbers by name, for `torch.save`."""
        if self.state is None:
            return {}
        gaussian = self.state.gaussian
        return {
            "count": self.state.count,
            "loc": gaussian.loc,
            "precision": field_of(gaussian.precision),
            "rate": vars(gaussian.rate).copy(),
            "radius": gaussian.radius,
            "skipped": gaussian.skipped,
            "sites": described(self.state.layout),
            "others": self.others.get_state(),
        }

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Continue from `get_state()`; taken up at the next step, when the guide's parameters are there."""
        expected = {"count", "loc", "precision", "rate", "radius", "skipped", "sites", "others"}
        if state_dict and set(state_dict) != expected:
            raise ValueError(
                f"BLR cannot continue from a state with the entries {sorted(map(str, state_dict))}: it expected "
                f"{sorted(expected)}, as `BLR.get_state()` returns them."
            )
        self._loaded, self.state = dict(state_dict), None

    def _resumed(self, fresh: OptState) -> OptState:
        loaded, gaussian = self._loaded, fresh.gaussian
        family: Any = type(gaussian.precision)
        expected = (described(fresh.layout), field_of(gaussian.precision).shape)
        stored = (loaded["sites"], loaded["precision"].shape)
        if stored != expected:
            raise ValueError(
                f"the loaded BLR state belongs to the sites {stored[0]} with a precision of shape {tuple(stored[1])}; "
                f"this guide has {expected[0]} and {tuple(expected[1])}. Load it for the guide and the options that "
                "it was saved with, or start with a new BLR()."
            )
        self._loaded = {}
        self.others.set_state(loaded["others"])
        return replace(
            fresh,
            count=loaded["count"],
            gaussian=State(
                loc=loaded["loc"],
                precision=family(loaded["precision"]),
                rate=_rate.RateState(**loaded["rate"]),
                radius=loaded["radius"],
                skipped=loaded["skipped"],
            ),
        )

    def _draws(self, gaussian: State, seed: int) -> Draws:
        num_pairs, loc = self.num_draws // 2, gaussian.loc
        probes = None
        if isinstance(gaussian.precision, DiagonalPrecision):
            # a generator of their own, beside those of the draws: the host's random state does not depend on them
            generator = torch.Generator(loc.device).manual_seed(seed + 1 + self.num_draws)
            signs = torch.randint(2, (self.num_draws, len(loc)), generator=generator, device=loc.device)
            probes = signs.to(loc.dtype) * 2 - 1
        return Draws(number=2 * list(range(num_pairs)), sign=[1.0] * num_pairs + [-1.0] * num_pairs, probes=probes)

    def _estimator(self, precision: Precision, blocks: tuple[Block, ...]) -> Callable[..., Estimate]:
        dense = isinstance(precision, DensePrecision)
        if self.estimator == "gradient":
            return lambda objective, loc, scales, others, _: reparameterized(
                objective, loc, scales, others, blocks, dense=dense
            )
        return hessian if dense else hutchinson

    def _rate(self, count: int) -> float | None:
        if callable(self.learning_rate):
            return _options.checked_schedule_value(self.learning_rate(count), count)
        return self.learning_rate


def described(layout: Layout) -> list[tuple[str, str, tuple[int, ...]]]:
    """What a saved state must agree with."""
    return [(site.name, site.block.structure, site.block.shape) for site in layout.sites]


def field_of(precision: Any) -> Tensor:
    return precision.matrix if isinstance(precision, DensePrecision) else precision.diagonal
