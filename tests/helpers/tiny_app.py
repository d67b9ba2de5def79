"""An application that serves a small random model, in the process of the test."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi.testclient import TestClient

from toolkit.engine import AsyncEngine, Engine
from toolkit.serving.app import ServerConfig, create_app
from toolkit.testing.models import random_model, tiny_tokenizer


@contextmanager
def tiny_app(template: str | None) -> Iterator[TestClient]:
    """A client of the model "tiny", whose chat template is ``template``; errors of the server are its responses."""
    model, tokenizer = random_model("llama"), copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    with Engine(model, tokenizer, num_blocks=64, max_model_len=256) as engine:
        config = ServerConfig("tiny", AsyncEngine(engine), tokenizer=tokenizer, max_model_len=256, vocab_size=331)
        with TestClient(create_app(config), raise_server_exceptions=False) as client:
            yield client
