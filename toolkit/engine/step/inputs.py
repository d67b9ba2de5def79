"""The memory that a step's inputs live in. A runner writes it in place; kernels and replays read it there.

Whole numbers of rows and sequences lie in ``Columns``, one for each padded size. Block tables are resident: a row of
them belongs to a sequence for as long as it stays at its place in the batch, and only entries that changed are written.
On another device both have a copy here that is written, and are brought up to date before a step.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from toolkit.engine.step.cuda_device import Staging
from toolkit.state import BlockTables

Numbers = NDArray[np.int64]


class Columns:
    """Columns [size + 1] int64 of a step of at most ``size`` rows: one allocation, one transfer.

    Args:
        names: of the columns.
        size: rows.
        device: of the tensors.
        shared: whether tensors are the memory that is written; else ``upload`` copies it.
    """

    def __init__(self, names: Sequence[str], size: int, device: torch.device, shared: bool) -> None:
        self.size = size
        memory = torch.zeros(len(names), size + 1, dtype=torch.int64)
        self._memory = memory
        self._staging = Staging(memory) if device.type == "cuda" else None
        self._on_device = memory if shared else torch.zeros_like(memory, device=device)
        self.host: dict[str, Numbers] = dict(zip(names, memory.numpy()))
        self._of_device = dict(zip(names, self._on_device))
        self._views: dict[tuple[str, int], Tensor] = {}
        self._axes: dict[int, Tensor] = {}

    def write(self, name: str, values: Sequence[int]) -> Tensor:
        """Set the first entries of a column; those [len(values)]."""
        self.host[name][: len(values)] = values
        return self.view(name, len(values))

    def view(self, name: str, count: int) -> Tensor:
        """The first ``count`` entries of a column; the same tensor each time."""
        found = self._views.get((name, count))
        if found is None:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            found = self._views[name, count] = self._of_device[name][:count]
        return found

    def along_axes(self, axes: int) -> Tensor:
        """[axes, size] int64, for positions along several axes."""
        if axes not in self._axes:
            self._axes[axes] = torch.zeros(axes, self.size, dtype=torch.int64, device=self._on_device.device)
        return self._axes[axes]

    def upload(self) -> None:
        """Bring the device's copy up to date, where there is one."""
        if self._staging is not None:
            self._staging.upload(self._memory, self._on_device)
        elif self._on_device is not self._memory:
            self._on_device.copy_(self._memory)


_MOST_VIEWS = 256


class Tabled(Protocol):
    """A sequence with block tables.

    Attributes:
        table_stamp: of the row that holds its blocks; 0 for none.
        num_known_blocks: how many of the row's entries are its blocks.
    """

    block_tables: BlockTables | None
    table_stamp: int
    num_known_blocks: int


class ResidentTables:
    """Block tables [rows, columns] int64 of groups of layers, kept from step to step, for each number of columns.

    Args:
        groups: indices of the groups.
        rows: sequences that there is room for; more are made room for as they come, in other memory.
        width: most blocks of a sequence.
        device: of the tensors.
        shared: as of ``Columns``.
    """

    def __init__(self, groups: Sequence[int], rows: int, width: int, device: torch.device, shared: bool) -> None:
        self.groups = tuple(groups)
        self._rows, self._width, self._device, self._shared = rows, width, device, shared
        self._last_stamp = 0
        self._tables: dict[int, _Table] = {}  # by columns
        self._table = self._of(1)

    def _of(self, blocks: int) -> "_Table":
        columns = min(self._width, padded_width(blocks))
        found = self._tables.get(columns)
        if found is None:
            found = self._tables[columns] = _Table(self.groups, self._rows, columns, self._device, self._shared)
        return found

    @property
    def all_columns(self) -> list[int]:
        """Every number of columns that a step may have, most first."""
        every = range(self._width.bit_length() + 1) if self.groups else [0]
        return sorted({min(self._width, padded_width(1 << bits)) for bits in every}, reverse=True)

    def begin(self, rows: int, blocks: int) -> None:
        """Begin a step of so many sequences, the longest of which has ``blocks`` blocks."""
        if rows > self._rows:
            self._rows, self._tables = max(rows, 2 * self._rows), {}
        self._table = self._of(blocks)

    def write(self, row: int, sequence: Tabled, blocks: int) -> None:
        """Let ``row`` hold the first ``blocks`` blocks of ``sequence``, of which it knows those that it held."""
        tables, table = sequence.block_tables, self._table
        assert tables is not None
        if table.stamps[row] == sequence.table_stamp:
            known = sequence.num_known_blocks
        else:
            known = 0
            self._last_stamp += 1
            table.stamps[row] = sequence.table_stamp = self._last_stamp
        if known < blocks:
            for at in self.groups:
                # Blocks before the lookback are not read, but a kernel may load their numbers.
                table.host[at][row, known:blocks] = [max(block, 0) for block in tables.parts[at].blocks[known:blocks]]
            if not self._shared:
                table.changed.append((row, known, blocks))
        sequence.num_known_blocks = blocks

    def view(self, group: int, rows: int) -> Tensor:
        """[rows, columns] of a group; the same each time."""
        return self._table.view(group, rows)

    def upload(self) -> None:
        """Write the entries that changed on the device, where it has a copy: one transfer for each group."""
        self._table.upload()


class _Table:
    """The block tables of one number of columns.

    Attributes:
        stamps: of each row, see ``Tabled``.
        host: of each group the memory that is written.
        changed: row, first and end column of what the device does not have.
    """

    def __init__(self, groups: Sequence[int], rows: int, columns: int, device: torch.device, shared: bool) -> None:
        self.stamps = [-1] * rows
        # NumPy's zeros take no memory before they are written: a table is made for the most that may come.
        self.host = {at: np.zeros((rows, columns), dtype=np.int64) for at in groups}
        self.changed: list[tuple[int, int, int]] = []
        self._columns = columns
        tensors = {at: torch.from_numpy(host) for at, host in self.host.items()}
        self._tensors = tensors if shared else {at: torch.zeros_like(one, device=device) for at, one in tensors.items()}
        self._views: dict[tuple[int, int], Tensor] = {}

    def view(self, group: int, rows: int) -> Tensor:
        found = self._views.get((group, rows))
        if found is None:
            found = self._views[group, rows] = self._tensors[group][:rows]
        return found

    def upload(self) -> None:
        changed, self.changed = self.changed, []
        if not changed:
            return
        runs = [np.arange(row * self._columns + first, row * self._columns + end) for row, first, end in changed]
        index = np.concatenate(runs)
        for at, tensor in self._tensors.items():
            both = torch.from_numpy(np.stack([index, self.host[at].reshape(-1)[index]]))
            if tensor.device.type == "cuda":
                both = both.pin_memory().to(tensor.device, non_blocking=True)
            tensor.view(-1).index_copy_(0, both[0], both[1])


def padded_width(blocks: int) -> int:
    """Columns that a block table of so many blocks is given: the next power of two, 8 at least."""
    return max(8, 1 << max(blocks - 1, 0).bit_length())
