"""Run by test_moe_balance.py under torchrun: two processes balance their experts together."""

import sys
from pathlib import Path

from moe_recipes import moe_recipe
from processes import end_with_same_weights

end_with_same_weights(
    moe_recipe(Path(sys.argv[1]), "dpo", {"z_loss": 0.5, "balance": 0.0}, name="two", train={"steps": 2})
)
