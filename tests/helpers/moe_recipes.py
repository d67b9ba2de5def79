"""Small recipes of every kind of objective, of an MoE model."""

from pathlib import Path
from typing import Any

from tests.helpers.objective_recipes import TASK, objective_recipe
from tests.helpers.training_recipes import tiny_recipe, write_corpus
from toolkit.config import Recipe

MOE_CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
KINDS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "sft": {},
    "dpo": {"pairs": 6},
    "grpo": {"task": {"name": "tests.helpers.objective_recipes:Lower"}, "prompts": 3, "num_generations": 4},
    "distill": {
        "prompts": 6,
        "teacher_top_k": 4,
        "teacher": {"config": MOE_CONFIG, "max_steps": 2, "batch_tokens": 64},
    },
}


def moe_recipe(output: Path, kind: str, moe: dict[str, Any], **sections: Any) -> Recipe:
    """A run of ``kind`` with section ``train.moe``."""
    model = {"config": MOE_CONFIG | sections.pop("config", {}), **sections.pop("model", {})}
    train = {"moe": moe, **sections.pop("train", {})}
    if kind == "pretrain":
        write_corpus(output / "text")
        return tiny_recipe(output, model=model, train=train, **sections)
    objective = {"task": TASK} | KINDS[kind] | sections.pop("objective", {})
    return objective_recipe(output, kind, objective, model=model, train=train, **sections)
