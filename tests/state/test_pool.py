"""The contract tests of state kinds, over every registered one, and the pool that holds them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import ToolkitError
from toolkit.state import BlockManager, BlockTables, Group, PagedRows, PrefixKey, Snapshots, StatePool, StateSpec, kinds
from toolkit.state.kinds import Rows, independent
from toolkit.state.kinds.full import FullAttention
from toolkit.state.pool import group_of, groups_of

KINDS = sorted(kinds.registered())
BLOCK_SIZE = 4
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "latent": ((1, 5), (1, 3)),
    "recurrent": ((2, 3, 5),),
    "conv": ((3, 6),),
    "routing": ((1, 4),),
    "selection": ((1, 4),),
    "index": ((1, 6),),
    "pooled_index": ((1, 6),),
    "hidden": ((1, 6),),
}
"""What to remember in the tests of a kind; any other kind is given keys and values."""


def spec_of(kind: str, layer: int = 0) -> StateSpec:
    return StateSpec(layer, kind, SHAPES.get(kind, ((2, 3), (2, 5))), window=7 if kind.startswith("window") else 0)


class Sequences:
    """A kind's storage, its tables, and a generator of inputs: what an engine does, in three lines a step."""

    def __init__(self, kind: str, num_blocks: int = 24, dtype: torch.dtype = torch.float32) -> None:
        self.spec = spec_of(kind)
        self.type = kinds.find(kind)
        self.state = self.type(self.spec, num_blocks, BLOCK_SIZE, dtype, torch.device("cpu"))
        self.dtype = dtype
        self.block_manager = BlockManager([group_of(self.spec)], [num_blocks], BLOCK_SIZE)

    def rows(self, n: int, seed: int) -> Rows:
        generator = torch.Generator().manual_seed(seed)
        if self.spec.kind in ("routing", "selection"):
            return tuple(torch.randint(0, 40_000, (n, *shape), generator=generator) for shape in self.spec.shapes)
        rows = [torch.randn(n, *shape, generator=generator).to(self.dtype) for shape in self.type.inputs(self.spec)]
        if self.spec.kind == "recurrent":
            rows[0] = torch.nn.functional.normalize(rows[0].float(), dim=-1).to(self.dtype)
            rows[2], rows[3] = -rows[2].abs(), rows[3].sigmoid()
        return tuple(rows)

    def view(self, block_tables: BlockTables, slots: list[int], n: int) -> PagedRows | Snapshots:
        (part,) = block_tables.parts
        if self.type.snapshot_interval:
            stores = part.store_blocks(n)
            lists = [part.load_block()], [row for row, _ in stores], [block for _, block in stores]
            return Snapshots(*(torch.tensor(one, dtype=torch.int64) for one in lists))
        blocks = torch.tensor([[max(block, 0) for block in part.blocks]], dtype=torch.int64)
        return PagedRows(blocks, torch.tensor(slots, dtype=torch.int64))

    def append(self, block_tables: BlockTables, rows: Rows) -> None:
        n = len(rows[0])
        (slots,) = block_tables.reserve(n)
        (copies,) = block_tables.take_copies()
        self.state.fork(copies)
        self.state.write(rows, self.view(block_tables, slots, n), torch.tensor([0, n]))
        block_tables.commit([0] * n)

    def read(self, block_tables: BlockTables) -> Rows:
        return self.state.read(block_tables.parts[0].blocks, block_tables.length)


def same(left: Rows, right: Rows) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def cut(rows: Rows, start: int, stop: int) -> Rows:
    return tuple(part[start:stop] for part in rows)


@pytest.fixture(params=KINDS)
def sequences(request) -> Sequences:
    return Sequences(request.param)


def test_step_by_step_equals_all_at_once(sequences: Sequences) -> None:
    rows = sequences.rows(11, 0)
    whole, steps = sequences.block_manager.new_block_tables(None), sequences.block_manager.new_block_tables(None)
    sequences.append(whole, rows)
    for start, stop in ((0, 1), (1, 1), (1, 6), (6, 7), (7, 11)):
        sequences.append(steps, cut(rows, start, stop))
    assert same(sequences.read(steps), sequences.read(whole))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 10])
def test_writes_after_a_fork_stay_apart(sequences: Sequences, length: int) -> None:
    past, *futures = sequences.rows(length, 1), *(sequences.rows(6, seed) for seed in (2, 3, 4))
    block_tables = sequences.block_manager.new_block_tables(None)
    sequences.append(block_tables, past)
    branches = [block_tables, block_tables.fork(), block_tables.fork()]
    for step in range(6):  # interleaved, so that each could overwrite the others
        for each, future in zip(branches, futures):
            sequences.append(each, cut(future, step, step + 1))
    alone = []
    for future in futures:
        alone.append(sequences.block_manager.new_block_tables(None))
        sequences.append(alone[-1], past)
        sequences.append(alone[-1], future)
    for each, expected in zip(branches, alone):
        assert same(sequences.read(each), sequences.read(expected))
    sequences.block_manager.check_integrity([*branches, *alone])
    assert not same(sequences.read(branches[0]), sequences.read(branches[1]))


