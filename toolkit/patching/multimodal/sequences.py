"""Sequences with images: tokens, positions along the model's axes, and spans, from a processor's outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patching.multimodal.encoding import on_device, taken_by
from toolkit.patching.multimodal.items import Item, Processed
from toolkit.patching.text_part import find_entry
from toolkit.patching.without_media import MODALITIES, placeholders_of
from toolkit.state.media import MediaSpan, blocks


@dataclass(frozen=True, eq=False)
class MediaSequence:
    """One sequence with images.

    Args:
        tokens: [n] int64 on the CPU; an id that the vocabulary lacks is 0.
        positions: [A, n] along A axes, or None where they are 0, 1, ...
        delta: what a token after the sequence has as its position along every axis, less its index.
        spans: where items lie.
        items: by digest.
        prompt: first and end of the tokens that see each other, those of text too; None where spans say it all.
    """

    tokens: Tensor
    positions: Tensor | None
    delta: int
    spans: tuple[MediaSpan, ...]
    items: Mapping[bytes, Item]
    prompt: tuple[int, int] | None = None

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and end of each run of tokens that see each other."""
        return blocks(self.spans) if self.prompt is None else [self.prompt]


def positions_of(model: nn.Module, processed: Processed, outputs: Mapping[str, Any]) -> tuple[Tensor | None, int]:
    """[A, n] positions by the model's own ``get_rope_index``, and the delta of tokens of text that come after them:
    what such a token has along every axis, less its index. (None, 0) for a model without one: 0, 1, ...

    The delta is that of a training forward over the longer sequence. It is not always the largest position + 1: the
    frames of a video may be further apart than the rows of text behind them.
    """
    owner: Any = next((one for one in model.modules() if callable(getattr(type(one), "get_rope_index", None))), None)
    if owner is None or not processed.media:
        return None, 0
    count = len(processed.ids)
    ids = torch.cat([processed.ids, torch.tensor([_text_token(owner.config)])])
    arguments = {name: value for name, value in outputs.items() if value is not None}
    for name, value in processed.token_arguments.items():
        arguments[name] = torch.cat([value, value.new_zeros(1, 1)], 1)
    if "mm_token_type_ids" not in arguments:
        known = placeholders_of(owner.config)
        types = torch.zeros_like(ids)
        for number, kind in enumerate(MODALITIES, 1):
            types[ids == known.get(kind, -1)] = number
        arguments["mm_token_type_ids"] = types[None]
    arguments = on_device(model, arguments | {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]})
    with torch.no_grad():
        positions, _ = owner.get_rope_index(**taken_by(type(owner).get_rope_index, arguments))
    found: Tensor = positions[:, 0].cpu()
    if found.is_floating_point():
        if not torch.equal(found, found.trunc()):
            raise ToolkitError("positions of a ragged batch must be whole numbers, got others (of a video's frames).")
        found = found.long()
    return found[:, :count], int(found[:, count].max()) - count


def prompt_of(model: nn.Module, processed: Processed, name: str) -> tuple[int, int]:
    """First and end of the tokens, of text too, that see each other by the token argument ``name``.

    Raises:
        ToolkitError: they are several runs, or more than a sliding window shows: transformers shows a prompt whole.
    """
    first, end = processed.prompt_by(name)
    found = find_entry(model)
    windows = [getattr(one, "sliding_window", None) for one in (found[1].modules() if found is not None else ())]
    shortest = min((one for one in windows if isinstance(one, int) and one > 0), default=end)
    if end - first > shortest:
        raise ToolkitError(
            f"a prompt whose tokens see each other must have <= {shortest} tokens, the sliding window of its layers, "
            f"got {end - first}."
        )
    return first, end


def _text_token(config: Any) -> int:
    """A token id that stands for nothing but text."""
    special = {value for name, value in vars(config).items() if isinstance(value, int) and "token" in name}
    return next(token for token in range(len(special) + 1) if token not in special)


def continued(positions: Tensor | None, delta: int, count: int) -> Tensor | None:
    """Positions of ``count`` tokens, the last of which are text behind ``positions`` [A, n]."""
    if positions is None:
        return None
    known = positions.shape[1]
    after = torch.arange(known, count) + delta
    return torch.cat([positions, after.expand(len(positions), -1)], 1)


def whole_tokens(processed: Processed, tokens: Sequence[int] | Tensor | None) -> Tensor:
    """``tokens``, which begin with the processor's ids; None for those.

    Raises:
        ToolkitError: they begin otherwise.
    """
    if tokens is None:
        return processed.ids
    whole = torch.as_tensor(tokens, dtype=torch.int64).cpu()
    if whole.dim() != 1 or not torch.equal(whole[: len(processed.ids)], processed.ids):
        raise ToolkitError(
            f"a sequence with images must begin with the processor's input_ids ({len(processed.ids)} tokens), got "
            f"{len(whole)} tokens that begin otherwise."
        )
    return whole
