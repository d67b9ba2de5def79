"""The training clients of a server, past and present, with the last checkpoints of each."""

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.live.checkpoints import Checkpoints, Entry
from toolkit.live.lora import LoraSettings
from toolkit.live.requests import Client


@dataclass(frozen=True)
class Run:
    """A training client in a list.

    Args:
        name: its id.
        base_model: name of the model.
        settings: of its LoRA, or that it has none.
        last_request: seconds since the epoch of its last request; of its last checkpoint where it has ended.
        last: its newest checkpoint of each kind.
    """

    name: str
    base_model: str
    settings: LoraSettings
    last_request: float
    last: Mapping[str, Entry]


def runs_of(clients: Mapping[str, Client], checkpoints: Checkpoints) -> list[Run]:
    """The clients, and those that left checkpoints; the latest request first."""
    last: dict[str, dict[str, Entry]] = {}
    for entry in checkpoints.entries():  # the newest first
        last.setdefault(entry.run, {}).setdefault(entry.kind, entry)
    found = []
    for name, client in list(clients.items()):
        tenant = client.tenant
        found.append(Run(name, tenant.base_model, tenant.settings, client.last_request, last.pop(name, {})))
    for name, of_kind in last.items():
        newest = max(of_kind.values(), key=lambda one: one.saved_at)
        found.append(Run(name, *checkpoints.about(newest.path), newest.saved_at, of_kind))
    return sorted(found, key=lambda one: (-one.last_request, one.name))
