"""Learn while it serves: training clients on the weights that an engine serves. No HTTP.

In reading order: ``losses`` of a sequence; ``examples`` and the micro-batches that they become; ``gradients`` of
micro-batches of several tenants; ``adam``; ``lora``, which layers a tenant adapts; ``checkpoints``; ``tenant``;
``jobs``, what its requests do; ``ordered`` requests; ``worker``, the thread that gives the engine training work;
``samplers``, saved versions that are sampled; ``service``, all of it behind futures.
"""

from toolkit.live.examples import Example
from toolkit.live.jobs import ForwardBackwardResult
from toolkit.live.service import LiveConfig, LiveTraining, SamplingTarget
from toolkit.live.tenant import Tenant

__all__ = ["Example", "ForwardBackwardResult", "LiveConfig", "LiveTraining", "SamplingTarget", "Tenant"]
