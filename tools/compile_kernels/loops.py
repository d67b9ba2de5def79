"""What share of a kernel's inner loop its matrix instructions are, read from the assembly of the binary.

Where instructions are issued as fast as a multiprocessor can, the share bounds what its matrix units do: each of the
others (addresses, masks, exponentials, waits) takes a turn that a product cannot have.
"""

import re
from typing import NamedTuple

# In the listings of NVIDIA's disassembler and in AMD's assembly.
MATRIX = re.compile(r"\b(?:[HIDQ]G?MMA|UTC\w*MMA|v_s?mfma_)")
NVIDIA_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
NVIDIA_BRANCH = re.compile(r"\bBRA\b.*?\b0x([0-9a-f]+)")
AMD_LABEL = re.compile(r"^(\.L\w+):")
AMD_BRANCH = re.compile(r"\bs_c?branch\w*\s+(\.L\w+)")


class Loop(NamedTuple):
    """A loop's instructions, and how many of them are matrix instructions."""

    instructions: int
    matrix: int

    def share(self) -> float:
        return self.matrix / self.instructions


def nvidia_loop(listing: str) -> Loop | None:
    """The loop with the largest share of matrix instructions of what ``cuobjdump -sass`` prints; None without one."""
    lines = [(int(address, 16), text) for address, text in NVIDIA_LINE.findall(listing)]
    at = {address: i for i, (address, _) in enumerate(lines)}
    branches = []
    for i, (_, text) in enumerate(lines):
        target = NVIDIA_BRANCH.search(text)
        if target is not None:
            branches.append((i, at.get(int(target.group(1), 16), len(lines))))
    return _largest_share([text for _, text in lines], branches)


def amd_loop(assembly: str) -> Loop | None:
    """The same of AMD's assembly."""
    texts: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in assembly.splitlines():
        label = AMD_LABEL.match(line)
        if label is not None:
            labels[label.group(1)] = len(texts)
        elif re.match(r"\s+[a-z]", line):  # an instruction: not a directive, not a comment
            jump = AMD_BRANCH.search(line)
            if jump is not None:
                jumps.append((len(texts), jump.group(1)))
            texts.append(line)
    return _largest_share(texts, [(i, labels.get(label, len(texts))) for i, label in jumps])


def _largest_share(texts: list[str], branches: list[tuple[int, int]]) -> Loop | None:
    """Of the runs of instructions from the target of a branch back to the branch; one inside another has the larger."""
    before = [0]  # matrix instructions before each instruction
    for text in texts:
        before.append(before[-1] + (MATRIX.search(text) is not None))
    loops = [Loop(i + 1 - first, before[i + 1] - before[first]) for i, first in branches if first <= i]
    return max((loop for loop in loops if loop.matrix), key=Loop.share, default=None)
