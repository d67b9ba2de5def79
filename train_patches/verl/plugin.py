"""Importing this registers the rollout ``toolkit`` with verl: ``VERL_USE_EXTERNAL_MODULES=train_patches.verl.plugin``.

``TOOLKIT_VERL_CHECK=1`` in the environment makes verl's comparison of log-probabilities strict, see ``check``.
"""

import os
from typing import Any

from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

NAME = "toolkit"


def _replica() -> Any:
    from train_patches.verl.rollout import Replica

    return Replica


RolloutReplicaRegistry.register(NAME, _replica)
_ROLLOUT_REGISTRY[NAME, "async"] = "train_patches.verl.rollout.Adapter"

if os.environ.get("TOOLKIT_VERL_CHECK", "0") not in ("", "0"):
    from train_patches.verl.check import check_log_probs

    check_log_probs()
