"""A Hugging Face folder with weights in compressed-tensors' formats, which vLLM and transformers open."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.exporting.base import ConsumerOutput, ExportJob, ExportTarget
from toolkit.exporting.hf import check_whole_model, stock_outputs, write_checkpoint
from toolkit.exporting.manifest import installed_version
from toolkit.loading.source import CONFIG, read_json
from toolkit.loading.tensors import INDEX, weight_files
from toolkit.quantised import QuantisedWeight
from toolkit.quantised.stored.compressed_tensors import HELD, write
from toolkit.quantised.stored.parts import packed

GROUPS = (128, 64, 32)
"""Input columns that share a scale: the first that divides those of every layer; where none does, a row has one."""
_LEAST_SCALE = 2.0**-24
"""The smallest number of float16 above 0."""
FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max
VERSION = "0.20.1"
"""Of the format that is written."""


class CompressedTensors(ExportTarget, name="compressed-tensors"):
    """Linear layers but the head have 8- or 4-bit integers (w8a16, w4a16) or float8 (fp8); all else keeps its dtype.

    Of a quantised model the codes themselves are written.
    """

    formats = ("w8a16", "w4a16", "fp8")
    takes_quantised = True

    def format_of(self, model: Any) -> str | None:
        forms = {HELD.get(weight.format) for weight in coded_layers(model).values()}
        return forms.pop() if len(forms) == 1 else None

    def check(self, job: ExportJob) -> None:
        check_whole_model(job, self.target)
        if any(name.endswith(".experts") for name, _ in job.model.named_modules()):
            raise ToolkitError(
                f"An export to {self.target!r} cannot hold experts, got a {type(job.model).__name__}: transformers "
                "keeps them in one tensor, which is no linear layer."
            )
        if not linear_layers(job.model):
            raise ToolkitError(f"An export to {self.target!r} needs linear layers, got a {type(job.model).__name__}.")
        for name, weight in coded_layers(job.model).items():
            if HELD.get(weight.format) != job.quantise:
                raise ToolkitError(
                    f"model must be dense, or quantised to one format that {job.quantise} holds, got {name} in "
                    f"{weight.format}; dequantise it first (toolkit.quantised.dequantise)."
                )

    def write(self, job: ExportJob, folder: Path) -> None:
        write_checkpoint(job, folder)
        layers = linear_layers(job.model)
        group = next((size for size in GROUPS if not any(layer.in_features % size for layer in layers.values())), None)
        form = job.quantise or self.formats[0]
        coded = {name: _codes(name, weight) for name, weight in coded_layers(job.model).items()}
        kinds = [kind for _, kind in coded.values()]
        if any(kind != kinds[0] for kind in kinds):
            raise ToolkitError(f"An export to {self.target!r} has one layout of scales, got {kinds[0]} and others.")
        names = {f"{name}.weight": name for name in coded or layers}
        shards: dict[str, str] = {}
        found: set[str] = set()
        for file in weight_files(folder):
            tensors: dict[str, Tensor] = {}
            for name, tensor in load_file(folder / file).items():
                if name in names:
                    found.add(name)
                    parts = coded[names[name]][0] if coded else compressed(tensor, form, group)
                    tensors |= {f"{names[name]}.{key}": value for key, value in parts.items()}
                else:
                    tensors[name] = tensor
            save_file(tensors, folder / file, metadata={"format": "pt"})
            shards |= dict.fromkeys(tensors, file)
        if found != set(names):
            raise ToolkitError(
                f"An export to {self.target!r} names layers as the checkpoint does, which has no "
                f"'{min(set(names) - found)}'."
            )
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX)
            index["weight_map"] = shards
            index["metadata"] = {"total_size": sum((folder / name).stat().st_size for name in set(shards.values()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        config = read_json(folder / CONFIG)
        if coded:
            kept = [name for name, one in job.model.named_modules() if isinstance(one, nn.Linear) and name not in coded]
            config["quantization_config"] = configuration(kinds[0], None, kept)
        else:
            config["quantization_config"] = settings(form, group, kept_layers(job.model))
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def consume(self, folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> ConsumerOutput | None:
        if importlib.util.find_spec("compressed_tensors") is None:
            return None
        names = ("transformers", "compressed-tensors")
        versions = ", ".join(f"{name} {installed_version(name)}" for name in names)
        return ConsumerOutput(versions, stock_outputs(folder, prompts, max_tokens))


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The layers whose weights are compressed, by name: all linear ones but the head."""
    kept = set(kept_layers(model))
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and name not in kept}


