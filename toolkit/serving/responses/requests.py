"""The body of ``POST /v1/responses``.

Field names and meanings are OpenAI's. A null is the same as a field that is not given. Ranges of sampling values belong
to ``SamplingParams`` and are checked there.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.chat.tools import Tool, ToolChoice
from toolkit.sentences import shown
from toolkit.serving.body import Body, one_or_several, short_together
from toolkit.serving.conversation import Chat, ChatMessage, check_results, merged, system_first
from toolkit.serving.errors import Json
from toolkit.serving.field_names import of_form, of_variables
from toolkit.serving.json_forms import json_form
from toolkit.serving.openai.requests import MAX_MESSAGES
from toolkit.serving.openai.sampling import MAX_STOP_CHARACTERS, MAX_STOPS, MAX_TOP_LOGPROBS
from toolkit.serving.responses.items import InputItem, ItemPart

MAX_TOOLS = 512
CHOICES = ("none", "auto", "required")
LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "web_search_call.action.sources",
    "web_search_call.results",
)
"""Of these only the first adds something here: there are no such calls, and reasoning is not encrypted."""

IGNORED = (
    "max_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
)
"""Fields of the API that current clients send and that change no token: accepted with any value, and unused."""

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "access_programs": (),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
}
"""Fields of the API that are not offered, each with the values that ask for nothing."""
SAMPLED = {
    "frequency_penalty", "ignore_eos", "min_p", "presence_penalty", "priority", "repetition_penalty", "seed", "stop",
    "temperature", "top_k", "top_p",
}  # fmt: skip
"""Fields that keep their names in ``SamplingParams``; all but ``temperature`` and ``top_p`` are vLLM's extras."""
NOT_STORED = ("background", "conversation", "previous_response_id", "prompt")
"""Those that need what the server stores."""


class FunctionTool(ItemPart):
    """A function that the client runs.

    Args:
        type: "function"; tools that the provider's servers run are not offered.
        name: of the function.
        description: of the function.
        parameters: JSON schema of its arguments; without one any object.
        strict: whether calls that the model chooses to make must satisfy it.
    """

    ignored: ClassVar[tuple[str, ...]] = ()
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {"defer_loading": (False,)}
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128)
    description: str = ""
    parameters: dict[str, Any] = Field({"type": "object", "properties": {}})
    strict: bool = False

    def tool(self) -> Tool:
        """The function in no protocol's form."""
        return Tool(self.name, self.description, self.parameters, self.strict)


class AllowedTool(ItemPart):
    """A function by its name."""

    type: Literal["function"]
    name: str


