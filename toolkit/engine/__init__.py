"""Continuous batching: requests in, tokens with their log-probabilities out."""

from toolkit.engine.async_engine import AsyncEngine
from toolkit.engine.config import EngineConfig
from toolkit.engine.engine import Engine
from toolkit.engine.outputs import Completion, Delta
from toolkit.engine.params import SamplingParams
from toolkit.engine.request_handle import EngineListener, EngineUnavailable, RequestHandle
from toolkit.engine.runner import Backend

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
]
