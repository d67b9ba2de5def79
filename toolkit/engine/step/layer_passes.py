"""Passes that make one op of what lies between the GEMMs of a layer; results stay bitwise identical.

- ``fuse_rotary_write``: norms and rotation of queries and keys, and the writes of keys and values, before attention.
- ``fuse_gated_linear``: the two projections of a gated MLP and its activation.
"""

import torch
from torch._ops import OpOverload

from toolkit.engine.step.graph import CapturedGraph, Node, Value

# Importing them registers their ops.
from toolkit.ops import attention as _attention  # noqa: F401
from toolkit.ops import attention_int8 as _attention_int8  # noqa: F401
from toolkit.ops import gated_activation as _gated_activation  # noqa: F401
from toolkit.ops import gated_linear as _gated_linear  # noqa: F401
from toolkit.ops import rms_norm as _rms_norm  # noqa: F401
from toolkit.ops import rotary_write as _rotary_write  # noqa: F401

_ATEN, _OURS = torch.ops.aten, torch.ops.toolkit
# Of an attention over blocks what writes rows there, its arguments (*pool, rows, slots), and the fused op.
_WRITES = {
    _OURS.attention.default: (_OURS.state_write.default, _OURS.rotary_write.default),
    _OURS.attention_int8.default: (_OURS.state_write_int8.default, _OURS.rotary_write_int8.default),
}


class _Links:
    """Who makes and who reads each value of a graph."""

    def __init__(self, graph: CapturedGraph) -> None:
        self.makers: dict[Value, Node] = {}
        self.users: dict[Value, list[Node]] = {}
        self.output = graph.output
        for node in graph.nodes:
            for value in node.reads:
                self.users.setdefault(value, []).append(node)
            for value in node.results:
                self.makers[value] = node

    def maker(self, value: object, op: object, reader: Node) -> Node | None:
        """The node of ``op`` that makes ``value``, where ``reader`` alone reads it."""
        node = self.makers.get(value) if isinstance(value, Value) else None
        if node is None or node.op is not op or value is self.output:
            return None
        return node if self.users[node.results[0]] == [reader] else None

    def before_views(self, value: Value, reader: Node) -> tuple[Value, Node]:
        """What ``value`` is the same memory of in another shape, and who uses that."""
        while (view := self.maker(value, _ATEN.view.default, reader)) is not None:
            value, reader = view.reads[0], view
        return value, reader


def fuse_rotary_write(graph: CapturedGraph) -> None:
    """Replace what prepares an attention over blocks by ``rotary_write``, in front of it."""
    links = _Links(graph)
    order = {node: at for at, node in enumerate(graph.nodes)}
    fused: dict[Node, Node] = {}
    absorbed: set[Node] = set()
    for node in graph.nodes:
        found = _prepared(node, links, order) if node.op in _WRITES else None
        if found is not None:
            fused[node], parts = found
            absorbed.update(parts)
    kept: list[Node] = []
    for node in graph.nodes:
        if node in fused:
            kept.append(fused[node])
        if node not in absorbed:
            kept.append(node)
    graph.nodes = kept


def _prepared(attention: Node, links: _Links, order: dict[Node, int]) -> tuple[Node, list[Node]] | None:
    """The fused node of an attention and the nodes that it stands for."""
    q, keys, values = attention.args[:3]
    write, fused = _WRITES[attention.op]
    rotary_q = links.maker(q, _OURS.rotary.default, attention)
    write_k, write_v = (_last_write(pool, write, attention, links, order) for pool in (keys, values))
    if rotary_q is None or write_k is None or write_v is None or write_k is write_v:
        return None
    (*pool_k, rows_k, slots), (*pool_v, rows_v, slots_v) = write_k.args, write_v.args
    rotary_k = links.maker(rows_k, _OURS.rotary.default, write_k)
    if rotary_k is None or slots is not slots_v or rotary_k.args[1:] != rotary_q.args[1:]:
        return None
    stored = [q, rows_k, rows_v] + ([keys, values] if len(pool_k) == 1 else [])
    if len({value.tensor.dtype for value in stored}) > 1:
        return None
    parts = [rotary_q, rotary_k, write_k, write_v]
    query, query_reader = links.before_views(rotary_q.args[0], rotary_q)
    key, key_reader = links.before_views(rotary_k.args[0], rotary_k)
    value, _ = links.before_views(rows_v, write_v)
    norms = [_head_norm(*one, keys, links) for one in ((query, query_reader), (key, key_reader))]
    weights, eps, offset = [None, None], None, 0.0
    if norms[0] is not None and norms[1] is not None and norms[0].args[2:] == norms[1].args[2:]:
        parts += [norms[0], norms[1]]
        weights, (eps, offset) = [norm.args[1] for norm in norms if norm is not None], norms[0].args[2:]
        query, key = (links.before_views(norm.args[0], norm)[0] for norm in norms if norm is not None)
    arguments = (query, key, value, *weights, eps, offset, *rotary_q.args[1:4], *pool_k, *pool_v, slots)
    return Node(fused, arguments, {}, rotary_q.result), parts


def _last_write(pool: object, write: OpOverload, attention: Node, links: _Links, order: dict[Node, int]) -> Node | None:
    """The ``write`` into ``pool`` after which ``attention`` is the next to read it."""
    if not isinstance(pool, Value) or pool.kind != "constant":
        return None
    before = [node for node in links.users[pool] if order[node] < order[attention]]
    last = before[-1] if before else None
    return last if last is not None and last.op is write and last.args[0] is pool else None


def _head_norm(value: Value, reader: Node, keys: Value, links: _Links) -> Node | None:
    """The RMS norm over the width of a head that makes ``value``."""
    norm = links.maker(value, _OURS.rms_norm.default, reader)
    width = keys.tensor.shape[-1]
    return norm if norm is not None and norm.args[0].tensor.shape[-1] == width else None


def fuse_gated_linear(graph: CapturedGraph) -> None:
    """Replace two linear layers of one input and the gated activation of both by ``gated_linear``."""
    links = _Links(graph)
    fused: dict[Node, Node] = {}
    absorbed: set[Node] = set()
    for node in graph.nodes:
        if node.op is not _OURS.gated_activation.default:
            continue
        gate, up, kind = node.args
        group = links.maker(gate, _OURS.linear_group.default, node)
        if group is None or group.results != [gate, up] or links.users[up] != [node] or up is links.output:
            continue
        x, weights, biases = group.args
        if weights[0].tensor.shape == weights[1].tensor.shape:
            fused[group] = Node(_OURS.gated_linear.default, (x, *weights, *biases, kind), {}, node.result)
            absorbed.add(node)
    graph.nodes = [fused.get(node, node) for node in graph.nodes if node not in absorbed]
