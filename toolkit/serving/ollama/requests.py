"""Request bodies: those of ``/api/chat``, ``/api/generate``, ``/api/show`` and ``/api/embed``.

Field names and meanings are Ollama's. A null is the same as a field that is not given. Ranges of sampling values belong
to ``SamplingParams`` and are checked there.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.chat.tools import Tool, ToolCall
from toolkit.sentences import shown
from toolkit.serving.body import Body, one_or_several, short_together
from toolkit.serving.conversation import Chat, ChatMessage, Image, merged, system_first
from toolkit.serving.errors import Json
from toolkit.serving.field_names import of_form, of_variables
from toolkit.serving.json_forms import json_form
from toolkit.serving.openai.requests import MAX_MESSAGES
from toolkit.serving.openai.sampling import MAX_STOP_CHARACTERS, MAX_STOPS, MAX_TOP_LOGPROBS
from toolkit.strict_json import strict_json

MAX_TOOLS = 512
MAX_IMAGES = 64
EFFORTS = ("low", "medium", "high", "max")
OTHER_OPTIONS = {"repeat_penalty": "repetition_penalty", "num_predict": "max_tokens"}
"""Options that ``SamplingParams`` has under other names."""


class OllamaPart(Body):
    """What all objects in requests have."""

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {}


class OllamaOptions(OllamaPart):
    """How to sample. What is about loading a model (``num_ctx``, ``num_gpu``, ...) is accepted and unused.

    Args:
        num_predict: most tokens, as far as the model's length allows; negative ones are up to that.
        repeat_penalty: over all of prompt and output.
    """

    ignored: ClassVar[tuple[str, ...]] = (
        "embedding_only", "f16_kv", "logits_all", "low_vram", "main_gpu", "mirostat_eta", "mirostat_tau", "num_batch",
        "num_ctx", "num_gpu", "num_keep", "num_thread", "numa", "penalize_newline", "use_mlock", "use_mmap",
        "vocab_only",
    )  # fmt: skip
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "mirostat": (0,),
        "repeat_last_n": (-1,),
        "tfs_z": (1, 1.0),
    }
    frequency_penalty: float | None = None
    min_p: float | None = None
    num_predict: int | None = None
    presence_penalty: float | None = None
    repeat_penalty: float | None = Field(None, json_schema_extra={"minimum": 1e-5, "maximum": 1e5})
    seed: int | None = None
    stop: list[str] = Field([], max_length=MAX_STOPS)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None

    @field_validator("stop", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_stop_is_a_list_of_one(cls, stop: Any) -> Any:
        return one_or_several("options.stop", stop)

    @field_validator("stop")
    @classmethod
    def _stops_are_short(cls, stop: list[str]) -> list[str]:
        return short_together("options.stop", stop, MAX_STOP_CHARACTERS)

    def sampling(self) -> Json:
        """Keyword arguments for ``SamplingParams``: what the request gave; the defaults live there."""
        values = {OTHER_OPTIONS.get(name, name): getattr(self, name) for name in self.model_fields_set}
        if (values.get("max_tokens") or 0) < 0:
            del values["max_tokens"]
        return {name: value for name, value in values.items() if value not in (None, [])}


class OllamaFunction(OllamaPart):
    """A function that the client runs; ``parameters`` is the JSON schema of its arguments."""

    ignored: ClassVar[tuple[str, ...]] = ("strict",)
    name: str = Field(min_length=1, max_length=128)
    description: str = ""
    parameters: dict[str, Any] = Field({"type": "object", "properties": {}})


class OllamaTool(OllamaPart):
    """A tool."""

    type: Literal["function"] = "function"
    function: OllamaFunction

    def tool(self) -> Tool:
        """The tool in no protocol's form."""
        return Tool(self.function.name, self.function.description, self.function.parameters)


class OllamaCalledFunction(OllamaPart):
    """The function of a call that the assistant made."""

    ignored: ClassVar[tuple[str, ...]] = ("description", "index")
    name: str
    arguments: dict[str, Any] = Field({})


class OllamaCall(OllamaPart):
    """A call that the assistant made."""

    ignored: ClassVar[tuple[str, ...]] = ("type",)
    id: str | None = None
    function: OllamaCalledFunction


