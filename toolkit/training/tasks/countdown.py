"""Countdown: reach a target from given numbers with +, - and *. ``3 5 2 > 13 :`` is solved by ``3*5-2``."""

import random
from collections import Counter
from collections.abc import Sequence

from toolkit.errors import ToolkitError
from toolkit.training.tasks.base import Problem, Task

MOST = 10**9
"""Values beyond this, on the way or at the end, are no solution."""
LONGEST = 200
"""Characters of the longest expression that is read."""


class Countdown(Task, name="countdown"):
    """``numbers`` numbers of 1 .. ``largest``, and a target of 1 .. ``target`` that two or more of them reach.

    The reward is 1 for an expression of + - * and parentheses that gives the target and uses each given number at most
    once, and 0 for anything else.
    """

    def __init__(self, numbers: int = 3, largest: int = 9, target: int = 99) -> None:
        for field, value, low, high in (
            ("numbers", numbers, 2, 6),
            ("largest", largest, 2, 99),
            ("target", target, 10, 999),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ToolkitError(
                    f"objective.task.{field} must be a whole number from {low} to {high}, got {value!r}."
                )
        self._numbers, self._largest, self._target = numbers, largest, target

    def make(self, seed: int, count: int) -> list[Problem]:
        """Random numbers, and a random expression of some of them whose value becomes the target."""
        rng = random.Random(seed)
        problems: list[Problem] = []
        while len(problems) < count:
            numbers = [rng.randint(1, self._largest) for _ in range(self._numbers)]
            used = rng.sample(numbers, rng.randint(2, self._numbers))
            text, value = _expression(used, rng)
            if not 1 <= value <= self._target:
                continue
            rng.shuffle(numbers)
            shown = " ".join(map(str, numbers))
            key = f"{sorted(numbers)} {value}"
            problems.append(Problem(f"{shown} > {value} :", f" {text}", f" {_corrupted(text, value, rng)}", key))
        return problems

    def reward(self, prompt: str, completion: str) -> float:
        """1.0 where ``completion`` solves ``prompt``, else 0.0."""
        given, _, rest = prompt.partition(">")
        target, colon, _ = rest.partition(":")
        try:
            allowed, wanted = [int(word) for word in given.split()], int(target)
            value, used = evaluate(completion)
        except ValueError:
            return 0.0
        return float(colon == ":" and value == wanted and not Counter(used) - Counter(allowed))


def _expression(numbers: Sequence[int], rng: random.Random) -> tuple[str, int]:
    """A random expression of all the numbers, and its value; parentheses only where they are needed."""
    parts = [(str(number), number, 3) for number in numbers]
    while len(parts) > 1:
        right, left = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice("+-*")
        if sign == "-" and left[1] < right[1]:
            left, right = right, left
        if sign == "*":
            rank, value = 2, left[1] * right[1]
        else:
            rank, value = 1, left[1] + right[1] if sign == "+" else left[1] - right[1]
        first = f"({left[0]})" if left[2] < rank else left[0]
        # A difference on the right binds tighter than it is written; sums and products may be regrouped.
        second = f"({right[0]})" if right[2] < rank or (sign == "-" and right[2] == 1) else right[0]
        parts.append((f"{first}{sign}{second}", value, rank))
    return parts[0][0], parts[0][1]


def _corrupted(text: str, value: int, rng: random.Random) -> str:
    """An expression with one sign changed, so that its value differs: a near miss."""
    while True:
        at = rng.choice([at for at, character in enumerate(text) if character in "+-*"])
        other = text[:at] + rng.choice("+-*") + text[at + 1 :]
        if evaluate(other)[0] != value:
            return other


def evaluate(text: str) -> tuple[int, list[int]]:
    """(value, numbers used) of an expression of whole numbers, + - * and parentheses, blanks between them allowed.

    ``sum := product ((+|-) product)*; product := factor (* factor)*; factor := number | ( sum )``, in one pass without
    recursion. Raises ValueError for anything else, texts of more than 200 characters, and values beyond 1e9.
    """
    text = text.strip(" \t\r\n")
    if not 0 < len(text) <= LONGEST:
        raise ValueError("length")
    values: list[int] = []
    signs: list[str] = []
    used: list[int] = []

    def reduce() -> None:
        sign, right, left = signs.pop(), values.pop(), values.pop()
        value = left + right if sign == "+" else left - right if sign == "-" else left * right
        if abs(value) > MOST:
            raise ValueError("overflow")
        values.append(value)

    at, operand = 0, True  # whether a number or "(" must come next
    while at < len(text):
        character = text[at]
        if character in " \t":
            at += 1
        elif operand and character in "0123456789":
            end = at
            while end < len(text) and text[end] in "0123456789":
                end += 1
            if end - at > 9:
                raise ValueError("overflow")
            values.append(int(text[at:end]))
            used.append(values[-1])
            at, operand = end, False
        elif operand and character == "(":
            signs.append("(")
            at += 1
        elif not operand and character == ")":
            while signs and signs[-1] != "(":
                reduce()
            if not signs:
                raise ValueError("parenthesis")
            signs.pop()
            at += 1
        elif not operand and character in "+-*":
            while signs and signs[-1] != "(" and (character != "*" or signs[-1] == "*"):
                reduce()
            signs.append(character)
            at, operand = at + 1, True
        else:
            raise ValueError(f"character {at}")
    if operand or "(" in signs:
        raise ValueError("unfinished")
    while signs:
        reduce()
    return values[0], used
