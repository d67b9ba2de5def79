"""The smallest recipe that still has everything: two layers, a few files, a few steps."""

import random
from pathlib import Path
from typing import Any

from toolkit.config import Recipe, validate


def write_corpus(root: Path, files: int = 24) -> None:
    """Deterministic text files, enough for a few epochs of tiny batches."""
    chance = random.Random(7)
    root.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        lines = [
            f"{chance.choice(['x', 'total', 'name'])} = {chance.choice('fg')}({chance.randrange(50)})  # é"
            for _ in range(chance.randrange(2, 12))
        ]
        (root / f"m{index}.py").write_text("\n".join(lines) + "\n")


def tiny_recipe(output: Path, **sections: Any) -> Recipe:
    """A recipe over ``output``/text; keyword arguments update its sections or replace its plain values."""
    values: dict[str, Any] = {
        "run_name": "tiny",
        "output_dir": str(output / "runs"),
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 32,
                "attention_dropout": 0.0,
            }
        },
        "tokenizer": {"vocab_size": 270},
        "data": {"data_dir": str(output / "text"), "val_set_size": 0.2, "interleave": 3},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 2},
        "train": {"max_steps": 8, "batch_tokens": 40, "max_length": 16},
        "checkpoint": {"save_steps": 2, "save_total_limit": 3},
        "log": {"report_to": "none", "plot": False},
        "evaluate": {"do_eval": False},
    }
    for key, value in sections.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return validate(values)
