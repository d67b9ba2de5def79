"""Ollama's ``Modelfile``: the file, tokens that end a text, sampling, and the chat template in Go's language."""

from typing import Any, NamedTuple

from toolkit.exporting.hf import eos_token_ids

_ROLES = ("system", "user", "assistant")
_TEXTS = {"system": "SyStEm1", "user": "UsEr2", "assistant": "AsSiStAnT3"}


class Parts(NamedTuple):
    """What a chat template writes around contents.

    Attributes:
        around: before and behind the content of each role.
        default: in front of a conversation that does not begin with a system message.
        reply: that begins a reply.
    """

    around: dict[str, tuple[str, str]]
    default: str
    reply: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """A conversation and the beginning of a reply."""
        text = "" if messages[0]["role"] == "system" else self.default
        for message in messages:
            before, behind = self.around[message["role"]]
            text += before + message["content"] + behind
        return text + self.reply


def modelfile(file: str, model: Any, tokenizer: Any) -> str:
    """The text of it. A chat template that does more than put texts around messages is left to Ollama."""
    lines = [f"FROM ./{file}"]
    parts = template_parts(tokenizer) if tokenizer.chat_template else None
    if parts is not None:
        lines.append(f'TEMPLATE """{go_template(parts)}"""')
    elif tokenizer.chat_template:
        lines.append("# Ollama reads the chat template of the GGUF file if it knows it; Go's templates cannot hold it.")
    for token in eos_token_ids(model, tokenizer):
        lines.append(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(token)}"')
    given = model.generation_config.to_diff_dict() if getattr(model, "generation_config", None) else {}
    for name, theirs in (("temperature", "temperature"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p"),
                         ("repetition_penalty", "repeat_penalty")):  # fmt: skip
        if given.get(name) is not None:
            lines.append(f"PARAMETER {theirs} {given[name]}")
    return "\n".join(lines) + "\n"


def template_parts(tokenizer: Any) -> Parts | None:
    """What the chat template writes around messages, where it does that alone; else None."""

    def rendered(*roles: str, reply: bool = False) -> str:
        messages = [{"role": role, "content": _TEXTS[role]} for role in roles]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply))
        bos = tokenizer.bos_token or ""
        return text.removeprefix(bos) if _puts_bos(tokenizer) else text

    try:
        user, reply = rendered("user"), rendered("user", reply=True)
        with_system, turn = rendered("system", "user"), rendered("user", "assistant", "user")
        around, default = {}, ""
        before, behind = user.split(_TEXTS["user"])
        system_before, rest = with_system.split(_TEXTS["system"])
        first, middle, last = turn.split(_TEXTS["user"])[0], *turn.split(_TEXTS["user"])[1:]
        between = middle.split(_TEXTS["assistant"])
        user_before = rest.split(_TEXTS["user"])[0]
        # The end of what is between two messages that is the beginning of each user message.
        own = _common_end(user_before, _common_end(between[1], before))
        around["user"] = (own, behind)
        default = before.removesuffix(own)
        around["system"] = (system_before, user_before.removesuffix(own))
        around["assistant"] = (between[0].removeprefix(behind), between[1].removesuffix(own))
        parts = Parts(around, default, reply.removeprefix(user))
        exact = first == before and last == behind and all(
            parts.render([{"role": role, "content": _TEXTS[role]} for role in roles]) == rendered(*roles, reply=True)
            for roles in (("user",), ("system", "user"), ("user", "assistant", "user"),
                          ("system", "user", "assistant", "user", "assistant", "user"))
        )  # fmt: skip
    except Exception:  # templates refuse what they do not hold with other errors, Jinja's among them
        return None
    return parts if exact and not any('"""' in one or "{{" in one for one in _texts(parts)) else None


def go_template(parts: Parts) -> str:
    """The parts in Go's template language, as Ollama fills it: ``.Messages`` with ``.Role`` and ``.Content``."""
    branches: list[str] = []
    for role in _ROLES:
        before, behind = parts.around[role]
        word = "if" if not branches else "else if"
        branches.append(f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{behind}')
    default = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{parts.default}{{{{ end }}}}' if parts.default else ""
    return f"{default}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{parts.reply}"


def _texts(parts: Parts) -> list[str]:
    return [*(text for pair in parts.around.values() for text in pair), parts.default, parts.reply]


def _puts_bos(tokenizer: Any) -> bool:
    """Whether encoding a text puts bos in front: then Ollama does, and the template must not."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id and len(ids) > 1


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
