"""``/api/embed`` of a model of embeddings."""

import asyncio
import threading
import time
from typing import Any

from fastapi import Request, Response

from toolkit.engine.pooling import Pooled, PoolingInput, PoolingParams, PoolingQueue
from toolkit.engine.pooling.texts import read_inputs
from toolkit.engine.prompts import check_num_sequences
from toolkit.serving.base import Base
from toolkit.serving.ollama import schemas
from toolkit.serving.ollama.about import add_about, check_name
from toolkit.serving.ollama.requests import OllamaEmbedRequest
from toolkit.serving.ollama.responses import nanoseconds
from toolkit.serving.openapi import responses, takes
from toolkit.serving.parsing import parse
from toolkit.strict_json import strict_json

EMBED = "/api/embed"


def add_embed(base: Base, queue: PoolingQueue, tokenizer: Any, one_at_a_time: threading.Lock) -> None:
    """Add Ollama's routes of a pooling model to the application of ``base``.

    Args:
        base: without them.
        queue: that runs the model.
        tokenizer: of it.
        one_at_a_time: held while the tokenizer is used.
    """
    add_about(base, ["embedding"])
    engine = queue.engine

    def read(raw: bytes) -> tuple[OllamaEmbedRequest, list[PoolingInput], PoolingParams]:
        asked = parse(OllamaEmbedRequest, raw)
        check_name(base, asked.model)
        cut = -1 if asked.truncate else None
        params = PoolingParams(truncate_prompt_tokens=cut, dimensions=asked.dimensions, normalize=True, task="embed")
        engine.check(params)
        check_num_sequences(len(asked.input), queue.max_queued_seqs)
        with one_at_a_time:
            found = read_inputs(asked.input, tokenizer, engine.max_model_len, cut, "input")
        return asked, [one for _, one in found], params

    def written(asked: OllamaEmbedRequest, results: list[Pooled], tokens: int, begun: float) -> str:
        body = {
            "model": asked.model,
            "embeddings": [one.data.tolist() for one in results],
            "total_duration": nanoseconds(time.perf_counter() - begun),
            "load_duration": 0,
            "prompt_eval_count": tokens,
        }
        return strict_json(body, separators=(",", ":"))

    @base.app.post(
        EMBED,
        dependencies=base.guarded,
        responses=responses(schemas.Embedded, error=schemas.OllamaError),
        openapi_extra=takes(OllamaEmbedRequest),
    )
    async def embed(request: Request) -> Response:
        begun = time.perf_counter()
        asked, inputs, params = await base.read(request, read)
        tokens = sum(len(one.token_ids) for one in inputs)
        future = await base.running.start(request, queue, lambda: queue.submit(inputs, params, "input"), len(inputs))
        base.metrics.prompt_tokens.add(tokens)
        base.watch(request, future)
        results = await asyncio.wrap_future(future)
        base.metrics.success.add(len(results), finished_reason="stop")
        content = await base.on_thread(written, asked, results, tokens, begun)
        return Response(content, media_type="application/json")
