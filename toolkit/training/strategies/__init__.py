"""How the processes of a run share its model: ``train.distributed`` of a recipe, one file per framework.

``base``  each process has all of it: plain data parallel, expert parallel
``fsdp2`` torch's ``fully_shard``
``zero``  DeepSpeed's ZeRO-1, 2 and 3
``tensor_parallel``  transformers' ``tp_plan``
"""

from typing import TYPE_CHECKING

from toolkit.training.strategies.base import Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator

    from toolkit.config import Recipe

__all__ = ["Strategy", "make_strategy"]


def make_strategy(recipe: "Recipe", accelerator: "Accelerator") -> Strategy:
    """The strategy of a recipe; that of plain data parallel in one process, which has nothing to share."""
    distributed = recipe.train.distributed
    if not distributed.shards or accelerator.num_processes == 1:
        return Strategy(recipe, accelerator)
    if distributed.by_deepspeed:
        from toolkit.training.strategies.zero import Zero

        return Zero(recipe, accelerator)
    if distributed.same_data:
        from toolkit.training.strategies.tensor_parallel import SplitModel

        return SplitModel(recipe, accelerator)
    from toolkit.training.strategies.fsdp2 import FSDP2

    return FSDP2(recipe, accelerator)
