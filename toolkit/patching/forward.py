"""Forwards of a patched model over ragged batches."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.elementwise import row_invariant
from toolkit.numerics import Numerics
from toolkit.patching.adapters import inner_model
from toolkit.patching.ragged_call import call_arguments, hidden_part, takes
from toolkit.patching.ragged_check import check_ragged
from toolkit.patching.record import check_forwards, report_of
from toolkit.patching.report import PatchReport
from toolkit.patching.without_media import text_arguments
from toolkit.state.active import get_forward_context, set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import ForwardContext
from toolkit.state.dense import DenseContext


@cache
def _has_logits_to_keep(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


def patched_model(model: nn.Module) -> nn.Module:
    """``model``, or the patched one inside it where it is a wrapper (data parallel, DeepSpeed's engine)."""
    inner: Any = model
    while report_of(inner) is None and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    return inner if report_of(inner) is not None else model


def ragged_forward(model: nn.Module, batch: RaggedBatch, rows: Tensor | None = None) -> Tensor:
    """Logits [len(rows), V] of whole sequences, with gradients: ``context_forward`` in a ``DenseContext``."""
    return context_forward(model, DenseContext(batch), rows)


def context_forward(model: nn.Module, context: ForwardContext, rows: Tensor | None = None) -> Tensor:
    """Logits [len(rows), V] of the model's own forward over the context's batch.

    With gradients on they may be deferred (``toolkit.ops.linear_logprob``): any operation on them computes them.

    Args:
        model: a patched model, or its wrapper (data parallel, DeepSpeed's engine), whose forward is then called.
        context: what layers attend, scan and convolve by; a new one for each forward.
        rows: int64 indices into the batch's T tokens; None is all of them.

    Raises:
        ToolkitError: attention and mixers of the model are not patched, its ragged forward is not its ordinary one
            (``PatchReport.ragged``), it predicts no next token, or the batch's routing does not fit the model.
    """
    inner, report = _ragged_model(model, context.batch)
    if report.ragged.hidden_part is not None or report.bidirectional:
        got = "an encoder, whose tokens see those after them" if report.bidirectional else "no logits for each token"
        raise ToolkitError(f"model {type(inner).__name__} must predict the next token of each token, got {got}.")
    return _logits(model, inner, report, context, rows)


def _logits(
    model: nn.Module, inner: nn.Module, report: PatchReport, context: ForwardContext, rows: Tensor | None = None
) -> Tensor:
    keep: dict[str, Any] = {}
    if rows is not None and _has_logits_to_keep(type(inner).forward):
        keep["logits_to_keep"] = context.rows = rows
    logits: Tensor = _run(inner_model(model), inner, report, context, keep).logits[0]
    return logits if rows is None or keep else logits[rows]


def hidden_states(model: nn.Module, context: ForwardContext, inputs: Mapping[str, Tensor] = {}) -> Tensor:
    """[T, H] the last hidden states of the batch's tokens: what a model's head, or a pooler, reads.

    Args:
        model: a patched model, with a head or without.
        context: of the forward.
        inputs: further arguments of the model's forward, [T] one for each token (``token_type_ids``).

    Raises:
        ToolkitError: as ``context_forward``, or for an argument that the model's forward does not have.
    """
    inner, report = _ragged_model(model, context.batch)
    part = inner.get_submodule(hidden_part(inner))
    for name in inputs:
        if not takes(type(part).forward, name):
            raise ToolkitError(f"inputs must be arguments of {type(part).__name__}'s forward, got {name!r}.")
    given = {name: value[None] for name, value in inputs.items()}
    hidden: Tensor = _run(part, part, report, context, given).last_hidden_state[0]
    return hidden


def row_forward(model: nn.Module, context: ForwardContext) -> Tensor:
    """[T, N] what a model computes for every token: logits, or hidden states where it has none."""
    inner, report = _ragged_model(model, context.batch)
    return (
        hidden_states(model, context)
        if report.ragged.hidden_part is not None
        else _logits(model, inner, report, context)
    )


def _ragged_model(model: nn.Module, batch: RaggedBatch) -> tuple[nn.Module, PatchReport]:
    """The patched model inside ``model``, and its report. Raises ToolkitError where it may not run ``batch``."""
    inner = inner_model(patched_model(inner_model(model)))
    report = report_of(inner)
    if report is None:
        raise ToolkitError(f"model {type(inner).__name__} is not patched; call toolkit.patch(model) first.")
    skipped = "; ".join(dict.fromkeys(r.reason for r in report.skipped if r.role == "attention"))
    if skipped or not {"attention", "mixer"} & set(report.roles()):
        why = skipped or next((r.reason for r in report.skipped if r.role == "mixer"), None)
        state = f"a skipped layer: {why}" if why else "no layer that calls the attention interface"
        raise ToolkitError(f"attention of {type(inner).__name__} must be patched for a ragged batch, got {state}.")
    if not torch.compiler.is_compiling():
        check_forwards(inner)
        if not report.ragged.checked:
            check_ragged(inner, report, row_forward)
    if report.ragged.reason is not None:
        raise ToolkitError(report.ragged.reason)
    if batch.embeddings is not None and "media" not in report.roles():
        raise ToolkitError(
            f"embeddings of the batch must be None for {type(inner).__name__}, got a tensor: it has no text part apart "
            "from a tower, or role 'media' is not patched."
        )
    return inner, report


def _run(
    called: nn.Module, inner: nn.Module, report: PatchReport, context: ForwardContext, given: Mapping[str, Any]
) -> Any:
    """The output of ``called``, which is ``inner`` (a patched model, or its part without a head) or its wrapper."""
    batch = context.batch
    bitwise = report.numerics is Numerics.BITWISE and batch.tokens.is_cpu and not torch.compiler.is_compiling()
    context.chunked = report.numerics is Numerics.FAST and batch.tokens.is_cuda
    with set_forward_context(context), row_invariant() if bitwise else nullcontext(), _recording(inner, context):
        tokens = batch.tokens[None]
        arguments = call_arguments(inner, report, context) | text_arguments(inner, tokens)
        output = called(input_ids=tokens, **given, **arguments)
    if not torch.compiler.is_compiling():
        if context.replay is not None:
            context.replay.check_complete()
        context.selections.check_complete()
    return output


@contextmanager
def _recording(inner: nn.Module, context: ForwardContext) -> Iterator[None]:
    """Let the context keep the last hidden states of the forward that runs here, if it does."""
    if not context.keeps_hidden:
        yield
        return

    def record(part: nn.Module, arguments: Any, output: Any) -> None:
        if get_forward_context() is context:  # not that of another thread
            context.record_hidden(output.last_hidden_state[0])

    hook = inner.get_submodule(hidden_part(inner)).register_forward_hook(record)
    try:
        yield
    finally:
        hook.remove()
