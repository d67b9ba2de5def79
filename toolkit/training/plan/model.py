"""A recipe's model without weights, and the sizes of its layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.config import Recipe
from toolkit.config.schema import ModelSection
from toolkit.errors import ToolkitError, first_line
from toolkit.loading import find_source, read_config
from toolkit.loading.classes import auto_class
from toolkit.training.adapters import lora_config
from toolkit.training.freezing import freeze_parameters
from toolkit.training.model import make_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _PlannedTokenizer:
    """What a model's configuration takes from a tokenizer that is not there yet."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size


def empty_model(recipe: Recipe) -> "PreTrainedModel":
    """The model on the meta device, its adapters included, with what is frozen frozen.

    Raises:
        ToolkitError: no configuration, or one that transformers does not take.
    """
    section = recipe.model
    if section.config is not None:
        from transformers import AutoModelForCausalLM

        config: Any = make_config(section.config, _PlannedTokenizer(recipe.tokenizer.vocab_size))  # type: ignore[arg-type]
        made: Any = AutoModelForCausalLM
    else:
        config = _config(section)
        made = auto_class(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = made.from_config(config, dtype=getattr(torch, recipe.forward_dtype))
            if section.lora is not None:
                model.add_adapter(lora_config(section.lora))
    except Exception as error:  # a model's code refuses in many ways
        raise ToolkitError(f"the model of the recipe cannot be made: {first_line(error)}.") from None
    if section.lora is None:
        freeze_parameters(model, section)
    return model


def _config(section: ModelSection) -> Any:
    """The configuration of a folder, or of a repository, of which only that is downloaded."""
    name = str(section.name_or_path)
    if Path(name).exists():
        if Path(name).is_file():
            raise ToolkitError(f"model.name_or_path must be a folder or a repository for a plan, got '{name}'.")
        source = find_source(name, field="model.name_or_path")
        return read_config(source.whole)
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, revision=section.revision, trust_remote_code=section.trust_remote_code)
    except Exception as error:
        raise ToolkitError(
            f"model.name_or_path must have a configuration, got '{name}' ({first_line(error)})."
        ) from None


@dataclass(frozen=True)
class LayerSizes:
    """Sizes that memory and time follow from, summed over layers.

    Args:
        hidden: of the stream between layers.
        layers: number of decoder layers.
        matrices: elements of weights that a token is multiplied with; of experts those of a token's.
        trained_matrices: of them, those whose gradient is computed.
        head: elements of the output projection.
        saved: numbers that a backward needs of a token of the decoder layers.
        state: numbers that the engine keeps of a token.
        queries: width of the attention's queries.
    """

    hidden: int
    layers: int
    matrices: int
    trained_matrices: int
    head: int
    saved: int
    state: int
    queries: int

    @classmethod
    def of(cls, model: "PreTrainedModel") -> "LayerSizes":
        config: Any = model.config.get_text_config()
        matrices = trained = saved = 0
        head: Any = model.get_output_embeddings()
        share = _expert_share(config)
        chosen = int(getattr(config, "num_experts_per_tok", None) or 1)
        for name, module in model.named_modules():
            if module is head:
                continue
            children = [one for one in module.children() if isinstance(one, nn.Linear)]
            if isinstance(module, nn.Linear):
                part = share if ".experts." in name else 1.0
                matrices += int(module.weight.numel() * part)
                trained += int(module.weight.numel() * part) if module.weight.requires_grad else 0
                saved += int(module.out_features * (chosen if ".experts." in name else 1) * (part if part < 1 else 1))
            elif type(module).__name__.lower().endswith("norm"):
                saved += sum(one.numel() for one in module.parameters(recurse=False))
            else:
                for weight in module.parameters(recurse=False):
                    if weight.dim() == 3:  # experts side by side: [E, out, in], of which a token is in some
                        matrices += int(weight.numel() * share)
                        trained += int(weight.numel() * share) if weight.requires_grad else 0
                        saved += chosen * sum(weight.shape[1:])
            if children:  # what the last one reads was made of the others' outputs
                saved += children[-1].in_features
        return cls(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            matrices=matrices,
            trained_matrices=trained,
            head=0 if head is None else head.weight.numel(),
            saved=saved,
            state=_state(config),
            queries=config.num_hidden_layers * config.num_attention_heads * _head_dim(config),
        )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _expert_share(config: Any) -> float:
    """Experts of a token over all."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((getattr(config, name) for name in names if getattr(config, name, None)), 1)
    return min(1.0, (getattr(config, "num_experts_per_tok", None) or experts) / experts)


def _state(config: Any) -> int:
    """Numbers of keys and values, or of latents, of a token; a recurrence's state does not grow with tokens."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    if getattr(config, "kv_lora_rank", None):
        return int(layers * (config.kv_lora_rank + config.qk_rope_head_dim))
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(layers * 2 * heads * _head_dim(config))
