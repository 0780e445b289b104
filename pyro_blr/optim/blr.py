"""The Bayesian learning rule as an optimizer for Pyro's SVI: which rule moves which parameter.

The rules themselves are `_gaussian.py` (Gaussian sites, at a rate that is given or that the draws choose),
`_recycled.py` (the same with the draws of earlier steps) and `_sweep.py` (sites of other families);
`_recognition.py` says which parameters are which site's.

Source: Khan & Rue 2023, "The Bayesian Learning Rule"; Khan 2025, arXiv 2509.15641.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyro.optim
import torch
from pyro.infer import SVI
from torch import Tensor

from ..families import (
    DensePrecision,
    DiagonalPrecision,
    LowRankPrecision,
    MultivariateNormalNatural,
    NormalNatural,
    factored,
)
from ..gradients import (
    Chords,
    Draws,
    Estimate,
    Extras,
    Graphs,
    Objective,
    Split,
    chords,
    each_draw,
    has_second_derivative,
    hessian,
    hutchinson,
    parted,
    product,
    reparameterized,
    secant,
)
from . import _options, _recycled, _saved, _svi, _sweep
from ._conjugacy import are_jointly_quadratic, find_roles
from ._gaussian import State, all_finite, beside, init, scales_of, step, tempered
from ._layout import Layout, gather, gather_members, joined, scatter, scatter_members
from ._recognition import halved, recognise
from ._traced import Traced, Tracer

__all__ = ["BLR", "OptState", "State", "init", "scales_of", "step", "tempered"]

MAX_DENSE_DIMENSION = 256
NUM_DRAWS, NUM_DRAWS_ON_BATCHES = 8, 4
UNLEARNED_SCALE = 0.1
GAUSSIANS = (NormalNatural, MultivariateNormalNatural)


@dataclass(frozen=True)
class OptState:
    """What the optimizer carries from one `SVI.step` to the next.

    Attributes:
        count: steps so far.
        gaussian: the state of the Gaussian over the layout's sites; None where there are none.
        members: the state of the rule for the layout's members.
        layout: which parameter is which coordinate of the Gaussian, or of a member.
        roles: how each member takes part, in the order of a sweep.
        seed: of all draws, from the host's random state at the first step: how much of that the host's own evaluation
            of the loss takes from step to step makes no difference to them.
        estimator: of E_q[∇²ℓ], the one that is taken for `"auto"`.
        num_draws: a step, or the most.
        differences: whether second derivatives are differences of gradients, because the model has none.
    """

    count: int
    gaussian: State | None
    members: _sweep.Sweep
    layout: Layout
    roles: tuple[_sweep.Role, ...]
    seed: int
    estimator: str
    num_draws: int
    differences: bool = False

    @property
    def step_seed(self) -> int:
        """Of the draws of the next step."""
        return int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(self.seed + self.count)))

    @property
    def skipped(self) -> int:
        """Steps so far in which something was not finite and left the Gaussian, or a member, as it was."""
        return self.members.skipped if self.gaussian is None else max(self.members.skipped, self.gaussian.skipped)

    @property
    def gradient_evaluations(self) -> int:
        """Gradients so far for the Gaussian; a Hessian counts as D, a Hessian-vector product as 2, a loss as 1."""
        return 0 if self.gaussian is None else self.gaussian.evaluations

    @property
    def secants(self) -> bool:
        """Whether the curvature is that of secants, from the start or since Hessians missed it."""
        recycling = None if self.gaussian is None else self.gaussian.recycling
        missed = None if recycling is None else recycling.missed
        return self.estimator == "secant" if missed is None else missed.secants


class BLR(pyro.optim.PyroOptim):
    """The Bayesian learning rule as an optimizer for the stock `SVI`: swap the optimizer, change nothing else.

    Recognises the Gaussian sites of the guide (`AutoNormal`, `AutoDiagonalNormal`, `AutoMultivariateNormal`,
    `AutoLowRankMultivariateNormal`, `AutoGuideList` of these, `AutoDelta`, hand-written `Normal` and
    `MultivariateNormal` sites fed by parameters) and moves them by λ ← (1 − ρ) λ − ρ ∇_μ E_q[ℓ]. On a linear-Gaussian
    model one step is the exact posterior. Sites of other exponential families (`AutoExponentialFamily`,
    `natural_param`, a `Gamma` fed by parameters) move by the same rule, one after the other.

    Args:
        learning_rate: ρ in (0, 1], or a schedule, a function of the step 0, 1, 2, ... None (the default) chooses ρ at
            every step from the draws: as long as the loss at common draws supports, shorter once the natural gradient
            is inside its own Monte Carlo error.
        estimator: of E_q[∇²ℓ]. `"hessian"`: dense Hessians, the choice of `"auto"` up to 256 coordinates and for
            guides of full and low rank; D + 1 gradients a draw (2 D + 1 where the model has no second derivative), won
            back in steps. `"hutchinson"`: the diagonal from Hessian-vector products, 2 gradients a site (of at most 4)
            and 1, a draw, and on all data, without a `learning_rate`, the mean by conjugate gradients from up to 30
            more products (`_newton.py`); the choice of `"auto"` beyond. `"secant"`: either, from differences of
            gradients at a distance, of a log density with kinks too; 2 D + 1 gradients a draw, or as Hutchinson's; the
            choice of `"auto"` where a site is a Laplace distribution or made of one, and, where draws are recycled,
            while Hessians miss most of the curvature (`_missed.py`). `"gradient"`: the stock gradient alone, at the
            host's own draws; noisy, so it needs a `learning_rate`.
        num_draws: draws a step and particle, in antithetic pairs: even, and at least 4. Where draws are recycled, the
            most: a step begins with one pair. None is 8, or 4 where a plate is subsampled, since all draws of a step
            share the noise of its minibatch. Not used by `estimator="gradient"`.
        temperature: τ > 0 of E_q[ℓ] − τ H(q). 1 is Bayes.
        others: optimizer of the parameters that belong to no recognised site, a `pyro.optim.PyroOptim`. They get their
            gradient from the host's own backward pass. None: with up to 256 coordinates in all, and no `learning_rate`,
            they are points beside the sites and take their steps, which are Newton's; otherwise
            `pyro.optim.Adam({"lr": 0.01})`.

    Raises:
        TypeError, ValueError: at construction for arguments out of range; at the first `svi.step` for a loss that is
            no ELBO, a guide without a recognised site, parameters that are not real floating-point tensors, and a
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
        num_draws: int | None = None,
        temperature: float = 1.0,
        others: Any = None,
    ) -> None:
        # `PyroOptim.__init__` makes one torch optimizer a tensor, which would part a location from its scale
        self.learning_rate = _options.checked_rate(learning_rate, estimator)
        self.estimator = _options.checked_estimator(estimator)
        self.num_draws = None if num_draws is None else _options.checked_num_draws(num_draws)
        self.temperature = _options.checked_temperature(temperature)
        self.others = _svi.host_optimizer(others)
        alone = others is None and learning_rate is None and estimator in ("auto", "hessian")
        self._most_points = MAX_DENSE_DIMENSION if alone else 0
        self.state: OptState | None = None
        self.compile: bool | str = False  # True, "auto" or "inductor": steps on the loss traced once (`_traced.py`)
        self._tracer, self._held_tracer = Tracer(), Tracer()
        self._fingerprint = _svi.Fingerprint()
        self._turns = _svi.Turns()
        self._seen: tuple[Any, ...] = ()
        self._loaded: dict[str, Any] = {}

    def init(self, svi: SVI, args: tuple, kwargs: dict, params: list[Tensor], points: int = 0) -> OptState:
        """The state for the parameters of `svi.guide` as they are now, or the one that was loaded for them."""
        _svi.check_params(params)
        loss = _svi.check_loss(svi)
        gradient_only = self.estimator == "gradient"
        recognised = partial(recognise, svi, loss, args, kwargs, params, learned_scales_only=gradient_only)
        layout = recognised(points=points)
        if layout.sites and not (layout.members or gradient_only):
            read = _svi.read_by_the_program(svi, args, kwargs, layout)
            if read and any(site.bare for site in layout.sites):  # modules, whose own optimizer moves them
                _svi.check_not_modules_alone(read, layout)
                layout = recognised()
                read &= set(layout.tensors)
            _svi.check_not_read(read)
        if layout.members and gradient_only:
            raise ValueError(
                "estimator='gradient' uses the stock gradient of Gaussian sites alone, and the guide has "
                f"{', '.join(member.name for member in layout.members)} of other families. Use the default estimator."
            )
        layout, roles = self._roles(svi, args, kwargs, layout) if layout.members else (layout, ())
        gaussian, estimator, num_draws = None, "none", self.num_draws or NUM_DRAWS
        if layout.sites:
            gaussian, estimator, num_draws = self._gaussian(svi, args, kwargs, layout)
        layout = halved(layout, svi.guide) if estimator == "hessian" else layout
        state = OptState(
            count=0,
            gaussian=gaussian,
            members=_sweep.init(gather_members(layout)),
            layout=layout,
            roles=roles,
            seed=self._loaded["seed"] if self._loaded else int(torch.randint(2**62, ())),
            estimator=estimator,
            num_draws=num_draws,
        )
        state = replace(state, differences=self._needs_differences(svi, args, kwargs, state))
        if not self._loaded:
            return state
        resumed = _saved.resumed(state, self._loaded)
        self.others.set_state(self._loaded["others"])
        self._loaded = {}
        return resumed

    def _gaussian(self, svi: SVI, args: tuple, kwargs: dict, layout: Layout) -> tuple[State, str, int]:
        """The state for the sites, the estimator of their curvature, and the draws of a step."""
        structures = {block.structure for block in layout.blocks}
        low_rank, full = "low rank" in structures, not structures.isdisjoint({"dense", "low rank"})
        if full and self.estimator == "hutchinson":
            raise ValueError(
                "estimator='hutchinson' gives the diagonal of the Hessian, and the guide has a full-rank or a low-rank "
                "site. Use estimator='hessian', or a mean-field guide."
            )
        if low_rank and self.estimator == "gradient":
            raise ValueError(
                "estimator='gradient' is for sites that are mean field or full rank, and the guide has a low-rank "
                "site. Use estimator='hessian'."
            )
        dimension = sum(block.size for block in layout.blocks)
        small = dimension <= MAX_DENSE_DIMENSION and self.estimator in ("auto", "secant")
        dense = full or small or self.estimator == "hessian"
        family = LowRankPrecision if low_rank else DensePrecision if dense else DiagonalPrecision
        loc, scales = gather(layout)
        precision = family.from_scales(layout.blocks, scales, UNLEARNED_SCALE, like=loc)
        survey, estimator = _svi.survey(svi, args, kwargs, layout), self.estimator
        recycles = dense and self.learning_rate is None and survey.fixed
        if estimator == "auto":
            estimator = "secant" if survey.kinked else "hessian" if dense else "hutchinson"
        may_miss = self.estimator == "auto" and estimator == "hessian" and recycles
        by_products = estimator == "hutchinson" and self.learning_rate is None and not survey.minibatch
        num_draws = self.num_draws or (NUM_DRAWS_ON_BATCHES if survey.minibatch else NUM_DRAWS)
        start = loc
        if self.learning_rate is None:
            bare = torch.as_tensor(layout.bare, device=loc.device)
            start = torch.where(bare, loc, beside(loc, precision, layout.blocks))
        _, factors = factored(layout.blocks, scales)
        recycling = _recycled.init(loc, factors, num_draws // 2, may_miss) if recycles else None
        return init(start, precision, recycling, by_products), estimator, num_draws

    def _needs_differences(self, svi: SVI, args: tuple, kwargs: dict, state: OptState) -> bool:
        if state.gaussian is None or state.layout.members or state.estimator in ("secant", "gradient"):
            return False
        objective, blocks = _svi.objective_of(svi, args, kwargs, state.layout, seed=0), state.layout.blocks
        scales = scales_of(state.gaussian.precision, blocks, 1.0)
        return not has_second_derivative(objective, state.gaussian.loc, scales, None, Draws(0, 1.0, None), blocks)

    def _roles(self, svi: SVI, args: tuple, kwargs: dict, layout: Layout) -> tuple[Layout, tuple[_sweep.Role, ...]]:
        """How each member takes part; Normal members that no conjugacy holds for join the Gaussian of the sites."""
        naturals = gather_members(layout)
        objective = _svi.objective_of(svi, args, kwargs, layout, seed=0)
        loc, scales = gather(layout)

        def evaluate_at(values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            num_runs = len(next(iter(values.values())))
            discrete = {name: natural for name, natural in naturals.items() if natural.discrete}
            own = {
                name: (
                    loc.new_ones((num_runs, *natural.batch_shape), dtype=natural.flat().dtype)
                    if name in discrete
                    else values[name].detach().clone()
                ).requires_grad_()
                for name, natural in naturals.items()
            }
            members = _svi.Members(
                values={name: values[name] if name in discrete else own[name] for name in naturals},
                weights={name: own[name] for name in discrete},
            )
            draws = Draws(number=[0] * num_runs, sign=[1.0] * num_runs, probes=None, members=members.each(num_runs))
            with torch.enable_grad():
                losses = torch.stack([objective(loc, scales, None, draw)[0] for draw in each_draw(draws)])
                total = losses.sum() + sum(0 * leaf.sum() for leaf in own.values())  # a flat prior may be all there is
                slopes = torch.autograd.grad(total, tuple(own.values()))
            return losses.detach(), dict(zip(own, slopes, strict=True))

        roles = find_roles(layout.members, naturals, evaluate_at)
        ours = {member.name for member in layout.members if not member.keys}
        gaussian = [role.name for role in roles if isinstance(naturals[role.name], GAUSSIANS) and role.name in ours]
        not_affine = [role.name for role in roles if role.name in gaussian and role.kind != "affine"]
        size = sum(site.block.size for site in layout.sites)
        size += sum(naturals[name].to_distribution().mean.numel() for name in gaussian)
        alone = len(gaussian) == len(roles) > 1 and not any(role.local for role in roles)
        if size <= MAX_DENSE_DIMENSION and (
            layout.sites or not_affine or (alone and are_jointly_quadratic(naturals, evaluate_at))
        ):
            not_affine = gaussian  # one dense precision for all of them takes fewer steps than one after the other
        layout = joined(layout, not_affine)
        return layout, tuple(role for role in roles if role.name not in not_affine)

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """One step, from the gradients of `SVI.step` and draws of its own; called by `SVI.step`."""
        params = list(params)
        svi, model_args, model_kwargs = _svi.calling_svi(SVI.step)
        self._turns.take(svi, "BLR")
        state = self.state
        if state is None or not state.layout.covers(params):
            # without points so far, a parameter that appears later is left to `others`, and the Gaussian goes on
            none = state is not None and not any(site.bare for site in state.layout.sites)
            fresh = self.init(svi, model_args, model_kwargs, params, points=0 if none else self._most_points)
            # a parameter of the model that appears later does not start the sites anew
            keep = state is not None and state.layout.same_sites(fresh.layout)
            state = replace(state, layout=fresh.layout, roles=fresh.roles) if state is not None and keep else fresh
        stock = _svi.host_gradients(state.layout) if self.estimator == "gradient" else None
        self._step(svi, model_args, model_kwargs, state, stock)
        self._seen = _svi.seen(svi)

    @property
    def traced_reason(self) -> str | None:
        """Why the last step was not traced though `compile` asks for it; None where it was."""
        return self._tracer.reason

    def advance(self, svi: SVI, *args: Any, **kwargs: Any) -> float:
        """What `svi.step(*args, **kwargs)` does to the parameters, without the host's own evaluation of the loss.

        Where something does need its gradients, or the parameters are not those of the last step, it is `svi.step`.

        Returns:
            the loss that the step is taken on, averaged over its draws, or what `svi.step` returns.
        """
        state = self.state
        if state is None or state.layout.others or not _svi.unchanged(self._seen, svi):
            return svi.step(*args, **kwargs)
        if self.estimator != "gradient":
            return self._step(svi, args, kwargs, state)
        objective, _ = (
            self._objective(svi, args, kwargs, state, state.step_seed, None) if self.compile else (None, None)
        )
        if not isinstance(objective, Traced):
            return svi.step(*args, **kwargs)
        return self._step(svi, args, kwargs, state, objective)

    def _step(self, svi: SVI, args: tuple, kwargs: dict, state: OptState, objective: Objective | None = None) -> float:
        """One step of every part, at the host's own draw where an objective for it is given; the loss."""
        layout, gaussian, members, naturals = state.layout, state.gaussian, state.members, None
        draws, split, loss, seed = None, None, torch.tensor(torch.nan), state.step_seed
        if objective is None:
            draws = self._draws(state, seed)
            objective, split = self._objective(svi, args, kwargs, state, seed, draws)
        if layout.members:
            assert draws is not None  # `init` refuses the other estimator
            plain = _svi.objective_of(svi, args, kwargs, layout, seed)
            members, naturals, draws, loss = self._sweep(plain, state, draws, seed)
        if gaussian is not None and gaussian.recycling is not None:
            normals = partial(_svi.joint_noise, seed, like=gaussian.loc)
            gaussian, noise = _recycled.drawn(gaussian, normals, state.num_draws // 2)
            digest = self._fingerprint.of(args, kwargs)
            gaussian, average, moved = _recycled.step(
                gaussian,
                objective,
                layout.blocks,
                noise,
                self.temperature,
                digest,
                chords=self._chords(state, seed, len(gaussian.loc)) if state.secants else None,
                split=split,
                differences=state.differences,
            )
            loss = self.temperature * average
        elif gaussian is not None:
            by_products = gaussian.num_averaged is not None and not state.differences
            graphs: Graphs | None = [] if by_products else None
            gaussian, estimate, moved = step(
                gaussian,
                objective,
                layout.blocks,
                None,
                draws,
                self._estimator(state, split, graphs),
                self._rate(state.count),
                None if graphs is None else partial(product, graphs=graphs),
            )
            loss = loss if layout.members else self.temperature * estimate.loss
        if gaussian is not None and moved:
            scatter(layout, gaussian.loc, scales_of(gaussian.precision, layout.blocks, 1.0))
        if naturals is not None:
            scatter_members(layout, naturals)

        self.state = replace(state, count=state.count + 1, gaussian=gaussian, members=members)
        others = list(layout.others.values())
        used = gaussian is None or state.gaussian is None or gaussian.skipped == state.gaussian.skipped
        if others and used and all_finite(*(param.grad for param in others)):
            self.others(others)
        if self.state.skipped != state.skipped:
            _svi.report_skipped(self.state.count, self.state.skipped)
        return float(loss)

    def _objective(
        self, svi: SVI, args: tuple, kwargs: dict, state: OptState, seed: int, draws: Draws | None
    ) -> tuple[Objective, Split | None]:
        """The loss that the Gaussian is moved on, and by what its Hessians cost less, if by anything.

        They are `Traced` where `compile` asks for it and they can be.
        """
        layout, gaussian = state.layout, state.gaussian
        scales = () if gaussian is None else scales_of(gaussian.precision, layout.blocks, gaussian.radius)
        start = None if gaussian is None else (gaussian.loc, scales)

        def temper(objective: Objective) -> Objective:
            return tempered(objective, layout.blocks, self.temperature)

        def traced(tracer: Tracer, layout: Layout, untraced: Objective, split_by: Callable[[Objective], Any]) -> Any:
            def estimate(objective: Objective, loc: Tensor) -> Estimate:
                estimator, (whole, split) = self._estimator, split_by(objective)
                return estimator(state, split)(whole, loc, scales, None, draws, layout.blocks)

            return tracer.objective(
                self.compile, svi, args, kwargs, layout, untraced, temper, estimate, start, seed, state.differences
            )

        objective, split = temper(_svi.objective_of(svi, args, kwargs, layout, seed)), None
        if layout.wide:
            split = Split(temper(_svi.objective_of(svi, args, kwargs, layout.holding, seed)), layout.wide)
        if state.secants:
            objective = _svi.Mapped(objective, temper(_svi.traceable_objective_of(svi, args, kwargs, layout, seed)))
        if not self.compile:
            return objective, split
        whole = traced(self._tracer, layout, objective, lambda objective: (objective, split))
        if split is not None and isinstance(whole, Traced):
            by_held = lambda held: (whole, Split(held, layout.wide))  # noqa: E731
            split = Split(traced(self._held_tracer, layout.holding, split.held, by_held), layout.wide)
        return whole, split

    def _sweep(
        self, objective: Objective, state: OptState, draws: Draws, seed: int
    ) -> tuple[_sweep.Sweep, dict[str, Any], Draws, Tensor]:
        """One update of every member, the draws with which the Gaussian is to be updated given them, and the loss."""
        layout, gaussian = state.layout, state.gaussian
        naturals = gather_members(layout)
        design = _sweep.design_of(state.roles, naturals, len(draws.number))
        loc, scales = gather(layout)
        if gaussian is not None:
            scales = scales_of(gaussian.precision, layout.blocks, gaussian.radius)
        runs = draws._replace(
            number=[draws.number[draw] for draw in design.draw],
            sign=[draws.sign[draw] for draw in design.draw],
            probes=None,
            chords=None,
        )

        def evaluate(members: _svi.Members, others: Any) -> tuple[Tensor, Extras]:
            each = each_draw(runs._replace(members=members.each(len(design.draw))))
            losses, extras = zip(*(objective(loc, scales, others, draw) for draw in each), strict=True)
            return torch.stack(losses), extras[0]

        members, naturals, loss, _, _ = _sweep.sweep(
            state.members,
            naturals,
            evaluate,
            None,
            state.roles,
            design,
            seed,
            self._rate(state.count),
            self.temperature,
        )
        draws = runs._replace(
            probes=None if draws.probes is None else draws.probes[design.draw],
            chords=None if draws.chords is None else Chords(*(chord[design.draw] for chord in draws.chords)),
            members=_sweep.place(naturals, state.roles, design, seed).each(len(design.draw)),
        )
        return members, naturals, draws, loss

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which begin at this state with the parameters that they find."""
        new = {
            "state": None,
            "_seen": (),
            "_tracer": Tracer(),
            "_held_tracer": Tracer(),
            "_fingerprint": _svi.Fingerprint(),
        }
        return {**vars(self), **new, "_loaded": self.get_state()}

    def get_state(self) -> dict[str, Any]:
        """Everything needed to continue: tensors and numbers by name, for `torch.save`."""
        if self.state is None:
            return dict(self._loaded)
        return {**_saved.entries(self.state), "others": self.others.get_state()}

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Continue from `get_state()`; taken up at the next step, when the guide's parameters are there."""
        expected = _saved.NAMES | {"others"}
        if state_dict and set(state_dict) != expected:
            raise ValueError(
                f"BLR cannot continue from a state with the entries {sorted(map(str, state_dict))}: it expected "
                f"{sorted(expected)}, as `BLR.get_state()` returns them."
            )
        self._loaded, self.state = dict(state_dict), None

    def _draws(self, state: OptState, seed: int) -> Draws:
        gaussian = state.gaussian
        if gaussian is None and all(role.kind != "drawn" for role in state.roles):
            return Draws(number=[0], sign=[1.0], probes=None)  # the sweep's expectations are exact
        recycling = None if gaussian is None else gaussian.recycling
        num_pairs = state.num_draws // 2 if recycling is None else recycling.num_pairs
        draws = Draws(number=2 * list(range(num_pairs)), sign=[1.0] * num_pairs + [-1.0] * num_pairs, probes=None)
        if gaussian is not None and isinstance(gaussian.precision, DiagonalPrecision):
            # a generator of their own, beside those of the draws: the host's random state does not depend on them
            loc = gaussian.loc
            generator = torch.Generator(loc.device).manual_seed(seed + 1 + state.num_draws)
            signs = torch.randint(2, (state.num_draws, len(loc)), generator=generator, device=loc.device)
            draws = draws._replace(probes=parted(signs.to(loc.dtype) * 2 - 1, state.layout.blocks))
        if gaussian is not None and state.secants:
            num_directions = len(gaussian.loc) if draws.probes is None else draws.probes.shape[1]
            own = self._chords(state, seed, num_directions)
            draws = draws._replace(chords=Chords(*(chord[:num_pairs] for chord in own)).mirrored())
        return draws

    def _chords(self, state: OptState, seed: int, num_directions: int) -> Chords:
        """Of as many pairs as a step may draw."""
        assert state.gaussian is not None  # there are curvatures to estimate
        loc = state.gaussian.loc
        generator = torch.Generator(loc.device).manual_seed(seed + 2 + state.num_draws)
        return chords(generator, state.num_draws // 2, num_directions, like=loc)

    def _estimator(self, state: OptState, split: Split | None, graphs: Graphs | None = None) -> Callable[..., Estimate]:
        if state.estimator == "gradient":
            assert state.gaussian is not None  # there is one whose gradient it is
            dense = isinstance(state.gaussian.precision, DensePrecision)
            return lambda objective, loc, scales, others, _, blocks: reparameterized(
                objective, loc, scales, others, blocks, dense=dense
            )
        if state.secants:
            return secant
        if state.estimator == "hessian":
            return partial(hessian, split=split, differences=state.differences)
        return partial(hutchinson, differences=state.differences, graphs=graphs)

    def _rate(self, count: int) -> float | None:
        if callable(self.learning_rate):
            return _options.checked_schedule_value(self.learning_rate(count), count)
        return self.learning_rate
