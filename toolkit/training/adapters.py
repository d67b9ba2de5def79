"""Adapters of PEFT in a run: begun as the recipe says or continued from a folder, written to and read from checkpoints.

PiSSA and OLoRA begin with factors A0, B0 of a layer's weight W, which is then W - s B0 A0. Checkpoints hold what that
comes to for the weights that everybody has: an adapter of twice the rank, [A; A0] and [B, -B0] beside W. Programs
that open it need to know nothing of this, and halves of it are what a run resumes with.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolkit.config.schema import LoraSection
from toolkit.errors import ToolkitError, first_line
from toolkit.files import write_atomic
from toolkit.loading.model import ADAPTER_WEIGHTS as WEIGHTS
from toolkit.loading.source import ADAPTER, adapter_folder, read_json
from toolkit.training.score_model import head_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "default"
_PREFIX = "base_model.model."
_A, _B = "lora_A.weight", "lora_B.weight"
_STARTS = "_adapter_starts"

Starts = dict[str, tuple[Tensor, Tensor]]
"""(A0, B0) of layers by their names."""


def add_adapters(model: "PreTrainedModel", section: LoraSection, saved: Path | None = None) -> None:
    """Put adapters of PEFT into a model; its own weights freeze.

    Args:
        section: what kind, of which layers; or the folder of the adapters to continue.
        saved: the checkpoint of a run of this recipe, whose adapters these are; None to begin.

    Raises:
        ToolkitError: target names that no module or parameter of the model has; a folder without adapters of LoRA, or
            with those of another model; a rank that a decomposition does not have.
    """
    scored = model.get_output_embeddings() is None
    folder = saved if section.adapter is None or saved is not None else adapter_folder(section.adapter, _FIELD)
    config = lora_config(
        section, head_modules(model) if scored else (), folder if section.adapter is not None else None,
        of_tokens=type(model).__name__.endswith("ForTokenClassification"),
    )  # fmt: skip
    try:
        model.add_adapter(config)
    except (ValueError, TypeError) as error:
        if section.adapter is not None:
            raise ToolkitError(_not_of_model(folder, first_line(error))) from None
        given = repr(section.target_modules)
        names = "model.lora.target_modules"
        if section.target_parameters is not None:
            given += f" and {section.target_parameters!r}"
            names += " and model.lora.target_parameters"
        raise ToolkitError(f"{names} must name layers of the model, got {given}: {first_line(error)}.") from None
    model.peft_config[NAME].base_model_name_or_path = base_name(model)
    if section.decomposes and folder is None:
        setattr(model, _STARTS, _decomposed(model, section))
    elif section.decomposes:
        setattr(model, _STARTS, None)
    if folder is not None:
        load_adapters(model, folder)


_FIELD = "model.lora.adapter"


def check_added_tokens(model: Any, tokens: Sequence[str]) -> None:
    """Raise ToolkitError where a model with adapters does not train the embeddings and the head of added tokens."""
    both = [model.get_input_embeddings(), model.get_output_embeddings()]
    if tokens and not all(any(one.requires_grad for one in module.parameters()) for module in both if module):
        raise ToolkitError(
            "model.lora.modules_to_save must name the embeddings and the head, such as [embed_tokens, lm_head], with "
            f"tokenizer.added_tokens, got {list(tokens)} and modules that stay as they are."
        )


def base_name(model: Any) -> str:
    """What adapters call the model that they are beside: a folder of adapters, where those are merged into it."""
    return str(getattr(model, "adapted_base", None) or model.name_or_path)


def lora_config(
    section: LoraSection, head: Sequence[str] = (), folder: Path | None = None, of_tokens: bool = False
) -> Any:
    """PEFT's ``LoraConfig`` of a section.

    Args:
        head: modules of a head that is trained whole, of a model with scores in the place of tokens.
        folder: of adapters that are continued, whose configuration it is.
        of_tokens: whether that head has outputs for each token.
    """
    import peft

    if folder is not None or section.adapter is not None:
        return _continued(adapter_folder(str(section.adapter), _FIELD) if folder is None else folder)
    return peft.LoraConfig(
        r=section.r,
        lora_alpha=section.lora_alpha,  # type: ignore[arg-type]
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=True if section.decomposes else section.init_lora_weights,  # type: ignore[arg-type]
        modules_to_save=[*(section.modules_to_save or ()), *head] or None,
        lora_dropout=section.lora_dropout,
        target_modules=section.target_modules if section.target_modules is not None else "all-linear",
        exclude_modules=section.exclude_modules,
        target_parameters=section.target_parameters,
        trainable_token_indices=section.trainable_token_indices,
        task_type=("TOKEN_CLS" if of_tokens else "SEQ_CLS") if head else "CAUSAL_LM",
    )


def _continued(folder: Path) -> Any:
    """The configuration in a folder of LoRA adapters, to train on."""
    import peft

    kind = read_json(folder / ADAPTER).get("peft_type")
    if kind != "LORA":
        raise ToolkitError(f"{_FIELD} must be a folder of LoRA adapters, got {kind!r} in '{folder}'.")
    try:
        config = peft.LoraConfig.from_pretrained(str(folder))
    except Exception as error:  # of a file that another version wrote, say
        raise ToolkitError(
            f"{_FIELD} must be a folder of LoRA adapters, got '{folder}' ({first_line(error)})."
        ) from None
    config.inference_mode = False
    return config


def load_adapters(model: "PreTrainedModel", folder: Path) -> None:
    """Weights that PEFT or ``save_adapters`` wrote, into the adapters of ``model``.

    Raises:
        ToolkitError: there are none, or those of another model.
    """
    import peft

    if not (folder / WEIGHTS).is_file():
        raise ToolkitError(f"{_FIELD} must be a folder with {WEIGHTS}, got '{folder}'.")
    # Modules that are saved whole are looked up by the names that they have in the model.
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(str(folder / WEIGHTS)).items()}
    starts: Starts | None = None
    if hasattr(model, _STARTS):
        named, starts = _halved(named, {name: layer.lora_A[NAME].weight.shape[0] for name, layer in _layers(model)})
    try:
        loaded: Any = peft.set_peft_model_state_dict(model, named)
    except (RuntimeError, KeyError, ValueError) as error:  # other shapes
        raise ToolkitError(_not_of_model(folder, first_line(error))) from None
    missing = [name for name in loaded.missing_keys if "lora_" in name or "modules_to_save" in name]
    for name in (*loaded.unexpected_keys, *missing):
        raise ToolkitError(_not_of_model(folder, f"'{name}' is in one of the two alone"))
    if starts is not None and getattr(model, _STARTS) is None:
        layers = dict(_layers(model))
        for name, (first, second) in starts.items():
            _take_off(layers[name], first, second)
        setattr(model, _STARTS, starts)


def _not_of_model(folder: Path | None, why: str) -> str:
    return f"{_FIELD} must be adapters of the model, got '{folder}' ({why})."


def save_adapters(model: "PreTrainedModel", folder: Path) -> None:
    """The adapters as PEFT saves them, beside the weights that everybody has.

    Embeddings that are not trained are left out, tokens that were added among them.
    """
    import peft

    folder.mkdir(parents=True, exist_ok=True)
    named = peft.get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    own: Any = model.peft_config[NAME]
    config = own.to_dict() | {"inference_mode": True}
    starts: Starts = getattr(model, _STARTS, None) or {}
    for name, (first, second) in starts.items():
        for end, begun, dim in ((_A, first, 0), (_B, -second, 1)):
            tensor = named[f"{name}.{end}"]
            named[f"{name}.{end}"] = torch.cat([tensor, begun.to(tensor)], dim)
    if starts:
        factor = 2**0.5 if config["use_rslora"] else 2.0
        config |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}  # the scaling stays
    tensors = {_PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    write_atomic(folder / ADAPTER, json.dumps(plain, indent=2, sort_keys=True) + "\n")


def _halved(named: dict[str, Tensor], ranks: dict[str, int]) -> tuple[dict[str, Tensor], Starts]:
    """The adapters of a file that ``save_adapters`` wrote, and what they began with."""
    kept, starts = dict(named), Starts()
    for name, rank in ranks.items():
        first, second = named[f"{name}.{_A}"], named[f"{name}.{_B}"]
        kept[f"{name}.{_A}"], kept[f"{name}.{_B}"] = first[:rank].clone(), second[:, :rank].clone()
        starts[name] = first[rank:].clone(), -second[:, rank:].contiguous()
    return kept, starts


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted layers with a weight of two dimensions by name, but embeddings."""
    for name, module in model.named_modules():
        if NAME in getattr(module, "lora_A", ()) and module.get_base_layer().weight.dim() == 2:
            yield name, module


