"""Embeddings, scores and classes of whole sequences: one ragged forward for many, without padding."""

from typing import TYPE_CHECKING

from toolkit.engine.pooling.params import PoolerConfig, PoolingParams, Projection
from toolkit.lazy import lazy_names

if TYPE_CHECKING:
    from toolkit.engine.pooling.engine import Pooled, PoolingEngine, PoolingInput
    from toolkit.engine.pooling.queue import PoolingQueue

__all__ = ["Pooled", "PoolerConfig", "PoolingEngine", "PoolingInput", "PoolingParams", "PoolingQueue", "Projection"]
__getattr__ = lazy_names(
    __name__,
    {
        "Pooled": "toolkit.engine.pooling.engine",
        "PoolingEngine": "toolkit.engine.pooling.engine",
        "PoolingInput": "toolkit.engine.pooling.engine",
        "PoolingQueue": "toolkit.engine.pooling.queue",
    },
)
