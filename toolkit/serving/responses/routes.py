"""``/v1/responses``."""

from fastapi import Request, Response

from toolkit.serving.chat_prompts import chat_prompt, shortened_prompt
from toolkit.serving.generation import Asked, Generation
from toolkit.serving.openapi import responses, takes
from toolkit.serving.responses import schemas
from toolkit.serving.responses.items import (
    DeclinedText,
    FunctionCallItem,
    FunctionCallOutputItem,
    InputImage,
    InputText,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
)
from toolkit.serving.responses.requests import (
    AllowedTool,
    FunctionTool,
    Reasoning,
    ResponsesRequest,
    ResponsesToolChoice,
    TextConfig,
    TextFormat,
)
from toolkit.serving.responses.writer import ResponsesWriter

BODIES = (
    ResponsesRequest, MessageItem, FunctionCallItem, FunctionCallOutputItem, ReasoningItem, ReasoningText, InputText,
    OutputText, DeclinedText, InputImage, FunctionTool, AllowedTool, ResponsesToolChoice, TextFormat, TextConfig,
    Reasoning,
)  # fmt: skip
"""Of requests, and what they are made of."""


def add_routes(generation: Generation) -> None:
    """Add the route to the application of ``generation``."""
    base, texts = generation.base, generation.texts
    longest = generation.config.max_model_len

    def read(asked: ResponsesRequest) -> Asked:
        served = base.check_model(asked.model)
        chat, given = asked.chat(), asked.sampling()
        if asked.truncation == "auto" and longest is not None:
            prompt = shortened_prompt(texts, chat, longest - (asked.max_output_tokens or 1))
        else:
            prompt = chat_prompt(texts, chat)
        plan = generation.replies.plan(prompt, chat.tools, chat.choice, given, chat.continued)
        given |= plan.params | served.sampling
        prompts, params = generation.sampling_params(given, [prompt], asked.num_logprobs, max_tokens=None)
        writer = ResponsesWriter(served.name, texts, asked, params[0], plan.parser())
        return Asked(prompts, params, asked.stream, writer, ids=(writer.head["id"],))

    read_body = generation.reader(ResponsesRequest, read)

    @base.app.post(
        "/v1/responses",
        dependencies=base.guarded,
        responses=responses(schemas.ResponseObject, stream=True),
        openapi_extra=takes(ResponsesRequest),
    )
    async def create_response(request: Request) -> Response:
        return await generation.respond(request, await base.read(request, read_body))
