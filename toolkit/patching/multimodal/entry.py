"""Where images enter a model: the module that holds the input embedding, called with embeddings that were merged.

A model's own forward computes features of images and puts them among the embeddings before it calls that module. So
what the module is handed says what the features are, and what it is handed instead puts features in: in a ragged batch
the rows that the batch gives. The tower, its projector and the merging stay the model's own.

A text part that is handed features, and a mask of the tokens whose place they take, is handed those of the batch.
A module that takes pixels and merges them itself is handed embeddings in the place of ids in a ragged batch, and what
its first layer is handed says what the features are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patching.claim import Undo, put_pre_hook
from toolkit.patching.skeleton import HIDDEN
from toolkit.patching.text_part import find_entry, takes_pixels
from toolkit.patching.without_media import POSITION_MASK
from toolkit.state.active import forward_context_of
from toolkit.state.batch import RaggedBatch
from toolkit.state.media import Features

IDS, EMBEDDINGS = "input_ids", "inputs_embeds"


class Entered(BaseException):
    """Ends a forward where its text part begins. No ``Exception``: a model's own code must not catch it."""


@dataclass
class Arrival:
    """What the entry was handed. stop: end the forward there."""

    stop: bool
    arguments: dict[str, Any] = field(default_factory=dict)

    def take(self, arguments: dict[str, Any]) -> None:
        """Keep the arguments of a call, and end the forward if that is wanted."""
        self.arguments = arguments
        if self.stop:
            raise Entered


_ARRIVAL: ContextVar[Arrival | None] = ContextVar("arrival", default=None)


@contextmanager
def arriving(model: nn.Module, stop: bool) -> Iterator[Arrival]:
    """Inside, the next calls of the model's entry leave their arguments; with ``stop`` the forward ends there."""
    arrival = Arrival(stop)
    token = _ARRIVAL.set(arrival)
    found = find_entry(model)
    layer = _first_layer(found[1]) if found is not None and takes_pixels(found[1]) else None
    hook = None if layer is None else layer.register_forward_pre_hook(_arrived_at_layer, with_kwargs=True)
    try:
        yield arrival
    except Entered:
        pass
    finally:
        _ARRIVAL.reset(token)
        if hook is not None:
            hook.remove()


def _first_layer(module: nn.Module) -> nn.Module | None:
    lists = (child for child in module.children() if isinstance(child, nn.ModuleList) and len(child))
    return next((layers[0] for layers in lists), None)


def _arrived_at_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arrival = _ARRIVAL.get()
    if arrival is not None:
        hidden = args[0] if args else next((kwargs[name] for name in HIDDEN if name in kwargs), None)
        arrival.take({**kwargs, EMBEDDINGS: hidden})


