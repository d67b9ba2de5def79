"""Forwards of a patched model over ragged batches."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.elementwise import row_invariant
from toolkit.numerics import Numerics
from toolkit.patching.adapters import inner_model
from toolkit.patching.ragged_call import call_arguments
from toolkit.patching.ragged_check import check_ragged
from toolkit.patching.record import check_forwards, report_of
from toolkit.patching.without_media import text_arguments
from toolkit.state.active import set_forward_context
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
            (``PatchReport.ragged``), or the batch's routing does not fit the model.
    """
    batch = context.batch
    model = inner_model(model)
    inner = inner_model(patched_model(model))
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
            check_ragged(inner, report, context_forward)
    if report.ragged.reason is not None:
        raise ToolkitError(report.ragged.reason)
    if batch.embeddings is not None and "media" not in report.roles():
        raise ToolkitError(
            f"embeddings of the batch must be None for {type(inner).__name__}, got a tensor: it has no text part apart "
            "from a tower, or role 'media' is not patched."
        )
    keep: dict[str, Any] = {}
    if rows is not None and _has_logits_to_keep(type(inner).forward):
        keep["logits_to_keep"] = rows
    batch_invariant = report.numerics is Numerics.BITWISE and batch.tokens.is_cpu and not torch.compiler.is_compiling()
    with set_forward_context(context), row_invariant() if batch_invariant else nullcontext():
        tokens = batch.tokens[None]
        arguments = call_arguments(inner, report, context) | text_arguments(inner, tokens)
        output = model(input_ids=tokens, **keep, **arguments)
    if context.replay is not None and not torch.compiler.is_compiling():
        context.replay.check_complete()
    if not torch.compiler.is_compiling():
        context.selections.check_complete()
    logits: Tensor = output.logits[0]
    return logits if rows is None or keep else logits[rows]
