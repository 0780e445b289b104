"""Pyro's loss traced once: a graph of tensor operations that a step runs in place of the host's handlers.

    (m, C, ε, data) -> L(m, C; ε)        by `make_fx`, with the noise and the tensors among the arguments as inputs

What an estimator asks of L at all draws, written with `torch.func` (`gradients/`), is traced once more into one flat
program, so that a step makes the noise that it would make anyway and runs a program for the derivatives and one for
each proposal.

A graph keeps what the run that made it saw: shapes, the path through Python's control flow, arguments that are no
tensors, and whatever the model reads from elsewhere. Other shapes and arguments are traced anew. Where a graph cannot
stand for the loss, which is checked when it is made and at its 1st, 2nd, 4th, 8th, ... use, the reason is kept and the
host evaluates the loss as it always did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.infer import SVI
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..families import Block
from ..gradients import Draws, Estimate, Extras, Objective, Transformation
from . import _svi
from ._layout import Layout

__all__ = ["Graph", "Traced", "Tracer", "Untraceable", "graph_of"]

MAX_GRAPHS = 8  # of one fit: arguments that change more often would be traced for ever
MAX_ELEMENTS = 2**22  # of the largest array of a program: more draws at once leave the cache and fill the memory
DETACHED = (torch.ops.aten.detach.default,)  # has a meaning only where derivatives are yet to be taken
COPIES = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("alias", "clone", "expand", "lift_fresh_copy", "view", "_to_copy", "_unsafe_view")
)
FILLED = {torch.ops.aten.zeros_like.default: 0, torch.ops.aten.ones_like.default: 1}  # whatever their argument is
NEUTRAL = {
    getattr(torch.ops.aten, name).Tensor: neutral for name, neutral in (("add", 0), ("sub", 0), ("mul", 1), ("div", 1))
}
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


class Untraceable(Exception):
    """Why a graph cannot stand for the loss."""


@dataclass
class Graph:
    """The loss at one draw, and what was made of it.

    Attributes:
        loss: (m, *C, *ε, *data) -> L.
        noise: of each array that the guide asks for its shape, an empty tensor of its dtype and device, and the block.
        dtype: of the host's loss.
        extras: of the run that was traced.
        inductor: whether programs are compiled.
        forward: whether a second derivative is taken in forward mode, the faster one.
        programs: by transformation and number of draws, with the number of draws that each takes at once.
        uses: how often it was handed out.
    """

    loss: fx.GraphModule
    noise: list[tuple[tuple[int, ...], Tensor, Block]]
    dtype: torch.dtype
    extras: Extras
    inductor: bool
    forward: bool = True
    programs: dict[tuple[Transformation, int], tuple[Callable[..., Any], int]] = field(default_factory=dict)
    uses: int = 0

    def program(
        self,
        transformation: Transformation,
        scales: tuple[Tensor | None, ...],
        rows: list[Tensor],
        inputs: list[Tensor],
    ) -> tuple[Callable[..., Any], int]:
        """(rows of some draws, inputs) -> the transformed loss of each of them, and how many draws that takes."""
        key = transformation, len(rows[0])
        if key not in self.programs:
            trace = _program_of(self, transformation, scales)
            num_at_once = num_draws = len(rows[0])
            if num_draws * inputs[0].numel() * _widest(self.loss) > MAX_ELEMENTS:
                widest = _widest(trace([row[:1] for row in rows], inputs))
                fitting = [n for n in range(1, num_draws + 1) if num_draws % n == 0 and n * widest <= MAX_ELEMENTS]
                num_at_once = max(fitting, default=1)
            program: Any = trace([row[:num_at_once] for row in rows], inputs)
            if self.inductor:
                program = torch.compile(program, fullgraph=True, dynamic=False)
            self.programs[key] = program, num_at_once
        return self.programs[key]


@dataclass
class Traced:
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
            program, num_at_once = self.graph.program(transformation, scales, rows, inputs)
            try:
                parts = [
                    program(*part, *inputs) for part in zip(*(row.split(num_at_once) for row in rows), strict=True)
                ]
            except RuntimeError as error:
                if self.graph.uses == 0 and not isinstance(error, torch.linalg.LinAlgError):
                    raise  # it is being checked, and has never run
                return None
        return tuple(parts[0]) if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))

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
    ) -> Objective:
        """`untraced` with a graph for all draws, or as it is where there can be none.

        Args:
            compile: `BLR.compile`.
            temper: what was done to the host's loss to make `untraced`.
            estimate: (objective, m) -> the estimate of this step, which the graph must give as the host does.
            gaussian: m and C where the step starts, if any.
            seed: of the noise.

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
                refused = _refused(layout, len(self.graphs))
                if refused or gaussian is None:
                    raise Untraceable(refused)
                graph = _made(
                    arguments,
                    lambda args, kwargs: temper(_svi.traceable_objective_of(svi, args, kwargs, layout)),
                    untraced,
                    estimate,
                    gaussian,
                    seed,
                    inductor=compile == "inductor",
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


def _refused(layout: Layout, num_graphs: int) -> str:
    """What can be told before anything is run; empty for nothing."""
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
    *,
    inductor: bool,
) -> Graph:
    """A graph that gives the host's estimates at two points."""
    loc, _ = gaussian
    points = [loc, loc + 0.1 * _svi.noise_of(seed, 1, loc.device)(loc.shape, loc)]
    try:
        graph = graph_of(
            untraced, lambda data: loss_of(*arguments.with_tensors(data)), gaussian, arguments.tensors, inductor
        )
    except Untraceable:
        raise
    except Exception as error:  # whatever a model does that is no operation on tensors
        raise Untraceable(_described_error("tracing the loss", error)) from error
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
        expected = estimate(given.__call__, point)
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


