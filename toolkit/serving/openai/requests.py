"""The body of ``/v1/chat/completions``; ``sampling`` documents what it shares with completions."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.sentences import shown
from toolkit.serving.body import Body
from toolkit.serving.openai.forms import TextPart
from toolkit.serving.openai.sampling import IGNORED, MAX_TOP_LOGPROBS, Sampling

MAX_MESSAGES = 2048
ROLES = ("system", "developer", "user", "assistant", "tool")


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

    type: Literal["image_url"]
    image_url: ImageUrl

    @field_validator("image_url", mode="before", json_schema_input_type=str | ImageUrl)
    @classmethod
    def _a_string_is_a_url(cls, given: Any) -> Any:
        return {"url": given} if isinstance(given, str) else given


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Body):
    """One message of a chat: a role and its content, as a string or as parts of text and images."""

    role: str = Field(json_schema_extra={"enum": list(ROLES)})
    content: list[Part]
    name: str = ""

    @field_validator("role")
    @classmethod
    def _known_role(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"'role' of a message must be one of {', '.join(map(repr, ROLES))}, got {shown(role)}.")
        return role

    @field_validator("content", mode="before", json_schema_input_type=str | list[Part])
    @classmethod
    def _a_string_is_one_part(cls, content: Any) -> Any:
        if not isinstance(content, str | list):
            raise ValueError(f"'content' of a message must be text or a list of parts, got {shown(content)}.")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def num_characters(self) -> int:
        """Characters of its text parts."""
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[str]:
        """URLs of its images, in order."""
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: its text parts joined, or all parts where some are images."""
        content: Any = "".join(part.text for part in self.content if isinstance(part, TextPart))
        if self.images:
            content = [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in self.content
            ]
        return {"role": self.role, "content": content, **({"name": self.name} if self.name else {})}


class ChatRequest(Sampling):
    """The body of ``POST /v1/chat/completions``."""

    ignored: ClassVar[tuple[str, ...]] = tuple(name for name in IGNORED if name != "service_tier")
    service_tier: Any = None
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError(f"'top_logprobs' is {self.top_logprobs}, but 'logprobs' is not true.")
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise ValueError(f"'max_tokens' is {old} and 'max_completion_tokens' is {new}; give one.")
        return self

    def sampling(self) -> dict[str, Any]:
        values = super().sampling()
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        return values
