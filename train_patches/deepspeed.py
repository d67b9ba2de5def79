"""DeepSpeed: rollout under ZeRO-3, and expert parallelism under ZeRO-1 and 2.

A patched model trains under every stage as it is. What else needs parameters under ZeRO-3 finds them in ``gathered``:

    with gathered(model):  # on every process, once a rollout phase
        completions = engine.generate(prompts, params)

Experts over our exchange, the rest as DeepSpeed has it:

    toolkit.patch(model)
    sharded = expert_parallel(model)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ...
    engine.backward(loss)
    engine.step()
    ...
    state = gather_state_dict(model, sharded)  # on every process; full layout

DeepSpeed tells expert parameters by ``allreduce = False`` and ``group_name``, partitions their optimizer state over
the ranks that hold the same experts, divides their gradients by the number of all ranks and adds their norm up.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import nn

from toolkit.errors import ToolkitError
from toolkit.moe.sharding import ShardedExperts, gather_state_dict, group_size, shard_experts
from toolkit.patching import expert_layers
from toolkit.patching.sharding import gathering

__all__ = ["expert_parallel", "gather_state_dict", "gathered", "parameter_groups"]

MARK = "deepspeed_experts"
"""A child without parameters, of the first layer of experts, by which DeepSpeed's engine sees that there are some."""


def gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Inside of the block every parameter is whole in every process: for patching, an engine, export, evaluation.

    model: what ``deepspeed.initialize`` was given, or one made under ``deepspeed.zero.Init``, or DeepSpeed's engine.
    Parameters are gathered once, used for as many forwards as there are, and partitioned again at the end; training
    goes on as before. All processes must enter it, between an optimizer's step and the next forward. Inside, they need
    not do the same. Each needs the memory for the whole model. What is written to parameters inside is lost.
    Under the other stages parameters are whole anyway; DeepSpeed's hooks, which keep the engine from its recorded
    programs, do not run inside.
    """
    import deepspeed

    model = getattr(model, "module", model)  # of an engine
    parameters = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    return gathering(model, "deepspeed", [deepspeed.zero.GatheredParameters(parameters)] if parameters else [])


def expert_parallel(model: nn.Module, size: int | None = None, chunks: int = 2) -> ShardedExperts:
    """Share the experts of a patched model out to the processes, before ``deepspeed.initialize``.

    size: processes that share a layer's experts, None for all. chunks: see ``toolkit.moe.ExpertParallel``. Every
    process must hold equal parameters. The groups are DeepSpeed's own, and it averages and clips gradients: ``reduce``
    and ``clip`` of the result are not to be called. ``engine.save_checkpoint`` does not know these experts; save what
    ``gather_state_dict`` gives.
    Raises ToolkitError unless ``deepspeed.init_distributed`` was called, and for sizes that do not divide.
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
        """No layer: DeepSpeed's engine looks for modules of this class."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """The groups are there."""

    return Mark()


def parameter_groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Groups for an optimizer that DeepSpeed takes: experts apart from the rest, each group with ``settings``."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return split_params_into_different_moe_groups_for_optimizer({"params": trained, "name": "dense", **settings})
