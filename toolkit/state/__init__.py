"""What a sequence remembers: pages, the sequences that share them, and the batch that reaches them."""

from toolkit.state.allocator import OutOfPages, PageAllocator
from toolkit.state.batch import RaggedBatch
from toolkit.state.forest import Table
from toolkit.state.pool import LayerSpec, StatePool
from toolkit.state.prefix import PrefixIndex

__all__ = ["LayerSpec", "OutOfPages", "PageAllocator", "PrefixIndex", "RaggedBatch", "StatePool", "Table"]
