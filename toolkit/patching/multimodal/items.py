"""A processor's outputs for one sequence as items: images, tiles or videos, each with the tokens that it takes.

Processors lay several images out in several ways. Shapes say which ways are possible, and ``check`` which one is: that
in which the model makes the same of each item alone.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.patching.without_media import POSITION_MASK
from toolkit.state.media import MediaSpan

_ABOUT_IMAGE = "qformer_"
"""Tokens by which an image is encoded: none of the sequence, even where they are as many."""
_NEVER_MEDIA = ("input_ids", "attention_mask", "position_ids", "labels")
Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Item:
    """One image, tile or video: what its features depend on, beside the weights.

    Args:
        digest: 32 bytes of all that follows but the tokens.
        placeholder: the token id that stands at its rows.
        tokens: its rows.
        arguments: the processor's outputs for it alone.
        token_arguments: [1, tokens] numbers of its tokens (their type).
    """

    digest: bytes
    placeholder: int
    tokens: int
    arguments: Arguments
    token_arguments: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Processed:
    """A processor's outputs for one sequence, taken apart.

    Args:
        ids: [n] int64 on the CPU.
        token_arguments: [1, n] numbers of the tokens beside their ids.
        media: of each modality in the sequence what belongs to it.
    """

    ids: Tensor
    token_arguments: dict[str, Tensor]
    media: dict[str, Arguments]

    @classmethod
    def of(cls, outputs: Mapping[str, Any]) -> "Processed":
        """Take ``outputs`` apart by shapes and names.

        Raises:
            ToolkitError: outputs for several sequences, or padded ones.
        """
        ids = torch.as_tensor(outputs.get("input_ids", ()))
        if ids.dim() != 2 or len(ids) != 1 or ids.is_floating_point():
            raise ToolkitError(
                f"input_ids of a processor's outputs must have shape [1, tokens], got {list(ids.shape)}; run the "
                "processor on one sequence at a time."
            )
        mask = outputs.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ToolkitError("attention_mask of a processor's outputs must be all ones, got padding.")
        of_tokens: dict[str, Tensor] = {}
        media: dict[str, Arguments] = {}
        for name, value in outputs.items():
            if name in _NEVER_MEDIA or value is None:
                continue
            numbers = isinstance(value, Tensor) and value.shape == ids.shape and not value.is_floating_point()
            if numbers and not name.startswith(_ABOUT_IMAGE):
                of_tokens[name] = value
            else:
                media.setdefault(_modality(name), {})[name] = value
        return cls(ids[0].to("cpu", torch.int64), of_tokens, media)

    def rows_of(self, kind: str, placeholders: Mapping[str, int]) -> np.ndarray:
        """Indices of the tokens in whose place rows of a modality come: those of a mask, else its placeholders."""
        for name, value in self.token_arguments.items():
            if name.endswith(POSITION_MASK) and _modality(name) == kind:
                return np.flatnonzero(value[0].cpu().numpy() == 1)
        return np.flatnonzero(self.ids.numpy() == placeholders[kind]) if kind in placeholders else np.arange(0)

    def prompt_by(self, name: str) -> tuple[int, int]:
        """First and end of the one run of tokens whose number of a token argument is 0.

        Raises:
            ToolkitError: they are several runs.
        """
        rows = np.flatnonzero(self.token_arguments[name][0].cpu().numpy() == 0)
        runs = _runs(rows)
        if len(runs) > 1:
            raise ToolkitError(
                f"tokens with {name} 0, which see each other, must be one run of a sequence, got {len(runs)} runs."
            )
        return (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)

    def layout(self) -> Any:
        """What decides how items lie in the outputs, and what is known of tokens.

        That are the names and numbers of dimensions, and which numbers tokens have.
        """
        of_media = tuple(
            (kind, tuple((name, getattr(value, "ndim", None)) for name, value in sorted(given.items())))
            for kind, given in sorted(self.media.items())
        )
        given = sorted(self.token_arguments.items())
        of_tokens = tuple((name, tuple(value.unique().tolist())) for name, value in given)
        return of_media, of_tokens


def _modality(name: str) -> str:
    if "video" in name or name.startswith("second_per_grid"):  # seconds between two frames
        return "video"
    return "audio" if "audio" in name or "input_features" in name else "image"


def digest_of(arguments: Mapping[str, Any], *more: Any) -> bytes:
    """sha256 of names, types, dtypes, shapes and contents, also inside lists and mappings.

    Raises:
        ToolkitError: a value whose content is unknown.
    """
    found = hashlib.sha256(repr(more).encode())
    for name, value in sorted(arguments.items()):
        found.update(f"{name} ".encode())
        _add_content(found, name, value)
    return found.digest()


def _add_content(found: Any, name: str, value: Any) -> None:
    if isinstance(value, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        found.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, (list, tuple)):
        found.update(f"[{len(value)}] ".encode())
        for one in value:
            _add_content(found, name, one)
    elif isinstance(value, Mapping):
        found.update(f"{{{len(value)}}} ".encode())
        for key in sorted(value, key=repr):
            _add_content(found, name, repr(key))
            _add_content(found, name, value[key])
    elif isinstance(value, (bool, int, float, str, bytes, type(None))):
        found.update(f"{type(value).__name__} {value!r} ".encode())
    else:
        raise ToolkitError(
            f"{name} of a processor's outputs must be tensors, numbers or texts, or lists of those, got "
            f"{type(value).__name__}."
        )


Split = Callable[[Arguments], list[Arguments] | None]


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (Tensor, np.ndarray, list, tuple)) else -1


def _packed(arguments: Arguments) -> list[Arguments] | None:
    """Patches of all items one after the other, as many of each as the product of its grid."""
    for name, grid in arguments.items():
        if not isinstance(grid, Tensor) or grid.dim() != 2 or grid.is_floating_point():
            continue
        sizes = grid.prod(-1).tolist()
        others = {key: value for key, value in arguments.items() if key != name}
        if any(_length(value) not in (len(grid), sum(sizes)) for value in others.values()):
            continue
        if not any(_length(value) == sum(sizes) for value in others.values()):
            continue
        ends = np.cumsum([0, *sizes]).tolist()
        parts = []
        for at, (start, end) in enumerate(pairwise(ends)):
            own = {
                key: value[at : at + 1] if _length(value) == len(grid) and sum(sizes) != len(grid) else value[start:end]
                for key, value in others.items()
            }
            parts.append({**own, name: grid[at : at + 1]})
        return parts
    return None


def _rows(arguments: Arguments) -> list[Arguments] | None:
    """The first dimension counts items."""
    lengths = {_length(value) for value in arguments.values()}
    if len(lengths) != 1 or min(lengths) < 1:
        return None
    return [{key: value[at : at + 1] for key, value in arguments.items()} for at in range(lengths.pop())]


def _columns(arguments: Arguments) -> list[Arguments] | None:
    """The first dimension is the sequence, the second counts items."""
    tensors = list(arguments.values())
    if not all(isinstance(one, Tensor) and one.dim() > 1 and len(one) == 1 for one in tensors):
        return None
    counts = {one.shape[1] for one in tensors}
    if len(counts) != 1:
        return None
    return [{key: value[:, at : at + 1] for key, value in arguments.items()} for at in range(counts.pop())]


def _whole(arguments: Arguments) -> list[Arguments]:
    return [arguments]


SPLITS: dict[str, Split] = {"packed": _packed, "columns": _columns, "rows": _rows, "whole": _whole}


def splits_of(processed: Processed) -> Iterator[dict[str, str]]:
    """Of each modality a name of ``SPLITS``, the finest first; the last takes all media of a modality as one item."""
    possible = {
        kind: [name for name, split in SPLITS.items() if split(given) is not None]
        for kind, given in processed.media.items()
    }
    for turn in range(max(map(len, possible.values()), default=0)):
        yield {kind: names[min(turn, len(names) - 1)] for kind, names in possible.items()}


def items_of(
    processed: Processed,
    split: Mapping[str, str],
    placeholders: Mapping[str, int],
    bidirectional: frozenset[int],
    types_name: str | None = None,
) -> tuple[list[MediaSpan], dict[bytes, Item]] | None:
    """Spans and items of a sequence; None where they do not fit its tokens.

    Args:
        types_name: of the token arguments by which layers tell tokens of images from others. A token that they take
            for an image's, although it is no placeholder (its first and last token), is an item of one row, too: its
            embedding.
    """
    spans: list[MediaSpan] = []
    items: dict[bytes, Item] = {}
    for kind, arguments in processed.media.items():
        parts = SPLITS[split[kind]](arguments)
        rows = processed.rows_of(kind, placeholders)
        if parts is None or not len(rows):
            return None
        placeholder = placeholders.get(kind, int(processed.ids[rows[0]]))
        counts = _counts(parts, rows)
        if counts is None:
            return None
        for part, own in zip(parts, np.split(rows, np.cumsum(counts)[:-1])):
            types = {key: value[:, torch.from_numpy(own)] for key, value in processed.token_arguments.items()}
            digest = digest_of({**part, **types}, placeholder, len(own))
            items[digest] = Item(digest, placeholder, len(own), part, types)
            offset = 0
            for run in _runs(own):
                spans.append(MediaSpan(int(run[0]), len(run), digest, offset, placeholder in bidirectional))
                offset += len(run)
    given = processed.token_arguments.get(types_name or "")
    if given is not None:
        others = torch.isin(processed.ids, torch.tensor(list(placeholders.values())), invert=True)
        for kind in processed.media:
            others[processed.rows_of(kind, placeholders)] = False
        for row in (others & (given[0].cpu() != 0)).nonzero()[:, 0].tolist():
            token = int(processed.ids[row])
            own_types = {key: value[:, row : row + 1] for key, value in processed.token_arguments.items()}
            digest = digest_of(own_types, token, 1)
            items[digest] = Item(digest, token, 1, {}, own_types)
            spans.append(MediaSpan(row, 1, digest))
    return sorted(spans), items


def _runs(rows: np.ndarray) -> list[np.ndarray]:
    """Rows in pieces without gaps."""
    return [one for one in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(one)]


def _counts(parts: Sequence[Arguments], rows: np.ndarray) -> list[int] | None:
    """Tokens of each item: those of a run each, else equally many, else by the products of their sizes."""
    runs = [len(run) for run in _runs(rows)]
    if len(parts) == 1:
        return [len(rows)]
    if len(runs) == len(parts):
        return runs
    sizes = [_size(part) for part in parts]
    if None in sizes or not sum(filter(None, sizes)):
        return None
    shares = [len(rows) * (size or 0) / sum(filter(None, sizes)) for size in sizes]
    return [int(one) for one in shares] if all(one == int(one) for one in shares) else None


def _size(part: Arguments) -> int | None:
    """The number to which an item's tokens are proportional: the product of its grid, or of its shape's numbers."""
    for value in part.values():
        if (
            isinstance(value, Tensor)
            and value.dim() == 2
            and not value.is_floating_point()
            and value.shape[1] in (2, 3)
        ):
            return int(value[0].prod())
    return 1


__all__ = ["Item", "Processed", "items_of", "splits_of"]
