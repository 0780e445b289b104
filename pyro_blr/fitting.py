"""`fit`: the stock SVI with BLR until it has converged, and a warning where it has not or cannot.

With r² = gᵀ S⁻¹ g, the squared Fisher norm of the natural gradient, and V its Monte Carlo variance, in nats:

    what a full step gains ≈ r²/2,        what noise costs ≈ c V/2,        c = ρ/(2 − ρ), or 1 with recycled draws.

Converged, at two checks in a row: r² < 2 V or r²/2 < tolerance/10; c V/2 < tolerance; recycled draws are worth eight or
more, and their expected Hessian Ĥ is in no direction below a quarter of S, as on a saddle or where nothing holds q; and
the ELBO no longer rises. A drift along few of many coordinates is inside the noise of all: with the draws of each step
alone, the mean's averages over the last three quarters of the steps, e₁ and e₂ apart, must not go on in one direction,
e₁ᵀ S e₂ > |e₁| |e₂| / 2, in which the last quarter gained e₂ᵀ S e₂ / (2 Σ ρ) > tolerance/10. Sweeps that are exact have
no noise: their ELBO stands still. The noise of minibatches is in r² and not in V, that of other optimizers in neither:
there c r²/2 < tolerance over the last third of the checks, other parameters do not drift, and the averaged loss no
longer falls, which is less, and is said.

r² = `residual`, V = `error`, ρ = `rate`, e₁, e₂ = `moves`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from tqdm import tqdm

from .gradients import recycled
from .optim import _rate
from .optim._gaussian import field_of
from .optim._layout import Layout, undisturbed
from .optim.blr import BLR, OptState, scales_of
from .results import MAX_PARETO_K, Fit, Fitted, arviz_is_installed, pareto_k

__all__ = ["Check", "fit", "judge", "num_steps_between_checks"]

_CHOICES = ("auto", True, False, "inductor")
BETWEEN_CHECKS, SHARE_BETWEEN_CHECKS = 5, 20
_TRACED_AFTER = 30  # steps: tracing takes the time of about as many
MIN_EFFECTIVE, MIN_CURVATURE = 8.0, 0.25
MIN_HIDDEN, MIN_CERTAINTY = 0.1, 5.0
MIN_AVERAGED, MAX_AVERAGED_RATE, MAX_DRIFT, NEGLIGIBLE = 60, 0.1, 1.0, 1e-3  # a steady drift is √12 of its spread
MIN_IN_QUARTER, CREEPING = 2, 0.5
MAX_FOLLOWED = 1000  # parameters of other optimizers
FRESH_DRAWS = 300


@dataclass(frozen=True)
class Check:
    """What is known after `step` steps; NaN is unknown.

    Attributes:
        elbo: with its standard error `elbo_error`.
        residual: r²; `error` is V.
        rate: ρ of the last step that was taken.
        effective: draws that recycled ones are worth.
        noise_cost: nats that noise of the mean and of the scales costs, where draws are recycled.
        curvature: the smallest eigenvalue of S⁻¹ Ĥ, 1 where the rule is at rest.
        creep: nats that a drift of the mean gained over the last quarter of the steps; 0 where it only went to and fro.
        drift: by how much the parameters of other optimizers moved on, over their spread, between two thirds of the
            checks.
    """

    step: int
    elbo: float
    elbo_error: float
    residual: float = math.nan
    error: float = math.nan
    rate: float = math.nan
    effective: float = math.nan
    noise_cost: float = math.nan
    curvature: float = math.nan
    creep: float = math.nan
    drift: float = math.nan


def fit(
    model: Callable,
    guide: Any,
    *args: Any,
    seed: int = 0,
    learning_rate: float | Callable[[int], float] | None = None,
    max_steps: int = 1000,
    loss: Any = None,
    progress_bar: bool = True,
    optimizer: BLR | None = None,
    tolerance: float = 0.01,
    compile: bool | str = "auto",
    **kwargs: Any,
) -> Fit:
    """Fit `guide` to `model` by the stock SVI with BLR, until it has converged.

    The parameters are those of the global store, as ever: those that are there already are where the fit starts.

    Args:
        guide: a guide, or a class of guides that takes the model, such as AutoNormal.
        args, kwargs: of the model. One that bears the name of an option here is given by position.
        seed: of the start and of all draws; `pyro.set_rng_seed(seed)`, which nothing takes back.
        learning_rate: of BLR; None chooses it at every step.
        max_steps: steps after which the fit ends, converged or not.
        loss: an ELBO of the host; `Trace_ELBO()` if None.
        optimizer: a BLR with other options than its learning rate, in place of `learning_rate`.
        tolerance: nats by which the ELBO may fall short for Monte Carlo noise.
        compile: False lets the host evaluate the loss at every draw: slow, and every value can be looked at. "auto"
            traces the loss where that can be done, after 30 steps, in the time of about as many, and from then on a
            step takes a tenth to a half; a short fit ends sooner without, and a loss of over ten thousand operations
            takes minutes. True traces from the start and raises where it cannot, and "inductor" compiles as well.

    Raises:
        TypeError, ValueError: for an argument out of range, and what BLR raises for the guide, the loss and the rate.
        FloatingPointError: nothing but steps with a loss or gradient that is not finite.

    Example:
        >>> result = fit(model, AutoNormal, x, y)
        >>> print(result)
        >>> result.sample(1000)["weights"]
    """
    optimizer = _checked(guide, learning_rate, max_steps, optimizer, tolerance, compile)
    pyro.set_rng_seed(seed)
    svi = SVI(model, guide(model) if isinstance(guide, type) else guide, optimizer, loss or Trace_ELBO())

    checks: list[Check] = []
    places: list[np.ndarray] = []
    losses, converged, reason = np.zeros(0), False, ""
    minibatch: bool | None = None
    with tqdm(total=max_steps, disable=not progress_bar) as bar:
        while len(losses) < max_steps and not converged:
            num_steps = num_steps_between_checks(len(losses), max_steps)
            optimizer.compile = compile if compile != "auto" or len(losses) >= _TRACED_AFTER else False
            losses = np.append(losses, [optimizer.advance(svi, *args, **kwargs) for _ in range(num_steps)])
            opt_state: Any = optimizer.state
            if minibatch is None:  # not before the first step, which sets the guide up
                minibatch = _subsamples(svi, args, kwargs)
            at_end, basis = _at_end(opt_state), _basis(optimizer, opt_state, minibatch)
            places.append(_place_of_others(opt_state) if basis == "averaged" else _mean(opt_state))
            checks.append(_check(optimizer, opt_state, at_end, losses, basis, checks, places))
            converged, reason = judge(checks, losses, basis, tolerance)
            _show(bar, num_steps, checks[-1])
    gaussian = opt_state.gaussian
    params = _params(svi, args, kwargs)
    result = Fit(
        params=params,
        losses=losses,
        elbo=checks[-1].elbo,
        elbo_error=checks[-1].elbo_error,
        converged=converged,
        reason=reason,
        steps=len(losses),
        gradient_evaluations=0 if gaussian is None else int(gaussian.evaluations),
        history={name: np.array([getattr(check, name) for check in checks]) for name in asdict(checks[0])},
        pareto_k=math.nan,
        no_weights=_no_weights(svi, opt_state, bool(minibatch)),
        site_residuals=_site_residuals(opt_state, at_end),
        compiled=_compiled(optimizer, compile),
        svi=svi,
        state=opt_state,
        fitted=Fitted.now(svi, params),
        args=args,
        kwargs=kwargs,
        seed=seed,
    )
    result = _at_fresh_draws(result, basis)
    _warn(result, opt_state, at_end, max_steps)
    return result


def judge(checks: Sequence[Check], losses: np.ndarray, basis: str, tolerance: float) -> tuple[bool, str]:
    """Whether the fit has converged, and a sentence that says why or why not.

    Args:
        checks: so far.
        losses: of all steps so far.
        basis: what is known: the natural gradient from `"recycled"` draws or from those of each step (`"drawn"`),
            the `"exact"` ELBO, or nothing but the `"averaged"` loss.
    """
    if basis == "averaged":
        return _judge_losses(checks, losses, tolerance)
    if len(checks) < 2:
        return False, "there was one check, and two are needed"
    before, now = checks[-2:]
    if basis == "exact":
        change = abs(now.elbo - before.elbo)
        if change < tolerance / 10:
            return True, f"the exact ELBO changed by {change:.1g} nat from step {before.step} to {now.step}"
        return False, f"the exact ELBO still changed by {change:.2g} nat from step {before.step} to {now.step}"
    missing = _missing(now, basis, tolerance) or _missing(before, basis, tolerance)
    if missing:
        return False, missing
    if math.isinf(now.elbo) or math.isinf(now.elbo_error):
        return False, f"the ELBO of the guide is not finite: {now.elbo:.3g} ± {now.elbo_error:.3g}"
    rise = now.elbo - before.elbo
    if not rise <= max(tolerance, 2 * math.hypot(now.elbo_error, before.elbo_error)):
        return False, f"the ELBO still rose by {rise:.2g} nat from step {before.step} to {now.step}"
    return True, (
        f"a full step would gain about {now.residual / 2:.1g} nat, which is negligible or inside its Monte Carlo "
        f"error, and that costs about {_cost_of_noise(now, basis):.1g} nat"
    )


def num_steps_between_checks(steps: int, max_steps: int) -> int:
    """Five, and later five in a hundred of the steps so far."""
    return min(max(BETWEEN_CHECKS, steps // SHARE_BETWEEN_CHECKS), max_steps - steps)


def _missing(check: Check, basis: str, tolerance: float) -> str:
    """What a check lacks of convergence; empty for nothing."""
    gain, cost = check.residual / 2, _cost_of_noise(check, basis)
    if not (check.residual < _rate.NOISE_RATIO * check.error or gain < tolerance / 10):
        return f"a full step would still gain about {gain:.2g} nat at step {check.step}, beyond its Monte Carlo error"
    if check.curvature < MIN_CURVATURE:
        return (
            f"in some direction the expected curvature was {check.curvature:.2g} of the precision at step "
            f"{check.step}: a saddle, or a direction in which nothing holds the posterior"
        )
    if not cost < tolerance:
        return f"Monte Carlo noise still cost about {cost:.2g} nat at step {check.step}, more than the tolerance"
    if basis == "recycled" and not check.effective >= MIN_EFFECTIVE:
        return f"the draws so far were worth {check.effective:.1f} at step {check.step}, fewer than {MIN_EFFECTIVE:.0f}"
    if check.creep > tolerance / 10:
        return (
            f"the mean still drifted at step {check.step}, slowly and in one direction: over the last quarter of the "
            f"steps that gained about {check.creep:.1g} nat"
        )
    return ""


def _cost_of_noise(check: Check, basis: str) -> float:
    """c V/2, c = ρ/(2 − ρ); of recycled draws what they say of mean and scales, which a rate does not average."""
    if basis == "recycled":
        return check.noise_cost
    return check.error / 2 * check.rate / (2 - check.rate)


def _judge_losses(checks: Sequence[Check], losses: np.ndarray, tolerance: float) -> tuple[bool, str]:
    """By the mean of the last third of the losses against that of the third before, and by what else is known."""
    third, rate, drift = len(losses) // 3, checks[-1].rate, checks[-1].drift
    costs = [check.residual / 2 * check.rate / (2 - check.rate) for check in checks[-max(1, len(checks) // 3) :]]
    cost = float(np.mean(costs))
    if len(losses) < MIN_AVERAGED:
        return False, f"the loss is judged by its average, for which {len(losses)} steps are too few"
    before, error_before = _mean_and_error(losses[-2 * third : -third])
    now, error_now = _mean_and_error(losses[-third:])
    gain, error = before - now, math.hypot(error_before, error_now)
    described = f"the average loss fell by {gain:.2g} ± {error:.1g} over the last third of the steps"
    if not gain < 2 * error:
        return False, f"{described} and has not settled"
    if not rate <= MAX_AVERAGED_RATE:
        return False, (
            f"{described}, at a rate of {rate:.2g}: above {MAX_AVERAGED_RATE} the noise is not averaged out, so "
            "give more steps or a smaller or decreasing learning_rate"
        )
    if cost >= tolerance:  # it is unknown where there is no Gaussian
        return False, (
            f"{described}, but noise still cost about {cost:.2g} nat at a rate of {rate:.2g}, more than the tolerance, "
            "so give more steps or a smaller or decreasing learning_rate"
        )
    if drift > MAX_DRIFT:
        return False, (
            f"{described}, but parameters that belong to no site moved on by {drift:.1f} of their spread, so give more "
            "steps, or `others` with a larger rate"
        )
    return True, (
        f"{described}, at a rate of {rate:.2g}. This is no proof: the noise of other optimizers and of drawn sites is "
        "not in the Monte Carlo error of the natural gradient, and a slow rise hides in that of the loss"
    )


def _drift(places: Sequence[np.ndarray]) -> float:
    """The root mean square, over parameters, of the move between the means of two thirds, over the spread in them."""
    third = len(places) // 3
    if third < 2 or not places[0].size:
        return math.nan
    before, now = np.stack(places[-2 * third : -third]), np.stack(places[-third:])
    negligible = NEGLIGIBLE * (1 + abs(now.mean(0)))
    spread = (before.var(0) + now.var(0)) / 2 + negligible**2
    return float(np.sqrt(((now.mean(0) - before.mean(0)) ** 2 / spread).mean()))


def _creep(locs: Sequence[np.ndarray], checks: Sequence[Check], precision: np.ndarray) -> float:
    """See the top of the file; NaN while a quarter of the steps has too few checks."""
    steps, rates = (np.array([getattr(check, name) for check in checks]) for name in ("step", "rate"))
    end = steps[-1]
    quarters = [(steps > end * (k - 1) / 4) & (steps <= end * k / 4) for k in (2, 3, 4)]
    if min(quarter.sum() for quarter in quarters) < MIN_IN_QUARTER:
        return math.nan
    first, second, third = (
        np.stack([loc for loc, there in zip(locs, quarter, strict=True) if there]).mean(0) for quarter in quarters
    )
    moves = second - first, third - second

    def inner(left: np.ndarray, right: np.ndarray) -> float:
        return float(left @ (precision @ right if precision.ndim == 2 else precision * right))

    (before, across), now = (inner(moves[0], move) for move in moves), inner(moves[1], moves[1])
    goes_on = across > CREEPING * (before * now) ** 0.5
    return now / (2 * rates[quarters[-1]].mean() * end / 4) if goes_on else 0.0


def _mean_and_error(losses: np.ndarray) -> tuple[float, float]:
    finite = losses[np.isfinite(losses)]
    if len(finite) < 2:
        return math.nan, math.nan
    return float(finite.mean()), float(finite.std(ddof=1) / len(finite) ** 0.5)


def _checked(guide: Any, learning_rate: Any, max_steps: Any, optimizer: Any, tolerance: Any, compile: Any) -> BLR:
    """The optimizer, once every argument is known to be right."""
    if not callable(guide):
        raise TypeError(
            f"guide must be a guide, or a class of guides that takes the model, such as AutoNormal; got {guide!r}."
        )
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(f"max_steps must be a positive integer, got {max_steps!r}.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be positive, got {max_steps}: it is the most steps that a fit may take.")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance must be a positive number of nats, got {tolerance!r}.")
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise ValueError(
            f"tolerance must be positive and finite, got {tolerance}: it is the nats that Monte Carlo noise may cost. "
            "For a fit of a given number of steps use `SVI` itself."
        )
    if not any(compile is choice or (isinstance(choice, str) and compile == choice) for choice in _CHOICES):
        raise ValueError(f"compile must be one of {', '.join(map(repr, _CHOICES))}; got {compile!r}.")
    if optimizer is None:
        return BLR(learning_rate)
    if not isinstance(optimizer, BLR):
        raise TypeError(
            f"optimizer must be a BLR, such as BLR(num_draws=16), got {type(optimizer).__name__}: the stopping rule "
            "is BLR's. Another optimizer goes into `SVI` itself, or into BLR(others=...) for what BLR leaves to it."
        )
    if learning_rate is not None:
        raise ValueError(
            f"learning_rate={learning_rate!r} and an optimizer were given: give the rate to the optimizer, "
            f"BLR({learning_rate!r}, ...), or leave the optimizer away."
        )
    return optimizer


def _at_fresh_draws(result: Fit, basis: str) -> Fit:
    """The ELBO, E_q[log w], and k̂ at draws that the guide was not fitted to."""
    if result.no_weights:
        return result
    log_weights = result.log_weights(FRESH_DRAWS)
    if arviz_is_installed():
        result = replace(result, pareto_k=pareto_k(log_weights))
    if basis == "exact":
        return result
    if not np.isfinite(log_weights).all():
        return replace(result, elbo=-math.inf, elbo_error=math.nan)
    return replace(result, elbo=log_weights.mean(), elbo_error=log_weights.std(ddof=1) / FRESH_DRAWS**0.5)


def _warn(result: Fit, opt_state: OptState, at_end: _AtEnd | None, max_steps: int) -> None:
    """Of each thing that the user should know."""
    rejected = 0 if opt_state.gaussian is None else opt_state.gaussian.rate.rejected
    stood_still = rejected + opt_state.skipped

    def warn(text: str) -> None:
        warnings.warn(f"fit: {text}", stacklevel=4)

    if not result.converged:
        more = ""
        if opt_state.estimator == "hutchinson":
            more = (
                " Curvatures here come from products with the Hessian: where coordinates act together, as the steps of "
                "a random walk do, optimizer=BLR(estimator='hessian') takes longer for a step and fewer of them."
            )
        warn(
            f"not converged in {result.steps} steps (max_steps={max_steps}): {result.reason}. Give more steps or a "
            f"larger tolerance, and look at `.plot()`.{more}"
        )
    if stood_still == result.steps:
        warn(
            f"the curvature never moved: the precision is as it was at the start, because each of the {result.steps} "
            "steps was refused. Start the guide elsewhere (`init_loc_fn`), and look for terms of the model that are "
            "not finite, or whose derivative is not that of their value."
        )
    elif stood_still > result.steps / 2 and not result.converged:  # at the optimum noise refuses many a step
        warn(
            f"the rate was cut at {stood_still} of {result.steps} steps: no step along the natural gradient made the "
            "loss smaller there. Start the guide elsewhere (`init_loc_fn`), give a small learning_rate, or look for "
            "terms of the model whose derivative is not that of their value."
        )
    hidden, error = _hidden_curvature(opt_state, at_end)
    if hidden > MIN_HIDDEN and hidden > MIN_CERTAINTY * error:
        warn(
            "by the gradients at the draws there is more curvature than by the Hessians, on average "
            f"{hidden:.2g} times the guide's precision: the log density has kinks (a ReLU, an absolute value), which "
            "no Hessian knows, and the guide is too wide for them. Use optimizer=BLR(estimator='secant')."
        )
    if math.isinf(result.elbo):
        warn(f"the log density is not finite at one of {FRESH_DRAWS} draws of the guide or more, so its ELBO is −∞.")
    if result.converged and result.pareto_k > MAX_PARETO_K:  # else it may be the fit, and not the family
        warn(
            f"the guide does not cover the posterior: the Pareto k̂ of its importance weights is {result.pareto_k:.2f}, "
            f"and above {MAX_PARETO_K} its means and variances are not to be trusted. {_way_out(opt_state.layout)}"
        )


def _way_out(layout: Layout) -> str:
    """Of a guide that does not cover the posterior."""
    if any(member.family.discrete for member in layout.members):
        return "Sum over its discrete sites in the model, where you can: a mixture distribution, or enumeration."
    full_rank = [block.structure for block in layout.blocks] == ["dense"]
    richer = "Reparametrise" if full_rank else "Try a full-rank guide (AutoMultivariateNormal), or reparametrise"
    return f"{richer} the model (non-centred hierarchies: LocScaleReparam)."


def _show(bar: Any, num_steps: int, check: Check) -> None:
    bar.set_postfix_str(
        f"ELBO {check.elbo:.2f} ± {check.elbo_error:.2g}, r² {check.residual:.1e}, ρ {check.rate:.2g}", refresh=False
    )
    bar.update(num_steps)


class _AtEnd(NamedTuple):
    """What the recycled draws say of the last state: the ELBO, n, what noise costs, Ĥ [D, D], ĝ [D], its deviation by
    pair [K, D], and the weights of the draws [K, 2].
    """

    elbo: float
    elbo_error: float
    effective: float
    noise_cost: float
    hessian: Tensor
    gradient: Tensor
    deviations: Tensor
    weights: Tensor


def _at_end(opt_state: OptState) -> _AtEnd | None:
    gaussian, blocks = opt_state.gaussian, opt_state.layout.blocks
    if gaussian is None or gaussian.recycling is None or gaussian.recycling.pool.count == 0:
        return None
    scales = scales_of(gaussian.precision, blocks, 1.0)
    estimate = recycled.moments(gaussian.recycling.pool, blocks, gaussian.loc, scales)
    elbo, elbo_error = recycled.elbo(gaussian.recycling.pool, estimate.weights, blocks, gaussian.loc, scales)
    noise_cost = recycled.noise_cost(gaussian.recycling.pool, estimate, blocks, gaussian.precision)
    return _AtEnd(
        elbo,
        elbo_error,
        estimate.effective,
        noise_cost,
        estimate.hessian,
        estimate.gradient,
        estimate.deviations,
        estimate.weights,
    )


def _compiled(optimizer: BLR, compile: bool | str) -> str:
    if not compile:
        return "not traced: compile=False"
    if not optimizer.compile:
        return f"not traced: ended within the {_TRACED_AFTER} steps in which tracing does not pay"
    if optimizer.traced_reason is not None:
        return f"not traced: {optimizer.traced_reason or 'the guide has no Gaussian site'}"
    return "traced and compiled" if compile == "inductor" else "traced"


def _params(svi: SVI, args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """The parameters that the guide and the model ask for, by their names in the store."""
    with undisturbed(0), torch.no_grad(), poutine.trace(param_only=True) as capture:
        guide_trace = poutine.trace(svi.guide).get_trace(*args, **kwargs)
        poutine.replay(svi.model, trace=guide_trace)(*args, **kwargs)
    nodes: dict[str, Any] = capture.trace.nodes
    return {name: site["value"].detach().clone() for name, site in nodes.items() if site["type"] == "param"}


def _subsamples(svi: SVI, args: tuple, kwargs: dict) -> bool:
    """Whether a plate of the model takes a part of its rows."""
    with undisturbed(0), torch.no_grad():
        guide_trace = poutine.trace(svi.guide).get_trace(*args, **kwargs)  # an improper prior cannot be drawn
        sites = poutine.trace(poutine.replay(svi.model, trace=guide_trace)).get_trace(*args, **kwargs).nodes.values()
    plates = [site for site in sites if site["type"] == "sample" and isinstance(site["fn"], _Subsample)]
    return any(len(site["value"]) < site["fn"].size for site in plates)


def _no_weights(svi: SVI, opt_state: OptState, minibatch: bool) -> str:
    """Why p(D, z)/q(z) is not to be had; empty where it is."""
    if minibatch:
        return "a minibatch has the weight of its own data alone"
    if isinstance(getattr(svi.loss, "__self__", svi.loss), TraceEnum_ELBO):
        return "TraceEnum_ELBO sums sites out that the guide does not draw"
    if svi.optim.temperature != 1:
        return "at a temperature other than 1 the guide is not meant for the posterior"
    if any(site.block.structure == "point" and not site.bare for site in opt_state.layout.sites):
        return "a point has no density"
    return ""


def _basis(optimizer: BLR, opt_state: OptState, minibatch: bool) -> str:
    """What `judge` has to go by."""
    gaussian, layout = opt_state.gaussian, opt_state.layout
    if layout.others or optimizer.estimator == "gradient" or minibatch:
        return "averaged"
    if gaussian is not None and gaussian.recycling is not None:
        return "recycled"
    if not layout.members:
        return "drawn"
    exact = gaussian is None and all(role.kind != "drawn" for role in opt_state.roles)
    return "exact" if exact else "averaged"


def _check(
    optimizer: BLR,
    opt_state: OptState,
    at_end: _AtEnd | None,
    losses: np.ndarray,
    basis: str,
    checks: Sequence[Check],
    places: Sequence[np.ndarray],
) -> Check:
    """The next check; `places` has one more than `checks`."""
    gaussian, temperature, steps = opt_state.gaussian, optimizer.temperature, len(losses)
    residual, error = (math.nan, math.nan) if gaussian is None else (float(gaussian.residual), float(gaussian.error))
    rate = _rate_of(optimizer, opt_state, steps)
    if basis == "recycled" and at_end is not None and at_end.effective > 2:
        elbo, elbo_error, effective = at_end[:3]
        elbo_error *= math.sqrt(effective / (effective - 2))  # of n/2 pairs
        precision: Any = gaussian.precision  # type: ignore[union-attr]
        curvature = _least_curvature(_numpy(precision.matrix), _numpy(at_end.hessian))
        noise_cost = float(at_end.noise_cost)
        elbo, elbo_error = temperature * elbo, temperature * elbo_error
        return Check(steps, elbo, elbo_error, residual, error, rate, effective, noise_cost, curvature)
    if basis == "exact":
        return Check(steps, -float(losses[-1]), 0.0, rate=rate)
    mean, elbo_error = _mean_and_error(losses[-max(2, steps // 3) :])
    found = Check(steps, -mean, elbo_error, residual, error, rate)
    if basis == "averaged":
        return replace(found, drift=_drift(places))
    assert gaussian is not None  # that is moved by the draws of each step
    return replace(found, creep=_creep(places, [*checks, found], _numpy(field_of(gaussian.precision))))


def _least_curvature(precision: np.ndarray, hessian: np.ndarray) -> float:
    """The smallest eigenvalue of S⁻¹ Ĥ, S = L Lᵀ, as that of L⁻¹ Ĥ L⁻ᵀ; NaN where rounding has left S no factor."""
    unit = np.diagonal(precision).astype(float) ** -0.5  # in whatever units the coordinates are
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(unit * precision * unit[:, None])) * unit
        return float(np.linalg.eigvalsh(inverse @ hessian @ inverse.T)[0])
    except np.linalg.LinAlgError:
        return math.nan


def _mean(opt_state: OptState) -> np.ndarray:
    """m, where there is a Gaussian."""
    return np.zeros(0) if opt_state.gaussian is None else _numpy(opt_state.gaussian.loc).copy()


def _place_of_others(opt_state: OptState) -> np.ndarray:
    """The parameters of other optimizers, or some of them, evenly chosen."""
    flat = np.concatenate([_numpy(param).ravel() for param in opt_state.layout.others.values()] or [np.zeros(0)])
    return flat[:: max(1, len(flat) // MAX_FOLLOWED)]


def _rate_of(optimizer: BLR, opt_state: OptState, steps: int) -> float:
    """ρ of the last step: as given, or the largest of those that were taken."""
    if optimizer.learning_rate is not None:
        given = optimizer.learning_rate
        return float(given(steps - 1) if callable(given) else given)
    states = [opt_state.members.rates[role.name] for role in opt_state.roles if not role.local]
    states += [] if opt_state.gaussian is None else [opt_state.gaussian.rate]
    # of several, one may have taken no step yet; where all sites are local, their rate is 1
    return float(np.fmax.reduce([float(state.taken) for state in states])) if states else 1.0


def _hidden_curvature(opt_state: OptState, at_end: _AtEnd | None) -> tuple[float, float]:
    """(what Ĥ lacks of E_q[∇²ℓ], its standard error), in units of q's precision, on average over coordinates.

    By Stein's identity, E_q[(z − m) · (∇ℓ(z) − ĝ − Ĥ (z − m))] = tr Σ (E_q[∇²ℓ] − Ĥ), at the draws that are kept.
    """
    if at_end is None or opt_state.secants:  # of which Ĥ lacks nothing
        return 0.0, math.inf
    gaussian: Any = opt_state.gaussian
    pool = gaussian.recycling.pool
    points, gradients, weights, gradient, hessian = (
        _numpy(value) for value in (pool.points, pool.gradients, at_end.weights, at_end.gradient, at_end.hessian)
    )
    away = points - _numpy(gaussian.loc)
    gained = (away * (gradients - gradient - away @ hessian)).sum(-1)
    total = (weights * gained).sum()
    by_pair = (weights * (gained - total)).sum(1)
    return float(total) / len(gradient), float((by_pair**2).sum()) ** 0.5 / len(gradient)


def _site_residuals(opt_state: OptState, at_end: _AtEnd | None) -> dict[str, tuple[float, float]]:
    """(r², V) of each site's own coordinates b: ĝ_bᵀ S_bb⁻¹ ĝ_b, and the same of the deviations, summed over pairs."""
    if at_end is None:
        return {}
    precision: Any = opt_state.gaussian.precision  # type: ignore[union-attr]
    matrix, gradient, deviations = (_numpy(value) for value in (precision.matrix, at_end.gradient, at_end.deviations))
    found = {}
    for site in opt_state.layout.sites:
        own = slice(site.block.start, site.block.stop)
        rows = np.vstack([gradient[own], deviations[:, own]])
        squares = (rows * np.linalg.solve(matrix[own, own], rows.T).T).sum(1)
        found[site.name.removesuffix("_unconstrained")] = float(squares[0]), float(squares[1:].sum())
    return found


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()
