"""What a sequence remembers: pages, the sequences that share them, and the batch that reaches them."""

from toolkit.state.allocator import OutOfPages, PageAllocator
from toolkit.state.batch import RaggedBatch
from toolkit.state.forest import Table
from toolkit.state.kinds import PagedRows, Snapshots, StateSpec
from toolkit.state.memory import Group, Memory, Tables
from toolkit.state.pool import StatePool
from toolkit.state.prefix import PrefixIndex

__all__ = [
    "Group",
    "Memory",
    "OutOfPages",
    "PageAllocator",
    "PagedRows",
    "PrefixIndex",
    "RaggedBatch",
    "Snapshots",
    "StatePool",
    "StateSpec",
    "Table",
    "Tables",
]
