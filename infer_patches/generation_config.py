"""A ``GenerationConfig`` of transformers as the engine's sampling parameters, for the frameworks that are given one."""

from typing import Any

from toolkit import SamplingParams
from toolkit.errors import ToolkitError

SAMPLING = frozenset({"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"})
"""Fields that ``sampling_params`` reads."""

# Fields that configure transformers' own loop, or belong to what another field rejects (beams, assistants).
_IGNORED = frozenset(
    {
        "bos_token_id",
        "decoder_start_token_id",
        "use_cache",
        "cache_config",
        "max_cache_len",
        "compile_config",
        "disable_compile",
        "prefill_chunk_size",
        "continuous_batching_config",
        "early_stopping",
        "length_penalty",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
        "transformers_version",
    }
)
CACHES = (
    "dynamic",
    "dynamic_full",
    "offloaded",
    "static",
    "offloaded_static",
    "sliding_window",
    "hybrid",
    "hybrid_chunked",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
)
"""Values of ``cache_implementation`` that change no number: the engine's own state stands in for all of them."""
# Further values that change nothing, beside None and transformers' defaults.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cache_implementation": CACHES,
    "renormalize_logits": (False,),
    "guidance_scale": (1, 1.0),
    "encoder_repetition_penalty": (1.0,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "low_memory": (False,),
    "token_healing": (False,),
    "is_assistant": (False,),
}


def check_supported(config: Any, supported: frozenset[str]) -> None:
    """Raise a ToolkitError for the first field of ``config`` that asks for what the engine does not support.

    Args:
        config: a GenerationConfig.
        supported: fields that the caller reads.
    """
    fresh = type(config)()
    defaults = fresh._get_default_generation_params()
    for name in vars(fresh):
        if name.startswith("_") or name in supported or name in _IGNORED:
            continue
        value = getattr(config, name, None)
        allowed = [one for one in (defaults.get(name), *_NEUTRAL.get(name, ())) if one is not None]
        if value is not None and value not in allowed:
            others = "".join(f" or {one!r}" for one in allowed)
            raise ToolkitError(f"{name} must be None{others} on the engine, got {value!r}.")


def sampling_params(config: Any, eos: list[int], max_tokens: int, **more: Any) -> SamplingParams:
    """The engine's parameters for ``config``, where None is off; without ``do_sample`` decoding is greedy.

    Args:
        config: a GenerationConfig.
        eos: tokens that end a text.
        max_tokens: most new ones.
        more: other fields of ``SamplingParams``.
    """
    sampling = {
        "temperature": 1.0 if config.temperature is None else config.temperature,
        "top_k": config.top_k or 0,
        "top_p": 1.0 if config.top_p is None else config.top_p,
        "min_p": config.min_p or 0.0,
    }
    return SamplingParams(
        **(sampling if config.do_sample else {"temperature": 0.0}),
        repetition_penalty=1.0 if config.repetition_penalty is None else config.repetition_penalty,
        max_tokens=max_tokens,
        stop_token_ids=eos,
        ignore_eos=True,  # the configuration names the tokens that end a text
        **more,
    )
