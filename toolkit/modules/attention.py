"""Attention over a ragged batch, or over an ordinary padded one through the same kernel.

Shapes: B batch, S query tokens, S' key tokens, H query heads, G key heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.modules.autocast import autocast_inputs
from toolkit.modules.joined_linear import linear_outputs, with_one_input
from toolkit.ops.rotary import rotary
from toolkit.state.active import forward_context_of
from toolkit.state.batch import RaggedBatch
from toolkit.state.context import AttentionSettings, ForwardContext
from toolkit.state.dense import DenseContext
from toolkit.state.seen_runs import SeenRuns, all_seen, context_of_mask

KV_DTYPE = "_toolkit_kv_dtype"
"""The attribute of a patched attention module that says what its keys and values are kept as."""


@lru_cache(maxsize=64)
def unpadded_context(batch: int, queries: int, keys: int, device: torch.device) -> DenseContext:
    """The context of an ordinary call without padding: the last ``queries`` of each row's ``keys`` tokens ask."""
    with torch.inference_mode(False):  # contexts are kept, and a later backward saves their tensors
        return DenseContext(RaggedBatch.unpadded(batch, queries, keys, device))


@lru_cache(maxsize=64)
def _unmasked(batch: int, queries: int, keys: int, window: int, device: torch.device) -> SeenRuns:
    return all_seen(batch, queries, keys, window, device)


def keep_runs(mask: Tensor) -> None:
    """Let ``attend`` take the op for an explicit boolean mask [B, 1, S, S] whose queries see one run of keys each.

    The mask is read here, once per forward. One that somebody writes to afterwards is a mask like any other again.
    """
    _keep_runs(mask, mask)


def read_runs(mask: Tensor) -> None:
    """``keep_runs`` of an explicit mask that a model made: boolean, or 0 and the least number, added to the scores.

    It is read once as long as nobody writes to it. Of an added mask with gradients, with other numbers, or with rows
    that see nothing (for which torch averages all values) no runs are kept.
    """
    if torch.compiler.is_compiling() or mask.is_inference():
        return
    kept: tuple[int, SeenRuns | None] | None = getattr(mask, "toolkit_runs", None)
    if kept is None or kept[0] != mask._version:
        _keep_runs(mask, mask if mask.dtype == torch.bool else _added_zeros(mask))


def _added_zeros(mask: Tensor) -> Tensor | None:
    """Where a mask that is added to the scores adds 0; None if it is no more than a boolean one says."""
    if mask.requires_grad or not mask.is_floating_point():
        return None
    seen = mask == 0
    known = (seen | (mask <= torch.finfo(mask.dtype).min)).all() & seen.any(-1).all()
    return seen if bool(known) else None


def _keep_runs(mask: Tensor, seen: Tensor | None) -> None:
    try:
        found = None if seen is None else context_of_mask(seen)
    except ToolkitError:  # holes: torch's dense attention
        found = None
    mask.toolkit_runs = (mask._version, found)  # type: ignore[attr-defined]


def _kept_runs(mask: Tensor, *shape: int) -> SeenRuns | None:
    kept: tuple[int, SeenRuns | None] | None = getattr(mask, "toolkit_runs", None)
    known = kept is not None and kept[0] == mask._version and mask.shape == (shape[0], 1, *shape[1:])
    return kept[1] if kept is not None and known else None


def padded_context(mask: Tensor, queries: int) -> DenseContext:
    """The context of a padding mask [B, S'], made once per forward: every layer is handed the same mask object."""
    kept: tuple[int, DenseContext] | None = getattr(mask, "toolkit_padded", None)
    if kept is None or kept[0] != queries:
        kept = (queries, DenseContext(RaggedBatch.for_padded(mask, queries)))
        mask.toolkit_padded = kept  # type: ignore[attr-defined]
    return kept[1]


