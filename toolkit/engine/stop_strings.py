"""Stop strings, looked for in a text that grows."""

from collections import deque
from functools import lru_cache


class StopStrings:
    """An automaton over stop strings (Aho and Corasick, 1975): a character costs one step, however many they are.

    A state is the longest end of the text that begins some stop string; 0 is none. ``depth`` is its length and
    ``found`` the longest stop string that ends there.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._shorter = [0]  # the next longest end of the text that begins a stop string
        self.depth = [0]
        self.found: list[str | None] = [None]
        for stop in stops:
            state = 0
            for character in stop:
                state = self._next[state].get(character) or self._grow(state, character)
            self.found[state] = stop
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            for character, longer in self._next[state].items():
                self._shorter[longer] = self.step(self._shorter[state], character)
                self.found[longer] = self.found[longer] or self.found[self._shorter[longer]]
                states.append(longer)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._shorter[state]
        return self._next[state].get(character, 0)

    def _grow(self, state: int, character: str) -> int:
        new = self._next[state][character] = len(self._next)
        self._next.append({})
        self._shorter.append(0)
        self.depth.append(self.depth[state] + 1)
        self.found.append(None)
        return new


stop_strings = lru_cache(maxsize=64)(StopStrings)
"""The automaton of stop strings; the completions of a request share one."""
