"""An MoE layer over two gloo processes: when each chunk was sent, computed and returned, beside the model of it.

    python -m benchmarks.moe_overlap --chunks 4

The model's rates are measured too, each alone: the link's on one transfer, the GEMMs' on a chunk of rows. On CPU
transfers use the cores that GEMMs need, so overlap gains less than the model of a separate link predicts.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.common import print_table, write_json
from benchmarks.end_to_end.moe_overlap_model import Event, Layer, Rates, predict
from toolkit.moe import ExpertLayout, ExpertParallelDispatcher, ExpertWeights, dispatch_plan, moe_forward
from toolkit.moe import pipeline as pipeline_module
from toolkit.moe.dispatchers.exchange_plan import schedule
from toolkit.moe.dispatchers.transport import Collective, Pending
from toolkit.ops.experts.rows import RoutedRows, experts_rows, experts_rows_backward

EXPERTS, TOP_K, RANKS = 8, 2, 2
COMPUTES = ("experts_rows", "experts_rows_backward", "experts_weight_gradients")  # of the pipeline's module


class Traced(Collective):
    """Records when transfers of token rows begin and end, identified by their width; smaller ones are not recorded."""

    def __init__(self, group: dist.ProcessGroup, width: int) -> None:
        super().__init__(group)
        self._width = width
        self.transfers: list[list[float]] = []

    def exchange(self, rows: torch.Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        pending = super().exchange(rows, counts)
        transfer: Any = pending
        if rows.dim() == 2 and rows.shape[1] == self._width and rows.dtype == torch.float32:
            times = [time.perf_counter(), 0.0]
            self.transfers.append(times)
            transfer._work.get_future().add_done_callback(lambda _: times.__setitem__(1, time.perf_counter()))
        return pending


def events_of(transport: Traced, computed: list[list[float]], chunks: int, backward: bool) -> list[Event]:
    """Events of one pass, from its first transfer on; the transfers come in the order of the schedule."""
    zero = transport.transfers[0][0]
    order = [step for step in schedule(chunks, backward) if step.action in ("send", "compute")]
    names = [("send" if step.action == "send" else "return", step.chunk) for step in order]
    events = [Event(*name, t[0] - zero, t[1] - zero) for name, t in zip(names, transport.transfers, strict=True)]
    steps = [("compute", chunk) for chunk in range(chunks)] + [("weights", -1)] * backward
    return events + [Event(*name, t[0] - zero, t[1] - zero) for name, t in zip(steps, computed, strict=True)]


def seconds_of(action: Any, repeats: int) -> float:
    """Least seconds of an action that all ranks begin together."""
    taken = []
    for _ in range(repeats + 1):
        dist.barrier()
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return min(taken[1:])


def measured_rates(
    transport: Collective, layer: Layer, weights: ExpertWeights, chunks: int, backward: bool, repeats: int
) -> Rates:
    """Of a transfer of rows to the other rank, of an empty one, and of the GEMMs of a chunk's rows."""
    count = layer.tokens
    rows = torch.randn(count, layer.hidden_size)
    counts = [[0, count], [count, 0]]
    latency = seconds_of(lambda: transport.exchange(rows[:0], [[0, 0], [0, 0]]).wait(), repeats)
    transfer = seconds_of(lambda: transport.exchange(rows, counts).wait(), repeats)
    number = layer.tokens * layer.top_k // chunks
    expert = torch.randint(EXPERTS // RANKS, (number,), generator=torch.Generator().manual_seed(1))
    plan = dispatch_plan(expert[:, None], EXPERTS // RANKS)
    rows_here = RoutedRows(torch.randn(number, layer.hidden_size), expert, torch.rand(number), plan)
    layout = weights.layout
    how = (weights.up, weights.up_bias, weights.down, weights.down_bias, layout.activation, layout.score_position,
           layout.transposed, layout.interleaved)  # fmt: skip
    if backward:
        z = experts_rows(rows_here, *how)[1]
        grad = torch.randn_like(rows_here.x)
        gemm = seconds_of(lambda: experts_rows_backward(grad, rows_here, z, *how), repeats)
    else:
        gemm = seconds_of(lambda: experts_rows(rows_here, *how), repeats)
    return Rates(count * layer.hidden_size * 4 / max(transfer - latency, 1e-9), layer.flops / chunks / gemm, latency)


def traced_pass(layer: Layer, weights: ExpertWeights, chunks: int, repeats: int) -> dict[str, Any]:
    """Median seconds of forward and backward, and the events of the last of each."""
    transport = Traced(dist.group.WORLD, layer.hidden_size)  # type: ignore[arg-type]
    dispatcher = ExpertParallelDispatcher(chunks=chunks, transport=transport)
    generator = torch.Generator().manual_seed(2 + transport.rank)
    x = torch.randn(layer.tokens, layer.hidden_size, generator=generator).requires_grad_()
    topk_ids = torch.rand(layer.tokens, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
    topk_weights = torch.rand(layer.tokens, TOP_K, generator=generator).requires_grad_()
    computed: list[list[float]] = []
    real = {name: getattr(pipeline_module, name) for name in COMPUTES}

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments)
            computed.append([begin, time.perf_counter()])
            return result

        return call

    for name, function in real.items():
        setattr(pipeline_module, name, timed(function))
    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    events: dict[str, list[Event]] = {}
    try:
        for _ in range(repeats + 1):
            out: Any = None
            for name in seconds:
                transport.transfers.clear()
                computed.clear()
                dist.barrier()
                begin = time.perf_counter()
                if name == "forward":
                    out = moe_forward(x, topk_ids, topk_weights, weights, dispatcher)
                else:
                    out.sum().backward()
                seconds[name].append(time.perf_counter() - begin)
                events[name] = events_of(transport, computed, chunks, name == "backward")
    finally:
        for name, function in real.items():
            setattr(pipeline_module, name, function)
    return {name: {"seconds": statistics.median(seconds[name][1:]), "events": events[name]} for name in seconds}


def work(rank: int, store: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    layer = Layer(arguments.tokens, TOP_K, RANKS, arguments.hidden_size, arguments.intermediate_size)
    generator = torch.Generator().manual_seed(rank)
    up = (
        torch.randn(EXPERTS // RANKS, 2 * layer.intermediate_size, layer.hidden_size, generator=generator)
        * layer.hidden_size**-0.5
    )
    down = (
        torch.randn(EXPERTS // RANKS, layer.hidden_size, layer.intermediate_size, generator=generator)
        * layer.intermediate_size**-0.5
    )
    weights = ExpertWeights(up.requires_grad_(), down.requires_grad_(), ExpertLayout("silu"))
    group: Any = dist.group.WORLD
    transport = Collective(group)
    passes = {}
    for chunks in (1, arguments.chunks):
        passes[chunks] = traced_pass(layer, weights, chunks, arguments.repeats)
        for name, found in passes[chunks].items():
            with torch.no_grad():
                rates = measured_rates(transport, layer, weights, chunks, name == "backward", arguments.repeats)
            found["rates"] = rates
    if rank == 0:
        report(layer, passes, arguments.chunks)
    dist.destroy_process_group()


FIELDS = ("pass", "chunks", "measured ms", "model ms", "exposed ms", "bound", "link GB/s", "latency ms", "GFLOP/s")


def report(layer: Layer, passes: dict[int, Any], traced: int) -> None:
    rows: list[list[Any]] = []
    for chunks, found in passes.items():
        for name, measured in found.items():
            rates = measured["rates"]
            model = predict(layer, rates, chunks, name == "backward")
            times = [measured["seconds"] * 1e3, model.seconds * 1e3, model.exposed * 1e3]
            rows.append([name, chunks, *times, model.bound, rates.link / 1e9, rates.latency * 1e3, rates.gemm / 1e9])
    print_table("passes", FIELDS, rows)
    for name, measured in passes[traced].items():
        predicted = predict(layer, measured["rates"], traced, name == "backward").events
        model_of = {(event.action, event.chunk): event for event in predicted}
        lines = []
        for event in sorted(measured["events"], key=lambda one: one.begin):
            predicted_event = model_of[event.action, event.chunk]
            spans = [f"{e.begin * 1e3:.2f} to {e.end * 1e3:.2f}" for e in (event, predicted_event)]
            lines.append([event.action, event.chunk if event.chunk >= 0 else "all", *spans])
        print_table(f"{name}, one run, ms", ["action", "chunk", "measured", "model"], lines)
    result = {"layer": vars(layer), "passes": [dict(zip(FIELDS, row)) for row in rows]}
    print(f"written to {write_json('moe-overlap', result)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (os.path.join(folder, "store"), arguments), RANKS)


if __name__ == "__main__":
    main()