@pytest.mark.parametrize("keep", [0, 1, 4, 6, 8, 9])
def test_truncate_and_continue_equals_never_having_run_further(sequences: Sequences, keep: int) -> None:
    rows, other = sequences.rows(9, 5), sequences.rows(5, 6)
    block_tables, straight, whole = (sequences.block_manager.new_block_tables(None) for _ in range(3))
    sequences.append(block_tables, cut(rows, 0, 5))
    sequences.append(block_tables, cut(rows, 5, 9))
    bystander = block_tables.fork()
    kept = block_tables.truncate(keep)  # what cannot be restored is computed again
    assert kept <= keep
    sequences.append(block_tables, cut(rows, kept, keep))
    sequences.append(block_tables, other)
    sequences.append(straight, cut(rows, 0, keep))
    sequences.append(straight, other)
    assert same(sequences.read(block_tables), sequences.read(straight))
    sequences.append(whole, rows)
    assert same(sequences.read(bystander), sequences.read(whole))
    if not sequences.type.lookback(sequences.spec):
        assert kept == keep


def test_a_prefix_hit_continues_as_if_it_had_been_computed(sequences: Sequences) -> None:
    rows, other = sequences.rows(4 * BLOCK_SIZE * 16 + 3, 5), sequences.rows(6, 6)
    sequences = Sequences(sequences.spec.kind, num_blocks=200)
    first, second, straight = (
        sequences.block_manager.new_block_tables(key) for key in (PrefixKey(), PrefixKey(), None)
    )
    sequences.append(first, rows)
    tokens = [0] * len(rows[0])
    hit = second.match_prefix(tokens)
    assert hit == 4 * BLOCK_SIZE * 16
    sequences.append(second, other)
    sequences.append(straight, cut(rows, 0, hit))
    sequences.append(straight, other)
    assert same(sequences.read(second), sequences.read(straight))
    sequences.block_manager.check_integrity([first, second, straight])


def test_swap_is_identity_in_any_free_blocks(sequences: Sequences) -> None:
    block_tables, other, blocker = (sequences.block_manager.new_block_tables(None) for _ in range(3))
    sequences.append(block_tables, sequences.rows(10, 7))
    before, old = sequences.read(block_tables), list(block_tables.parts[0].blocks)
    host = sequences.state.swap_out(block_tables.held_blocks()[0])
    assert all(part.device.type == "cpu" for part in host)
    swapped = block_tables.swap_out()
    sequences.append(blocker, sequences.rows(1, 8))
    sequences.append(other, sequences.rows(20, 8))  # overwrites the freed blocks
    back = swapped.restore(sequences.block_manager)
    sequences.state.swap_in(back.held_blocks()[0], host)
    assert back.parts[0].blocks != old
    assert same(sequences.read(back), before)
    sequences.block_manager.check_integrity([back, other, blocker])


def test_sleep_frees_the_memory_and_wake_allocates_it(sequences: Sequences) -> None:
    block_tables = sequences.block_manager.new_block_tables(None)
    rows = sequences.rows(6, 3)
    sequences.append(block_tables, rows)
    before, stores = sequences.read(block_tables), sequences.state.stores
    host = sequences.state.swap_out(block_tables.held_blocks()[0])
    sequences.state.sleep()
    assert sum(store.untyped_storage().nbytes() for store in stores) == 0
    sequences.state.wake()
    assert all(not store.any() for store in stores)
    sequences.state.swap_in(block_tables.held_blocks()[0], host)
    assert same(sequences.read(block_tables), before)


def test_bytes_are_those_of_its_blocks(sequences: Sequences) -> None:
    assert sequences.state.bytes == 24 * sequences.type.block_bytes(sequences.spec, BLOCK_SIZE, torch.float32) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_kept_bit_for_bit(kind: str) -> None:
    sequences = Sequences(kind, dtype=torch.bfloat16)
    block_tables = sequences.block_manager.new_block_tables(None)
    rows = sequences.rows(7, 11)
    sequences.append(block_tables, rows)
    before = sequences.read(block_tables)
    assert sequences.state.bytes == 24 * sequences.type.block_bytes(sequences.spec, BLOCK_SIZE, torch.bfloat16)
    blocks = block_tables.held_blocks()[0]
    host = sequences.state.swap_out(blocks)
    sequences.state.swap_in(blocks, host)
    assert same(sequences.read(block_tables), before)
    if kind in ("full", "latent", "hidden"):
        assert same(before, rows)
    if kind == "conv":
        assert torch.equal(before[0], rows[0][-3:])
    if kind in ("routing", "selection"):
        assert torch.equal(before[0], rows[0].int())


