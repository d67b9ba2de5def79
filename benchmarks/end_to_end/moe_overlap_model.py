"""A model of an exchange's time: the schedule of ``exchange_plan`` on two clocks, the link's and the GEMMs'.

T tokens per rank, K experts per token, W ranks. Units are seconds, bytes and FLOPs.
"""

from dataclasses import dataclass
from typing import NamedTuple

from toolkit.moe.dispatchers.exchange_plan import schedule


@dataclass(frozen=True)
class Layer:
    """An MoE layer on one of W ranks, with its tokens routed evenly.

    Args:
        itemsize: bytes per element of the rows.
        weight_itemsize: bytes per routing weight.
    """

    tokens: int
    top_k: int
    ranks: int
    hidden_size: int
    intermediate_size: int
    gated: bool = True
    itemsize: int = 4
    weight_itemsize: int = 4

    @property
    def rows_sent(self) -> float:
        """Token rows sent to other ranks, each once per rank: T (W - 1) (1 - (1 - 1 / W)^K)."""
        return self.tokens * (self.ranks - 1) * (1 - (1 - 1 / self.ranks) ** self.top_k)

    @property
    def rows_returned(self) -> float:
        """Result rows sent back, one per (token, k) pair: T K (W - 1) / W."""
        return self.tokens * self.top_k * (self.ranks - 1) / self.ranks

    @property
    def flops(self) -> float:
        """FLOPs of the forward's GEMMs, of the backward's on rows, and of the weights' gradients, each as many."""
        return 2.0 * self.tokens * self.top_k * self.hidden_size * self.intermediate_size * (3 if self.gated else 2)


@dataclass(frozen=True)
class Rates:
    """link: bytes/s out of a rank; gemm: FLOP/s; latency: additional seconds of each transfer."""

    link: float
    gemm: float
    latency: float = 0.0


class Event(NamedTuple):
    """An action on one clock from begin to end: "send", "compute", "return" or "weights" of a chunk (-1: of all)."""

    action: str
    chunk: int
    begin: float
    end: float


class Costs(NamedTuple):
    """Seconds of a pass, all chunks together: rows out, GEMMs on them, results back, weights' gradients."""

    send: float
    compute: float
    back: float
    weights: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """The events of a pass, its seconds, and the seconds of its GEMMs."""

    events: tuple[Event, ...]
    seconds: float
    computing: float

    @property
    def exposed(self) -> float:
        """Seconds in which nothing is computed: transfers that no GEMM hides."""
        return self.seconds - self.computing

    @property
    def bound(self) -> str:
        """What limits the pass: "link" or "compute"."""
        link = sum(event.end - event.begin for event in self.events if event.action in ("send", "return"))
        return "link" if link > self.computing else "compute"


def costs(layer: Layer, rates: Rates, backward: bool = False) -> Costs:
    """Costs of a pass whose transfers are not split; ``pipeline`` adds ``latency`` to each."""
    sent = layer.rows_sent * layer.hidden_size * layer.itemsize
    returned = layer.rows_returned * layer.hidden_size * layer.itemsize
    weights = layer.rows_returned * layer.weight_itemsize
    compute = layer.flops / rates.gemm
    if backward:
        return Costs(sent / rates.link, compute, (returned + weights) / rates.link, compute)
    return Costs((sent + weights + 8 * layer.rows_returned) / rates.link, compute, returned / rates.link)


def pipeline(chunks: int, whole: Costs, latency: float = 0.0) -> Timeline:
    """The timeline of the schedule, with even chunks, on a link that carries one transfer at a time in starting order.

    ``seconds`` is at least ``(send + back) / C`` more than the GEMMs where those take longer (fill and drain, the drain
    hidden by the weights' gradients in a backward), and at least the transfers where those do.
    """
    backward = whole.weights > 0
    now = free = 0.0
    arrived, returned = [0.0] * chunks, [0.0] * chunks
    events: list[Event] = []

    def transfer(action: str, chunk: int, seconds: float) -> float:
        nonlocal free
        begin = max(free, now)
        free = begin + seconds / chunks + latency
        events.append(Event(action, chunk, begin, free))
        return free

    def compute(action: str, chunk: int, begin: float, seconds: float) -> float:
        events.append(Event(action, chunk, begin, begin + seconds))
        return begin + seconds

    for action, chunk in schedule(chunks, backward):
        if action == "send":
            arrived[chunk] = transfer("send", chunk, whole.send)
        elif action == "compute":
            now = compute("compute", chunk, max(now, arrived[chunk]), whole.compute / chunks)
            returned[chunk] = transfer("return", chunk, whole.back)
        elif action == "weights":
            now = compute("weights", chunk, now, whole.weights)
        else:
            now = max(now, returned[chunk])
    return Timeline(tuple(events), now, whole.compute + whole.weights)


def predict(layer: Layer, rates: Rates, chunks: int, backward: bool = False) -> Timeline:
    """The timeline of a layer's forward or backward."""
    return pipeline(chunks, costs(layer, rates, backward), rates.latency)
