"""The memory of a step's inputs: only what changed is written, and a copy on a device has what was written."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from toolkit.engine.step.inputs import Columns, ResidentTables, padded_width

CPU = torch.device("cpu")


@dataclass
class Part:
    blocks: list[int] = field(default_factory=list)


class FakeTables:
    def __init__(self):
        self.parts = [Part(), Part()]


class Told:
    """A sequence that says which of its entries are known, as engines' do."""

    def __init__(self):
        self.block_tables = FakeTables()
        self.table_stamp = self.num_known_blocks = 0

    def grow(self, chance):
        for part in self.block_tables.parts:
            part.blocks += [chance.randrange(500) for _ in range(chance.choice((0, 1, 1, 3)))]
        shortest = min(len(part.blocks) for part in self.block_tables.parts)
        for part in self.block_tables.parts:
            del part.blocks[shortest:]

    def change(self, chance):
        """Blocks from some index on become others, as after a fork or a truncation."""
        first = chance.randrange(len(self.block_tables.parts[0].blocks) + 1)
        for part in self.block_tables.parts:
            part.blocks[first:] = [chance.randrange(500) for _ in part.blocks[first:]]
        self.num_known_blocks = min(self.num_known_blocks, first)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_tables_are_those_of_the_sequences_wherever_they_move(shared, seed):
    chance = random.Random(seed)
    tables = ResidentTables([0, 1], 4, 40, CPU, shared)
    sequences = [Told() for _ in range(4)]
    for _ in range(300):
        for one in sequences:
            if len(one.block_tables.parts[0].blocks) < 36:
                one.grow(chance)
            if chance.random() < 0.1:
                one.change(chance)
        if chance.random() < 0.1:
            sequences[chance.randrange(len(sequences))] = Told()
        if chance.random() < 0.1:
            chance.shuffle(sequences)
        batch = sequences[: chance.randint(1, len(sequences))]
        longest = max(len(one.block_tables.parts[0].blocks) for one in batch)
        tables.begin(len(batch), longest)
        for row, one in enumerate(batch):
            tables.write(row, one, len(one.block_tables.parts[0].blocks))
        tables.upload()
        for group in (0, 1):
            view = tables.view(group, len(batch))
            assert view.is_contiguous()
            assert view.shape[1] == min(40, padded_width(longest))
            for found, one in zip(view.tolist(), batch):
                blocks = one.block_tables.parts[group].blocks
                assert found[: len(blocks)] == blocks


def test_only_entries_that_changed_are_written():
    tables, one = ResidentTables([0], 2, 8, CPU, True), Told()
    one.block_tables.parts[0].blocks = [3, 4]
    tables.write(0, one, 2)
    view = tables.view(0, 1)
    view[0, 0] = 77  # a second write of it would show
    one.block_tables.parts[0].blocks += [5]
    tables.write(0, one, 3)
    assert view[0, :3].tolist() == [77, 4, 5]
    tables.write(1, one, 3)  # at another place it is written anew
    assert tables.view(0, 2)[1, :3].tolist() == [3, 4, 5]
    tables.write(0, one, 3)
    assert view[0, :3].tolist() == [3, 4, 5]


def test_blocks_that_are_not_held_are_block_zero():
    tables, one = ResidentTables([0], 1, 8, CPU, True), Told()
    one.block_tables.parts[0].blocks = [-1, -1, 6]
    tables.write(0, one, 3)
    assert tables.view(0, 1)[0, :3].tolist() == [0, 0, 6]


def test_tables_stay_where_they_are_until_more_sequences_come():
    tables, one = ResidentTables([0], 2, 8, CPU, True), Told()
    one.block_tables.parts[0].blocks = [9]
    tables.write(0, one, 1)
    before = tables.view(0, 1)
    tables.begin(2, 1)
    assert tables.view(0, 1) is before
    tables.begin(3, 1)
    tables.write(0, one, 1)
    after = tables.view(0, 1)
    assert after.data_ptr() != before.data_ptr()
    assert after[0, 0] == 9


@pytest.mark.parametrize("shared", [True, False])
def test_columns_stay_where_they_are(shared):
    columns = Columns(["a", "b"], 6, CPU, shared)
    first = columns.write("a", [1, 2, 3])
    columns.upload()
    assert first.tolist() == [1, 2, 3]
    second = columns.write("a", [4, 5, 6])
    columns.write("b", list(range(7)))
    columns.upload()
    assert second is first
    assert first.tolist() == [4, 5, 6]
    assert columns.view("b", 7).tolist() == list(range(7))
    assert columns.along_axes(3) is columns.along_axes(3)


@pytest.mark.parametrize(("blocks", "columns"), [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (1000, 1024)])
def test_widths_are_few(blocks, columns):
    assert padded_width(blocks) == columns
    assert len({padded_width(one) for one in range(1, 1001)}) == 8
