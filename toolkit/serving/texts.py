"""Text to token ids for requests, and token ids to text for responses that list log-probabilities."""

import copy
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolkit.chat import (
    ChatTemplateError,
    Infill,
    TemplateVariableError,
    dropped_messages,
    encode,
    hidden_documents,
    hidden_tools,
    infill,
    prompt_token_ids,
    render,
    rust_encoding,
)
from toolkit.chat.tools import with_tool_names
from toolkit.engine.detokenizer import Decoder, Detokenizer
from toolkit.engine.prompts import check_characters, check_token_count, longest_token, processed, prompt_length
from toolkit.engine.token_bytes import REPLACEMENT, TokenBytes
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving.conversation import TemplateMessage
from toolkit.serving.errors import RequestError
from toolkit.serving.images import MAX_PIXELS, read_url

METASPACE = "▁"
VARIABLES = "chat_template_kwargs"
"""What errors call the variables of a chat template; a body says in ``field_names`` which fields they come from."""


class Texts:
    """A tokenizer's part in the server; ``tokenizer`` may be None, and prompts must then be token ids.

    Holds a copy, which any thread may use: the engine decodes with the tokenizer itself.

    Args:
        tokenizer: of transformers, or None.
        max_model_len: most tokens of prompt and completion; longer prompts raise ToolkitError. None bounds none.
        processor: of chats with images; None takes none.
        media_folder: whose files requests may name as images; None for none.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_model_len: int | None = None,
        processor: Any = None,
        media_folder: Path | None = None,
    ) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._processor = copy.deepcopy(processor)
        self._media_folder = media_folder
        self._one_picture = threading.Lock()
        self._longest = max_model_len
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            longest_token(self._tokenizer)  # now, while nobody waits
        in_rust = rust_encoding(self._tokenizer, "") is not None
        self._one_at_a_time = nullcontext() if in_rust else threading.Lock()
        self._bytes = TokenBytes(self._tokenizer)
        self._decoders = (
            {skip: Decoder(self._tokenizer, skip) for skip in (True, False)} if tokenizer is not None else {}
        )
        self.of_token = lru_cache(maxsize=65536)(self._of_token)

    def prompt(self, text: str, truncated: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a completion's prompt: ``prompt_token_ids``, or without those that the tokenizer puts before it.

        Of any length where it is to be truncated.
        """
        if self._tokenizer is None:
            raise RequestError("The served model has no tokenizer; 'prompt' must be token ids.", "prompt")
        if not truncated:
            self._check_characters("prompt", len(text))
        if not add_special_tokens:
            return self._encode(text, truncated)
        with self._one_at_a_time:
            return prompt_token_ids(self._tokenizer, text, None if truncated else self._check_tokens)

    def chat(
        self, messages: Sequence[TemplateMessage], truncated: bool = False, **options: Any
    ) -> list[int] | Mapping[str, Any]:
        """A chat in the model's own template, ready for the assistant's reply. Of any length where it is truncated.

        Args:
            messages: of the chat.
            truncated: whether the prompt will be cut.
            options: of ``chat_text``.

        Returns:
            Token ids; of a chat with images what the model's processor makes of it.
        """
        pictures = self._pictures(messages, _fields(messages))
        text = self.chat_text(messages, truncated, **options)
        if not pictures:
            return self._encode(text, truncated)
        try:
            with self._one_picture:
                found = processed(self._processor, text, {"image": pictures}, add_special_tokens=False)
        except ToolkitError:
            raise RequestError("The model's processor must take the images of 'messages'.", "messages") from None
        self._check_tokens(prompt_length(found))
        return found

    def chat_text(
        self,
        messages: Sequence[TemplateMessage],
        truncated: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool | None = None,
        tools_needed: bool = True,
    ) -> str:
        """The text of a chat in the model's own template, with a placeholder for each image.

        Args:
            messages: of the chat.
            truncated: whether the text may be of any length.
            tools: as for ``render``.
            chat_template_kwargs: as for ``render``.
            continue_final_message: the reply continues the last message.
            add_generation_prompt: whether the prompt ends with what opens the assistant's turn; None for all that
                continue no message.
            tools_needed: whether a template that does not show the tools is an error.
        """
        template = getattr(self._processor, "chat_template", None) or getattr(self._tokenizer, "chat_template", None)
        if self._tokenizer is None or not template:
            raise RequestError(
                "'messages' needs a chat template, which the served model does not have; use /v1/completions with a "
                "'prompt', or start the server with --chat-template.",
                "messages",
            )
        chat, fields = with_tool_names([message.for_template() for message in messages]), _fields(messages)
        for one in chat:
            if one.get("tool_calls") and one.get("content") == "":
                one["content"] = None  # some templates show calls beside none only
        if not truncated:
            self._check_characters("messages", sum(message.num_characters for message in messages))
        options: dict[str, Any] = {
            "tools": list(tools),
            "add_generation_prompt": (
                not continue_final_message if add_generation_prompt is None else add_generation_prompt
            ),
            "continue_final_message": continue_final_message,
            "chat_template": template if isinstance(template, str) else None,  # a tokenizer may have several by name
            VARIABLES: chat_template_kwargs,
        }
        text = self._rendered(chat, options)
        if tools or any(message.get("tool_calls") for message in chat):
            shown_tools = {**options, "tools": options["tools"] if tools_needed else []}
            hidden = hidden_tools(self._tokenizer, chat, **shown_tools)
            if hidden:
                field = "tools" if tools and tools_needed else "messages"
                what = f"The model's chat template shows nothing of the tool {shown(hidden[0])} in '{field}'."
                raise RequestError(what, field)
        for at in hidden_documents(self._tokenizer, chat, **options)[:1]:
            field = f"{VARIABLES}.documents[{at}]"
            raise RequestError(f"'{field}' must be left out: the model's chat template shows nothing of it.", field)
        for at in dropped_messages(self._tokenizer, chat, **options):
            role = shown(chat[at]["role"])
            message = f"The model's chat template shows nothing of '{fields[at]}', whose role is {role}."
            raise RequestError(message, fields[at])
        if not truncated:
            shown_too = " and tools" if tools else ""
            self._check_characters(f"messages{shown_too}", len(text))  # a template shows more than their content
        return text

    def _rendered(self, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        try:
            return render(self._tokenizer, chat, **options)
        except TemplateVariableError as error:
            raise RequestError(
                f"'{VARIABLES}' must have variables of the chat template alone: {error.reason}.", VARIABLES
            ) from None
        except ChatTemplateError as error:
            field = "tools" if options["tools"] and self._renders(chat, {**options, "tools": []}) else "messages"
            variable = self._rejected_variable(chat, options)
            if variable is not None:
                field, value = f"{VARIABLES}.{variable}", shown(options[VARIABLES][variable])
                message = f"'{field}' must be what the model's chat template takes ({error.reason}), got {value}."
            else:
                message = f"The model's chat template rejects these {field} ({error.reason})."
            raise RequestError(message, field) from None

    def _rejected_variable(self, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> str | None:
        """The first variable with which the chat renders no more; None for a chat that does not without any."""
        given: list[tuple[str, Any]] = list((options[VARIABLES] or {}).items())
        if not given or not self._renders(chat, {**options, VARIABLES: {}}):
            return None
        low, high = 0, len(given)  # renders with the first ``low`` variables, and not with the first ``high``
        while high - low > 1:
            middle = (low + high) // 2
            if self._renders(chat, {**options, VARIABLES: dict(given[:middle])}):
                low = middle
            else:
                high = middle
        return given[low][0]

    def _renders(self, chat: list[dict[str, Any]], options: Mapping[str, Any]) -> bool:
        try:
            render(self._tokenizer, chat, **options)
        except ChatTemplateError:
            return False
        return True

    def _pictures(self, messages: Sequence[TemplateMessage], fields: Sequence[str]) -> list[Any]:
        given = [(where, url) for where, message in zip(fields, messages) for url in message.images]
        if given and self._processor is None:
            raise RequestError("The served model takes no images; 'messages' must be text.", given[0][0])
        if self._longest is not None:  # an image is a token at least
            self._check_tokens(len(given))
        found: list[Any] = []
        left = MAX_PIXELS
        for where, url in given:
            with self._one_picture:  # one at a time: each may be large
                found.append(read_url(url, self._media_folder, f"{where}.content", left))
            left -= found[-1].width * found[-1].height
        return found

    def decoded(self, tokens: Sequence[int], skip_special_tokens: bool) -> tuple[str, list[int]]:
        """The text of tokens, and where in it the characters of each begin; "" without a tokenizer."""
        if self._tokenizer is None:
            return "", [0] * len(tokens)
        text, offsets = Detokenizer(self._decoders[skip_special_tokens], []), []
        with self._one_at_a_time:
            for token in tokens:
                offsets.append(len(text.text))
                text.push(token)
            text.finish()
        return text.text, offsets

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        if self._tokenizer is None:
            raise RequestError("The served model has no tokenizer.", "tokens")
        with self._one_at_a_time:
            return self._decoders[False].decode(list(tokens))

    def raw_tokens(self, tokens: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them; "" for those that it does not have."""
        found = [] if self._tokenizer is None else self._tokenizer.convert_ids_to_tokens(list(tokens))
        return [one or "" for one in found]

    def infill(self, before: str, behind: str) -> Infill:
        """The prompt of a completion between two texts."""
        if self._tokenizer is None:
            raise RequestError("The served model has no tokenizer; 'suffix' must not be given.", "suffix")
        self._check_characters("prompt and suffix", len(before) + len(behind))
        with self._one_at_a_time:
            found = infill(self._tokenizer, before, behind)
        self._check_tokens(len(found.token_ids))
        return found

    def prediction(self, text: str) -> list[int]:
        """Token ids of a predicted output."""
        if self._tokenizer is None:
            raise RequestError("The served model has no tokenizer for a 'prediction'.", "prediction")
        self._check_characters("prediction", len(text))
        return self._encode(text, truncated=True)[: self._longest]

    def _check_characters(self, field: str, count: int) -> None:
        if self._longest is not None:
            check_characters(field, count, self._tokenizer, self._longest)

    def _check_tokens(self, count: int) -> None:
        if self._longest is not None:
            check_token_count(count, self._longest)

    def _encode(self, text: str, truncated: bool) -> list[int]:
        with self._one_at_a_time:
            encoding = rust_encoding(self._tokenizer, text)
            if encoding is None:
                return encode(self._tokenizer, text)
        if not truncated:
            self._check_tokens(len(encoding))
        return list(encoding.ids)

    def _of_token(self, token: int) -> tuple[str, list[int]]:
        """A token as text and as UTF-8 bytes; one that is no whole character reads ``bytes:\\xf0\\x9f``."""
        if self._tokenizer is None:
            return f"token_id:{token}", []
        text = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        raw = self._tokenizer.convert_ids_to_tokens(token) or ""
        if REPLACEMENT in text:
            written = self._bytes.of(token)
            if written is not None:
                return "bytes:" + "".join(f"\\x{byte:02x}" for byte in written), list(written)
        if raw.startswith(METASPACE) and not text.startswith(" "):
            text = " " + text  # the first word of a text loses its space when it is decoded alone
        return text, list(text.encode())


def _fields(messages: Sequence[TemplateMessage]) -> list[str]:
    """What errors call the messages."""
    return [getattr(message, "where", f"messages[{at}]") for at, message in enumerate(messages)]
