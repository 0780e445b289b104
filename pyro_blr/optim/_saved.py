"""What `BLR.get_state` has beside the parameters, and how a fit goes on from it: tensors and numbers by name.

A field of a state that is added to a rule is saved here by itself; one of another kind than those has to be named.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..families import LowRankPrecision, Precision
from ..gradients import orthogonal, recycled
from . import _drift, _missed, _rate, _recycled, _sweep
from ._gaussian import State, field_of
from ._layout import Layout

if TYPE_CHECKING:
    from .blr import OptState

NAMES = {"count", "seed", "loc", "precision", "low_rank", "rate", "radius", "skipped", "evaluations"}
NAMES |= {"num_averaged", "recycling", "members", "sites"}
# the parts of `Recycling` whose fields are saved one by one; what else it has is saved as it is
PARTS: dict[str, Any] = {
    "pool": recycled.Pool,
    "frame": orthogonal.Frame,
    "drift": _drift.Drift,
    "missed": _missed.Missed,
}
KEPT = [item.name for item in fields(_recycled.Recycling) if item.name not in PARTS]


def entries(state: OptState) -> dict[str, Any]:
    """The state under `NAMES`, for `torch.save`."""
    gaussian, members = state.gaussian, state.members
    return {
        "count": state.count,
        "seed": state.seed,
        "loc": None if gaussian is None else gaussian.loc,
        "precision": None if gaussian is None else field_of(gaussian.precision),
        "low_rank": _low_rank(gaussian),
        "rate": None if gaussian is None else vars(gaussian.rate).copy(),
        "radius": None if gaussian is None else gaussian.radius,
        "skipped": 0 if gaussian is None else gaussian.skipped,
        "evaluations": 0 if gaussian is None else gaussian.evaluations,
        "num_averaged": None if gaussian is None else gaussian.num_averaged,
        "recycling": None if gaussian is None or gaussian.recycling is None else _recycling(gaussian.recycling),
        "members": {
            "rates": {
                name: {**vars(rate), "last_gradient": vars(rate.last_gradient).copy()}
                for name, rate in members.rates.items()
            },
            "skipped": members.skipped,
        },
        "sites": _sites(state.layout),
    }


def resumed(fresh: OptState, loaded: dict[str, Any]) -> OptState:
    """The state that `entries` described, for the guide and the options of the `fresh` one, on its device.

    Raises:
        ValueError: for the state of another guide, or of a precision of another shape.
    """
    gaussian, device = fresh.gaussian, next(iter(fresh.layout.tensors.values())).device
    loaded = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), loaded)
    shape = None if gaussian is None else tuple(field_of(gaussian.precision).shape)
    expected = (_sites(fresh.layout), shape)
    stored = (loaded["sites"], None if loaded["precision"] is None else tuple(loaded["precision"].shape))
    if stored != expected:
        raise ValueError(
            f"the loaded BLR state belongs to the sites {stored[0]} with a precision of shape {stored[1]}; "
            f"this guide has {expected[0]} and {expected[1]}. Load it for the guide and the options that "
            "it was saved with, or start with a new BLR()."
        )
    if gaussian is not None:
        fresh_counts, counts = gaussian.num_averaged, loaded["num_averaged"]
        gaussian = State(
            loc=loaded["loc"],
            precision=_resumed_precision(gaussian.precision, loaded["precision"], loaded["low_rank"]),
            rate=_rate.RateState(**loaded["rate"]),
            radius=loaded["radius"],
            skipped=loaded["skipped"],
            evaluations=loaded["evaluations"],
            residual=math.nan,
            error=math.nan,
            num_averaged=counts if fresh_counts is not None and counts is not None else fresh_counts,
            recycling=_resumed_recycling(gaussian.recycling, loaded["recycling"]),
        )
    rates = {}
    for name, rate in loaded["members"]["rates"].items():
        family = type(fresh.members.rates[name].last_gradient)
        rates[name] = _rate.RateState(**{**rate, "last_gradient": family(**rate["last_gradient"])})
    members = _sweep.Sweep(rates=rates, skipped=loaded["members"]["skipped"])
    return replace(fresh, count=loaded["count"], gaussian=gaussian, members=members)


def _sites(layout: Layout) -> list[tuple[str, str, tuple[int, ...]]]:
    """What a saved state must agree with."""
    sites = [(site.name, site.block.structure, site.block.shape) for site in layout.sites]
    return sites + [
        (member.name, member.family.__name__, tuple(layout.tensors[member.params[0]].shape))
        for member in layout.members
    ]


def _low_rank(gaussian: State | None) -> tuple[Tensor | None, ...] | None:
    """What a guide of low rank has beside S."""
    return gaussian.precision.own if gaussian and isinstance(gaussian.precision, LowRankPrecision) else None


def _resumed_precision(fresh: Any, field: Tensor, own: Any) -> Precision:
    return replace(fresh, matrix=field, own=own) if isinstance(fresh, LowRankPrecision) else type(fresh)(field)


def _recycling(recycling: _recycled.Recycling) -> dict[str, Any]:
    stored = {name: getattr(recycling, name) for name in KEPT}
    for part in (getattr(recycling, name) for name in PARTS):
        stored |= {} if part is None else vars(part)
    return stored


def _resumed_recycling(fresh: _recycled.Recycling | None, loaded: dict[str, Any] | None) -> _recycled.Recycling | None:
    """What `_recycling` described; a fit that keeps draws now and did not then starts without any."""
    if fresh is None or loaded is None:
        return fresh
    parts = {name: getattr(fresh, name) for name in PARTS}
    for name, kind in PARTS.items():
        stored = {item.name: loaded[item.name] for item in fields(kind) if item.name in loaded}
        parts[name] = replace(parts[name], **stored) if stored and parts[name] is not None else parts[name]
    if parts["frame"].rows.shape != fresh.frame.rows.shape:
        parts["frame"] = fresh.frame  # of another `num_draws`
    return _recycled.Recycling(**parts, **{name: loaded[name] for name in KEPT})
