"""What wandb and trackio have of a run, by their own packages: ``python logged_runs.py FOLDER PROJECT RUN``, JSON."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from trackio.sqlite_storage import SQLiteStorage
from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, PREAMBLE = 32768, 7, 7
FULL, FIRST, LAST = 1, 2, 4


def records(file: Path) -> Iterator[bytes]:
    """Records of a transaction log: blocks of 32 KiB, whose chunks have a checksum, a length and a kind before them."""
    data, at, held = file.read_bytes(), PREAMBLE, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + HEADER : at + HEADER + length]
        held = chunk if kind in (FULL, FIRST) else held + chunk
        if kind in (FULL, LAST):
            yield held
        at += HEADER + length


def of_wandb(folder: Path) -> list[dict[str, object]]:
    """The numbers of every step, of all files of the run in the order in which they began."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.history.item}
                found.append({"file": file.name, "step": record.history.step.num, **items})
    return found


folder, project, run = sys.argv[1:]
print(json.dumps({"wandb": of_wandb(Path(folder)), "trackio": SQLiteStorage.get_logs(project, run)}))
