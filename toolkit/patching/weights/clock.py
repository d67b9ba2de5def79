"""The weight version: a number that changes whenever what a model computes with is written."""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from toolkit.patching.adapters import AdapterSwitches, inner_model
from toolkit.patching.attached import attach, attached, detach
from toolkit.patching.weights.optimizers import count_steps, steps_of_copies
from toolkit.patching.weights.tensors import ModelTensors, Owner
from toolkit.state.prefix_key import PrefixKey


class WeightClock:
    """The weight version of one model.

    Every write to a parameter or buffer changes it: steps of any optimizer, ``load_state_dict`` (``assign=True`` too),
    in-place operations, replaced parameters, buffers and modules, other memory or another view of it
    (``p.data = ...``), adapters that are switched, merged, rescaled, added or deleted. So do writes to tensors that are
    plain attributes, and to settings of modules (``layer.scaling = ...``). What no counter sees (``p.data.copy_``) is
    seen on a CPU where it reaches the middle of a tensor; call ``weights_changed(model)`` after such writes.

    Rows of a batch may choose adapters that are not active: ``watch`` names them, and each has a key.

    Attributes:
        key: of the base weights and the active adapters, at the last ``version``.
        changes: another number whenever a key may be another one.
        layout: another number whenever a module, a parameter or a buffer is another object or, on a device, has other
            memory, or a setting is another one, and with the adapters that act. What was captured under one layout is
            valid under its number.
    """

    def __init__(self, model: nn.Module) -> None:
        count_steps(model)
        self._model = weakref.ref(model)
        self._writes, self._numbers = itertools.count(1), itertools.count(1)
        self._switches = AdapterSwitches(model)
        self._tensors = ModelTensors(model, self._switches.active())
        self._copies = steps_of_copies()
        self._base = 0
        self._adapters: dict[str, int] = {}
        self._watchers: weakref.WeakKeyDictionary[object, frozenset[str]] = weakref.WeakKeyDictionary()
        self._watched: frozenset[str] = frozenset()
        self._selections: dict[Any, int] = {}
        self.changes = 0
        self.layout = 0
        self._layouts = [(0, (self._tensors.layout, self._switches.selection()), self._tensors)]
        self.key = self._current()
        self._versions = {self.key: 0}

    def is_of(self, model: nn.Module) -> bool:
        """Whether it is that of ``model``, and not of what it is a shallow copy of."""
        return self._model() is model

    def version(self) -> int:
        """The current version: 0 at first, and equal only where the weights are."""
        model = self._model()
        if model is not None:
            self._look(model)
        return self._version_of(self.key)

    def _version_of(self, key: PrefixKey) -> int:
        if key not in self._versions:
            # Base weights do not come back; adapters may be switched back.
            self._versions = {one: number for one, number in self._versions.items() if not key.outdates(one)}
            self._versions[key] = next(self._numbers)
        return self._versions[key]

    def watch(self, adapters: Sequence[str], watcher: object) -> None:
        """Look at the tensors of ``adapters`` too, which rows may choose, as long as ``watcher`` lives.

        They take the place of those that it named before.
        """
        model = self._model()
        self._watchers[watcher] = frozenset(adapters)
        watched = frozenset().union(*self._watchers.values())
        if model is not None and watched != self._watched:
            self._look(model)
            self._watched = watched
            self._tensors = self._new_tensors(model)
            self.changes += 1

    def of_adapter(self, name: str) -> tuple[PrefixKey, int]:
        """The key and the version of the weights of rows that choose a watched adapter, at the last ``version``."""
        key = PrefixKey(self._base, name, self._number_of_adapter(name))
        return key, self._version_of(key)

    @contextmanager
    def adapters_alone(self) -> Iterator[None]:
        """Inside, adapters come and go, and nothing else is written: wrappers that are gone were not merged."""
        self.version()
        base = self._base
        yield
        model = self._model()
        if model is not None:
            self._look(model)
        self._base, self.key = base, self.key._replace(weights=base)
        self.changes += 1

    def stamp(self, name: str) -> tuple[int, int]:
        """What stands for the state of an adapter's tensors now, to be given to ``restore``."""
        self.version()
        number = self._number_of_adapter(name)
        return self._adapters[name], number

    def restore(self, name: str, stamp: tuple[int, int]) -> None:
        """Say that an adapter which was taken out of the model is there again, as it was at ``stamp``."""
        self.version()
        self._adapters[name] = stamp[0]
        self._selections[self._selection_of(name)] = stamp[1]
        self.key = self._current()
        self.changes += 1

    def move(self) -> None:
        """Change the version by hand, as a write to everything."""
        model = self._model()
        if model is not None:
            self._look(model)
            self._follow(model, {None, *self._adapters}, moved=True)

    def _look(self, model: nn.Module) -> None:
        switched = self._switches.changed()
        written = self._tensors.writes(all_adapters=switched)
        if self._copies != steps_of_copies():
            self._copies = steps_of_copies()
            self._follow(model, {None, *self._adapters}, written is None or switched)
        elif written is None or switched or written:
            self._follow(model, written, written is None or switched)

    def _follow(self, model: nn.Module, written: set[Owner] | None, moved: bool) -> None:
        """Move the versions of whose tensors were written; None: of those that are not what they were."""
        if moved:
            switches, self._switches = self._switches, AdapterSwitches(model)
            tensors, self._tensors = self._tensors, self._new_tensors(model)
            written = tensors.differing(self._tensors) if written is None else written
            self.layout = self._number_of_layout()
            if switches.may_have_merged(self._switches):
                written = written | {None}
        assert written is not None
        for owner in written:
            if owner is None:
                self._base = next(self._writes)
            else:
                self._adapters[owner] = next(self._writes)
        self._selections = {
            selection: number
            for selection, number in self._selections.items()
            if all(self._adapters.get(name) == version for name, version in selection[1])
        }
        self.key = self._current()
        self.changes += 1

    def _new_tensors(self, model: nn.Module) -> ModelTensors:
        return ModelTensors(model, {*self._switches.active(), *self._watched}, self._tensors)

    def _number_of_layout(self) -> int:
        """A new number, or that of one of the last layouts which is there again, as after gathering sharded weights."""
        now = self._tensors.layout, self._switches.selection()
        for number, layout, _ in self._layouts:
            if layout == now:
                return number
        number = self._layouts[-1][0] + 1
        # The tensors are kept with it: they hold the numbers of their storages.
        self._layouts = [*self._layouts[-3:], (number, now, self._tensors)]
        return number

    def _current(self) -> PrefixKey:
        active = self._switches.active()
        if not active:
            return PrefixKey(self._base)
        if len(active) == 1 and self._switches.all_apply(active[0]):
            return PrefixKey(self._base, active[0], self._number_of_adapter(active[0]))
        versions = tuple((name, self._adapters.setdefault(name, 0)) for name in active)
        number = self._number_of((self._switches.selection(), versions))
        return PrefixKey(self._base, "+".join(active), number)

    def _number_of_adapter(self, name: str) -> int:
        """The number of what an adapter adds where nothing else does, active or chosen by a row."""
        return self._number_of(self._selection_of(name))

    def _selection_of(self, name: str) -> Any:
        return self._switches.scaling_of(name), ((name, self._adapters.setdefault(name, 0)),)

    def _number_of(self, selection: tuple[Any, tuple[tuple[str, int], ...]]) -> int:
        if selection not in self._selections:
            self._selections[selection] = next(self._writes)
        return self._selections[selection]


