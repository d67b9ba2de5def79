"""Block tables whose steps draft tokens: with any of them rejected, they end as ordinary steps would have left them."""

import random

import pytest

from toolkit.state import BlockManager, OutOfBlocks, PrefixKey
from toolkit.state.block_manager import Group

SIZE = 4
GROUPS = (Group(), Group(lookback=6), Group(lookback=1, snapshot_interval=3))
KEY = PrefixKey(0)


class Contents:
    """What the blocks of one manager hold: of slots the tokens up to each, of snapshots the tokens of the state."""

    def __init__(self, num_blocks=60):
        self.manager = BlockManager(GROUPS, [num_blocks] * len(GROUPS), SIZE)
        self.slots = [{}, {}]
        self.snapshots = {}

    def step(self, tables, tokens, known, drafted):
        """``known`` tokens and ``drafted`` others behind them run; the former and those equal in ``tokens`` stay."""
        start = tables.length
        run = tokens[start : start + known] + drafted
        slots = tables.reserve(len(run), drafts=bool(drafted))
        for group, copies in enumerate(tables.take_copies()):
            for source, target in copies:
                self.copy(group, source, target)
        past = tokens[:start]
        for row, token in enumerate(run):
            for group in range(2):
                self.slots[group][slots[group][row]] = (*past, *run[:row], token)
        snapshots = tables.parts[2]
        if start:
            assert self.snapshots[snapshots.load_block()] == tuple(past)
        for row, block in snapshots.store_blocks(len(run)):
            self.snapshots[block] = (*past, *run[: row + 1])
        kept = known
        while kept < len(run) and start + kept < len(tokens) and tokens[start + kept] == run[kept]:
            kept += 1
        tables.commit(tokens[start : start + kept], KEY)

    def copy(self, group, source, target):
        if group == 2:
            self.snapshots[target] = self.snapshots[source]
        else:
            for offset in range(SIZE):
                held = self.slots[group].get(source * SIZE + offset)
                if held is not None:
                    self.slots[group][target * SIZE + offset] = held

    def check(self, tables, tokens):
        """Every block that the sequence still reads holds what it is to hold."""
        length = tables.length
        for group in range(2):
            part = tables.parts[group]
            for at in range(max(0, length - GROUPS[group].lookback) if group else 0, length):
                slot = part.blocks[at // SIZE] * SIZE + at % SIZE
                assert self.slots[group][slot] == tuple(tokens[: at + 1])
        if length:
            assert self.snapshots[tables.parts[2].load_block()] == tuple(tokens[:length])


@pytest.mark.parametrize("seed", range(30))
def test_drafted_steps_leave_what_ordinary_steps_would(seed):
    chance = random.Random(seed)
    drafting, plain = Contents(), Contents()
    pairs = []
    for _ in range(120):
        action = chance.random()
        if not pairs or action < 0.1:
            tokens = [chance.randrange(5) for _ in range(chance.randint(1, 30))]
            of_both = [one.manager.new_block_tables(KEY) for one in (drafting, plain)]
            hits = [tables.match_prefix([*tokens, -1]) for tables in of_both]
            assert hits[0] == hits[1]
            pairs.append((tokens, *of_both))
        elif action < 0.2 and len(pairs) < 5:
            tokens, mine, other = chance.choice(pairs)
            pairs.append((tokens.copy(), mine.fork(), other.fork()))
        elif action < 0.3 or min(drafting.manager.num_free_blocks + plain.manager.num_free_blocks) < 16:
            _, mine, other = pairs.pop(chance.randrange(len(pairs)))
            mine.release()
            other.release()
        else:
            tokens, mine, other = chance.choice(pairs)
            if mine.length == len(tokens):
                tokens.append(chance.randrange(5))
            known = len(tokens) - mine.length if chance.random() < 0.5 else 1
            right = [chance.randrange(5) for _ in range(chance.randint(0, 7))]
            tokens += right if known == len(tokens) - mine.length else []
            draft = right[: chance.randint(0, len(right))] + [9] * chance.randint(0, 3)
            before = mine.length
            drafting.step(mine, tokens, known, draft)
            while other.length < mine.length:  # one token at a time, as decoding would
                plain.step(other, tokens, 1 if before else mine.length, [])
        for tokens, mine, other in pairs:
            drafting.check(mine, tokens)
            for one, another in zip(mine.parts[:2], other.parts[:2]):
                assert one.first_read(one.length) == another.first_read(another.length)
        drafting.manager.check_integrity([mine for _, mine, _ in pairs])
    for _, mine, other in pairs:
        mine.release()
        other.release()
    drafting.manager.check_integrity([])


def test_a_step_that_fails_before_its_commit_leaves_nothing_behind():
    contents = Contents(8)
    tables = contents.manager.new_block_tables(None)
    tokens = list(range(9))
    contents.step(tables, tokens, 6, [])
    free = contents.manager.num_free_blocks
    tables.reserve(4, drafts=True)
    tables.reserve(4, drafts=True)
    assert contents.manager.num_free_blocks[2] == free[2] - 4
    contents.manager.check_integrity([tables])
    contents.step(tables, tokens, 1, [])
    contents.check(tables, tokens)
    tables.release()
    assert contents.manager.num_free_blocks == (8, 8, 8)


def test_without_blocks_for_a_draft_nothing_is_taken():
    contents = Contents(3)
    tables = contents.manager.new_block_tables(None)
    contents.step(tables, list(range(5)), 5, [])
    before = contents.manager.num_free_blocks
    with pytest.raises(OutOfBlocks):
        tables.reserve(6, drafts=True)
    assert contents.manager.num_free_blocks == before
    tables.reserve(1)
