"""The LoRA of a training client: which layers it adapts, how it begins, and its PEFT folder."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.patching.adapters import internal_name, is_adapter, unwrapped

ALPHA = 32
"""``lora_alpha`` of every rank: what is added is 32 / rank times B A x."""
MAX_RANK = 512
PREFIX = "base_model.model."
"""Before the names of a PEFT file."""
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|conv", re.IGNORECASE)
_BASE = ".base_layer"


@dataclass(frozen=True)
class LoraSettings:
    """What a client asks for at the beginning.

    Args:
        rank: of every layer; 0 for none, all weights of the model being trained.
        seed: of the first factors.
        train_attn: whether linear layers of attention and other mixers of tokens are adapted.
        train_mlp: whether all other linear layers are, but the head.
        train_unembed: whether the head is.

    Raises:
        ToolkitError: for a rank out of range, or no layers.

    Attributes:
        full: whether all weights are trained.
    """

    rank: int
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= MAX_RANK:
            raise ToolkitError(f"lora_config.rank must be >= 0 and <= {MAX_RANK}, got {self.rank}.")
        if self.full and not (self.train_attn and self.train_mlp and self.train_unembed):
            raise ToolkitError("lora_config.rank must be >= 1 where not all of attn, mlp and unembed train, got 0.")
        if not (self.train_attn or self.train_mlp or self.train_unembed):
            raise ToolkitError("lora_config must train attn, mlp or unembed, got none of them.")

    @property
    def full(self) -> bool:
        return self.rank == 0


def target_layers(model: Any, settings: LoraSettings) -> dict[str, nn.Linear]:
    """The linear layers that are adapted, by path, in the order of the model.

    Raises:
        ToolkitError: where experts would have to be adapted, or nothing is left.
    """
    head = unwrapped(model.get_output_embeddings())
    found = {}
    for path, module in _base_modules(model):
        if settings.train_mlp and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
            raise ToolkitError(f"lora_config.train_mlp must be False for a model with experts ({path}), got True.")
        if not isinstance(module, nn.Linear):
            continue
        wanted = settings.train_mlp
        if module is head:
            wanted = settings.train_unembed
        elif _ATTENTION.search(path):
            wanted = settings.train_attn
        if wanted:
            found[path] = module
    if not found:
        raise ToolkitError("lora_config must name layers that the model has, got none.")
    return found


def _base_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The modules of the model without adapters, by the paths that they have there."""
    inside = {id(part) for one in model.modules() if is_adapter(one) for part in _parts(one)}
    for path, module in model.named_modules():
        if id(module) not in inside and not is_adapter(module):
            yield path.replace(_BASE, ""), module


def _parts(wrapper: Any) -> Iterator[nn.Module]:
    """What a wrapper has beside the layer that it wraps."""
    for name, child in wrapper.named_children():
        if name != "base_layer":
            yield from child.modules()


def base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """All weights of the model without adapters, by its names.

    Raises:
        ToolkitError: where they are not float32, which Adam's steps need.
    """
    found: dict[nn.Parameter, str] = {}
    for path, module in _base_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != torch.float32:
                raise ToolkitError(f"lora_config.rank must be >= 1 for weights of {parameter.dtype}, got 0.")
            found.setdefault(parameter, f"{path}.{name}")  # tied weights once
    return {name: parameter for parameter, name in found.items()}


def new_factors(layers: Mapping[str, nn.Linear], settings: LoraSettings) -> dict[str, Tensor]:
    """The first factors by the names of a PEFT file: A uniform in +-1 / sqrt(inputs) from the seed, B zero."""
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    factors = {}
    for path, layer in layers.items():
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(settings.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        factors[f"{PREFIX}{path}.lora_A.weight"] = a
        factors[f"{PREFIX}{path}.lora_B.weight"] = torch.zeros(layer.out_features, settings.rank)
    return factors


def write_adapter(folder: Path, base: str, factors: Mapping[str, Tensor]) -> None:
    """A PEFT folder with these factors, which PEFT and ``Engine.load_adapter`` read.

    Args:
        folder: that there is.
        base: name or folder of the base model.
        factors: by the names of a PEFT file.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    paths = [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in factors if "lora_A" in name]
    config = LoraConfig(
        r=rank_of(factors), lora_alpha=ALPHA, target_modules=paths, base_model_name_or_path=base, task_type="CAUSAL_LM"
    )
    config.inference_mode = True
    config.save_pretrained(str(folder))
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in factors.items()}
    save_file(contents, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def rank_of(factors: Mapping[str, Tensor]) -> int:
    """The rank of an adapter's factors."""
    return next(len(tensor) for name, tensor in factors.items() if "lora_A" in name)


def factors_in(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's factors that are in the model, by the names of a PEFT file, in the order of the model.

    Args:
        adapter: the name that it was loaded under.
    """
    ends = {f".lora_{side}.{internal_name(adapter)}.weight": f".lora_{side}.weight" for side in "AB"}
    return {
        f"{PREFIX}{path.removesuffix(end).replace(_BASE, '')}{own}": parameter
        for path, parameter in model.named_parameters()
        for end, own in ends.items()
        if path.endswith(end)
    }
