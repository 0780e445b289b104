"""The recording of a loss as a graph of tensor operations, and of what estimators ask of it.

    (m, C, ε, data) -> L(m, C; ε)        by `make_fx`, with the noise and the tensors among the arguments as inputs

What an estimator asks of L at all draws, written with `torch.func` (`gradients/`), is traced once more into one flat
program, so that a step makes the noise that it would make anyway and runs a program for the derivatives and one for
each proposal.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..families import Block
from ..gradients import Draws, Extras, Objective, Transformation
from ._rewriting import direct, fail_with_nan, is_random, operations, replace_writes, simplify, widest

__all__ = ["Graph", "Untraceable", "graph_of"]

MAX_ELEMENTS = 2**22  # of the largest array of a program: more draws at once leave the cache and fill the memory
DETACHED = (torch.ops.aten.detach.default,)  # has a meaning only where derivatives are yet to be taken


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
        programs: by transformation and shapes of the rows, with the number of draws that each takes at once.
        uses: how often it was handed out.
    """

    loss: fx.GraphModule
    noise: list[tuple[tuple[int, ...], Tensor, Block]]
    dtype: torch.dtype
    extras: Extras
    inductor: bool
    forward: bool = True
    programs: dict[tuple[Transformation, tuple[torch.Size, ...]], tuple[Callable[..., Any], int]] = field(
        default_factory=dict
    )
    uses: int = 0

    def program(
        self,
        transformation: Transformation,
        scales: tuple[Tensor | None, ...],
        rows: list[Tensor],
        inputs: list[Tensor],
    ) -> tuple[Callable[..., Any], int]:
        """(rows of some draws, inputs) -> the transformed loss of each of them, and how many draws that takes."""
        key = transformation, tuple(row.shape for row in rows)
        if key not in self.programs:
            trace = _program_of(self, transformation, scales)
            num_at_once = num_draws = len(rows[0])
            if num_draws * inputs[0].numel() * widest(self.loss) > MAX_ELEMENTS:
                most = widest(trace([row[:1] for row in rows], inputs))
                fitting = [n for n in range(1, num_draws + 1) if num_draws % n == 0 and n * most <= MAX_ELEMENTS]
                num_at_once = max(fitting, default=1)
            program = trace([row[:num_at_once] for row in rows], inputs)
            run = torch.compile(program, fullgraph=True, dynamic=False) if self.inductor else direct(program)
            self.programs[key] = run, num_at_once
        return self.programs[key]


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
    if any(node.target._schema.is_mutable for node in operations(graph)):
        # vmap cannot write the rows of a batch into what is none
        graph = _traced(torch.func.functionalize(loss, remove="mutations"), *inputs)
        replace_writes(graph)
    fail_with_nan(graph)
    simplify(graph)
    random = [node for node in operations(graph) if is_random(node)]
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
        simplify(flat, *DETACHED)
        return flat

    return trace


def _traced(function: Callable, *inputs: Tensor) -> fx.GraphModule:
    # without a context `make_fx` notes the shape of every single value in one of its own, which is most of its time
    context = TracingContext(FakeTensorMode(allow_fallback_kernels=True))
    with warnings.catch_warnings(), tracing(context):
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
