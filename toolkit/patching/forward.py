"""Forwards of a patched model over ragged batches."""

import inspect
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.elementwise import row_invariant
from toolkit.moe.observer import observing
from toolkit.numerics import Numerics
from toolkit.patching.adapters import inner_model
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.length_tables import regimes_of
from toolkit.patching.ragged_call import call_arguments
from toolkit.patching.record import check_forwards, report_of
from toolkit.patching.report import PatchReport
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
        ToolkitError: attention and mixers of the model are not patched, another layer mixes sequences, or the batch's
            routing does not fit the model.
    """
    batch = context.batch
    model = inner_model(model)
    inner = inner_model(patched_model(model))
    report = report_of(inner)
    if report is None:
        raise ToolkitError(f"model {type(inner).__name__} is not patched; call toolkit.patch(model) first.")
    skipped = next((r.reason for r in report.skipped if r.role == "attention"), None)
    if skipped or not {"attention", "mixer"} & set(report.roles()):
        why = skipped or next((r.reason for r in report.skipped if r.role == "mixer"), None)
        state = f"a skipped layer: {why}" if why else "no layer that calls the attention interface"
        raise ToolkitError(f"attention of {type(inner).__name__} must be patched for a ragged batch, got {state}.")
    if not torch.compiler.is_compiling():
        check_forwards(inner)
    if not torch.compiler.is_compiling() and report not in _SEPARATE:
        _SEPARATE.add(report)  # before the check, which calls this function
        try:
            _check_separate(inner)
        except BaseException:
            _SEPARATE.discard(report)
            raise
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
        output = model(input_ids=batch.tokens[None], **keep, **call_arguments(inner, report, context))
    if context.replay is not None and not torch.compiler.is_compiling():
        context.replay.check_complete()
    if not torch.compiler.is_compiling():
        context.selections.check_complete()
    logits: Tensor = output.logits[0]
    return logits if rows is None or keep else logits[rows]


_SEPARATE: "weakref.WeakSet[PatchReport]" = weakref.WeakSet()
"""Reports of patches that were checked: no layer mixes the sequences of a batch."""


def _check_separate(model: nn.Module) -> None:
    """Check that no layer mixes the sequences of a batch, as an unpatched recurrent layer would.

    The second sequence's logits must not depend on the sequence before it in the batch, and no rotary tables on the
    longest sequence.

    Raises:
        ToolkitError: they do.
    """
    device = next(model.parameters()).device
    report = report_of(model)
    assert report is not None
    _check_rotary(model, report)

    def after(before: list[int]) -> Tensor:
        rows = torch.arange(len(before), len(before) + 3, device=device)
        return ragged_forward(model, RaggedBatch.from_sequences([before, [1, 2, 3]], device, share=False), rows).float()

    with torch.no_grad(), eval_mode(model), observing(None):
        first, second, moved = after([0] * 7), after([3] * 7), after([0] * 4)

    def near(one: Tensor, other: Tensor) -> bool:
        return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().amax().nan_to_num()))

    if not near(first, second):
        skipped = sorted({f"{r.path} ({r.reason})" for r in report.skipped if r.role in ("attention", "mixer")})
        raise ToolkitError(
            f"model {type(model).__name__} mixes the sequences of a batch in a layer that is not patched"
            f"{': ' + '; '.join(skipped[:3]) if skipped else ''}; a ragged batch needs every such layer patched."
        )
    if not near(first, moved):
        raise ToolkitError(
            f"model {type(model).__name__} computes positions from a token's row in the batch and not from "
            "position_ids; a ragged batch needs position_ids."
        )


def _check_rotary(model: nn.Module, report: PatchReport) -> None:
    """Raise ToolkitError where rotary tables depend on the longest sequence of a batch."""
    claimed = {claim.path for claim in report.claims if claim.rotary_regimes is not None}
    for path, module in model.named_modules():
        if path not in claimed and regimes_of(module):
            why = next((r.reason for r in report.skipped if r.role == "rotary" and r.path == path), "not asked for")
            raise ToolkitError(
                f"{path} of {type(model).__name__} makes rotary tables by the longest sequence of a batch; role "
                f"'rotary' must be patched for a ragged batch, got {why}."
            )
