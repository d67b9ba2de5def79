import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.helpers.implementations import TRITON, impl_and_dtype, only_triton
from tests.helpers.interpreter import far_apart
from tests.helpers.rowwise import seeded, threads
from toolkit.errors import ToolkitError
from toolkit.ops.sample import penalize


class Rows:
    """Random histories and penalties: row b has b + 0 to b + 40 tokens, some ids of them outside the vocabulary."""

    def __init__(self, count: int, vocabulary: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, size: int) -> list[int]:
            return torch.randint(low, high, (size,), generator=generator).tolist()

        self.vocabulary = vocabulary
        self.histories = [integers(-2, vocabulary + 3, n) for n in integers(0, 60, count)]
        self.prompts = [min(n, len(one)) for n, one in zip(integers(0, 40, count), self.histories)]
        self.repetition, self.frequency, self.presence = (
            torch.rand(count, 3, generator=generator, dtype=torch.float64).sub(0.3).mul(3).unbind(-1)
        )
        self.repetition = self.repetition.abs() + 0.1
        self.suppressed = [integers(0, vocabulary + 9, n) for n in integers(0, 4, count)]

    def arguments(self, order: list[int]) -> list[Tensor]:
        histories, suppressed = [self.histories[b] for b in order], [self.suppressed[b] for b in order]
        return [
            torch.tensor([*itertools.chain(*histories)], dtype=torch.int64),
            torch.tensor([0, *map(len, histories)]).cumsum(0),
            torch.tensor([self.prompts[b] for b in order], dtype=torch.int64),
            self.repetition[order],
            self.frequency[order],
            self.presence[order],
            torch.tensor([*itertools.chain(*suppressed)], dtype=torch.int64),
            torch.tensor([0, *map(len, suppressed)]).cumsum(0),
        ]

    def oracle(self, logits: Tensor) -> Tensor:
        """A loop over tokens in Python's floats, rounded once."""
        rows = logits.double().tolist()
        for b, row in enumerate(rows):
            output = Counter(self.histories[b][self.prompts[b] :])
            factor, each, once = (float(x[b]) for x in (self.repetition, self.frequency, self.presence))
            for token in set(self.histories[b]) & set(range(self.vocabulary)):
                row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
                if output[token]:
                    row[token] -= each * output[token] + once
            for token in set(self.suppressed[b]) & set(range(self.vocabulary)):
                row[token] = -math.inf
        return (
            torch.tensor(rows, dtype=torch.float64)
            .view(logits.shape)
            .to(torch.promote_types(logits.dtype, torch.float32))
        )


@impl_and_dtype()
@pytest.mark.parametrize(("count", "vocabulary"), [(1, 1), (3, 7), (13, 60), (5, 8193)])
def test_equals_the_oracle(impl, dtype, count, vocabulary):
    rows = Rows(count, vocabulary)
    logits = seeded(count, vocabulary, dtype=dtype, scale=3.0)
    logits[:, ::5] = 0.0
    before = logits.clone()
    result = penalize(logits, *rows.arguments(list(range(count))), impl=impl.option)
    assert torch.equal(logits, before)
    assert torch.equal(result, rows.oracle(logits))


def test_by_hand(impl):
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, -1.0, 3.0]])
    one = [torch.tensor([value], dtype=torch.float64) for value in (2.0, 0.5, 0.25)]
    history, none = torch.tensor([0, 1, 2, 2, 2, 1]), torch.zeros(0, dtype=torch.int64)
    given = [history, torch.tensor([0, 6]), torch.tensor([2]), *one, none, torch.tensor([0, 0])]
    # 0, 1 and 2 were seen; 2 came out three times and 1 once.
    assert penalize(logits, *given, impl=impl.option).tolist() == [
        [1.0, -4.0 - 0.5 - 0.25, 0.5 - 1.5 - 0.25, 0.5, -1.0, 3.0]
    ]
    given[-2:] = [torch.tensor([5, 0, 99]), torch.tensor([0, 3])]
    assert penalize(logits, *given, impl=impl.option)[0, [0, 5]].tolist() == [-math.inf, -math.inf]


def test_a_row_does_not_depend_on_its_neighbours(impl):
    rows = Rows(17, 9001)
    logits = seeded(17, 9001, dtype=torch.float32)
    whole = penalize(logits, *rows.arguments(list(range(17))), impl=impl.option)
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2):
        with threads(count):
            for size in (1, 2, 8, 17):
                order = torch.randperm(17, generator=generator)[:size].tolist()
                assert torch.equal(penalize(logits[order], *rows.arguments(order), impl=impl.option), whole[order])


def test_strided_empty_and_long(impl):
    rows = Rows(4, 30)
    base = seeded(8, 60, dtype=torch.float32)
    given = rows.arguments([0, 1, 2, 3])
    for view in (base[::2, :30], base[:4, ::2], base.t()[:30, :4].t()):
        assert torch.equal(penalize(view, *given, impl=impl.option), rows.oracle(view))
    assert penalize(base[:0], *Rows(0, 60).arguments([]), impl=impl.option).shape == (0, 60)
    long = Rows(1, 30)
    long.histories, long.prompts = [[7, 3, 7] * (500 if impl is TRITON else 20_000)], [1]
    assert torch.equal(penalize(base[:1, :30], *long.arguments([0]), impl=impl.option), long.oracle(base[:1, :30]))


def test_bad_input_is_named(impl):
    given = Rows(2, 4).arguments([0, 1])
    with pytest.raises(ToolkitError, match=r"logits must have shape .* got \[4\]"):
        penalize(torch.zeros(4), *given, impl=impl.option)
    with pytest.raises(ToolkitError, match=r"offsets must have shape \[3\] for logits of shape \[2, 4\], got \[2\]"):
        penalize(torch.zeros(2, 4), given[0], given[1][:2], *given[2:], impl=impl.option)
    with pytest.raises(ToolkitError, match=r"repetition must have dtype float32 or float64, got torch.int64"):
        penalize(torch.zeros(2, 4), *given[:3], given[3].long(), *given[4:], impl=impl.option)


def test_opcheck():
    torch.library.opcheck(
        torch.ops.toolkit.penalize.default, (seeded(3, 8, dtype=torch.float32), *Rows(3, 8).arguments([0, 1, 2]))
    )


@only_triton
@pytest.mark.usefixtures("impl")
def test_rows_further_apart_than_two_to_the_31_and_a_dtype_that_is_named():
    logits, given = seeded(2, 300, dtype=torch.float32), Rows(2, 300).arguments([0, 1])
    assert torch.equal(penalize(far_apart(logits), *given), penalize(logits, *given))
    with pytest.raises(ToolkitError, match=r"kernels of penalize, got torch\.float64"):
        penalize(torch.zeros(1, 4, dtype=torch.float64), *Rows(1, 4).arguments([0]))