_CLOCK = "_toolkit_clock"
_HELD: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[WeightClock]]" = weakref.WeakKeyDictionary()
"""Clocks that may have users after ``leave_clock``."""


def weight_clock(model: nn.Module) -> WeightClock:
    """The clock of ``model``: the same one for every caller."""
    model = inner_model(model)
    clock: WeightClock | None = attached(model, _CLOCK)
    if clock is None or not clock.is_of(model):
        held = _HELD.get(model)
        clock = (None if held is None else held()) or WeightClock(model)
        attach(model, _CLOCK, clock)
        _HELD[model] = weakref.ref(clock)
    return clock


def make_room_for_clock(model: nn.Module) -> None:
    """Let whoever asks for the clock later, such as an engine, leave the attributes of the model as they are."""
    if attached(model, _CLOCK) is None:
        attach(model, _CLOCK)


def leave_clock(model: nn.Module) -> None:
    """Leave no clock on the model; one that is in use is its clock again when it is asked for."""
    detach(model, _CLOCK)


def weight_version(model: nn.Module) -> int:
    """0 at the first call for a model; another number after every write: see ``WeightClock``."""
    return weight_clock(model).version()


def weights_changed(model: nn.Module) -> None:
    """Change the weight version by hand, after writes that nothing shows: past torch's version counters, in place.

    These are ``p.data.copy_(...)``, ``p.data[...] = ...``, NumPy arrays that share memory, and kernels that are given
    a pointer, on any device but the CPU or where they change a part of a tensor. Steps of optimizers are counted.
    """
    weight_clock(model).move()
