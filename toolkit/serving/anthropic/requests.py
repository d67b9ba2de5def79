"""Request bodies: those of ``/v1/messages`` and ``/v1/messages/count_tokens``.

Field names and meanings are Anthropic's. A null is the same as a field that is not given. Ranges of sampling values
belong to ``SamplingParams`` and are checked there.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.chat.tools import Tool, ToolChoice
from toolkit.sentences import shown
from toolkit.serving.anthropic.blocks import Block, InputMessage, TextBlock, as_blocks
from toolkit.serving.body import Body, short_together
from toolkit.serving.conversation import Chat, ChatMessage, check_results, merged
from toolkit.serving.errors import Json, RequestError
from toolkit.serving.field_names import of_form, of_variables
from toolkit.serving.json_forms import json_form
from toolkit.serving.openai.requests import MAX_MESSAGES
from toolkit.serving.openai.sampling import MAX_STOP_CHARACTERS, MAX_STOPS

MAX_TOOLS = 512
MIN_BUDGET = 1024
"""Tokens of thoughts that the API asks for at least."""

IGNORED = (
    "cache_control",
    "diagnostics",
    "inference_geo",
    "metadata",
    "service_tier",
    "user_profile_id",
    "workspace_id",
)
"""Fields of the API that current clients send and that change no token: accepted with any value, and unused."""

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": ({}, {"edits": []}),
    "logprobs": (False,),
    "mcp_servers": ([],),
    "return_sampling_logprobs": (False,),
    "speed": ("standard",),
}
"""Fields of the API that are not offered, each with the values that ask for nothing."""


class MessagesTool(Block):
    """A tool that the client runs.

    Args:
        type: "custom", or not given; tools that the provider's servers run are not offered.
        name: of the tool.
        description: of the tool.
        input_schema: JSON schema of its input.
        strict: whether calls that the model chooses to make must satisfy it.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "allowed_callers", "cache_control", "eager_input_streaming", "input_examples",
    )  # fmt: skip
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {"defer_loading": (False,)}
    type: Literal["custom"] = "custom"
    name: str = Field(min_length=1, max_length=128)
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = False

    def tool(self) -> Tool:
        """The tool in no protocol's form."""
        return Tool(self.name, self.description, self.input_schema, self.strict)


class MessagesToolChoice(Block):
    """Whether the reply calls tools.

    Args:
        type: "auto" may, "any" must, "tool" must call ``name``, "none" must not.
        name: with "tool".
        disable_parallel_tool_use: one call at most.
    """

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _a_tool_has_a_name(self) -> "MessagesToolChoice":
        if (self.type == "tool") != (self.name is not None):
            state = "is required" if self.type == "tool" else "must not be given"
            raise ValueError(f"'tool_choice.name' {state} with the type '{self.type}'.")
        return self

    def choice(self) -> ToolChoice:
        """The choice in no protocol's form."""
        parallel = not self.disable_parallel_tool_use
        modes: dict[str, Literal["none", "auto", "required"]] = {"none": "none", "auto": "auto"}
        names = () if self.name is None else (self.name,)
        return ToolChoice(modes.get(self.type, "required"), names, parallel)


class Thinking(Block):
    """Whether the model thinks before it replies.

    Args:
        type: "enabled" and "adaptive" set ``enable_thinking`` and ``thinking`` of the chat template, "disabled" unsets
            them.
        budget_tokens: accepted with "enabled", and unused: ``max_tokens`` alone bounds thoughts and reply.
        display: "omitted" leaves the thoughts out of the response.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=MIN_BUDGET)
    display: Literal["summarized", "omitted"] = "summarized"


class JsonOutput(Block):
    """The JSON schema of a reply."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Block):
    """What a reply must look like, and the effort behind it.

    Args:
        effort: ``reasoning_effort`` of the chat template; what is above "high" is "high".
        format: of the reply.
    """

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutput | None = None


