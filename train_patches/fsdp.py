"""Torch's FSDP2 (``fully_shard``): patch before sharding, roll out inside ``gathered``.

    toolkit.patch(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ...
    with gathered(model):  # on every process, once per rollout phase
        completions = engine.generate(prompts, params)

With accelerate, ``accelerator.prepare(model, optimizer)`` shards; the rest is the same.
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
    """Inside, every process has all parameters of ``model``: for an engine, an export, an evaluation.

    Parameters are gathered once, at the start, and sharded again at the end. All processes must enter, between an
    optimizer step and the next forward; inside they need not do the same. Each needs memory for the whole model. Writes
    to parameters inside are lost. With a mixed-precision policy parameters are gathered in its ``param_dtype``: create
    the engine inside too.

    Raises:
        ToolkitError: ``fully_shard`` was not applied to the model.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [cast("FSDPModule", module) for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        raise ToolkitError(f"{type(model).__name__} is not sharded; call fully_shard(model) before gathered(model).")
    return gathering(model, "torch.distributed.fsdp", [_unsharded(unit) for unit in units])


@contextmanager
def _unsharded(unit: "FSDPModule") -> Iterator[None]:
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()
