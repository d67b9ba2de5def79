"""Forwards of a patched model over ragged batches: logits, and the log-probabilities that training uses."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.attention import KEYWORD
from toolkit.ops.linear_logprob import deferred
from toolkit.patch.apply import report_of
from toolkit.state.batch import RaggedBatch


def _explicit_mask(device: torch.device) -> Tensor:
    """A 4-D mask of no entries: transformers takes it as ready-made and builds none; attention reads the batch."""
    return torch.empty(1, 1, 0, 0, device=device)


@cache
def _keeps_logits(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


def ragged_forward(model: nn.Module, batch: RaggedBatch, rows: Tensor | None = None) -> Tensor:
    """Logits [len(rows), V] (all T tokens when ``rows`` is None) of the model's own forward over ``batch``.

    With gradients on they may be deferred (``toolkit.ops.linear_logprob``): any operation on them computes them.

    rows: int64 indices into the batch's tokens. Differentiable. Raises ToolkitError if attention is not patched.
    """
    report = report_of(model)
    if report is None or "attention" not in report.roles():
        why = next((r.reason for r in report.refusals if r.role == "attention"), None) if report else None
        state = f"left alone: {why}" if why else "not patched"
        raise ToolkitError(f"model {type(model).__name__} has attention {state}; a ragged batch needs it patched.")
    keep: dict[str, Any] = {}
    if rows is not None and _keeps_logits(type(model).forward):
        keep["logits_to_keep"] = rows
    with batch.activate():
        output = model(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            attention_mask=_explicit_mask(batch.tokens.device),
            use_cache=False,
            **keep,
            **{KEYWORD: batch},
        )
    logits = output.logits[0]
    return logits if rows is None or keep else logits[rows]


def token_logprobs(model: nn.Module, sequences: Sequence[Sequence[int] | Tensor]) -> list[Tensor]:
    """Log-probability (nats, full vocabulary) of every token of every sequence given those before it.

    The training forward, differentiable: tensor i has one value fewer than sequence i has tokens. All sequences go in
    one packed batch.
    """
    device = next(model.parameters()).device
    tokens = [torch.as_tensor(sequence, dtype=torch.int64, device=device) for sequence in sequences]
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for index, sequence in enumerate(tokens):
        if sequence.dim() != 1 or (
            sequence.numel() and not 0 <= int(sequence.min()) <= int(sequence.max()) < vocabulary
        ):
            raise ToolkitError(f"sequence {index} is not a list of token ids; allowed are 0 to {vocabulary - 1}.")
    lengths = [max(sequence.numel() - 1, 0) for sequence in tokens]
    if sum(lengths) == 0:
        return [torch.zeros(0, device=device) for _ in tokens]
    # The last token of a sequence predicts nothing that is asked for, but stays in: it costs little.
    batch = RaggedBatch.from_sequences(tokens, device=device)
    starts = batch.query_offsets[:-1].tolist()
    rows = torch.cat([torch.arange(start, start + n, device=device) for start, n in zip(starts, lengths)])
    targets = torch.cat([sequence[1:] for sequence in tokens])
    logprobs, _ = deferred.token_logprobs(ragged_forward(model, batch, rows), targets)
    return list(logprobs.split(lengths))
