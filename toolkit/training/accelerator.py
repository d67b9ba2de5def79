"""accelerate, as a run needs it."""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from toolkit.config import Recipe
from toolkit.errors import ToolkitError

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(recipe: Recipe) -> Accelerator:
    """The accelerator of a run.

    Raises:
        ToolkitError: where accelerate is set up to shard parameters, or to choose the precision.
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
    return accelerator
