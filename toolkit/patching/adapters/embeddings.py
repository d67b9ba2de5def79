"""Fused forward of embeddings with LoRA: rows of A looked up, then one ``lora_add``.

Shapes: V tokens in the vocabulary, K features, r rank.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import first_line
from toolkit.ops.lora_linear import lora_add
from toolkit.patching.adapters.rows import row_adapters
from toolkit.patching.probe import generator


def adapts_embedding(module: Any) -> bool:
    """Whether ``module`` is PEFT's wrapper with LoRA around an embedding."""
    return isinstance(getattr(module, "base_layer", None), nn.Embedding) and hasattr(module, "lora_embedding_A")


def fused_embedding(own: Callable[..., Any]) -> Callable[..., Any]:
    """Forward of a wrapper: ids [...] to ``base(ids) + scaling B A[:, ids]`` [..., K] for each adapter.

    Args:
        own: the wrapper's own forward, for merged and disabled adapters, and for those that are not plain LoRA.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = row_adapters(x.shape)
        if rows is not None:
            result = self.base_layer(x)
            for index, name in enumerate(rows.names):
                if name in self.lora_embedding_A:
                    result = _add(self, name, x, result, torch.where(rows.ids == index, 0, -1))
            return result
        active = [name for name in self.active_adapters if name in self.lora_embedding_A]
        plain = not any(name in self.lora_variant for name in active)
        if args or kwargs or self.merged or self.disable_adapters or not plain:
            return own(self, x, *args, **kwargs)
        result, ids = self.base_layer(x), torch.zeros_like(x, dtype=torch.int64)
        for name in active:
            result = _add(self, name, x, result, ids)
        return result

    return forward


def _add(module: Any, name: str, x: Tensor, base: Tensor, ids: Tensor) -> Tensor:
    a_rV, b_Kr = module.lora_embedding_A[name], module.lora_embedding_B[name]
    looked_up = F.embedding(x, a_rV.T)
    scale = module._get_embed_scale()
    looked_up = looked_up if scale is None else looked_up * scale.to(looked_up.dtype)
    identity = _identity(len(a_rV), a_rV.dtype, a_rV.device)
    upcast = base.to(torch.promote_types(base.dtype, a_rV.dtype))
    same = upcast.dtype == a_rV.dtype
    looked_up, b = (looked_up, b_Kr) if same else (looked_up.to(upcast.dtype), b_Kr.to(upcast.dtype))
    factors = ([identity.to(upcast.dtype)], [b], [float(module.scaling[name])])
    return lora_add(upcast, looked_up, *factors, ids).to(base.dtype)


@cache
def _identity(rank: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.eye(rank, dtype=dtype, device=device)


def proven_embedding(module: Any) -> Callable[..., Any] | str:
    """The fused forward, or the reason why PEFT's own stays: both run on the same tokens, for each adapter."""
    own, layer = type(module).forward, module.base_layer
    fused = fused_embedding(own)
    source = generator(layer.weight.device, 5)
    x = torch.randint(layer.num_embeddings, (7,), generator=source, device=layer.weight.device)
    active = module._active_adapter
    try:
        with torch.no_grad():
            for name in module.lora_embedding_A:
                module._active_adapter = [name]
                expected, got = own(module, x).float(), fused(module, x).float()
                error = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
                if error > (2e-5 if layer.weight.dtype.itemsize > 2 else 2e-2):
                    return f"its rows are not those of the fused forward: error {error:.1e}"
    except Exception as problem:
        return f"its probe failed: {first_line(problem, with_class=True)}"
    finally:
        module._active_adapter = active
    return fused
