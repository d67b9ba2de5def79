"""The contract tests of state kinds, over every registered one, and the pool that holds a kind a layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import ToolkitError
from toolkit.state import LayerSpec, PageAllocator, StatePool, Table, kinds
from toolkit.state.kinds.full import FullAttention, independent

KINDS = sorted(kinds.registered())
PAGE = 4


class Sequences:
    """A kind's storage, an allocator, and a generator of rows: what an engine does, in three lines a step."""

    def __init__(self, kind: str, num_pages: int = 24, dtype: torch.dtype = torch.float32) -> None:
        self.spec = LayerSpec(2, 3, 5, kind=kind)
        self.type = kinds.find(kind)
        self.state = self.type.allocate(self.spec, num_pages, PAGE, dtype, torch.device("cpu"))
        self.dtype = dtype
        self.allocator = PageAllocator(num_pages, PAGE)

    def rows(self, n: int, seed: int) -> kinds.Rows:
        generator = torch.Generator().manual_seed(seed)
        shapes = self.type.row_shapes(self.spec)
        return tuple(torch.randn(n, *shape, generator=generator).to(self.dtype) for shape in shapes)

    def table(self) -> Table:
        return Table(self.allocator, None)

    def append(self, table: Table, rows: kinds.Rows) -> None:
        n = len(rows[0])
        slots = table.reserve(n)
        self.state.fork(table.take_copies())
        self.state.write(rows, torch.tensor(slots, dtype=torch.int64))
        table.commit([0] * n)

    def truncate(self, table: Table, length: int) -> None:
        table.truncate(length)
        self.state.truncate(table.pages, length)

    def read(self, table: Table) -> kinds.Rows:
        return self.state.read(table.pages, table.length)


def same(left: kinds.Rows, right: kinds.Rows) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


@pytest.fixture(params=KINDS)
def sequences(request) -> Sequences:
    return Sequences(request.param)


def test_step_by_step_equals_all_at_once(sequences: Sequences) -> None:
    rows = sequences.rows(11, 0)
    whole, steps = sequences.table(), sequences.table()
    sequences.append(whole, rows)
    for start, stop in ((0, 1), (1, 1), (1, 6), (6, 7), (7, 11)):
        sequences.append(steps, tuple(part[start:stop] for part in rows))
    assert same(sequences.read(steps), sequences.read(whole))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 10])
def test_writes_after_a_fork_stay_apart(sequences: Sequences, length: int) -> None:
    past, *futures = sequences.rows(length, 1), *(sequences.rows(6, seed) for seed in (2, 3, 4))
    table = sequences.table()
    sequences.append(table, past)
    tables = [table, table.fork(), table.fork()]
    for step in range(6):  # interleaved, so that each could overwrite the others
        for each, future in zip(tables, futures):
            sequences.append(each, tuple(part[step : step + 1] for part in future))
    for each, future in zip(tables, futures):
        alone = sequences.table()
        sequences.append(alone, past)
        sequences.append(alone, future)
        assert same(sequences.read(each), sequences.read(alone))
    sequences.allocator.check_integrity()


@pytest.mark.parametrize("keep", [0, 1, 4, 6, 9])
def test_truncate_and_continue_equals_never_having_gone_further(sequences: Sequences, keep: int) -> None:
    rows, other = sequences.rows(9, 5), sequences.rows(5, 6)
    table, straight = sequences.table(), sequences.table()
    sequences.append(table, rows)
    bystander = table.fork()
    sequences.truncate(table, keep)
    sequences.append(table, other)
    sequences.append(straight, tuple(part[:keep] for part in rows))
    sequences.append(straight, other)
    assert same(sequences.read(table), sequences.read(straight))
    whole = sequences.table()
    sequences.append(whole, rows)
    assert same(sequences.read(bystander), sequences.read(whole))


def test_swap_is_identity_in_whatever_pages_are_free(sequences: Sequences) -> None:
    table = sequences.table()
    sequences.append(table, sequences.rows(10, 7))
    before = sequences.read(table)
    host = sequences.state.swap_out(table.pages)
    assert all(part.device.type == "cpu" for part in host)
    occupied = sequences.allocator.allocate(3)
    old = list(table.pages)
    sequences.allocator.free(old)
    sequences.append(sequences.table(), sequences.rows(20, 8))  # overwrites the freed pages
    table.pages = sequences.allocator.allocate(3)
    assert set(table.pages).isdisjoint(occupied)
    assert table.pages != old
    sequences.state.swap_in(table.pages, host)
    assert same(sequences.read(table), before)