@torch.no_grad()
def _decomposed(model: nn.Module, section: LoraSection) -> Starts:
    """Let every adapter begin with factors of its layer's weight, which are taken off it."""
    starts = Starts()
    owners = Counter(one.data_ptr() for module in model.modules() for one in module.parameters(recurse=False))
    for name, layer in _layers(model):
        weight = layer.get_base_layer().weight
        if owners[weight.data_ptr()] > 1:
            raise ToolkitError(
                f"model.lora.target_modules must leave out {name} with init_lora_weights "
                f"{section.init_lora_weights!r}: another module has the same weight."
            )
        if section.r > min(weight.shape):
            raise ToolkitError(
                f"model.lora.r must be <= {min(weight.shape)}, the rank of {name}, with init_lora_weights "
                f"{section.init_lora_weights!r}, got {section.r}."
            )
        dense = weight.to(torch.promote_types(weight.dtype, torch.float32))
        factors = _factors(
            dense.T if layer.fan_in_fan_out else dense, section.r, layer.scaling[NAME], str(section.init_lora_weights)
        )
        for parameter, factor in zip((layer.lora_A[NAME].weight, layer.lora_B[NAME].weight), factors):
            parameter.copy_(factor)
        # As the adapters hold them: rounded, where they have 16 bits.
        starts[name] = layer.lora_A[NAME].weight.detach().clone(), layer.lora_B[NAME].weight.detach().clone()
        _take_off(layer, *starts[name])
    return starts


def _factors(weight: Tensor, rank: int, scaling: float, kind: str) -> tuple[Tensor, Tensor]:
    """(A0 [rank, in], B0 [out, rank]) of a weight [out, in].

    ``pissa``: the principal singular values and vectors, s B0 A0 = U S V (Meng et al., 2024); with ``_niter_N`` by N
    iterations of a randomised decomposition. ``olora``: the first rows and columns of W = Q R (Buyukakyuz, 2024).
    """
    if kind == "olora":
        left, right = torch.linalg.qr(weight)
        return right[:rank].contiguous(), left[:, :rank].contiguous()
    if kind == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, columns = torch.svd_lowrank(weight, rank, niter=int(kind.rpartition("_")[2]))
        right = columns.T
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


@torch.no_grad()
def _take_off(layer: Any, first: Tensor, second: Tensor) -> None:
    """W - s B0 A0, computed the same when a run begins and when it resumes."""
    weight = layer.get_base_layer().weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    product = (layer.scaling[NAME] * second.to(weight.device, dtype)) @ first.to(weight.device, dtype)
    weight.copy_(weight.to(dtype) - (product.T if layer.fan_in_fan_out else product))
