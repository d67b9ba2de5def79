"""The offline front: one object for generation, chats, embeddings, scores and classes, with vLLM's names."""

from typing import TYPE_CHECKING

from toolkit.lazy import lazy_names

if TYPE_CHECKING:
    from toolkit.llm.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from toolkit.llm.llm import LLM
    from toolkit.llm.lora_request import LoRARequest
    from toolkit.llm.outputs import (
        ClassificationOutput,
        ClassificationRequestOutput,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        PoolingOutput,
        PoolingRequestOutput,
        RequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )

__all__ = [
    "LLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "ClassificationOutput",
    "ClassificationRequestOutput",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "LoRARequest",
    "Logprob",
    "PoolingOutput",
    "PoolingRequestOutput",
    "RequestOutput",
    "ScoringOutput",
    "ScoringRequestOutput",
]
_HOMES = {"LLM": "llm", "LoRARequest": "lora_request"} | {
    name: "beam_search" for name in __all__ if name.startswith("Beam")
}
__getattr__ = lazy_names(__name__, {name: f"toolkit.llm.{_HOMES.get(name, 'outputs')}" for name in __all__})
