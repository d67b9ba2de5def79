"""One image and a few tokens of text as a processor hands them to a model, made from the model's own structure.

What the method that encodes images asks for (grids, sizes, masks, patches) says in which layout pixels come; layouts
are tried in turn until the model takes one. How many placeholder tokens stand for the image is what it then returns.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, first_line
from toolkit.patching.without_media import asks_for_media
from toolkit.testing.towers import PATCHES, factor, first

BEFORE, AFTER = 4, 9
"""Tokens of text around the image."""
_PIXELS = ("pixel_values", "pixel_values_images", "flattened_patches", "image_patches")
_TEXT = {"input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "past_key_values", "use_cache"}


class Layouts:
    """Layouts of one image for a model, most specific first.

    Args:
        model: with an image tower.
    """

    def __init__(self, model: Any) -> None:
        self._features = getattr(model, "get_image_features", None) or getattr(
            model.base_model, "get_image_features", None
        )
        if self._features is None:
            self._features = getattr(model, "get_video_features", None)
        self._forward = set(inspect.signature(model.forward).parameters)
        self._asked = _parameters(self._features) | _parameters(getattr(model.base_model, "get_image_features", None))
        config = vision_config(model.config)
        values = config.to_dict()
        around = {**model.config.to_dict(), **values}
        self.channels = first(values.get("num_channels") or values.get("in_channels") or values.get("in_chans") or 3)
        self.patch = first(values.get("patch_size")) or 16
        self.merge = max(factor(around), 1)
        self.temporal = first(values.get("temporal_patch_size") or values.get("patch_temporal") or 1)
        self.grid = PATCHES * max(1, self.merge // 2)
        self._tiles: int = values.get("max_num_tiles") or 1
        size = first(values.get("image_size"))
        self.side = size if isinstance(size, int) else self.patch * self.grid

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        asked = self._asked | self._forward
        if "image_token_pooling" in asked:
            yield from self._pooled()
        elif {"image_grid_thw", "image_grid_hw", "grid_thw"} & asked:
            yield from self._patches(next(n for n in ("image_grid_thw", "image_grid_hw", "grid_thw") if n in asked))
        elif "spatial_shapes" in asked:
            yield {
                "pixel_values": self._flat(1)[None],
                "spatial_shapes": torch.tensor([[self.grid, self.grid]]),
                "pixel_attention_mask": torch.ones(1, self.grid**2, dtype=torch.long),
            }
        elif "image_position_ids" in asked:
            for patch, grid in ((self.patch, self.grid), (self.patch * self.merge, 2)):
                at = torch.arange(grid)
                positions = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).reshape(1, -1, 2)
                pixels = self._noise(1, grid**2, self.channels * patch**2)
                yield {"pixel_values": pixels, "image_position_ids": positions}
        elif "target_sizes" in asked:
            pixels = self._noise(1, self.channels, self.patch, self.patch * self.grid**2)
            yield {"pixel_values": pixels, "target_sizes": torch.tensor([[self.grid, self.grid]], dtype=torch.int32)}
        elif "image_sizes" in asked:
            yield from self._sized()
        yield from self._whole(asked)

    def features(self, layout: dict[str, Tensor]) -> Any:
        """What the model's method that encodes images returns; None where it has no such method."""
        if self._features is None:
            return None
        given = {name: value for name, value in layout.items() if name in self._asked or not self._asked}
        return self._features(**given)

    def _noise(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def _flat(self, temporal: int) -> Tensor:
        return self._noise(self.grid**2, self.channels * temporal * self.patch**2)

    def _patches(self, name: str) -> Iterator[dict[str, Tensor]]:
        sides = [self.grid, self.grid] if name.endswith("_hw") else [1, self.grid, self.grid]
        beside = {name: torch.tensor([sides])}
        if "image_merge_sizes" in self._asked:
            beside["image_merge_sizes"] = torch.tensor([self.merge])
        square = self._noise(self.grid**2, self.channels, self.patch, self.patch)
        side = self.merge * self.patch
        merged = self._noise(self.grid**2 // self.merge**2, side, side, self.channels)
        kinds = [self._flat(self.temporal), self._flat(1), square, square[None], merged]
        for pixels in kinds:
            yield {"pixel_values": pixels, **beside}
        merged_sides = [side // self.merge if side > 1 else 1 for side in sides]
        yield {"pixel_values": merged, **beside, name: torch.tensor([merged_sides])}

    def _sized(self) -> Iterator[dict[str, Tensor]]:
        """One image with its size; or tiles of one that is as large as two of them."""
        image = self._noise(1, self.channels, self.side, self.side)
        yield {"pixel_values": image, "image_sizes": torch.tensor([[self.side, self.side]])}
        for tiles in (3, 2, 5):
            pixels = self._noise(1, tiles, self.channels, self.side, self.side)
            yield {"pixel_values": pixels, "image_sizes": torch.tensor([[self.side, 2 * self.side]])}

    def _pooled(self) -> Iterator[dict[str, Tensor]]:
        """Crops as patches, and for each row of features the patches that it pools: 2 by 2."""
        half = self.grid // 2
        at = torch.arange(self.grid**2).view(half, 2, half, 2).transpose(1, 2).reshape(half * half, 4)
        yield {
            "pixel_values": self._flat(1)[None],
            "image_token_pooling": at,
            "image_grids": torch.tensor([[half, half, 0, 0]]),
            "image_num_crops": torch.tensor([1]),
        }

    def _whole(self, asked: set[str]) -> Iterator[dict[str, Tensor]]:
        """Whole images, alone or as tiles of a sample, with the masks that are asked for."""
        image = self._noise(1, self.channels, self.side, self.side)
        beside: dict[str, Tensor] = {}
        if "pixel_mask" in asked:
            beside["pixel_mask"] = torch.ones(1, self.side, self.side, dtype=torch.bool)
        if "high_res_pixel_values" in asked:
            beside["high_res_pixel_values"] = image
        if "qformer_input_ids" in asked:
            beside["qformer_input_ids"] = torch.arange(41, 46)[None]
            beside["qformer_attention_mask"] = torch.ones(1, 5, dtype=torch.long)
        if "aspect_ratio_ids" in asked:
            tiles = self._tiles
            beside["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
            beside["aspect_ratio_mask"] = torch.tensor([[[1] + [0] * (tiles - 1)]])
            pixels = self._noise(1, 1, tiles, self.channels, self.side, self.side)
            yield {"pixel_values": pixels, **beside}
        for pixels in (image, image[None]):
            more = dict(beside)
            if "pixel_attention_mask" in asked and pixels.dim() == 5:
                yield {"pixel_values": pixels, **more, "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
                mask = torch.ones(1, 1, self.side, self.side, dtype=torch.bool)
                yield {"pixel_values": pixels, **more, "pixel_attention_mask": mask}
            yield {"pixel_values": pixels, **more}
        at = torch.arange(1, self.grid + 1)
        indices = torch.stack(torch.meshgrid(at, at, indexing="ij"), -1).reshape(1, -1, 2)
        yield {"flattened_patches": torch.cat([indices, self._flat(1)[None]], -1)}
        yield {"pixel_values": self._flat(1)[None]}
        yield {"pixel_values_images": image}


def _parameters(method: Any) -> set[str]:
    """What a method asks for by name."""
    found = {} if method is None else inspect.signature(method).parameters
    return {name for name, one in found.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}


def vision_config(config: Any) -> Any:
    """The configuration of the image tower; the model's own where there is none beside it."""
    named = [
        name for name in vars(config) if name.endswith("_config") and any(w in name for w in ("vision", "vq", "image"))
    ]
    found = [getattr(config, name) for name in sorted(named) if hasattr(getattr(config, name), "to_dict")]
    inner = next((getattr(config, n) for n in ("thinker_config",) if hasattr(config, n)), None)
    return found[0] if found else vision_config(inner) if inner is not None else config


def image_batch(model: Any) -> dict[str, Tensor]:
    """Inputs [1, n] of a sequence of text with one image in it, as the model's processor would make them.

    Raises:
        ToolkitError: no layout of pixels is one that the model takes; the reason of the first.
    """
    layouts = Layouts(model)
    problems: list[str] = []
    with torch.no_grad():
        for layout in layouts:
            if not set(layout) & layouts._forward:
                continue
            try:
                features = layouts.features(layout)
                inputs = _around(model, layout, _rows(features))
                model(**inputs, use_cache=False)
            except Exception as problem:  # another layout's shapes
                shape = "x".join(map(str, next(iter(layout.values())).shape))
                problems.append(f"{shape}: {first_line(problem)}")
                continue
            return inputs
    raise ToolkitError(f"no layout of pixels fits ({'; '.join(problems[:3]) or 'the model takes no pixels'}).")


def _rows(features: Any) -> int | None:
    """How many rows of features an image gives."""
    if features is None:
        return None
    pooled = getattr(features, "pooler_output", features)
    if pooled is None and getattr(features, "deepstack_features", None):
        _, pooled = features.deepstack_features[0]
    if pooled is None:
        pooled = features.last_hidden_state
    if isinstance(pooled, Tensor):
        return pooled.numel() // pooled.shape[-1]
    rows: int = sum(one.numel() // one.shape[-1] for one in pooled)
    return rows


def special(config: Any, *words: str) -> int | None:
    """The id of a special token by the words of its name, of any configuration inside."""
    for one in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        for name in sorted(vars(one)):
            if not all(word in name for word in words) or name.split("_")[-1] not in ("id", "index"):
                continue
            value = getattr(one, name)  # of no other name: some fields are of a layer alone, and cannot be read
            if type(value) is int:
                return value
    return None


def _around(model: Any, layout: dict[str, Tensor], rows: int | None) -> dict[str, Tensor]:
    """Ids of text with the image's placeholders in it, and what goes with them."""
    config = model.config
    asked = set(inspect.signature(model.forward).parameters)
    text = torch.randint(40, 260, (BEFORE + AFTER,), generator=torch.Generator().manual_seed(3)).tolist()
    image = getattr(config, "image_token_id", None)
    image = special(config, "image", "token") if image is None else image
    for words in (("image",), ("video", "token")):
        image = special(config, *words) if image is None else image
    if rows is None and "image_embeds_position_mask" in asked:
        rows, image = getattr(config, "latent_query_num", 0), 3
    placed = [image] * rows if rows is not None and image is not None else []
    if placed:
        placed = [*_around_image(config, "start", "bo"), *placed, *_around_image(config, "end", "eo")]
    ids = torch.tensor([[*text[:BEFORE], *placed, *text[BEFORE:]]])
    inputs: dict[str, Tensor] = {"input_ids": ids, **layout}
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids", "image_embeds_position_mask"):
        if name in asked:
            inputs[name] = torch.as_tensor(ids == image).int()
    if "token_type_ids" in inputs and _prompt_sees_itself(model, ids):
        inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    if "moe_mm_token_type_ids" in inputs:  # experts take the tokens around an image for its own
        inputs["moe_mm_token_type_ids"] = torch.isin(ids, torch.tensor([image, *placed])).int()
    if "attention_mask" in asked:
        patches = layout.get("flattened_patches") if "input_ids" not in asked else None  # what the mask is of
        inputs["attention_mask"] = torch.ones_like(ids) if patches is None else torch.ones(patches.shape[:2])
    if "decoder_input_ids" in asked and config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    if "image_attention_mask" in asked:
        inputs["image_attention_mask"] = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
    if "cross_attention_mask" in asked:
        inputs["cross_attention_mask"] = layout["aspect_ratio_mask"][:, None].expand(1, ids.shape[1], 1, -1)
    if "bbox" in asked:
        inputs["bbox"] = torch.zeros(1, ids.shape[1], 4, dtype=torch.long)
    return {name: value for name, value in inputs.items() if name in asked or name in layout}


def _prompt_sees_itself(model: Any, ids: Tensor) -> bool:
    """Whether tokens of type 0 see those behind them: the type is that of a prompt, with its images."""
    if model.config.is_encoder_decoder or asks_for_media(model):
        return False
    other = ids.clone()
    other[0, -1] += 1
    first, second = (
        model(input_ids=one, token_type_ids=torch.zeros_like(ids), use_cache=False).logits[0, 0] for one in (ids, other)
    )
    return not torch.equal(first, second)


def _around_image(config: Any, word: str, short: str) -> list[int]:
    """The token that stands before or behind an image's placeholders, if there is one."""
    names = [("vision", word), ("image", word), (f"{short}i",)]
    return [token for token in (special(config, *words) for words in names) if token is not None][:1]
