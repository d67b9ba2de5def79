"""Run by test_moe_balance.py under torchrun: two processes balance their experts together."""

import sys
from pathlib import Path

from tests.helpers.moe_recipes import moe_recipe
from tests.helpers.processes import end_with_same_weights

end_with_same_weights(
    moe_recipe(
        Path(sys.argv[1]),
        "dpo",
        {"router_z_loss_coef": 0.5, "router_aux_loss_coef": 0.0},
        run_name="two",
        train={"max_steps": 2},
    )
)
