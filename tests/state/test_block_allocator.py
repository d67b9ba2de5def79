"""The allocator and the tables on it: random histories never leak, and never hit what they must not."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from toolkit.state import BlockAllocator, BlockManager, BlockTable, BlockTables, Group, OutOfBlocks, PrefixKey
from toolkit.state.block_manager import Swapped
from toolkit.state.block_table import NULL_BLOCK

KEY = PrefixKey()

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=11)
FULL, WINDOW, STATE = Group(), Group(lookback=3), Group(lookback=1, snapshot_interval=2)
GROUPS = st.sampled_from([(FULL,), (WINDOW,), (STATE,), (FULL, WINDOW), (FULL, Group(lookback=5), STATE)])


class Histories(RuleBasedStateMachine):
    """Sequences over small pools. A history is all tokens so far with the weights that computed each.

    ``truth``: the history after each token of a sequence, which nothing under test has a hand in. ``contents``: what
    the blocks of each group hold: the history at each slot, or for a group of states the one after the block's last
    token.
    """

    block_tables = Bundle("block_tables")

    @initialize(groups=GROUPS, num_blocks=st.integers(1, 9), block_size=st.integers(1, 4))
    def start(self, groups: tuple[Group, ...], num_blocks: int, block_size: int) -> None:
        self.block_manager = BlockManager(groups, [num_blocks] * len(groups), block_size)
        self.contents: list[dict[int, tuple]] = [{} for _ in groups]
        self.truth: dict[BlockTables, list[tuple]] = {}
        self.key, self.moves, self.versions = PrefixKey(), 0, {"": 0}

    def entries(self, group: int, block: int) -> list[int]:
        """Keys into ``contents`` of a block."""
        size = self.block_manager.block_size
        if self.block_manager.groups[group].snapshot_interval:
            return [block]
        return [block * size + offset for offset in range(size)]

    def check(self, block_tables: BlockTables) -> None:
        """All that is still read holds the truth."""
        truth, size = self.truth[block_tables], self.block_manager.block_size
        for group, part, contents in zip(self.block_manager.groups, block_tables.parts, self.contents, strict=True):
            assert part.length == len(truth)
            if group.snapshot_interval:
                assert (contents[part.load_block()] == truth[-1]) if truth else part.load_block() == NULL_BLOCK
            else:
                first = max(0, len(truth) - group.lookback) if group.lookback else 0
                for at in range(first, len(truth)):
                    assert contents[part.blocks[at // size] * size + at % size] == truth[at]

    def copy(self, block_tables: BlockTables) -> None:
        for group, (contents, copies) in enumerate(zip(self.contents, block_tables.take_copies(), strict=True)):
            for source, destination in copies:
                for old, new in zip(self.entries(group, source), self.entries(group, destination), strict=True):
                    contents[new] = contents.get(old, ())

    def fill(self, block_tables: BlockTables, slots: list[list[int]], histories: list[tuple]) -> None:
        """What a forward writes, and that it writes into nothing that others hold."""
        size = self.block_manager.block_size
        for part, contents, own in zip(block_tables.parts, self.contents, slots, strict=True):
            if part.snapshot_interval:
                targets = [(block, histories[at]) for at, block in part.store_blocks(len(histories))]
                blocks = [block for block, _ in targets]
            else:
                targets = list(zip(own, histories, strict=True))
                blocks = [slot // size for slot in own]
            assert all(part.allocator.ref_count(block) == 1 for block in blocks)
            contents.update(targets)

    def append(self, block_tables: BlockTables, tokens: list[int]) -> bool:
        """One engine step: reserve, copy, write, commit."""
        before = (
            [list(part.blocks) for part in block_tables.parts],
            block_tables.length,
            self.block_manager.num_free_blocks,
        )
        needed = block_tables.blocks_needed(len(tokens))
        try:
            slots = block_tables.reserve(len(tokens))
        except OutOfBlocks:
            assert any(wanted > free for wanted, free in zip(needed, self.block_manager.num_free_blocks))
            assert (
                [list(part.blocks) for part in block_tables.parts],
                block_tables.length,
                self.block_manager.num_free_blocks,
            ) == before
            assert not any(block_tables.take_copies())
            return False
        self.copy(block_tables)
        self.check(block_tables)
        truth = self.truth[block_tables]
        for token in tokens:
            # The tokens alone do not tell the state: it also depends on the weights that computed each.
            truth.append((truth[-1] if truth else (), token, self.key))
        self.fill(block_tables, slots, truth[-len(tokens) :])
        block_tables.commit(tokens, self.key)
        return True

    @rule(target=block_tables, tokens=TOKENS, more=TOKENS)
    def begin(self, tokens: list[int], more: list[int]) -> object:
        block_tables = self.block_manager.new_block_tables(self.key)
        hit = block_tables.match_prefix(tokens + more)
        assert hit == block_tables.length < len(tokens + more)
        assert hit % self.block_manager.block_size == 0
        truth: list[tuple] = []
        for token in (tokens + more)[:hit]:  # every hit was computed by these weights
            truth.append((truth[-1] if truth else (), token, self.key))
        self.truth[block_tables] = truth
        self.check(block_tables)
        if not self.append(block_tables, (tokens + more)[hit:]):
            del self.truth[block_tables]
            block_tables.release()
            return multiple()
        return block_tables

    @rule(block_tables=block_tables, tokens=TOKENS)
    def extend(self, block_tables: BlockTables, tokens: list[int]) -> None:
        if block_tables in self.truth:
            self.append(block_tables, tokens)

    @rule(block_tables=block_tables, n=st.integers(1, 9))
    def abandon(self, block_tables: BlockTables, n: int) -> None:
        """A step that failed in its forward: reserved, never committed."""
        if block_tables not in self.truth or any(
            w > f for w, f in zip(block_tables.blocks_needed(n), self.block_manager.num_free_blocks)
        ):
            return
        slots = block_tables.reserve(n)
        self.copy(block_tables)
        assert block_tables.reserve(n) == slots
        for part, contents, own in zip(block_tables.parts, self.contents, slots, strict=True):
            if (
                not part.snapshot_interval
            ):  # a state is written over in place: what failed after that cannot be gone on from
                contents.update((slot, ("garbage",)) for slot in own)

    @rule(target=block_tables, block_tables=block_tables)
    def fork(self, block_tables: BlockTables) -> object:
        if block_tables not in self.truth:
            return multiple()
        other = block_tables.fork()
        self.truth[other] = list(self.truth[block_tables])
        return other

    @rule(block_tables=block_tables, data=st.data())
    def truncate(self, block_tables: BlockTables, data: st.DataObject) -> None:
        if block_tables in self.truth:
            asked = data.draw(st.integers(0, block_tables.length))
            kept = block_tables.truncate(asked)
            assert kept <= asked
            if all(not group.lookback for group in self.block_manager.groups):
                assert kept == asked
            del self.truth[block_tables][kept:]

    @rule(target=block_tables, block_tables=consumes(block_tables))
    def swap(self, block_tables: BlockTables) -> object:
        """Out to the CPU, and into the blocks that are free then."""
        if block_tables not in self.truth:
            return multiple()
        self.copy(block_tables)
        truth = self.truth.pop(block_tables)
        saved = [
            [[contents.get(key, ()) for key in self.entries(group, block)] for block in blocks]
            for group, (contents, blocks) in enumerate(zip(self.contents, block_tables.held_blocks(), strict=True))
        ]
        swapped: Swapped = block_tables.swap_out()
        assert not any(part.held for part in block_tables.parts)
        free = self.block_manager.num_free_blocks
        try:
            back = swapped.restore(self.block_manager)
        except OutOfBlocks:  # its blocks were shared, and the others still hold them
            assert any(needed > room for needed, room in zip(swapped.blocks_needed(), free))
            assert self.block_manager.num_free_blocks == free
            return multiple()
        for group, (contents, blocks) in enumerate(zip(self.contents, back.held_blocks(), strict=True)):
            for block, values in zip(blocks, saved[group], strict=True):
                contents.update(zip(self.entries(group, block), values, strict=True))
        self.truth[back] = truth
        return back

    @rule(block_tables=consumes(block_tables))
    def release(self, block_tables: BlockTables) -> None:
        if self.truth.pop(block_tables, None) is not None:
            block_tables.release()

    @rule(base=st.booleans(), adapter=st.sampled_from([None, "a"]), salt=st.sampled_from([None, "s"]))
    def move_key(self, base: bool, adapter: str | None, salt: str | None) -> None:
        """A write to the base or to an adapter, another choice of adapter, or a request with a salt."""
        self.moves += 1
        self.versions["" if base or adapter is None else adapter] = self.moves
        self.key = PrefixKey(self.versions[""], adapter, self.versions.get(adapter or "-", 0), salt)

    @rule()
    def drop_outdated(self) -> None:
        self.block_manager.drop_outdated(self.key)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.block_manager.reset_prefix_cache()
        assert all(allocator.num_cached_blocks == 0 for allocator in self.block_manager.allocators)

    @invariant()
    def sound(self) -> None:
        self.block_manager.check_integrity(self.truth)
        for group, (allocator, contents) in enumerate(zip(self.block_manager.allocators, self.contents, strict=True)):
            for block, node in allocator.prefix_index._nodes.items():  # a block holds what it would be matched for
                content = contents[self.entries(group, block)[-1]]
                while node.parent is not None:
                    for token in reversed(node.tokens):
                        assert content[1:] == (token, node.key)
                        content = content[0]
                    node = node.parent
                assert content == ()
        for block_tables in self.truth:
            self.check(block_tables)

    def teardown(self) -> None:
        for block_tables in getattr(self, "truth", {}):
            block_tables.release()
        if hasattr(self, "block_manager"):
            self.block_manager.check_integrity([])
            assert self.block_manager.num_free_blocks == tuple(
                allocator.num_blocks for allocator in self.block_manager.allocators
            )


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_allocate_prefers_free_pages_then_evicts_the_least_recently_used() -> None:
    allocator = BlockAllocator(4, 1)
    first, second, third = allocator.allocate(3)
    key = allocator.register(first, None, [1], KEY)
    allocator.register(second, key, [2], KEY)
    allocator.free([first, second])
    assert allocator.num_free_blocks == 3
    assert allocator.num_cached_blocks == 2
    assert allocator.allocate(1) == [3]
    assert allocator.allocate(1) == [second]  # the end of a chain goes before its beginning
    assert allocator.prefix_index.match([1, 2], KEY) == [first]
    with pytest.raises(OutOfBlocks, match="2 blocks were requested, 1 of 4 are available"):
        allocator.allocate(2)
    assert allocator.allocate(1) == [first]
    assert allocator.prefix_index.match([1, 2], KEY) == []
    allocator.check_integrity([[0, 1, 2, 3]])
    assert allocator.ref_count(third) == 1


def test_a_match_makes_a_cached_page_recent() -> None:
    allocator = BlockAllocator(2, 1)
    block_tables = []
    for token in (5, 6):
        table = BlockTable(allocator, KEY)
        table.reserve(1)
        table.commit([token])
        block_tables.append(table)
    for table in block_tables:
        table.release()
    again = BlockTable(allocator, KEY)
    assert BlockTables([again]).match_prefix([5, 9]) == 1
    again.release()
    allocator.allocate(1)
    assert allocator.prefix_index.match([5], KEY)
    assert not allocator.prefix_index.match([6], KEY)


def test_misuse_is_refused_and_changes_nothing() -> None:
    allocator = BlockAllocator(3, 2)
    blocks = allocator.allocate(2)
    with pytest.raises(ValueError, match="freed at most 1 times, got 2"):
        allocator.free([blocks[0], blocks[1], blocks[1]])
    with pytest.raises(ValueError, match="must be held or cached to be shared, got the free block 2"):
        allocator.touch([blocks[0], 2])
    with pytest.raises(ValueError, match="must be held to be registered, got the free block 2"):
        allocator.register(2, None, [1, 2], KEY)
    with pytest.raises(ValueError, match="num_blocks must be >= 0 and block_size >= 1, got 1 and 0"):
        BlockAllocator(1, 0)
    allocator.check_integrity([blocks])
    table = BlockTable(allocator, KEY)
    table.reserve(1)
    with pytest.raises(RuntimeError, match="committed tokens must be <= the 2 reserved slots, got 3"):
        table.commit([1, 2, 3])
    with pytest.raises(ValueError, match="length must be between 0 and 0, got 1"):
        table.truncate(1)
    with pytest.raises(RuntimeError, match="table must be empty"):
        BlockTables([table]).match_prefix([1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a._free.append(a._free[0]),
        lambda a: a._free.pop(),
        lambda a: a._free.append(1),
        lambda a: a._cached.popitem(),
        lambda a: a._ref_counts.__setitem__(1, 0),
        lambda a: a._ref_counts.__setitem__(1, 2),
        lambda a: a.prefix_index.drop(0),
        lambda a: setattr(a.prefix_index._nodes[0], "block", 1),
        lambda a: a.prefix_index._nodes[0].parent.children.clear(),
    ],
)
def test_check_integrity_notices_damage(damage) -> None:
    allocator = BlockAllocator(4, 1)
    cached, held, free = allocator.allocate(3)
    allocator.register(cached, None, [3], KEY)
    allocator.free([cached])
    allocator.free([free])
    allocator.check_integrity([[held]])
    damage(allocator)
    with pytest.raises(AssertionError):
        allocator.check_integrity([[held]])


def test_a_fork_copies_only_the_page_it_writes_and_its_source_stays_until_then() -> None:
    allocator = BlockAllocator(4, 4)
    table = BlockTable(allocator, None)
    table.reserve(6)
    table.commit([1] * 6)
    other = table.fork()
    assert other.blocks == table.blocks
    assert other.blocks_needed(2) == 1
    slots = other.reserve(2)
    assert other.blocks[0] == table.blocks[0]
    assert slots == [other.blocks[1] * 4 + 2, other.blocks[1] * 4 + 3]
    source = table.blocks[1]
    table.release()
    assert allocator.ref_count(source) == 1  # pending
    with pytest.raises(RuntimeError, match="take_copies"):
        other.fork()
    allocator.check_integrity([other.held])
    assert other.take_copies() == [(source, other.blocks[1])]
    assert allocator.ref_count(source) == 0
    other.reserve(1)
    assert other.take_copies() == []  # its own by now


def test_truncate_drops_a_pending_copy() -> None:
    allocator = BlockAllocator(4, 4)
    table = BlockTable(allocator, None)
    table.reserve(6)
    table.commit([1] * 6)
    other = table.fork()
    other.reserve(1)
    other.truncate(4)
    assert other.take_copies() == []
    allocator.check_integrity([table.held, other.held])


def test_a_failed_reserve_leaves_the_table_and_the_index_alone() -> None:
    allocator = BlockAllocator(2, 2)
    table = BlockTable(allocator, KEY)
    table.reserve(4)
    table.commit([1, 2, 3, 4])
    table.truncate(3)
    with pytest.raises(OutOfBlocks):
        table.reserve(2)
    assert allocator.prefix_index.match([1, 2, 3, 4], KEY) == table.blocks
    assert table.reserve(1) == [table.blocks[1] * 2 + 1]  # about to be overwritten: no longer to be matched
    assert allocator.prefix_index.match([1, 2, 3, 4], KEY) == table.blocks[:1]
