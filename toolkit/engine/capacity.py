"""How much state an engine has room for."""

import math
from collections import abc
from dataclasses import replace
from pathlib import Path

import torch

from toolkit.engine.backend import Backend
from toolkit.engine.config import EngineConfig
from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.machine import memory_bytes
from toolkit.state import BlockManager, Group, StatePool, StateSpec
from toolkit.state.offloading import PrefixOffloading

_CPU_SHARE = 4  # a pool takes 1 / this of the memory at most


def chosen_specs(backend: Backend, config: EngineConfig, max_model_len: int) -> list[StateSpec]:
    """What each layer remembers, in the kinds that the configuration asks for."""
    specs, kinds = list(backend.layers()), config.kinds or {}
    for kind, option, lacking in (
        ("routing", "enable_return_routed_experts", "layer of experts (role 'experts')"),
        ("selection", "enable_return_selected_keys", "layer of sparse attention (role 'attention')"),
    ):
        if not getattr(config, option):
            specs = [spec for spec in specs if spec.kind != kind]
        elif all(spec.kind != kind for spec in specs):
            raise ToolkitError(f"{option} must be False for a model without a patched {lacking}, got True.")
    if config.keeps_hidden:
        width = getattr(backend, "hidden_size", 0)
        if not width:
            raise ToolkitError("method of speculative_config must be another than 'mtp' for this backend.")
        specs.append(StateSpec(0, "hidden", ((1, width),)))
    widths = [spec.shapes[0][1] for spec in specs if spec.kind == "selection"]
    if widths:  # one width for all layers, and no more keys than a sequence has
        shapes = ((1, min(max(widths), max_model_len)),)
        specs = [replace(spec, shapes=shapes) if spec.kind == "selection" else spec for spec in specs]
    known = sorted({spec.kind for spec in specs})
    for name in kinds:
        if name not in known:
            raise ToolkitError(must_be_one_of("a key of kinds", name, known))
    return [replace(spec, kind=kinds.get(spec.kind, spec.kind)) for spec in specs]


def chosen_max_model_len(backend: Backend, asked: int | str | None) -> int:
    """Most tokens of a sequence. Raises ToolkitError for more than the model was made for."""
    most = backend.max_model_len
    if isinstance(asked, str):  # "auto"
        return most
    if asked is not None and asked > most and not getattr(backend, "grows", False):
        raise ToolkitError(f"max_model_len must be <= {most}, which the model was made for, got {asked}.")
    return most if asked is None else asked


def block_counts(
    specs: abc.Sequence[StateSpec], backend: Backend, config: EngineConfig, sequences: int, max_model_len: int
) -> dict[Group, int]:
    """Blocks of each group: for ``sequences`` of ``max_model_len`` tokens, or as many as fit in the memory for state.

    That memory is 80 % of what a GPU has free, and a quarter of the machine's or container's on a CPU, where only what
    is written takes any. ``config.num_blocks`` overrides both.
    """
    size, chunk = config.block_size, config.max_num_batched_tokens
    drafted = config.speculation.num_speculative_tokens if config.speculation is not None else 0
    block_bytes = StatePool.block_bytes(list(specs), size, backend.dtype)

    def counts(most: int) -> dict[Group, int]:
        of_groups = {group: group.blocks_for(most * size, sequences, chunk, size, drafted) for group in block_bytes}
        return {group: min(most, count) for group, count in of_groups.items()}

    if config.num_blocks is not None:
        return counts(config.num_blocks)
    if backend.device.type == "cuda":
        memory = int(0.8 * torch.cuda.mem_get_info(backend.device)[0])
    else:
        memory = memory_bytes() // _CPU_SHARE
    memory = getattr(backend, "least", int)(memory)  # ranks have equally many
    blocks = sequences * math.ceil(max_model_len / size)
    while blocks > 1 and sum(block_bytes[group] * count for group, count in counts(blocks).items()) > memory:
        blocks = max(1, blocks * 15 // 16)
    return counts(blocks)


def new_state(
    backend: Backend, config: EngineConfig, sequences: int, max_model_len: int
) -> tuple[StatePool, BlockManager]:
    """The state of ``sequences`` of at most ``max_model_len`` tokens, and who hands out its blocks."""
    specs, size = chosen_specs(backend, config, max_model_len), config.block_size
    blocks = block_counts(specs, backend, config, sequences, max_model_len)
    pool = StatePool(specs, blocks, size, backend.dtype, backend.device)
    return pool, BlockManager(pool.groups, [blocks[group] for group in pool.groups], size)


def new_offloading(config: EngineConfig, pool: StatePool, block_manager: BlockManager) -> PrefixOffloading | None:
    """What a pool's cached prefixes are offloaded to, if anything. Raises ToolkitError for a bad folder."""
    host, disk = config.kv_bytes
    if host == disk == 0:
        return None
    folder = None if config.kv_disk_folder is None else Path(config.kv_disk_folder)
    try:
        return PrefixOffloading(pool, block_manager, host, disk, folder)
    except OSError as error:
        raise ToolkitError(f"kv_disk_folder must be a folder that can be written, got '{folder}': {error}.") from None
