"""How the configurations of a model with towers shrink: vision and audio encoders, projectors, what joins them to text.

Sizes go by a field's name, as in ``architectures``; what belongs together (an image's side and its patches, sections of
rotary frequencies and a head's size, indices of layers and their number) is made to fit afterwards. No class is named.
"""

import math
import re
from typing import Any, ClassVar

PATCHES = 4
"""Patches along an image's side, before those that merging and pooling need."""
LAYER_INDICES = re.compile(
    r".*(layer_ind(ic|ex)es|layer_ids|block_ind(ic|ex)es|visual_indexes|attn_indexes|target_layers|select_layers?"
    r"|spatial_vision_layer|insert_layer_id|feature_layers?)"
)
_FACTORS = re.compile(
    r"spatial_merge_size|merge_size|merge_kernel_size|adapter_merge_size|pooling_kernel_size|scale_factor"
    r"|downsample_factor|projector_pooling_ratio|pixel_shuffle_factor|window_kernel_size"
)


class Numbers:
    """Distinct small ids of special tokens: one per name, wherever in a configuration the name stands."""

    KNOWN: ClassVar[dict[str, int]] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

    def __init__(self) -> None:
        self._given: dict[str, int] = {}

    def of(self, name: str) -> int:
        """The id of a field such as ``image_token_id``."""
        name = name.replace("_index", "_id")
        return self.KNOWN[name] if name in self.KNOWN else self._given.setdefault(name, 3 + len(self._given))


_TOKEN = re.compile(r".*_token_(id|index)")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_index")


def is_token(name: str, value: Any, vocabulary: int) -> bool:
    """Whether a field is the id of a special token: by its name, or as a number beyond ``vocabulary``."""
    if value is None:
        return name in _PLACEHOLDERS
    if type(value) is not int:
        return False
    return _TOKEN.fullmatch(name) is not None or (name.endswith(("_id", "_index")) and value >= vocabulary)


def first(value: Any) -> Any:
    """A number, or the first of a list of them."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def factor(values: dict[str, Any]) -> int:
    """By how many patches along a side merging and pooling reduce an image, 1 without."""
    found = [first(value) for name, value in values.items() if _FACTORS.fullmatch(name)]
    return max([1, *(value for value in found if isinstance(value, int))])


def fit_tower(values: dict[str, Any], before: dict[str, Any], layers: int, merged_by: int = 1) -> dict[str, Any]:
    """The fields of a shrunk configuration that must follow from its others, with their new values.

    Args:
        before: the configuration as it was.
        layers: layers of the encoder that indices count.
        merged_by: ``factor`` of the configurations around this one.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if LAYER_INDICES.fullmatch(name):
            found[name] = _indices(value, layers, keep_length="feature" in name)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            found[name] = _rope(value, _head_dim(values))
    patch = first(values.get("patch_size"))
    if isinstance(patch, int) and "image_size" in values:
        side = patch * PATCHES * max(1, merged_by // 2)
        size = values["image_size"]
        found["image_size"] = type(size)([side] * len(size)) if isinstance(size, (list, tuple)) else side
        for name in ("num_position_embeddings", "num_patches"):
            if isinstance(values.get(name), int):
                found[name] = (side // patch) ** 2
    window = before.get("window_size")
    if isinstance(patch, int) and isinstance(window, int) and window > 4 * patch:  # in pixels, not in patches
        found["window_size"] = 2 * patch * merged_by
    if isinstance(values.get("image_grid_pinpoints"), (list, tuple)):
        found["image_grid_pinpoints"] = _pinpoints(values["image_grid_pinpoints"], values)
    return {name: value for name, value in found.items() if value != values.get(name)}


def _pinpoints(points: Any, values: dict[str, Any]) -> list[list[int]]:
    """Sizes of images in tiles, for tiles as large as the shrunk tower's image."""
    tile = math.gcd(*(side for point in points for side in point))
    sides = [first(value.get("image_size")) for value in values.values() if isinstance(value, dict)]
    now = next((side for side in sides if isinstance(side, int)), tile)
    return [[side // tile * now for side in point] for point in points]


def _indices(value: Any, layers: int, keep_length: bool) -> Any:
    """Indices of layers as far as there are any; negative ones count from the end."""
    if isinstance(value, int) and not isinstance(value, bool):
        return max(-layers, min(value, layers - 1))
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, int) for one in value):
        return value
    near = [max(-layers, min(one, layers - 1)) for one in value]
    return near if keep_length else sorted(set(near))


def _head_dim(values: dict[str, Any]) -> int | None:
    size = values.get("head_dim")
    heads = values.get("num_attention_heads") or values.get("num_heads")
    hidden = values.get("hidden_size") or values.get("embed_dim")
    if isinstance(size, int):
        return size
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) else None


def _rope(parameters: dict[str, Any], head_dim: int | None) -> dict[str, Any]:
    """Sections of the frequencies that add up to half of the rotated part of a head."""
    nested: dict[str, Any] = {
        name: _rope(value, head_dim) for name, value in parameters.items() if isinstance(value, dict)
    }
    sections = parameters.get("mrope_section")
    if isinstance(sections, (list, tuple)) and head_dim is not None:
        half = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0)) // 2
        nested["mrope_section"] = _share(list(sections), half)
    return parameters | nested


def with_sections(values: dict[str, Any], source: str) -> dict[str, Any]:
    """``values`` whose text has sections of rotary frequencies, if the model's ``source`` looks for them.

    Some models have the sections of their released size in the code, in place of a default configuration's.
    """
    if "mrope_section" not in source:
        return values
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value and "vocab_size" in value:
            rope = value.get("rope_parameters") or {"rope_type": "default", "rope_theta": 1e4}
            if "rope_type" in rope:
                found[name] = {**value, "rope_parameters": {"mrope_section": [3, 3, 2], **rope}}
    return values | found


def _share(parts: list[int], total: int) -> list[int]:
    """``total`` in the proportions of ``parts``, each at least 1; the last takes what is left."""
    shared = [max(1, one * total // sum(parts)) for one in parts]
    shared[-1] += total - sum(shared)
    return shared
