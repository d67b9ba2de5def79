"""Which models llama.cpp computes, and what of each it cannot: one entry per model type."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from toolkit.errors import ToolkitError, must_be_one_of


@dataclass(frozen=True)
class Family:
    """How a model type of transformers is written.

    Attributes:
        arch: llama.cpp's name of the architecture.
        interleaved_rotary: queries and keys rotate neighbouring rows; those of transformers, halves, are permuted.
        norm_offset: norms multiply by 1 + weight, which is added before writing.
        partial_rotary: a part of each head may be rotated (``partial_rotary_factor``).
        activations: values of ``hidden_act`` that it computes.
        refused: fields of the configuration, what they must be, and what they mean.
    """

    arch: str
    interleaved_rotary: bool = False
    norm_offset: bool = False
    partial_rotary: bool = False
    activations: tuple[str, ...] = ("silu", "swish")
    refused: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = ()


def _unset(value: Any, config: Any) -> bool:
    return not value


def _no_window(value: Any, config: Any) -> bool:
    """A window that no sequence outgrows is none."""
    used = getattr(config, "use_sliding_window", True)
    return value is None or not used or value >= config.max_position_embeddings


def _one(value: Any, config: Any) -> bool:
    return value in (None, 1, 1.0)


def _true(value: Any, config: Any) -> bool:
    return bool(value)


def _key_size(value: Any, config: Any) -> bool:
    return bool(value == config.linear_key_head_dim)


def _gemma_scale(value: Any, config: Any) -> bool:
    """llama.cpp scales by the head size, and in the model of 62 layers by hidden size over heads."""
    layers = config.num_hidden_layers
    wanted: int = config.hidden_size // config.num_attention_heads if layers == 62 else config.head_dim
    return bool(value == wanted)


_WINDOW = ("sliding_window", _no_window, "null, as llama.cpp's layers of this architecture have no window")
_QWEN = (_WINDOW,)
_MOE = (
    ("norm_topk_prob", _true, "true, as llama.cpp normalises the weights of chosen experts"),
    ("mlp_only_layers", _unset, "empty, as llama.cpp has experts in every layer"),
    ("decoder_sparse_step", _one, "1, as llama.cpp has experts in every layer"),
)
_NO_BIAS = ("attention_bias", _unset, "false, as llama.cpp has no biases there")
_NEXT = (
    *_MOE,
    _NO_BIAS,
    ("linear_value_head_dim", _key_size, "linear_key_head_dim, as llama.cpp's states are square"),
)
_GEMMA3 = (
    ("query_pre_attn_scalar", _gemma_scale, "the head size, by which llama.cpp scales"),
    ("attn_logit_softcapping", _unset, "null, as llama.cpp caps no scores in this architecture"),
    ("final_logit_softcapping", _unset, "null, as llama.cpp caps no logits in this architecture"),
    ("use_bidirectional_attention", _unset, "false"),
    _NO_BIAS,
)

FAMILIES = {
    "llama": Family("llama", interleaved_rotary=True),
    "mistral": Family("llama", interleaved_rotary=True, refused=(_WINDOW,)),
    "qwen2": Family("qwen2", refused=_QWEN),
    "qwen3": Family("qwen3", refused=(*_QWEN, _NO_BIAS)),
    "qwen3_moe": Family("qwen3moe", refused=(*_QWEN, *_MOE)),
    "qwen3_next": Family("qwen3next", norm_offset=True, partial_rotary=True, refused=_NEXT),
    "gemma3_text": Family("gemma3", norm_offset=True, activations=("gelu_pytorch_tanh",), refused=_GEMMA3),
    "lfm2": Family("lfm2", refused=(("conv_bias", _unset, "false, as llama.cpp's convolutions have no bias"),)),
}


def family_of(model: Any, target: str) -> Family:
    """How a model is written.

    Raises:
        ToolkitError: llama.cpp has no such architecture here, or a setting means something that it does not compute.
    """
    config = model.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise ToolkitError(f"An export to {target!r}: {must_be_one_of('model_type', kind, FAMILIES)}")
    if not type(model).__name__.endswith("ForCausalLM"):
        raise ToolkitError(
            f"An export to {target!r} holds causal language models, got a {type(model).__name__} with another head."
        )
    family = FAMILIES[kind]
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation is not None and activation not in family.activations:
        raise ToolkitError(
            f"An export to {target!r}: {must_be_one_of(f'hidden_act of {kind}', activation, family.activations)}"
        )
    for name, fits, wanted in family.refused:
        value = getattr(config, name, None)
        if not fits(value, config):
            raise ToolkitError(f"An export to {target!r}: {name} of {kind} must be {wanted}, got {value!r}.")
    return family