class CountTokensRequest(Body):
    """The body of ``POST /v1/messages/count_tokens``: what a prompt is made of."""

    ignored: ClassVar[tuple[str, ...]] = IGNORED
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = NOT_OFFERED
    model: str | None = None
    messages: list[InputMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: list[TextBlock] = Field([])
    tools: list[MessagesTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutput | None = None

    @field_validator("system", mode="before", json_schema_input_type=str | list[TextBlock])
    @classmethod
    def _a_string_is_one_block(cls, system: Any) -> Any:
        return as_blocks("system", system)

    @model_validator(mode="after")
    def _a_choice_among_the_tools(self) -> "CountTokensRequest":
        choice = self.tool_choice
        if choice is not None and choice.type in ("any", "tool") and not self.tools:
            raise ValueError(f"'tool_choice' has the type '{choice.type}', but there are no 'tools'.")
        if choice is not None and choice.name is not None and choice.name not in {one.name for one in self.tools}:
            raise ValueError(f"'tool_choice.name' must be one of 'tools', got {shown(choice.name)}.")
        return self

    @model_validator(mode="after")
    def _one_format(self) -> "CountTokensRequest":
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise ValueError("'output_format' is given, and so is 'output_config.format'; give one.")
        return self

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls fields that errors of the engine are about."""
        variables = {"enable_thinking": "thinking", "thinking": "thinking", "reasoning_effort": "output_config.effort"}
        return {"prompt": "messages", **of_variables(variables)}

    @property
    def output_schema(self) -> Json | None:
        """The JSON schema of the reply, where there is one."""
        found = self.output_format or (self.output_config.format if self.output_config is not None else None)
        return found.schema_ if found is not None else None

    def chat(self) -> Chat:
        """The chat. Raises RequestError for results of tools that were not called."""
        messages = [ChatMessage("system", "system", [block.text for block in self.system])] if self.system else []
        for at, one in enumerate(self.messages):
            messages += one.messages(f"messages[{at}]")
        messages = merged(messages)
        check_results(messages)
        prefilled = messages[-1].role == "assistant"
        if prefilled and messages[-1].fields:
            raise RequestError(
                "'messages' must end with a message of the user, or with text of the assistant for the reply to "
                "continue.",
                "messages",
            )
        variables: Json = {}
        if self.thinking is not None:
            thinks = self.thinking.type != "disabled"
            variables |= {"enable_thinking": thinks, "thinking": thinks}
        if self.output_config is not None and self.output_config.effort is not None:
            effort = self.output_config.effort
            variables["reasoning_effort"] = effort if effort in ("low", "medium") else "high"
        choice = self.tool_choice.choice() if self.tool_choice is not None else ToolChoice()
        return Chat(messages, [tool.tool() for tool in self.tools], choice, variables, prefilled)


class MessagesRequest(CountTokensRequest):
    """The body of ``POST /v1/messages``."""

    max_tokens: int
    stream: bool = False
    stop_sequences: list[str] = Field([], max_length=MAX_STOPS)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @field_validator("stop_sequences")
    @classmethod
    def _stops_are_short(cls, stop: list[str]) -> list[str]:
        return short_together("stop_sequences", stop, MAX_STOP_CHARACTERS)

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls fields that errors of the engine are about."""
        form = "output_format.schema" if self.output_format is not None else "output_config.format.schema"
        return {**super().field_names, **of_form(form), "stop": "stop_sequences"}

    def sampling(self) -> Json:
        """Keyword arguments for ``SamplingParams``: what the request gave; the defaults live there."""
        names = {"max_tokens", "temperature", "top_p", "top_k"}
        values: Json = {name: getattr(self, name) for name in names & self.model_fields_set}
        if self.stop_sequences:
            values["stop"] = self.stop_sequences
        if self.output_schema is not None:
            values["structured_outputs"] = json_form(self.output_schema)
        return values
