"""The application of a served model: the routes of its protocols on those of every model."""

from fastapi import FastAPI

from toolkit.engine.pooling import PoolingQueue
from toolkit.serving import text_routes
from toolkit.serving.admin import routes as admin
from toolkit.serving.anthropic import routes as anthropic
from toolkit.serving.base import Base, ServerConfig
from toolkit.serving.batches import routes as batches
from toolkit.serving.generation import Generation
from toolkit.serving.ollama import routes as ollama
from toolkit.serving.ollama.embed import EMBED
from toolkit.serving.openai import routes as openai
from toolkit.serving.openapi import describe
from toolkit.serving.page.routes import add_docs, add_page
from toolkit.serving.pooling import POOLING_PATHS, create_pooling_app
from toolkit.serving.responses import routes as responses
from toolkit.serving.tinker import routes as tinker
from toolkit.serving.tokens import routes as tokens

__all__ = ["ServerConfig", "create_app"]

PROTOCOLS = (openai, responses, anthropic, ollama, tokens, text_routes, admin)
"""Modules with ``BODIES`` of requests, and what they are made of, and ``add_routes(generation)``."""
GENERATES = "The served model generates; serve a pooling model, or this one with --runner pooling."


def create_app(config: ServerConfig) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine's thread and ends it, and leaves the engine open."""
    if isinstance(config.engine, PoolingQueue):
        return create_pooling_app(config, config.engine)
    bodies = [*batches.BODIES, *(body for protocol in PROTOCOLS for body in protocol.BODIES)]
    base = Base(config, {name for body in bodies for name in body.model_fields})
    generation = Generation(base, config.engine, config)
    for protocol in PROTOCOLS:
        protocol.add_routes(generation)
    if config.live is not None:
        tinker.add_routes(generation, config.live)
    batches.add_routes(base)
    base.add_refused((*POOLING_PATHS, EMBED), GENERATES)
    add_page(base, config.page)
    add_docs(base)
    adapters = bool(config.lora_modules or config.admin.keys or config.admin.enabled)
    describe(base.app, base.names, config.max_model_len, config.vocab_size, bodies, adapters)
    return base.app