@pytest.mark.parametrize("kind", ["full", "hidden", "latent", "routing", "selection", "window"])
def test_negative_slots_are_skipped(kind: str) -> None:
    sequences = Sequences(kind)
    before = [store.clone() for store in sequences.state.stores]
    view = PagedRows(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([-1, -1]))
    sequences.state.write(sequences.rows(2, 10), view, torch.tensor([0, 2]))
    assert same(tuple(before), sequences.state.stores)


def test_a_window_frees_the_blocks_that_it_left() -> None:
    sequences = Sequences("window", num_blocks=4)
    block_tables = sequences.block_manager.new_block_tables(None)
    rows = sequences.rows(200, 1)
    for at in range(200):
        sequences.append(block_tables, cut(rows, at, at + 1))
        assert len(block_tables.parts[0].held) <= 3  # six tokens lie in three blocks at most
    assert same(sequences.read(block_tables), cut(rows, 194, 200))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_block_copies_run_as_if_one_after_the_other(copies: list[tuple[int, int]]) -> None:
    specs = [StateSpec(layer, "full", ((1, 2), (1, 1))) for layer in range(2)]
    pool = StatePool(specs, {Group(): 6}, 3, torch.float64)
    stores = [store for state in pool.states for store in state.stores]
    for store in stores:
        store.copy_(torch.randn_like(store))
    expected = [store.clone() for store in stores]
    for store in expected:
        for source, destination in copies:
            store[destination] = store[source].clone()
    pool.copy_blocks([copies])
    assert same(tuple(stores), tuple(expected))


def test_copies_that_do_not_meet_go_in_one_run() -> None:
    assert independent([]) == []
    assert len(independent([(0, 1), (0, 2), (3, 0), (0, 4)])) == 2


HYBRID = [
    StateSpec(0, "full", ((2, 8), (2, 4))),
    StateSpec(1, "window", ((1, 6), (1, 6)), window=5),
    StateSpec(2, "recurrent", ((2, 3, 4),)),
    StateSpec(2, "conv", ((3, 10),)),
    StateSpec(3, "full", ((1, 6), (1, 6))),
    StateSpec(4, "window", ((1, 6), (1, 6)), window=9),
]


def test_a_pool_groups_layers_by_how_far_back_they_read() -> None:
    groups = groups_of(HYBRID)
    assert groups == (Group(), Group(8), Group(4), Group(1, 16))
    pool = StatePool(HYBRID, dict(zip(groups, (7, 5, 3, 2))), 3)
    assert pool.members == [0, 2, 3, 3, 0, 1]
    assert [tuple(state.stores[0].shape) for state in pool.states] == [
        (7, 3, 2, 8), (3, 3, 1, 6), (2, 2, 3, 4), (2, 3, 10), (7, 3, 1, 6), (5, 3, 1, 6),
    ]  # fmt: skip
    block_bytes = StatePool.block_bytes(HYBRID, 3, torch.float32)
    assert pool.bytes == sum(block_bytes[group] * count for group, count in zip(groups, (7, 5, 3, 2)))
    assert block_bytes[Group()] == 3 * 4 * (24 + 12)
    assert StatePool([], {}, 2).bytes == 0


def test_a_pool_swaps_all_kinds_of_a_sequence_together() -> None:
    groups = groups_of(HYBRID)
    pool = StatePool(HYBRID, dict.fromkeys(groups, 6), 3)
    for state in pool.states:
        for store in state.stores:
            store.copy_(torch.randn_like(store))
    before = [[store.clone() for store in state.stores] for state in pool.states]
    blocks = [[5, 2], [0, 1], [3, 4], [1]]
    host = pool.swap_out(blocks)
    pool.swap_in([[2, 5], [1, 0], [4, 3], [1]], host)  # two change places in each group, one stays
    for state, old, group in zip(pool.states, before, pool.members):
        for store, was in zip(state.stores, old):
            if group == 3:
                assert torch.equal(store, was)
            else:
                first, second = blocks[group]
                assert torch.equal(store[first], was[second])
                assert torch.equal(store[second], was[first])


def test_blocks_follow_from_what_a_group_keeps() -> None:
    assert Group().blocks_for(1000, 4, 64, 16) == 63 + 4
    assert Group(lookback=127).blocks_for(10_000, 4, 64, 16) == 4 * (8 + 2) + 4
    assert Group(lookback=1, snapshot_interval=16).blocks_for(10_000, 4, 512, 16) == 3 * 4 + 2 + 1
    assert Group(lookback=4095).blocks_for(100, 2, 64, 16) == 7 + 2  # never more than everything


def test_an_unknown_kind_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ToolkitError, match=r"state kind must be one of .*, got 'ful'; did you mean 'full'\?"):
        StatePool([StateSpec(0, "ful", ((1, 2), (1, 2)))], {Group(): 1}, 1)


def test_a_kind_registers_by_being_written() -> None:
    class Mine(FullAttention, kind="mine"):
        pass

    try:
        assert type(StatePool([StateSpec(0, "mine", ((1, 2), (1, 2)))], {Group(): 1}, 1).states[0]) is Mine
    finally:
        del kinds.StateKind._registry["mine"]
