"""Where a run of tokens occurred before in a text that grows, in microseconds of Python."""


class TextIndex:
    """Hash chains over a text: of each position, the one before where the same last tokens ended.

    Source: the match finder of LZ77 compressors; Ziv and Lempel, "A Universal Algorithm for Sequential Data
    Compression" (1977).

    Args:
        least: tokens by which positions are chained: runs that are looked for have as many.

    Attributes:
        tokens: the text. Negative ones are equal to no token that is looked for.
    """

    MOST_SEARCHED = 64
    """Positions that one search looks at, the latest ones."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.tokens: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}
        self._before = [0] * least  # of each index behind the last of them; 0: none

    def extend(self, tokens: list[int]) -> None:
        """Add tokens to the text."""
        first = max(0, len(self.tokens) - self.least + 1)
        self.tokens += tokens
        recent = self.tokens[first:]
        latest, append = self._latest, self._before.append
        keys = zip(*(recent[at:] for at in range(self.least)))
        for end, key in enumerate(keys, first + self.least):
            append(latest.get(key, 0))
            latest[key] = end

    def find(self, tokens: list[int], longest: int, own: bool = False) -> tuple[int, int]:
        """Where the longest run of the last ``tokens`` occurred, the last time: (index behind it, its length).

        (0, 0) where no run of ``least`` tokens occurred. Runs longer than ``longest`` count as so long. With ``own``,
        the text is ``tokens`` itself and they are looked for before their own end.
        """
        text = self.tokens
        end = self._latest.get(tuple(tokens[-self.least :]), 0)
        if own and end:
            end = self._before[end]
        found, length = 0, self.least - 1
        for _ in range(self.MOST_SEARCHED):
            if not end:
                break
            room, longer = min(end, len(tokens), longest), length + 1
            if room >= longer and text[end - longer : end] == tokens[-longer:]:
                found, length = end, longer
                while length < room and text[end - length - 1] == tokens[-length - 1]:
                    length += 1
                if length >= longest:
                    break
            end = self._before[end]
        return found, length if found else 0


class Follower:
    """The longest run of a sequence's last tokens in a text, as the sequence grows: ``end`` is the index behind it.

    Of runs of ``longest`` tokens or more the one that was followed so far counts, of others the last one.

    Args:
        text: that may grow.
        longest: tokens of the run that matter.
        own: whether the text is the sequence itself, which is indexed here.
    """

    def __init__(self, text: TextIndex, longest: int, own: bool = False) -> None:
        self.text = text
        self.longest = longest
        self.own = own
        self.end = self.length = 0
        self._read = 0  # tokens of the sequence when it was looked at last
        self._size = -1  # and of the text

    def follow(self, tokens: list[int]) -> None:
        """Look at the tokens that came since the last time; ``length`` is 0 where no run of ``least`` is found."""
        text = self.text
        if self.own:
            text.extend(tokens[len(text.tokens) :])
        if self._read == len(tokens) and self._size == len(text.tokens):
            return
        new = tokens[self._read :]
        # What the longest run went on with makes it longer: no other run can be longer than that.
        known = self.length and (self.own or self._size == len(text.tokens))
        if known and text.tokens[self.end : self.end + len(new)] == new:
            self.end += len(new)
            self.length = min(self.length + len(new), self.longest)
        else:
            self.end, self.length = text.find(tokens, self.longest, self.own)
        self._read, self._size = len(tokens), len(text.tokens)
