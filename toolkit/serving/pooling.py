"""The routes of a pooling model: ``/v1/embeddings``, ``/v1/score``, ``/v1/rerank``, ``/classify`` and ``/pooling``.

Bodies and responses are those of OpenAI (embeddings), Jina and Cohere (rerank), and vLLM (the others).
"""

import asyncio
import base64
import copy
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from torch import Tensor

from toolkit.engine.pooling import Pooled, PoolingInput, PoolingParams, PoolingQueue
from toolkit.engine.pooling.texts import ScorePlan, read_inputs
from toolkit.engine.prompts import check_num_sequences
from toolkit.serving import text_routes
from toolkit.serving.admin import routes as admin
from toolkit.serving.anthropic.responses import error_body
from toolkit.serving.base import Base, ServerConfig
from toolkit.serving.batches import routes as batches
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.field_names import naming
from toolkit.serving.ollama.embed import add_embed
from toolkit.serving.openapi import describe, responses, takes
from toolkit.serving.page.routes import add_docs, add_page
from toolkit.serving.parsing import parse
from toolkit.serving.pooling_bodies import (
    BODIES,
    ClassifyRequest,
    ClassList,
    EmbeddingList,
    EmbeddingRequest,
    InputsBody,
    Model,
    PoolingBody,
    PoolingList,
    PoolingRequest,
    RerankRequest,
    RerankResponse,
    ScoreList,
    ScoreRequest,
)
from toolkit.serving.text_routes import add_text_routes
from toolkit.serving.texts import Texts
from toolkit.strict_json import strict_json

SCORES, RERANKS = ("/v1/score", "/score"), ("/v1/rerank", "/v2/rerank", "/rerank")
POOLING_PATHS = ("/v1/embeddings", *SCORES, *RERANKS, "/classify", "/pooling")
MESSAGES = "/v1/messages"
GENERATING_PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", MESSAGES, f"{MESSAGES}/count_tokens", "/api/chat",
    "/api/generate",
)  # fmt: skip
POOLS = "The served model gives embeddings, scores or classes; serve a model that generates for completions."
Write = Callable[[int, Tensor], Json]


@dataclass(frozen=True)
class _Asked:
    """A request that may run.

    Args:
        inputs: its sequences.
        params: of all.
        name: of a sequence, for errors.
        body: its response, of the results and the tokens of the request.
    """

    inputs: Sequence[PoolingInput]
    params: PoolingParams
    name: str
    body: Callable[[list[Pooled], int], Json]


