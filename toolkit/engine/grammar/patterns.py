"""Regular expressions of JSON schemas, written so that llguidance enforces them.

It takes the classes of a pattern to the strings of JSON, in which a quote, a backslash and a control character are
escapes of several characters. A class with every control character and without the quote or the backslash, such as
``[^"]``, gets all escapes there, those of the quote and the backslash too. So no class here may have U+0000: negated
ones lose it, and the few other ways to write it are refused. No JSON of an output needs it.
"""

import re

from toolkit.errors import ToolkitError
from toolkit.sentences import shown

_CATEGORY = re.compile(r"\{(?:[LMNPSZ][a-z]?|Letter|Mark|Number|Punctuation|Symbol|Separator|(?:Script|sc)=\w+)\}")
"""Unicode classes without control characters."""
_COMPLEMENT = re.compile(r"\{(?:[LMNSZ][a-z]?|Letter|Mark|Number|Symbol|Separator)\}")
"""Unicode classes with neither quote nor backslash: their complements have both."""
_LONGEST_ESCAPE = 64
_NUL = re.compile(r"0|x00|x\{0+\}|u0000|u\{0+\}|c")


def enforceable(pattern: str) -> str:
    """``pattern`` without U+0000 in its classes. Raises ToolkitError for what would not mean the same to llguidance."""
    if "\0" in pattern or re.search(r"\(\?[a-z]*x", pattern):
        raise _refused(pattern, "U+0000" if "\0" in pattern else "the flag x")
    made, at = "", 0
    inside, negated = False, False
    while at < len(pattern):
        step, two = pattern[at], pattern[at : at + 2]
        if step == "\\":
            step = two
            _check_escape(pattern, pattern[at + 1 : at + 1 + _LONGEST_ESCAPE], negated)
        elif inside and (step == "[" or two in ("&&", "--", "~~")):
            # ECMA-262 reads them as characters, Rust as operations of sets.
            raise _refused(pattern, f"an unescaped {step if step == '[' else two!r} in a class")
        elif step == "[":
            inside, negated = True, two == "[^"
            step = "[^" if negated else "["
            if pattern.startswith("]", at + len(step)):  # empty to ECMA-262, and a character to Rust
                raise _refused(pattern, "a class that begins with ']'")
        elif step == "]":
            inside, negated = False, False
        made += "[^\\x00" if step == "[^" else step
        at += len(step)
    return made


def _check_escape(pattern: str, escape: str, negated: bool) -> None:
    if _NUL.match(escape) and not negated:
        raise _refused(pattern, "U+0000 or a control letter")
    if escape[:1] in ("p", "P") and not (_CATEGORY if escape[0] == "p" else _COMPLEMENT).match(escape, 1):
        raise _refused(pattern, f"\\{escape.partition('}')[0]}}}")


def _refused(pattern: str, what: str) -> ToolkitError:
    return ToolkitError(
        f"structured_outputs must not have {what} in a JSON schema's pattern, which cannot be enforced, "
        f"got {shown(pattern)}."
    )
