"""TRL's AsyncGRPOTrainer: rollouts by a server, weights by a folder. Arguments: URL, model, shared folder, steps."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl.experimental.async_grpo import (
    AsyncGRPOConfig,
    AsyncGRPOTrainer,
    async_grpo_trainer,
    async_rollout_worker,
)

from train_patches.trl_async import FolderWeightTransfer

async_grpo_trainer.get_peak_flops_per_device = lambda *_: 1.0  # it asks CUDA for the name of the device
async_rollout_worker.is_vllm_available = lambda *_, **__: True  # the server is the toolkit's


def letters(completions, **_):
    """The share of letters, which a random model has some of."""
    texts = [one[0]["content"] if isinstance(one, list) else one for one in completions]
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in texts]


def main(url: str, model: str, shared: str, steps: str) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": text}]} for text in ("the quick fox", "the lazy dog", "jumps", "over")
    ]
    options = AsyncGRPOConfig(
        output_dir=str(Path(shared, "out")), max_steps=int(steps), num_generations=4, max_completion_length=16,
        vllm_server_base_url=url, vllm_server_timeout=120, learning_rate=1e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=1, gradient_accumulation_steps=1, report_to=[], logging_steps=1, save_strategy="no",
        dtype="float32", token_budget=256, max_inflight_tasks=8, weight_sync_steps=1, bf16=False, use_cpu=True,
    )  # fmt: skip
    transfer = FolderWeightTransfer(url, Path(shared, "policy"))
    trainer = AsyncGRPOTrainer(
        model, letters, options, Dataset.from_list(rows), AutoTokenizer.from_pretrained(model), weight_transfer=transfer
    )
    trainer.train()
    trainer.model.save_pretrained(Path(shared, "trained"))
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    print(json.dumps({"steps": trainer.state.global_step, "losses": losses, "log": trainer.state.log_history[-2:]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
