"""The registered attention and mask functions of transformers: how a model's attention reaches this project's."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.errors import ToolkitError
from toolkit.modules.attention import KV_DTYPE, attend, both_sides, explicit_mask, keep_runs, padded_context, read_runs
from toolkit.modules.sparse_attention import SPARSE_CALL, SparseCall
from toolkit.patching.padding import padding_is_read
from toolkit.state.active import forward_context_of, get_forward_context
from toolkit.state.context import AttentionSettings

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # a transformers whose layers hand their outputs up themselves
    _active_collector = None  # type: ignore[assignment]

NAME = "toolkit"
IMPLEMENTATION = "_toolkit_attention"
"""The attribute of a module that names the implementation it runs where its configuration says ``NAME``.

It is ``NAME`` for modules that are proven, and for the others of the same configuration what they ran before the patch.
"""


MASKED = "_toolkit_masked"
"""The attribute of a proven module whose ``is_causal`` is False although eager attention is handed causal masks.

It names what the module ran before the patch. Without a mask torch's attention then shows every key (PaliGemma's, where
no types of tokens say what is a prompt); the masks that transformers makes are causal, and so are ragged batches.
"""
_EXPLICIT: ContextVar[bool] = ContextVar("masks_made_explicit", default=False)


@contextmanager
def explicit_masks() -> Iterator[None]:
    """Inside, layers are handed the masks that transformers makes, those of plain causal attention too."""
    token = _EXPLICIT.set(True)
    try:
        yield
    finally:
        _EXPLICIT.reset(token)


_RECOMPUTED: ContextVar[bool] = ContextVar("attention_weights_recomputed", default=False)


@contextmanager
def weights_recomputed(wanted: bool) -> Iterator[None]:
    """Inside, attention weights are computed if ``wanted``: in a backward nothing else says what the forward wanted."""
    token = _RECOMPUTED.set(wanted)
    try:
        yield
    finally:
        _RECOMPUTED.reset(token)


def weights_wanted() -> bool:
    """Whether the model's call under way has ``output_attentions=True``."""
    if _active_collector is None:
        return False
    if not torch.compiler.is_compiling() and _RECOMPUTED.get():
        return True
    # A tracer cannot read a context variable; while one traces, transformers keeps the value in an attribute.
    collected = _active_collector.global_var if torch.compiler.is_compiling() else _active_collector.get()
    return collected is not None and "attentions" in collected


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls for ``NAME``: ``proven_attention``, or of a module that is not proven its own attention.

    Such a module shares its configuration with proven ones: cross-attention to another model's states, say.
    """
    implementation = getattr(module, IMPLEMENTATION, None)
    if implementation == NAME:
        return proven_attention(module, query, key, value, attention_mask, **kwargs)
    if forward_context_of(kwargs) is not None:
        raise ToolkitError(
            f"attention of {type(module).__name__} must be proven for a ragged batch, got a layer that is not patched."
        )
    mask = _own_mask(module, query, key, attention_mask, **kwargs)
    eager = _eager_function(module)
    if eager is None or (implementation == "sdpa" and not weights_wanted()):
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    result: tuple[Tensor, Tensor | None] = eager(module, query, key, value, _additive(mask, query), **kwargs)
    return result


def _own_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> Tensor | None:
    """What ``mask_function`` made, in the form that other implementations take."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    ready = not causal if mask is None else mask.dim() != 2
    if ready:
        return mask
    return explicit_mask(query.transpose(1, 2), key.transpose(1, 2), mask, sliding_window or 0)


