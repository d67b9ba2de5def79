"""Conversations, prompts with completions, and preferences as tokens to train on, with the tokens that count.

Text is tokenised as a whole, as a tokenizer reads it anywhere else; which tokens count follows from the characters that
they stand for. A token that straddles a prompt and its completion counts: it carries text that the model has to write.

What counts of an assistant's turn:

- A template with ``{% generation %}`` markers says it.
- Otherwise it is what the template adds for the message after the generation prompt, the end of the turn included.
- The end-of-turn token counts where it follows a turn and the model's list of EOS tokens has it.

Some templates write an earlier turn in another form once later messages follow (they drop its thoughts, say). No single
text holds every turn as it is generated then, so a conversation becomes several examples: each ends with a turn as it
is generated, and earlier turns count in it only where their text is still the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from toolkit.chat.template import ChatTemplateError, Span, marks_generation, render, render_spans
from toolkit.chat.tokens import common_prefix, encode, special_tokens_around, token_ranges
from toolkit.errors import ToolkitError

Messages = Sequence[Mapping[str, Any]]


class TrainingTokens(NamedTuple):
    """Tokens, whether each counts, and what is to be said of them.

    Attributes:
        ids: token ids.
        mask: True for a token that the loss counts.
        straddles: a token of the prompt's end and the completion's begin counts.
        reopened: the prompt ends otherwise before the completion than before the model writes it.
        turn_ends: the special tokens that end its turns and are not in the list of EOS tokens; None for a turn that no
            special token ends.
        text: of messages, what the template made of them.
    """

    ids: list[int]
    mask: list[bool]
    straddles: bool = False
    reopened: bool = False
    turn_ends: tuple[int | None, ...] = ()
    text: str = ""


class PreferenceTokens(NamedTuple):
    """Tokens of a prompt and of its two completions; fields as those of ``TrainingTokens``."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    straddles: bool = False
    reopened: bool = False
    turn_ends: tuple[int | None, ...] = ()


