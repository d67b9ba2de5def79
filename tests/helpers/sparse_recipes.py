"""The smallest model with sparse attention, for recipes: two layers with an indexer that selects 4 keys."""

from pathlib import Path
from typing import Any

from tests.helpers.moe_recipes import KINDS
from tests.helpers.objective_recipes import TASK, objective_recipe
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.config import Recipe

SPARSE_CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "mlp_layer_types": ["dense", "sparse"],
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def sparse_recipe(output: Path, kind: str, coefficient: float, **sections: Any) -> Recipe:
    """A run of ``kind`` with ``train.indexer_loss_coef``."""
    model = {"config": SPARSE_CONFIG, **sections.pop("model", {})}
    train = {"indexer_loss_coef": coefficient, **sections.pop("train", {})}
    if kind == "pretrain":
        write_corpus(output / "text")
        return tiny_recipe(output, model=model, train=train, **sections)
    objective = {"task": TASK} | KINDS[kind] | sections.pop("objective", {})
    return objective_recipe(output, kind, objective, model=model, train=train, **sections)
