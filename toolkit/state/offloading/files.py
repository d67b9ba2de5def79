"""Files of entries: safetensors, written aside and renamed, each entry with a checksum."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit.files import replacing
from toolkit.state.offloading.entries import Entry
from toolkit.state.prefix_key import PrefixKey

_FORMAT = "toolkit.prefixes.1"


def write_entries(path: Path, entries: Sequence[Entry], fingerprint: str, sync: bool = False) -> int:
    """Write a file of entries under its name once it is whole; its bytes.

    Args:
        path: of the file.
        entries: its blocks.
        fingerprint: of everything that their content depends on besides their keys and tokens.
        sync: flush it to the device.
    """
    described = [
        {
            "group": entry.id[0],
            "digest": entry.id[1].hex(),
            "adapter": entry.key.adapter,
            "salt": entry.key.salt,
            "rotary": entry.key.rotary,
            "prompt": entry.key.prompt,
        }
        for entry in entries
    ]
    checksums = [_checksum(fields, entry.content) for fields, entry in zip(described, entries, strict=True)]
    metadata = {
        "format": _FORMAT,
        "fingerprint": fingerprint,
        "entries": json.dumps(described),
        "checksums": json.dumps(checksums),
    }
    with replacing(path, durable=sync) as staging:
        save_file({str(at): entry.content for at, entry in enumerate(entries)}, staging, metadata)
        return staging.stat().st_size


def read_entries(
    path: Path, fingerprint: str, current: Mapping[str | None, PrefixKey], sizes: Sequence[int]
) -> tuple[list[Entry], int]:
    """(entries of a file, how many were skipped: damaged, of another adapter, or all of a file that is foreign).

    Args:
        path: of the file.
        fingerprint: that it must have.
        current: keys of the weights by adapter, which take the place of the versions that it was written under.
        sizes: bytes of a block of each group.
    """
    found: list[Entry] = []
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            described: list[dict[str, Any]] = json.loads(metadata["entries"])
            checksums: list[str] = json.loads(metadata["checksums"])
            if metadata["format"] != _FORMAT or metadata["fingerprint"] != fingerprint:
                return [], max(1, len(described))
            for at, (fields, checksum) in enumerate(zip(described, checksums, strict=True)):
                content = file.get_tensor(str(at))
                group, adapter = fields["group"], fields["adapter"]
                whole = content.dtype == torch.uint8 and content.shape == (sizes[group],)
                if whole and adapter in current and _checksum(fields, content) == checksum:
                    key = current[adapter]._replace(
                        salt=fields["salt"], rotary=fields["rotary"], prompt=fields["prompt"]
                    )
                    found.append(Entry((group, bytes.fromhex(fields["digest"])), key, content))
        return found, len(described) - len(found)
    except Exception:  # a file that is cut, is no safetensors file, or has other fields
        return [], 1


def _checksum(fields: dict[str, Any], content: Tensor) -> str:
    found = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    found.update(content.numpy().data)
    return found.hexdigest()
