"""Forwards of a patched model over ragged batches: logits, and the log-probabilities that training uses."""

import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.elementwise import row_invariant
from toolkit.moe.observer import observing
from toolkit.numerics import Numerics
from toolkit.ops.linear_logprob import deferred
from toolkit.ops.take_rows import take_rows
from toolkit.patching.adapters import inner_model, vocabulary_size
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.length_tables import regimes_of
from toolkit.patching.ragged_call import call_arguments
from toolkit.patching.record import report_of
from toolkit.patching.report import PatchReport
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import ForwardContext
from toolkit.state.dense import DenseContext
from toolkit.state.rotary_regimes import RotaryRegimes


@cache
def _has_logits_to_keep(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


def _patched(model: nn.Module) -> nn.Module:
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
    inner = inner_model(_patched(model))
    report = report_of(inner)
    if report is None:
        raise ToolkitError(f"model {type(inner).__name__} is not patched; call toolkit.patch(model) first.")
    skipped = next((r.reason for r in report.skipped if r.role == "attention"), None)
    if skipped or not {"attention", "mixer"} & set(report.roles()):
        why = skipped or next((r.reason for r in report.skipped if r.role == "mixer"), None)
        state = f"a skipped layer: {why}" if why else "no layer that calls the attention interface"
        raise ToolkitError(f"attention of {type(inner).__name__} must be patched for a ragged batch, got {state}.")
    if not torch.compiler.is_compiling() and report not in _SEPARATE:
        _SEPARATE.add(report)  # before the check, which calls this function
        try:
            _check_separate(inner)
        except BaseException:
            _SEPARATE.discard(report)
            raise
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


def choose_rotary_lengths(
    models: nn.Module | Sequence[nn.Module], lengths: Sequence[int], given: Sequence[int | None] | None = None
) -> list[int] | None:
    """``RaggedBatch.from_sequences``'s ``rotary_lengths`` for sequences of ``lengths`` tokens; None if not needed.

    Args:
        models: a patched model, or its wrapper; or several that run the same batch.
        given: the lengths by which the tables are made, as declared or of a ``Completion``; None for their own.

    Raises:
        ToolkitError: a given length below the sequence's own with other tables.
    """
    if given is not None:
        _check_one_each("rotary_lengths", given, len(lengths))
    models = [models] if isinstance(models, nn.Module) else models
    reports = [report_of(inner_model(_patched(inner_model(model)))) for model in models]
    found = [report.rotary_regimes() for report in reports if report is not None]
    regimes = RotaryRegimes.merged(filter(None, found))
    return None if regimes is None else regimes.of_lengths([None] * len(lengths) if given is None else given, lengths)


def token_logprobs(
    model: nn.Module,
    sequences: Sequence[Sequence[int] | Tensor],
    share: bool = True,
    last: Sequence[int] | None = None,
    routing: Sequence[Tensor] | None = None,
    rotary_lengths: Sequence[int | None] | None = None,
) -> list[Tensor]:
    """Log-probability (nats, full vocabulary) of every token of every sequence given the tokens before it.

    This is the training forward, and differentiable. All sequences are one batch.

    Args:
        model: a patched model, or its wrapper (data parallel, DeepSpeed's engine).
        sequences: token ids of each sequence.
        share: compute common prefixes once.
        last: return only the last ``last[i]`` tokens of sequence i; the head skips the others (a prompt's, say).
        routing: experts [tokens, MoE layers, K] of the tokens of sequence i, in place of the routers' choice
            (``Completion.routed_experts``). The last token may be missing. Routers must be patched.
        rotary_lengths: of each sequence the length by which its rotary tables are made, where they depend on it
            (LongRoPE, dynamic NTK): ``Completion.rotary_length``. None is the sequence's own length.

    Returns:
        One tensor per sequence, [tokens - 1] or [last[i]].

    Raises:
        ToolkitError: a sequence that is no list of token ids, a token id outside the vocabulary, ``last[i]`` larger
            than the number of predictions, a rotary length below the sequence's own with other tables, or ``last`` or
            ``rotary_lengths`` without one entry per sequence.
    """
    device = next(model.parameters()).device
    vocabulary = vocabulary_size(_patched(model))
    tokens = [_token_ids(index, sequence, vocabulary) for index, sequence in enumerate(sequences)]
    lengths = [max(sequence.numel() - 1, 0) for sequence in tokens]
    if last is not None:
        _check_one_each("last", last, len(tokens))
        for index, (count, available) in enumerate(zip(last, lengths)):
            if not 0 <= count <= available:
                raise ToolkitError(
                    f"last[{index}] must be >= 0 and <= {available}, the sequence's length - 1, got {count}."
                )
        lengths = list(last)
    if not any(sequence.numel() for sequence in tokens):
        return [torch.zeros(0, device=device) for _ in tokens]
    # Where nothing is asked for, the empty results still have a graph: gradients of 0, as of any masked loss.
    # The last token of a sequence predicts nothing here, but stays in: it costs little.
    chosen = choose_rotary_lengths(model, [len(sequence) for sequence in tokens], rotary_lengths)
    batch = RaggedBatch.from_sequences(tokens, device, share, routing, chosen)
    return list(predictions(model, batch, tokens, lengths)[0].split(lengths))


def _token_ids(index: int, given: Any, vocabulary: int) -> Tensor:
    """One sequence as int64 on the CPU. A conversion would cut fractions off without a word."""
    try:
        tokens = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):  # text, None, ids of more than 64 bits
        tokens = torch.zeros(())
    whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    ids = tokens.to("cpu", torch.int64)
    if ids.dim() != 1 or (ids.numel() and not (whole and 0 <= int(ids.min()) <= int(ids.max()) < vocabulary)):
        raise ToolkitError(f"sequence {index} must be a list of token ids from 0 to {vocabulary - 1}.")
    return ids


