"""A small random model of every class that transformers registers, from its default configuration.

A default configuration is shrunk field by field, nested ones too. Sizes go by a field's name, which architectures
share; exceptions are in ``SETTINGS``. Lists with one entry per layer keep as many layers as show every entry once.
Nothing is downloaded.
"""

import contextlib
import importlib
import inspect
import re
from typing import Any

import torch
from torch import nn

from toolkit.testing.models import from_config
from toolkit.testing.towers import Numbers, factor, fit_tower, is_token, with_sections

CAUSAL, IMAGE_TEXT = "causal", "image-text"
KINDS = (CAUSAL, IMAGE_TEXT)
LAYERS = 2
MOST_LAYERS = 4
VOCABULARY = 331
_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "layers", "depth")
"""Names of a number of layers."""

# (pattern of a field's name, largest integer in it); the first that matches.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|.*hash_byte_group_vocab", VOCABULARY),
    (r"patch_embed_hidden_size", 10**9),
    (r".*(max|n)_(target_|source_)?(position(_embedding)?s|ctx)|max_seq_len|n_ctx|n_positions|model_max_length", 512),
    (r"(seq|context|image_seq|prompt)_length", 512),
    (r".*(num_key_value_heads|num_kv_heads)|num_query_groups|linear_num_key_heads", 2),
    (r"index_n_heads", 16),  # with few heads many scores are 0, and torch's topk takes any of equal ones
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"(num_|n_|.*_)?(attention_)?heads?|.*num_(attention_)?heads|linear_num_value_heads", 4),
    (r"n_layers?|num_(hidden_)?layers|(num_)?(de|en)coder_layers|num_blocks|num_layers_per_stack", LAYERS),
    (r"qk_head_dim", 24),
    (r"index_kpool", 4),
    (r"latent_query_num", 4),
    (r"qk_rope_head_dim", 8),
    (r".*head_(dim|size)|.*headdim|mamba_d_head|kv_channels|dim_head|d_head", 16),
    (r"rotary_dim", 8),
    (r".*_rank", 16),
    (r".*(state_size|d_state)", 12),
    (r"mamba_d_ssm", 128),
    (r".*chunk_size", 8),
    (r".*(intermediate|ffn|feed_forward).*(size|dim)|d_?ff|dim_ff|d_inner|n_inner|intermediate_size_mlp", 96),
    (r"(moe_)?(n_routed|num|num_local)_experts|moe_num_experts", 8),
    (r"num_expert_groups?|n_group", 2),
    (r"num_experts_per_tok(en)?|moe_topk|topk_group|top_k", 2),
    (r".*(hidden|embedding|embed|model|emb|backbone).*(size|dim|proj_dim)|d_model|n_embd|lru_width", 64),
    (r".*sliding_window(_size)?|.*window_(size|len)|.*local_attention|mem_len", 8),
    (r"index_topk", 8),
    # Towers.
    (r"num_position_embeddings|position_embedding_size", 64),
    (r"(max_)?num_patches", 16),
    (r"mm_tokens_per_image", 4),
    (r"pos_emb_(height|width)|posemb_grid_size", 8),
    (r"num_query_tokens|resampler_n_latents|num_latents", 8),
    (r"base_channels", 32),
    (r"codebook_size|num_embeddings", 64),
    (r".*(proj|projector|projection|out|output|in|input|adapter|text)_(hidden_)?(dims?|size)", 64),
    (r"query_pre_attn_scalar", 16),
)
# Lists with an entry for each stage of a convolutional tower: the largest entry.
_STAGES = {"depths": 1, "hidden_sizes": 64, "embed_dim": 64, "num_heads": 4, "num_groups": 4, "downsample_channels": 64}

# Further settings, by model type.
SETTINGS: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "chameleon": {
        "vocabulary_map": {
            "<image>": 3,
            **{f"IMGIMG{chr(65 + at // 10)}{chr(65 + at % 10)}Z": 260 + at for at in range(64)},
        }
    },
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {"head_dim": 24},
    "emu3": {
        "vocabulary_map": {
            "<image>": 3,
            "<|extra_200|>": 4,
            **{f"<|visual token {at:06d}|>": 260 + at for at in range(64)},
        }
    },
    "emu3_vqgan": {"hidden_size": 128},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [0, 0, 1, 1],
        "qformer_config": {"num_attention_heads": 4},
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_vision_model": {"intermediate_size": 256},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "unlimited_ocr_text": {"num_key_value_heads": 4},  # its eager attention has a key head for each query head
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 38},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 38},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 4},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "layer_types": ["linear_attention", "indexed_attention"],
        }
    },
    "step3p5": {"sliding_window": 8},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "xlnet": {"d_head": 16},
}


def _kept_layers(values: dict[str, Any], count: int) -> list[int]:
    """Indices of layers that show every combination of entries of the lists with one entry per layer, in order."""
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == count]
    seen: dict[Any, int] = {}
    for layer in range(count):
        seen.setdefault(repr([one[layer] for one in lists]), layer)
    kept = sorted(seen.values())[:MOST_LAYERS]
    return kept if len(kept) >= LAYERS else list(range(min(LAYERS, count)))


