"""Grammars in llguidance's dialect of Lark, from ``StructuredOutputsParams``."""

import json
import re
from collections.abc import Mapping
from typing import Any

from toolkit.engine.grammar.library import library
from toolkit.engine.grammar.params import StructuredOutputsParams
from toolkit.engine.grammar.schemas import ESCAPES, enforced
from toolkit.errors import ToolkitError, first_line
from toolkit.sentences import shown

FOOTER = '\n%llguidance {"no_forcing": true}\n'
"""The last directive counts. Without it, a text that a grammar leaves no choice about would have one tokenisation only,
and a row's allowed tokens would not be those whose bytes the grammar can continue with."""
TAG_FIELDS = ("triggers", "structures")
STRUCTURE_FIELDS = ("begin", "schema", "end")
_TEMPERATURE = re.compile(r"(?m)^\s*!?\??\w+\s*\[[^\]]*\btemperature\s*=")
_NAME = "structured_outputs"


def lark(params: StructuredOutputsParams, special: Mapping[str, int]) -> str:
    """The grammar of ``params``.

    Args:
        params: of a request.
        special: ids of the tokenizer's special tokens by name.

    Raises:
        ToolkitError: for what the grammar's own syntax does not allow to be enforced.
    """
    if params.kind == "json_object":
        body = f"start: {json_term({'type': 'object'}, params)}"
    elif params.kind == "json":
        body = f"start: {json_term(json.loads(str(params.json)), params)}"
    elif params.kind == "regex":
        body = f"start: /{library().regex_to_lark(params.regex, use_ascii='')}/"
    elif params.kind == "choice":
        # A terminal is one automaton, however many texts it has; a rule is a row of as many items.
        body = f"start: CHOICE\nCHOICE: {' | '.join(map(_text, params.choice or ()))}"
    elif params.kind == "grammar":
        body = _grammar(str(params.grammar))
    else:
        body = _structural_tag(json.loads(str(params.structural_tag)), special)
    return body + FOOTER


def json_term(
    schema: dict[str, Any], params: StructuredOutputsParams | None = None, whitespace_pattern: str | None = None
) -> str:
    """A JSON schema as a term of a rule. Options of llguidance in the schema itself would loosen what it means."""
    options: dict[str, Any] = {"json_allowed_escapes": ESCAPES}
    if params is not None and params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if params is not None and params.whitespace_pattern is not None:
        whitespace_pattern = params.whitespace_pattern
    if whitespace_pattern is not None:
        options["whitespace_pattern"] = whitespace_pattern
    return "%json " + json.dumps({**enforced(schema), "x-guidance": options}, ensure_ascii=False)


def _text(text: str) -> str:
    """A text as a term of a rule."""
    return json.dumps(text, ensure_ascii=False)


def _grammar(text: str) -> str:
    try:
        body: str = library().gbnf_to_lark.any_to_lark(text)
    except Exception as error:  # its reader raises anything
        raise ToolkitError(f"{_NAME}.grammar must be Lark or GBNF, got {shown(text)} ({first_line(error)}).") from None
    found = _TEMPERATURE.search(body)
    if found is not None:
        raise ToolkitError(
            f"{_NAME}.grammar must not have the attribute 'temperature', which cannot be enforced; "
            f"got {shown(found.group().strip())}."
        )
    return body


def _structural_tag(tag: dict[str, Any], special: Mapping[str, int]) -> str:
    """Free text with tags. Once a trigger is written, one of the tags that begin with it must follow."""
    triggers, structures = _fields(tag, "", TAG_FIELDS, optional=("type",))
    if tag.get("type", "structural_tag") != "structural_tag":
        raise ToolkitError(f"{_NAME}.structural_tag.type must be 'structural_tag', got {shown(tag['type'])}.")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(one, str) and one for one in triggers):
        raise ToolkitError(
            f"{_NAME}.structural_tag.triggers must be a list of strings, none of them empty, got {shown(triggers)}."
        )
    if not isinstance(structures, list) or not structures:
        raise ToolkitError(f"{_NAME}.structural_tag.structures must be a list, not empty, got {shown(structures)}.")
    rules, names = [], []
    for at, structure in enumerate(structures):
        where = f".structures[{at}]"
        begin, schema, end = _fields(structure, where, STRUCTURE_FIELDS)
        if isinstance(schema, str):
            schema = _parsed(schema, where)
        if not isinstance(schema, dict) or not isinstance(begin, str) or not isinstance(end, str):
            raise ToolkitError(
                f"{_NAME}.structural_tag{where} must have the strings 'begin' and 'end' and the JSON schema 'schema', "
                f"got {shown(structure)}."
            )
        trigger = next((one for one in triggers if begin.startswith(one)), None)
        if trigger is None:
            raise ToolkitError(
                f"{_NAME}.structural_tag{where}.begin must start with one of the triggers, got {shown(begin)}."
            )
        first = literal_terms(trigger, special)
        body = [*literal_terms(begin[len(trigger) :], special), json_term(schema), *literal_terms(end, special)]
        if len(first) > 1 and not first[0].startswith('"'):
            body, first = [*first[1:], *body], first[:1]
        if len(first) > 1:
            raise ToolkitError(
                f"{_NAME}.structural_tag.triggers must have special tokens at their beginning only, "
                f"got {shown(trigger)}."
            )
        if first[0].startswith('"'):
            rules.append(f"trigger_{at}[lazy]: FREE {first[0]}")
            rules.append(f"tag_{at}: trigger_{at} {' '.join(body)}")
        else:
            rules.append(f"tag_{at}: FREE {first[0]} {' '.join(body)}")
        names.append(f"tag_{at}")
    return "\n".join([f"start: ({' | '.join(names)})* free", "free: FREE", "FREE: /(?s:.*)/", *rules])


def _fields(given: Any, where: str, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> list[Any]:
    got = list(map(str, given)) if isinstance(given, dict) else [type(given).__name__]
    unknown = next((name for name in got if name not in names and name not in optional), None)
    if unknown is not None or not isinstance(given, dict) or len(set(names) & set(got)) < len(names):
        raise ToolkitError(
            f"{_NAME}.structural_tag{where} must have {', '.join(map(repr, names))} and no other field, "
            f"got {', '.join(map(repr, got)) or 'none'}."
        )
    return [given[name] for name in names]


def _parsed(schema: str, where: str) -> Any:
    try:
        return json.loads(schema)
    except ValueError as error:
        raise ToolkitError(
            f"{_NAME}.structural_tag{where}.schema must be JSON, got {shown(schema)} ({first_line(error)})."
        ) from None


def literal_terms(text: str, special: Mapping[str, int]) -> list[str]:
    """The terms of a literal text in which special tokens are written as themselves."""
    if not text:
        return []
    longest_first = sorted(special, key=len, reverse=True)
    split = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if special else [text]
    return [f"<[{special[part]}]>" if part in special else _text(part) for part in split if part]
