"""``/inference/v1/generate``."""

from fastapi import Request, Response

from toolkit.engine.prompts import check_num_sequences
from toolkit.serving.generation import Asked, Generation
from toolkit.serving.openapi import responses, takes
from toolkit.serving.tokens.requests import GenerateRequest, TokenSampling
from toolkit.serving.tokens.responses import GenerateObject, GenerateResponse

BODIES = (GenerateRequest, TokenSampling)
"""Of requests, and what they are made of."""


def add_routes(generation: Generation) -> None:
    """Add the route to the application of ``generation``."""
    base, engine = generation.base, generation.engine

    def read(asked: GenerateRequest) -> Asked:
        served = base.check_model(asked.model)
        check_num_sequences(asked.sampling_params.n, engine.max_queued_seqs)
        generation.check_tokens([asked.token_ids], "token_ids")
        sampling = asked.sampling() | served.sampling
        given = generation.sampling_params(sampling, [asked.token_ids], asked.sampling_params.logprobs)
        writer = GenerateResponse(served.name, asked)
        return Asked(*given, asked.stream, writer, ids=(writer.request_id,), keep_cancelled=True)

    read_body = generation.reader(GenerateRequest, read)

    @base.app.post(
        "/inference/v1/generate",
        dependencies=base.guarded,
        responses=responses(GenerateObject, stream=True),
        openapi_extra=takes(GenerateRequest),
    )
    async def generate(request: Request) -> Response:
        return await generation.respond(request, await base.read(request, read_body))