def graph_of(
    untraced: Objective,
    loss_of: Callable[[Iterable[Tensor]], Objective],
    gaussian: tuple[Tensor, tuple[Tensor | None, ...]],
    data: list[Tensor],
    inductor: bool,
) -> Graph:
    """The graph of the loss as a function of the Gaussian, the noise and the data.

    Args:
        untraced: the host's evaluation, which says what noise the guide asks for.
        loss_of: data -> the loss without looks at values.

    Raises:
        Untraceable: minibatches, scaled latent sites, random numbers of the model's own.
    """
    loc, scales = gaussian
    asked: list[tuple[tuple[int, ...], Tensor, Block]] = []

    def recorded(shape: tuple[int, ...], like: Tensor, block: Block) -> Tensor:
        asked.append((tuple(shape), like.detach().new_empty(0), block))
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    location = loc.detach().requires_grad_()  # TraceEnum_ELBO refuses a loss that cannot be differentiated
    with torch.enable_grad():
        value, extras = untraced(location, scales, None, Draws(recorded, 1.0, None))
    if extras.minibatch:
        raise Untraceable("a plate is subsampled, whose indices a graph would keep")
    if extras.weight is not None:
        raise Untraceable("a latent site is scaled, by what may change from step to step")

    def loss(loc: Tensor, *rest: Tensor) -> Tensor:
        scales_then, noise, data = _parted(rest, scales, len(asked))
        arrays = iter(noise)
        draw = Draws(lambda shape, like, block: next(arrays), 1.0, None)
        return loss_of(data)(loc, scales_then, None, draw)[0]

    noise = [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape, like, _ in asked]
    inputs = [loc, *(scale for scale in scales if scale is not None), *noise, *data]
    graph = _traced(loss, *inputs)
    if any(node.target._schema.is_mutable for node in _operations(graph)):
        # vmap cannot write the rows of a batch into what is none
        graph = _traced(torch.func.functionalize(loss, remove="mutations"), *inputs)
        _replace_writes(graph)
    _fail_with_nan(graph)
    _simplify(graph)
    random = [node for node in _operations(graph) if _is_random(node)]
    if random:
        raise Untraceable(f"the model or the guide draws random numbers of its own ({random[0].target})")
    return Graph(loss=graph, noise=asked, dtype=value.dtype, extras=extras, inductor=inductor)


def _program_of(graph: Graph, transformation: Transformation, scales: tuple[Tensor | None, ...]) -> Callable:
    """(rows, inputs) -> the flat program of the transformed loss over the rows."""
    num_noise = len(graph.noise)

    def trace(rows: list[Tensor], inputs: list[Tensor]) -> fx.GraphModule:
        def program(*flat: Tensor) -> tuple[Tensor, ...]:
            rows_now, (loc, *rest) = flat[: len(rows)], flat[len(rows) :]
            scales_now, _, data = _parted(tuple(rest), scales, 0)

            def at_draw(_: Tensor, *row: Tensor) -> tuple[Tensor, ...]:
                def loss(loc: Tensor, scales: tuple[Tensor | None, ...]) -> Tensor:
                    given = (scale for scale in scales if scale is not None)
                    return graph.loss(loc, *given, *row[:num_noise], *data)

                return transformation(loss, graph.forward)(loc, scales_now, *row[num_noise:])

            # under vmap torch takes some numbers that meet a single-precision scalar for tensors of double precision
            if len(rows_now[0]) == 1:
                losses, *derivatives = (value[None] for value in at_draw(*(row[0] for row in rows_now)))
            else:
                losses, *derivatives = torch.func.vmap(at_draw)(*rows_now)
            return losses.to(graph.dtype), *(derivative.to(loc.dtype) for derivative in derivatives)

        # at one draw the number of operations counts, and at all of them the memory that is written on in place
        one = len(rows[0]) == 1
        flat = _traced(torch.func.functionalize(program, remove="mutations") if one else program, *rows, *inputs)
        _simplify(flat, *DETACHED)
        return flat

    return trace


