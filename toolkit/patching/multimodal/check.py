"""The proof that a ragged batch with images is the model's own forward, at the first images of each layout.

One ordinary forward of the sequence that brings them says what the model itself makes of them; the items' features, the
sequence's positions, the tokens that see each other and the logits of a ragged batch must be the same.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError, first_line
from toolkit.moe.observer import observing
from toolkit.patching.adapters import vocabulary_size
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.forward import context_forward
from toolkit.patching.multimodal.encoding import encode_item, on_device, taken_by
from toolkit.patching.multimodal.entry import Arrival, MediaEntry, arriving
from toolkit.patching.multimodal.items import Processed, items_of, splits_of
from toolkit.patching.multimodal.sequences import positions_of, prompt_of
from toolkit.patching.multimodal.shortened import shortened
from toolkit.patching.probe import device_of
from toolkit.patching.text_part import find_entry
from toolkit.patching.without_media import POSITION_MASK, placeholders_of
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext
from toolkit.state.media import Features, MediaSpan, blocks

COMPARED = 16  # rows of logits, the last ones
TOLERANCE = 1e-3
NARROW_TOLERANCE = 5e-2
"""Of 16-bit models: other numbers of rows round otherwise in fast mode."""


@dataclass
class _Own:
    """What the model's own forward over one sequence made of it. ahead: of each layer, [n, n] keys seen ahead."""

    logits: Tensor
    arrival: Arrival
    ahead: dict[int, Tensor]


def check_media(model: nn.Module, entry: MediaEntry, processed: Processed, outputs: Mapping[str, Any]) -> None:
    """Prove a layout once; learns how its items lie in it, and which layers see ahead.

    Raises:
        ToolkitError: the reason why images of this layout are refused; again at every later use.
    """
    layout = processed.layout()
    if layout not in entry.verdicts:
        # What raises may pass (sharded weights, one odd sequence); a verdict stays.
        with torch.no_grad(), eval_mode(model), observing(None), _state_kept(model):
            if not _proven_shortened(model, entry, processed, outputs):
                entry.verdicts[layout] = _verdict(model, entry, processed, outputs)
    reason = entry.verdicts[layout]
    if reason is not None:
        raise ToolkitError(f"images of {type(model).__name__} must be proven for a ragged batch, got: {reason}")


def _proven_shortened(model: nn.Module, entry: MediaEntry, processed: Processed, outputs: Mapping[str, Any]) -> bool:
    """Whether the layout is proven by what lies beside its images. What fails there is tried as a whole."""
    few = shortened(processed, outputs, placeholders_of(model.config))
    try:
        if few is None or _verdict(model, entry, Processed.of(few), few) is not None:
            return False
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError, ToolkitError):
        return False
    entry.verdicts[processed.layout()] = None
    return True


def _verdict(model: nn.Module, entry: MediaEntry, processed: Processed, outputs: Mapping[str, Any]) -> str | None:
    """None where a split of the outputs into items is proven, which the entry then knows; else the reason."""
    near = NARROW_TOLERANCE if next(model.parameters()).dtype.itemsize == 2 else TOLERANCE
    own = _own_forward(model, outputs)
    placeholders = placeholders_of(model.config)
    for kind in processed.media:
        if not len(processed.rows_of(kind, placeholders)):
            return f"no token of the sequence stands for its {kind}"
    positions, _ = positions_of(model, processed, outputs)
    given = own.arrival.arguments.get("position_ids")
    if given is not None and not _same_positions(given.cpu(), positions, len(processed.ids)):
        return "the model's own forward has other positions"
    entry.types_name = _types_name(model)
    types = None if entry.types_name is None else own.arrival.arguments.get(entry.types_name)
    if entry.types_name is not None and types is None:
        return f"its layers ask for the {entry.types_name} of its tokens, which are missing"
    seeing = frozenset(layer for layer, ahead in own.ahead.items() if bool(ahead.any()))
    told = _prompt(processed, [own.ahead[layer] for layer in seeing])
    looking = frozenset(placeholders[kind] for kind in processed.media if seeing and kind in placeholders)
    looking = frozenset() if told is not None else looking
    failure = "no way to tell its items apart fits the sequence"
    for split in splits_of(processed):
        found = items_of(processed, split, placeholders, looking, entry.types_name)
        if found is None:
            continue
        spans, items = found
        if types is not None and not _as_rows(types, spans):
            return "its layers take other tokens for those of an image"
        try:
            features = {digest: encode_item(model, entry, item) for digest, item in items.items()}
            error = _feature_error(model, entry, own.arrival, spans, features)
        except (RuntimeError, ValueError, IndexError, TypeError, ToolkitError) as problem:
            failure = f"one item alone fails: {first_line(problem, with_class=True)}"
            continue
        if not error <= near:
            failure = f"the features of one item alone differ by {error:.1e} from those beside others"
            continue
        seen = blocks(spans) if told is None else [prompt_of(model, processed, told)]
        if not all(_as_blocks(own.ahead[layer], seen) for layer in seeing):
            return "its tokens see others ahead than those of their images"
        ids = processed.ids.where(processed.ids < vocabulary_size(model), 0)
        batch = RaggedBatch.from_sequences(
            [[1, 2, 3], ids],
            device_of(model),
            share=False,
            spans=[[], seen],
            media=[[], spans],
            features=features,
            sequence_positions=None if positions is None else [None, positions],
            span_layers=seeing,
        )
        error = _logit_error(model, batch, own.logits)
        if not error <= near:
            return f"the logits of a ragged batch differ by {error:.1e} from those of the model's own forward"
        entry.splits[processed.layout()] = split
        if told is not None:
            entry.prompts[processed.layout()] = told
        entry.span_layers |= seeing
        entry.looking |= looking
        return None
    return failure


