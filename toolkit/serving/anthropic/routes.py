"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from toolkit.engine.prompts import prompt_length
from toolkit.serving.anthropic import schemas
from toolkit.serving.anthropic.blocks import (
    Base64Source,
    ImageBlock,
    InputMessage,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    UrlSource,
)
from toolkit.serving.anthropic.requests import (
    CountTokensRequest,
    JsonOutput,
    MessagesRequest,
    MessagesTool,
    MessagesToolChoice,
    OutputConfig,
    Thinking,
)
from toolkit.serving.anthropic.responses import MessageResponse, error_body
from toolkit.serving.chat_prompts import chat_prompt
from toolkit.serving.generation import Asked, Generation
from toolkit.serving.openapi import responses, takes
from toolkit.serving.running import request_id

BODIES = (
    MessagesRequest, CountTokensRequest, InputMessage, TextBlock, ImageBlock, Base64Source, UrlSource, ToolUseBlock,
    ToolResultBlock, ThinkingBlock, RedactedThinkingBlock, MessagesTool, MessagesToolChoice, Thinking, OutputConfig,
    JsonOutput,
)  # fmt: skip
"""Of requests, and what they are made of."""
MESSAGES = "/v1/messages"


def add_routes(generation: Generation) -> None:
    """Add the routes to the application of ``generation``."""
    base, texts = generation.base, generation.texts
    base.add_error_style(MESSAGES, error_body)

    def read_messages(asked: MessagesRequest, identity: str) -> Asked:
        served = base.check_model(asked.model)
        chat, given = asked.chat(), asked.sampling()
        prompt = chat_prompt(texts, chat)
        plan = generation.replies.plan(prompt, chat.tools, chat.choice, given, chat.continued)
        sampling = {**given, **plan.params, **served.sampling}
        prompts, params = generation.sampling_params(sampling, [prompt], None)
        show = asked.thinking is None or asked.thinking.display != "omitted"
        writer = MessageResponse(served.name, plan.parser(), show, identity)
        return Asked(prompts, params, asked.stream, writer, ids=(writer.id,))

    def read_count(asked: CountTokensRequest) -> int:
        base.check_model(asked.model)
        return prompt_length(chat_prompt(texts, asked.chat()))

    @base.app.post(
        MESSAGES,
        dependencies=base.guarded,
        responses=responses(schemas.MessageObject, stream=True, error=schemas.MessagesErrorResponse),
        openapi_extra=takes(MessagesRequest),
    )
    async def messages(request: Request) -> Response:
        identity = request_id(request)
        read = generation.reader(MessagesRequest, lambda asked: read_messages(asked, identity))
        return await generation.respond(request, await base.read(request, read))

    count = generation.reader(CountTokensRequest, read_count)

    @base.app.post(
        f"{MESSAGES}/count_tokens",
        dependencies=base.guarded,
        responses=responses(schemas.TokenCount, error=schemas.MessagesErrorResponse),
        openapi_extra=takes(CountTokensRequest),
    )
    async def count_tokens(request: Request) -> Response:
        return JSONResponse({"input_tokens": await base.read(request, count)})
