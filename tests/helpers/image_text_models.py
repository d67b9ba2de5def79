"""Small image-text models with random weights, and for each a batch with one image.

The image is ``IMAGE_TOKENS`` placeholder tokens inside a text.
"""

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, VIDEO, START, END = 7, 8, 9, 10
IMAGE_TOKENS, BEFORE, AFTER = 4, 4, 9
TEXT = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
GRID_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
TABLE = {"num_position_embeddings": 64}
GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}


def _ids(seed=3):
    text = torch.randint(20, 300, (1, BEFORE + AFTER), generator=torch.Generator().manual_seed(seed))
    return torch.cat([text[:, :BEFORE], torch.full((1, IMAGE_TOKENS), IMAGE), text[:, BEFORE:]], 1)


def _pixels(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _model(kind, text, tower, **more):
    config = AutoConfig.for_model(
        kind, text_config={**TEXT, **text}, vision_config=tower, image_token_id=IMAGE, image_token_index=IMAGE, **more
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.2 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


def _grid(kind, tower, text=None, patch=16, rotated=1.0):
    """Patches of any number of images in one sequence, positions along three axes."""
    sections = [2, 3, 3] if rotated == 1.0 else [2, 1, 1]
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": rotated, "mrope_section": sections}
    ends = {"vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": VIDEO}
    if kind == "glm4v":
        ends = {"image_start_token_id": START, "image_end_token_id": END, "video_start_token_id": 11,
                "video_end_token_id": 12, "video_token_id": VIDEO}  # fmt: skip
    model = _model(kind, {"rope_parameters": rope, **(text or {})}, GRID_TOWER | {"patch_size": patch} | tower, **ends)
    ids = _ids()
    ids[0, BEFORE - 1], ids[0, BEFORE + IMAGE_TOKENS] = START, END
    grid = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (ids == IMAGE).int()}
    return model, {"input_ids": ids, "pixel_values": _pixels(16, 3 * 2 * patch * patch), **grid}


def _picture(kind, text, tower, side, **more):
    """One image of a fixed size."""
    model = _model(kind, text, TOWER | tower, **more)
    return model, {"input_ids": _ids(), "pixel_values": _pixels(1, 3, side, side)}


def _gemma3():
    text = {**WINDOWS, "query_pre_attn_scalar": 16}
    tower = {"image_size": 32, "patch_size": 8}
    more = {"mm_tokens_per_image": 4, "boi_token_index": START, "eoi_token_index": END}
    model, batch = _picture("gemma3", text, tower, 32, **more)
    return model, batch | {"token_type_ids": (batch["input_ids"] == IMAGE).long()}


def _gemma4():
    text = {
        **WINDOWS,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": TEXT["vocab_size"],
        "global_head_dim": 16,
        "use_bidirectional_attention": "vision",
    }
    tower = {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2}
    more = {"audio_config": None, "video_token_id": VIDEO, "audio_token_id": 11, "boi_token_id": START}
    model = _model("gemma4", text, TOWER | tower | {"position_embedding_size": 64}, eoi_token_id=END, **more)
    at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).reshape(1, 16, 2)
    ids = _ids()
    batch = {"pixel_values": _pixels(1, 16, 3 * 4 * 4).sigmoid(), "image_position_ids": at}
    return model, {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **batch}


def _llama4():
    text = {
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "attention_chunk_size": 8,
        "moe_layers": [1, 3],
        "no_rope_layers": [1, 1, 1, 0],
    }
    tower = {
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return _picture("llama4", text, tower, 32, boi_token_index=START, eoi_token_index=END)


def _mistral3():
    rope = {
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
    tower = {"model_type": "pixtral", "image_size": 56, "patch_size": 14, "head_dim": 16}
    model, batch = _picture("mistral3", {"model_type": "ministral3", "rope_parameters": rope}, tower, 56)
    return model, batch | {"image_sizes": torch.tensor([[56, 56]])}


def _smolvlm():
    tower = {"image_size": 32, "patch_size": 8}
    model, batch = _picture("smolvlm", {"model_type": "llama"}, tower, 32, scale_factor=2)
    return model, batch | {"pixel_values": batch["pixel_values"][None]}


def _lfm2_vl():
    text = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
    more = {"downsample_factor": 2, "projector_hidden_size": 48}
    model = _model("lfm2_vl", text, TOWER | {"patch_size": 8, "num_patches": 16}, **more)
    shapes = {"spatial_shapes": torch.tensor([[4, 4]]), "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}
    return model, {"input_ids": _ids(), "pixel_values": _pixels(1, 16, 3 * 64), **shapes}


def _llava():
    tower = {"model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 32, "patch_size": 16}
    return _picture("llava", {"model_type": "llama"}, tower | {"projection_dim": 32}, 32, image_seq_length=4)


def _internvl():
    tower = {"image_size": [56, 56], "patch_size": [14, 14]}
    return _picture("internvl", {"model_type": "qwen2", "head_dim": 16}, tower, 56, image_seq_length=4)


BUILDERS = {
    "qwen2_5_vl": lambda: _grid("qwen2_5_vl", {"window_size": 28, "fullatt_block_indexes": [1]}, patch=14),
    "qwen3_vl": lambda: _grid("qwen3_vl", TABLE | {"deepstack_visual_indexes": [0]}),
    "qwen3_vl_moe": lambda: _grid("qwen3_vl_moe", TABLE | {"deepstack_visual_indexes": [0]}, MOE),
    "qwen3_5": lambda: _grid("qwen3_5", TABLE, GATED_DELTA, rotated=0.5),
    "qwen3_5_moe": lambda: _grid(
        "qwen3_5_moe", TABLE, GATED_DELTA | MOE | {"shared_expert_intermediate_size": 24}, rotated=0.5
    ),
    "glm4v": lambda: _grid("glm4v", {"image_size": 56}, patch=14, rotated=0.5),
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "llama4": _llama4,
    "mistral3": _mistral3,
    "smolvlm": _smolvlm,
    "lfm2_vl": _lfm2_vl,
    "internvl": _internvl,
    "llava": _llava,
}
"""By the model type: a function that returns the model and its batch."""
