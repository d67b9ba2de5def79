"""The parameters and buffers of a model, watched for every way in which one can be written or replaced."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import chain, count
from operator import is_not
from typing import Any
from weakref import ref

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from toolkit.ops.tensor_watch import MemoryHints, watch_tensors
from toolkit.ops.write_stamp import WriteStamp
from toolkit.patching.adapters import adapter_entries, base_modules
from toolkit.patching.settings import ModelSettings

Owner = str | None
"""The adapter that a tensor belongs to; None for the base model."""
_Entry = tuple[dict[str, Any], str, Any]
"""A dict, a key of it, and the value."""

_NUMBERS = count()
_IS_NOT_NONE = partial(is_not, None)
# A forward computes these frequencies from the length of its batch: they are no weights.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class ModelTensors:
    """What the parameters and buffers of a model were when last looked at.

    Watched too: tensors that a module had as plain attributes at first, private ones left out (what a forward leaves
    behind is no weight), and its settings (``ModelSettings``), which decide what is computed as well.

    Seen: another module, parameter or buffer in the place of one (also where a module's dict was written), other memory
    or another view of the same (``p.data = ...``), writes that torch's version counters count, and on a CPU writes past
    them that reach the middle of a tensor. Memory and modules are remembered weakly: nothing is kept alive, and what
    was allocated again at an old address is told apart.

    ``writes`` runs before every decode step: a few passes in C over dicts, and one call for the tensors. Tensors of
    adapters that do not act are looked at when asked for, so that a step costs the same with any number of them.

    Args:
        active: the adapters that act.
        before: what was seen last, of the same model.
    """

    def __init__(self, model: nn.Module, active: Collection[str] = (), before: "ModelTensors | None" = None) -> None:
        modules = list(model.modules())
        self._settings: ModelSettings | None = ModelSettings(model)
        same = before is not None and before._settings in (None, self._settings)
        self._number_of_settings: int = before._number_of_settings if before is not None and same else next(_NUMBERS)
        base = list(dict.fromkeys(base_modules(model)))
        alone = len(base) == len(modules)  # then both are one, and it is made once
        self._base_settings: ModelSettings | None = self._settings if alone else ModelSettings(model, base)
        this = ref(self)
        self._alive = [ref(module, lambda _: _on_death(this)) for module in modules]
        self._base = [ref(module) for module in base_modules(model)]
        self._parents = [module._modules for module in modules if module._modules]
        # An entry more counts where the forward may look for it: in a container, or beside others.
        self._dicts: list[dict[str, Any]] = [
            entries
            for module in modules
            for entries in (module._modules, module._parameters, module._buffers)
            if entries or type(module).forward is nn.Module.forward
        ]
        self._sizes, self._children = list(map(len, self._dicts)), self._hash_of_children()
        owners = adapter_entries(model)
        attributes = [(path, entry) for path, module in model.named_modules() for entry in tensor_attributes(module)]
        self._attributes: set[tuple[str, str]]
        self._attributes = {(path, entry[1]) for path, entry in attributes} if before is None else before._attributes
        found = [
            *(entry for module in modules for entry in tensor_entries(module)),
            *(entry for path, entry in attributes if (path, entry[1]) in self._attributes),
        ]
        entries = [(entry, owners.get((id(entry[0]), entry[1]))) for entry in found]
        acting = {None, *active}
        self._acting = _Part([one for one in entries if one[1] in acting])
        self._resting = _Part([one for one in entries if one[1] not in acting])
        dicts = [*self._dicts, *self._settings.dicts, *self._acting.dicts]
        self._hints = MemoryHints(dicts, [*self._acting.addresses, *map(id, modules)])

    def release(self) -> None:
        """Let go of the modules' dicts, and with them of what a module that died held."""
        self._settings = self._base_settings = None
        self._hints = MemoryHints([], [])
        self._parents, self._dicts = [], []
        self._acting = self._resting = _Part([])

    @property
    def layout(self) -> tuple[Any, ...]:
        """Equal to another one's while both live: the same objects over the same memory, with the same settings.

        On a CPU that is the storage, wherever it lies: FSDP2 allocates it again when it gathers. ZeRO-3 gives its
        parameters another storage each time, and their memory is left out: what was captured reads it from them.
        """
        return self._children, self._acting.layout, self._resting.layout, self._number_of_settings

    def _hash_of_children(self) -> int:
        return hash(tuple(chain.from_iterable(map(dict.values, self._parents))))

    def writes(self, all_adapters: bool = False) -> set[Owner] | None:
        """Whose tensors were written in place since the last call; of adapters that do not act, if asked for.

        None where more than values changed: a module, a parameter or a buffer was replaced, added or removed, or has
        other memory, or a setting is another one. Ask a new ``ModelTensors`` then, and what is ``differing``.
        """
        self._hints.ask_for_all()
        self._acting.ask_for_all()
        if self._settings is None or self._settings.changed():
            return None
        if list(map(len, self._dicts)) != self._sizes or self._hash_of_children() != self._children:
            return None
        resting = self._resting.writes() if all_adapters else set()
        written = None if resting is None else self._acting.writes()
        if written is None or resting is None:
            self._resting.unreported |= resting or set()
            return None
        return written | resting

    def differing(self, now: "ModelTensors") -> set[Owner]:
        """Whose tensors are not what they were, or of the base: whose modules."""
        old, new = ({**one._acting.stamps(), **one._resting.stamps()} for one in (self, now))
        found = {owner for owner in old.keys() | new.keys() if old.get(owner) != new.get(owner)}
        found |= self._acting.unreported | self._resting.unreported
        if None not in (self._base_settings, now._base_settings) and self._base_settings != now._base_settings:
            found.add(None)
        return found if [one() for one in self._base] == [one() for one in now._base] else found | {None}


class _Part:
    """Tensors that are looked at together: entries of dicts, each with its owner."""

    def __init__(self, entries: Sequence[tuple[_Entry, Owner]]) -> None:
        plain = [(entry, owner) for entry, owner in entries if _is_plain(entry[2])]
        # What has no separate memory: objects with tensors inside, wrappers around tensors.
        others = [(e, owner) for e, owner in entries if e[2] is not None and not _is_plain(e[2])]
        self._fetch = _Fetch([entry for entry, _ in plain])
        self._fetch_others = _Fetch([entry for entry, _ in others])
        self._fetch_nones = _Fetch([entry for entry, _ in entries if entry[2] is None])
        tensors = [entry[2] for entry, _ in plain]
        self._ids, self._other_ids = list(map(id, tensors)), [id(entry[2]) for entry, _ in others]
        self._watch = watch_tensors(tensors)
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._memory = [
            (storage.cdata, tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            for storage, tensor in zip(self._storages, tensors)
        ]
        memory = [
            (number, address if tensor.device.type != "cpu" else 0, *rest)
            for (number, address, *rest), tensor in zip(self._memory, tensors)
            if tensor.device.type != "cpu" or not hasattr(tensor, "ds_id")
        ]
        self.layout = self._ids, self._other_ids, memory
        self._owners = [owner for _, owner in plain]
        self.unreported: set[Owner] = set()  # written at a look that ended with None
        self.dicts = [entry[0] for entry, _ in entries]
        self.addresses = [*self._ids, *self._other_ids]
        known = {(id(entry[0]), entry[1]) for entry, _ in plain}
        wrappers = [(entry, owner) for entry, owner in others if _is_known_inside(entry[2], known)]
        self._fetch_wrappers = _Fetch([entry for entry, _ in wrappers])
        self._wrapper_owners = [owner for _, owner in wrappers]
        self._wrappers = watch_tensors([entry[2] for entry, _ in wrappers])
        taken = {id(entry[2]) for entry, _ in wrappers}
        odd = [(e, owner) for e, owner in others if isinstance(e[2], Tensor) and id(e[2]) not in taken]
        # Fetched, not remembered weakly: torch swaps a wrapper in ``Module.to`` only where nothing refers to it.
        self._fetch_odd = _Fetch([entry for entry, _ in odd])
        self._insides = [vars(entry[2]) for entry, _ in (*wrappers, *odd)]  # swapped with it
        self._odd = [(owner, _odd_stamps(entry[2])) for entry, owner in odd]

    def writes(self) -> set[Owner] | None:
        """Whose tensors were written in place since the last call; None where one is another, or elsewhere."""
        try:
            wrappers = list(self._fetch_wrappers())
            if (
                list(map(id, self._fetch_others())) != self._other_ids
                or any(map(_IS_NOT_NONE, self._fetch_nones()))
                or any(map(is_not, map(vars, chain(wrappers, self._fetch_odd())), self._insides))
                or (changed := self._wrappers.look(wrappers)) is None
            ):
                return None
            self.unreported.update(self._wrapper_owners[at] for at in changed)
            changed = self._watch.look(list(self._fetch()))
        except (KeyError, RuntimeError, TypeError):  # an entry is gone, is no tensor or has no memory any more
            return None
        return None if changed is None else self._written(changed)

    def ask_for_all(self) -> None:
        """Request the memory that ``writes`` reads of tensors."""
        self._watch.ask_for_all()
        self._wrappers.ask_for_all()

    def _written(self, changed: list[int]) -> set[Owner]:
        written, self.unreported = {self._owners[at] for at in changed} | self.unreported, set()
        for at, (tensor, (owner, stamps)) in enumerate(zip(self._fetch_odd(), self._odd)):
            stamps_now = _odd_stamps(tensor)
            if stamps_now != stamps:
                written.add(owner)
                self._odd[at] = (owner, stamps_now)
        return written

    def stamps(self) -> dict[Owner, list[Any]]:
        """What was seen of each owner's tensors."""
        found: dict[Owner, list[Any]] = defaultdict(list)
        for owner, *stamp in zip(self._owners, self._ids, self._memory, self._watch.stamps()):
            found[owner].append(stamp)
        for owner, value in zip(self._wrapper_owners, self._wrappers.stamps()):
            found[owner].append(value)
        for owner, stamps in self._odd:
            found[owner] += stamps
        return found


class _Fetch:
    """Reads entries of dicts. Subclasses' own ``__getitem__`` is passed by: DeepSpeed's gathers what it returns."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._holders, self._keys = [entry[0] for entry in entries], [entry[1] for entry in entries]

    def __call__(self) -> Iterator[Any]:
        return map(dict.__getitem__, self._holders, self._keys)


def _on_death(tensors: "ref[ModelTensors]") -> None:
    alive = tensors()
    if alive is not None:
        alive.release()


def tensor_entries(module: nn.Module) -> Iterator[_Entry]:
    """The module's own parameters and buffers, each with the tensors inside of it."""
    for holder in (module._parameters, module._buffers):
        for key, value in holder.items():
            if not _is_computed(module, key):
                yield holder, key, value
                if value is not None and type(value) not in (Tensor, nn.Parameter):
                    yield from _inside(value, {id(value)})


def tensor_attributes(module: nn.Module) -> Iterator[_Entry]:
    """The module's public attributes that are tensors, and not what a forward with gradients has left there."""
    for key, value in module.__dict__.items():
        if isinstance(value, Tensor) and not key.startswith("_") and not _is_computed(module, key) and value.is_leaf:
            yield module.__dict__, key, value


def _is_computed(module: nn.Module, key: str) -> bool:
    """Whether a forward writes the tensor, from the length of its batch."""
    kinds = getattr(module, "rope_type", "")
    return key.endswith("inv_freq") and any(
        kind in _LENGTH_DEPENDENT for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
    )


def _inside(value: Any, seen: set[int]) -> Iterator[_Entry]:
    """What an object holds as attributes: tensors, and objects that hold tensors (a quantisation's scales, say)."""
    holder = getattr(value, "__dict__", {})
    for key, part in list(holder.items()):
        if id(part) not in seen and not isinstance(part, (nn.Module, type)):
            seen.add(id(part))
            within = list(_inside(part, seen))
            if isinstance(part, Tensor) or within:
                yield holder, key, part
                yield from within


def _is_plain(value: Any) -> bool:
    """Whether a tensor has memory and a version counter, and is no wrapper."""
    if not isinstance(value, Tensor) or value.is_inference() or is_traceable_wrapper_subclass(value):
        return False
    try:
        return value.untyped_storage() is not None and value.data_ptr() is not None
    except (RuntimeError, NotImplementedError, ValueError):
        return False


def _is_known_inside(value: Any, known: set[tuple[int, str]]) -> bool:
    """Whether a wrapper's tensors are attributes of it that are watched as entries."""
    if not isinstance(value, Tensor) or not is_traceable_wrapper_subclass(value) or value.is_inference():
        return False
    return all((id(value.__dict__), name) in known for name in value.__tensor_flatten__()[0])


def _odd_stamps(value: Tensor) -> list[WriteStamp]:
    """Of a tensor that is not plain (made in inference mode, a wrapper of what is no attribute), and of those that it
    wraps."""
    names: Sequence[str] = value.__tensor_flatten__()[0] if is_traceable_wrapper_subclass(value) else []
    within = [part for name in names if isinstance(part := getattr(value, name), Tensor)]
    return [WriteStamp(value), *(stamp for part in within for stamp in _odd_stamps(part))]