def _check_one_each(name: str, given: Sequence[Any], count: int) -> None:
    if len(given) != count:
        raise ToolkitError(f"{name} must have one entry per sequence ({count}), got {len(given)}.")


# Of logits [..., V] and targets [...]: tensors [...], the first of which is the log-probability of the target.
ReadLogits = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def predictions(
    model: nn.Module,
    batch: RaggedBatch,
    sequences: Sequence[Tensor],
    counts: Sequence[int],
    read: ReadLogits = deferred.token_logprobs,
) -> tuple[Tensor, ...]:
    """What ``read`` returns for the logits of the last ``counts[i]`` tokens of each sequence: [sum(counts)].

    A prediction that several samples share (the same row, the same next token) is computed once. A row with several
    next tokens is one row of the head per next token.

    Args:
        batch: ``RaggedBatch.from_sequences(sequences)``.
    """
    device = batch.tokens.device
    ends = torch.tensor([len(sequence) for sequence in sequences]).cumsum(0).tolist()
    # A token is predicted by the row before it.
    predicting = torch.cat([torch.arange(end - 1 - count, end - 1) for end, count in zip(ends, counts)])
    targets = torch.cat([sequence[len(sequence) - count :] for sequence, count in zip(sequences, counts)])
    rows = predicting if batch.sample_rows is None else batch.sample_rows.cpu()[predicting]
    if batch.sample_rows is None:
        return read(ragged_forward(model, batch, rows.to(device)), targets.to(device))
    pairs, sample_of = torch.stack([rows, targets], 1).unique(dim=0, return_inverse=True)
    distinct, row_of = pairs[:, 0].unique_consecutive(return_inverse=True)
    logits = ragged_forward(model, batch, distinct.to(device))
    if len(distinct) < len(pairs):
        logits = deferred.take_logits(logits, row_of.to(device))
    index = sample_of.to(device)
    return tuple(take_rows(values, index) for values in read(logits, pairs[:, 1].to(device)))
