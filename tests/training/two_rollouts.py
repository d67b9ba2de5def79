"""Run by test_grpo.py under torchrun: two processes roll out and train together."""

import sys
from pathlib import Path

from tests.helpers.objective_recipes import LOWER, objective_recipe
from tests.helpers.processes import end_with_same_weights

objective = {"task": LOWER, "prompts": 4, "num_generations": 4}
end_with_same_weights(objective_recipe(Path(sys.argv[1]), "grpo", objective, run_name="two", train={"max_steps": 2}))
