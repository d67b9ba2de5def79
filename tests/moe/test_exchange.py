"""Expert parallelism: bitwise identical to one process, gradients of the float64 op, every shape of traffic."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.exchange_cases import Case, exchanged, make_case, on_one
from tests.helpers.ranks import Threads, on_ranks
from toolkit.errors import ToolkitError
from toolkit.moe import ExpertAdapters, ExpertParallelDispatcher, moe_forward
from toolkit.moe.dispatchers.exchange_plan import Step, schedule
from toolkit.moe.dispatchers.transport import SingleRank


def joined(results: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.cat([out for out, _ in results]), {
        name: torch.cat([gradients[name] for _, gradients in results]) for name in results[0][1]
    }


def check(case: Case, size: int, chunks: int, recompute: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Output to the bit, gradients to rounding of the float64 op."""
    out, gradients = joined(on_ranks(size, lambda transport: exchanged(case, transport, chunks, recompute)))
    assert torch.equal(out, on_one(case, case.x.dtype)[0])
    for name, expected in on_one(case, torch.float64)[1].items():
        limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[case.x.dtype]
        assert (gradients[name].double() - expected).norm() <= limit * expected.norm().clamp_min(1e-30), name
    return out, gradients


def some_tokens(chance: random.Random, size: int) -> list[int]:
    return [chance.choice([0, 1, 2, 7, 13]) for _ in range(size)]


@pytest.mark.parametrize("seed", range(12))
def test_any_number_of_ranks_has_the_bits_of_one(seed: int) -> None:
    chance = random.Random(seed)
    tokens = some_tokens(chance, 4)
    layout: dict[str, Any] = {
        "score_position": chance.choice(["activation", "combine", "input"]),
        "gated": chance.choice([True, True, False]),
        "bias": chance.choice([True, False]),
        "transposed": chance.choice([True, False]),
    }
    layout["interleaved"] = layout["gated"] and chance.choice([True, False])
    dtype = chance.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    four = make_case(seed, tokens, dtype=dtype, **layout)
    two = make_case(seed, [sum(tokens[:2]), sum(tokens[2:])], dtype=dtype, **layout)
    one = make_case(seed, [sum(tokens)], dtype=dtype, **layout)
    found = [
        check(case, size, chance.choice([1, 2, 3, 5]), chance.choice([True, False]))
        for case, size in ((four, 4), (two, 2), (one, 1))
    ]
    for out, gradients in found[1:]:
        assert torch.equal(out, found[0][0])
        for name in ("x", "topk_weights"):
            assert torch.equal(gradients[name], found[0][1][name]), name


def test_chunks_change_no_bit() -> None:
    case = make_case(5, [9, 14], bias=True)
    wanted = check(case, 2, 1)
    for chunks in (2, 3, 8, 40):
        out, gradients = check(case, 2, chunks)
        assert torch.equal(out, wanted[0])
        assert all(torch.equal(gradients[name], wanted[1][name]) for name in gradients)


def test_weights_get_what_one_rank_adds_up_over_the_ranks_batches() -> None:
    case = make_case(6, [11, 8, 0, 17], bias=True)
    gradients = check(case, 4, 2)[1]
    for name in ("up", "down", "up_bias", "down_bias"):
        parts = []
        for rank in range(4):
            mine = case.of_rank(rank)
            alone = Case(
                case.x[mine], case.topk_ids[mine], case.topk_weights[mine], case.grad[mine], case.weights, [0], 8
            )
            alone.tokens = [len(alone.x)]
            parts.append(exchanged(alone, SingleRank(), 3)[1][name])
        assert torch.equal(gradients[name], parts[0] + parts[1] + parts[2] + parts[3]), name


@pytest.mark.parametrize(
    ("tokens", "only"),
    [
        ([0, 0, 0, 0], None),  # nobody has a token
        ([0, 9, 0, 3], None),
        ([5, 4, 3, 6], range(2, 4)),  # all to one rank
        ([5, 0, 0, 0], range(6, 8)),  # one rank sends, another computes
        ([5, 4, 3, 6], range(8, 9)),  # every pair is skipped
    ],
)
def test_traffic_of_every_shape(tokens: list[int], only: range | None) -> None:
    check(make_case(1, tokens, only=only), 4, 2)


