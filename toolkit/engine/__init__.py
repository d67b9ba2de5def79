"""Continuous batching: requests in, tokens with their log-probabilities out."""

from toolkit.engine.engine import Engine
from toolkit.engine.limits import Limits
from toolkit.engine.outputs import Completion, Delta
from toolkit.engine.params import SamplingParams
from toolkit.engine.runner import Backend

__all__ = ["Backend", "Completion", "Delta", "Engine", "Limits", "SamplingParams"]
