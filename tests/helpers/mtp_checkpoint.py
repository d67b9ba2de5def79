"""Folders of small random models with a multi-token prediction layer, as DeepSeek-V3 and Qwen3-Next lay them out."""

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from toolkit.testing.models import from_config, random_model

VOCABULARY = 31
LAYOUTS = {
    "layer": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "top": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
}
GLM = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 24, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "max_position_embeddings": 512, "eos_token_id": 2,
    "pad_token_id": 0, "n_group": 1, "topk_group": 1,
}  # fmt: skip


def _model(family, layers, **settings):
    if family == "glm4_moe":
        return from_config(AutoConfig.for_model(family, **{**GLM, "num_hidden_layers": layers, **settings}), layers)
    return random_model(family, layers=layers, vocabulary=VOCABULARY, seed=layers, **settings)


def save_with_mtp(family, folder, layout="layer", layers=2):
    """Write the model and its layer to ``folder``; returns the tensors of the layer by their names."""
    model = _model(family, layers)
    model.save_pretrained(folder)
    of_layer = {"layer_types": ["full_attention"]} if layout == "top" else {"first_k_dense_replace": 0}
    _model(family, 1, **of_layer).save_pretrained(folder / "one")
    one = load_file(folder / "one" / "model.safetensors")
    for file in (folder / "one").iterdir():
        file.unlink()
    (folder / "one").rmdir()
    hidden, chance = model.config.hidden_size, torch.Generator().manual_seed(3)
    path = f"model.layers.{layers}." if layout == "layer" else "mtp."
    inner = path if layout == "layer" else "mtp.layers.0."
    enorm, hnorm, eh_proj, norm = LAYOUTS[layout]
    mean = 0.0 if family.startswith("qwen3_next") else 1.0  # a norm of 1 + weight
    found = {
        f"{path}{name}.weight": mean + 0.2 * torch.randn(hidden, generator=chance) for name in (enorm, hnorm, norm)
    }
    found[f"{path}{eh_proj}.weight"] = torch.randn(hidden, 2 * hidden, generator=chance) * (2 * hidden) ** -0.5
    begin = "model.layers.0."
    found |= {inner + name.removeprefix(begin): value for name, value in one.items() if name.startswith(begin)}
    save_file({**load_file(folder / "model.safetensors"), **found}, folder / "model.safetensors", {"format": "pt"})
    return found


def change_tensors(folder, change):
    """Write the folder's tensors as ``change`` returns them, given their names and values."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