def _own_forward(model: nn.Module, outputs: Mapping[str, Any]) -> _Own:
    """The model's own forward over the sequence, with what its entry and its attention layers were handed."""
    found = find_entry(model)
    assert found is not None
    ahead: dict[int, Tensor] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments
        mask = {**named, **named.get("kwargs", {})}.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] == mask.shape[-2]:
            visible = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
            ahead[int(module.layer_idx)] = visible.triu(1).cpu()  # type: ignore[arg-type]

    arguments = {name: value for name, value in outputs.items() if name != "labels"}
    with ExitStack() as stack:
        for module in found[1].modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        arrival = stack.enter_context(arriving(model, stop=False))
        arguments = taken_by(type(model).forward, {**on_device(model, arguments), "use_cache": False})
        logits = model(**arguments).logits[0]
    return _Own(logits[-COMPARED:].float(), arrival, ahead)


def _types_name(model: nn.Module) -> str | None:
    """The keyword of the types of tokens that the text part asks for, or of its mask of tokens."""
    found = find_entry(model)
    asked = inspect.signature(type(found[1]).forward).parameters if found is not None else {}
    return next((name for end in ("token_type_ids", POSITION_MASK) for name in asked if name.endswith(end)), None)


def _as_rows(types: Tensor, spans: list[MediaSpan]) -> bool:
    """Whether of ``types`` [1, n] those of the spans' tokens alone are not 0."""
    expected = torch.zeros(types.shape[1], dtype=torch.bool)
    for span in spans:
        expected[span.first : span.first + span.length] = True
    return torch.equal(types[0].cpu() != 0, expected)


def _same_positions(given: Tensor, positions: Tensor | None, count: int) -> bool:
    """given: [B, n] or [A, 1, n], perhaps with the index as the first axis; positions: [A, n] or None.

    They may be counted from another number: the logits say whether that makes a difference.
    """
    expected = torch.arange(count)[None] if positions is None else positions
    found = given.reshape(-1, count)
    if positions is None and count:
        found = found - found[:, :1]
    if len(found) == len(expected) + 1:
        found = found[1:]
    return torch.equal(found, expected.expand_as(found)) if len(found) >= len(expected) else False


def _feature_error(
    model: nn.Module, entry: MediaEntry, arrival: Arrival, spans: list[MediaSpan], given: dict[bytes, Features]
) -> float:
    """The largest difference between features of items alone and of all together, relative to the largest of these."""
    rows = torch.cat([torch.arange(span.first, span.first + span.length) for span in spans])
    together = entry.features(arrival.arguments, rows.to(device_of(model)))
    worst = 0.0
    for own, parts in (
        (together.rows, [given[span.digest].rows[span.offset :][: span.length] for span in spans]),
        (together.levels, [_levels(given[span.digest], span) for span in spans]),
    ):
        if own is not None:
            alone = torch.cat([part for part in parts if part is not None], -2)
            worst = max(worst, _difference(alone, own))
    return worst


def _levels(features: Features, span: MediaSpan) -> Tensor | None:
    return None if features.levels is None else features.levels[:, span.offset :][:, : span.length]


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-30))


def _as_blocks(ahead: Tensor, seen: Sequence[tuple[int, int]]) -> bool:
    """Whether each token of a run sees all of it, and no other token any ahead."""
    expected = torch.zeros_like(ahead)
    for first, end in seen:
        expected[first:end, first:end] = True
    return torch.equal(ahead, expected.triu(1))


def _prompt(processed: Processed, ahead: Sequence[Tensor]) -> str | None:
    """The token argument that is 0 for one run of tokens which see each other, those of text too."""
    for name in processed.token_arguments if ahead else ():
        try:
            run = processed.prompt_by(name)
        except ToolkitError:
            continue
        if all(_as_blocks(one, [run]) for one in ahead):
            return name
    return None


def _logit_error(model: nn.Module, batch: RaggedBatch, expected: Tensor) -> float:
    rows = len(batch.tokens)
    last = torch.arange(rows - len(expected), rows, device=batch.tokens.device)
    return _difference(context_forward(model, DenseContext(batch), last), expected)


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """What a forward leaves in attributes for its next step of decoding is as before afterwards."""
    owners = [one for one in model.modules() if "rope_deltas" in one.__dict__]
    before = [one.__dict__["rope_deltas"] for one in owners]
    try:
        yield
    finally:
        for one, value in zip(owners, before):
            one.__dict__["rope_deltas"] = value
