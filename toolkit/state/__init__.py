"""What a sequence remembers: blocks, the sequences that share them, and the batch that reaches them."""

from toolkit.state.batch import RaggedBatch
from toolkit.state.block_allocator import BlockAllocator, OutOfBlocks
from toolkit.state.block_manager import BlockManager, BlockTables, Group
from toolkit.state.block_table import BlockTable
from toolkit.state.context import AttentionSettings, ForwardContext
from toolkit.state.dense import DenseContext
from toolkit.state.kinds import PagedRows, Snapshots, StateSpec
from toolkit.state.paged import PagedContext
from toolkit.state.pool import StatePool
from toolkit.state.prefix import PrefixIndex
from toolkit.state.prefix_key import PrefixKey, WeightKeys
from toolkit.state.rotary_regimes import RotaryRegimes

__all__ = [
    "AttentionSettings",
    "BlockAllocator",
    "BlockManager",
    "BlockTable",
    "BlockTables",
    "DenseContext",
    "ForwardContext",
    "Group",
    "OutOfBlocks",
    "PagedContext",
    "PagedRows",
    "PrefixIndex",
    "PrefixKey",
    "RaggedBatch",
    "RotaryRegimes",
    "Snapshots",
    "StatePool",
    "StateSpec",
    "WeightKeys",
]
