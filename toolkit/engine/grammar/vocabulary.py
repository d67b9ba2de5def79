"""What the tokens of a tokenizer write, for grammars over bytes."""

from typing import TYPE_CHECKING, Any

from toolkit.engine.grammar.library import library
from toolkit.engine.token_bytes import TokenBytes, decoder_steps
from toolkit.errors import ToolkitError

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class Vocabulary:
    """The tokens of a model as bytes.

    A token that writes nothing, a special token, the unknown token and ids that the tokenizer does not have (a model's
    embedding may have more rows) are never text: no grammar allows them but by their name.

    Args:
        tokenizer: a fast tokenizer of transformers, or a ``tokenizers.Tokenizer``.
        vocab_size: of the model's logits.
        eos: tokens that end a text.

    Attributes:
        size: ``vocab_size``.
        eos: those of ``eos`` that the model has, ascending.
        special: ids of special tokens by name.
        tokens: for llguidance.

    Raises:
        ToolkitError: no tokenizer, one without a fast backend, one whose tokens write other text in other places, or
            no end-of-text token.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos: frozenset[int]) -> None:
        if tokenizer is None:
            raise ToolkitError("structured_outputs needs a tokenizer, and the engine has none.")
        backend = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        if not hasattr(backend, "get_added_tokens_decoder"):
            raise ToolkitError(
                f"structured_outputs needs a fast tokenizer, one of the library tokenizers, "
                f"got {type(tokenizer).__name__}, which has no fast backend."
            )
        self.size = vocab_size
        self.eos = sorted(token for token in eos if 0 <= token < vocab_size)
        if not self.eos:
            raise ToolkitError(
                "structured_outputs needs an end-of-text token, and neither model nor tokenizer has one."
            )
        self.special = {
            about.content: token for token, about in backend.get_added_tokens_decoder().items() if about.special
        }
        written = _TextOf(tokenizer, backend)
        never_text = {*self.special.values(), *eos, getattr(tokenizer, "unk_token_id", None)}
        texts, special_ids = [], []
        for token in range(vocab_size):
            text = b"" if token in never_text else written.of(token)
            if not text:
                special_ids.append(token)
            # llguidance takes no token without a name.
            texts.append(text or (backend.id_to_token(token) or f"<[{token}]>").encode())
        given = _Tokens(texts, special_ids, self.eos[0])
        made = library()
        self.tokens: LLTokenizer = made.LLTokenizer(made.TokenizerWrapper(given), eos_token=self.eos)


class _Tokens:
    """What llguidance reads a tokenizer from."""

    bos_token_id = None

    def __init__(self, tokens: list[bytes], special_token_ids: list[int], eos_token_id: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special_token_ids, eos_token_id

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of a text that a grammar forces; our grammars force none (``specs.HEADER``)."""
        raise NotImplementedError


class _TextOf:
    """The bytes that tokens write behind other text, by the steps of a decoder."""

    def __init__(self, tokenizer: Any, backend: Any) -> None:
        self._id_to_token = backend.id_to_token
        self._bytes = TokenBytes(tokenizer)
        self._replaced: list[tuple[str, str]] = []
        if self._bytes.kind == "every token":
            return
        steps = decoder_steps(backend)
        fused = False
        for step in steps:
            kind = step["type"]
            fused = fused or kind == "Fuse"
            if kind == "Replace" and "String" in step["pattern"]:
                self._replaced.append((step["pattern"]["String"], step["content"]))
            elif kind == "Metaspace":
                self._replaced.append((step["replacement"], " "))
            elif not (kind in ("ByteFallback", "Fuse") or (kind == "Strip" and fused)):
                break
        else:
            if self._replaced:
                return
        raise ToolkitError(
            "structured_outputs needs a byte-level tokenizer or one of SentencePiece's kind, whose tokens write the "
            f"same bytes in all places, got one that decodes by {_names(steps) or 'joining words'}."
        )

    def of(self, token: int) -> bytes:
        written = self._bytes.of(token)
        if written is not None:
            return written
        text = self._id_to_token(token) or ""
        for old, new in self._replaced:
            text = text.replace(old, new)
        return text.encode()


def _names(steps: list[dict[str, Any]]) -> str:
    return ", ".join(step["type"] for step in steps)
