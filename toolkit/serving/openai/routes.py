"""``/v1/completions`` and ``/v1/chat/completions``."""

from typing import Any

from fastapi import Request, Response

from toolkit.engine.prompts import check_num_sequences
from toolkit.serving.generation import Asked, Generation
from toolkit.serving.openai import schemas
from toolkit.serving.openai.chat_response import ChatResponse
from toolkit.serving.openai.completion_prompts import read_echoes, read_prompts
from toolkit.serving.openai.completion_request import CompletionRequest
from toolkit.serving.openai.forms import JsonSchemaFormat, Prediction, ResponseFormat, StructuredOutputs, TextPart
from toolkit.serving.openai.messages import (
    DeclinedPart,
    ImagePart,
    ImageUrl,
    Message,
    MessageFunction,
    MessageToolCall,
)
from toolkit.serving.openai.requests import ChatRequest
from toolkit.serving.openai.responses import CompletionResponse
from toolkit.serving.openai.sampling import Sampling, StreamOptions
from toolkit.serving.openai.tools import (
    AllowedTools,
    FunctionSpec,
    NamedFunction,
    NamedTool,
    ToolChoiceObject,
    ToolSpec,
)
from toolkit.serving.openapi import responses, takes

BODIES = (
    CompletionRequest, ChatRequest, StreamOptions, Message, TextPart, DeclinedPart, ImagePart, ImageUrl, ResponseFormat,
    JsonSchemaFormat, StructuredOutputs, Prediction, MessageToolCall, MessageFunction, ToolSpec, FunctionSpec,
    ToolChoiceObject, NamedFunction, NamedTool, AllowedTools,
)  # fmt: skip
"""Of requests, and what they are made of."""


def add_routes(generation: Generation) -> None:
    """Add the routes to the application of ``generation``."""
    base, texts, engine = generation.base, generation.texts, generation.engine

    def with_prediction(asked: Sampling) -> dict[str, Any]:
        predicted = texts.prediction(asked.prediction.text) if asked.prediction is not None else None
        return {**asked.sampling(), **({"predicted_token_ids": predicted} if predicted else {})}

    def read_completion(asked: CompletionRequest) -> Asked:
        served = base.check_model(asked.model)
        check_num_sequences(len(asked.prompt) * asked.candidates, engine.max_queued_seqs)
        read, ends = read_prompts(texts, asked)
        generation.check_tokens(read)
        sampling = with_prediction(asked) | served.sampling
        if ends:
            sampling["stop_token_ids"] = [*asked.stop_token_ids, *ends]
        prompts, params = generation.sampling_params(sampling, read, asked.logprobs)
        echoes = read_echoes(texts, asked, prompts)
        writer = CompletionResponse(served.name, texts, asked, asked.logprobs, prompts, generation.fingerprint, echoes)
        return Asked(prompts, params, asked.stream, writer)

    def read_chat(asked: ChatRequest) -> Asked:
        served = base.check_model(asked.model)
        check_num_sequences(asked.n, engine.max_queued_seqs)
        given, tools, choice = with_prediction(asked), asked.read_tools(), asked.choice
        read = texts.chat(
            asked.messages,
            asked.truncate_prompt_tokens is not None,
            tools_needed=choice.mode != "none",
            **asked.template_options(),
        )
        continued = asked.messages[-1].text if asked.continue_final_message else ""
        plan = generation.replies.plan(read, tools, choice, given, continued)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        sampling = {**given, **plan.params, **served.sampling}
        prompts, params = generation.sampling_params(sampling, [read], top, max_tokens=None)
        writer = ChatResponse(
            served.name, texts, asked, top, prompts, generation.fingerprint, plan=plan,
            shows_reasoning=asked.include_reasoning,
        )  # fmt: skip
        if asked.service_tier is not None:
            writer.head["service_tier"] = "default"
        return Asked(prompts, params, asked.stream, writer)

    completion = generation.reader(CompletionRequest, read_completion)
    chat = generation.reader(ChatRequest, read_chat)

    @base.app.post(
        "/v1/completions",
        dependencies=base.guarded,
        responses=responses(schemas.CompletionObject, stream=True),
        openapi_extra=takes(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        return await generation.respond(request, await base.read(request, completion))

    @base.app.post(
        "/v1/chat/completions",
        dependencies=base.guarded,
        responses=responses(schemas.ChatCompletionObject, stream=True),
        openapi_extra=takes(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        return await generation.respond(request, await base.read(request, chat))
