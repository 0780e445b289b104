"""What is changed in a graph of tensor operations once it is recorded: failures, writes, and what need not be run.

The graphs are those of `_graph.py`, in `torch.ops.aten` until they are `direct`. All changes are in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["direct", "fail_with_nan", "is_random", "operations", "replace_writes", "simplify", "widest"]

COPIES = tuple(  # where shape, dtype and layout stay what they were; the sum is that of a single number
    getattr(torch.ops.aten, name).default
    for name in ("alias", "clone", "expand", "lift_fresh_copy", "sum", "view", "_to_copy", "_unsafe_view")
)
FILLED = {torch.ops.aten.zeros_like.default: 0, torch.ops.aten.ones_like.default: 1}  # whatever their argument is
NEUTRAL = {
    getattr(torch.ops.aten, name).Tensor: neutral for name, neutral in (("add", 0), ("sub", 0), ("mul", 1), ("div", 1))
} | {torch.ops.aten.pow.Tensor_Scalar: 1}
# in `torch` or of `torch.Tensor`, with the arguments of their namesakes in `torch.ops.aten`
NAMESAKES = {
    "abs", "add", "addmm", "amax", "amin", "baddbmm", "bitwise_and", "bmm", "cat", "clamp", "clamp_max",
    "clamp_min", "cos", "cosh", "cumsum", "digamma", "div", "dot", "eq", "erf", "exp", "expand", "expm1",
    "full_like", "gather", "ge", "gt", "index_select", "isnan", "le", "lgamma", "log", "log1p", "logical_and",
    "logical_not", "logical_or", "logsumexp", "lt", "masked_fill", "maximum", "mean", "minimum", "mm", "mul", "mv",
    "ne", "neg", "ones_like", "permute", "pow", "prod", "reciprocal", "rsqrt", "scatter", "select", "sigmoid",
    "sign", "sin", "sinh", "sqrt", "square", "stack", "sub", "sum", "t", "tanh", "transpose", "unsqueeze", "view",
    "where", "zeros_like",
}  # fmt: skip


def operations(graph: fx.GraphModule) -> list[Any]:
    return [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


def widest(graph: fx.GraphModule) -> int:
    """The number of elements of the largest array in the graph."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    return max((value.numel() for value in values if isinstance(value, Tensor)), default=0)


def is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]


def fail_with_nan(graph: fx.GraphModule) -> None:
    """A matrix that cannot be decomposed gives NaN, and the draw's loss with it, in place of an exception for all."""
    for node in operations(graph):
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


def replace_writes(graph: fx.GraphModule) -> None:
    """What writing to a whole array or under a mask leaves behind, as operations that every transformation knows."""
    aten = torch.ops.aten
    for node in operations(graph):
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


def simplify(graph: fx.GraphModule, *more_copies: Any) -> None:
    """Leaves out what is the same in every run, or was there already: a run pays for every operation it is told."""
    if any(node.target._schema.is_mutable for node in operations(graph)):
        return
    constants: dict[fx.Node, Tensor] = {}
    seen: dict[Any, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constants[node] = getattr(graph, node.target)
        if not isinstance(node.target, torch._ops.OpOverload) or is_random(node):
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


def direct(graph: fx.GraphModule) -> Callable[..., Any]:
    """The function of a finished graph, in torch's own Python functions.

    `torch.mul` does what `torch.ops.aten.mul.Tensor` does, without packing its arguments for the interpreter of
    TorchScript (`benchmarks/traced.py` measures a step).
    """
    for node in operations(graph):
        name = node.target._schema.name.removeprefix("aten::")
        if name in NAMESAKES and not isinstance(node.args[0], (int, float)):
            node.target = getattr(torch, name, None) or getattr(Tensor, name)
    graph.recompile()
    return graph.forward
