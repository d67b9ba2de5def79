"""Layers whose tokens see the whole prompt and a window of what was written after it (reference sliding windows)."""

from typing import Any

import torch
from torch import Tensor

from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings, ForwardContext


class PromptWindowContext:
    """``context`` for such a layer: in the place of all keys its tokens attend those of prompt and window.

    Args:
        context: of the forward.
        window: tokens behind the prompt that a token sees, itself included.
    """

    def __init__(self, context: ForwardContext, window: int) -> None:
        self._context, self._window = context, window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        return self._context.attend_prompt(layer, q, k, v, settings._replace(kv_dtype=""), self._window)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def sequence_positions(batch: RaggedBatch) -> Tensor:
    """[T] the index of each row's token in its sequence."""
    row = torch.arange(len(batch.tokens), device=batch.tokens.device)
    sequence = (torch.searchsorted(batch.query_offsets, row, right=True) - 1).clamp(0, len(batch.kv_lengths) - 1)
    return batch.kv_lengths[sequence] - batch.query_offsets[sequence + 1] + row


def seen_positions(batch: RaggedBatch, window: int) -> Tensor | None:
    """[T, K] positions that each row sees, ascending, -1 behind the last one; None where every row sees all of them.

    Args:
        batch: whose ``prompt_lengths`` say what the prompts are.
        window: as of ``PromptWindowContext``.
    """
    prompt = batch.prompt_lengths
    if prompt is None or not len(prompt):
        return None
    row = torch.arange(len(prompt), device=prompt.device)
    position = sequence_positions(batch)
    prompt = torch.where(prompt < 0, position + 1, prompt)
    begin = torch.maximum(prompt, position - window + 1)
    if not bool((begin > prompt).any()):
        return None
    count = int((torch.minimum(prompt, position + 1) + (position + 1 - begin).clamp_min(0)).amax())
    index = torch.arange(count, device=prompt.device)
    seen = torch.where(index < prompt[:, None], index, index - prompt[:, None] + begin[:, None])
    hidden = (seen > position[:, None]) | (row >= batch.query_offsets[-1])[:, None]
    return torch.where(hidden, -1, seen)


def attend_prompt(
    context: ForwardContext, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, window: int
) -> Tensor:
    """``ForwardContext.attend_prompt`` by what ``context`` attends all keys and selected ones with."""
    seen = seen_positions(context.batch, window)
    if seen is None:
        return context.attend(layer, q, k, v, settings)
    context.check_nothing_ahead(layer)
    return context.attend_selected(layer, q, k, v, seen, settings)