def _traced(function: Callable, *inputs: Tensor) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vmap's slower ways; the model's own were there when it ran untraced
        graph = make_fx(function)(*(tensor.detach() for tensor in inputs))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _parted(
    rest: tuple[Tensor, ...], scales: tuple[Tensor | None, ...], num_noise: int
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The inputs after m: scales, with None where the guide has none, noise and data."""
    given = iter(rest)
    scales = tuple(None if scale is None else next(given) for scale in scales)
    rest = tuple(given)
    return scales, rest[:num_noise], rest[num_noise:]


def _operations(graph: fx.GraphModule) -> list[Any]:
    return [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def _widest(graph: fx.GraphModule) -> int:
    """The number of elements of the largest array in the graph."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    return max((value.numel() for value in values if isinstance(value, Tensor)), default=0)


def _fail_with_nan(graph: fx.GraphModule) -> None:
    """A matrix that cannot be decomposed gives NaN, and the draw's loss with it, in place of an exception for all."""
    for node in _operations(graph):
        if node.target is not torch.ops.aten._linalg_check_errors.default:
            continue
        info = node.args[0]
        parent = info.args[0]
        for result in [user for user in parent.users if user is not info]:
            value = result.meta.get("val")
            if not (isinstance(value, Tensor) and value.dtype.is_floating_point):
                continue
            users = list(result.users)
            with graph.graph.inserting_before(node):
                failed = graph.graph.call_function(_nan_where_failed, (result, info))
            failed.meta["val"] = value
            for user in users:
                user.replace_input_with(result, failed)
        graph.graph.erase_node(node)
    graph.recompile()


def _nan_where_failed(result: Tensor, info: Tensor) -> Tensor:
    return torch.where(info.reshape(*info.shape, *[1] * (result.ndim - info.ndim)) == 0, result, torch.nan)


def _replace_writes(graph: fx.GraphModule) -> None:
    """What writing to a whole array or under a mask leaves behind, as operations that every transformation knows."""
    aten = torch.ops.aten
    for node in _operations(graph):
        with graph.graph.inserting_before(node):
            if node.target is aten.slice_scatter.default:
                size = node.meta["val"].shape[node.args[2] if len(node.args) > 2 else 0]
                # vmap counts an end from the other side, and past it, in the wrong axis
                ends = [None if end is None else slice(None, end).indices(size)[1] for end in node.args[3:5]]
                node.args = (*node.args[:3], *ends, *node.args[5:])
                continue
            if node.target is aten.copy.default:
                to, value = node.args[:2]
                shape = list(to.meta["val"].shape)
                cast = graph.graph.call_function(aten._to_copy.default, (value,), {"dtype": to.meta["val"].dtype})
                new = graph.graph.call_function(aten.expand.default, (cast, shape))
            elif node.target is aten.index_put.default and _under_a_mask(*node.args):
                to, (mask,), value = node.args[:3]
                new = graph.graph.call_function(aten.where.self, (mask, value, to))
            else:
                continue
        new.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _under_a_mask(to: Any, indices: Any, value: Any, accumulate: bool = False) -> bool:
    same = len(indices) == 1 and indices[0] is not None and indices[0].meta["val"].dtype == torch.bool
    return same and indices[0].meta["val"].shape == to.meta["val"].shape and value.meta["val"].numel() == 1


def _simplify(graph: fx.GraphModule, *more_copies: Any) -> None:
    """Leaves out what is the same in every run, or was there already: a run pays for every operation it is told."""
    if any(node.target._schema.is_mutable for node in _operations(graph)):
        return
    constants: dict[fx.Node, Tensor] = {}
    seen: dict[Any, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constants[node] = getattr(graph, node.target)
        if not isinstance(node.target, torch._ops.OpOverload) or _is_random(node):
            continue
        if node.target in FILLED:
            like = node.meta["val"]
            constants[node] = torch.full(like.shape, FILLED[node.target], dtype=like.dtype, device=like.device)
            continue
        if all(given in constants for given in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), constants.__getitem__)
            value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                constants[node] = value
                continue
        first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        same = node.args[0] if _changes_nothing(node, (*COPIES, *more_copies)) else first
        if same is not node:
            node.replace_all_uses_with(same)
    for index, (node, value) in enumerate(constants.items()):
        if node.op == "get_attr" or all(user in constants for user in node.users):
            continue
        graph.register_buffer(f"constant_{index}", value)
        with graph.graph.inserting_before(node):
            kept = graph.graph.get_attr(f"constant_{index}")
        kept.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(kept)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _changes_nothing(node: fx.Node, copies: tuple[Any, ...]) -> bool:
    neutral = node.target in NEUTRAL and node.args[1] == NEUTRAL[node.target] and not node.kwargs
    if not (neutral or node.target in copies) or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, Tensor) and isinstance(after, Tensor)):
        return False
    return all(getattr(before, name) == getattr(after, name) for name in ("shape", "dtype", "device")) and (
        before.stride() == after.stride()
    )


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
