"""Recipes that are trained by one process, and by two under every strategy of ``train.distributed``."""

import json
from pathlib import Path
from typing import Any

from tests.helpers.objective_recipes import LOWER, TASK, objective_recipe
from tests.helpers.training_recipes import tiny_recipe
from toolkit.config import Recipe

STEPS = 50
MOE = {
    "model_type": "qwen3_moe", "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 32,
}  # fmt: skip
DENSE = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
OWN_FILE = {
    "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
}  # fmt: skip
"""Of a user of DeepSpeed, as transformers' ``Trainer`` takes it."""
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3", "tp")
CASES = ("dense", "moe", "bf16", "fp16", "offload", "sft", "dpo", "kto", "reward", "grpo", "lora", "qlora")
RESUMED = ("dense", "moe", "bf16", "fp16", "offload", "grpo", "lora", "qlora")
"""Cases that are resumed from the middle."""
REFUSED = {
    "tp": ("offload", "qlora"), **dict.fromkeys(("ddp", "fsdp2"), ("fp16",)),
    **dict.fromkeys(("zero1", "zero2", "zero3"), ("fp16", "qlora")),
}  # fmt: skip
"""Cases that a strategy does not take. Two processes of ddp divide the loss by half as many micro-batches as one, so
that scaled gradients of fp16 are twice as large: other steps may overflow and be skipped."""


def base_of(folder: Path) -> Path:
    """The model that case "lora" adapts: what one process made of case "dense"."""
    return folder / "runs" / "dense-ddp-1" / "checkpoints" / f"step-{STEPS:06d}"


def case(name: str, folder: Path, strategy: str, processes: int) -> Recipe:
    """A recipe whose steps see the same examples for any number of processes; ``folder``/text is a corpus."""
    own: dict[str, Any] = {
        "run_name": f"{name}-{strategy}-{processes}", "checkpoint": {"save_steps": None}, "model": {"config": DENSE},
    }  # fmt: skip
    train: dict[str, Any] = {"distributed": strategy}
    if name in ("dense", "moe", "bf16", "fp16", "offload"):
        own["checkpoint"] = {"save_steps": STEPS // 2}
        train |= {"max_steps": STEPS, "gradient_accumulation_steps": 1 if name == "moe" else 2}
        if name == "moe":
            own["model"] = {"config": MOE}
        if name in ("bf16", "fp16"):
            train |= {"mixed_precision": name}
        if name == "offload" and strategy == "zero2":
            (folder / "zero2.json").write_text(json.dumps(OWN_FILE))
            train["distributed"] = {"strategy": strategy, "deepspeed": str(folder / "zero2.json")}
        elif name == "offload" and strategy != "ddp":
            train["distributed"] = {"strategy": strategy, "cpu_offload": True}
        return tiny_recipe(folder, data={"streams": 2}, train=train, evaluate={"do_eval": name == "dense"}, **own)
    own["checkpoint"] = {"save_steps": 3}
    train |= {"max_steps": 6}
    if name == "sft":
        train["per_device_train_batch_size"] = 4 if strategy == "tp" else 4 // processes
        # Nothing is solved, so that the first measure is the best one.
        own["evaluate"] = {"do_eval": True, "eval_steps": 2, "load_best_model_at_end": True}
        objective: dict[str, Any] = {"task": TASK}
    elif name == "grpo":
        objective = {"task": LOWER, "prompts": 4, "num_generations": 4, "num_iterations": 2, "entropy_coef": 0.05}
        own["evaluate"] = {"do_eval": True}
    elif name in ("lora", "qlora"):
        own["model"] = {"config": None, "name_or_path": str(base_of(folder)), "lora": {"r": 2}}
        if name == "qlora":
            own["model"]["quantise"] = "int8"
        name, train["ema_decay"] = "dpo", None if strategy == "zero3" else 0.5
        own["tokenizer"] = {"name_or_path": str(base_of(folder))}
        objective = {"pairs": 8}
    else:
        objective = {"lines" if name == "kto" else "pairs": 8}
        if name == "dpo":
            objective |= {"sync_ref_model": True, "ref_model_sync_steps": 2}
        own["evaluate"] = {"do_eval": True}
    return objective_recipe(folder, name, objective, train=train, **own)