def create_pooling_app(config: ServerConfig, queue: PoolingQueue) -> FastAPI:
    """The ASGI application of a pooling model."""
    base = Base(config, {name for body in BODIES for name in body.model_fields})
    engine, tokenizer = queue.engine, copy.deepcopy(config.tokenizer)
    one_at_a_time = threading.Lock()  # a tokenizer that cuts keeps the length until its next call

    def listed(prefix: str, data: list[Json], tokens: int) -> Json:
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {**head, "model": base.names[0], "data": data, "usage": used}

    def of_inputs(asked: InputsBody, params: PoolingParams, write: Write, prefix: str) -> _Asked:
        base.check_model(asked.model)
        engine.check(params)
        check_num_sequences(len(asked.input), queue.max_queued_seqs)
        with one_at_a_time:
            read = read_inputs(asked.input, tokenizer, engine.max_model_len, asked.truncate_prompt_tokens, "input")

        def body(results: list[Pooled], tokens: int) -> Json:
            return listed(prefix, [write(at, one.data) for at, one in enumerate(results)], tokens)

        return _Asked([one for _, one in read], params, "input", body)

    def read_embeddings(raw: bytes) -> _Asked:
        asked = parse(EmbeddingRequest, raw)
        params = asked.params(dimensions=asked.dimensions, normalize=asked.normalize, task="embed")

        def write(at: int, data: Tensor) -> Json:
            return {"index": at, "object": "embedding", "embedding": _numbers(data, asked.encoding_format)}

        return of_inputs(asked, params, write, "embd")

    def read_pooling(raw: bytes) -> _Asked:
        asked = parse(PoolingRequest, raw)
        params = asked.params(dimensions=asked.dimensions, normalize=asked.normalize, task=asked.task)

        def write(at: int, data: Tensor) -> Json:
            return {"index": at, "object": "pooling", "data": _numbers(data, asked.encoding_format)}

        return of_inputs(asked, params, write, "pool")

    def read_classes(raw: bytes) -> _Asked:
        asked = parse(ClassifyRequest, raw)
        labels = engine.labels

        def write(at: int, data: Tensor) -> Json:
            best = labels[int(data.argmax())]
            return {"index": at, "label": best, "probs": data.tolist(), "num_classes": len(data)}

        return of_inputs(asked, asked.params(task="classify"), write, "classify")

    def plan(asked: PoolingBody, first: str | list[str], second: str | list[str]) -> ScorePlan:
        base.check_model(asked.model)
        check_num_sequences(1 if isinstance(second, str) else len(second), queue.max_queued_seqs)
        with one_at_a_time, naming(asked.field_names):
            return ScorePlan.of(engine, tokenizer, first, second, asked.params())

    def read_scores(raw: bytes) -> _Asked:
        asked = parse(ScoreRequest, raw)
        made = plan(asked, asked.text_1, asked.text_2)

        def body(results: list[Pooled], tokens: int) -> Json:
            scores = enumerate(made.scores(results))
            return listed("score", [{"index": at, "object": "score", "score": score} for at, score in scores], tokens)

        return _Asked(made.inputs, made.params, "text_1", body)

    def read_rerank(raw: bytes) -> _Asked:
        asked = parse(RerankRequest, raw)
        made = plan(asked, asked.query, asked.documents)

        def body(results: list[Pooled], tokens: int) -> Json:
            scores = made.scores(results)
            order = sorted(range(len(scores)), key=lambda at: -scores[at])  # stable: of equal ones the first
            found: list[Json] = [{"index": at, "relevance_score": scores[at]} for at in order[: asked.top_n or None]]
            for one in found if asked.return_documents else ():
                one["document"] = {"text": asked.documents[one["index"]]}
            head = {"id": f"rerank-{uuid.uuid4().hex}", "model": base.names[0]}
            return {**head, "usage": {"total_tokens": tokens}, "results": found}

        return _Asked(made.inputs, made.params, "documents", body)

    async def respond(request: Request, given: _Asked) -> Response:
        future = await base.running.start(
            request, queue, lambda: queue.submit(given.inputs, given.params, given.name), len(given.inputs)
        )
        tokens = sum(len(one.token_ids) for one in given.inputs)
        base.metrics.prompt_tokens.add(tokens)
        base.watch(request, future)
        results = await asyncio.wrap_future(future)
        base.metrics.success.add(len(results), finished_reason="stop")
        content = await base.on_thread(lambda: strict_json(given.body(results, tokens), separators=(",", ":")))
        return Response(content, media_type="application/json")

    def add(paths: Sequence[str], body: Model, response: Model, read: Callable[[bytes], _Asked]) -> None:
        async def route(request: Request) -> Response:
            return await respond(request, await base.read(request, read))

        for at, path in enumerate(paths):
            base.app.post(
                path,
                dependencies=base.guarded,
                responses=responses(response),
                openapi_extra=takes(body),
                include_in_schema=at == 0,
                operation_id=path.strip("/").replace("/", "_"),
            )(route)

    add(("/v1/embeddings",), EmbeddingRequest, EmbeddingList, read_embeddings)
    add(SCORES, ScoreRequest, ScoreList, read_scores)
    add(RERANKS, RerankRequest, RerankResponse, read_rerank)
    add(("/classify",), ClassifyRequest, ClassList, read_classes)
    add(("/pooling",), PoolingRequest, PoolingList, read_pooling)
    add_embed(base, queue, tokenizer, one_at_a_time)
    base.add_error_style(MESSAGES, error_body)
    base.add_refused(GENERATING_PATHS, POOLS)
    batches.add_routes(base)
    admin.add_pooling_routes(base)

    def tokens_of(text: str, special: bool) -> list[int]:
        if tokenizer is None:
            raise RequestError("The served model has no tokenizer; 'prompt' must be token ids.", "prompt")
        with one_at_a_time:
            return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    add_text_routes(base, Texts(config.tokenizer), tokens_of)
    add_page(base, False)
    add_docs(base)
    bodies: tuple[Model, ...] = (*BODIES, *batches.BODIES, *text_routes.BODIES, *admin.POOLING_BODIES)
    describe(base.app, base.names, None, config.vocab_size, bodies)
    return base.app


def _numbers(data: Tensor, encoding: str) -> Any:
    """Nested lists, or base64 of float32 in little-endian order."""
    if encoding == "float":
        return data.tolist()
    return base64.b64encode(data.float().contiguous().numpy().astype("<f4").tobytes()).decode()
