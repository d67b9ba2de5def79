"""Input items, and what chat templates read of them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from toolkit.chat.tools import ToolCall
from toolkit.sentences import shown
from toolkit.serving.body import Body
from toolkit.serving.conversation import ChatMessage, Image


class ItemPart(Body):
    """What all items and their parts may have: what this server or the client said about them, which no model reads."""

    ignored: ClassVar[tuple[str, ...]] = (
        "annotations", "created_by", "detail", "encrypted_content", "id", "logprobs", "namespace", "parsed",
        "parsed_arguments", "phase", "prompt_cache_breakpoint", "status",
    )  # fmt: skip
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {}


class InputText(ItemPart):
    """Text."""

    type: Literal["input_text"]
    text: str


class OutputText(ItemPart):
    """Text of an earlier reply."""

    type: Literal["output_text"]
    text: str


class DeclinedText(ItemPart):
    """What an earlier reply said instead of doing what was asked; text to the model."""

    type: Literal["refusal"]
    text: str = Field(alias="refusal")


class InputImage(ItemPart):
    """An image behind a data URL, or behind a ``file://`` URL where the server allows local files."""

    type: Literal["input_image"]
    image_url: str


InputPart = Annotated[InputText | OutputText | DeclinedText | InputImage, Field(discriminator="type")]


def as_parts(field: str, content: Any) -> Any:
    """Parts of text or of a list of parts. Raises ValueError for others."""
    if not isinstance(content, str | list):
        raise ValueError(f"'{field}' must be text or a list of parts, got {shown(content)}.")
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


def _content(parts: list[InputPart]) -> list[str | Image]:
    return [Image(part.image_url) if isinstance(part, InputImage) else part.text for part in parts]


class MessageItem(ItemPart):
    """A message; ``type`` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: list[InputPart]

    @field_validator("content", mode="before", json_schema_input_type=str | list[InputPart])
    @classmethod
    def _a_string_is_one_part(cls, content: Any) -> Any:
        return as_parts("content", content)

    def message(self, where: str) -> ChatMessage:
        """The message; ``where`` is its field."""
        # One role for all instructions: most templates know one message of them, at the beginning.
        role = "system" if self.role == "developer" else self.role
        return ChatMessage(role, where, _content(self.content))


class FunctionCallItem(ItemPart):
    """A call of a function that an earlier reply made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    def message(self, where: str) -> ChatMessage:
        """The call as the assistant's; ``where`` is its field."""
        call = ToolCall(self.call_id, self.name, self.arguments)
        return ChatMessage("assistant", where, fields={"tool_calls": [call.for_template()]})


class FunctionCallOutputItem(ItemPart):
    """What a called function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: list[InputPart]

    @field_validator("output", mode="before", json_schema_input_type=str | list[InputPart])
    @classmethod
    def _a_string_is_one_part(cls, output: Any) -> Any:
        return as_parts("output", output)

    def message(self, where: str) -> ChatMessage:
        """The result as a message of the role "tool"; ``where`` is its field."""
        return ChatMessage("tool", where, _content(self.output), {"tool_call_id": self.call_id})


class ReasoningText(ItemPart):
    """Text of reasoning, or of a summary of it."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(ItemPart):
    """Reasoning of an earlier reply; a summary stands for it where there is no more."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field([])
    content: list[ReasoningText] = Field([])

    def message(self, where: str) -> ChatMessage:
        """The reasoning as the assistant's; ``where`` is its field."""
        text = "".join(part.text for part in self.content or self.summary)
        return ChatMessage("assistant", where, fields={"reasoning_content": text} if text else {})


InputItem = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem, Field(discriminator="type")
]
