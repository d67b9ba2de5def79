"""Learn while it serves: training clients on the weights that an engine serves. No HTTP.

In reading order: ``losses`` of a sequence; ``examples`` and the micro-batches that they become; ``gradients`` of
micro-batches of several tenants; ``adam``; ``lora``, which layers a tenant adapts; ``checkpoints``; ``tenant``;
``samplers``, saved versions that are sampled; ``jobs``, work in parts; ``ordered`` numbers; ``journal``, what survives
a server; ``requests``, the jobs that they become; ``catalogue`` of clients; ``lending`` of the engine's thread;
``worker``, the thread that gives the engine training work; ``service``, all of it behind futures.
"""

from toolkit.live.catalogue import Run
from toolkit.live.checkpoints import Entry
from toolkit.live.examples import Example
from toolkit.live.jobs import ForwardBackwardResult
from toolkit.live.samplers import SamplingTarget
from toolkit.live.service import LiveConfig, LiveTraining, Recovered
from toolkit.live.tenant import Tenant

__all__ = [
    "Entry",
    "Example",
    "ForwardBackwardResult",
    "LiveConfig",
    "LiveTraining",
    "Recovered",
    "Run",
    "SamplingTarget",
    "Tenant",
]
