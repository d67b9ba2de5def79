"""Run by test_loop.py under torchrun: train, resume from the middle, and compare."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.training_recipes import tiny_recipe
from toolkit.training.loop import Trainer

torch.set_num_threads(1)
folder = Path(sys.argv[1])
whole = Trainer(tiny_recipe(folder, run_name="two", train={"max_steps": 4}), quiet=True)
assert whole.accelerator.num_processes == 2
assert type(whole.forward).__name__ == "DistributedDataParallel"
whole.fit()
expected = {name: tensor.clone() for name, tensor in whole.hf_model.state_dict().items()}
saved = load_file(str(folder / "runs" / "two" / "checkpoints" / "step-000004" / "model.safetensors"))
whole.accelerator.wait_for_everyone()  # both have read before the resumed run removes it
assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.items())

resumed = Trainer(
    tiny_recipe(folder, run_name="two", train={"max_steps": 4}, resume_from_checkpoint="step-2"), quiet=True
)
assert resumed.step == 2
resumed.fit()
assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.hf_model.state_dict().items())
assert resumed.objective.state_dict() == whole.objective.state_dict()
print("bitwise identical", flush=True)
