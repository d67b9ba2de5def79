"""Continuous batching: requests in, tokens with their log-probabilities out."""

from typing import TYPE_CHECKING

from toolkit.engine.config import EngineConfig
from toolkit.engine.grammar.params import StructuredOutputsParams
from toolkit.engine.params import SamplingParams
from toolkit.lazy import lazy_names

if TYPE_CHECKING:
    from toolkit.engine.async_engine import AsyncEngine
    from toolkit.engine.backend import Backend
    from toolkit.engine.engine import Engine
    from toolkit.engine.outputs import Completion, Delta
    from toolkit.engine.request_handle import EngineListener, EngineUnavailable, RequestHandle

__all__ = [
    "AsyncEngine",
    "Backend",
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineListener",
    "EngineUnavailable",
    "RequestHandle",
    "SamplingParams",
    "StructuredOutputsParams",
]
__getattr__ = lazy_names(
    __name__,
    {
        "AsyncEngine": "toolkit.engine.async_engine",
        "Backend": "toolkit.engine.backend",
        "Completion": "toolkit.engine.outputs",
        "Delta": "toolkit.engine.outputs",
        "Engine": "toolkit.engine.engine",
        "EngineListener": "toolkit.engine.request_handle",
        "EngineUnavailable": "toolkit.engine.request_handle",
        "RequestHandle": "toolkit.engine.request_handle",
    },
)
