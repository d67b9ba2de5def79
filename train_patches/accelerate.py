"""Expert parallelism in a training loop on accelerate: shard before ``prepare``, clip and save through the result.

accelerate trains a patched model without this file. Where it shards parameters, ``train_patches.fsdp`` or
``train_patches.deepspeed`` gathers them for a rollout phase (docs/distributed.md).

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
    """Shards the experts of a patched model over accelerate's processes, before ``accelerator.prepare(model)``.

    Every process must hold equal parameters, run as many forwards and backwards as the others, and call ``reduce`` and
    ``clip`` of the result instead of ``accelerator.clip_grad_norm_``, which would take a shard of the experts for all.

    Args:
        accelerator: one process or plain data parallel, without "fp16".
        model: a patched model.
        size: processes that a layer's experts are sharded over; None for all.
        chunks: of ``toolkit.moe.ExpertParallelDispatcher``.

    Raises:
        ToolkitError: where accelerate shards parameters itself (FSDP; for DeepSpeed see ``train_patches.deepspeed``) or
            scales the loss, for a model without patched experts, and for a size that does not divide the processes or
            the experts.
    """
    from accelerate.utils import DistributedType

    allowed = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in allowed or accelerator.mixed_precision == "fp16":
        raise ToolkitError(
            "Expert parallelism under accelerate needs one process or plain data parallel, and mixed_precision other "
            f"than 'fp16', got {accelerator.distributed_type} and {accelerator.mixed_precision!r}."
        )
    group, replicas = expert_groups(size)
    return shard_experts(model, expert_layers(model), group, chunks=chunks, replicas=replicas)
