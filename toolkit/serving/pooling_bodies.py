"""Bodies of a pooling model's requests, and its responses as the OpenAPI document describes them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from toolkit.engine.pooling import PoolingParams
from toolkit.sentences import shown
from toolkit.serving.body import Body, one_or_several
from toolkit.serving.ollama.requests import OllamaEmbedRequest, OllamaShowRequest
from toolkit.serving.openai.completion_request import MAX_PROMPTS, PromptKinds, prompt_list
from toolkit.serving.openai.sampling import IGNORED

Model = type[BaseModel]
_Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]


class PoolingBody(Body):
    """What all bodies have.

    Args:
        model: any of the served names; null for the first.
        truncate_prompt_tokens: most tokens of a sequence, of a text the first and of token ids the last; -1: the
            model's length. null refuses sequences that are longer than that.
        use_activation: whether logits get the model's activation; null for its own default.
    """

    ignored: ClassVar[tuple[str, ...]] = (*IGNORED, "priority")
    model: str | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    use_activation: bool | None = None

    def params(self, **given: Any) -> PoolingParams:
        """What the engine is asked for."""
        return PoolingParams(
            truncate_prompt_tokens=self.truncate_prompt_tokens, use_activation=self.use_activation, **given
        )


class InputsBody(PoolingBody):
    """``input`` is kept as a list of texts or of token id lists.

    Args:
        input: texts or token ids.
    """

    input: list[str] | list[list[int]]

    @field_validator("input", mode="before", json_schema_input_type=PromptKinds)
    @classmethod
    def _inputs(cls, given: Any) -> Any:
        return prompt_list(given, "input")


class EmbeddingRequest(InputsBody):
    """The body of ``POST /v1/embeddings``.

    Args:
        encoding_format: lists of numbers, or base64 of float32 in little-endian order.
        dimensions: the first so many of an embedding; null for all.
        normalize: whether embeddings are divided by their length; null for the model's own default.
    """

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    normalize: bool | None = None


class PoolingRequest(EmbeddingRequest):
    """The body of ``POST /pooling``.

    Args:
        task: what is asked for, of one sequence or of each of its tokens; null for the model's own.
    """

    task: Literal["embed", "token_embed", "classify", "token_classify"] | None = None


class ClassifyRequest(InputsBody):
    """The body of ``POST /classify``."""


class ScoreRequest(PoolingBody):
    """The body of ``POST /v1/score``: one text and others, or pairs.

    Args:
        text_1: one text, or one for each of ``text_2``.
        text_2: what it is compared with.
    """

    text_1: _Texts
    text_2: _Texts

    @field_validator("text_1", "text_2", mode="before", json_schema_input_type=str | _Texts)
    @classmethod
    def _one_text_is_a_list_of_one(cls, given: Any, info: ValidationInfo) -> Any:
        return one_or_several(str(info.field_name), given)


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Document(_Schema):
    """A document as an object."""

    text: str


class RerankRequest(PoolingBody):
    """The body of ``POST /v1/rerank``; documents are kept as texts.

    Args:
        query: what the documents are compared with.
        documents: texts, or objects with one.
        top_n: so many of the best; null and 0 for all.
        return_documents: whether results have their texts.
    """

    query: str
    documents: list[str] = Field(min_length=1, max_length=MAX_PROMPTS)
    top_n: int | None = Field(None, ge=0)
    return_documents: bool = True

    @field_validator("documents", mode="before", json_schema_input_type=list[str | Document])
    @classmethod
    def _texts(cls, given: Any) -> Any:
        if not isinstance(given, list):
            raise ValueError(f"'documents' must be a list of texts, got {shown(given)}.")
        return [one["text"] if isinstance(one, dict) and set(one) == {"text"} else one for one in given]

    @property
    def field_names(self) -> dict[str, str]:
        """What this body calls the texts of a score."""
        return {"text_1": "query", "text_2": "documents"}


BODIES: tuple[Model, ...] = (
    EmbeddingRequest, PoolingRequest, ClassifyRequest, ScoreRequest, RerankRequest, OllamaEmbedRequest,
    OllamaShowRequest,
)  # fmt: skip


class PoolingUsage(_Schema):
    prompt_tokens: int
    total_tokens: int


class EmbeddingData(_Schema):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str


class ScoreData(_Schema):
    index: int
    object: Literal["score"]
    score: float


class ClassData(_Schema):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class PoolingData(_Schema):
    index: int
    object: Literal["pooling"]
    data: list[float] | list[list[float]] | str


class _List(_Schema):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: PoolingUsage


class EmbeddingList(_List):
    data: list[EmbeddingData]


class ScoreList(_List):
    data: list[ScoreData]


class ClassList(_List):
    data: list[ClassData]


class PoolingList(_List):
    data: list[PoolingData]


class RerankResult(_Schema):
    index: int
    relevance_score: float
    document: Document | None = None


class RerankUsage(_Schema):
    total_tokens: int


class RerankResponse(_Schema):
    id: str
    model: str
    usage: RerankUsage
    results: list[RerankResult]
