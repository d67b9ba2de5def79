"""Run by test_precision.py under torchrun: two processes train 16-bit weights together, and weights of 8 bits."""

import sys
from pathlib import Path

from tests.helpers.processes import end_with_same_weights
from tests.helpers.training_recipes import tiny_recipe, write_corpus

folder, precision = Path(sys.argv[1]), sys.argv[2]
write_corpus(folder / "text")
mixed = {"train": {"max_steps": 4, "gradient_accumulation_steps": 2, "mixed_precision": precision}}
pure = {"model": {"dtype": "bfloat16"}, "optimizer": {"bf16_stochastic_round": True}, "train": {"max_steps": 4}}
rounded = {"model": {"quantise": "int8"}, "train": {"max_steps": 4, "gradient_accumulation_steps": 2}}
end_with_same_weights(tiny_recipe(folder, **{"stochastic": pure, "rounded": rounded}.get(precision, mixed)))
