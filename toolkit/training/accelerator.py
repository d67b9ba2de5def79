"""accelerate, as a run needs it."""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType

from toolkit.config import Recipe
from toolkit.errors import ToolkitError

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ToolkitError: where accelerate is set up to shard parameters, to choose the precision, or for other processes
            than were launched.
    """
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
