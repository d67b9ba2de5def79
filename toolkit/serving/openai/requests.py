"""The body of ``/v1/chat/completions``; ``sampling`` documents what it shares with completions."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from toolkit.chat.tools import Tool, ToolChoice
from toolkit.sentences import shown
from toolkit.serving.body import Body
from toolkit.serving.field_names import of_variables
from toolkit.serving.openai.messages import ROLES, ImagePart, ImageUrl, Message, MessageToolCall, Part
from toolkit.serving.openai.sampling import CHAT_NAMES, IGNORED, MAX_TOP_LOGPROBS, OTHER_NAMES, Sampling
from toolkit.serving.openai.tools import MAX_TOOLS, ToolChoiceField, ToolChoiceObject, ToolSpec, checked_choice

__all__ = ["ROLES", "ChatRequest", "Conversation", "ImagePart", "ImageUrl", "Message", "MessageToolCall", "Part"]

MAX_MESSAGES = 2048
MAX_DOCUMENTS = 1024
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


class Conversation(Body):
    """What a body says about its chat.

    Args:
        messages: of the chat.
        tools: functions that the model may call.
        reasoning_effort: a variable of the chat template; "none" also sets its ``enable_thinking`` to false.
        add_generation_prompt: end the prompt with what opens the assistant's turn; not with
            ``continue_final_message``.
        continue_final_message: the reply continues the last message.
        documents: for the chat template.
        chat_template_kwargs: variables of the chat template, such as ``enable_thinking``.
        chat_template: refused, see the error.
    """

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[ToolSpec] = Field([], max_length=MAX_TOOLS)
    reasoning_effort: str | None = Field(None, json_schema_extra={"enum": [*EFFORTS, None]})
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    documents: list[dict[str, Any]] = Field([], max_length=MAX_DOCUMENTS)
    chat_template_kwargs: dict[str, Any] = Field({})
    chat_template: Any = None

    @field_validator("reasoning_effort")
    @classmethod
    def _an_effort(cls, effort: str | None) -> str | None:
        if effort is not None and effort not in EFFORTS:
            allowed = ", ".join(map(repr, EFFORTS))
            raise ValueError(f"'reasoning_effort' must be one of {allowed}, got {shown(effort)}.")
        return effort

    @field_validator("chat_template")
    @classmethod
    def _no_template(cls, given: Any) -> Any:
        raise ValueError(
            "'chat_template' must be left out: a template is a program that the server would run for its client; "
            "start the server with --chat-template."
        )

    @model_validator(mode="after")
    def _continues_or_opens(self) -> "Conversation":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("'add_generation_prompt' is true, but 'continue_final_message' is true too; give one.")
        if self.continue_final_message and self.messages and self.messages[-1].tool_calls:
            raise ValueError("'continue_final_message' is true, but the last message has 'tool_calls'.")
        return self

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls variables of the chat template that other fields set."""
        own = {"documents": "documents", "enable_thinking": "reasoning_effort", "reasoning_effort": "reasoning_effort"}
        given = self.chat_template_kwargs
        return {**super().field_names, **of_variables({name: own[name] for name in own if name not in given})}

    def read_tools(self) -> list[Tool]:
        """The tools, in no protocol's form."""
        return [one.tool() for one in self.tools]

    def variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        given: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            given["reasoning_effort"] = self.reasoning_effort
            if self.reasoning_effort == "none":
                given["enable_thinking"] = False
        if self.documents:
            given["documents"] = self.documents
        return {**given, **self.chat_template_kwargs}

    def template_options(self) -> dict[str, Any]:
        """Arguments of ``Texts.chat_text``."""
        return {
            "tools": [tool.for_template() for tool in self.read_tools()],
            "chat_template_kwargs": self.variables(),
            "continue_final_message": self.continue_final_message,
            "add_generation_prompt": self.add_generation_prompt,
        }


class ChatRequest(Conversation, Sampling):
    """The body of ``POST /v1/chat/completions``.

    Args:
        tool_choice: "none", "auto", "required", one function, or those that are allowed.
        parallel_tool_calls: False for at most one call in a reply.
        include_reasoning: False leaves reasoning out of the response.
    """

    ignored: ClassVar[tuple[str, ...]] = tuple(
        name for name in IGNORED if name not in ("service_tier", "parallel_tool_calls")
    )
    other_names: ClassVar[Mapping[str, str]] = OTHER_NAMES | CHAT_NAMES
    service_tier: Any = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True

    @field_validator("tool_choice", mode="before", json_schema_input_type=ToolChoiceField)
    @classmethod
    def _a_choice(cls, given: Any) -> Any:
        if isinstance(given, str) and given not in ("none", "auto", "required"):
            raise ValueError(
                "'tool_choice' must be 'none', 'auto', 'required' or an object that names a function, "
                f"got {shown(given)}."
            )
        return given if isinstance(given, str) else ToolChoiceObject.model_validate(given)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"'top_logprobs' is {self.top_logprobs}, but 'logprobs' is not true.")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ValueError(f"'max_tokens' is {old} and 'max_completion_tokens' is {new}; give one.")
        self.choice  # noqa: B018  # raises what is wrong
        return self

    @property
    def choice(self) -> ToolChoice:
        """Among the tools."""
        return checked_choice(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def field_names(self) -> dict[str, str]:
        limit = {"max_tokens": "max_completion_tokens"} if self.max_completion_tokens is not None else {}
        return {**super().field_names, "prompt": "messages", **limit}

    def sampling(self) -> dict[str, Any]:
        values = super().sampling()
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        return values
