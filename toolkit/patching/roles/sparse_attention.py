"""Sparse attention layers: their indexer is recognised by its parts and proven by what it selects.

The role ``attention`` finds the layers; this is how one of them is proven. An indexer projects queries, keys and
weights from hidden states; a layer without one that is handed an earlier layer's selection attends that.
"""

import inspect
import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, eager_mask

from toolkit.modules.elementwise import row_invariant
from toolkit.modules.sparse_attention import CACHE, HIDDEN, MASK, RESID, IndexerParts, sparse_forward
from toolkit.ops.select_keys.reference import index_scores
from toolkit.patching.attention_interface import IMPLEMENTATION, NAME
from toolkit.patching.attention_probe import FAR, LENGTH, LENGTHS, _joined, _of_sequence
from toolkit.patching.calls import Call
from toolkit.patching.claim import ProbeError
from toolkit.patching.conditions import OWN, UNIT, Condition, Trial, drop_nothing, worst_error
from toolkit.patching.probe import device_of, generator, random_input
from toolkit.patching.search import prove
from toolkit.state.active import set_forward_context
from toolkit.state.batch import RaggedBatch
from toolkit.state.dense import DenseContext

_UP = "kv_b_proj"
_SELECTION = "prev_topk_indices"
_POSITIONS = "position_ids"
_PARTS = {"wq_b", "wk", "k_norm", "weights_proj"}
_SETTINGS = ("n_heads", "head_dim", "index_topk", "softmax_scale", "layer_idx")
_SELECTED = 3  # keys that a probe selects: fewer than its tokens
_MASKS = 16  # random masks that an indexer's scores are compared under
_EQUAL = 1e-5  # relative difference of scores


def indexer_of(layer: nn.Module) -> str | None:
    """The name in ``layer`` of the module that selects its keys; None where no child looks like one."""
    for name, child in layer.named_children():
        if _PARTS.issubset(part for part, _ in child.named_children()) and all(
            hasattr(child, one) for one in _SETTINGS
        ):
            return name
    return None


def is_sparse(layer: nn.Module) -> bool:
    """Whether an attention layer has an indexer, or is handed another layer's selection."""
    takes_selection = _SELECTION in inspect.signature(type(layer).forward).parameters
    return hasattr(layer, _UP) and (indexer_of(layer) is not None or takes_selection)


