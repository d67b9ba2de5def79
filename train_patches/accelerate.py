"""Expert parallelism in a loop of accelerate's: shard before ``prepare``, clip and save through what comes back.

A patched model needs nothing of this file to be trained by accelerate; where accelerate keeps parameters in parts,
``train_patches.fsdp`` or ``train_patches.deepspeed`` gathers them for a phase of rollout (docs/distributed.md).

accelerator = Accelerator()
toolkit.patch(model)
sharded = expert_parallel(accelerator, model)
optimizer = torch.optim.AdamW(model.parameters())
model, optimizer = accelerator.prepare(model, optimizer)
...
accelerator.backward(loss)
sharded.reduce()
sharded.clip(model.parameters(), 1.0)
optimizer.step()
...
with sharded.gathered():  # on every process
    if accelerator.is_main_process:
        toolkit.export(accelerator.unwrap_model(model), path)
"""

from typing import TYPE_CHECKING

from torch import nn

from toolkit.errors import ToolkitError
from toolkit.moe.sharding import ShardedExperts, expert_groups, shard_experts
from toolkit.patching import expert_layers

if TYPE_CHECKING:
    from accelerate import Accelerator


def expert_parallel(
    accelerator: "Accelerator", model: nn.Module, size: int | None = None, chunks: int = 2
) -> ShardedExperts:
    """Share the experts of a patched model out to accelerate's processes, before ``accelerator.prepare(model)``.

    size: processes that share a layer's experts, None for all. chunks: see ``toolkit.moe.ExpertParallel``. Every
    process must hold equal parameters, make as many forwards and backwards as the others, and call ``reduce`` and
    ``clip`` of the result in the place of ``accelerator.clip_grad_norm_``, to which a part of the experts is all.
    Raises ToolkitError where accelerate shards parameters itself (FSDP; DeepSpeed has ``train_patches.deepspeed``) or
    scales the loss, for a model without patched experts, and for sizes that do not divide.
    """
    from accelerate.utils import DistributedType

    allowed = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in allowed or accelerator.mixed_precision == "fp16":
        raise ToolkitError(
            f"accelerate is set up for {accelerator.distributed_type} and mixed_precision "
            f"{accelerator.mixed_precision!r}; allowed are one process and plain data parallel without 'fp16'."
        )
    group, replicas = expert_groups(size)
    return shard_experts(model, expert_layers(model), group, chunks=chunks, replicas=replicas)
