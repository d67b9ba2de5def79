"""Small image-text models with random weights, and what their processors would hand over for tokens and images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE = 7  # the placeholder
VOCABULARY = 151
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_GRID_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 8, "vision_start_token_id": 9, "vision_end_token_id": 10}
Image = dict[str, Tensor]


def noise(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(name.encode())))


def _grid(side: int) -> Callable[[str], tuple[Image, int]]:
    """Patches of an image; images whose name is longer are wider."""

    def one(name: str) -> tuple[Image, int]:
        width = 2 + 2 * len(name)
        pixels = noise(name, 4 * width, 3 * 2 * side * side)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, width]])}, width

    return one


def _square(side: int, rows: int = 4, **beside: Tensor) -> Callable[[str], tuple[Image, int]]:
    return lambda name: ({"pixel_values": noise(name, 1, 3, side, side), **beside}, rows)


def _tile(name: str) -> tuple[Image, int]:
    return {"pixel_values": noise(name, 1, 1, 3, 32, 32)}, 4


def _patches(name: str) -> tuple[Image, int]:
    sizes = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}
    return {"pixel_values": noise(name, 1, 16, 3 * 64), **sizes}, 4


def _placed(name: str) -> tuple[Image, int]:
    at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
    return {"pixel_values": noise(name, 1, 16, 48).sigmoid(), "image_position_ids": at}, 4


def _sections(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {**_ROPE, "mrope_section": list(sections), **more}}


_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    **_sections(2, 1, 1, partial_rotary_factor=0.5),
}
_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_SIGLIP = {**_TOWER, "image_size": 32, "patch_size": 8}
_CLIP = {**_TOWER, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 16, "projection_dim": 32}
_PIXTRAL = {**_TOWER, "model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 16}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_GEMMA4 = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16}
_GEMMA4_TOWER = {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2}

# Of each kind: configuration of the text part, of the tower, further fields, and one image by its name.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], Callable[[str], tuple[Image, int]]]] = {
    "qwen3_vl": (
        _sections(2, 3, 3),
        {**_GRID_TOWER, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        {},
        _grid(16),
    ),
    "qwen2_5_vl": (
        {**_sections(2, 3, 3), "num_attention_heads": 2, "num_key_value_heads": 1},
        {**_GRID_TOWER, "patch_size": 14, "window_size": 28, "fullatt_block_indexes": [1]},
        {},
        _grid(14),
    ),
    "qwen3_5": (
        {**_LINEAR, "hidden_size": 64},
        {**_GRID_TOWER, "out_hidden_size": 64, "patch_size": 16, "num_position_embeddings": 64},
        {},
        _grid(16),
    ),
    "glm4v": (
        _sections(2, 1, 1, partial_rotary_factor=0.5),
        {**_GRID_TOWER, "patch_size": 14, "image_size": 56},
        {"image_start_token_id": 9, "image_end_token_id": 10},
        _grid(14),
    ),
    "gemma3": (
        {**_WINDOWS, "query_pre_attn_scalar": 16},
        _SIGLIP,
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 9, "eoi_token_index": 10},
        _square(32),
    ),
    "gemma4": (
        {**_WINDOWS, **_GEMMA4, "use_bidirectional_attention": "vision"},
        {**_TOWER, **_GEMMA4_TOWER, "position_embedding_size": 64},
        {"audio_config": None, "audio_token_id": 11, "boi_token_id": 9, "eoi_token_id": 10},
        _placed,
    ),
    "mistral3": (
        {"model_type": "ministral3", "rope_parameters": _YARN},
        _PIXTRAL,
        {"image_token_index": IMAGE},
        _square(56, image_sizes=torch.tensor([[56, 56]])),
    ),
    "smolvlm": ({"model_type": "llama"}, _SIGLIP, {"scale_factor": 2}, _tile),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
        {**_TOWER, "patch_size": 8, "num_patches": 16},
        {"downsample_factor": 2, "projector_hidden_size": 48},
        _patches,
    ),
    "internvl": (
        {"model_type": "qwen2", "head_dim": None},
        {**_TOWER, "image_size": [56, 56], "patch_size": [14, 14]},
        {"image_seq_length": 4},
        _square(56),
    ),
    "llava": ({"model_type": "llama"}, _CLIP, {"image_token_index": IMAGE, "image_seq_length": 4}, _square(32)),
}

_MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
ORDINARY = {
    **KINDS,
    "qwen3_vl_moe": ({**KINDS["qwen3_vl"][0], **_MOE}, *KINDS["qwen3_vl"][1:]),
    "qwen3_5_moe": ({**KINDS["qwen3_5"][0], **_MOE, "shared_expert_intermediate_size": 24}, *KINDS["qwen3_5"][1:]),
    "llama4": (
        {
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 4,
            "attention_chunk_size": 8,
            "moe_layers": [1, 3],
            "no_rope_layers": [1, 1, 1, 0],
        },
        {
            **_SIGLIP,
            "intermediate_size": 128,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "rope_parameters": _ROPE,
        },
        {"image_token_index": IMAGE, "boi_token_index": 9, "eoi_token_index": 10},
        _square(32),
    ),
}
"""Those whose ordinary forwards are compared; of ``KINDS`` ragged batches are, too."""


@dataclass(frozen=True)
class PictureModel:
    """A model and what its processor makes of parts: token ids, and images by name.

    Args:
        token_types: what the model calls the types of tokens; "" for none.
    """

    model: Any
    image: Callable[[str], tuple[Image, int]]
    token_types: str

    def outputs(self, parts: Sequence[int | str], **more: Tensor) -> dict[str, Tensor]:
        ids: list[int] = []
        images: list[Image] = []
        for part in parts:
            if isinstance(part, str):
                image, rows = self.image(part)
                images.append(image)
                ids += [IMAGE] * rows
            else:
                ids.append(part)
        tokens = torch.tensor([ids])
        # Tiles of a sample are counted by the second dimension.
        joined = {
            key: torch.cat([one[key] for one in images], 1 if images[0][key].dim() == 5 else 0)
            for key in (images[0] if images else ())
        }
        types = {self.token_types: (tokens == IMAGE).int()} if self.token_types else {}
        return {"input_ids": tokens, **joined, **types, **more}


def picture_model(kind: str, seed: int = 0) -> PictureModel:
    text, tower, more, image = ORDINARY[kind]
    kept = {name: value for name, value in {**_TEXT, **text}.items() if value is not None}
    config = AutoConfig.for_model(kind, text_config=kept, vision_config=tower, **{**_TOKENS, **more})
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn_like(parameter), alpha=0.2 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            )
    types = {"gemma3": "token_type_ids", "gemma4": "mm_token_type_ids"}
    return PictureModel(model, image, types.get(kind, "mm_token_type_ids" if "mrope_section" in str(text) else ""))
