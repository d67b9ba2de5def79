"""Small random models of the families that parity is tested on, and a tokenizer trained on the spot."""

from typing import Any

import torch

from toolkit.errors import ToolkitError, must_be_one_of


def _common(hidden: int, layers: int, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


# Settings of a family beyond the common ones; the key is transformers' model type unless one is given.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4096},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gpt_neox": {"rotary_pct": 0.25},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16},
    "granite_swa": {
        "num_key_value_heads": 2,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_multiplier": 0.25,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 99,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "moe_intermediate_size": 40,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2},
    "olmoe": {"num_key_value_heads": 2, "intermediate_size": 40, "num_experts": 10, "num_experts_per_tok": 4},
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 40,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "qwen3_next": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 12,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_only_layers": list(range(99)),
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 12, "n_groups": 2, "expand": 2, "chunk_size": 8},
    "bamba": {
        "num_key_value_heads": 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 12,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
        "attn_layer_indices": [1],
    },
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}

# One set of frequencies up to 48 tokens and another beyond: prompts and completions lie on both sides.
FAMILIES["phi3_longrope"] = {
    "model_type": "phi3",
    "num_key_value_heads": 2,
    "original_max_position_embeddings": 48,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.02, 1.05, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 1.5, 3.0, 7.0, 15.0, 30.0],
        "original_max_position_embeddings": 48,
    },
}
FAMILIES["deepseek_v3_moe"] = {
    **FAMILIES["deepseek_v3"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 40,
    "n_routed_experts": 12,
    "num_local_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
}
FAMILIES["qwen3_next_moe"] = {
    **FAMILIES["qwen3_next"],
    "model_type": "qwen3_next",
    "mlp_only_layers": [],
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}

# Families with MoE layers.
MOE_FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3_moe", "qwen3_next_moe")

# Families with recurrent mixers, which keep transformers' own forward in ordinary calls: only their ragged batches are
# bitwise reproducible.
HYBRIDS = ("qwen3_next", "qwen3_next_moe", "mamba2", "bamba", "lfm2")


def random_model(
    family: str, hidden: int = 64, layers: int = 2, vocabulary: int = 331, seed: int = 0, **settings: Any
) -> Any:
    """A causal LM of ``family`` with random float32 weights, norm weights and biases included, in eval mode.

    The caller's random state does not change.

    Args:
        family: a key of ``FAMILIES``.
        hidden: hidden size.
        layers: number of layers.
        vocabulary: vocabulary size.
        seed: of the weights.
        settings: further fields of the configuration.

    Raises:
        ToolkitError: an unknown family.
    """
    from transformers import AutoConfig

    if family not in FAMILIES:
        raise ToolkitError(must_be_one_of("family", family, FAMILIES))
    values = {**_common(hidden, layers, vocabulary), **FAMILIES[family], **settings}
    config = AutoConfig.for_model(values.pop("model_type", family), **values)
    return from_config(config, seed)


def from_config(config: Any, seed: int = 0, opener: Any = None) -> Any:
    """A model of a configuration with random float32 weights throughout, in eval mode.

    The caller's random state does not change.

    Args:
        opener: the auto class that makes it; None for that of causal language models.
    """
    from transformers import AutoModelForCausalLM

    opener = AutoModelForCausalLM if opener is None else opener

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = opener.from_config(config, dtype=torch.float32, **exact_attention(config))
        with torch.no_grad():
            saved = model.state_dict()
            expert_biases = [b for name, b in model.named_buffers() if name in saved and b.is_floating_point()]
            for tensor in (*model.parameters(), *expert_biases):
                # Norms are initialised to ones and biases to zeros, which would hide mistakes in them; larger matrices
                # give next-token distributions that are neither flat nor certain.
                scale = 0.2 if tensor.dim() < 2 else 1.5 * tensor.shape[-1] ** -0.5
                tensor.add_(torch.randn_like(tensor), alpha=scale)
    return model.eval()


def exact_attention(config: Any) -> dict[str, str]:
    """Arguments of ``from_config`` and ``from_pretrained`` for attention exactly as configured.

    Eager attention for capped scores: transformers 5.17 silently omits the cap in SDPA.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {} if not capped else {"attn_implementation": "eager"}


# What ``tiny_tokenizer`` is trained on: other text is another tokenizer.
_TOKENIZER_TEXT = [
    "Small random models of the families that the parity promise is shown on, and a tokenizer made on the spot.",
    "A byte-level BPE tokenizer with a chat template, trained on its own docstring; never downloads anything.",
]


def tiny_tokenizer(vocabulary: int = 331) -> Any:
    """A byte-level BPE tokenizer with a chat template, trained on two sentences; downloads nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TOKENIZER_TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast
