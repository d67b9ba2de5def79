"""How many tokens transformers' cache keeps for a layer, and whether it keeps a prompt besides: asked of the cache."""

from typing import Any

import torch
from transformers import DynamicCache

_PROMPT, _STEPS = 5, 3  # tokens of a prompt, and steps beyond the window


def _cache(config: Any, layer: Any) -> Any:
    """An empty cache of a layer that does not keep all tokens; None of one that does, and of one without a cache."""
    layers: list[Any] = DynamicCache(config=config).layers
    known = isinstance(layer, int) and layer < len(layers) and getattr(layers[layer], "is_sliding", False)
    return layers[layer] if known else None


def cache_window(config: Any, layer: Any) -> int:
    """Tokens that the cache of ``config`` keeps for a layer; 0 for all.

    Args:
        config: of the model's text part.
        layer: the layer's index; anything else for a layer without a cache.
    """
    cache = _cache(config, layer)
    return 0 if cache is None else int(cache.sliding_window)


def keeps_prompt(config: Any, layer: Any) -> bool:
    """Whether a token behind a prompt is handed the whole prompt, and the last tokens of the window from then on.

    Args:
        config: of the model's text part.
        layer: the index of a layer with a window.
    """
    cache, window = _cache(config, layer), cache_window(config, layer)

    def handed(first: int, count: int) -> list[int]:
        tokens = torch.arange(first, first + count, dtype=torch.float32).view(1, 1, count, 1)
        keys, _ = cache.update(tokens, tokens)
        return [int(one) for one in keys[0, 0, :, 0]]

    try:
        handed(0, _PROMPT)
        for written in range(window + _STEPS):
            last = _PROMPT + written
            wanted = [*range(_PROMPT), *range(max(_PROMPT, last - window + 1), last + 1)]
            if handed(last, 1) != wanted:
                return False
    except Exception:  # a cache that takes other arguments
        return False
    return True
