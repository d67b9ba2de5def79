"""The outline of the prefix tree: runs of blocks, where they branch, and which are held."""

from toolkit.state import BlockAllocator, BlockTable, BlockTables, PrefixKey
from toolkit.state.prefix_outline import PrefixRun, prefix_runs

BASE, ADAPTED = PrefixKey(3), PrefixKey(3, "legal", 1)


def write(allocator: BlockAllocator, tokens: list[int], key: PrefixKey) -> BlockTable:
    table = BlockTable(allocator, key)
    hit = BlockTables([table]).match_prefix(tokens)
    table.reserve(len(tokens) - hit)
    table.take_copies()
    table.commit(tokens[hit:])
    return table


def test_runs_end_where_prefixes_branch_and_where_holders_change() -> None:
    allocator = BlockAllocator(32, 4)
    assert prefix_runs(allocator, 9) == []
    shared = list(range(8))
    first = write(allocator, [*shared, *range(20, 28)], BASE)
    second = write(allocator, [*shared, *range(30, 35)], BASE)
    write(allocator, shared, ADAPTED)
    whole = [
        PrefixRun(0, 2, True, 3, ""), PrefixRun(1, 2, True, 3, ""), PrefixRun(1, 1, True, 3, ""),
        PrefixRun(0, 2, True, 3, "legal"),
    ]  # fmt: skip
    assert prefix_runs(allocator, 9) == whole
    assert prefix_runs(allocator, 2) == whole[:2]
    BlockTables([first]).release()
    assert prefix_runs(allocator, 9)[:3] == [whole[0], PrefixRun(1, 2, False, 3, ""), whole[2]]
    BlockTables([second]).release()
    assert prefix_runs(allocator, 9)[0] == PrefixRun(0, 2, False, 3, "")
    assert sum(run.blocks for run in prefix_runs(allocator, 9)) == len(allocator.prefix_index)


def test_a_long_prefix_is_one_run() -> None:
    allocator = BlockAllocator(4096, 2)
    write(allocator, list(range(8000)), BASE)
    assert prefix_runs(allocator, 9) == [PrefixRun(0, 4000, True, 3, "")]