def test_a_token_goes_to_a_rank_once_and_comes_back_once_per_pair() -> None:
    case = make_case(2, [20, 20], top_k=4)
    sent: list[tuple[int, torch.Size]] = []

    def run(transport: Threads) -> Tensor:
        original = transport.exchange

        def exchange(rows: Tensor, counts: Any) -> Any:
            sent.append((transport.rank, rows.shape))
            return original(rows, counts)

        transport.exchange = exchange  # type: ignore[method-assign]
        dispatcher = ExpertParallelDispatcher(chunks=1, transport=transport)
        mine, owned = case.of_rank(transport.rank), dispatcher.owned(8)
        weights = case.weights._replace(up=case.weights.up[owned], down=case.weights.down[owned])
        return moe_forward(case.x[mine], case.topk_ids[mine], case.topk_weights[mine], weights, dispatcher)

    on_ranks(2, run)
    for rank in range(2):
        ids = case.topk_ids[case.of_rank(rank)]
        rows = sum(len({int(e) // 4 for e in line if e < 8}) for line in ids)
        pairs = int((ids < 8).sum())
        shapes = [tuple(shape) for who, shape in sent if who == rank]
        assert rows < pairs
        assert shapes[:2] == [(pairs, 12), (rows, 10)]
    assert sum(shape[0] for _, shape in sent if shape[1] == 10) == sum(
        len({int(e) // 4 for e in line if e < 8}) for line in case.topk_ids
    ) + int((case.topk_ids < 8).sum())


def test_only_what_needs_a_gradient_gets_one() -> None:
    case = make_case(3, [6])
    dispatcher = ExpertParallelDispatcher()
    weights = case.weights._replace(up=case.weights.up.clone().requires_grad_())
    out = moe_forward(case.x, case.topk_ids, case.topk_weights, weights, dispatcher)
    out.backward(case.grad)
    assert torch.equal(weights.up.grad, exchanged(case, SingleRank(), 2)[1]["up"])  # type: ignore[arg-type]
    assert not moe_forward(case.x, case.topk_ids, case.topk_weights, case.weights, dispatcher).requires_grad


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_second_derivative_is_refused(sharded: bool, recompute: bool) -> None:
    case = make_case(3, [6])
    dispatcher = (ExpertParallelDispatcher(),) if sharded else ()
    x = case.x.clone().requires_grad_()
    out = moe_forward(x, case.topk_ids, case.topk_weights, case.weights, *dispatcher, recompute=recompute)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(ToolkitError, match="has no second derivative"):
        torch.autograd.grad(gradient.square().sum(), x)


def test_schedule_sends_ahead_and_takes_late() -> None:
    assert schedule(1) == [Step("send", 0), Step("compute", 0), Step("receive", 0)]
    assert schedule(3, backward=True) == [
        Step("send", 0),
        Step("send", 1),
        Step("compute", 0),
        Step("send", 2),
        Step("compute", 1),
        Step("receive", 0),
        Step("compute", 2),
        Step("receive", 1),
        Step("weights"),
        Step("receive", 2),
    ]


def test_errors_are_one_sentence() -> None:
    case = make_case(4, [3, 3, 3], num_experts=8)
    with pytest.raises(ToolkitError, match="must be a multiple of the 3 ranks of expert parallelism, got 8"):
        on_ranks(3, lambda transport: exchanged(case, transport, 2))
    with pytest.raises(ToolkitError, match="chunks must be >= 1, got 0"):
        ExpertParallelDispatcher(chunks=0)
    dispatcher = ExpertParallelDispatcher()
    with pytest.raises(ToolkitError, match=r"got \[9, 10\], \[4, 3\] and \[9, 3\]"):
        moe_forward(case.x, case.topk_ids[:4], case.topk_weights, case.weights, dispatcher)
    with pytest.raises(ToolkitError, match="sharded over ranks cannot have adapters"):
        moe_forward(case.x, case.topk_ids, case.topk_weights, case.weights, dispatcher, adapters=ExpertAdapters())
