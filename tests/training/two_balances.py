"""Run by test_moe_balance.py under torchrun: two processes balance their experts together."""

import os
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from moe_recipes import moe_recipe

from toolkit.training.loop import Trainer

torch.set_num_threads(1)
recipe = moe_recipe(Path(sys.argv[1]), "dpo", {"z_loss": 0.5, "balance": 0.0}, name="two", train={"steps": 2})
trainer = Trainer(recipe, quiet=True)
assert trainer.accelerator.num_processes == 2
trainer.fit()
sums = gather_object([[parameter.double().sum().item() for parameter in trainer.hf_model.parameters()]])
assert sums[0] == sums[1]
print("same weights", flush=True)
os._exit(0)  # a thread of gloo that lets go of its last tensors while Python ends aborts the process now and then
