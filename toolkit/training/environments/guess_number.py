"""Guess a number from 1 to ``largest``: ``>`` says that it is larger than the guess, ``<`` that it is smaller."""

from toolkit.training.environments.base import Environment, Messages, Rubric, State


def found(state: State) -> float:
    """1 where a guess was the number."""
    return float(state["found"])


class GuessNumber(Environment, name="guess_number"):
    """Answers the guesses of the task ``guess_number``. A turn is a line, so ``rollout.stop`` is a line break.

    Args:
        max_turns: guesses.
    """

    rubric = Rubric([found])

    def __init__(self, max_turns: int = 3) -> None:
        self.max_turns = max_turns

    def setup_state(self, state: State) -> None:
        state["number"] = int(state["answer"].split()[-1])
        state["found"] = False

    def is_completed(self, messages: Messages, state: State) -> bool:
        state["found"] = state["responses"][-1].strip() == str(state["number"])
        return bool(state["found"])

    def env_response(self, messages: Messages, state: State) -> str:
        guess = state["responses"][-1].strip()
        if not (guess.isascii() and guess.isdigit()):
            return "?\n"
        return ">\n" if state["number"] > int(guess[:9]) else "<\n"
