"""Tensors of which each process has a shard (DTensors), and those that are whole."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole_of(tensor: Tensor) -> Tensor:
    """The whole tensor, on the device that the processes exchange. Of a shard, all processes must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    there: Any = tensor.to(tensor.device_mesh.device_type)  # NCCL does not gather what is offloaded
    whole: Tensor = there.full_tensor()
    return whole


def local_of(tensor: Tensor) -> Tensor:
    """What this process has of it: shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of ``whole`` that is sharded as ``like`` is, on its device; no process asks another one."""
    if not isinstance(like, DTensor):
        return whole.to(like.device, copy=True)
    shard = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return shard.to(like.to_local().device, copy=True)
