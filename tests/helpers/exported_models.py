"""Small random models that other engines open after an export."""

from typing import Any

import torch

from toolkit.testing.models import random_model, tiny_tokenizer

GEMMA3 = {
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96,
    "query_pre_attn_scalar": 32, "sliding_window": 8, "max_position_embeddings": 512,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip


def exported_model(family: str, **settings: Any) -> tuple[Any, Any]:
    """(model, tokenizer): a hidden size of 128, heads of 32 and random weights, which other engines' kernels take."""
    tokenizer = tiny_tokenizer()
    if family != "gemma3_text":
        sizes = {"num_attention_heads": 4, "head_dim": 32}
        return random_model(family, hidden=128, vocabulary=len(tokenizer), **sizes, **settings), tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(tokenizer), "hidden_size": 128}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**ids, **GEMMA3, **settings})
    ).eval(), tokenizer
