"""Runs that other numbers of processes continue: every line is read once an epoch, whoever reads it."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.objective_recipes import Uneven
from toolkit.training.examples import LineStream, Packed
from toolkit.training.jsonl import Line
from toolkit.training.preparing import Example
from toolkit.training.streamed import ShuffledStream
from toolkit.training.tasks.base import ProblemStream

LINES = 61
WORLDS = (1, 2, 3, 4, 5)


class Rows:
    """Of a dataset that is read in order."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> Line:
        if self.at == LINES:
            raise StopIteration
        self.at += 1
        return Line(self.at - 1, {}, "rows")

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def line_stream(rank: int, world_size: int) -> LineStream:
    return LineStream(range(LINES), 3, rank=rank, world_size=world_size)


def shuffled(rank: int, world_size: int) -> ShuffledStream:
    rows: Any = Rows
    return ShuffledStream(rows, lambda line: True, lambda line: line, 3, 13, rank, world_size)


@pytest.mark.parametrize(("make", "seed"), [(make, seed) for make in (line_stream, shuffled) for seed in range(8)])
def test_every_line_is_read_once_an_epoch(make: Callable[[int, int], Any], seed: int) -> None:
    chance = random.Random(seed)
    read: dict[int, Counter[Any]] = {}
    world = chance.choice(WORLDS)
    streams = [make(rank, world) for rank in range(world)]
    while min(stream.state_dict()["epoch"] for stream in streams) < 3:
        for stream in streams:  # those that pack by tokens read other numbers of lines
            for _ in range(chance.randrange(12)):
                (line,) = stream.take(1)
                number = line if isinstance(line, int) else line.number
                read.setdefault(stream.state_dict()["epoch"], Counter())[number] += 1
        if chance.random() < 0.4:
            states = [stream.state_dict() for stream in streams]
            other = chance.choice(WORLDS)
            streams = [make(rank, other) for rank in range(other)]
            for rank, stream in enumerate(streams):
                if other == world:
                    stream.load_state_dict(states[rank])
                else:
                    stream.follow(states)
            world = other
    for epoch in range(3):
        assert read[epoch] == Counter(range(LINES)), epoch


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (2, 3), (4, 2)])
def test_steps_of_so_many_problems_are_those_of_any_number_of_processes(worlds: tuple[int, int]) -> None:
    """A step takes the same problems whoever shares them: the run of another number of processes is the same run."""
    task, step = Uneven(), 12

    def steps(count: int, world: int, states: list[dict[str, Any]] | None = None) -> Any:
        streams = [ProblemStream(task, 5, 0.2, rank=rank, world_size=world) for rank in range(world)]
        for stream in streams if states is not None else ():
            stream.follow(states or [])
        taken = [[problem.key for s in streams for problem in s.take(step // world)] for _ in range(count)]
        return [sorted(keys) for keys in taken], [stream.state_dict() for stream in streams]

    whole, _ = steps(15, 1)  # of one chunk: what is left of a chunk at its end is not divided evenly
    before, states = steps(6, worlds[0])
    after, again = steps(8, worlds[1], states)
    back, _ = steps(1, worlds[0], again)
    assert [*before, *after, *back] == whole


def test_a_source_that_is_trained_on_in_part_is_read_again() -> None:
    def packed(rank: int, world: int) -> Packed:
        stream: Any = line_stream(rank, world)
        return Packed(stream, lambda line: [Example([line, part], [], []) for part in range(3)], 0, batch_size=2)

    two = [packed(rank, 2) for rank in range(2)]
    for one in (two[0], two[1], two[1]):
        one.next_batch()
    # Of the first line two parts are trained on, the second is done, the fourth begun.
    order = line_stream(0, 1).take(LINES)
    alone = packed(0, 1)
    alone.follow([one.state_dict() for one in two])
    parts = [one.inputs for _ in range((LINES - 1) * 3 // 2) for one in alone.next_batch()]
    assert parts == [[line, part] for line in (order[0], *order[2:]) for part in range(3)]
