"""Guessing a number, for the environment of this name: the prompt says the range, the solution is a game."""

import random

from toolkit.errors import ToolkitError
from toolkit.training.tasks.base import Problem, Task


class GuessNumber(Task, name="guess_number"):
    """Games in which every guess is random, until one is right: a warm-up learns how a game looks, not how to win it.

    Args:
        largest: of the numbers, which begin with 1.
        guesses: most guesses of a game.
    """

    def __init__(self, largest: int = 7, guesses: int = 6) -> None:
        for field, value, low, high in (("largest", largest, 2, 999), ("guesses", guesses, 1, 99)):
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ToolkitError(
                    f"objective.task.{field} must be a whole number from {low} to {high}, got {value!r}."
                )
        self._largest, self._guesses = largest, guesses

    def make(self, seed: int, count: int) -> list[Problem]:
        rng = random.Random(seed)
        return [self._game(rng) for _ in range(count)]

    def _game(self, rng: random.Random) -> Problem:
        number = rng.randint(1, self._largest)
        wrong = [
            one
            for one in rng.choices(range(1, self._largest + 1), k=rng.randint(0, self._guesses - 1))
            if one != number
        ]
        lines = [f" {one}\n{'>' if number > one else '<'}\n" for one in wrong]
        game = "".join(lines)
        return Problem(
            f"1 to {self._largest} :", f"{game} {number}\n", f"{game} 0\n", key=f"{number}/{rng.getrandbits(32)}"
        )

    def reward(self, prompt: str, completion: str) -> float | None:
        """None: the environment knows the number."""
        return None
