"""Run by test_indexer_loss.py under torchrun: two processes train their indexers together."""

import sys
from pathlib import Path

from tests.helpers.processes import end_with_same_weights
from tests.helpers.sparse_recipes import sparse_recipe

end_with_same_weights(
    sparse_recipe(Path(sys.argv[1]), "dpo", float(sys.argv[2]), run_name="two", train={"max_steps": 2})
)
