"""The adapters that requests choose: which are known, which are in the model, which act in the next step.

An adapter that was loaded here may be evicted: its tensors leave the model for the host's memory and come back before a
step that needs them. Those that were in the model before, such as one that is being trained, stay.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from toolkit.engine.backend import Backend, PatchedModel
from toolkit.engine.config import EngineConfig
from toolkit.engine.request import Sequence
from toolkit.engine.scheduler import Scheduler
from toolkit.errors import ToolkitError
from toolkit.patching.adapters import (
    active_adapter,
    adapter_names,
    adapter_parts,
    check_choosable,
    contents,
    internal_name,
    load_adapter,
    merged_adapters,
    move,
    parts_of,
    put_in,
    remove_adapter,
    take_out,
    unknown_adapter,
)
from toolkit.patching.adapters.files import Parts
from toolkit.patching.eval_mode import eval_mode
from toolkit.patching.text_part import adapted_outside
from toolkit.sentences import shown
from toolkit.state import WeightKeys


@dataclass
class LoadedAdapter:
    """An adapter that was loaded from a folder.

    Args:
        name: as requests say it.
        folder: it came from.
        host: its parts while they are not in the model.
        stamp: of its tensors when they left the model.
        contents: a digest of its parts, once the host has forgotten them: they are in the folder.
        last_used: the number of the last step that needed it.
    """

    name: str
    folder: Path
    host: Parts | None = None
    stamp: tuple[int, int] = (0, 0)
    contents: bytes | None = None
    last_used: int = 0

    @property
    def dropped(self) -> bool:
        return self.contents is not None

    @property
    def in_model(self) -> bool:
        return self.host is None and not self.dropped


def new_adapters(backend: Backend, scheduler: Scheduler, config: EngineConfig) -> "ModelAdapters | None":
    """The adapters of an engine; None for a backend that is no patched model."""
    if not isinstance(backend, PatchedModel):
        return None
    return ModelAdapters(backend, scheduler, config.max_loras, config.max_cpu_loras)


def weight_keys(backend: Backend, adapters: "ModelAdapters | None") -> WeightKeys:
    """Keys and versions of the weights that rows may choose, as of now."""
    if adapters is not None:
        return adapters.weight_keys()
    version = backend.version()
    return WeightKeys(backend.prefix_key(), version)


class ModelAdapters:
    """The adapters of one engine's model.

    Args:
        backend: the model.
        scheduler: of its requests.
        max_loras: adapters in the model at a time, of those that were loaded here; None for any number.
        max_cpu_loras: adapters in memory, those in the model included; others are read again from their folders. None
            for any number.

    Attributes:
        table: of the adapters that rows may choose in the next step, the names in the model.
        num_evictions: how many adapters have left the model for others.
    """

    def __init__(
        self, backend: PatchedModel, scheduler: Scheduler, max_loras: int | None, max_cpu_loras: int | None
    ) -> None:
        self._backend, self._scheduler = backend, scheduler
        self.max_loras, self.max_cpu_loras = max_loras, max_cpu_loras
        self.table: tuple[str, ...] = ()
        self.num_evictions = 0
        self._loaded: dict[str, LoadedAdapter] = {}
        self._chosen: dict[str, int] = {}  # of those that were in the model before, and the layout of their last check
        self._uses: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._allowed: set[str] = set()
        self._merged: set[str] = set()
        self._keys: tuple[tuple[int, tuple[str, ...]], WeightKeys] | None = None
        self._active: tuple[int, str | None] = (-1, None)
        self._looked = -1
        self._steps = 0
        scheduler.may_run = self._may_run

    @property
    def names(self) -> list[str]:
        """What requests may choose."""
        own = [name for name in adapter_names(self._backend.model) if name not in self._internal_names]
        return [*own, *(name for name in self._loaded if name not in self._leaving)]

    @property
    def _internal_names(self) -> dict[str, str]:
        return {internal_name(name): name for name in self._loaded}

    def _internal(self, name: str) -> str:
        """The name in the model: PEFT's own where it was there before."""
        return internal_name(name) if name in self._loaded else name

    @property
    def _hosted(self) -> list[Parts]:
        return [one.host for one in self._loaded.values() if one.host is not None]

    def load(self, name: str, folder: str | Path, replace: bool = False) -> None:
        """Take in the adapter of a PEFT folder, for requests that choose ``name``.

        Args:
            name: that no other adapter has.
            folder: with adapter_config.json and adapter_model.safetensors.
            replace: whether it takes the place of a loaded adapter of this name. Requests under way continue under the
                new one, as they do after a write to weights.

        Raises:
            ToolkitError: for a name that is taken, and a folder that is no LoRA or DoRA that rows can choose.
        """
        if not (isinstance(name, str) and name):
            raise ToolkitError(f"lora_name must be text that is not empty, got {shown(name)}.")
        model, internal = self._backend.model, internal_name(name)
        taken = name in self.names or (name not in self._loaded and internal in adapter_names(model))
        if taken and not (replace and name in self._loaded):
            raise ToolkitError(f"lora_name must be a name that no adapter has, got {shown(name)}.")
        if name in self._leaving:
            raise ToolkitError(f"adapter {shown(name)} must have no requests under way to be loaded again.")
        arriving = f"{internal}%" if taken else internal  # no internal name ends so
        self._read(name, arriving, folder)
        if taken:
            old = self._loaded[name]
            stamp = self._backend.clock.stamp(internal) if old.in_model else old.stamp
            before = take_out(model, internal) if old.in_model else old.host
            new = take_out(model, arriving)
            same = contents(new) == (old.contents if before is None else contents(before))
            put_in(new, internal)
            self._backend.version()  # before it may be evicted again: its stamp is another one
            if same:
                self._backend.clock.restore(internal, stamp)
        self._loaded[name] = LoadedAdapter(name, Path(folder).resolve(), last_used=self._steps)
        self._leave_room(keep=name)
        self._changed()

    def unload(self, name: str) -> None:
        """Let no more requests choose an adapter that was loaded. Those under way finish with it.

        Raises:
            ToolkitError: there is no such adapter.
        """
        if not isinstance(name, str) or name not in self._loaded or name in self._leaving:
            raise unknown_adapter(
                name, [one for one in self._loaded if one not in self._leaving], "while none is loaded"
            )
        self._leaving.add(name)
        self._finish_leaving()

    def check(self, name: str) -> None:
        """Raise ToolkitError unless requests may choose ``name``."""
        self._backend.version()
        layout = self._backend.clock.layout
        if name in self._loaded and name not in self._leaving:
            if self._loaded[name].in_model and internal_name(name) in self._merged_now():
                self._check_choosable(internal_name(name))
            return
        if self._chosen.get(name) == layout:
            return
        known = self.names
        if name not in known:
            raise unknown_adapter(name, known)
        self._check_choosable(name)
        new = name not in self._chosen
        self._chosen[name] = layout
        if new:
            self._changed()

    def _merged_now(self) -> set[str]:
        """Adapters that are merged; ``_merged`` has those of the last step."""
        return self._merged if self._looked == self._backend.clock.layout else merged_adapters(self._backend.model)

    def _check_choosable(self, name: str) -> None:
        model = self._backend.model
        self._backend.version()  # fuses what is new
        with eval_mode(model, adapter_parts(model)):
            check_choosable(model, name)

    def check_text_alone(self, name: str) -> None:
        """Raise ToolkitError where an adapter adapts more than the text part: pictures are encoded without adapters."""
        outside = adapted_outside(self._backend.model, self._internal(name))
        if outside is not None:
            raise ToolkitError(
                f"adapter {name!r} must adapt the text part alone for a prompt with pictures, got {outside}."
            )

    def enter(self, name: str | None) -> None:
        """A request that chooses ``name`` is under way."""
        if name is not None:
            self._uses[name] += 1

    def leave(self, name: str | None) -> None:
        """A request that has chosen ``name`` has ended."""
        if name is not None:
            self._uses -= Counter([name])
            self._finish_leaving()

    def prepare(self) -> dict[str, str]:
        """Bring what the next step needs into the model, before the step.

        Returns:
            Of adapters that cannot be brought in: why.
        """
        failed: dict[str, str] = {}
        if not self._uses:
            return failed
        self._steps += 1
        self._allowed = {one.params.lora_name for one in self._scheduler.running if one.params.lora_name is not None}
        for sequence in self._scheduler.waiting:
            name = sequence.params.lora_name
            if name is None or name in self._allowed or name in failed:
                continue
            adapter = self._loaded.get(name)
            if adapter is None or adapter.in_model:
                self._allowed.add(name)
            elif self._room():
                try:
                    self._bring_in(adapter)
                except ToolkitError as error:
                    failed[name] = str(error)
        for name in self._allowed & self._loaded.keys():
            self._loaded[name].last_used = self._steps
        return failed

    def lost(self) -> dict[str, str]:
        """Of adapters that are gone from the model, as ``delete_adapter`` leaves it: why requests cannot have them.

        Nobody may choose them any more. Looks where the layout has changed since the last call.
        """
        if self._looked == self._backend.clock.layout:
            return {}
        self._looked = self._backend.clock.layout
        merged, before = merged_adapters(self._backend.model), self._merged
        self._merged = merged
        refused = {}
        if merged != before:
            asked = [self._internal_names.get(name, name) for name in merged]
            refused = {name: f"adapter {name!r} must not be merged while requests choose it." for name in asked}
            self._changed()
        deleted = set(self.table) - set(adapter_names(self._backend.model))
        if not deleted:
            return refused
        names = {self._internal_names.get(name, name) for name in deleted}
        self._chosen = {name: layout for name, layout in self._chosen.items() if name not in names}
        self._leaving -= names
        self._loaded = {name: one for name, one in self._loaded.items() if name not in names}
        self._changed()
        lost = {name: f"adapter {name!r} must stay in the model until its requests end." for name in names}
        return refused | lost

    def weight_keys(self) -> WeightKeys:
        """Keys and versions of what rows may choose, as of now."""
        version = self._backend.version()
        clock = self._backend.clock
        seen = clock.changes, self.table
        if self._keys is None or self._keys[0] != seen:
            names = self._internal_names
            found = {names.get(name, name): clock.of_adapter(name) for name in self.table}
            self._keys = seen, WeightKeys(clock.key, version, found)
        return self._keys[1]

    def ids(self, names: list[str | None]) -> tuple[tuple[str, ...], list[int]] | None:
        """(names in the model, index of each row's adapter, -1 for none); None where no row chooses one."""
        if not any(names):
            return None
        active = self._active_adapter() if None in names else None
        table = self.table if active is None or active in self.table else (*self.table, active)
        index: dict[str | None, int] = {name: at for at, name in enumerate(table)}
        found = {
            name: index.get(active, -1) if name is None else index[self._internal(name)]
            for name in dict.fromkeys(names)
        }
        return table, [found[name] for name in names]

    def _active_adapter(self) -> str | None:
        layout = self._backend.clock.layout
        if self._active[0] != layout:
            self._active = layout, active_adapter(self._backend.model)
        return self._active[1]

    def _may_run(self, sequence: Sequence) -> bool:
        name = sequence.params.lora_name
        return name is None or name in self._allowed

    def _changed(self) -> None:
        present = {internal_name(name) for name, one in self._loaded.items() if one.in_model} | self._chosen.keys()
        self.table = tuple(sorted(present - self._merged))
        self._backend.version()
        self._backend.clock.watch(self.table, self)

    def _room(self) -> bool:
        """Whether one more adapter fits into the model, or another one can leave it."""
        if self.max_loras is None or sum(one.in_model for one in self._loaded.values()) < self.max_loras:
            return True
        return any(one.in_model and name not in self._allowed for name, one in self._loaded.items())

    def _leave_room(self, keep: str) -> None:
        """Evict until the bounds hold: what is in use stays, and then ``keep`` where it can."""
        in_use = {one.params.lora_name for one in self._scheduler.running} | (self._allowed if self._uses else set())
        # What is merged stays: PEFT unmerges it by its parts.
        may_go = (one for one in self._loaded.values() if internal_name(one.name) not in self._merged)
        by_age = sorted(may_go, key=lambda one: one.last_used)
        candidates = [one for one in by_age if one.name not in in_use and one.name != keep]
        candidates += [one for one in by_age if one.name == keep and keep not in in_use]
        for one in candidates:
            if self.max_loras is None or sum(each.in_model for each in self._loaded.values()) <= self.max_loras:
                break
            if one.in_model:
                self._evict(one)
        for one in candidates:
            held = sum(not each.dropped for each in self._loaded.values())
            if self.max_cpu_loras is None or held <= self.max_cpu_loras:
                break
            if one.host is not None:
                one.contents, one.host = contents(one.host), None

    def _evict(self, adapter: LoadedAdapter) -> None:
        name = internal_name(adapter.name)
        adapter.stamp = self._backend.clock.stamp(name)
        adapter.host = take_out(self._backend.model, name)
        move(adapter.host, "cpu")
        self.num_evictions += 1

    def _bring_in(self, adapter: LoadedAdapter) -> None:
        name = internal_name(adapter.name)
        adapter.last_used = self._steps
        if adapter.host is None:
            self._read(adapter.name, name, adapter.folder)
            if adapter.contents == contents(parts_of(self._backend.model, name)):
                self._backend.clock.restore(name, adapter.stamp)
            adapter.contents = None
        else:
            move(adapter.host, self._backend.device)
            put_in(adapter.host, name)
            adapter.host = None
            self._backend.clock.restore(name, adapter.stamp)
        self._allowed.add(adapter.name)
        self._leave_room(keep=adapter.name)
        self._changed()

    def _read(self, name: str, internal: str, folder: str | Path) -> None:
        """Put the adapter of a folder into the model; ToolkitError where rows cannot choose it."""
        states = self._backend.layers()
        load_adapter(self._backend.model, internal, folder, self._hosted)
        try:
            self._check_choosable(internal)
            if states != self._backend.layers():
                raise ToolkitError(
                    f"adapter {shown(name)} must keep what layers remember of a token, got another state."
                )
        except ToolkitError:
            self._remove(internal)
            raise

    def _remove(self, name: str) -> None:
        with self._backend.clock.adapters_alone():
            remove_adapter(self._backend.model, name, self._hosted)

    def _finish_leaving(self) -> None:
        """Remove adapters that nobody uses any more."""
        for name in [name for name in self._leaving if not self._uses[name]]:
            self._leaving.discard(name)
            if self._loaded.pop(name).in_model:
                self._remove(internal_name(name))
            self._changed()