def test_negative_slots_are_skipped(sequences: Sequences) -> None:
    table = sequences.table()
    sequences.append(table, sequences.rows(4 * 24, 9))
    before = sequences.read(table)
    sequences.state.write(sequences.rows(2, 10), torch.tensor([-1, -1]))
    assert same(sequences.read(table), before)


def test_bytes_are_those_of_its_pages(sequences: Sequences) -> None:
    assert sequences.state.bytes == 24 * sequences.type.page_bytes(sequences.spec, PAGE, torch.float32) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_kept_bit_for_bit(kind: str) -> None:
    sequences = Sequences(kind, dtype=torch.bfloat16)
    table = sequences.table()
    rows = sequences.rows(7, 11)
    sequences.append(table, rows)
    assert sequences.state.bytes == 24 * sequences.type.page_bytes(sequences.spec, PAGE, torch.bfloat16)
    host = sequences.state.swap_out(table.pages)
    sequences.state.swap_in(table.pages, host)
    assert same(sequences.read(table), rows if kind == "full" else sequences.read(table))


def test_full_attention_reads_what_was_written() -> None:
    sequences = Sequences("full")
    table = sequences.table()
    rows = sequences.rows(9, 12)
    sequences.append(table, rows)
    assert same(sequences.read(table), rows)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_page_copies_run_as_if_one_after_the_other(copies: list[tuple[int, int]]) -> None:
    pool = StatePool([LayerSpec(1, 2, 1)] * 2, 6, 3, torch.float64)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.copy_(torch.randn_like(tensor))
    expected = [tensor.clone().unflatten(0, (6, 3)) for tensor in (pool.keys[0], pool.values[1])]
    for paged in expected:
        for source, destination in copies:
            paged[destination] = paged[source].clone()
    pool.copy_pages(copies)
    assert torch.equal(pool.keys[0], expected[0].flatten(0, 1))
    assert torch.equal(pool.values[1], expected[1].flatten(0, 1))


def test_copies_that_do_not_meet_go_in_one_run() -> None:
    assert independent([]) == []
    assert len(independent([(0, 1), (0, 2), (3, 0), (0, 4)])) == 2


def test_a_pool_holds_each_layer_as_its_spec_says() -> None:
    layers = [LayerSpec(2, 8, 4), LayerSpec(1, 6, 6, window=5)]
    pool = StatePool(layers, 7, 3, torch.float32, "cpu")
    assert [tuple(pool.keys[layer].shape) for layer in (0, 1)] == [(21, 2, 8), (21, 1, 6)]
    assert [tuple(pool.values[layer].shape) for layer in (0, 1)] == [(21, 2, 4), (21, 1, 6)]
    assert pool.bytes == 7 * StatePool.page_bytes(layers, 3, torch.float32) == 7 * 3 * 4 * (24 + 12)
    for tensor in (*pool.keys.values(), *pool.values.values()):
        tensor.copy_(torch.randn_like(tensor))
    before = pool.keys[1].clone(), pool.values[0].clone()
    host = pool.swap_out([5, 2])
    pool.swap_in([2, 5], host)  # the two change places
    assert torch.equal(pool.keys[1].unflatten(0, (7, 3))[2], before[0].unflatten(0, (7, 3))[5])
    pool.swap_in([5, 2], host)
    assert torch.equal(pool.keys[1], before[0])
    assert torch.equal(pool.values[0], before[1])
    assert StatePool([], 4, 2).bytes == 0


def test_an_unknown_kind_is_named_with_the_nearest_one() -> None:
    with pytest.raises(ToolkitError, match=r"state kind is 'ful'; allowed are .*did you mean 'full'\?"):
        StatePool([LayerSpec(1, 2, 2, kind="ful")], 1, 1)


def test_a_kind_registers_by_being_written() -> None:
    class Mine(FullAttention, kind="mine"):
        pass

    try:
        assert type(StatePool([LayerSpec(1, 2, 2, kind="mine")], 1, 1).states[0]) is Mine
    finally:
        del kinds.StateKind._registry["mine"]
