"""How long an exchange takes: the schedule of ``exchange_plan`` on two clocks, one of the link and one of the products.

T tokens a rank, K slots a token, W ranks. Everything is in seconds, bytes and FLOPs.
"""

from dataclasses import dataclass
from typing import NamedTuple

from toolkit.moe.exchange_plan import schedule


@dataclass(frozen=True)
class Layer:
    """A layer of experts on one of W ranks, with its tokens routed evenly.

    itemsize: bytes of an element of the rows. score: bytes of a score.
    """

    tokens: int
    slots: int
    ranks: int
    width: int
    inner: int
    gated: bool = True
    itemsize: int = 4
    score: int = 4

    @property
    def rows_sent(self) -> float:
        """Token rows that leave for other ranks, each once a rank: T (W - 1) (1 - (1 - 1 / W)^K)."""
        return self.tokens * (self.ranks - 1) * (1 - (1 - 1 / self.ranks) ** self.slots)

    @property
    def rows_returned(self) -> float:
        """Rows that leave with results, one a slot: T K (W - 1) / W."""
        return self.tokens * self.slots * (self.ranks - 1) / self.ranks

    @property
    def products(self) -> float:
        """FLOPs of the forward's products, of the backward's on rows, and of the weights' gradients, each as many."""
        return 2.0 * self.tokens * self.slots * self.width * self.inner * (3 if self.gated else 2)


@dataclass(frozen=True)
class Rates:
    """link: bytes a second out of a rank; gemm: FLOPs a second; latency: seconds that each transfer takes beside."""

    link: float
    gemm: float
    latency: float = 0.0


class Event(NamedTuple):
    """What one clock does from begin to end: "send", "compute", "return" or "weights" of a chunk (-1: of all)."""

    action: str
    chunk: int
    begin: float
    end: float


class Costs(NamedTuple):
    """Seconds of a pass, all chunks together: rows out, products on them, results back, weights' gradients."""

    send: float
    compute: float
    back: float
    weights: float = 0.0


@dataclass(frozen=True)
class Timeline:
    """The events of a pass, its seconds, and how many of them its products take."""

    events: tuple[Event, ...]
    seconds: float
    computing: float

    @property
    def exposed(self) -> float:
        """Seconds in which nothing is computed: transfers that no product hides."""
        return self.seconds - self.computing

    @property
    def bound(self) -> str:
        """What a faster one of would help: "link" or "compute"."""
        link = sum(event.end - event.begin for event in self.events if event.action in ("send", "return"))
        return "link" if link > self.computing else "compute"


def costs(layer: Layer, rates: Rates, backward: bool = False) -> Costs:
    """Of a pass whose transfers are all in one piece; ``latency`` is added to each by ``pipeline``."""
    sent = layer.rows_sent * layer.width * layer.itemsize
    returned = layer.rows_returned * layer.width * layer.itemsize
    scores = layer.rows_returned * layer.score
    compute = layer.products / rates.gemm
    if backward:
        return Costs(sent / rates.link, compute, (returned + scores) / rates.link, compute)
    return Costs((sent + scores + 8 * layer.rows_returned) / rates.link, compute, returned / rates.link)


def pipeline(chunks: int, whole: Costs, latency: float = 0.0) -> Timeline:
    """The schedule, with even chunks, on a link that carries one transfer at a time in the order they begin.

    ``seconds`` is at least ``(send + back) / C`` more than the products where they are the longer (fill and drain, the
    drain hidden by the weights in a backward), and at least the transfers where those are.
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
