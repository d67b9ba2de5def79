"""What an indexer keeps of each token that selects keys pool by pool: a pool's key is made of its tokens' rows."""

from toolkit.state.kinds.index import IndexKeys


class PooledIndex(IndexKeys, kind="pooled_index"):
    """rows [num_blocks, block_size, 1, width] of one layer; spec.shapes: (1, width).

    The number of pools follows from the lengths of the sequences, so a step over them is not captured.
    """

    capturable = False
