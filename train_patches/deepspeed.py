"""DeepSpeed: rollout under ZeRO-3, and expert parallelism under ZeRO-1 and 2.

A patched model trains under every stage as it is. Other code that needs parameters under ZeRO-3 runs in ``gathered``:

    with gathered(model):  # on every process, once per rollout phase
        completions = engine.generate(prompts, params)

Expert parallelism through our dispatcher, everything else through DeepSpeed:

    toolkit.patch(model)
    sharded = expert_parallel(model)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ...
    engine.backward(loss)
    engine.step()
    ...
    state = gather_state_dict(model, sharded)  # on every process; full layout

DeepSpeed recognises expert parameters by ``allreduce = False`` and ``group_name``, partitions their optimizer state
over the ranks that hold the same experts, divides their gradients by the number of all ranks and sums their norm.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import nn

from toolkit.errors import ToolkitError
from toolkit.moe.sharded_parameters import gather_state_dict
from toolkit.moe.sharding import ShardedExperts, group_size, shard_experts
from toolkit.patching import expert_layers
from toolkit.patching.sharding import gathered_zero

__all__ = ["expert_parallel", "gather_state_dict", "gathered", "parameter_groups"]

MARK = "deepspeed_experts"
"""A child of the first MoE layer, without parameters, by which DeepSpeed's engine recognises an MoE model."""


def gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Inside the block every process has all parameters: for patching, an engine, export, evaluation.

    Parameters are gathered once, used for any number of forwards, and partitioned again at the end; training continues
    as before. All processes must enter it, between an optimizer's step and the next forward. Inside, they need not do
    the same. Each needs the memory for the full model. Writes to parameters inside are lost. Under the other stages
    parameters are not partitioned. DeepSpeed's hooks, with which the engine cannot replay captured graphs, are off.

    Args:
        model: what ``deepspeed.initialize`` was given, or made under ``deepspeed.zero.Init``, or DeepSpeed's engine.
    """
    return gathered_zero(model)


def expert_parallel(model: nn.Module, size: int | None = None, chunks: int = 2) -> ShardedExperts:
    """Shards the experts of a patched model over the processes, before ``deepspeed.initialize``.

    Every process must hold equal parameters. The groups are DeepSpeed's, and it averages and clips gradients: do not
    call ``reduce`` and ``clip`` of the result. ``engine.save_checkpoint`` does not know these experts; save what
    ``gather_state_dict`` returns.

    Args:
        model: a patched model.
        size: processes that a layer's experts are sharded over; None for all.
        chunks: of ``toolkit.moe.ExpertParallelDispatcher``.

    Raises:
        ToolkitError: unless ``deepspeed.init_distributed`` was called, and for a size that does not divide the
            processes or the experts.
    """
    from deepspeed.utils import groups

    if not dist.is_initialized():
        raise ToolkitError("torch.distributed has no process group; call deepspeed.init_distributed() first.")
    size = group_size(size)
    name = f"ep_size_{size}"
    groups._create_expert_and_data_parallel(size)
    layers = expert_layers(model)
    group = groups._get_expert_parallel_group(name)
    sharded = shard_experts(model, layers, group, chunks=chunks, average=False)
    for parameter in sharded.parameters.values():
        mark: Any = parameter
        mark.allreduce, mark.group_name = False, name
    first = next(iter(layers))
    first.add_module(MARK, _mark(len(getattr(first, layers[first][0])) * size))
    return sharded


def _mark(num_experts: int) -> nn.Module:
    from deepspeed.moe.layer import MoE

    class Mark(MoE):
        """Not a layer: DeepSpeed's engine looks for modules of this class."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """The groups exist already."""

    return Mark()


def parameter_groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer under DeepSpeed: experts apart from the rest, each group with ``settings``."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = split_params_into_different_moe_groups_for_optimizer(
        {"params": trained, "name": "dense", **settings}
    )
    return groups
