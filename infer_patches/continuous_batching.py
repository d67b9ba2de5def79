"""transformers' continuous batching on the engine: ``generate_batch``, ``init_continuous_batching`` and their managers.

    toolkit.patch(model)
    with route_continuous_batching(model):
        results = model.generate_batch(prompts, generation_config=GenerationConfig(max_new_tokens=64))

It replaces ``init_continuous_batching``, from which transformers' other entry points take their manager. Results are
its ``GenerationOutput``.
"""

import inspect
from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from infer_patches.engine_manager import EngineManager
from infer_patches.generation_config import SAMPLING, check_supported
from infer_patches.route import Route
from toolkit.engine import EngineConfig
from toolkit.errors import ToolkitError

_SUPPORTED = SAMPLING | {"max_new_tokens", "min_new_tokens", "eos_token_id", "pad_token_id", "num_return_sequences"}
_ENGINE_ARGS = {
    "page_size": "block_size",
    "num_blocks": "num_blocks",
    "max_batch_tokens": "max_num_batched_tokens",
    "max_requests_per_batch": "max_num_seqs",
    "allow_block_sharing": "enable_prefix_caching",
    "seed": "seed",
}
"""Fields of a ContinuousBatchingConfig, and the engine's keyword arguments that they are."""


class ContinuousBatchingRoute(Route):
    """Routes a model's continuous batching to engines that are made with ``engine_args``."""

    def __init__(self, model: nn.Module, engine_args: dict[str, Any]) -> None:
        EngineConfig.check(**engine_args)
        super().__init__(model, init_continuous_batching, generate_batch)
        self.engine_args = engine_args

    def undo(self) -> None:
        model: Any = self._model()
        super().undo()
        if model is not None:
            model.destroy_cached_continuous_batching_manager()


def init_continuous_batching(
    self: Any,
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    workload_hints: Any = None,
) -> ContinuousBatchingManager:
    """``init_continuous_batching`` of a routed model; a copy of such a model runs transformers' own."""
    given = generation_config, continuous_batching_config, workload_hints
    route = ContinuousBatchingRoute.of.get(self)
    if route is None:
        own: ContinuousBatchingManager = type(self).init_continuous_batching(self, *given)
        return own
    kept = getattr(self, "_cached_continuous_batching_manager", None)
    if isinstance(kept, EngineManager):
        return kept
    config = generation_config if generation_config is not None else self.generation_config
    check_supported(config, _SUPPORTED)
    sizes, usual = continuous_batching_config or ContinuousBatchingConfig(), ContinuousBatchingConfig()
    if sizes.max_queue_size:
        raise ToolkitError(f"max_queue_size must be 0 on the engine, got {sizes.max_queue_size}.")
    given_args = {
        ours: getattr(sizes, theirs)
        for theirs, ours in _ENGINE_ARGS.items()
        if getattr(sizes, theirs) != getattr(usual, theirs)
    }
    return EngineManager(self, config, sizes, {**route.engine_args, **given_args})


def generate_batch(self: Any, *args: Any, **kwargs: Any) -> dict[str, GenerationOutput]:
    """transformers' own, by way of the manager above. Raises ToolkitError for an argument that it would ignore."""
    known = inspect.signature(type(self).generate_batch).parameters
    unknown = next((name for name in kwargs if name not in known and name != "max_new_tokens"), None)
    if self in ContinuousBatchingRoute.of and unknown is not None:
        raise ToolkitError(
            f"generate_batch has no argument {unknown!r}; it has its own, max_new_tokens and the fields of "
            "generation_config."
        )
    results: dict[str, GenerationOutput] = type(self).generate_batch(self, *args, **kwargs)
    return results


def route_continuous_batching(model: nn.Module, **engine_args: Any) -> ContinuousBatchingRoute:
    """Let continuous batching of a patched causal LM run on the engine, until ``undo()`` of the result.

    Undoing also ends a manager that was kept. These fields of a GenerationConfig are supported: max_new_tokens,
    min_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty, eos_token_id, num_return_sequences;
    others raise an error that names them. None is off, as in transformers. Of a ContinuousBatchingConfig: page_size,
    num_blocks, max_batch_tokens, max_requests_per_batch, allow_block_sharing, seed (which override ``engine_args``) and
    return_logprobs; the rest configures transformers' own loop.

    Args:
        model: the model.
        engine_args: keyword arguments of ``toolkit.Engine``.

    Raises:
        ToolkitError: for a model that is not patched or is routed already, and for bad arguments of the engine.
    """
    return ContinuousBatchingRoute(model, engine_args)
