"""Torch's FSDP2 (``fully_shard``): patch before sharding, roll out inside of ``gathered``.

    toolkit.patch(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ...
    with gathered(model):  # on every process, once a rollout phase
        completions = engine.generate(prompts, params)

Accelerate shards in ``accelerator.prepare(model, optimizer)``; all else is the same.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, cast

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.patching.sharding import gathering

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Inside of the block every parameter of ``model`` is whole in every process: for an engine, export, evaluation.

    Gathered once, used for as many forwards as there are, and sharded again at the end; training goes on as before.
    All processes must enter it, between an optimizer's step and the next forward. Inside, they need not do the same.
    Each needs the memory for the whole model. What is written to parameters inside is lost.
    With a mixed-precision policy parameters are gathered in its ``param_dtype``: make the engine inside as well.
    Raises ToolkitError for a model that ``fully_shard`` was not applied to.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [cast("FSDPModule", module) for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        raise ToolkitError(f"{type(model).__name__} is not sharded; gathered(model) needs fully_shard(model) before.")
    return gathering(model, "torch.distributed.fsdp", [_unsharded(unit) for unit in units])


@contextmanager
def _unsharded(unit: "FSDPModule") -> Iterator[None]:
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
