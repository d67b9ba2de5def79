"""A small random model of every causal language model that transformers registers, from its default configuration.

A default configuration is shrunk field by field. Sizes go by a field's name, which architectures share; exceptions are
in ``SETTINGS``. Lists with one entry per layer keep as many layers as show every entry once. Nothing is downloaded.
"""

import re
from typing import Any

import torch
from torch import nn

from toolkit.testing.models import from_config

LAYERS = 2
MOST_LAYERS = 4
VOCABULARY = 331
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# (pattern of a field's name, largest integer in it); the first that matches.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|.*hash_byte_group_vocab", VOCABULARY),
    (r".*(max|n)_(target_|source_)?(position(_embedding)?s|ctx)|max_seq_len|n_ctx|n_positions|model_max_length", 512),
    (r"(seq|context|image_seq|prompt)_length", 512),
    (r".*(num_key_value_heads|num_kv_heads)|num_query_groups|linear_num_key_heads|index_n_heads", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"(num_|n_|.*_)?(attention_)?heads?|.*num_(attention_)?heads|linear_num_value_heads", 4),
    (r"n_layers?|num_(hidden_)?layers|(num_)?(de|en)coder_layers|num_blocks|num_layers_per_stack", LAYERS),
    (r"qk_head_dim", 24),
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
    (r"query_pre_attn_scalar", 16),
)

# Further settings, by model type.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 4},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 4,
            "indexer_kv_heads": 2,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
            "layer_types": ["linear_attention", "indexed_attention"],
        }
    },
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


def _smaller(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that shrink, with their new values."""
    counts = [values.get(name) for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")]
    count = next((one for one in counts if isinstance(one, int)), 0)
    layers = _kept_layers(values, count) if count else []
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = {**value, **_smaller(value)}
        elif name == "per_layer_config" and isinstance(value, dict):  # differences by layer index
            by_layer = {int(layer): settings for layer, settings in value.items()}
            kept = [(at, by_layer[layer]) for at, layer in enumerate(layers) if layer in by_layer]
            found[name] = {at: {**settings, **_smaller(settings)} for at, settings in kept}
        elif isinstance(value, list) and count > LAYERS and len(value) == count:
            found[name] = [_sized(name, value[layer]) for layer in layers]
        elif name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") and isinstance(value, int):
            found[name] = len(layers)
        elif name.endswith("_token_id") and isinstance(value, int):
            found[name] = TOKENS.get(name, 3)
        elif (size := _sized(name, value)) != value:
            found[name] = size
    if values.get("qk_nope_head_dim") or values.get("kv_lora_rank"):  # latent attention: one key head per query head
        found["num_key_value_heads"] = found.get("num_attention_heads", values.get("num_attention_heads"))
        if values.get("head_dim") == values.get("qk_rope_head_dim"):
            found["head_dim"] = found.get("qk_rope_head_dim")
    return found


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


def registered() -> dict[str, str]:
    """The class of the causal language model of each model type that transformers registers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    return dict(names)


def architectures() -> list[str]:
    """One model type for each registered class: the one it is named after, or the first."""
    chosen: dict[str, str] = {}
    for model_type, class_name in registered().items():
        own = class_name.lower().startswith((f"{model_type.replace('_', '')}for", f"{model_type}lmhead"))
        if own or class_name not in chosen:
            chosen[class_name] = model_type
    return list(chosen.values())


def small_config(model_type: str, **settings: Any) -> Any:
    """A configuration of ``model_type`` with 2 to 4 layers and a hidden size of about 64."""
    from transformers import AutoConfig

    values = AutoConfig.for_model(model_type).to_dict()
    decoder = {"is_decoder": True} if values.get("is_decoder") is False and not values.get("is_encoder_decoder") else {}
    changed = _merged(_smaller(values) | TOKENS | decoder, SETTINGS.get(model_type, {}) | settings)
    return AutoConfig.for_model(model_type, **changed)


def small_model(model_type: str, seed: int = 0, **settings: Any) -> Any:
    """The causal LM of ``small_config`` with random weights, in eval mode; the padding token's embedding is 0."""
    model = from_config(small_config(model_type, **settings), seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()  # as some models set it when they are loaded
    return model
