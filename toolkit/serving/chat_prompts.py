"""The prompt of a chat in no protocol's form."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from toolkit.engine.prompts import prompt_length
from toolkit.serving.conversation import Chat
from toolkit.serving.texts import Texts

Prompt = list[int] | Mapping[str, Any]


def chat_prompt(texts: Texts, chat: Chat, truncated: bool = False) -> Prompt:
    """The prompt of a chat, as ``Texts.chat`` makes it."""
    return texts.chat(
        chat.messages,
        truncated,
        tools=[tool.for_template() for tool in chat.tools],
        tools_needed=chat.choice.mode != "none",
        chat_template_kwargs=chat.variables,
        continue_final_message=chat.prefilled,
    )


def shortened_prompt(texts: Texts, chat: Chat, most: int) -> Prompt:
    """The prompt of a chat without as many of its oldest messages as must go for it to have at most ``most`` tokens.

    Instructions at the beginning stay, and the last message does; results of tools go with the calls before them. Where
    that is not enough, the prompt is refused as too long.
    """
    prompt = chat_prompt(texts, chat, truncated=True)
    if prompt_length(prompt) <= most:
        return prompt
    messages = chat.messages
    kept = next((at for at, one in enumerate(messages) if one.role != "system"), len(messages))
    starts = [at for at in range(kept + 1, len(messages)) if messages[at].role != "tool"]
    low, high = 0, len(starts)  # the first start whose prompt fits is among starts[low:high]
    while low < high:
        middle = (low + high) // 2
        shorter = replace(chat, messages=[*messages[:kept], *messages[starts[middle] :]])
        if prompt_length(chat_prompt(texts, shorter, truncated=True)) <= most:
            high = middle
        else:
            low = middle + 1
    begin = starts[min(low, len(starts) - 1)] if starts else kept
    return chat_prompt(texts, replace(chat, messages=[*messages[:kept], *messages[begin:]]))
