"""Passes that shorten a captured graph; its results stay bitwise identical.

- ``eliminate_dead_code``: results that nobody reads, and aliases (``detach``) that stand for their argument.
- ``merge_views``: a chain of views becomes one view, taken once.
- ``fuse_add_rms_norm``: a residual sum and its RMS norm become one op.
- ``group_linears``: linear layers of one input (queries, keys, values; gate, up) become one op; quantised ones too.
- those of ``layer_passes``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from toolkit.engine.step.graph import Argument, CapturedGraph, Node, Value
from toolkit.engine.step.layer_passes import fuse_gated_linear, fuse_rotary_write
from toolkit.ops import linear, quantised_linear, rms_norm  # noqa: F401  (importing them registers their ops)

_ATEN, _OURS = torch.ops.aten, torch.ops.toolkit
_ALIASES = {_ATEN.detach.default, _ATEN.alias.default}
_VIEWS = {
    _ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.unsqueeze.default, _ATEN.expand.default, _ATEN.select.int,
}  # fmt: skip


def optimize(graph: CapturedGraph) -> CapturedGraph:
    """The same graph after all passes, changed in place."""
    for one in _PASSES:
        one(graph)
    return graph


def eliminate_dead_code(graph: CapturedGraph) -> None:
    """Remove aliases, and nodes that write nothing and whose results nobody reads."""
    graph.replace({node.results[0]: node.reads[0] for node in graph.nodes if node.op in _ALIASES})
    wanted, kept = {graph.output}, []
    for node in reversed(graph.nodes):
        if node.writes or not wanted.isdisjoint(node.results):
            wanted.update(node.reads)
            kept.append(node)
    graph.nodes = kept[::-1]


def merge_views(graph: CapturedGraph) -> None:
    """Replace chains of views that read the same contiguous memory in another shape by one view, each taken once.

    Shapes are those of the captured run, so a view of an input, whose shape may change, stays.
    """
    roots: dict[Value, Value] = {}
    taken: dict[tuple[Value, tuple[int, ...]], Value] = {}
    known: dict[Value, Value] = {}
    kept = []
    for node in graph.nodes:
        source = node.reads[0] if node.reads else None
        if node.op in _VIEWS and source is not None and source.kind == "result":
            (view,) = node.results
            root = roots.get(source, source)
            before, after = root.tensor, view.tensor
            if before.is_contiguous() and after.is_contiguous() and before.numel() == after.numel():
                roots[view] = root
                shape = tuple(after.shape)
                same = root if shape == tuple(before.shape) else taken.get((root, shape))
                if same is not None:
                    known[view] = same
                    continue
                taken[root, shape] = view
                node = Node(_ATEN.view.default, (root, list(shape)), {}, view)
        kept.append(node)
    graph.nodes = kept
    graph.replace(known)


def fuse_add_rms_norm(graph: CapturedGraph) -> None:
    """Replace ``s = a + b`` and the RMS norm of ``s`` by ``add_rms_norm``, at the position of the sum."""
    nodes = graph.nodes
    sums = {node.results[0]: at for at, node in enumerate(nodes) if _is_plain_sum(node)}
    fused = set()
    for node in nodes:
        if node.op is not _OURS.rms_norm.default or node.args[0] not in sums:
            continue
        at = sums.pop(node.args[0])  # of several norms of one sum the first
        if any(value.kind != "constant" for value in node.reads[1:]):
            continue
        arguments = (*nodes[at].args, *node.args[1:])
        nodes[at] = Node(_OURS.add_rms_norm.default, arguments, node.kwargs, [node.result, nodes[at].result])
        fused.add(node)
    graph.nodes = [node for node in nodes if node not in fused]


def _is_plain_sum(node: Node) -> bool:
    """Whether the node adds two tensors of one shape and dtype, neither of them scaled."""
    if node.op is not _ATEN.add.Tensor or node.kwargs or [*node.args] != node.reads:
        return False
    a, b = (value.tensor for value in node.reads)
    return a.shape == b.shape and a.dtype == b.dtype


def group_linears(graph: CapturedGraph) -> None:
    """Replace linear layers of one input with constant weights by ``linear_group``, at the position of the first; and
    those with quantised weights by ``quantised_linear_group``."""
    of_input: dict[tuple[OpOverload, Argument], list[Node]] = {}
    for node in graph.nodes:
        if node.op in _GROUPED and all(value.kind == "constant" for value in node.reads[1:]):
            of_input.setdefault((node.op, node.args[0]), []).append(node)
    written = {value for node in graph.nodes if node.writes for value in node.reads}
    groups = {nodes[0]: nodes for (_, x), nodes in of_input.items() if len(nodes) > 1 and x not in written}
    absorbed = {node for nodes in groups.values() for node in nodes[1:]}
    kept = []
    for node in graph.nodes:
        if node in groups:
            members = groups[node]
            columns = zip(*(one.args[1:] for one in members))
            group, arguments = _GROUPED[node.op]
            results = [one.result for one in members]
            node = Node(group, (node.args[0], *arguments(*map(list, columns))), {}, results)
        if node not in absorbed:
            kept.append(node)
    graph.nodes = kept


def _quantised_arguments(codes: Any, scales: Any, biases: Any, formats: Any, outputs: Any) -> tuple[Any, ...]:
    flat = [scale for some in scales for scale in some]
    return codes, flat, [len(some) for some in scales], biases, formats, outputs


_GROUPED: dict[OpOverload, tuple[OpOverload, Callable[..., tuple[Any, ...]]]] = {
    _OURS.linear.default: (_OURS.linear_group.default, lambda weights, biases: (weights, biases)),
    _OURS.quantised_linear.default: (_OURS.quantised_linear_group.default, _quantised_arguments),
}
"""The op of several GEMMs of one input, and its arguments from those of the single ones, each as a list."""


_PASSES = (
    eliminate_dead_code,
    merge_views,
    fuse_add_rms_norm,
    group_linears,
    eliminate_dead_code,  # views that were merged away still count as readers
    fuse_gated_linear,
    fuse_rotary_write,
    eliminate_dead_code,
)
