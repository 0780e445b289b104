"""Pyro's loss traced once: a graph of tensor operations that a step runs in place of the host's handlers.

A graph (`_graph.py`) keeps what the run that made it saw: shapes, the path through Python's control flow, arguments
that are no tensors, and whatever the model reads from elsewhere. Other shapes and arguments are traced anew. Where a
graph cannot stand for the loss, which is checked when it is made and at its 1st, 2nd, 4th, 8th, ... use, the reason is
kept and the host evaluates the loss as it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor
from torch.utils import _pytree as pytree

from ..gradients import AtPoints, Draws, Estimate, Extras, Objective, Transformation, Vectorised
from . import _svi
from ._graph import Graph, Untraceable, graph_of
from ._layout import Layout
from ._rewriting import operations

__all__ = ["Traced", "Tracer"]

MAX_GRAPHS = 8  # of one fit: arguments that change more often would be traced for ever
MAX_OPERATIONS = 10_000  # of a loss that "auto" traces: its derivatives are fourteen times as many, at 1 ms each
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass
class Traced(Vectorised):
    """The objective of one step: a graph at all draws at once (`Vectorised`), and the host's evaluation at one.

    Attributes:
        untraced: the host's evaluation.
        graph: the traced one.
        data: the tensors among the arguments.
        seed: of the noise.
        own_draw: the noise of the draw None.
        made: the noise of the draws asked for last.
    """

    untraced: Objective
    graph: Graph
    data: list[Tensor]
    seed: int
    own_draw: Callable[[], Any] = lambda: _svi.host_noise
    made: tuple[Draws | None, list[Tensor]] = (None, [])

    @property
    def extras(self) -> Extras:
        return self.graph.extras

    def __call__(self, loc: Tensor, scales: tuple[Tensor | None, ...], others: Any, draw: Draws | None):
        return self.untraced(loc, scales, others, draw or Draws(self.own_draw(), 1.0, None))

    def at_all(
        self,
        transformation: Transformation,
        loc: Tensor,
        scales: tuple[Tensor | None, ...],
        draws: Draws | None,
        *columns: Tensor,
    ) -> tuple[Tensor, ...] | None:
        """See `Vectorised`; None where an operation raises, and the host sees at which draw.

        That is a matrix without a decomposition, or data from which other shapes follow than when they were traced.
        """
        num_draws = 1 if draws is None else len(draws.number)
        # a guide without noise has no row of its own, and the draws are to be counted by something
        rows = [torch.arange(num_draws, device=loc.device), *self.noise(draws, loc.device), *columns]
        inputs = [
            loc,
            *(scale for scale in scales if scale is not None),
            *self.data,
        ]
        with torch.no_grad():
            try:
                program, num_at_once = self.graph.program(transformation, scales, rows, inputs)
                if num_at_once == num_draws:
                    return tuple(program(*rows, *inputs))
                parts = zip(*(row.split(num_at_once) for row in rows), strict=True)
                found = [program(*part, *inputs) for part in parts]
                return tuple(map(torch.cat, zip(*found, strict=True)))
            except RuntimeError as error:
                if self.graph.uses == 0 and not isinstance(error, torch.linalg.LinAlgError):
                    raise  # it is being checked, and has never run
                return None

    def noise(self, draws: Draws | None, device: torch.device) -> list[Tensor]:
        """±ε of every draw, [S, *shape] for each array; kept for the proposals, which ask with the same draws."""
        if draws is not None and draws is self.made[0]:
            return self.made[1]
        if draws is not None and draws.noise is not None:
            parts = [
                draws.noise[:, block.start : block.stop].reshape(-1, *shape) for shape, _, block in self.graph.noise
            ]
            self.made = draws, parts
            return parts
        numbers, signs = ([self.own_draw()], [1.0]) if draws is None else (draws.number, draws.sign)
        arrays = {}
        for number in dict.fromkeys(numbers):
            source = number if callable(number) else _svi.noise_of(self.seed, number, device)
            arrays[number] = [source(shape, like) for shape, like, _ in self.graph.noise]
        signed = [[sign * array for array in arrays[number]] for number, sign in zip(numbers, signs, strict=True)]
        self.made = draws, [torch.stack(each) for each in zip(*signed, strict=True)]
        return self.made[1]


class Tracer:
    """The graphs of one fit, by the arguments of its steps.

    Attributes:
        reason: why the last step was not traced; None where it was.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.fit: tuple[Any, ...] = ()
        self.graphs: dict[Any, tuple[Graph | str, Any]] = {}

    def objective(
        self,
        compile: bool | str,
        svi: SVI,
        args: tuple,
        kwargs: dict,
        layout: Layout,
        untraced: Objective,
        temper: Callable[[Objective], Objective],
        estimate: Callable[[Objective, Tensor], Estimate],
        gaussian: tuple[Tensor, tuple[Tensor | None, ...]] | None,
        seed: int,
        differences: bool,
    ) -> Objective:
        """`untraced` with a graph for all draws, or as it is where there can be none.

        Args:
            compile: `BLR.compile`.
            temper: what was done to the host's loss to make `untraced`.
            estimate: (objective, m) -> the estimate of this step, which the graph must give as the host does.
            gaussian: m and C where the step starts, if any.
            seed: of the noise.
            differences: whether second derivatives are differences of the host's gradients.

        Raises:
            RuntimeError: there can be none and `compile` is not "auto".
        """
        fit = (id(svi), id(layout), compile)
        if fit != self.fit[:3]:
            self.fit, self.graphs = (*fit, svi, layout), {}  # both are kept, so that their identities are
        self.reason = None
        arguments = Arguments(*pytree.tree_flatten((args, kwargs)))
        key = arguments.key
        try:
            graph, _ = self.graphs.get(key, (None, None))
            if isinstance(graph, str):
                raise Untraceable(graph)
            if graph is None:
                refused = _refused(layout, len(self.graphs), differences)
                if refused or gaussian is None:
                    raise Untraceable(refused)
                graph = _made(
                    arguments,
                    lambda args, kwargs: temper(_svi.traceable_objective_of(svi, args, kwargs, layout)),
                    untraced,
                    estimate,
                    gaussian,
                    seed,
                    compile,
                )
            elif graph.uses & (graph.uses - 1) == 0:
                assert gaussian is not None  # a graph is made with one
                _check(Traced(untraced, graph, arguments.tensors, seed), estimate, [gaussian[0]])
            graph.uses += 1
            self.graphs[key] = graph, arguments.others  # what is known by its identity lives as long as its key
            return Traced(untraced, graph, arguments.tensors, seed)
        except Untraceable as error:
            self.reason = str(error)
            if key in self.graphs or len(self.graphs) < MAX_GRAPHS:
                self.graphs[key] = self.reason, arguments.others
            if compile != "auto":
                raise RuntimeError(
                    f"BLR: compile={compile!r} expects a loss that can be traced, and {self.reason}. Use "
                    "compile='auto', which evaluates such a loss as it is, or compile=False."
                ) from error
            return untraced


