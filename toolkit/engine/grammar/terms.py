"""Grammars put together from terms: what formats of tool calls describe themselves in (``chat.reply.GrammarTerms``)."""

import json
from collections.abc import Mapping
from typing import Any

from toolkit.engine.grammar.specs import json_term, literal_terms
from toolkit.errors import ToolkitError
from toolkit.sentences import shown

WHITESPACE = r"[ \n]{1,33}"
"""Between tokens of JSON in terms: enough to indent by, and not so much that a model writes nothing else."""


class LarkTerms:
    """Writes terms, and keeps the rules that they need.

    Args:
        special: ids of the tokenizer's special tokens by name.
        trigger: a text behind any other text, where it begins a literal: calls in the middle of a text.
    """

    def __init__(self, special: Mapping[str, int], trigger: str | None = None) -> None:
        self._special, self.trigger = special, trigger
        self._rules: dict[str, tuple[str, bool]] = {}

    def text(self, text: str) -> str:
        """A literal text, in which special tokens are written as themselves."""
        if self.trigger is not None and text.startswith(self.trigger):
            return f"{self.until(self.trigger)} {self._literal(text.removeprefix(self.trigger))}"
        return self._literal(text)

    def json(self, schema: dict[str, Any]) -> str:
        """JSON text of a schema. Raises ToolkitError for one that cannot be enforced."""
        return json_term(schema, whitespace_pattern=WHITESPACE)

    def rule(self, name: str, body: str, lazy: bool = False) -> str:
        """A further rule (lower case) or terminal (upper case); its name, made unique.

        Args:
            name: what it begins with.
            body: of the rule.
            lazy: whether it ends where it can first.
        """
        found = next((known for known, of in self._rules.items() if of == (body, lazy)), None)
        if found is None:
            found = f"{name}_{len(self._rules)}"
            self._rules[found] = body, lazy
        return found

    def named(self, name: str, body: str) -> str:
        """A further rule of exactly that name, which its own body may use; the name."""
        self._rules[name] = body, False
        return name

    def until(self, text: str) -> str:
        """Any text up to ``text``, and that. Raises ToolkitError for a special token behind other text."""
        free = self.rule("ANY", "/(?s:.*)/")
        terms = literal_terms(text, self._special)
        if len(terms) == 1 and terms[0].startswith('"'):
            return self.rule("until", f"{free} {terms[0]}", lazy=True)
        if terms[0].startswith('"') and json.loads(terms[0]).isspace():
            terms = terms[1:]
        if terms[0].startswith('"'):
            raise ToolkitError(f"{shown(text)} must begin with a special token or have none, for a grammar of calls.")
        return " ".join([free, *terms])

    def grammar(self, start: str) -> str:
        """The grammar whose first rule has the body ``start``."""
        rules = [f"{name}{'[lazy]' * lazy}: {body}" for name, (body, lazy) in self._rules.items()]
        return "\n".join([f"start: {start}", *rules])

    def _literal(self, text: str) -> str:
        return " ".join(literal_terms(text, self._special))
