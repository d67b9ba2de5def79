"""State of finished sequences that others continue: the beams of a search fork the blocks of those they extend."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from toolkit.state import BlockTables, PrefixKey

Tokens = tuple[int, ...]


class ForkPoints:
    """Block tables of finished sequences, by their tokens, for as long as a search keeps them.

    A sequence that continues one of them decodes a single row, where the prefix cache would compute what follows its
    last full block, and a recurrence what follows its last snapshot, again. They are a cache: where blocks run out they
    are given up, the last ones first, and what they were for is computed.
    """

    def __init__(self) -> None:
        self._keeps = False
        self._tables: dict[Tokens, BlockTables] = {}
        self._uses: Counter[Tokens] = Counter()
        self.num_forks = 0

    @property
    def tables(self) -> Iterable[BlockTables]:
        """Those that are kept."""
        return self._tables.values()

    @contextmanager
    def kept(self) -> Iterator["ForkPoints"]:
        """Keep the state of every sequence that reaches its ``max_tokens`` inside; release them all at the end."""
        self._keeps = True
        try:
            yield self
        finally:
            self._keeps = False
            self.expect(Counter())

    def keep(self, tables: BlockTables) -> bool:
        """Take over the block tables of a finished sequence, if they are wanted.

        State without a prefix key is not: of mixed weight versions, or of an engine without prefix caching.
        """
        part = tables.parts[0]
        tokens = tuple(part.tokens)
        if not self._keeps or part.key is None or tokens in self._tables:
            return False
        self._tables[tokens] = tables
        return True

    def expect(self, uses: Counter[Tokens]) -> None:
        """Say how many sequences will continue each of them; those that none continues are released."""
        self._uses = uses
        for tokens in [one for one in self._tables if not uses[one]]:
            self._tables.pop(tokens).release()

    def has(self, tokens: Sequence[int], key: PrefixKey | None) -> bool:
        """Whether the state of all but the last of ``tokens`` is kept, computed under ``key``."""
        found = self._tables.get(tuple(tokens[:-1])) if self._tables else None
        return found is not None and key is not None and found.parts[0].key == key

    def fork(self, tokens: Sequence[int]) -> BlockTables:
        """Block tables of all but the last of ``tokens``, which ``has`` them; to the last user the kept ones."""
        parent = tuple(tokens[:-1])
        self._uses[parent] -= 1
        self.num_forks += 1
        return self._tables[parent].fork() if self._uses[parent] > 0 else self._tables.pop(parent)

    def give_up(self) -> bool:
        """Release the one that was kept last; False where there is none."""
        if not self._tables:
            return False
        self._tables.popitem()[1].release()
        return True