@dataclass
class Arguments:
    """The arguments of a step, flattened."""

    leaves: list[Any]
    spec: Any

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def others(self) -> list[Any]:
        return [leaf for leaf in self.leaves if not isinstance(leaf, Tensor)]

    @property
    def key(self) -> Any:
        """What two steps must have in common to run the same graph."""
        return self.spec, tuple(map(_described, self.leaves))

    def with_tensors(self, tensors: Iterable[Tensor]) -> tuple[tuple, dict]:
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return (type(leaf), leaf) if isinstance(leaf, (bool, int, float, str, type(None))) else (type(leaf), id(leaf))


def _refused(layout: Layout, num_graphs: int, differences: bool) -> str:
    """What can be told before anything is run; empty for nothing."""
    if differences:
        return "a backward pass of its own, which has no second derivative, would be lost in a graph"
    if layout.members:
        return f"the sites {', '.join(member.name for member in layout.members)} are of other families than the Normal"
    if layout.others:
        return f"the parameters {', '.join(layout.others)} belong to no site"
    if num_graphs >= MAX_GRAPHS:
        return f"the steps so far had arguments of {MAX_GRAPHS} kinds, each of which takes a graph of its own"
    return ""


def _made(
    arguments: Arguments,
    loss_of: Callable[[tuple, dict], Objective],
    untraced: Objective,
    estimate: Callable[[Objective, Tensor], Estimate],
    gaussian: tuple[Tensor, tuple[Tensor | None, ...]],
    seed: int,
    compile: bool | str,
) -> Graph:
    """A graph that gives the host's estimates at two points."""
    loc, _ = gaussian
    points = [loc, loc + 0.1 * _svi.noise_of(seed, 1, loc.device)(loc.shape, loc)]
    try:
        graph = graph_of(
            untraced,
            lambda data: loss_of(*arguments.with_tensors(data)),
            gaussian,
            arguments.tensors,
            inductor=compile == "inductor",
        )
    except Untraceable:
        raise
    except Exception as error:  # whatever a model does that is no operation on tensors
        raise Untraceable(_described_error("tracing the loss", error)) from error
    if compile == "auto" and (number := len(operations(graph.loss))) > MAX_OPERATIONS:
        raise Untraceable(f"the loss is {number:,} operations, whose derivatives take minutes to trace")
    try:
        _check(Traced(untraced, graph, arguments.tensors, seed), estimate, points)
    except Untraceable:  # some operations have no derivative in forward mode, or a wrong one under vmap
        graph = replace(graph, forward=False, programs={})
        _check(Traced(untraced, graph, arguments.tensors, seed), estimate, points)
    return graph


def _check(traced: Traced, estimate: Callable[[Objective, Tensor], Estimate], points: list[Tensor]) -> None:
    """Raises Untraceable where graph and host differ at one of the points."""
    given = replace(traced, own_draw=lambda: _svi.noise_of(traced.seed, 0, points[0].device))
    for point in points:
        try:
            found = estimate(given, point)
        except Exception as error:
            raise Untraceable(_described_error("a traced step", error)) from error
        host = given.untraced if isinstance(given.untraced, AtPoints) else given.__call__
        expected = estimate(host, point)
        if torch.equal(found.losses.isfinite(), expected.losses.isfinite()) and not expected.losses.isfinite().all():
            continue  # a step that is refused, whatever the derivatives are
        largest = [float(array.abs().nan_to_num(0, 0, 0).max()) for array in (expected.gradient, expected.hessian)]
        scale = max(largest[0], largest[1] ** 0.5)  # of 1/σ, so that a gradient that vanishes is no measure of itself
        for name, unit in (("losses", 1.0), ("gradient", scale), ("hessian", scale**2)):
            now, then = getattr(found, name), getattr(expected, name)
            tolerance = TOLERANCES.get(then.dtype, 1e-2)
            if not torch.allclose(now, then, rtol=tolerance, atol=tolerance * unit, equal_nan=True):
                raise Untraceable(
                    f"its {name} differ from those of the host's loss by {float((now - then).abs().max()):.2g}: the "
                    "loss is random, or depends on what is no argument and has changed"
                )


def _described_error(what: str, error: Exception) -> str:
    message = str(error).strip().partition("\n")[0]
    if "trying to get value out of a tracing tensor" in message or "Boolean value of" in message:
        return "the loss takes a path that depends on values (`if` or `int` of a tensor, enumeration)"
    return f"{what} raised {type(error).__name__}: {message}"
