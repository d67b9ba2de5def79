"""Run by test_grpo.py under torchrun: two processes roll out and train together."""

import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from objective_recipes import LOWER, objective_recipe

from toolkit.training.loop import Trainer

torch.set_num_threads(1)
objective = {"task": LOWER, "prompts": 4, "group": 4}
recipe = objective_recipe(Path(sys.argv[1]), "grpo", objective, name="two", train={"steps": 2})
trainer = Trainer(recipe, quiet=True)
assert trainer.accelerator.num_processes == 2
trainer.fit()
sums = gather_object([[parameter.double().sum().item() for parameter in trainer.hf_model.parameters()]])
assert sums[0] == sums[1]
print("same weights", flush=True)
os._exit(0)  # a thread of gloo that lets go of its last tensors while Python ends aborts the process now and then
