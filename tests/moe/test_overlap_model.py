"""The model of the overlap against results by hand, and its traffic against the exchange's."""

from itertools import pairwise

import pytest
import torch

from benchmarks.end_to_end.moe_overlap_model import Costs, Layer, Rates, costs, pipeline, predict
from toolkit.moe.dispatchers.exchange_plan import plan_exchange
from toolkit.moe.dispatchers.transport import SingleRank


def test_one_chunk_overlaps_nothing() -> None:
    timeline = pipeline(1, Costs(3.0, 5.0, 7.0), latency=0.5)
    assert timeline.seconds == 3.0 + 5.0 + 7.0 + 2 * 0.5
    assert timeline.exposed == 11.0
    assert [event.action for event in timeline.events] == ["send", "compute", "return"]


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_gemms_that_take_longer_hide_all_but_fill_and_drain(chunks: int) -> None:
    timeline = pipeline(chunks, Costs(8.0, 80.0, 16.0))
    assert timeline.seconds == pytest.approx(80.0 + 8.0 / chunks + 16.0 / chunks)
    assert timeline.bound == "compute"


def test_weights_hide_the_drain_of_a_backward() -> None:
    timeline = pipeline(4, Costs(8.0, 80.0, 16.0, 80.0))
    assert timeline.seconds == pytest.approx(160.0 + 8.0 / 4)


@pytest.mark.parametrize("chunks", [4, 16])
def test_a_slow_link_is_never_idle_for_longer_than_a_chunk_of_gemms(chunks: int) -> None:
    timeline = pipeline(chunks, Costs(60.0, 6.0, 90.0))
    assert 150.0 <= timeline.seconds <= 150.0 + 6.0
    assert timeline.bound == "link"
    carried = sorted((e.begin, e.end) for e in timeline.events if e.action in ("send", "return"))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(carried))


def test_rows_are_those_of_the_exchange() -> None:
    """Expected rows by the formula, and counted on random routings to distinct experts' ranks."""

    class Counting(SingleRank):
        size = 4

        def gather(self, values: torch.Tensor) -> torch.Tensor:
            return values[None].expand(4, *values.shape)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(64, (4000, 3), generator=generator)
    (chunk,) = plan_exchange(ids, 64, 1, Counting())
    layer = Layer(tokens=4000, top_k=3, ranks=4, hidden_size=8, intermediate_size=4)
    away = sum(chunk.row_counts[0][1:]), sum(chunk.pair_counts[0][1:])
    assert away[0] == pytest.approx(layer.rows_sent, rel=0.02)
    assert away[1] == pytest.approx(layer.rows_returned, rel=0.02)


def test_a_prediction_is_made_of_bytes_and_flops() -> None:
    layer = Layer(tokens=100, top_k=2, ranks=2, hidden_size=10, intermediate_size=6)
    assert layer.rows_sent == 75
    assert layer.rows_returned == 100
    assert layer.flops == 2 * 200 * (10 * 12 + 6 * 10)
    found = costs(layer, Rates(link=2.0, gemm=4.0))
    assert found == Costs((75 * 40 + 12 * 100) / 2.0, layer.flops / 4.0, 100 * 40 / 2.0)
    backward = costs(layer, Rates(link=2.0, gemm=4.0), backward=True)
    assert backward == Costs(75 * 40 / 2.0, layer.flops / 4.0, (100 * 40 + 400) / 2.0, layer.flops / 4.0)
    assert predict(layer, Rates(1e9, 1e9, 1.0), 2).seconds >= 4.0
    assert predict(Layer(100, 2, 1, 10, 6), Rates(1.0, 1e3), 3).exposed == pytest.approx(0.0)
