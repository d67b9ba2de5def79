"""The allocator and the tables on it: random histories never leak, and never hit what they must not."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from toolkit.state import OutOfPages, PageAllocator, Table

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=11)


class Histories(RuleBasedStateMachine):
    """Tables over a small pool. ``contents`` is the oracle: the whole history of the token in each slot."""

    tables = Bundle("tables")

    @initialize(num_pages=st.integers(1, 9), page_size=st.integers(1, 4))
    def start(self, num_pages: int, page_size: int) -> None:
        self.allocator = PageAllocator(num_pages, page_size)
        self.contents: dict[int, tuple] = {}
        self.live: list[Table] = []
        self.version = 0

    def written(self, table: Table) -> list[tuple]:
        size = self.allocator.page_size
        return [self.contents[table.pages[at // size] * size + at % size] for at in range(table.length)]

    def append(self, table: Table, tokens: list[int]) -> bool:
        """One engine step: reserve, copy, write, commit. A slot holds its token, its past and the weights."""
        before = (list(table.pages), table.length, self.allocator.num_free)
        needed = table.pages_needed(len(tokens))
        try:
            slots = table.reserve(len(tokens))
        except OutOfPages:
            assert needed > self.allocator.num_free
            assert (list(table.pages), table.length, self.allocator.num_free) == before
            assert table.take_copies() == []
            return False
        size = self.allocator.page_size
        for source, destination in table.take_copies():
            for place in range(size):
                self.contents[destination * size + place] = self.contents.get(source * size + place, ())
        past = self.written(table)
        for token, slot in zip(tokens, slots, strict=True):
            assert self.allocator.refcount(slot // size) == 1
            # The tokens alone do not tell the state: it also depends on the weights that computed each.
            past.append((past[-1] if past else (), token, self.version))
            self.contents[slot] = past[-1]
        table.commit(tokens, self.version)
        return True

    @rule(target=tables, tokens=TOKENS, more=TOKENS)
    def begin(self, tokens: list[int], more: list[int]) -> object:
        table = Table(self.allocator, self.version)
        hit = table.match_prefix(tokens + more)
        assert hit == table.length < len(tokens + more)
        assert hit % self.allocator.page_size == 0
        past: tuple = ()
        for token, content in zip(tokens + more, self.written(table)):  # every hit was computed by these weights
            past = (past, token, self.version)
            assert content == past
        if not self.append(table, (tokens + more)[hit:]):
            table.release()
            return multiple()
        self.live.append(table)
        return table

    @rule(table=tables, tokens=TOKENS)
    def extend(self, table: Table, tokens: list[int]) -> None:
        if table in self.live:
            self.append(table, tokens)

    @rule(table=tables, n=st.integers(1, 9))
    def abandon(self, table: Table, n: int) -> None:
        """A step that failed in its forward: reserved, never committed."""
        if table in self.live and table.pages_needed(n) <= self.allocator.num_free:
            size = self.allocator.page_size
            slots = table.reserve(n)
            for source, destination in table.take_copies():
                for place in range(size):
                    self.contents[destination * size + place] = self.contents.get(source * size + place, ())
            assert table.reserve(n) == slots
            for slot in slots:
                self.contents[slot] = ("garbage",)

    @rule(target=tables, table=tables)
    def fork(self, table: Table) -> object:
        if table not in self.live:
            return multiple()
        other = table.fork()
        assert self.written(other) == self.written(table)
        self.live.append(other)
        return other

    @rule(table=tables, data=st.data())
    def truncate(self, table: Table, data: st.DataObject) -> None:
        if table in self.live:
            keep = data.draw(st.integers(0, table.length))
            before = self.written(table)
            table.truncate(keep)
            assert self.written(table) == before[:keep]

    @rule(table=consumes(tables))
    def release(self, table: Table) -> None:
        if table in self.live:
            self.live.remove(table)
            table.release()

    @rule()
    def move_version(self) -> None:
        self.version += 1

    @rule()
    def drop_old_versions(self) -> None:
        self.allocator.drop_old_versions(self.version)

    @invariant()
    def sound(self) -> None:
        self.allocator.check_integrity(table.held for table in self.live)
        size = self.allocator.page_size
        for page, node in self.allocator.index._nodes.items():  # a page holds what it would be matched for
            content = self.contents[page * size + size - 1]
            while node.parent is not None:
                for token in reversed(node.tokens):
                    assert content[1:] == (token, node.version)
                    content = content[0]
                node = node.parent
            assert content == ()
        for table in self.live:
            past: tuple = ()
            for token, content in zip(table.tokens, self.written(table), strict=True):
                past = (past, token, content[2])
                assert content == past

    def teardown(self) -> None:
        for table in getattr(self, "live", []):
            table.release()
        if hasattr(self, "allocator"):
            self.allocator.check_integrity([])
            assert self.allocator.num_free == self.allocator.num_pages


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


def test_allocate_prefers_free_pages_then_evicts_the_least_recently_used() -> None:
    allocator = PageAllocator(4, 1)
    first, second, third = allocator.allocate(3)
    key = allocator.register(first, None, [1], 0)
    allocator.register(second, key, [2], 0)
    allocator.free([first, second])
    assert allocator.num_free == 3
    assert allocator.num_cached == 2
    assert allocator.allocate(1) == [3]
    assert allocator.allocate(1) == [second]  # the end of a chain goes before its beginning
    assert allocator.index.match([1, 2], 0) == [first]
    with pytest.raises(OutOfPages, match="2 pages were asked for and 1 of 4 are available"):
        allocator.allocate(2)
    assert allocator.allocate(1) == [first]
    assert allocator.index.match([1, 2], 0) == []
    allocator.check_integrity([[0, 1, 2, 3]])
    assert allocator.refcount(third) == 1


def test_a_match_makes_a_cached_page_recent() -> None:
    allocator = PageAllocator(2, 1)
    tables = []
    for token in (5, 6):
        table = Table(allocator, 0)
        table.reserve(1)
        table.commit([token])
        tables.append(table)
    for table in tables:
        table.release()
    again = Table(allocator, 0)
    assert again.match_prefix([5, 9]) == 1
    again.release()
    allocator.allocate(1)
    assert allocator.index.match([5], 0)
    assert not allocator.index.match([6], 0)


def test_misuse_is_refused_and_changes_nothing() -> None:
    allocator = PageAllocator(3, 2)
    pages = allocator.allocate(2)
    with pytest.raises(ValueError, match="freed 2 times and held 1 times"):
        allocator.free([pages[0], pages[1], pages[1]])
    with pytest.raises(ValueError, match="is free and cannot be shared"):
        allocator.share([pages[0], 2])
    with pytest.raises(ValueError, match="held by nobody"):
        allocator.register(2, None, [1, 2], 0)
    with pytest.raises(ValueError, match="num_pages is 1 and page_size 0"):
        PageAllocator(1, 0)
    allocator.check_integrity([pages])
    table = Table(allocator, 0)
    table.reserve(1)
    with pytest.raises(RuntimeError, match="3 tokens were committed and 2 slots are reserved"):
        table.commit([1, 2, 3])
    with pytest.raises(ValueError, match="length is 1; 0 to 0"):
        table.truncate(1)
    with pytest.raises(RuntimeError, match="empty table"):
        table.match_prefix([1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a._free.append(a._free[0]),
        lambda a: a._free.pop(),
        lambda a: a._free.append(1),
        lambda a: a._cached.popitem(),
        lambda a: a._refcounts.__setitem__(1, 0),
        lambda a: a._refcounts.__setitem__(1, 2),
        lambda a: a.index.drop(0),
        lambda a: setattr(a.index._nodes[0], "page", 1),
        lambda a: a.index._nodes[0].parent.children.clear(),
    ],
)
def test_check_integrity_notices_damage(damage) -> None:
    allocator = PageAllocator(4, 1)
    cached, held = allocator.allocate(2)
    allocator.register(cached, None, [3], 0)
    allocator.free([cached])
    allocator.check_integrity([[held]])
    damage(allocator)
    with pytest.raises(AssertionError):
        allocator.check_integrity([[held]])


def test_a_fork_copies_only_the_page_it_writes_and_its_source_stays_until_then() -> None:
    allocator = PageAllocator(4, 4)
    table = Table(allocator, None)
    table.reserve(6)
    table.commit([1] * 6)
    other = table.fork()
    assert other.pages == table.pages
    assert other.pages_needed(2) == 1
    slots = other.reserve(2)
    assert other.pages[0] == table.pages[0]
    assert slots == [other.pages[1] * 4 + 2, other.pages[1] * 4 + 3]
    source = table.pages[1]
    table.release()
    assert allocator.refcount(source) == 1  # pending
    with pytest.raises(RuntimeError, match="take_copies"):
        other.fork()
    allocator.check_integrity([other.held])
    assert other.take_copies() == [(source, other.pages[1])]
    assert allocator.refcount(source) == 0
    other.reserve(1)
    assert other.take_copies() == []  # its own by now


def test_truncate_drops_a_pending_copy() -> None:
    allocator = PageAllocator(4, 4)
    table = Table(allocator, None)
    table.reserve(6)
    table.commit([1] * 6)
    other = table.fork()
    other.reserve(1)
    other.truncate(4)
    assert other.take_copies() == []
    allocator.check_integrity([table.held, other.held])


def test_a_failed_reserve_leaves_the_table_and_the_index_alone() -> None:
    allocator = PageAllocator(2, 2)
    table = Table(allocator, 0)
    table.reserve(4)
    table.commit([1, 2, 3, 4])
    table.truncate(3)
    with pytest.raises(OutOfPages):
        table.reserve(2)
    assert allocator.index.match([1, 2, 3, 4], 0) == table.pages
    assert table.reserve(1) == [table.pages[1] * 2 + 1]  # about to be overwritten: no longer to be matched
    assert allocator.index.match([1, 2, 3, 4], 0) == table.pages[:1]
