"""Calls of a model with tokens alone, of one too whose forward asks for an image with any text."""

import inspect
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MODALITIES = ("image", "video", "audio")
FEATURES = "mm_encoder_outputs"
"""The keyword by which transformers' forwards take what a tower made, by modality."""
POSITION_MASK = "_position_mask"
"""Ends the name of a mask of tokens, behind the name of the features of images that take the place of those with 1.

Others that are not 0 (-1) are of tokens around an image.
"""
_TOKENS = ("self", "input_ids")


def placeholders_of(config: Any) -> dict[str, int]:
    """The token id that stands for rows of each modality, as far as the configuration names one.

    A model of videos alone calls their frames pixels, as others do those of an image.
    """
    found: dict[str, int] = {}
    for kind in MODALITIES:
        names = (f"{kind}_token_id", f"{kind}_token_index")
        ids = [value for name in names if isinstance(value := getattr(config, name, None), int)]
        if ids:
            found[kind] = ids[0]
    return {"image": found["video"], **found} if set(found) == {"video"} else found


@cache
def placed_features(forward: Callable[..., Any]) -> str | None:
    """The keyword of features that a forward puts in the place of tokens by a mask of that name; None without one."""
    names = inspect.signature(forward).parameters
    return next((name for name in names if name + POSITION_MASK in names), None)


@cache
def _asked(forward: Callable[..., Any]) -> tuple[str, ...]:
    """What a forward has no default for beside tokens."""
    parameters = inspect.signature(forward).parameters
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = [name for name, one in parameters.items() if one.default is one.empty and one.kind not in variable]
    return tuple(name for name in found if name not in _TOKENS)


def asks_for_media(model: Any) -> bool:
    """Whether the model's forward takes no tokens without an image."""
    return bool(_asked(type(model).forward))


def text_arguments(model: Any, tokens: Tensor) -> dict[str, Any]:
    """What a forward over ``tokens`` [B, n] takes so that nothing is put in the place of placeholders.

    Nothing for most models. One that takes features and a mask of tokens gets no features, and a mask that is 0. One
    that asks for an image, and takes what its tower made in the place of it, gets features that are the placeholders'
    own embeddings.
    """
    forward = type(model).forward
    name = placed_features(forward)
    if name is not None:
        own = model.get_input_embeddings().weight
        none = torch.zeros(len(tokens), 0, own.shape[-1], dtype=own.dtype, device=tokens.device)
        return {name: none, name + POSITION_MASK: torch.zeros_like(tokens)}
    asked = _asked(forward)
    if not asked or FEATURES not in inspect.signature(forward).parameters:
        return {}
    placeholder = next(iter(placeholders_of(model.config).values()), 0)
    own = model.get_input_embeddings()(torch.full_like(tokens, placeholder))
    features = SimpleNamespace(pooler_output=own, vision_outputs=None, qformer_outputs=None)
    return {**dict.fromkeys(asked), FEATURES: dict.fromkeys(MODALITIES, features)}
