"""Small random models whose rotary tables depend on the length of the sequence; the oracle is stock transformers."""

import copy
from typing import Any

import torch
from torch import Tensor

from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager

BORDER = 32
"""Last length with the original tables."""


def longrope(pairs: int, border: int = BORDER, **more: Any) -> dict[str, Any]:
    """LongRoPE of ``pairs`` frequencies, whose tables change after ``border`` tokens."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "short_factor": [1.0 + 0.02 * at for at in range(pairs)],
        "long_factor": [1.0 + 2.5 * at for at in range(pairs)],
        "original_max_position_embeddings": border,
        **more,
    }


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
_SHORT = {"max_position_embeddings": BORDER, "rope_parameters": DYNAMIC}
_PHI3 = {"original_max_position_embeddings": BORDER, "max_position_embeddings": 256}
# name: (family, settings). One of each way in which tables depend on a length.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3_longrope", {**_PHI3, "rope_parameters": longrope(6, partial_rotary_factor=0.75)}),
    "longrope, repeated layout": ("llama", {"model_type": "cohere", "rope_parameters": longrope(8)}),
    # Its tables have the short frequencies at every length, and a factor by length.
    "longrope with a factor by length": (
        "mixtral",
        {"model_type": "phimoe", "rope_parameters": longrope(8, short_mscale=1.1, long_mscale=1.4)},
    ),
    "longrope in one of two layer types": (
        "gemma2",
        {
            "model_type": "gemma3_text",
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": longrope(8),
            },
        },
    ),
    "dynamic": ("llama", _SHORT),
    "dynamic, latent attention": ("deepseek_v3", _SHORT),
}


def rope_model(name: str, seed: int = 0) -> Any:
    family, settings = MODELS[name]
    return random_model(family, seed=seed, **settings)


def sequences(*lengths: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (length,), generator=source).tolist() for length in lengths]


def stock(model: Any) -> Any:
    """An unpatched copy that runs transformers' plain code."""
    return eager(copy.deepcopy(model))


def stock_logprobs(model: Any, tokens: list[int]) -> Tensor:
    """By the unpatched model, as if nothing had run before: dynamic tables stay grown until a short sequence comes."""
    model(torch.tensor([[1, 2]]), use_cache=False)
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]
