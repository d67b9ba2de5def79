"""Attention over keys that an indexer selects pool by pool (GLM-5.3, Qwen4), in the layer's own forward.

Such a layer makes a mask of what its indexer selected and hands that mask to the attention interface. In a ragged batch
a ``SparseCall`` stands in for its cache, and reaches the interface as a keyword of the call, where it attends the
selected keys: by latents where the layer has them. Ordinary calls go the model's own way.

Shapes: T tokens, G heads of width D of the indexer, P pools of N tokens, R rotated width.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.modules.autocast import autocast_inputs
from toolkit.modules.linear import autocast_linear
from toolkit.modules.sparse_attention import CACHE, HIDDEN, MASK, RESID, SPARSE_CALL, SparseCall
from toolkit.ops.rotary import rotary
from toolkit.state.active import forward_context_of, set_forward_context
from toolkit.state.pools import Pools

TABLES = "position_embeddings"


def _in_order(x: Tensor) -> Tensor:
    """[P, D] the sums of x [P, N, D], token by token: torch's own sum may add up in another order by P."""
    total = x[:, 0]
    for at in range(1, x.shape[1]):
        total = total + x[:, at]
    return total


class PoolingIndexer(ABC):
    """How an indexer scores pools: what it keeps of a token, and what it makes of a pool."""

    @abstractmethod
    def project(self, module: Any, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, G, D], what is kept of each token [T, W], and the weights of the heads' scores [T, G].

        Args:
            module: the indexer.
            given: arguments of its forward, by name, of one row of tokens.
        """

    @abstractmethod
    def pools(self, module: Any) -> Pools:
        """How ``module`` pools what is kept."""

    @abstractmethod
    def returned(self, selected: Tensor) -> Tensor:
        """What the indexer returns to its layer, for positions [1, T, K]."""

    def make_forward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The replacement, which selects in ragged batches."""
        form, signature = self, inspect.signature(original)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self, *args, **kwargs).arguments
            call = given.get(CACHE)
            if not isinstance(call, SparseCall) or call.context is None:
                return original(self, *args, **kwargs)
            with torch.no_grad():
                q, rows, weights = form.project(self, given)
                pools = form.pools(self)
                layer: Any = self.layer_idx
                call.selected = call.context.select_pools(layer, q, rows, weights, pools)[None]
            return form.returned(call.selected)

        return forward


@dataclass(frozen=True)
class GatedPools(PoolingIndexer):
    """A pool's key is the sum of its tokens' keys, weighted by the softmax of their gates in each column (GLM-5.3)."""

    def project(self, module: Any, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, resid = given[HIDDEN][0], given[RESID][0]
        q = module.wq_b(resid).unflatten(-1, (module.n_heads, module.head_dim))
        k = module.k_norm(module.wk(hidden))
        gates = autocast_linear(hidden, module.index_kpool_compress_gate, None)
        weights = module.weights_proj(hidden.to(module.weights_proj.weight.dtype)).float() * module.n_heads**-0.5
        q, k, gates = autocast_inputs(q, k, gates)
        return q, torch.cat([k, gates], -1), weights

    def pools(self, module: Any) -> Pools:
        size, offsets = module.index_kpool, module.index_kpool_compress_ape

        def make(rows: Tensor) -> Tensor:
            keys, gates = rows.chunk(2, -1)
            logits = gates.float() + offsets.float()
            share = (logits - logits.amax(1, keepdim=True)).exp()
            share = (share / _in_order(share)[:, None]).to(keys.dtype)
            return _in_order(share * keys)

        return Pools(size, module.index_topk // size, module.softmax_scale, make)

    def returned(self, selected: Tensor) -> Tensor:
        return selected


@dataclass(frozen=True)
class MeanPools(PoolingIndexer):
    """A pool's key is the mean of its tokens' keys, normed and turned as its first token is (Qwen4)."""

    def project(self, module: Any, given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, (cos, sin) = given[HIDDEN][0], (table[0] for table in given[TABLES])
        heads, width = module.index_n_heads, module.index_head_dim
        q, k = module.index_qk_proj(hidden).split([heads * width, width], -1)
        q = _turned(module.q_layernorm(q.unflatten(-1, (heads, width))), cos, sin)
        q, k, cos, sin = autocast_inputs(q, k, cos, sin)
        return q, torch.cat([k, cos, sin], -1), q.new_ones(q.shape[:2])

    def pools(self, module: Any) -> Pools:
        size, width = module.compress_ratio, module.index_head_dim

        def make(rows: Tensor) -> Tensor:
            cos, sin = rows[:, 0, width:].chunk(2, -1)
            mean = _in_order(rows[..., :width].float()) / size
            keys = module.k_layernorm(mean.to(rows.dtype))
            return _turned(keys[:, None], cos, sin)[:, 0]

        return Pools(size, module.block_topk, width**-0.5, make)

    def returned(self, selected: Tensor) -> Tensor:
        """A mask that hides nothing: the layer puts it over another one, and the call attends what is selected."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=selected.device)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, G, D] with its first columns rotated by tables [T, R]."""
    if not len(x):
        return x
    width = cos.shape[-1]
    return torch.cat([rotary(x[..., :width].contiguous(), cos, sin, False), x[..., width:]], -1)


def pooled_forward(own: Callable[..., Any], up: str, selection: str) -> Callable[..., Any]:
    """``own``, a layer's forward, with a ``SparseCall`` as its cache in a ragged batch, which the interface is handed.

    Args:
        up: name of the layer's projection of latents to keys and values, where it has one.
        selection: name of the argument by which it takes another layer's selection, where it does.
    """
    signature = inspect.signature(own)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        extra = given.arguments.get("kwargs", {})
        context = forward_context_of(extra)
        if context is None:
            return own(*given.args, **given.kwargs)
        projection = getattr(self, up, None)
        # An adapter around the projection is part of it; its product with the queries is not taken apart.
        call = SparseCall(None, context, projection if type(projection) is nn.Linear else None)
        call.selected = given.arguments.get(selection)
        given.arguments[CACHE] = call
        # Who sees whom is the call's: the layer expects a mask, and nothing reads it.
        given.arguments[MASK] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=given.arguments[HIDDEN].device)
        given.arguments["kwargs"] = {**extra, SPARSE_CALL: call}
        with set_forward_context(context):  # the indexer is not handed the keyword
            return own(*given.args, **given.kwargs)

    return forward
