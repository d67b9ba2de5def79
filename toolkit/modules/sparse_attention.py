"""Latent attention over the keys that an indexer selects (DeepSeek-V3.2, 2025), in the layer's own forward.

Such a layer hands its mask to the indexer, what the indexer selected to the attention interface, and its latents to the
cache before it expands them. Its own code projects, rotates and gates. A ``SparseCall`` stands in for the mask and
knows what the call is over; in a ragged batch it stands in for the cache too and takes the latents, which are attended
as they are (one of them is expanded for nothing). So one replacement serves layers that differ in queries, gates and
sinks, and layers that take the selection of an earlier layer.

Shapes: B batch, S queries, S' keys, T tokens, H query heads, R latent width, P rotated width, K selected keys; the
indexer has G heads of width D.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.attention import attend, padded_context, unpadded_context
from toolkit.modules.autocast import autocast_inputs
from toolkit.modules.index_observer import observe_indexer, observed
from toolkit.modules.latent_attention import absorbed_queries, expanded_values
from toolkit.ops.rotary import rotary
from toolkit.state.active import forward_context_of, set_forward_context
from toolkit.state.context import AttentionSettings, ForwardContext
from toolkit.state.dense import DenseContext

MASK, CACHE, HIDDEN, RESID = "attention_mask", "past_key_values", "hidden_states", "q_resid"
SHARED = "shared_kv_states"
SPARSE_CALL = "sparse_call"
"""The keyword by which a call reaches the attention interface where the layer makes a mask of the selection itself."""


@dataclass(frozen=True)
class Indexed:
    """What an indexer computed in a call that is observed: queries [T, G, D], keys [T, D], weights [T, G], scale."""

    q: Tensor
    k: Tensor
    weights: Tensor
    scale: float


def _unmasked(mask: Tensor | None) -> Tensor | None:
    """An explicit mask that is causal attention with padding as the padding mask [B, S'], or None where there is none.

    Models with an indexer always make their masks explicit. Looked at once per forward: layers share the mask object.
    """
    if mask is None or mask.dim() != 4 or mask.dtype != torch.bool or mask.shape[1] != 1 or not mask.shape[2]:
        return mask
    if torch.compiler.is_compiling():
        return mask
    kept: tuple[Tensor | None] | None = getattr(mask, "toolkit_unmasked", None)
    if kept is None:
        queries, keys = mask.shape[2:]
        padding = mask[:, 0, -1].contiguous()
        causal = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
        kept = (mask,)
        if torch.equal(mask[:, 0], padding[:, None] & causal):
            try:
                padded_context(padding, queries)
                kept = (None if bool(padding.all()) else padding,)
            except ToolkitError:  # holes
                pass
        mask.toolkit_unmasked = kept  # type: ignore[attr-defined]
    return kept[0]


class SparseCall:
    """One call of a sparse attention layer: stands in for its mask, and in a ragged batch for its cache.

    Args:
        mask: None, a padding mask [B, S'], or an explicit mask [B, 1, S, S'].
        context: of a ragged batch (B = 1); None for an ordinary call.
        up: the layer's projection of latents to keys and values; None where it cannot be taken apart.
    """

    def __init__(self, mask: Tensor | None, context: ForwardContext | None, up: nn.Linear | None) -> None:
        self.mask = None if context is not None else _unmasked(mask)
        self.context, self.up = context, up
        self.latents: Tensor | None = None  # [T, 1, R + P]
        self.taken: tuple[Tensor, Tensor] | None = None  # what they were made of
        self.indexed: Indexed | None = None
        self.selected: Tensor | None = None  # [B, S, K], where the layer does not hand it on

    def __getitem__(self, index: Any) -> "SparseCall":
        """The layer takes the mask's only head, for the indexer."""
        return self

    @property
    def explicit(self) -> Tensor | None:
        """The mask, where attention over it is dense."""
        return self.mask if self.mask is not None and self.mask.dim() == 4 else None

    def update(self, content: Tensor, rotated: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The cache of a ragged batch: takes latents [1, 1, T, R] and [1, 1, T, P], and hands on the first token's."""
        if self.up is None or content.shape[1] != 1 or content.shape[-1] != self.up.in_features:
            return content, rotated
        self.latents = torch.cat([content, rotated], -1)[0].transpose(0, 1)
        self.taken = content, rotated
        return content[:, :, :1], rotated[:, :, :1]

    def dense(self, rows: int, queries: int, keys: int, device: torch.device) -> ForwardContext:
        """The context of the call: the ragged batch's, or that of an ordinary call over ``rows`` sequences."""
        if self.context is not None:
            return self.context
        return (
            unpadded_context(rows, queries, keys, device) if self.mask is None else padded_context(self.mask, queries)
        )

    def visible(self, queries: int, keys: int, selected: Tensor) -> Tensor:
        """[B, 1, S, S'] the keys that are selected and visible, as an explicit mask."""
        if self.mask is None or self.explicit is not None:
            start = torch.zeros(len(selected), 1, 1, dtype=torch.int64, device=selected.device)
        else:  # positions count from the first token that is no padding
            start = self.mask.int().argmax(1)[:, None, None]
        columns = torch.where(selected < 0, keys, selected.long() + start)
        chosen = torch.zeros(*selected.shape[:2], keys + 1, dtype=torch.bool, device=selected.device)
        chosen = chosen.scatter(-1, columns, True)[..., :keys].unsqueeze(1)
        if self.explicit is None:  # a selection is of visible keys alone
            return chosen
        explicit = self.explicit[..., :keys]
        if explicit.dtype == torch.bool:
            return explicit & chosen
        return explicit.masked_fill(~chosen, torch.finfo(explicit.dtype).min)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, selected: Tensor, settings: AttentionSettings, dropout: float
    ) -> Tensor:
        """Attention [B, S, H, V] of q [B, H, S, .] over the selected ones [B, S, K] of k [B, ., S', .] and v."""
        rows, queries, keys = len(q), q.shape[2], k.shape[2]
        if self.latents is not None and self.context is not None and self.up is not None:
            return self._attend_latents(layer, q[0].transpose(0, 1), selected[0], settings)[None]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.context is None and (dropout > 0.0 or self.explicit is not None):
            return attend(layer, q, k, v, self.visible(queries, keys, selected), None, settings, dropout)
        context = self.dense(rows, queries, keys, q.device)
        q, k, v = autocast_inputs(q, k, v)
        q, k, v, chosen = (part.flatten(0, 1) for part in (q, k, v, selected.long()))
        self._observe(layer, context, q, k, chosen, settings)
        out: Tensor = context.attend_selected(layer, q, k, v, chosen, settings).unflatten(0, (rows, queries))
        return out

    def _attend_latents(self, layer: int, q: Tensor, selected: Tensor, settings: AttentionSettings) -> Tensor:
        """[T, H, V] of queries [T, H, N + P], by the latents alone."""
        assert self.latents is not None
        assert self.context is not None
        assert self.up is not None
        rank = self.up.in_features
        content = q.shape[-1] - (self.latents.shape[-1] - rank)
        asked = absorbed_queries(q[..., :content], self.up.weight)
        q, latents = autocast_inputs(torch.cat([asked, q[..., content:]], -1), self.latents)
        self._observe(layer, self.context, q, latents, selected, settings)
        out = self.context.attend_selected_latent(layer, q, latents, rank, selected, settings)
        return expanded_values(out, self.up.weight, content)

    def _observe(
        self, layer: int, context: ForwardContext, q: Tensor, k: Tensor, selected: Tensor, settings: AttentionSettings
    ) -> None:
        if self.indexed is not None and isinstance(context, DenseContext):
            one, rows = self.indexed, context.rows_of(selected)
            multiplicity = context.batch.multiplicity
            observe_indexer(layer, one.q, one.k, one.weights, one.scale, rows, q, k, settings.scale, multiplicity)


class SharedLatents(MutableMapping[str, Any]):
    """What layers of a ragged batch hand later ones: the latents as a whole, although a layer holds the first token's.

    A layer that takes them attends them as its own, and keeps them among its own state.

    Args:
        shared: the mapping that the model hands its layers.
        call: that of the layer that is called.
    """

    def __init__(self, shared: MutableMapping[str, Any], call: SparseCall) -> None:
        self.shared, self.call = shared, call

    def __getitem__(self, name: str) -> Any:
        return self.call.update(*self.shared[name])

    def __setitem__(self, name: str, latents: Any) -> None:
        self.shared[name] = latents if self.call.taken is None else self.call.taken

    def __delitem__(self, name: str) -> None:
        del self.shared[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shared)

    def __len__(self) -> int:
        return len(self.shared)


def has_input_norm(indexer: nn.Module) -> bool:
    """Whether an indexer makes its queries of hidden states, which it has a norm for."""
    return hasattr(indexer, "q_input_norm")


@dataclass(frozen=True)
class IndexerParts:
    """How an indexer makes its queries and keys.

    Args:
        interleaved: whether the rotation pairs neighbouring columns.
        rotated_last: whether the rotated columns are the last ones.
        rotates: whether there is a rotation.
    """

    interleaved: bool
    rotated_last: bool
    rotates: bool = True

    def project(self, module: Any, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, G, D], keys [B, S', D] and weights [B, S, G] of an indexer of transformers' structure.

        Queries are made of the layer's compressed ones, or of hidden states where the indexer has a norm for those;
        some are scaled by their positions.

        Args:
            given: arguments of the indexer's forward, by name.
        """
        hidden, tables = given[HIDDEN], given["position_embeddings"]
        source = module.q_input_norm(hidden) if has_input_norm(module) else given[RESID]
        q = module.wq_b(source).unflatten(-1, (module.n_heads, module.head_dim))
        if hasattr(module, "softmax_scaling"):
            q = module.softmax_scaling(q, given["position_ids"], head_dim_first=False)
        k = module.k_norm(module.wk(hidden).to(module.k_norm.weight.dtype)).to(hidden.dtype)
        weights = module.weights_proj(hidden.to(module.weights_proj.weight.dtype)).float() * module.n_heads**-0.5
        q, k = autocast_inputs(self._rotated(q, tables), self._rotated(k[:, :, None], tables)[:, :, 0])
        return q, k, weights

    def _rotated(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        if not self.rotates:
            return x
        rows, length = x.shape[:2]
        cos, sin = (table.expand(rows, -1, -1).flatten(0, 1) for table in tables)
        width = cos.shape[-1]
        split = [x.shape[-1] - width, width] if self.rotated_last else [width, x.shape[-1] - width]
        parts = list(x.flatten(0, 1).split(split, -1))
        at = 1 if self.rotated_last else 0
        parts[at] = rotary(parts[at], cos, sin, self.interleaved)
        rotated: Tensor = torch.cat(parts, -1).unflatten(0, (rows, length))
        return rotated

    def make_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement: positions [B, S, K] of the selected keys, -1 behind the last; explicit masks as before."""
        parts, signature = self, inspect.signature(original)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs)
            call = given.arguments[MASK]
            if isinstance(call, SparseCall) and call.explicit is None:
                return parts._select(self, call, given.arguments)
            if isinstance(call, SparseCall):
                assert call.explicit is not None
                given.arguments[MASK] = call.explicit[:, 0]
            return original(*given.args, **given.kwargs)

        return forward

    def _select(self, module: Any, call: SparseCall, given: dict[str, Any]) -> Tensor:
        hidden, tables = given[HIDDEN], given["position_embeddings"]
        observe = call.context is None or isinstance(call.context, DenseContext)
        observe = observe and observed(tables[0] if call.context is None else call.context)
        with torch.set_grad_enabled(observe):
            # An indexer learns from its own loss alone, whose gradient ends here.
            ended = {name: given[name].detach() for name in (HIDDEN, RESID) if name in given}
            q, k, weights = self.project(module, {**given, **ended})
        cache = given.get(CACHE)
        with torch.no_grad():
            keys = k if cache is None or call.context is not None else cache.update_indexer(k, module.layer_idx)
            rows, queries = hidden.shape[:2]
            context = call.dense(rows, queries, keys.shape[1], hidden.device)
            flat_q, flat_k, flat_w = (part.flatten(0, 1) for part in (q, keys, weights))
            topk, scale = module.index_topk, module.softmax_scale
            selected = context.select(module.layer_idx, flat_q, flat_k, flat_w, topk, scale=scale)
        if observe and keys.shape == k.shape:
            call.indexed = Indexed(q.flatten(0, 1), k.flatten(0, 1), weights.flatten(0, 1), module.softmax_scale)
        found: Tensor = selected.unflatten(0, (rows, queries))
        return found


def sparse_forward(own: Callable[..., Any], up: str) -> Callable[..., Any]:
    """``own``, the layer's forward, with a ``SparseCall`` as its mask, and as its cache in a ragged batch.

    Args:
        up: name of the projection of latents to keys and values.
    """
    signature = inspect.signature(own)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        extra = given.arguments.get("kwargs", {})
        context = forward_context_of(extra)
        projection = getattr(self, up)
        # An adapter around the projection is part of it; its product with the queries is not taken apart.
        plain = projection if type(projection) is nn.Linear else None
        call = SparseCall(given.arguments.get(MASK), context, plain)
        given.arguments[MASK] = call
        if context is None:
            return own(*given.args, **given.kwargs)
        given.arguments[CACHE] = call
        if isinstance(given.arguments.get(SHARED), MutableMapping):
            given.arguments[SHARED] = SharedLatents(given.arguments[SHARED], call)
        with set_forward_context(context):  # the indexer is not handed the keyword
            return own(*given.args, **given.kwargs)

    return forward