def coded_layers(model: Any) -> dict[str, QuantisedWeight]:
    """The quantised weights of linear layers, by the layer's name."""
    return {
        name: one.weight
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and isinstance(one.weight, QuantisedWeight)
    }


def _codes(name: str, weight: QuantisedWeight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return write(weight)
    except ToolkitError as error:
        raise ToolkitError(f"layer {name} cannot be exported as it is: {error}") from None


def kept_layers(model: Any) -> list[str]:
    """Names of linear layers whose weights keep their dtype: the head."""
    head = model.get_output_embeddings()
    return [name for name, one in model.named_modules() if one is head]


def compressed(weight: Tensor, form: str, group: int | None) -> dict[str, Tensor]:
    """The tensors that stand for a weight, by what follows the layer's name.

    Args:
        weight: [rows, columns].
        form: one of the target's formats.
        group: columns that share a scale, of integers; None for all of a row. float8 has a scale for each row.
    """
    values = weight.float()
    if form == "fp8":
        scale = (values.abs().amax(-1, keepdim=True) / FP8_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        scale = scale.to(weight.dtype)
        scaled = (values / scale.float()).clamp(-FP8_LARGEST, FP8_LARGEST)
        return {"weight": scaled.to(torch.float8_e4m3fn), "weight_scale": scale}
    bits = 8 if form == "w8a16" else 4
    half = 2 ** (bits - 1)
    rows = values.unflatten(-1, (-1, group or values.shape[-1]))
    # The largest value lies half a step beyond the largest integer, so that no value is off by more than half a step.
    scale = (rows.abs().amax(-1) / (half - 0.5)).clamp(min=torch.finfo(torch.float32).tiny).to(weight.dtype)
    if bits == 8 and group is not None:  # as q8_0 has them, so that the folder opens here as that format
        up = scale.float() * (1 + 2.0**-11)  # not below what the largest value needs
        scale = up.clamp(_LEAST_SCALE, torch.finfo(torch.float16).max).half().to(weight.dtype)
    whole = (rows / scale.float().unsqueeze(-1)).round().clamp(-half, half - 1).flatten(-2)
    return {
        "weight_packed": packed(whole.to(torch.int32) + half, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def settings(form: str, group: int | None, kept: list[str]) -> dict[str, Any]:
    """``quantization_config`` of a format."""
    weights: dict[str, Any] = {"symmetric": True, "dynamic": False, "num_bits": 4 if form == "w4a16" else 8}
    inputs: dict[str, Any] | None = None
    if form == "fp8":
        weights |= {"type": "float", "strategy": "channel"}
        inputs = {"symmetric": True, "dynamic": True, "num_bits": 8, "type": "float", "strategy": "token"}
    else:
        weights |= {"type": "int", "strategy": "group" if group else "channel", "group_size": group}
    return configuration(weights, inputs, kept)


def configuration(weights: dict[str, Any], inputs: dict[str, Any] | None, kept: list[str]) -> dict[str, Any]:
    """``quantization_config`` of how weights and inputs of linear layers are rounded; ``kept``: layers that are not."""
    layout = "float-quantized" if weights["type"] == "float" else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": kept,
        "kv_cache_scheme": None,
        "version": VERSION,
    }
