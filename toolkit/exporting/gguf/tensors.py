"""A checkpoint's tensors under GGUF's names, in the layout that llama.cpp reads."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.exporting.gguf.families import Family
from toolkit.exporting.gguf.rotary import rotary_factors
from toolkit.loading.tensors import tensor_headers, weight_files

_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")
_UNTIED = "lm_head.weight"
_JOINED = "linear_attn.in_proj_qkvz"
"""Queries, keys, values and gates of a gated delta net; llama.cpp has the gates apart."""
_PARTS = "linear_attn.in_proj_qkv", "linear_attn.in_proj_z"
_CONVOLUTIONS = "conv.conv.weight", "linear_attn.conv1d.weight"
_BIAS = "linear_attn.dt_bias", "linear_attn.dt_proj.bias"
_DECAY = "linear_attn.A_log"


class Named(NamedTuple):
    """A tensor that will be written. read: makes it; shape: of what it makes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (transformers) to neighbours (llama.cpp's "normal" rotation)."""
    size = weight.shape[0] // heads
    return weight.reshape(heads, 2, size // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


class Names:
    """GGUF's names of a model's tensors.

    Args:
        family: of the model.
        layers: number of them.
    """

    def __init__(self, family: Family, layers: int, target: str) -> None:
        import gguf

        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        self._map = gguf.get_tensor_name_map(numbers[family.arch], layers)
        self._target = target

    def of(self, name: str) -> str:
        """GGUF's name. Raises ToolkitError for a tensor that llama.cpp's architecture does not have."""
        if name.endswith(_DECAY) and (decay := self._map.get_name(name)) is not None:
            return str(decay)  # without a suffix
        stem, _, kind = name.replace(*_BIAS).rpartition(".")
        found = self._map.get_name(stem)
        if found is None or kind not in ("weight", "bias"):
            raise ToolkitError(
                f"An export to {self._target!r} cannot hold the tensor '{name}': llama.cpp has none such."
            )
        return f"{found}.{kind}"

    def parts(self, name: str) -> tuple[str, ...]:
        """GGUF's names of the tensors that a tensor of the checkpoint becomes, by its rows: one, or two."""
        return tuple(self.of(name.replace(_JOINED, part)) for part in (_PARTS if _JOINED in name else (_JOINED,)))


def named_tensors(folder: Path, config: Any, family: Family, head_size: int, target: str) -> Iterator[Named]:
    """All tensors of the checkpoint in ``folder``, and llama.cpp's factors of rotary frequencies.

    Experts of a layer become one tensor [experts, rows, columns].
    """
    names, headers = Names(family, config.num_hidden_layers, target), tensor_headers(folder)
    read = Reader(folder)
    factors = rotary_factors(config, head_size)
    if factors is not None:
        yield Named("rope_freqs.weight", tuple(factors.shape), lambda: factors)
    experts: dict[tuple[str, str], dict[int, str]] = {}
    for name in headers:
        match = _EXPERT.match(name)
        if match:
            experts.setdefault((match[1], match[3]), {})[int(match[2])] = name
    for (prefix, part), members in experts.items():
        ordered = [members[index] for index in sorted(members)]
        shape = (len(ordered), *headers[ordered[0]][1])
        yield Named(names.of(f"{prefix}.{part}.weight"), shape, partial(_stacked, read, ordered))
    for name, (_, shape) in headers.items():
        if _EXPERT.match(name) or (name == _UNTIED and config.tie_word_embeddings):
            continue
        if _JOINED in name:
            for part, rows in zip(names.parts(name), delta_net_rows(config)):
                yield Named(part, (len(rows), *shape[1:]), partial(_rows, read, name, rows))
            continue
        change = changed(name, config, family)
        shape = (shape[0], shape[2]) if name.endswith(_CONVOLUTIONS) else shape
        yield Named(names.of(name), shape, partial(_changed, read, name, change))


def delta_net_rows(config: Any) -> tuple[Tensor, Tensor]:
    """Rows of ``in_proj_qkvz`` that are (queries, keys, values) and gates.

    transformers has them by key heads: each one's query, key, values and gates of the value heads that share it.
    """
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    shared = values * (config.linear_num_value_heads // config.linear_num_key_heads)
    rows = torch.arange(config.linear_num_key_heads * 2 * (keys + shared)).view(config.linear_num_key_heads, -1)
    query, key, value, gate = (part.flatten() for part in rows.split([keys, keys, shared, shared], dim=1))
    return torch.cat([query, key, value]), gate


def _rows(read: "Reader", name: str, rows: Tensor) -> Tensor:
    return read(name)[rows]


def _stacked(read: "Reader", names: Sequence[str]) -> Tensor:
    return torch.stack([read(name) for name in names])


def _changed(read: "Reader", name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(read(name))


def changed(name: str, config: Any, family: Family) -> Callable[[Tensor], Tensor]:
    """What happens to a tensor's values."""
    if family.interleaved_rotary and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return lambda weight: permuted(weight, heads)
    if family.norm_offset and name.endswith("norm.weight") and "linear_attn.norm" not in name:
        return lambda weight: weight.float() + 1
    if name.endswith(_DECAY):
        return lambda weight: -weight.float().exp()
    if name.endswith(_CONVOLUTIONS):
        return lambda weight: weight.squeeze(1)
    return lambda weight: weight


class Reader:
    """Reads a folder's tensors by name, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        for name in weight_files(folder):
            file = self._open.enter_context(safe_open(folder / name, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __call__(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor
