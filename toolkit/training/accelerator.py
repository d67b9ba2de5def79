"""accelerate, as a run needs it."""

import json
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType

from toolkit.config import Recipe
from toolkit.errors import ToolkitError

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of a run. Where accelerate is set up to shard parameters as the recipe does, the recipe does it.

    Raises:
        ToolkitError: where accelerate is set up to shard parameters in another way, to choose the precision, or for
            other processes than were launched.
    """
    _check_sharding(recipe)
    accelerator = Accelerator(step_scheduler_with_optimizer=False)
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ToolkitError(
            f"accelerate must be set up for one process or plain data parallel, got {accelerator.distributed_type}."
        )
    if accelerator.mixed_precision != "no":
        raise ToolkitError(
            f"accelerate's mixed_precision must be 'no', got '{accelerator.mixed_precision}'; the recipe's is "
            f"train.mixed_precision, which is '{recipe.train.mixed_precision}'."
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:  # they would write into one folder
        raise ToolkitError(
            f"accelerate must see the {launched} processes that were launched, got {accelerator.num_processes}; on "
            "CPUs set ACCELERATE_USE_CPU=true."
        )
    return accelerator


def _check_sharding(recipe: Recipe) -> None:
    """Compare what ``accelerate launch`` was told with the recipe; it is not told to accelerate."""
    asked = _asked_of_accelerate()
    strategy = recipe.train.distributed.strategy
    if asked is not None and asked != strategy:
        raise ToolkitError(
            f"train.distributed must be '{asked}', which accelerate is set up for, got '{strategy}'; or launch without "
            "that configuration."
        )
    for name in (_FSDP, _DEEPSPEED):
        os.environ.pop(name, None)


def _asked_of_accelerate() -> str | None:
    """The strategy by its name in a recipe; None where nothing is to be sharded.

    Raises:
        ToolkitError: one that recipes do not have.
    """
    env = os.environ
    if env.get(_FSDP, "").lower() == "true":
        version = env.get("FSDP_VERSION", "1")
        if version != "2":
            raise ToolkitError(f"fsdp_config.fsdp_version of accelerate must be 2, got {version}.")
        return "fsdp2"
    if env.get(_DEEPSPEED, "").lower() == "true":
        stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if file and file != "none":
            try:
                settings = json.loads(Path(file).read_text(encoding="utf-8"))
                stage = str(settings["zero_optimization"]["stage"])
            except (OSError, ValueError, KeyError, TypeError):
                stage = None
        if stage not in ("1", "2", "3"):
            raise ToolkitError(f"the ZeRO stage that accelerate is set up for must be 1, 2 or 3, got {stage}.")
        return f"zero{stage}"
    return None
