"""Content blocks of messages, and what chat templates read of them."""

import json
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from toolkit.chat.tools import ToolCall
from toolkit.sentences import shown
from toolkit.serving.body import Body
from toolkit.serving.conversation import ChatMessage, Image
from toolkit.serving.errors import Json

ERROR_MARK = "Error: "
"""Before the text of a tool's result that has ``is_error``: chat templates have no field for it."""


class Block(Body):
    """What all blocks have: a place in the provider's cache, and references, neither of which the model reads."""

    ignored: ClassVar[tuple[str, ...]] = ("cache_control", "citations", "caller")
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {}


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str


class Base64Source(Block):
    """An image in the request."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class UrlSource(Block):
    """An image behind a data URL, or behind a ``file://`` URL where the server allows local files."""

    type: Literal["url"]
    url: str


class ImageBlock(Block):
    """An image."""

    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]

    def image(self) -> Image:
        """The image, by a URL."""
        if isinstance(self.source, UrlSource):
            return Image(self.source.url)
        return Image(f"data:{self.source.media_type};base64,{self.source.data}")


class ToolUseBlock(Block):
    """A tool call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def call(self) -> ToolCall:
        """The call."""
        return ToolCall(self.id, self.name, json.dumps(self.input, ensure_ascii=False))


class ThinkingBlock(Block):
    """Thoughts of the assistant. The signature is not checked: this server's thoughts have an empty one."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Block):
    """Thoughts that only their author can read; this server's models do not."""

    type: Literal["redacted_thinking"]
    data: str = ""


ResultBlock = Annotated[TextBlock | ImageBlock, Field(discriminator="type")]


def as_blocks(field: str, content: Any) -> Any:
    """Blocks of text or of a list of blocks. Raises ValueError for others."""
    if not isinstance(content, str | list):
        raise ValueError(f"'{field}' must be text or a list of blocks, got {shown(content)}.")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ToolResultBlock(Block):
    """What a tool call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: list[ResultBlock] = Field([])
    is_error: bool = False

    @field_validator("content", mode="before", json_schema_input_type=str | list[ResultBlock])
    @classmethod
    def _a_string_is_one_block(cls, content: Any) -> Any:
        return as_blocks("content", content)

    def message(self, where: str) -> ChatMessage:
        """The result as a message of the role "tool"; ``where`` is the field of the request."""
        content = [one.text if isinstance(one, TextBlock) else one.image() for one in self.content]
        fields: Json = {"tool_call_id": self.tool_use_id}
        return ChatMessage("tool", where, [ERROR_MARK, *content] if self.is_error else content, fields)


AnyBlock = Annotated[
    TextBlock | ImageBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock,
    Field(discriminator="type"),
]
Role = Literal["user", "assistant", "system"]
BLOCKS_OF: dict[str, tuple[type[Block], ...]] = {
    "user": (TextBlock, ImageBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
    "system": (TextBlock,),
}
"""Which blocks a message of a role may have."""


class InputMessage(Block):
    """One message of a chat."""

    role: Role
    content: list[AnyBlock]

    @field_validator("content", mode="before", json_schema_input_type=str | list[AnyBlock])
    @classmethod
    def _a_string_is_one_block(cls, content: Any) -> Any:
        return as_blocks("content", content)

    @model_validator(mode="after")
    def _blocks_of_its_role(self) -> "InputMessage":
        allowed = BLOCKS_OF[self.role]
        wrong = next((block for block in self.content if not isinstance(block, allowed)), None)
        if wrong is not None:
            kinds = ", ".join(repr(get_args(one.model_fields["type"].annotation)[0]) for one in allowed)
            raise ValueError(
                f"'content' of a message of the role '{self.role}' must have blocks of the types {kinds}, "
                f"got {wrong.type!r}."
            )
        return self

    def messages(self, where: str) -> list[ChatMessage]:
        """What chat templates read of it, results of tools as separate messages; ``where`` is its field."""
        found: list[ChatMessage] = []

        def own() -> ChatMessage:
            if not found or found[-1].role != self.role:
                found.append(ChatMessage(self.role, where))
            return found[-1]

        for block in self.content:
            match block:
                case TextBlock():
                    own().content.append(block.text)
                case ImageBlock():
                    own().content.append(block.image())
                case ThinkingBlock():
                    fields = own().fields
                    fields["reasoning_content"] = fields.get("reasoning_content", "") + block.thinking
                case ToolUseBlock():
                    own().fields.setdefault("tool_calls", []).append(block.call().for_template())
                case ToolResultBlock():
                    found.append(block.message(where))
        return found or [ChatMessage(self.role, where)]
