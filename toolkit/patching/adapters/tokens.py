"""Fused forward of embeddings and heads of which some rows are trained (``trainable_token_indices``).

PEFT copies the whole weight and writes the rows into the copy at every call, decode steps included. Here the layer runs
on its own weight, and what the rows change is put in its place.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import first_line
from toolkit.modules.linear import autocast_linear
from toolkit.patching.probe import generator


def trains_tokens(module: Any) -> bool:
    """Whether ``module`` is PEFT's wrapper of some rows of a weight."""
    return all(hasattr(module, name) for name in ("token_indices", "trainable_tokens_delta", "merged_adapters"))


def fused_tokens(own: Callable[..., Any], bitwise: bool) -> Callable[..., Any]:
    """Forward of a wrapper: ids [...] to rows [..., K] of an embedding, or x [..., K] to logits [..., V] of a head.

    Args:
        own: the wrapper's own forward, for merged and disabled adapters, and for layers of other classes.
        bitwise: whether a head's GEMM must be batch-invariant.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = [] if self.merged or self.disable_adapters or args or kwargs else list(self.active_adapters)
        layer = self.base_layer
        rows = [self.trainable_tokens_delta[name] for name in names if name in self.token_indices]
        fits = len(rows) == len(names) > 0 and not any(hasattr(row, "ds_id") for row in rows)
        if not fits or not (_is_embedding(layer) or (type(layer) is nn.Linear and layer.bias is None)):
            return own(self, x, *args, **kwargs)
        if len(names) > 1:
            self._check_overlapping_tokens(names)
        result = layer(x)
        for name, row in zip(names, rows):
            index = torch.tensor(self.token_indices[name], device=x.device)
            row = row.to(layer.weight.dtype)
            if isinstance(layer, nn.Embedding):
                result = _rows(x, result, index, row, self._get_embed_scale())
            else:
                columns = autocast_linear(x, row, None) if bitwise else F.linear(x, row)
                result = result.index_copy(-1, index, columns.to(result.dtype))
        return result

    return forward


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding) and layer.max_norm is None and not layer.sparse


def _rows(ids: Tensor, result: Tensor, index: Tensor, row: Tensor, scale: Tensor | None) -> Tensor:
    """``result`` [..., K] with ``row`` [N, K] where ids [...] are in ``index`` [N]."""
    same = ids[..., None] == index
    trained = F.embedding(same.int().argmax(-1), row)
    trained = trained if scale is None else trained * scale.to(trained.dtype)
    return torch.where(same.any(-1)[..., None], trained, result)


def proven_tokens(module: Any, bitwise: bool) -> Callable[..., Any] | str:
    """The fused forward, or the reason why PEFT's own stays: both run on tokens that are trained, and on others."""
    own, layer = type(module).forward, module.base_layer
    fused = fused_tokens(own, bitwise)
    device, source = layer.weight.device, generator(layer.weight.device, 5)
    try:
        if isinstance(layer, nn.Embedding):
            trained = [at for name in module.active_adapters for at in module.token_indices.get(name, ())]
            some = torch.randint(layer.num_embeddings, (6,), generator=source, device=device)
            x: Tensor = torch.cat([some, torch.tensor(trained[:6], dtype=some.dtype, device=device)])
        else:
            x = torch.randn(5, layer.in_features, generator=source, device=device).to(layer.weight.dtype)
        with torch.no_grad():
            expected, got = own(module, x).float(), fused(module, x).float()
    except Exception as problem:
        return f"its probe failed: {first_line(problem, with_class=True)}"
    tolerance = 2e-5 if layer.weight.dtype.itemsize > 2 else 2e-2
    error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
    return fused if error <= tolerance else f"its rows are not those of the fused forward: error {error:.1e}"
