"""What an engine's memory is for, and how many sequences have room in it, for people."""

import bisect
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from toolkit.engine.config import GIB
from toolkit.engine.engine import Engine


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, tied ones once."""
    tensors = [part for one in (*model.parameters(), *model.buffers()) for part in _plain_parts(one)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _plain_parts(tensor: Tensor) -> list[Tensor]:
    """A tensor, or the tensors that a wrapper (a quantised weight) is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [one for part in parts for one in _plain_parts(part)]


def fitting_sequences(engine: Engine, length: int) -> int | None:
    """How many sequences of ``length`` tokens have room at the same time; None for any number."""
    manager, config = engine.block_manager, engine.config
    drafted = config.speculation.num_speculative_tokens if config.speculation is not None else 0
    size, chunk = manager.block_size, config.max_num_batched_tokens
    blocks_of_one = -(-(length - 1) // size)  # the state of the last token is never needed
    groups = [
        (group, allocator.num_blocks) for group, allocator in zip(manager.groups, manager.allocators, strict=True)
    ]
    if not groups:
        return None

    def too_many(sequences: int) -> bool:
        return any(
            room < (sequences * blocks_of_one if not group.lookback else 0)
            or (group.lookback and room < group.blocks_for(sequences * length, sequences, chunk, size, drafted))
            for group, room in groups
        )

    return bisect.bisect_left(range(1, max(room for _, room in groups) + 2), True, key=too_many)


def describe_memory(engine: Engine) -> str:
    """The memory plan as a block of lines: weights, state, and how many sequences of the longest length fit."""
    manager, config, length = engine.block_manager, engine.config, engine.max_sequence_len
    tokens, model = manager.max_sequence_tokens, getattr(engine.backend, "model", None)
    dtype = str(engine.backend.dtype).removeprefix("torch.")
    state = f"{engine.pool.bytes / GIB:.2f} GiB at most"
    if tokens is not None:
        state += f", for {tokens:,} tokens in blocks of {manager.block_size}"
    swap = config.swap_space
    preempted = (
        "no bound" if swap is None else f"{swap:g} GiB" if swap else "none: preempted sequences are computed again"
    )
    fits = fitting_sequences(engine, length)
    room = "any number of sequences" if fits is None else f"{fits:,} sequence{'s' * (fits != 1)}"
    lines = [
        f"memory plan on {engine.backend.device.type}, max_model_len {engine.max_model_len:,}:",
        f"  state       {state}",
        f"  swap space  {preempted}",
        f"  fits        {room} of {length:,} tokens",
        f"  a step      {engine.scheduler.max_running:,} sequences, {config.max_num_batched_tokens:,} tokens",
    ]
    if engine.offloading is not None:
        spaces = {"host": config.kv_host_space, "disk": config.kv_disk_space}
        shown = (f"{name} {'no bound' if space is None else f'{space:g} GiB'}" for name, space in spaces.items())
        lines.insert(3, f"  offloading  {', '.join(shown)}")
    if model is not None:
        lines.insert(1, f"  weights     {weight_bytes(model) / GIB:.2f} GiB, {dtype}")
    return "\n".join(lines)
