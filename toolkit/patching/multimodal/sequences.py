"""Sequences with images: tokens, positions along the model's axes, and spans, from a processor's outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patching.multimodal.encoding import on_device, taken_by
from toolkit.patching.multimodal.items import MODALITIES, Item, Processed
from toolkit.state.media import MediaSpan


@dataclass(frozen=True, eq=False)
class MediaSequence:
    """One sequence with images.

    Args:
        tokens: [n] int64 on the CPU; an id that the vocabulary lacks is 0.
        positions: [A, n] along A axes, or None where they are 0, 1, ...
        delta: what a token after the sequence has as its position along every axis, less its index.
        spans: where items lie.
        items: by digest.
    """

    tokens: Tensor
    positions: Tensor | None
    delta: int
    spans: tuple[MediaSpan, ...]
    items: Mapping[bytes, Item]


def placeholders_of(config: Any) -> dict[str, int]:
    """The token id that stands for rows of each modality, as far as the configuration names one."""
    found: dict[str, int] = {}
    for kind in MODALITIES:
        names = (f"{kind}_token_id", f"{kind}_token_index")
        ids = [value for name in names if isinstance(value := getattr(config, name, None), int)]
        if ids:
            found[kind] = ids[0]
    return found


def positions_of(model: nn.Module, processed: Processed, outputs: Mapping[str, Any]) -> Tensor | None:
    """[A, n] positions by the model's own ``get_rope_index``; None for a model without one: 0, 1, ..."""
    owner: Any = next((one for one in model.modules() if callable(getattr(type(one), "get_rope_index", None))), None)
    if owner is None or not processed.media:
        return None
    arguments = {name: value for name, value in outputs.items() if value is not None}
    if "mm_token_type_ids" not in arguments:
        ids = placeholders_of(owner.config)
        types = torch.zeros_like(processed.ids)
        for number, kind in enumerate(MODALITIES, 1):
            types[processed.ids == ids.get(kind, -1)] = number
        arguments["mm_token_type_ids"] = types[None]
    arguments = on_device(model, arguments | {"input_ids": processed.ids[None]})
    with torch.no_grad():
        positions, _ = owner.get_rope_index(**taken_by(type(owner).get_rope_index, arguments))
    found: Tensor = positions[:, 0].cpu()
    return found


def continued(positions: Tensor | None, count: int) -> tuple[Tensor | None, int]:
    """Positions of ``count`` tokens, the last of which continue ``positions`` [A, n], and the delta."""
    if positions is None:
        return None, 0
    known = positions.shape[1]
    delta = int(positions.max()) + 1 - known if known else 0
    after = torch.arange(known, count) + delta
    return torch.cat([positions, after.expand(len(positions), -1)], 1), delta


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