def attend(
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    context: ForwardContext | None,
    settings: AttentionSettings,
    dropout: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """Attention [B, S, H, Dv].

    Rows of padding come out as zeros. An explicit mask takes torch's dense attention, which is not batch-invariant,
    unless ``keep_runs`` was told of it. Inside autocast q, k and v are taken in its dtype, as torch's attention does.

    Args:
        layer: index of the layer.
        q: [B, S, H, D]; without a context, the last S of the S' keys of their row.
        k: [B, S', G, D].
        v: [B, S', G, Dv].
        mask: None, a padding mask [B, S'] (True: a token; left or right padding), or any explicit mask that broadcasts
            to [B, H, S, S'], which has the layer's window in it.
        context: of a ragged batch (B = 1), which says which query sees which key; None for an ordinary call.
        settings: scale, window and the rest.
        dropout: probability, in training; a context's forward has none.
        causal: False: without a mask, every query sees every key of its row, or those on both sides of a window.
    """
    batch_size, queries = q.shape[:2]
    q, k, v = autocast_inputs(q, k, v)
    if context is not None:
        function = context.attend if causal else context.attend_bidirectional
        return function(layer, q[0], k[0], v[0], settings)[None]
    if settings.kv_dtype:
        k, v = settings.kept(k, v) if causal else (k, v)
        settings = settings._replace(kv_dtype="")  # a context would round again
    keys, runs = k.shape[1], None
    if mask is None and not causal:
        if dropout == 0.0 and not torch.compiler.is_compiling():
            runs = _unmasked(batch_size, queries, keys, settings.window, q.device)
        mask = both_sides(q, k, settings.window)
    elif mask is not None and mask.dim() == 4 and dropout == 0.0:
        runs = _kept_runs(mask, batch_size, queries, keys)
    padded: DenseContext
    if runs is not None:
        padded = runs
    elif dropout > 0.0 or (mask is not None and mask.dim() == 4):
        return _dense(q, k, v, mask, settings, dropout)
    elif mask is not None:
        padded = padded_context(mask, queries)
    elif torch.compiler.is_compiling():
        padded = DenseContext(RaggedBatch.unpadded(batch_size, queries, keys, q.device))
    else:
        padded = unpadded_context(batch_size, queries, keys, q.device)
    q, k, v = (part.flatten(0, 1) for part in (q, k, v))
    out: Tensor = padded.attend(layer, q, k, v, settings).unflatten(0, (batch_size, queries))
    return out


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: AttentionSettings, dropout: float) -> Tensor:
    """Explicit masks and attention dropout, by torch's own attention."""
    keys = k.shape[1]
    mask = explicit_mask(q, k, mask, settings.window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if settings.softcap > 0.0 or settings.sinks is not None:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.mT * settings.scale
        if settings.softcap > 0.0:
            scores = settings.softcap * torch.tanh(scores / settings.softcap)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if settings.sinks is not None:
            sinks = settings.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], -1)
        out = F.dropout(scores.softmax(-1)[..., :keys], dropout) @ v
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=settings.scale, enable_gqa=True
        )
    if mask.dtype == torch.bool:  # a row that sees nothing is zero, not NaN
        out = out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)


def both_sides(q: Tensor, k: Tensor, window: int) -> Tensor:
    """The mask by which every query [B, S, ...] sees all keys [B, S', ...], or those closer than ``window``."""
    queries, keys = q.shape[1], k.shape[1]
    mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    return mask.tril(keys - queries + window - 1).triu(keys - queries - window + 1) if window else mask


def explicit_mask(q: Tensor, k: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """The mask of ``attend`` in a form that broadcasts to [B, H, S, S'], for q [B, S, ...] and k [B, S', ...]."""
    queries, keys = q.shape[1], k.shape[1]
    if mask is None or mask.dim() == 2:
        age = torch.arange(keys - queries, keys, device=q.device)[:, None] - torch.arange(keys, device=q.device)
        visible = (age >= 0) & (age < window if window > 0 else True)
        mask = visible[None, None] if mask is None else visible & mask[:, None, None, :]
    return mask[..., :keys]


@dataclass(frozen=True)
class FusedAttention:
    """Where an attention layer keeps its parts, by attribute name: projections, optional per-head norms and sinks.

    The rotation is applied by one op per operand on tokens-major views, instead of the transposed, concatenated and
    negated copies of the eager path.
    """

    q: str
    k: str
    v: str
    out: str
    q_norm: str | None
    k_norm: str | None
    sinks: str | None
    interleaved: bool
    head_dim: int
    window: int
    softcap: float

    def make_forward(
        self, original: Callable[..., Any], weights_wanted: Callable[[], bool] = lambda: False
    ) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The replacement: hidden_states [B, S, N] to (output [B, S, N], no weights).

        Args:
            original: the layer's own forward, which runs where attention weights are wanted.
            weights_wanted: whether the call under way returns them.
        """
        parts, projections = self, (self.q, self.k, self.v)

        def forward(
            self: nn.Module,
            hidden_states: Tensor,
            position_embeddings: tuple[Tensor, Tensor] | None = None,
            attention_mask: Tensor | None = None,
            past_key_values: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor | None]:
            if weights_wanted():
                own: tuple[Tensor, Tensor | None] = original(
                    self,
                    hidden_states,
                    position_embeddings=position_embeddings,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    **kwargs,
                )
                return own
            batch_size, length = hidden_states.shape[:2]
            split = (batch_size, length, -1, parts.head_dim)
            q, k, v = (one.view(split) for one in linear_outputs(self, projections, hidden_states))
            if parts.q_norm is not None:
                q = getattr(self, parts.q_norm)(q)
            if parts.k_norm is not None:
                k = getattr(self, parts.k_norm)(k)
            if position_embeddings is not None:  # some models leave positions out of some layers
                cos, sin = (table.expand(batch_size, -1, -1).flatten(0, 1) for table in position_embeddings)
                q = rotary(q.flatten(0, 1), cos, sin, parts.interleaved).view(split)
                k = rotary(k.flatten(0, 1), cos, sin, parts.interleaved).view(split)
            if past_key_values is not None:
                k, v = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            dropout = float(getattr(self, "attention_dropout", 0.0)) if self.training else 0.0
            sinks = None if parts.sinks is None else getattr(self, parts.sinks)
            settings = AttentionSettings(float(self.scaling), parts.window, parts.softcap, sinks)  # type: ignore[arg-type]
            if kept_as := getattr(self, KV_DTYPE, ""):
                settings = settings._replace(kv_dtype=kept_as)
            context = forward_context_of(kwargs)
            out = attend(self.layer_idx, q, k, v, attention_mask, context, settings, dropout)  # type: ignore[arg-type]
            return getattr(self, parts.out)(out.reshape(batch_size, length, -1)), None

        return with_one_input(forward, projections)