class MediaEntry:
    """The entry's hook before its forward, and what was learned about the model's images.

    A ragged batch's ``embeddings`` take the place of those rows, and its levels go where the model's own forward hands
    them over.

    Args:
        merges: whether the module takes pixels, and puts their features among embeddings itself.

    Attributes:
        mask_name: keyword of the mask [B, S] or [B, S, 1] of rows that get levels; None before one was seen.
        levels_name: keyword of the levels, L tensors [M, H].
        levels_keys: the keys of a mapping of levels, by layers; None for a list.
        mask_of_vectors: the mask has a last dimension of 1.
        given_name: keyword of the features [B, n, H] that the text part merges itself; None before some were seen.
        types_name: keyword of the types [B, S] of tokens, not 0 where layers take one for an image's; None for a model
            whose layers do not tell tokens apart.
        span_layers: indices of the layers in which tokens of an image see each other.
        looking: the placeholders whose tokens do.
        prompts: of each layout the token argument by which tokens see each other, of text too, where it is 0.
        verdicts: of each layout of a processor's outputs None where it is proven, or the reason why it is refused.
        splits: of each layout, how items lie in it.
    """

    def __init__(self, merges: bool = False) -> None:
        self.merges = merges
        self.mask_name: str | None = None
        self.levels_name: str | None = None
        self.levels_keys: tuple[Any, ...] | None = None
        self.mask_of_vectors = False
        self.given_name: str | None = None
        self.types_name: str | None = None
        self.span_layers: frozenset[int] = frozenset()
        self.looking: frozenset[int] = frozenset()
        self.prompts: dict[Any, str] = {}
        self.verdicts: dict[Any, str | None] = {}
        self.splits: dict[Any, Any] = {}

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arrival = None if torch.compiler.is_compiling() or self.merges else _ARRIVAL.get()
        if arrival is not None:
            arrival.take(self._with_embeddings(module, kwargs))
        context = forward_context_of(kwargs)
        if context is None or context.batch.embeddings is None:
            return None
        if self.merges and kwargs.get(EMBEDDINGS) is None and kwargs.get(IDS) is not None:
            kwargs = {**kwargs, IDS: None, EMBEDDINGS: _embedded(module, kwargs[IDS])}
        return args, {**kwargs, **self._merged(context.batch, kwargs)}

    def _merged(self, batch: RaggedBatch, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        own = kwargs.get(EMBEDDINGS)
        assert batch.embeddings is not None
        assert batch.embedding_rows is not None
        if own is None and self.given_name is not None:
            mask = torch.zeros(batch.tokens.shape, dtype=torch.int64, device=batch.tokens.device)
            mask = mask.index_fill(0, batch.embedding_rows, 1)[None]
            return {self.given_name: batch.embeddings[None], self.given_name + POSITION_MASK: mask}
        if own is None:
            raise ToolkitError("the model must hand embeddings to its text part for a batch with images, got ids.")
        values = batch.embeddings.to(own.dtype)
        merged = {EMBEDDINGS: own.index_copy(1, batch.embedding_rows, values[None])}
        if self.types_name is not None:
            types = torch.zeros(own.shape[:2], dtype=torch.int64, device=own.device)
            merged[self.types_name] = types.index_fill(1, batch.embedding_rows, 1)
        if batch.embedding_levels is not None:
            if self.mask_name is None or self.levels_name is None:
                raise ToolkitError("embedding_levels of a batch must be None for a model without levels, got a tensor.")
            mask = torch.zeros(own.shape[:2], dtype=torch.bool, device=own.device)
            mask = mask.index_fill(1, batch.embedding_rows, True)
            merged[self.mask_name] = mask[..., None] if self.mask_of_vectors else mask
            levels = list(batch.embedding_levels.to(own.dtype))
            keys = self.levels_keys
            merged[self.levels_name] = levels if keys is None else dict(zip(keys, levels, strict=True))
        return merged

    def _with_embeddings(self, module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """``kwargs``, with the embeddings that the text part itself makes of ids, features and a mask of that name."""
        found = [name for name in kwargs if isinstance(kwargs.get(name + POSITION_MASK), Tensor)]
        if kwargs.get(EMBEDDINGS) is not None or kwargs.get(IDS) is None or len(found) != 1:
            return dict(kwargs)
        self.given_name = found[0]
        own = _embedded(module, kwargs[IDS])
        given, mask = kwargs[self.given_name], kwargs[self.given_name + POSITION_MASK] == 1
        if given is not None:
            own = own.masked_scatter(mask[..., None], given.to(own.dtype))
        return {**kwargs, EMBEDDINGS: own}

    def features(self, arguments: Mapping[str, Any], rows: Tensor) -> Features:
        """Of the ``rows`` [n] of a forward over one sequence whose entry was handed ``arguments``."""
        given = arguments.get(EMBEDDINGS)
        if given is None:
            raise ToolkitError("the model must hand embeddings to its text part, got ids.")
        names = [name for name, value in arguments.items() if _are_levels(value, given.shape[-1])]
        masks = [name for name, value in arguments.items() if _is_mask(value, given.shape[:2])]
        if not names:
            return Features(given[0].index_select(0, rows))
        if len(names) > 1 or len(masks) != 1:
            raise ToolkitError(f"levels of images must be one list with one mask, got {names} and {masks}.")
        self.mask_name, self.levels_name = masks[0], names[0]
        found, mask = arguments[self.levels_name], arguments[self.mask_name]
        self.levels_keys = tuple(found) if isinstance(found, Mapping) else None
        self.mask_of_vectors = mask.dim() == 3
        # A level has one row for each row of the mask.
        index = mask[0].reshape(-1).cumsum(0)[rows] - 1
        levels = torch.stack([level.index_select(0, index) for level in _parts(found)])
        return Features(given[0].index_select(0, rows), levels)


def _embedded(module: Any, ids: Tensor) -> Tensor:
    found: Tensor = module.get_input_embeddings()(ids)
    return found


def _parts(value: Any) -> tuple[Any, ...]:
    """What a list or a mapping has; nothing of another value."""
    values = value.values() if isinstance(value, Mapping) else value
    return tuple(values) if isinstance(value, (Mapping, list, tuple)) else ()


def _are_levels(value: Any, width: int) -> bool:
    parts = _parts(value)
    return bool(parts) and all(isinstance(one, Tensor) and one.dim() == 2 and one.shape[1] == width for one in parts)


def _is_mask(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.shape in (shape, (*shape, 1))


def install(entry: nn.Module) -> Undo:
    """Put a ``MediaEntry`` before the forward of ``entry``; the undo step."""
    return put_pre_hook(entry, MediaEntry(takes_pixels(entry)))


def entry_of(model: nn.Module) -> MediaEntry | None:
    """The hook of a patched model; None where there is none."""
    found = find_entry(model)
    hooks = () if found is None else found[1]._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, MediaEntry)), None)
