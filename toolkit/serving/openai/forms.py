"""What a request says about its output: OpenAI's ``response_format``, ``prediction``, vLLM's ``structured_outputs``."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.serving.body import Body
from toolkit.serving.json_forms import json_form

_TEXT_OR_OBJECT: Any = {"anyOf": [{"type": "object"}, {"type": "string"}]}


class JsonSchemaFormat(Body):
    """The JSON schema of a response.

    Args:
        name: accepted and unused.
        schema_: ``schema``; without one any object.
        strict: accepted and unused: a schema is enforced, or refused.
        description: accepted and unused.
    """

    name: str
    schema_: dict[str, Any] = Field({"type": "object"}, alias="schema")
    strict: bool = False
    description: str = ""


class ResponseFormat(Body):
    """What a response must look like.

    Args:
        type: "text", "json_object", "json_schema", or vLLM's "structural_tag".
        json_schema: with "json_schema".
        triggers: with "structural_tag".
        structures: with "structural_tag".
    """

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    triggers: list[str] | None = None
    structures: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> "ResponseFormat":
        for name in ("json_schema", "triggers", "structures"):
            needed = self.type == ("json_schema" if name == "json_schema" else "structural_tag")
            if needed != (getattr(self, name) is not None):
                state = "is required" if needed else "must not be given"
                raise ValueError(f"'response_format.{name}' {state} with the type '{self.type}'.")
        return self

    def form(self) -> dict[str, Any] | None:
        """Arguments of ``StructuredOutputsParams``; None for text."""
        tag = {"triggers": self.triggers, "structures": self.structures}
        forms: dict[str, dict[str, Any]] = {
            "json_object": json_form(),
            "json_schema": json_form(self.json_schema.schema_ if self.json_schema is not None else {}),
            "structural_tag": {"structural_tag": tag},
        }
        return forms.get(self.type)


class StructuredOutputs(Body):
    """vLLM's field for all forms; ``StructuredOutputsParams`` documents and checks them."""

    json_: Any = Field(None, alias="json", json_schema_extra=_TEXT_OR_OBJECT)
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = Field(None, json_schema_extra=_TEXT_OR_OBJECT)
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def form(self) -> dict[str, Any]:
        """Arguments of ``StructuredOutputsParams``."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class TextPart(Body):
    """A part of a message's content: text."""

    ignored: ClassVar[tuple[str, ...]] = ("cache_control",)
    type: Literal["text"]
    text: str


class Prediction(Body):
    """What the output is expected to be, such as a file that it edits: drafted with speculation, and no limit to it.

    Args:
        type: "content".
        content: text, or parts of text.
    """

    type: Literal["content"]
    content: list[TextPart]

    @field_validator("content", mode="before", json_schema_input_type=str | list[TextPart])
    @classmethod
    def _a_string_is_one_part(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """Of all parts."""
        return "".join(part.text for part in self.content)
