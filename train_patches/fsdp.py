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

from contextlib import AbstractContextManager

from torch import nn

from toolkit.patching.sharding import gathered_fsdp


def gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, every process has all parameters of ``model``: for an engine, an export, an evaluation.

    Parameters are gathered once, at the start, and sharded again at the end. All processes must enter, between an
    optimizer step and the next forward; inside they need not do the same. Each needs memory for the whole model. Writes
    to parameters inside are lost. With a mixed-precision policy parameters are gathered in its ``param_dtype``: create
    the engine inside too.

    Raises:
        ToolkitError: ``fully_shard`` was not applied to the model.
    """
    return gathered_fsdp(model)
