"""An application on an engine that does as it is told: it fails, waits or ends requests when a test says so."""

import threading
from types import SimpleNamespace

from fastapi.testclient import TestClient

from toolkit.engine import AsyncEngine, Completion, Delta, EngineConfig
from toolkit.serving.app import ServerConfig, create_app
from toolkit.serving.metrics import Metrics

PROMPT = {"prompt": [1, 2, 3], "max_tokens": 3}


class ToldEngine:
    """One token a step and sequence; ``step`` raises ``fail``, waits for ``held``, ends all by ``error``."""

    def __init__(self, fail=None, error=None):
        self.fail, self.error = fail, error
        self.live, self.cancelled, self.steps = {}, [], 0
        self.ended = []
        self.is_sleeping = self.runs_ahead = False
        self.forgotten = []
        self.encoder_cache = SimpleNamespace(clear=lambda: self.forgotten.append("pictures"))
        self.config = EngineConfig()
        self.held = threading.Event()
        self.held.set()

    def submit_batch(self, prompts, params):
        self.submitted, self.prompts = params, prompts
        first = len(self.live)
        for at, one in enumerate(params):
            self.live[first + at] = (one, [], at)
        return list(range(first, first + len(params)))

    def synchronize(self):
        pass

    def reset_prefix_cache(self):
        self.forgotten.append("prefixes")

    @property
    def has_work(self):
        return bool(self.live or self.ended)

    def step(self):
        if not self.live:
            return self.take_deltas()
        self.held.wait(10)
        self.steps += 1
        if self.fail:
            raise self.fail
        deltas, self.ended = self.ended, []
        for request, (params, tokens, prompt) in list(self.live.items()):
            tokens.append(7)
            done = None
            if len(tokens) == params.max_tokens or self.error:
                del self.live[request]
                reason = "error" if self.error else "length"
                done = Completion(
                    request, prompt, 0, [1, 2, 3], tokens, [-1.0] * len(tokens), [-1.0] * len(tokens),
                    "x" * len(tokens), reason, text_offset=list(range(len(tokens))), error=self.error,
                )  # fmt: skip
            deltas.append(
                Delta(request, prompt, 0, [7], [float("-inf")], "x", finished=done, text_offset=[len(tokens) - 1])
            )
        return deltas

    def seconds_left(self):
        return None

    def take_deltas(self):
        deltas, self.ended = self.ended, []
        return deltas

    def cancel(self, request):
        self.cancelled.append(request)
        if request in self.live:
            prompt = self.live.pop(request)[2]
            done = Completion(request, prompt, 0, [1, 2, 3], [], [], [], "", "cancelled")
            self.ended.append(Delta(request, prompt, 0, [], [], "", finished=done))

    def stats(self):
        return {"num_requests_running": len(self.live), "num_requests_waiting": 0}


def client_of(engine, max_queued_seqs=8, names="told", **config):
    metrics = Metrics()
    async_engine = AsyncEngine(engine, max_queued_seqs=max_queued_seqs, listener=metrics)
    app = create_app(ServerConfig(names, async_engine, metrics, **config))
    return TestClient(app, raise_server_exceptions=False), async_engine