class _Probe:
    """Runs a probe copy of a sparse attention layer, called as the model calls it, its own way and a candidate's."""

    def __init__(self, layer: nn.Module, call: Call, condition: Condition = UNIT) -> None:
        self.copied: Any = condition.copy_of(layer)
        drop_nothing(self.copied)
        for part in self.copied.modules():
            part.__dict__[IMPLEMENTATION] = NAME
        self.dtype = condition.dtype or torch.float32
        self.call = call.within(condition.dtype)
        self.name = indexer_of(layer)
        self.indexer: Any = None if self.name is None else getattr(self.copied, self.name)
        if self.indexer is not None:
            # In 16 bits all keys: rounding selects others, and what an indexer selects is proven in float32.
            self.indexer.index_topk = LENGTH if self.dtype != torch.float32 else _SELECTED
        self.shape = call.arguments[HIDDEN].shape
        self.device = device_of(self.copied)

    def scores_error(self, parts: IndexerParts) -> float:
        """The part of selections that differ from the indexer's, under random masks added to the scores.

        The masks are as large as scores, so that a factor of the scores changes what is selected.
        """
        module, source = self.indexer, generator(self.device, 3)
        widths = {HIDDEN: self.shape[-1], RESID: module.wq_b.in_features}
        names = inspect.signature(type(module).forward).parameters
        given: dict[str, Any] = {
            name: torch.randn(*self.shape[:2], width, device=self.device, generator=source)
            for name, width in widths.items()
            if name in names
        }
        given["position_embeddings"] = self.call.arguments["position_embeddings"]
        if _POSITIONS in names:  # far ones too: queries may be scaled by position
            given[_POSITIONS] = torch.randint(FAR, self.shape[:2], device=self.device, generator=source)
        with torch.no_grad():
            q, k, weights = parts.project(module, given)
            scores = torch.stack([index_scores(*one, module.softmax_scale) for one in zip(q, k, weights)])
            differing = 0.0
            for _ in range(_MASKS):
                mask = torch.randn(scores.shape, device=self.device, generator=source) * scores.std().clamp_min(1e-6)
                own = type(module).forward(module, **given, **{MASK: mask, CACHE: None})
                best = (scores + mask).topk(_SELECTED + 1)
                # Two scores that are equal up to rounding may change places.
                clear = best.values[..., -2] - best.values[..., -1] > _EQUAL * best.values.abs().amax(-1)
                other = own.long().sort(-1).values != best.indices[..., :-1].sort(-1).values
                differing += float((other.any(-1) & clear).float().mean()) / _MASKS
        return differing

    def _call(self, implementation: str, mask: Any, hidden: Tensor, forward: Any, parts: Any, given: Any) -> Tensor:
        """The layer's output [B, S, ...]; ``forward`` and ``parts`` of a candidate, None for its own way."""
        self.copied.config._attn_implementation = implementation
        if self.indexer is not None:
            own = type(self.indexer).forward
            chosen = own if parts is None else parts.make_forward(own)
            self.indexer.__dict__["forward"] = types.MethodType(chosen, self.indexer)
        arguments = self.call.with_arguments(**{HIDDEN: hidden, MASK: mask}) | given
        # A sum over heads of positive parts is often 0 where there are few heads: of equal scores both take the lower
        # position, which torch's topk leaves open.
        with row_invariant():
            output: Tensor = types.MethodType(forward or type(self.copied).forward, self.copied)(**arguments)[0]
        return output

    def _selection(self, rows: int, length: int) -> Tensor:
        """[rows, length, _SELECTED] positions that each token sees, -1 behind the last one."""
        order = torch.rand(rows, length, length, device=self.device, generator=generator(self.device, 4))
        later = torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)
        chosen = order.masked_fill(later, -1.0).topk(min(_SELECTED, length)).indices
        position = torch.arange(length, device=self.device)[None, :, None]
        ranked = torch.where(chosen > position, length, chosen).sort(-1).values
        return ranked.masked_fill(ranked == length, -1)

    def _given(self, selection: Tensor | None, *, own: bool) -> dict[str, Tensor]:
        """The selection as a layer without an indexer is handed it: its own way has no -1."""
        if selection is None:
            return {}
        return {_SELECTION: torch.where(selection < 0, 0, selection).int() if own else selection}

    def trials(self, forward: Any, parts: IndexerParts | None) -> Iterator[Trial]:
        """Against eager attention: a ragged batch, no padding, an explicit mask, and padding on the left."""
        rows, length = self.shape[:2]
        selection = None if self.indexer is not None else self._selection(rows, length)
        causal = self._causal(length).expand(rows, -1, -1, -1)
        padded = torch.ones(rows, length, dtype=torch.bool, device=self.device)
        padded[-1, : length // 3] = False
        left = causal.masked_fill(~padded[:, None, None], torch.finfo(self.dtype).min)
        yield self._ragged(forward, parts)
        masks: list[tuple[Tensor | None, Tensor, Tensor | None]] = [(None, causal, None), (causal, causal, None)]
        if selection is None:  # positions count from the first token that is no padding, columns do not
            masks.append((padded, left, padded))
        for given, explicit, seen in masks:
            shown = torch.ones_like(padded) if seen is None else seen
            kept = shown[..., None].to(self.dtype)
            new, old = (self._given(selection, own=own) for own in (given is not None, True))

            def candidate(x: Tensor, mask: Any = given, kept: Tensor = kept, new: Any = new) -> Tensor:
                return self._call(NAME, mask, x, forward, parts, new) * kept

            def original(x: Tensor, mask: Any = explicit, kept: Tensor = kept, old: Any = old) -> Tensor:
                return self._call("eager", mask, x, None, None, old) * kept

            yield Trial(candidate, original, [[random_input(*self.shape, like=self.copied)]])

    def _causal(self, length: int) -> Tensor:
        return eager_mask(
            1, length, length, mask_function=causal_mask_function, dtype=self.dtype, device=self.device
        )  # fmt: skip

    def _ragged(self, forward: Any, parts: IndexerParts | None) -> Trial:
        """Two sequences in one ragged batch, against each one's own way."""
        skipped = (HIDDEN, MASK, CACHE, _SELECTION)
        others = {name: value for name, value in self.call.arguments.items() if name not in skipped}
        cut = [{name: _of_sequence(value, length) for name, value in others.items()} for length in LENGTHS]
        together = {name: _joined([one[name] for one in cut]) for name in others}
        selections = [None if self.indexer is not None else self._selection(1, length) for length in LENGTHS]
        whole = None if selections[0] is None else torch.cat([one for one in selections if one is not None], 1)
        context = DenseContext(
            RaggedBatch.from_sequences([[0] * length for length in LENGTHS], self.device, share=False)
        )
        absent = dict.fromkeys({MASK, CACHE} & set(self.call.arguments))

        def candidate(*sequences: Tensor) -> Tensor:
            given = absent | together | self._given(whole, own=False)
            with set_forward_context(context):
                return self._call(NAME, None, torch.cat(sequences, 1), forward, parts, given)

        def original(*sequences: Tensor) -> Tensor:
            outputs = []
            for x, own, selection in zip(sequences, cut, selections, strict=True):
                given = {name: value for name, value in absent.items() if name != MASK} | own
                given |= self._given(selection, own=True)
                outputs.append(self._call("eager", self._causal(x.shape[1]), x, None, None, given))
            return torch.cat(outputs, 1)

        inputs = [random_input(1, length, self.shape[-1], like=self.copied) for length in LENGTHS]
        return Trial(candidate, original, [inputs])


def prove_sparse(layer: nn.Module, call: Call) -> tuple[str, dict[str, Any], ProbeError] | str:
    """What takes the place of the layer's forward ("") and of its indexer's, by name, or why nothing does."""
    if call.arguments[HIDDEN].shape[1] != LENGTH:
        return f"a probe calls it with {LENGTH} tokens, and it got others"
    probe, own_probe = _Probe(layer, call), _Probe(layer, call, OWN)
    forward = sparse_forward(type(layer).forward, _UP)

    def error(parts: IndexerParts | None) -> ProbeError:
        def build(source: nn.Module, condition: Condition) -> tuple[nn.Module, Iterator[Trial]]:
            made = probe if condition is UNIT else _Probe(source, call, condition)
            return made.copied, made.trials(forward, parts)

        return worst_error(layer, build)

    if probe.name is None:
        return prove([("sparse attention (another layer's selection)", {"": forward}, partial(error, None))])
    own = type(getattr(layer, probe.name)).forward
    differing = {}
    forms = [IndexerParts(interleaved, last) for last in (False, True) for interleaved in (False, True)]
    for parts in (*forms, IndexerParts(False, False, rotates=False)):
        differing[parts] = max(one.scores_error(parts) for one in (probe, own_probe))
        if differing[parts] == 0.0:
            turn = "interleaved" if parts.interleaved else "half"
            columns = f"{turn} rotary of the {'last' if parts.rotated_last else 'first'} columns"
            op = f"sparse attention ({columns if parts.rotates else 'without rotary'})"
            forwards = {"": forward, probe.name: parts.make_forward(own)}
            return prove([(op, forwards, partial(error, parts))])
    return f"its indexer selects other keys than any known form: {100 * min(differing.values()):.0f} % differ"