class OllamaMessage(OllamaPart):
    """One message of a chat.

    Args:
        role: of the message.
        content: text.
        thinking: thoughts of the assistant.
        images: in base64.
        tool_calls: of the assistant.
        tool_name: whose result a message of the role "tool" is.
        tool_call_id: the same, by the id of the call.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str | None = None
    images: list[str] = Field([], max_length=MAX_IMAGES)
    tool_calls: list[OllamaCall] = Field([], max_length=MAX_TOOLS)
    tool_name: str | None = None
    tool_call_id: str | None = None


def as_image(data: str) -> Image:
    """An image of base64."""
    return Image(f"data:image;base64,{data}")


def as_messages(messages: list[OllamaMessage]) -> list[ChatMessage]:
    """Messages as chat templates read them; calls without an id get one, and results the ids in order."""
    found: list[ChatMessage] = []
    unanswered: list[ToolCall] = []
    for at, one in enumerate(messages):
        fields: Json = {}
        if one.thinking:
            fields["reasoning_content"] = one.thinking
        if one.tool_calls:
            unanswered = [
                ToolCall(call.id or f"call_{at}_{index}", call.function.name, strict_json(call.function.arguments))
                for index, call in enumerate(one.tool_calls)
            ]
            fields["tool_calls"] = [call.for_template() for call in unanswered]
        if one.role == "tool":
            fits = [call for call in unanswered if call.id == one.tool_call_id or call.name == one.tool_name]
            answered = next(iter(fits or unanswered), None)
            if answered is not None:
                unanswered.remove(answered)
                fields |= {"tool_call_id": answered.id, "name": answered.name}
            elif one.tool_name is not None:
                fields["name"] = one.tool_name
        found.append(ChatMessage(one.role, f"messages[{at}]", [one.content, *map(as_image, one.images)], fields))
    return system_first(merged(found, ("assistant",)))


class OllamaRequest(Body):
    """What both kinds of requests have.

    Args:
        logprobs: whether the response has an entry for each token.
        top_logprobs: alternatives in it.
        return_sampling_logprobs: with ``logprobs``, entries have ``sampling_logprob``, as ``sampling_logprobs`` of a
            chat by OpenAI's route.
    """

    ignored: ClassVar[tuple[str, ...]] = ("keep_alive",)
    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {}
    model: str
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] = ""
    options: OllamaOptions = Field(default_factory=lambda: OllamaOptions.model_validate({}))
    think: bool | str | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    return_sampling_logprobs: bool = False

    @field_validator("think", mode="before", json_schema_input_type=bool | Literal[EFFORTS])
    @classmethod
    def _whether_or_how_much(cls, think: Any) -> Any:
        if not isinstance(think, bool) and think not in EFFORTS:
            raise ValueError(f"'think' must be true, false or one of {', '.join(EFFORTS)}, got {shown(think)}.")
        return think

    @field_validator("format", mode="before", json_schema_input_type=Literal["", "json"] | dict[str, Any])
    @classmethod
    def _json_or_a_schema(cls, form: Any) -> Any:
        if not isinstance(form, dict) and form not in ("", "json"):
            raise ValueError(f"'format' must be 'json' or a JSON schema, got {shown(form)}.")
        return form

    @model_validator(mode="after")
    def _sampling_logprobs_need_logprobs(self) -> "OllamaRequest":
        if self.return_sampling_logprobs and not self.logprobs:
            raise ValueError("'return_sampling_logprobs' is true, but 'logprobs' is not true.")
        return self

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls fields that errors of the engine are about."""
        options = {OTHER_OPTIONS.get(name, name): f"options.{name}" for name in OllamaOptions.model_fields}
        variables = dict.fromkeys(("enable_thinking", "reasoning_effort", "thinking"), "think")
        return {**options, **of_form("format"), **of_variables(variables)}

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives at each token; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None

    def variables(self) -> Json:
        """Variables of the chat template."""
        if self.think is None:
            return {}
        effort = {"reasoning_effort": "high" if self.think == "max" else self.think}
        return {"enable_thinking": bool(self.think), "thinking": bool(self.think)} | (
            effort if isinstance(self.think, str) else {}
        )

    def sampling(self) -> Json:
        """Keyword arguments for ``SamplingParams``: what the request gave; the defaults live there."""
        values = self.options.sampling()
        if self.format:
            values["structured_outputs"] = json_form(None if self.format == "json" else self.format)
        return values


class OllamaChatRequest(OllamaRequest):
    """The body of ``POST /api/chat``; without messages it asks whether the model is loaded."""

    messages: list[OllamaMessage] = Field([], max_length=MAX_MESSAGES)
    tools: list[OllamaTool] = Field([], max_length=MAX_TOOLS)

    @property
    def field_names(self) -> dict[str, str]:
        return {**super().field_names, "prompt": "messages"}

    def chat(self) -> Chat:
        """The chat."""
        tools = [one.tool() for one in self.tools]
        return Chat(as_messages(self.messages), tools, variables=self.variables())


class OllamaGenerateRequest(OllamaRequest):
    """The body of ``POST /api/generate``; without a prompt it asks whether the model is loaded.

    Args:
        prompt: of the user, in the model's chat template.
        suffix: what follows the completion: with it the prompt is neither in the template nor has a system message.
        system: message before the prompt.
        images: in base64.
        raw: the prompt is the model's input as it is.
    """

    not_offered: ClassVar[dict[str, tuple[Any, ...]]] = {
        "context": ([],),
        "height": (0,),
        "steps": (0,),
        "template": ("",),
        "width": (0,),
    }
    prompt: str = ""
    suffix: str = ""
    system: str = ""
    images: list[str] = Field([], max_length=MAX_IMAGES)
    raw: bool = False

    @property
    def field_names(self) -> dict[str, str]:
        return {**super().field_names, "messages": "prompt"}

    def chat(self) -> Chat:
        """The prompt as a chat."""
        messages = [ChatMessage("system", "system", [self.system])] if self.system else []
        content: list[str | Image] = [self.prompt, *map(as_image, self.images)]
        return Chat([*messages, ChatMessage("user", "prompt", content)], variables=self.variables())


class OllamaShowRequest(OllamaPart):
    """The body of ``POST /api/show``; older clients name the model as ``name``."""

    ignored: ClassVar[tuple[str, ...]] = ("name", "verbose")
    model: str

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, body: Any) -> Any:
        return (
            {**body, "model": body.get("model") or body["name"]} if isinstance(body, dict) and "name" in body else body
        )


_Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]


class OllamaEmbedRequest(OllamaPart):
    """The body of ``POST /api/embed``.

    Args:
        input: a text or several.
        truncate: whether a text that is too long is cut; false makes it an error.
        dimensions: of the embeddings.
    """

    ignored: ClassVar[tuple[str, ...]] = ("keep_alive", "options")
    model: str
    input: _Texts
    truncate: bool = True
    dimensions: int | None = Field(None, ge=1)

    @field_validator("input", mode="before", json_schema_input_type=str | _Texts)
    @classmethod
    def _one_text_is_a_list_of_one(cls, given: Any) -> Any:
        return one_or_several("input", given)
