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
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor

from toolkit.engine.pooling import Pooled, PoolingInput, PoolingParams, PoolingQueue
from toolkit.engine.pooling.texts import ScorePlan, read_inputs
from toolkit.engine.prompts import check_num_sequences
from toolkit.sentences import shown
from toolkit.serving import text_routes
from toolkit.serving.admin import routes as admin
from toolkit.serving.anthropic.responses import error_body
from toolkit.serving.base import Base, ServerConfig
from toolkit.serving.batches import routes as batches
from toolkit.serving.body import Body, one_or_several
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.field_names import naming
from toolkit.serving.ollama.embed import add_embed
from toolkit.serving.ollama.requests import OllamaEmbedRequest, OllamaShowRequest
from toolkit.serving.openai.completion_request import MAX_PROMPTS, PromptKinds, prompt_list
from toolkit.serving.openai.sampling import IGNORED
from toolkit.serving.openapi import describe, responses, takes
from toolkit.serving.page.routes import add_docs, add_page
from toolkit.serving.parsing import parse
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
Model = type[BaseModel]
Write = Callable[[int, Tensor], Json]
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]


class _Pooling(Body):
    """What all bodies have."""

    ignored: ClassVar[tuple[str, ...]] = (*IGNORED, "priority")
    model: str | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    use_activation: bool | None = None

    def params(self, **given: Any) -> PoolingParams:
        """What the engine is asked for."""
        return PoolingParams(
            truncate_prompt_tokens=self.truncate_prompt_tokens, use_activation=self.use_activation, **given
        )


class _Inputs(_Pooling):
    """``input`` is kept as a list of texts or of token id lists."""

    input: list[str] | list[list[int]]

    @field_validator("input", mode="before", json_schema_input_type=PromptKinds)
    @classmethod
    def _inputs(cls, given: Any) -> Any:
        return prompt_list(given, "input")


class EmbeddingRequest(_Inputs):
    """The body of ``POST /v1/embeddings``."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    normalize: bool | None = None


class PoolingRequest(EmbeddingRequest):
    """The body of ``POST /pooling``."""

    task: Literal["embed", "token_embed", "classify", "token_classify"] | None = None


class ClassifyRequest(_Inputs):
    """The body of ``POST /classify``."""


class ScoreRequest(_Pooling):
    """The body of ``POST /v1/score``: one text and others, or pairs."""

    text_1: _Texts
    text_2: _Texts

    @field_validator("text_1", "text_2", mode="before", json_schema_input_type=str | _Texts)
    @classmethod
    def _one_text_is_a_list_of_one(cls, given: Any, info: ValidationInfo) -> Any:
        return one_or_several(str(info.field_name), given)


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Document(_Schema):
    """A document as an object."""

    text: str


class RerankRequest(_Pooling):
    """The body of ``POST /v1/rerank``; documents are kept as texts."""

    query: str
    documents: list[str] = Field(min_length=1, max_length=MAX_PROMPTS)
    top_n: int | None = Field(None, ge=0)
    return_documents: bool = True

    @field_validator("documents", mode="before", json_schema_input_type=list[str | Document])
    @classmethod
    def _texts(cls, given: Any) -> Any:
        if not isinstance(given, list):
            raise ValueError(f"'documents' must be a list of texts, got {shown(given)}.")
        return [one["text"] if isinstance(one, dict) and set(one) == {"text"} else one for one in given]

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls the texts of a score."""
        return {"text_1": "query", "text_2": "documents"}


BODIES: tuple[Model, ...] = (
    EmbeddingRequest, PoolingRequest, ClassifyRequest, ScoreRequest, RerankRequest, OllamaEmbedRequest,
    OllamaShowRequest,
)  # fmt: skip


class PoolingUsage(_Schema):
    prompt_tokens: int
    total_tokens: int


class EmbeddingData(_Schema):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class ScoreData(_Schema):
    index: int
    object: Literal["score"]
    score: float


class ClassData(_Schema):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class PoolingData(_Schema):
    index: int
    object: Literal["pooling"]
    data: list[float] | list[list[float]] | str


class _List(_Schema):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: PoolingUsage


class EmbeddingList(_List):
    data: list[EmbeddingData]


class ScoreList(_List):
    data: list[ScoreData]


class ClassList(_List):
    data: list[ClassData]


class PoolingList(_List):
    data: list[PoolingData]


class RerankResult(_Schema):
    index: int
    relevance_score: float
    document: Document | None = None


class RerankUsage(_Schema):
    total_tokens: int


class RerankResponse(_Schema):
    id: str
    model: str
    usage: RerankUsage
    results: list[RerankResult]


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

    def of_inputs(asked: _Inputs, params: PoolingParams, write: Write, prefix: str) -> _Asked:
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

    def plan(asked: _Pooling, first: str | list[str], second: str | list[str]) -> ScorePlan:
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
