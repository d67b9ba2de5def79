"""A recipe with sharded experts, whole and resumed: by test_expert_parallel.py itself and, under torchrun, by two."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from toolkit.config import Recipe, load_recipe
from toolkit.training.loop import Trainer
from toolkit.training.model import load_checkpoint


def moe_recipe(folder: Path, name: str, **values: Any) -> Recipe:
    """``recipes/moe_ep.yaml`` made small: another corpus, a few steps."""
    overrides = [
        f"run_name={name}",
        f"output_dir={folder / 'runs'}",
        f"data.data_dir={folder / 'text'}",
        "data.val_set_size=0.2",
        "data.interleave=3",
        "tokenizer.vocab_size=270",
        "model.config.hidden_size=48",
        "model.config.moe_intermediate_size=24",
        "model.config.head_dim=12",
        "model.config.num_hidden_layers=2",
        "schedule.warmup_steps=2",
        "train.max_steps=8",
        "train.batch_tokens=96",
        "train.max_length=32",
        "checkpoint.save_steps=4",
        "checkpoint.save_total_limit=9",
        "log.report_to=none",
        "log.plot=false",
        "evaluate.do_eval=false",
    ]
    return load_recipe("moe_ep", [*overrides, *(f"{key}={value}" for key, value in values.items())])


def train_and_resume(folder: Path, name: str) -> None:
    whole = Trainer(moe_recipe(folder, name), quiet=True)
    world_size = whole.accelerator.num_processes
    held = [p for path, p in whole.ragged.named_parameters() if path.endswith("experts.gate_up_proj")]
    assert len(held) == 2
    assert all(p.shape[0] == 16 // world_size for p in held)
    whole.fit()
    with whole.strategy.whole():
        expected = {name: tensor.clone() for name, tensor in whole.hf_model.state_dict().items()}
    last = folder / "runs" / name / "checkpoints" / "step-000008"
    saved = load_checkpoint(last, "float32", "the checkpoint").state_dict()
    moments = load_file(str(last / "training" / "optimizer.safetensors"))
    whole.accelerator.wait_for_everyone()  # all have read before the resumed run removes it
    assert saved.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())
    assert all(moments[f"{name}/exp_avg"].shape == tensor.shape for name, tensor in saved.items())

    resumed = Trainer(moe_recipe(folder, name, resume_from_checkpoint="step-4"), quiet=True)
    assert resumed.step == 4
    resumed.fit()
    again = load_checkpoint(last, "float32", "the checkpoint").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.items())
    # The processes judge different numbers of windows, with all experts each.
    assert 0 < resumed.evaluate()["eval_bits_per_byte"] < 20


if __name__ == "__main__":
    torch.set_num_threads(1)
    train_and_resume(Path(sys.argv[1]), sys.argv[2])
    print("bitwise identical", flush=True)