def proven_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention contract: query [B, H, S, D], key, value [B, G, S', D] to [B, S, H, D].

    The second result are the weights [B, H, S, S'] where the call wants them.
    """
    call = kwargs.pop(SPARSE_CALL, None)
    if isinstance(call, SparseCall):
        settings = AttentionSettings(query.shape[-1] ** -0.5 if scaling is None else float(scaling), sinks=s_aux)
        given = {"indices": call.selected, **kwargs}
        return _sparse_attention(module, query, key, value, call, settings, float(dropout), **given)
    if position_bias is not None:
        given = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return _biased_attention(module, query, key, value, attention_mask, position_bias, **given)
    context = forward_context_of(kwargs)
    causal = is_causal
    if causal is None:
        handed = context is not None or attention_mask is not None
        causal = _is_causal(module, query, key, handed, sliding_window or 0)
    explicit = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() != 2)
    if not causal and not explicit:
        raise ToolkitError("is_causal must be True for a causal mask, got False.")
    if isinstance(attention_mask, SparseCall):
        settings = AttentionSettings(query.shape[-1] ** -0.5 if scaling is None else float(scaling), sinks=s_aux)
        return _sparse_attention(module, query, key, value, attention_mask, settings, float(dropout), **kwargs)
    settings = AttentionSettings(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
        kv_dtype=getattr(module, KV_DTYPE, ""),
    )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    layer = getattr(module, "layer_idx", None) or 0
    if not causal and attention_mask is not None and attention_mask.dim() == 4 and not dropout:
        read_runs(attention_mask)
    out = attend(layer, q, k, v, attention_mask, context, settings, float(dropout), causal)
    if not (kwargs.get("output_attentions") or weights_wanted()):
        return out.contiguous(), None
    if context is not None:
        raise ToolkitError("output_attentions must be False for a ragged batch, got True.")
    unmasked = attention_mask is None and not causal
    mask = both_sides(q, k, settings.window) if unmasked else explicit_mask(q, k, attention_mask, settings.window)
    kwargs |= {"dropout": dropout, "scaling": settings.scale, "softcap": softcap, "s_aux": s_aux}
    weights = _eager_weights(module, query, key, value, mask, sliding_window=sliding_window, **kwargs)
    return out.contiguous(), weights


def _is_causal(module: nn.Module, query: Tensor, key: Tensor, handed: bool, window: int) -> bool:
    """What a module says; of one that is ``MASKED``, whether it is where it is ``handed`` a mask, or nothing."""
    before = getattr(module, MASKED, None)
    if before is None or getattr(module, "is_causal", True):
        return bool(getattr(module, "is_causal", True))
    queries, keys = query.shape[2], key.shape[2]
    return handed or before == "eager" or queries != keys or 0 < window <= keys


def _biased_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor, *,
    sinks: Tensor | None = None, scaling: float | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention with a bias by distance, for each query, and perhaps a sink for each (``modules/relative_bias.py``).

    In a ragged batch bias [1, H, T, R] is by distance, else [B, H, S, S'] of every key: the model's eager attention.
    """
    context = forward_context_of(kwargs)
    if context is None:
        eager = _eager_function(module)
        explicit = _own_mask(module, query, key, mask, sliding_window=sliding_window)
        given = {"scaling": scaling, "position_bias": bias, **({} if sinks is None else {"sinks": sinks}), **kwargs}
        result: tuple[Tensor, Tensor | None] = eager(module, query, key, value, _additive(explicit, query), **given)
        return result
    if weights_wanted():
        raise ToolkitError("output_attentions must be False for a ragged batch, got True.")
    settings = AttentionSettings(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window or 0)
    q, k, v, of_query = (part[0].transpose(0, 1) for part in (query, key, value, bias))
    own = None if sinks is None else sinks[0, :, :, 0].T
    layer = getattr(module, "layer_idx", None) or 0
    return context.attend_biased(layer, q, k, v, settings, of_query, own)[None].contiguous(), None


def _sparse_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, call: SparseCall, settings: AttentionSettings,
    dropout: float, *, indices: Tensor, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over the keys that ``indices`` [B, S, K] name, by what ``call`` knows of masks and latents."""
    layer = getattr(module, "layer_idx", None) or 0
    out = call.attend(layer, query, key, value, indices, settings, dropout).contiguous()
    if not (kwargs.get("output_attentions") or weights_wanted()):
        return out, None
    if call.context is not None:
        raise ToolkitError("output_attentions must be False for a ragged batch, got True.")
    mask = call.visible(query.shape[2], key.shape[2], indices)
    given = {"dropout": dropout, "scaling": settings.scale, "s_aux": settings.sinks}
    return out, _eager_weights(module, query, key, value, mask, **given, **kwargs)


def _eager_function(module: nn.Module) -> Any:
    """The eager attention beside the module's class; None where it has none, or none that is a function."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask as eager attention takes it: added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    hidden = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, hidden)


def _eager_weights(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **settings: Any
) -> Tensor:
    """[B, H, S, S'] the attention weights of the model's own eager attention, whose definition is the model's."""
    eager = _eager_function(module)
    if eager is None:
        raise ToolkitError(
            f"output_attentions must be False for {type(module).__name__}, whose eager attention is not a function of "
            "its own, got True."
        )
    weights: Tensor = eager(module, query, key, value, _additive(mask, query), **settings)[1]
    return weights


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """None or a padding mask [B, kv_length] for plain causal attention, else an explicit boolean mask.

    An explicit one is evaluated: where every query sees one run of keys (windows, chunks, packed sequences, pictures
    that see themselves, encoders with padding), the op serves it, else torch's dense attention. Which mask it is
    depends on the values of ``attention_mask``: while a compiler traces, every mask is made explicit; so is one whose
    padding somebody reads.
    """
    if get_forward_context() is not None:
        return None
    made = not torch.compiler.is_compiling() and (_EXPLICIT.get() or padding_is_read())
    whole = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    plain = allow_is_causal_skip and whole and not made
    if plain and attention_mask is None:
        return None
    if plain and attention_mask is not None and not torch.compiler.is_compiling():
        mask = attention_mask[:, -kv_length:].contiguous()
        if mask.shape[1] == kv_length:
            if bool(mask.all()):
                return None
            try:
                padded_context(mask, q_length)
                return mask
            except ToolkitError:  # holes in the mask: every layer needs the explicit one
                pass
    compiling = torch.compiler.is_compiling()
    # A plain tensor even inside inference mode, whose tensors do not tell when they are written to.
    with nullcontext() if compiling else torch.inference_mode(False):
        explicit: Tensor | None = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            **kwargs,
        )
    if explicit is not None and q_length == kv_length and not compiling:
        keep_runs(explicit)
    return explicit


def register() -> None:
    """Register ``attn_implementation="toolkit"`` with transformers. Idempotent; changes no model."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)