class ChatTokenizer:
    """Tokenises training data by a chat template.

    Args:
        tokenizer: of transformers, fast or slow, with an end-of-text token.
        chat_template: as of ``render``.
        chat_template_kwargs: variables of the template; those of a call come on top.
        assistant_only_loss: of messages, only the assistant's count.
        completion_only_loss: of a prompt with a completion, only the completion counts.
        eos_token_ids: tokens at which generation stops, beside the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        assistant_only_loss: bool = True,
        completion_only_loss: bool = True,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self._chat_template, self._variables = chat_template, dict(chat_template_kwargs or {})
        self._assistant_only, self._completion_only = assistant_only_loss, completion_only_loss
        self.eos_token_ids: frozenset[int] = frozenset({*eos_token_ids, tokenizer.eos_token_id} - {None})
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = self.eos_token_ids | {at for at, token in added.items() if token.special}

    def messages(
        self, messages: Messages, tools: Any = None, chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> list[TrainingTokens]:
        """A conversation: one example, or one per rewritten turn; none where no turn of the assistant is to be learnt.

        A turn with ``train: false`` (Axolotl) or ``weight: 0`` (OpenAI) is not, where only the assistant's count.

        Raises:
            ToolkitError: messages are malformed, none is the assistant's, or the template does not take them.
        """
        chat = _Chat(self, messages, tools, chat_template_kwargs)
        if self._assistant_only:
            return self._turns(chat, 0)
        text = chat.text(len(messages))
        ids = encode(self.tokenizer, text)
        ends = self._turn_end(ids, len(ids), 0)[1] if messages and messages[-1]["role"] == "assistant" else []
        return [TrainingTokens(ids, [True] * len(ids), turn_ends=tuple(ends), text=text)]

    def completion(
        self,
        prompt: str | Messages,
        completion: str | Messages,
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[TrainingTokens]:
        """A prompt and its completion, both texts or both messages. A text ends with the end-of-text token.

        Raises:
            ToolkitError: as of ``messages``.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            return [self._ended(prompt, completion)]
        chat = _Chat(self, [*prompt, *completion], tools, chat_template_kwargs)
        first = len(prompt) if self._completion_only else 0
        if self._assistant_only:
            return self._turns(chat, first)
        whole = chat.text(len(chat.messages))
        begin, reopened = chat.begin(first, whole) if first else (0, False)
        return [self._tokens(whole, [(begin, len(whole))])._replace(reopened=reopened)]

    def text(self, text: str) -> TrainingTokens:
        """A document, all of which counts."""
        return self._ended("", text, all_of_it=True)

    def preference(
        self,
        prompt: str | Messages,
        chosen: str | Messages,
        rejected: str | Messages,
        tools: Any = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> PreferenceTokens:
        """A prompt and two completions, all texts or all messages; the prompt ends where a completion's tokens begin.

        Raises:
            ToolkitError: as of ``messages``.
        """
        sides = []
        for side in (chosen, rejected):
            if isinstance(prompt, str) and isinstance(side, str):
                sides.append(self._ended(prompt, side))
                continue
            chat = _Chat(self, [*prompt, *side], tools, chat_template_kwargs)
            whole = chat.text(len(chat.messages))
            begin, reopened = chat.begin(len(prompt), whole)
            sides.append(self._tokens(whole, [(begin, len(whole))])._replace(reopened=reopened))
        begins = [side.mask.index(True) if True in side.mask else len(side.ids) for side in sides]
        shared = min(*begins, common_prefix(sides[0].ids, sides[1].ids))
        return PreferenceTokens(
            sides[0].ids[:shared],
            sides[0].ids[shared:],
            sides[1].ids[shared:],
            any(side.straddles for side in sides),
            any(side.reopened for side in sides),
            sides[0].turn_ends + sides[1].turn_ends,
        )

    def _turns(self, chat: "_Chat", first: int) -> list[TrainingTokens]:
        """The assistant's turns from message ``first`` on, each in a text that holds it as it is generated."""
        turns = [at for at, message in enumerate(chat.messages) if at >= first and message.get("role") == "assistant"]
        if not turns:
            roles = ", ".join(sorted({repr(message.get("role")) for message in chat.messages[first:]}))
            raise ToolkitError(f"must have a message of role 'assistant', whose text is learnt, got {roles}.")
        turns = [at for at in turns if _is_learnt(chat.messages[at])]
        if not turns:
            return []
        try:
            return self._apart(chat, turns)
        except ChatTemplateError:
            text, marks = chat.marked(turns[-1] + 1)
            if first or marks is None:
                raise
            return [self._tokens(text, *([mark] for mark in marks))]  # it takes whole conversations only

    def _apart(self, chat: "_Chat", turns: list[int]) -> list[TrainingTokens]:
        examples = []
        while turns:
            text, marks = chat.marked(turns[-1] + 1)
            kept = [at for at in turns if text.startswith(chat.text(at + 1))]
            spans: list[list[Span]] = []
            reopened = False
            for at in kept:
                end = len(chat.text(at + 1))
                if marks is None:
                    begin, other = chat.begin(at, text[:end])
                    spans.append([(begin, end)])
                    reopened |= other
                else:
                    low = common_prefix(chat.text(at), text)
                    spans.append([(max(a, low), min(b, end)) for a, b in marks if a < end and b > low])
            examples.append(self._tokens(text, *spans)._replace(reopened=reopened))
            turns = [at for at in turns if at not in kept]
        return examples[::-1]

    def _ended(self, prompt: str, completion: str, all_of_it: bool = False) -> TrainingTokens:
        """Texts between the tokens that the tokenizer puts before a text and the end of text."""
        ids, ((first, last, straddles),) = token_ranges(
            self.tokenizer, prompt + completion, [(len(prompt), len(prompt + completion))]
        )
        before = special_tokens_around(self.tokenizer)[0]
        if not before and first == 0 and not all_of_it:
            before = [self.tokenizer.eos_token_id]  # something must come before the first token that is learnt
        counts = range(len(ids)) if all_of_it or not self._completion_only else range(first, last)
        mask = [False] * len(before) + [at in counts for at in range(len(ids))]
        ids = [*before, *ids]
        if len(ids) == len(before) or ids[-1] not in self.eos_token_ids:
            ids, mask = [*ids, self.tokenizer.eos_token_id], [*mask, True]
        return TrainingTokens(ids, mask, straddles and not all_of_it)

    def _tokens(self, text: str, *turns: list[Span]) -> TrainingTokens:
        """A rendered text, in which the ``turns`` count, each one or more ranges of characters."""
        ids, found = token_ranges(self.tokenizer, text, [span for spans in turns for span in spans])
        mask = [False] * len(ids)
        ends: list[int | None] = []
        ranges = iter(found)
        for spans in turns:
            for first, last, _ in islice(ranges, len(spans)):
                mask[first:last] = [True] * (last - first)
            if spans:
                stop, end = self._turn_end(ids, last, first)
                mask[last:stop] = [True] * (stop - last)
                ends += end
        return TrainingTokens(ids, mask, any(one.straddles for one in found), False, tuple(ends), text)

    def _turn_end(self, ids: list[int], last: int, first: int) -> tuple[int, list[int | None]]:
        """Where a turn of tokens ``first`` to ``last - 1`` ends, its end-of-turn token included.

        With it that token where generation does not stop at it; None for no special token; nothing where all is well.
        """
        at = last
        while at > first and self._blank(ids[at - 1]):
            at -= 1
        if at > first and ids[at - 1] in self.eos_token_ids:
            return last, []
        after = last
        while after < min(len(ids), last + 2) and self._blank(ids[after]):
            after += 1
        if after < len(ids) and ids[after] in self.eos_token_ids:
            return after + 1, []
        return last, [ids[at - 1] if at > first and ids[at - 1] in self._special else None]

    def _blank(self, token: int) -> bool:
        return token not in self._special and not self.tokenizer.decode([token]).strip()


class _Chat:
    """The texts of one conversation's beginnings, each rendered once."""

    def __init__(
        self, owner: ChatTokenizer, messages: Messages, tools: Any, variables: Mapping[str, Any] | None
    ) -> None:
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ToolkitError(f"messages must hold mappings with 'role' and 'content', got {message!r:.200}.")
            if "content" not in message and not message.get("tool_calls"):
                raise ToolkitError(f"a message must have 'content' or 'tool_calls', got {message!r:.200}.")
        self.messages = messages
        self._tokenizer, self._tools = owner.tokenizer, tools
        self._options: dict[str, Any] = {
            "chat_template": owner._chat_template,
            "chat_template_kwargs": {**owner._variables, **(variables or {})},
        }
        self._texts: dict[tuple[int, bool], str] = {}

    def text(self, count: int, prompt: bool = False) -> str:
        """The first messages; with ``prompt`` the model is asked to write the next."""
        if count == 0:
            return ""
        if (count, prompt) not in self._texts:
            self._texts[count, prompt] = render(
                self._tokenizer, self.messages[:count], self._tools, add_generation_prompt=prompt, **self._options
            )
        return self._texts[count, prompt]

    def marked(self, count: int) -> tuple[str, list[Span] | None]:
        """The first messages, and what the template marks as generated."""
        if not marks_generation(self._tokenizer, self._tools, self._options["chat_template"]):
            return self.text(count), None
        return render_spans(self._tokenizer, self.messages[:count], self._tools, **self._options)

    def begin(self, count: int, whole: str) -> tuple[int, bool]:
        """Where ``whole`` continues the first messages and the generation prompt; whether it has another prompt.

        Raises ToolkitError where it does not even continue the messages.
        """
        if count == 0:
            opening = self._opening()
            at = whole.find(opening) if opening else -1
            return (at + len(opening), False) if at >= 0 else (self._first_text(whole), True)
        prompt = self.text(count, True)
        if whole.startswith(prompt):
            return len(prompt), False
        if not whole.startswith(self.text(count)):
            raise ChatTemplateError(
                "it must not rewrite the messages before a turn when the turn follows; give each turn as 'prompt' and "
                "'completion' texts instead"
            )
        return common_prefix(prompt, whole), True

    def _opening(self) -> str:
        """What opens the assistant's turn, where it comes first."""
        turn = [{"role": "user", "content": "."}]
        try:
            without, with_it = (
                render(self._tokenizer, turn, self._tools, add_generation_prompt=prompt, **self._options)
                for prompt in (False, True)
            )
        except ChatTemplateError:
            return ""
        return with_it[len(without) :] if with_it.startswith(without) else ""

    def _first_text(self, whole: str) -> int:
        """Where the first message's text begins: there the text parts from others that stand in its place."""
        texts = []
        for mark in ("zq", "qz"):
            other = {**self.messages[0], "content": mark}
            try:
                texts.append(render(self._tokenizer, [other], self._tools, **self._options))
            except ChatTemplateError:
                return 0
        return common_prefix(texts[0][: common_prefix(*texts)], whole)


def _is_learnt(message: Mapping[str, Any]) -> bool:
    """Whether a message's own fields let it count."""
    return message.get("train", True) is not False and message.get("weight", 1) != 0
