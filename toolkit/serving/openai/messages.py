"""Messages of a chat request: their roles, parts, and calls of tools."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from toolkit.sentences import shown
from toolkit.serving.body import Body
from toolkit.serving.openai.forms import TextPart

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MAX_CALLS = 256


class ImageUrl(Body):
    """Where an image is: a data URL, or a ``file://`` URL where the server allows local files.

    Args:
        url: of the image. Nothing is fetched from a network.
        detail: accepted and unused; the model's processor chooses the resolution.
    """

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Body):
    """A part of a message's content: an image."""

    ignored: ClassVar[tuple[str, ...]] = ("cache_control",)
    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before", json_schema_input_type=str | ImageUrl)
    @classmethod
    def _a_string_is_a_url(cls, given: Any) -> Any:
        return {"url": given} if isinstance(given, str) else given


class DeclinedPart(Body):
    """A part of an assistant's content: what it said instead of doing what was asked; text to the model."""

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


Part = Annotated[TextPart | ImagePart | DeclinedPart, Field(discriminator="type")]


class MessageFunction(Body):
    """The function of a call, and its arguments as JSON text of an object, or what else the model had written."""

    name: str = Field(min_length=1)
    arguments: str = "{}"


class MessageToolCall(Body):
    """A call that the assistant has made."""

    ignored: ClassVar[tuple[str, ...]] = ("index", "provider_specific_fields")
    id: str = ""
    type: Literal["function"] = "function"
    function: MessageFunction


class Message(Body):
    """One message of a chat.

    Args:
        role: who wrote it; "function" is the older name of "tool".
        content: a string, or parts of text and images; may be left out beside ``tool_calls``.
        name: of its author, or of the tool.
        tool_calls: of the assistant.
        function_call: the older form of ``tool_calls``.
        tool_call_id: of the call whose result this is.
        reasoning_content: of the assistant.
        reasoning: vLLM's newer name for it.
        declined: what the assistant says instead of content where it does not do what was asked.
    """

    ignored: ClassVar[tuple[str, ...]] = ("annotations", "cache_control", "provider_specific_fields", "thinking_blocks")
    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    name: str = ""
    tool_calls: list[MessageToolCall] = Field([], max_length=MAX_CALLS)
    function_call: MessageFunction | None = None
    tool_call_id: str = ""
    reasoning_content: str = ""
    reasoning: str = ""
    declined: str = Field("", alias="refusal")
    content: list[Part] | None = Field(None, validate_default=True)  # behind those that stand in its place

    @field_validator("role")
    @classmethod
    def _known_role(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"'role' of a message must be one of {', '.join(map(repr, ROLES))}, got {shown(role)}.")
        return role

    @field_validator("content", mode="before", json_schema_input_type=str | list[Part])
    @classmethod
    def _a_string_is_one_part(cls, content: Any) -> Any:
        if not isinstance(content, str | list | None):
            raise ValueError(f"'content' of a message must be text or a list of parts, got {shown(content)}.")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @field_validator("content")
    @classmethod
    def _something(cls, content: list[Part] | None, info: ValidationInfo) -> list[Part] | None:
        if content is None and not any(info.data.get(name) for name in _INSTEAD_OF_CONTENT):
            raise PydanticCustomError("missing", "is required")
        return content

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> "Message":
        for role, names in _OF_ROLE.items():
            wrong = next((name for name in names if self.role not in role and getattr(self, name)), None)
            if wrong is not None:
                field = "refusal" if wrong == "declined" else wrong
                raise ValueError(f"'{field}' must be in a message of the role '{role[0]}', got '{self.role}'.")
        if self.role != "assistant":
            declined = next((part.type for part in self.content or () if isinstance(part, DeclinedPart)), None)
            if declined is not None:
                raise ValueError(f"'{declined}' must be in a message of the role 'assistant', got '{self.role}'.")
        return self

    @property
    def thoughts(self) -> str:
        """The reasoning, under either name."""
        return self.reasoning_content or self.reasoning

    @property
    def text(self) -> str:
        """Its text parts, joined."""
        return "".join(part.text for part in self.content or () if not isinstance(part, ImagePart))

    @property
    def num_characters(self) -> int:
        """Characters of its texts."""
        calls = [call.function.arguments for call in self.tool_calls]
        return sum(map(len, [self.text, *calls, self.thoughts, self.declined]))

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        return [part.image_url.url for part in self.content or () if isinstance(part, ImagePart)]

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: its text parts joined, or all parts where some are images."""
        content: Any = self.declined or None
        if self.content is not None:
            content = self.text + self.declined
        if self.images:
            content = [
                {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
                for part in self.content or ()
            ]
        calls = [*self.tool_calls]
        if self.function_call is not None:
            calls.append(MessageToolCall(id=self.function_call.name, function=self.function_call))
        more: dict[str, Any] = {
            "name": self.name,
            "tool_call_id": self.tool_call_id or (self.name if self.role == "function" else ""),
            "tool_calls": [call.model_dump() for call in calls],
            "reasoning_content": self.thoughts,
            "reasoning": self.thoughts,
        }
        role = "tool" if self.role == "function" else self.role
        if content is None and not calls:
            content = ""
        return {"role": role, "content": content, **{name: value for name, value in more.items() if value}}


_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "declined")
_OF_ROLE = {
    ("assistant",): _INSTEAD_OF_CONTENT,
    ("tool",): ("tool_call_id",),
}
