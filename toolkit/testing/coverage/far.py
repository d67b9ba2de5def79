"""Logits on both sides of every length that a configuration names: original positions of scaled rotary tables, windows,
chunks. Small models are run across each such length with positions that begin before it."""

import inspect
import re
from typing import Any

import torch
from torch import Tensor

from toolkit.testing.coverage.measuring import relative, text

TOKENS = 24
_LENGTHS = re.compile(r"original_max_position_embeddings|.*chunk_size|.*sliding_window|.*local_attention")


def lengths(config: Any) -> list[int]:
    """The lengths at which a model's arithmetic may change, ascending; those beyond its positions are left out."""
    found: set[int] = set()
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    pending = [config.get_text_config().to_dict()]
    while pending:
        for name, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif isinstance(value, int) and not isinstance(value, bool) and _LENGTHS.fullmatch(str(name)):
                found.add(value)
    beyond = [most] if isinstance(most, int) and _is_rotary(config) else []
    return sorted(one for one in [*found, *beyond] if one > 0)


def _is_rotary(config: Any) -> bool:
    """Whether positions have no table that would end."""
    return bool(getattr(config.get_text_config(), "rope_parameters", None))


def far_logits(model: Any) -> dict[int, Tensor]:
    """Logits [1, n, V] of tokens around each length, by the position of the first, which may be 0."""
    found: dict[int, Tensor] = {}
    starts = [0]
    if "position_ids" in inspect.signature(model.forward).parameters:
        starts += [length - TOKENS // 2 for length in lengths(model.config) if length > TOKENS]
    for start in starts:
        found[start] = _at(model, start)
    return found


def _at(model: Any, start: int) -> Tensor:
    positions = {"position_ids": torch.arange(start, start + TOKENS)[None]} if start else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=text(TOKENS, 1), use_cache=False, **positions).logits
    return logits


def far_error(model: Any, expected: dict[int, Tensor]) -> float:
    """The largest relative difference of the logits at any place from those of ``far_logits``."""
    return max(relative(_at(model, start), logits) for start, logits in expected.items())