def _smaller(values: dict[str, Any], numbers: Numbers, merged_by: int = 1) -> dict[str, Any]:
    """The fields of a configuration that shrink, with their new values.

    Args:
        numbers: ids of the special tokens.
        merged_by: by how much the configurations around this one merge an image's patches.
    """
    merged_by = max(merged_by, factor(values))
    counts = [values.get(name) for name in _COUNTS]
    count = next((one for one in counts if isinstance(one, int)), 0)
    layers = _kept_layers(values, count) if count else []
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = _merged(
                {**value, **_smaller(value, numbers, merged_by)}, SETTINGS.get(value["model_type"], {})
            )
        elif name == "per_layer_config" and isinstance(value, dict):  # differences by layer index
            by_layer = {int(layer): settings for layer, settings in value.items()}
            kept = [(at, by_layer[layer]) for at, layer in enumerate(layers) if layer in by_layer]
            found[name] = {at: {**settings, **_smaller(settings, numbers)} for at, settings in kept}
        elif name in _STAGES and isinstance(value, (list, tuple)):
            found[name] = [min(one, _STAGES[name]) for one in value]
        elif isinstance(value, list) and count > LAYERS and len(value) == count:
            found[name] = [_sized(name, value[layer]) for layer in layers]
        elif name in _COUNTS and isinstance(value, int):
            found[name] = len(layers)
        elif is_token(name, value, VOCABULARY):
            found[name] = numbers.of(name)
        elif (size := _sized(name, value)) != value:
            found[name] = size
    if values.get("qk_nope_head_dim") or values.get("kv_lora_rank"):  # latent attention: one key head per query head
        found["num_key_value_heads"] = found.get("num_attention_heads", values.get("num_attention_heads"))
        if values.get("head_dim") == values.get("qk_rope_head_dim") and "qk_rope_head_dim" in found:
            found["head_dim"] = found["qk_rope_head_dim"]
        elif values.get("head_dim") == values.get("qk_head_dim") and "qk_head_dim" in found:
            found["head_dim"] = found["qk_head_dim"]
    return found | fit_tower({**values, **found}, values, len(layers) or LAYERS, merged_by)


def _sized(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return next((min(value, size) for pattern, size in SIZES if re.fullmatch(pattern, name)), value)


def _merged(values: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """``values`` with ``settings``; settings of a nested configuration are merged into it."""
    nested = {
        name: _merged(values[name], value)
        for name, value in settings.items()
        if isinstance(value, dict) and "model_type" in values.get(name, {})
    }
    return values | settings | nested


def registered(kind: str = CAUSAL) -> dict[str, str]:
    """The class of each model type that transformers registers as a model of a kind."""
    from transformers.models.auto import modeling_auto

    if kind == IMAGE_TEXT:
        return dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def architectures(kind: str = CAUSAL) -> list[str]:
    """One model type for each registered class: the one it is named after, or the first."""
    chosen: dict[str, str] = {}
    for model_type, class_name in registered(kind).items():
        own = class_name.lower().startswith((f"{model_type.replace('_', '')}for", f"{model_type}lmhead"))
        if own or class_name not in chosen:
            chosen[class_name] = model_type
    return list(chosen.values())


def _source(config: Any) -> str:
    """The text of the files that the classes of a configuration and of those in it come from."""
    found = []
    for one in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        package = type(one).__module__.rpartition(".")[0]
        with contextlib.suppress(ImportError):
            found.append(inspect.getsource(importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")))
    return "".join(found)


def small_config(model_type: str, kind: str = CAUSAL, **settings: Any) -> Any:
    """A configuration of ``model_type`` with 2 to 4 layers and a hidden size of about 64, of towers too."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    values = config.to_dict()
    towers: dict[str, Any] = {name: {} for name in ("vision_config",) if name in values and values[name] is None}
    if towers:  # optional ones
        values = AutoConfig.for_model(model_type, **towers).to_dict()
    if kind == IMAGE_TEXT:
        values = with_sections(values, _source(config))
    decoder = {"is_decoder": True} if values.get("is_decoder") is False and not values.get("is_encoder_decoder") else {}
    changed = _merged(_smaller(values, Numbers()) | Numbers.KNOWN | decoder, SETTINGS.get(model_type, {}) | settings)
    return AutoConfig.for_model(model_type, **changed)


def small_model(model_type: str, seed: int = 0, kind: str = CAUSAL, **settings: Any) -> Any:
    """The model of ``small_config`` with random weights, in eval mode; the padding token's embedding is 0."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    opener = AutoModelForImageTextToText if kind == IMAGE_TEXT else AutoModelForCausalLM
    model = from_config(small_config(model_type, kind, **settings), seed, opener)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()  # as some models set it when they are loaded
    return model