class ResponsesToolChoice(ItemPart):
    """Which functions the reply calls, where that is more than a word.

    Args:
        type: "function" calls ``name``, "allowed_tools" one of ``tools``.
        name: with "function".
        mode: with "allowed_tools": whether one must be called.
        tools: with "allowed_tools".
    """

    type: Literal["function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[AllowedTool] | None = Field(None, min_length=1, max_length=MAX_TOOLS)

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> "ResponsesToolChoice":
        for name in ("name", "mode", "tools"):
            needed = self.type == ("function" if name == "name" else "allowed_tools")
            if needed != (getattr(self, name) is not None):
                state = "is required" if needed else "must not be given"
                raise ValueError(f"'tool_choice.{name}' {state} with the type '{self.type}'.")
        return self

    def choice(self, parallel: bool) -> ToolChoice:
        """The choice in no protocol's form."""
        if self.name is not None:
            return ToolChoice.function(self.name)
        return ToolChoice(self.mode or "auto", tuple(tool.name for tool in self.tools or ()), parallel)


class TextFormat(ItemPart):
    """What the text of a response must look like.

    Args:
        type: "text", "json_object" or "json_schema".
        schema_: ``schema``, with "json_schema".
        name: that the response repeats.
        description: that the response repeats.
        strict: accepted and unused: a schema is enforced, or refused.
    """

    ignored: ClassVar[tuple[str, ...]] = ()
    type: Literal["text", "json_object", "json_schema"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            state = "is required" if self.schema_ is None else "must not be given"
            raise ValueError(f"'text.format.schema' {state} with the type '{self.type}'.")
        return self

    def form(self) -> Json | None:
        """Arguments of ``StructuredOutputsParams``; None for text."""
        if self.type == "json_schema":
            return json_form(self.schema_)
        return json_form() if self.type == "json_object" else None

    def shown(self) -> Json:
        """The format as a response repeats it."""
        if self.type != "json_schema":
            return {"type": self.type}
        about = {"name": self.name or "response", "schema": self.schema_, "description": self.description}
        return {"type": self.type, "strict": True, **{key: value for key, value in about.items() if value is not None}}


class TextConfig(ItemPart):
    """About the text of a response; ``verbosity`` is accepted and unused."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(ItemPart):
    """About reasoning.

    Args:
        effort: "none" turns thinking off; other values are ``reasoning_effort`` of the chat template.
        summary: accepted and unused: the response has the reasoning itself.
    """

    ignored: ClassVar[tuple[str, ...]] = ("summary", "generate_summary")
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None

    def variables(self) -> Json:
        """Variables of the chat template."""
        if self.effort is None:
            return {}
        thinks = self.effort != "none"
        return {"enable_thinking": thinks, "thinking": thinks} | ({"reasoning_effort": self.effort} if thinks else {})


_Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]


class ResponsesRequest(Body):
    """The body of ``POST /v1/responses``; ``input`` is kept as a list of items.

    Args:
        return_sampling_logprobs: log-probabilities of the text, which ``include`` must ask for, have
            ``sampling_logprob``, as ``sampling_logprobs`` of a chat.
    """

    ignored: ClassVar[tuple[str, ...]] = IGNORED
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = NOT_OFFERED
    model: str | None = None
    input: _Items
    instructions: str | None = None
    include: list[str] = Field([], max_length=len(INCLUDABLE))
    max_output_tokens: int | None = None
    metadata: dict[str, str] = Field({}, max_length=16)
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    stream: bool = False
    temperature: float = 1.0
    text: TextConfig | None = None
    tool_choice: ResponsesToolChoice | Literal["none", "auto", "required"] = "auto"
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    top_p: float = 1.0
    truncation: Literal["auto", "disabled"] = "disabled"
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    min_p: float = 0.0
    presence_penalty: float = 0.0
    priority: int = 0
    repetition_penalty: float = 1.0
    return_sampling_logprobs: bool = False
    seed: int | None = None
    stop: list[str] = Field([], max_length=MAX_STOPS)
    top_k: int = 0

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_stored(cls, body: Any) -> Any:
        for name in NOT_STORED if isinstance(body, dict) else ():
            if body.get(name) not in (None, False):
                raise ValueError(
                    f"'{name}' is {shown(body[name])}, but this server stores nothing; give the whole conversation as "
                    "'input'."
                )
        return body

    @field_validator("input", mode="before", json_schema_input_type=str | _Items)
    @classmethod
    def _text_is_a_message(cls, given: Any) -> Any:
        if isinstance(given, str):
            return [{"type": "message", "role": "user", "content": given}]
        if not isinstance(given, list):
            raise ValueError(f"'input' must be text or a list of items, got {shown(given)}.")
        return [
            {**item, "type": "message"}
            if isinstance(item, dict) and item.get("type") is None and "role" in item
            else item
            for item in given
        ]

    @field_validator("tool_choice", mode="before", json_schema_input_type=ResponsesToolChoice | Literal[CHOICES])
    @classmethod
    def _a_word_or_an_object(cls, choice: Any) -> Any:
        if not isinstance(choice, dict) and choice not in CHOICES:
            raise ValueError(f"'tool_choice' must be an object or one of {', '.join(CHOICES)}, got {shown(choice)}.")
        return choice

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_stop_is_a_list_of_one(cls, stop: Any) -> Any:
        return one_or_several("stop", stop)

    @field_validator("stop")
    @classmethod
    def _stops_are_short(cls, stop: list[str]) -> list[str]:
        return short_together("stop", stop, MAX_STOP_CHARACTERS)

    @field_validator("include")
    @classmethod
    def _can_be_included(cls, include: list[str]) -> list[str]:
        wrong = next((name for name in include if name not in INCLUDABLE), None)
        if wrong is not None:
            raise ValueError(f"'include' must be some of {', '.join(map(repr, INCLUDABLE))}, got {shown(wrong)}.")
        return include

    @model_validator(mode="after")
    def _sampling_logprobs_need_logprobs(self) -> "ResponsesRequest":
        if self.return_sampling_logprobs and LOGPROBS not in self.include:
            raise ValueError(f"'return_sampling_logprobs' is true, but 'include' does not have '{LOGPROBS}'.")
        return self

    @model_validator(mode="after")
    def _a_choice_among_the_tools(self) -> "ResponsesRequest":
        choice, known = self.choice(), {one.name for one in self.tools}
        if choice.mode == "required" and not self.tools:
            raise ValueError("'tool_choice' must be 'auto' or 'none' without 'tools'.")
        wrong = next((name for name in choice.names if name not in known), None)
        if wrong is not None:
            raise ValueError(f"'tool_choice' must name some of 'tools', got {shown(wrong)}.")
        return self

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls fields that errors of the engine are about."""
        form = self.text.format if self.text is not None else None
        field = "text.format.schema" if form is not None and form.type == "json_schema" else "text.format"
        effort = dict.fromkeys(("enable_thinking", "reasoning_effort", "thinking"), "reasoning.effort")
        names = {"max_tokens": "max_output_tokens", "messages": "input", "prompt": "input"}
        return {**of_form(field), **of_variables(effort), **names}

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives at each token; None for no log-probabilities."""
        return self.top_logprobs if LOGPROBS in self.include else None

    def choice(self) -> ToolChoice:
        """The choice among the tools, in no protocol's form."""
        if isinstance(self.tool_choice, str):
            return ToolChoice(self.tool_choice, parallel=self.parallel_tool_calls)
        return self.tool_choice.choice(self.parallel_tool_calls)

    def chat(self) -> Chat:
        """The chat. Raises RequestError for results of functions that were not called."""
        messages = [ChatMessage("system", "instructions", [self.instructions])] if self.instructions else []
        messages += [item.message(f"input[{at}]") for at, item in enumerate(self.input)]
        messages = system_first(merged(messages, ("assistant",)))
        check_results(messages)
        variables = self.reasoning.variables() if self.reasoning is not None else {}
        return Chat(messages, [tool.tool() for tool in self.tools], self.choice(), variables)

    def sampling(self) -> Json:
        """Keyword arguments for ``SamplingParams``: what the request gave; the defaults live there."""
        values: Json = {name: getattr(self, name) for name in SAMPLED & self.model_fields_set}
        if self.max_output_tokens is not None:
            values["max_tokens"] = self.max_output_tokens
        form = self.text.format.form() if self.text is not None and self.text.format is not None else None
        return values if form is None else {**values, "structured_outputs": form}
