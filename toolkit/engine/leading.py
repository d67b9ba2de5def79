"""One engine on every rank of a model that is split over them: the first rank's leads, the others' follow.

A server has its requests on the first rank alone. Every call that changes its engine is sent to the others first, which
make it too: same calls in the same order, same steps. What a call finds in a clock the ranks agree on themselves
(``Backend.agree``).
"""

import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import wraps
from typing import Any

from torch import Tensor

from toolkit.engine.engine import Engine
from toolkit.errors import ToolkitError
from toolkit.ops.collectives import send_object
from toolkit.patching.tensor_parallel import parallel_of

Progress = tuple[int, int, int]
"""Of an engine: its steps, its tokens, and how many calls have raised an error."""
Call = tuple[str, tuple[Any, ...], dict[str, Any], Progress]
"""A method, its arguments, and how far the leading engine had come before it."""


class RankEngine(Engine):
    """An engine of one rank of a model that is split over ranks.

    Attributes:
        failed_calls: calls of all ranks that have raised an error here.
    """

    failed_calls = 0

    def write_weights(self, weights: Mapping[str, Tensor]) -> int:
        """The weight version after this rank's shard of whole ``weights`` is written into the model."""
        backend: Any = self.backend
        parallel = parallel_of(backend.model)
        assert parallel is not None
        parallel.load_state_dict(weights)
        return self.see_weights()


def _everywhere(name: str) -> Any:
    """The method ``name`` of ``Engine``, made on all ranks. What it calls itself every rank's engine calls itself."""
    own = getattr(RankEngine, name)

    @wraps(own)
    def method(self: "LeadingEngine", *args: Any, **kwargs: Any) -> Any:
        if self.lost is not None:
            raise ToolkitError(self.lost)
        if self._leads or self.is_closed:
            return own(self, *args, **kwargs)
        call = _pickled((name, args, kwargs, _progress(self)))
        self._leads = True
        try:
            with self._guard():
                send_object(call, self._control)
                return own(self, *args, **kwargs)
        except Exception:
            self.failed_calls += 1
            raise
        finally:
            self._leads = False

    return method


def _progress(engine: RankEngine) -> Progress:
    """Equal on the ranks of one model."""
    stats = engine.stats()
    return int(stats["num_steps"]), int(stats["generation_tokens"]), engine.failed_calls


def _pickled(call: Call) -> bytes:
    try:
        return pickle.dumps(call)
    except Exception as error:
        raise ToolkitError(f"a request must be plain data to be sent to the other ranks, got {error}.") from None


class LeadingEngine(RankEngine):
    """The first rank's engine of a model that is split over ranks; the others run ``follow`` with a ``RankEngine``.

    Args:
        control: name of the process group by which calls are sent (gloo, which waits on sockets).
        guard: entered around every call; it may say better what an error of a collective is.
        args, kwargs: of ``Engine``, equal on all ranks.

    Attributes:
        lost: a sentence that says which rank has ended, which every call then raises; None while all are there.
    """

    def __init__(
        self, *args: Any, control: str, guard: Callable[[], AbstractContextManager[None]] = nullcontext, **kwargs: Any
    ) -> None:
        self._leads, self._control, self._guard = False, control, guard
        self.lost: str | None = None
        super().__init__(*args, **kwargs)

    generate = _everywhere("generate")
    submit_batch = _everywhere("submit_batch")
    cancel = _everywhere("cancel")
    step = _everywhere("step")
    take_deltas = _everywhere("take_deltas")
    sleep = _everywhere("sleep")
    wake = _everywhere("wake")
    see_weights = _everywhere("see_weights")
    write_weights = _everywhere("write_weights")
    reset_prefix_cache = _everywhere("reset_prefix_cache")
    load_adapter = _everywhere("load_adapter")
    unload_adapter = _everywhere("unload_adapter")

    def close(self) -> None:
        """Close the engines of all ranks; this one's where they have ended."""
        if not self.is_closed and not self._leads and self.lost is None:
            with suppress(RuntimeError):
                send_object(_pickled(("close", (), {}, _progress(self))), self._control)
        super().close()

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """Not of an engine of several ranks: ``submit`` and ``step``."""
        raise ToolkitError("an engine of several ranks has no stream(); use submit() and step().")

    def save_prefixes(self, *args: Any, **kwargs: Any) -> Any:
        """Not of an engine of several ranks."""
        raise ToolkitError("prefixes cannot be saved where a model is split over ranks, which have parts of them.")

    def load_prefixes(self, *args: Any, **kwargs: Any) -> Any:
        """Not of an engine of several ranks."""
        raise ToolkitError("prefixes cannot be loaded where a model is split over ranks, which have parts of them.")


_STEPPING = ("generate", "step")
"""Calls in which ranks exchange what layers compute."""


def follow(engine: RankEngine, control: str) -> None:
    """Make the calls of the first rank's engine until it is closed.

    Args:
        engine: of another rank.
        control: as for ``LeadingEngine``.

    An error of a call that steps the engine ends this rank, since others may have made a part of the step. Any other
    error is the first rank's too, which says it: the next call shows whether it was.

    Raises:
        ToolkitError: the engines have come apart.
        RuntimeError: the first rank has ended.
    """
    while not engine.is_closed:
        name, args, kwargs, progress = pickle.loads(send_object(None, control))
        if _progress(engine) != progress:
            raise ToolkitError(
                "engines of all ranks must have made the same steps, tokens and failed calls, got "
                f"{_progress(engine)} here and {progress} on the first rank."
            )
        try:
            getattr(engine, name)(*args, **kwargs)
        except Exception as error:
            engine.failed_calls += 1
            if name in _STEPPING and not isinstance(error, ToolkitError):
                raise


def check_threaded(engine: Any) -> None:
    """Raise ToolkitError for what is no engine, or one whose calls, made by a thread, other ranks would not make."""
    if not hasattr(engine, "step"):
        raise ToolkitError(f"engine must be an Engine, got {type(engine).__name__}; make one with Engine(model).")
    backend = getattr(engine, "backend", None)
    if getattr(backend, "group", None) is not None and not isinstance(engine, LeadingEngine):
        raise ToolkitError("engine must be a LeadingEngine for a model that is split over ranks, got an Engine.")
