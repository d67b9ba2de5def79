"""The prefix index: real tokens, real prefixes, one key."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.state import BlockAllocator, BlockTable, BlockTables, PrefixIndex, PrefixKey

BASE, LATER = PrefixKey(0), PrefixKey(1)


class Colliding(int):
    """A token whose hash says nothing."""

    def __hash__(self) -> int:
        return 7


def write(allocator: BlockAllocator, tokens: list[int], key: PrefixKey | None) -> tuple[BlockTable, int]:
    table = BlockTable(allocator, key)
    hit = BlockTables([table]).match_prefix(tokens)
    table.reserve(len(tokens) - hit)
    table.take_copies()
    table.commit(tokens[hit:])
    return table, hit


def test_longest_run_of_full_pages_and_never_the_whole_prompt() -> None:
    allocator = BlockAllocator(16, 4)
    tokens = list(range(10))
    table, hit = write(allocator, tokens, BASE)
    assert hit == 0
    assert allocator.prefix_index.match(tokens, BASE) == table.blocks[:2]
    assert allocator.prefix_index.match(tokens[:7], BASE) == table.blocks[:1]
    assert allocator.prefix_index.match(tokens[:3], BASE) == []
    for length, expected in ((4, 0), (5, 4), (8, 4), (9, 8), (10, 8)):
        assert BlockTables([BlockTable(allocator, BASE)]).match_prefix([]) == 0
        other = BlockTable(allocator, BASE)
        assert BlockTables([other]).match_prefix(tokens[:length]) == expected
        assert other.tokens == tokens[:expected]
        other.release()


def test_keys_and_parents_are_never_crossed() -> None:
    allocator = BlockAllocator(32, 2)
    write(allocator, [1, 2, 3, 4, 5], BASE)
    assert write(allocator, [1, 2, 3, 4, 5], LATER)[1] == 0
    assert write(allocator, [9, 9, 3, 4, 5], BASE)[1] == 0  # the same second block after another first one
    assert write(allocator, [3, 4, 5], BASE)[1] == 0  # the same block, at the start
    assert write(allocator, [1, 2, 3, 4, 5], LATER)[1] == 4
    allocator.drop_outdated(LATER)
    assert allocator.prefix_index.match([1, 2], BASE) == []
    assert len(allocator.prefix_index.match([1, 2, 3, 4], LATER)) == 2


def test_a_write_drops_only_the_blocks_of_its_own_key() -> None:
    allocator = BlockAllocator(32, 2)
    base, first, second = PrefixKey(1), PrefixKey(1, "first", 5), PrefixKey(1, "second", 5)
    keys = [base, first, second, base._replace(salt="a"), first._replace(salt="a"), first._replace(rotary="long")]
    for key in keys:
        assert write(allocator, [1, 2, 3], key)[1] == 0  # nobody finds another key's blocks

    def found() -> list[PrefixKey]:
        return [key for key in keys if allocator.prefix_index.match([1, 2], key)]

    for current in keys:
        allocator.drop_outdated(current)
    assert found() == keys
    allocator.drop_outdated(first._replace(adapter_version=6))
    assert found() == [base, second, keys[3]]
    allocator.drop_outdated(second._replace(weights=2))
    assert found() == []


def test_colliding_hashes_are_told_apart() -> None:
    index = PrefixIndex(2)
    one = [Colliding(1), Colliding(2)]
    two = [Colliding(3), Colliding(4)]
    assert hash(tuple(one)) == hash(tuple(two))
    first, second = index.register(0, None, one, BASE), index.register(1, None, two, BASE)
    index.register(2, first, one, BASE)
    index.register(3, second, one, BASE)
    assert index.match(one + one, BASE) == [0, 2]
    assert index.match(two + one, BASE) == [1, 3]
    assert index.match(two + two, BASE) == [1]
    index.check_integrity()


def test_what_follows_a_truncation_hangs_from_what_was_kept() -> None:
    allocator = BlockAllocator(8, 2)
    table, _ = write(allocator, [1, 2, 3, 4, 5], BASE)
    for keep, added, known in ((2, [6, 7], [1, 2, 6, 7]), (1, [8, 9, 9], [1, 8, 9, 9]), (0, [3, 4], [3, 4])):
        table.truncate(keep)
        table.reserve(len(added))
        table.commit(added)
        assert allocator.prefix_index.match(known, BASE) == table.blocks
    assert len(allocator.prefix_index.match([1, 2, 3, 4, 6, 7], BASE)) < 3
    allocator.check_integrity([table.held])


def test_an_evicted_beginning_hides_the_rest_until_it_is_computed_again() -> None:
    index = PrefixIndex(1)
    node = index.register(0, None, [1], BASE)
    index.register(1, node, [2], BASE)
    index.drop(0)
    assert index.match([1, 2], BASE) == []
    index.register(5, None, [1], BASE)
    assert index.match([1, 2], BASE) == [5, 1]
    index.check_integrity()


def test_the_first_block_with_some_tokens_stays_the_registered_one() -> None:
    allocator = BlockAllocator(8, 2)
    pair = [BlockTable(allocator, BASE) for _ in range(2)]
    for table in pair:  # scheduled together, so that neither could match the other
        table.reserve(5)
    for table in pair:
        table.commit([1, 2, 3, 4, 5])
    assert allocator.prefix_index.match([1, 2, 3, 4], BASE) == pair[0].blocks[:2]
    for table in pair:
        table.release()
    allocator.check_integrity([])
    assert allocator.num_cached_blocks == 2


def test_what_two_weight_versions_wrote_is_never_registered() -> None:
    allocator = BlockAllocator(8, 2)
    table, _ = write(allocator, [1, 2, 3], BASE)
    table.reserve(3)
    table.commit([4, 5, 6], key=LATER)
    assert allocator.prefix_index.match([1, 2, 3, 4, 5, 6], BASE) == table.blocks[:1]
    assert allocator.prefix_index.match([1, 2], LATER) == []
    table.truncate(1)
    table.reserve(1)
    table.commit([2])
    assert allocator.prefix_index.match([1, 2], BASE) == []
    table.release()
    allocator.check_integrity([])


def test_no_key_means_no_prefix_caching() -> None:
    allocator = BlockAllocator(8, 2)
    table, _ = write(allocator, [1, 2, 3], None)
    assert len(allocator.prefix_index) == 0
    assert write(allocator, [1, 2, 3], None)[1] == 0
    table.release()
    assert allocator.num_cached_blocks == 0


def test_bad_registrations_are_refused() -> None:
    index = PrefixIndex(2)
    node = index.register(0, None, [1, 2], BASE)
    with pytest.raises(ValueError, match="must be full with 2 tokens, got 1"):
        index.register(1, node, [3], BASE)
    with pytest.raises(ValueError, match="must be registered once, got other tokens"):
        index.register(0, node, [3, 4], BASE)
    with pytest.raises(ValueError, match="key must be that of the prefix"):
        index.register(1, node, [3, 4], LATER)
    assert index.match([1, 2, 3, 4], BASE) == [0]


def test_a_long_chain_is_let_go_without_recursion() -> None:
    allocator = BlockAllocator(10_000, 1)
    table, _ = write(allocator, list(range(10_000)), BASE)
    table.release()
    allocator.drop_outdated(LATER)
    assert len(allocator.prefix_index) == 0
    allocator.check_integrity([])


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 3),
    entries=st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.sampled_from([BASE, LATER])), max_size=8
    ),
    query=st.lists(st.integers(0, 1), max_size=9),
    key=st.sampled_from([BASE, LATER]),
)
def test_match_equals_a_search_through_everything_written(size, entries, query, key) -> None:
    allocator = BlockAllocator(200, size)
    for tokens, entry_key in entries:
        write(allocator, tokens, entry_key)
    best = 0
    for tokens, entry_key in entries:
        if entry_key == key:
            same = 0
            while (same + 1) * size <= min(len(tokens), len(query)) and (
                tokens[: (same + 1) * size] == query[: (same + 1) * size]
            ):
                same += 1
            best = max(best, same)
    assert len(allocator.prefix_index.match(query, key)) == best
