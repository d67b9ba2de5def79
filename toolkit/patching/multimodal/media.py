"""What an engine and a training forward call for sequences with images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError, first_line
from toolkit.patching.adapters import inner_model, vocabulary_size
from toolkit.patching.forward import patched_model
from toolkit.patching.multimodal.check import check_media
from toolkit.patching.multimodal.encoding import encode_item
from toolkit.patching.multimodal.entry import MediaEntry, entry_of
from toolkit.patching.multimodal.items import Item, Processed, items_of
from toolkit.patching.multimodal.sequences import (
    MediaSequence,
    continued,
    positions_of,
    prompt_of,
    whole_tokens,
)
from toolkit.patching.probe import device_of
from toolkit.patching.without_media import placeholders_of
from toolkit.state.batch import RaggedBatch
from toolkit.state.media import Features


def _parts(model: nn.Module) -> tuple[nn.Module, MediaEntry | None]:
    inner = inner_model(patched_model(inner_model(model)))
    return inner, entry_of(inner)


def takes_media(model: nn.Module) -> bool:
    """Whether ``model`` is patched and has a text part that takes embeddings in the place of ids."""
    return _parts(model)[1] is not None


def span_layers(model: nn.Module) -> frozenset[int]:
    """Layers in which the tokens of an image see each other, as far as images were proven (``expand``)."""
    entry = _parts(model)[1]
    return frozenset() if entry is None else entry.span_layers


def _needed(model: nn.Module) -> tuple[nn.Module, MediaEntry]:
    inner, entry = _parts(model)
    if entry is None:
        raise ToolkitError(
            f"images must be None for {type(inner).__name__}, which has no text part apart from a tower, or is not "
            "patched for role 'media'."
        )
    return inner, entry


def expand(model: nn.Module, outputs: Mapping[str, Any], tokens: Sequence[int] | Tensor | None = None) -> MediaSequence:
    """A sequence with images, from what the model's processor makes of it.

    The first sequence of each layout is proven: an ordinary forward of it against a ragged one.

    Args:
        model: patched.
        outputs: of the processor, for one sequence: input_ids [1, n], pixel values, grids, token types.
        tokens: the whole sequence where it continues after input_ids (a completion); it has no further images.

    Raises:
        ToolkitError: the model takes no images, its forward with these differs from a ragged one, the outputs are for
            several sequences or padded, or tokens begin with others than input_ids.
    """
    inner, entry = _needed(model)
    try:
        return _expanded(inner, entry, outputs, tokens)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:  # of the model's own code
        reason = first_line(error)
        raise ToolkitError(f"images must be what {type(inner).__name__} takes, got {reason}.") from None


def _expanded(
    inner: nn.Module, entry: MediaEntry, outputs: Mapping[str, Any], tokens: Sequence[int] | Tensor | None
) -> MediaSequence:
    processed = Processed.of(outputs)
    whole = whole_tokens(processed, tokens)
    known = whole
    for token in placeholders_of(inner.config).values():
        if token >= vocabulary_size(inner):
            known = known.where(known != token, 0)
    if not processed.media:
        return MediaSequence(known, None, 0, (), {})
    check_media(inner, entry, processed, outputs)
    split = entry.splits[processed.layout()]
    found = items_of(processed, split, placeholders_of(inner.config), entry.looking, entry.types_name)
    if found is None:
        raise ToolkitError("the tokens of a sequence must have the rows of its images, got others.")
    positions, delta = positions_of(inner, processed, outputs)
    told = entry.prompts.get(processed.layout())
    prompt = None if told is None else prompt_of(inner, processed, told)
    return MediaSequence(known, continued(positions, delta, len(whole)), delta, tuple(found[0]), found[1], prompt)


def encode(model: nn.Module, item: Item) -> Features:
    """The features of one item of ``expand``, by the model's own tower; with their graph while gradients are on.

    An item is always encoded alone, so its features are bitwise independent of others.
    """
    return encode_item(*_needed(model), item)


def media_batch(
    model: nn.Module,
    sequences: Sequence[Tensor | MediaSequence],
    share: bool = True,
    routing: Sequence[Tensor] | None = None,
    rotary_lengths: Sequence[int] | None = None,
    selection: Sequence[Tensor] | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> RaggedBatch:
    """``RaggedBatch.from_sequences`` of sequences of which some have images: each distinct item is encoded once."""
    items: dict[bytes, Item] = {}
    for one in sequences:
        if isinstance(one, MediaSequence):
            items |= one.items
    seen = [one.blocks if isinstance(one, MediaSequence) else [] for one in sequences]
    along = [one.positions if isinstance(one, MediaSequence) else None for one in sequences]
    return RaggedBatch.from_sequences(
        [one.tokens if isinstance(one, MediaSequence) else one for one in sequences],
        device_of(model),
        share,
        routing,
        rotary_lengths,
        seen,
        selection=selection,
        media=[one.spans if isinstance(one, MediaSequence) else () for one in sequences],
        features={digest: encode(model, item) for digest, item in items.items()},
        sequence_positions=along if any(one is not None for one in along) else None,
        span_layers=span_layers(model),
        prompt_lengths=prompt_lengths,
    )
