"""An application on an engine that says a given text, a chunk at each step."""

import copy
from contextlib import ExitStack, contextmanager

from tests.helpers.told_engine import ToldEngine, client_of
from toolkit.engine import Completion, Delta


class SayingEngine(ToldEngine):
    """Each sequence gets ``chunks``, one token each, and ends with ``finish_reason`` and ``stop_reason``."""

    def __init__(self, chunks, finish_reason="stop", stop_reason=None):
        super().__init__()
        self.chunks, self.finish_reason, self.stop_reason = list(chunks), finish_reason, stop_reason

    def step(self):
        deltas = self.take_deltas()
        for request, (_, tokens, prompt) in list(self.live.items()):
            at, text = len(tokens), self.chunks[len(tokens)]
            tokens.append(7)
            begins = [sum(map(len, self.chunks[:index])) for index in range(at + 1)]
            done = None
            if len(tokens) == len(self.chunks):
                del self.live[request]
                logprobs = [-1.0] * len(tokens)
                done = Completion(
                    request, prompt, 0, [1, 2, 3], tokens, logprobs, logprobs, "".join(self.chunks),
                    self.finish_reason, self.stop_reason, text_offset=begins,
                )  # fmt: skip
            deltas.append(Delta(request, prompt, 0, [7], [-1.0], text, finished=done, text_offset=begins[-1:]))
        return deltas


def saying(chunks, template, tokenizer, finish_reason="stop", stop_reason=None, **config):
    """(client, engine) of a served model that says ``chunks``, whose tokenizer has the chat template ``template``."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    engine = SayingEngine(chunks, finish_reason, stop_reason)
    client, _ = client_of(engine, tokenizer=tokenizer, max_model_len=4096, **config)
    return client, engine


@contextmanager
def saying_clients(tokenizer, template, connect):
    """A function that makes (client, engine) of a model that says chunks of text; its clients end with the block.

    Args:
        tokenizer: of the model.
        template: chat template of it.
        connect: a provider's client of an HTTP client.
    """
    with ExitStack() as opened:

        def make(chunks, **ending):
            http, engine = saying(chunks, template, tokenizer, **ending)
            return connect(opened.enter_context(http)), engine

        yield make
