"""What may be done to a recorded program without changing a bit of what it computes.

- ``drop``: results that nobody reads, and aliases (``detach``) that stand for their argument.
- ``flatten_views``: chains of views become one, taken once.
- ``fuse_norms``: a residual sum and the RMS norm of it as one op.
- ``group_linears``: products of one tensor with several weights (queries, keys, values; gate, up) as one op.
"""

import re
from collections.abc import Callable

import torch

from toolkit.engine.program import Call, Recording
from toolkit.ops import linear, rms_norm  # noqa: F401  (their ops are registered by being imported)

_ATEN, _OURS = torch.ops.aten, torch.ops.toolkit
_ALIASES = {_ATEN.detach.default, _ATEN.alias.default}
_NAME = re.compile(r"\b[a-z]\d+\b")
_VIEWS = {_ATEN.view.default, _ATEN.unsqueeze.default, _ATEN.expand.default, _ATEN.select.int}


def fuse(recording: Recording) -> Recording:
    """The same recording with all of the above done, in place."""
    for change in (drop, flatten_views, fuse_norms, group_linears, drop):
        change(recording)
    return recording


def _rename(recording: Recording, names: dict[str, str]) -> None:
    """Let every reader of a key read its value instead."""

    def follow(name: str) -> str:
        while name in names:
            name = names[name]
        return name

    if not names:
        return
    for call in recording.calls:
        if any(name in names for name in call.reads):
            call.arguments = [_replaced(argument, follow) for argument in call.arguments]
            call.reads = [follow(name) for name in call.reads]
    recording.output = follow(recording.output)


def _replaced(argument: str, follow: Callable[[str], str]) -> str:
    """``argument`` with names of tensors replaced: words that stand for themselves, in whatever literal they stand."""
    return _NAME.sub(lambda match: follow(match[0]), argument)


def drop(recording: Recording) -> None:
    """Remove aliases, and calls without effect whose results nobody reads."""
    aliases = {call.names()[0]: call.reads[0] for call in recording.calls if call.op in _ALIASES}
    _rename(recording, aliases)
    wanted, kept = {recording.output}, []
    for call in reversed(recording.calls):
        if call.op._schema.is_mutable or wanted.intersection(call.names()):
            wanted.update(call.reads)
            kept.append(call)
    recording.calls = kept[::-1]


def flatten_views(recording: Recording) -> None:
    """Every chain of views that only reads the same contiguous memory in another shape as one view, each taken once.

    Shapes are those of the recording, so chains that begin at an input, whose shape may change, are left alone.
    """
    roots: dict[str, str] = {}
    taken: dict[tuple[str, tuple[int, ...]], str] = {}
    kept = []
    for call in recording.calls:
        source, renamed = call.reads[0] if call.reads else "", {}
        if call.op in _VIEWS and source not in recording.inputs and source not in recording.constants:
            (name,) = call.names()
            root = roots.get(source, source)
            before, after = recording.tensors[root], recording.tensors[name]
            if before.is_contiguous() and after.is_contiguous() and before.numel() == after.numel():
                roots[name] = root
                shape = tuple(after.shape)
                known = root if shape == tuple(before.shape) else taken.get((root, shape))
                if known is None:
                    taken[root, shape] = name
                    call = Call(_ATEN.view.default, [root, str(list(shape))], [root], name)
                else:
                    renamed = {name: known}
        if renamed:
            _rename(recording, renamed)
        else:
            kept.append(call)
    recording.calls = kept


def fuse_norms(recording: Recording) -> None:
    """``s = a + b`` whose RMS norm follows: ``add_rms_norm``, at the place of the sum."""
    calls = recording.calls
    sums = {call.names()[0]: at for at, call in enumerate(calls) if _is_plain_sum(recording, call)}
    dead = set()
    for at, call in enumerate(calls):
        if call.op is not _OURS.rms_norm.default or call.arguments[0] not in sums:
            continue
        place = sums.pop(call.arguments[0])  # of several norms of one sum the first
        if any(name not in recording.constants for name in call.reads[1:]):
            continue
        both = calls[place].reads
        normed = [call.names()[0], calls[place].names()[0]]
        calls[place] = Call(_OURS.add_rms_norm.default, [*both, *call.arguments[1:]], [*both, *call.reads[1:]], normed)
        dead.add(at)
    recording.calls = [call for at, call in enumerate(calls) if at not in dead]


def _is_plain_sum(recording: Recording, call: Call) -> bool:
    """Whether the call adds two tensors of one shape and dtype, neither of them scaled."""
    if call.op is not _ATEN.add.Tensor or len(call.arguments) != 2 or call.reads != call.arguments:
        return False
    a, b = (recording.tensors[name] for name in call.reads)
    return a.shape == b.shape and a.dtype == b.dtype


def group_linears(recording: Recording) -> None:
    """Products of one tensor with constant weights: ``linear_group``, at the place of the first of them."""
    members: dict[str, list[Call]] = {}
    for call in recording.calls:
        if call.op is _OURS.linear.default and all(name in recording.constants for name in call.reads[1:]):
            members.setdefault(call.arguments[0], []).append(call)
    written = {name for call in recording.calls if call.op._schema.is_mutable for name in call.reads}
    groups = {id(group[0]): group for x, group in members.items() if len(group) > 1 and x not in written}
    absorbed = {id(call) for group in groups.values() for call in group[1:]}
    kept = []
    for call in recording.calls:
        group = groups.get(id(call))
        if group is not None:
            weights = ", ".join(one.arguments[1] for one in group)
            biases = ", ".join(one.arguments[2] for one in group)
            reads = [group[0].reads[0], *(name for one in group for name in one.reads[1:])]
            results = [name for one in group for name in one.names()]
            arguments = [group[0].arguments[0], f"[{weights}]", f"[{biases}]"]
            kept.append(Call(_OURS.linear_group.default, arguments, reads, results))
        elif id(call) not in absorbed:
            kept.append(call)
    recording.calls = kept
