"""Multi-head latent attention over a ragged batch, by its latents alone (DeepSeek-V2, 2024).

A key is W_uk c and a value W_uv c of one latent c per token, so a head's score is <W_uk^T q, c> and its output W_uv
(sum of weighted c): attention with one key head, whose keys are the latents (and the rotated part that all heads share)
and whose values are the latents again. Training and decoding both compute it so and are bitwise identical.

Shapes: T tokens, H heads, R latent width, N width of a key's part without position, P of its rotated part, V of a
value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.autocast import autocast_inputs
from toolkit.modules.linear import autocast_linear
from toolkit.ops.hooks import watched
from toolkit.ops.rotary import rotary
from toolkit.state.active import forward_context_of


def absorbed_queries(content: Tensor, up: Tensor) -> Tensor:
    """[T, H, R] queries for latents: content [T, H, N] by each head's key projection in ``up`` [H (N + V), R]."""
    to_latent = up.unflatten(0, (content.shape[1], -1))[:, : content.shape[2]].mT
    return torch.stack([autocast_linear(content[:, h], to_latent[h], None) for h in range(len(to_latent))], 1)


def expanded_values(out: Tensor, up: Tensor, content: int) -> Tensor:
    """[T, H, V] values of weighted latents [T, H, R] by each head's value projection, behind ``content`` rows."""
    to_value = up.unflatten(0, (out.shape[1], -1))[:, content:]
    return torch.stack([autocast_linear(out[:, h], to_value[h], None) for h in range(len(to_value))], 1)


@dataclass(frozen=True)
class LatentAttention:
    """Where a layer keeps its parts, by attribute name, and its widths.

    Args:
        q: projections and norms that make the queries, in order.
        down: projection to the latent and the shared rotated part of keys.
        norm: of the latent.
        up: projection of the latent to keys and values.
        out: output projection.
        rank: R.
        content: N.
        rotated: P.
        interleaved: whether the rotation pairs neighbouring columns.
    """

    q: tuple[str, ...]
    down: str
    norm: str
    up: str
    out: str
    rank: int
    content: int
    rotated: int
    interleaved: bool

    def make_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement: ragged batches by their latents, all else as ``original`` does it."""
        parts = self

        def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            context = forward_context_of(kwargs)
            up = getattr(self, parts.up)
            # An adapter around the projection is part of it, and so is a hook: what they add is not taken apart.
            if context is None or type(up) is not nn.Linear or watched(up):
                return original(self, hidden_states, *args, **kwargs)
            tables: Any = kwargs.get("position_embeddings", args[0] if args else None)
            cos, sin = (table[0] for table in tables)
            x = hidden_states
            for name in parts.q:
                x = getattr(self, name)(x)
            q = x[0].unflatten(-1, (-1, parts.content + parts.rotated))
            latent, shared = getattr(self, parts.down)(hidden_states)[0].split([parts.rank, parts.rotated], -1)
            latent = getattr(self, parts.norm)(latent)
            content, rotated_q = q.split([parts.content, parts.rotated], -1)
            rotated_q = rotary(rotated_q, cos, sin, parts.interleaved)
            shared = rotary(shared[:, None], cos, sin, parts.interleaved)
            asked = absorbed_queries(content, up.weight)
            queries, latents = autocast_inputs(
                torch.cat([asked, rotated_q], -1), torch.cat([latent[:, None], shared], -1)
            )
            scale = float(self.scaling)  # type: ignore[arg-type]
            out = context.attend_latent(self.layer_idx, queries, latents, parts.rank, scale=scale)  # type: ignore[arg-type]
            values = expanded_values(out, up.weight, parts.content)
            return getattr(self, parts.out)(values.flatten(1)[None]), None

        return forward


def parts_of(module: nn.Module, interleaved: bool) -> LatentAttention | None:
    """The layer's parts, if its children are those of latent attention."""
    children = dict(module.named_children())
    down, norm, up = (children.get(name) for name in ("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"))
    out = next((name for name in ("o_proj", "out_proj") if name in children), None)
    if not (isinstance(down, nn.Linear) and type(up) is nn.Linear and norm is not None and out is not None):
        return None
    if up.bias is not None:
        return None
    q = ("q_proj",) if "q_proj" in children else ("q_a_proj", "q_a_layernorm", "q_b_proj")
    last = children.get(q[-1])
    if not isinstance(last, nn.Linear):
        return None
    rank = up.in_features
    rotated = down.out_features - rank
    heads = getattr(module, "num_heads", None) or getattr(module.config, "num_attention_heads", 0)
    if rotated <= 0 or not heads or last.out_features % heads:
        return None
    content = last.out_features // heads - rotated
    return LatentAttention(
        q, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", out, rank, content, rotated, interleaved
    )
