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
        stem, _, kind = name.rpartition(".")
        found = self._map.get_name(stem)
        if found is None or kind not in ("weight", "bias"):
            raise ToolkitError(
                f"An export to {self._target!r} cannot hold the tensor '{name}': llama.cpp has none such."
            )
        return f"{found}.{kind}"


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
        change = changed(name, config, family)
        shape = (shape[0], shape[2]) if name.endswith("conv.conv.weight") else shape
        yield Named(names.of(name), shape, partial(_changed, read, name, change))


def _stacked(read: "Reader", names: Sequence[str]) -> Tensor:
    return torch.stack([read(name) for name in names])


def _changed(read: "Reader", name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(read(name))


def changed(name: str, config: Any, family: Family) -> Callable[[Tensor], Tensor]:
    """What happens to a tensor's values."""
    if family.interleaved_rotary and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        return lambda weight: permuted(weight, heads)
    if family.norm_offset and name.endswith("norm.weight"):
        return lambda weight: weight.float() + 1
    if name.endswith("conv.conv.weight"):
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
