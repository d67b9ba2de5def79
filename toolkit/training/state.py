"""What a checkpoint holds beside the model: optimizer, random number generators, position; without pickle."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolkit.errors import ToolkitError
from toolkit.strict_json import strict_json


class OptimizerState(NamedTuple):
    """An optimizer's state, whole, on the CPU.

    Attributes:
        tensors: by ``<parameter>/<state>``.
        groups: with names of parameters.
    """

    tensors: dict[str, Tensor]
    groups: list[dict[str, Any]]


def optimizer_state(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    whole_of: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    keep: bool = True,
) -> OptimizerState:
    """The state of an optimizer over parameters of ``model``.

    Args:
        whole_of: gives the whole of a tensor that is sharded over processes, all of which must then call this.
        keep: False returns no tensors.
    """
    tensors = {}
    names = optimizer_names(optimizer, model)
    found = optimizer.state_dict()
    for index, entry in found["state"].items():
        for key, value in entry.items():
            if not isinstance(value, Tensor):
                raise ToolkitError(f"Optimizer state '{key}' must be a tensor, got {value!r}.")
            whole = whole_of(value.detach())
            if keep:
                tensors[f"{names[index]}/{key}"] = whole.cpu().contiguous()
    groups = [{**group, "params": [names[index] for index in group["params"]]} for group in found["param_groups"]]
    return OptimizerState(tensors, groups)


def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> list[dict[str, Any]]:
    """Write the optimizer's tensors to ``path``, named ``<parameter>/<state>``; return its groups."""
    state = optimizer_state(optimizer, model)
    save_file(state.tensors, str(path))
    return state.groups


def read_optimizer(
    names: list[str], path: Path, groups: list[dict[str, Any]]
) -> Iterator[tuple[int, str, str, Tensor]]:
    """(number in the optimizer, name of the parameter, state, tensor) of a file, one after another.

    Args:
        names: ``optimizer_names`` of the optimizer to restore.
        groups: that were saved with the file.

    Raises:
        ToolkitError: the file is of an optimizer over other parameters.
    """
    if [name for group in groups for name in group["params"]] != names:
        raise ToolkitError(f"{path} holds the optimizer of a model with other parameters; it cannot be resumed.")
    index_of = {name: index for index, name in enumerate(names)}
    with safe_open(str(path), "pt") as file:
        for entry in file.keys():  # noqa: SIM118  (it is no mapping)
            parameter, _, key = entry.rpartition("/")
            yield index_of[parameter], parameter, key, file.get_tensor(entry)


def load_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, path: Path, groups: list[dict[str, Any]]
) -> None:
    """Restore what ``save_optimizer`` wrote, into an optimizer over the same parameters in the same order."""
    state: dict[int, dict[str, Tensor]] = {}
    names = optimizer_names(optimizer, model)
    for index, _, key, value in read_optimizer(names, path, groups):
        # A copy, for the loaded tensors may lie at any address and some kernels' bits depend on alignment.
        state.setdefault(index, {})[key] = value.clone()
    index_of = {name: index for index, name in enumerate(names)}
    numbered = [{**group, "params": [index_of[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def optimizer_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the optimizer's parameters in its own numbering."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def write_state(
    folder: Path,
    values: dict[str, Any],
    optimizer: OptimizerState,
    rngs: list[tuple[dict[str, Any], dict[str, Tensor]]],
) -> None:
    """Write a run's state to the new ``folder``.

    Args:
        values: step, counts and positions, as JSON.
        rngs: what ``rng_state`` returned in each process.
    """
    folder.mkdir()
    save_file(optimizer.tensors, str(folder / "optimizer.safetensors"))
    flat = {f"{rank}/{name}": t for rank, (_, named) in enumerate(rngs) for name, t in named.items()}
    save_file(flat, str(folder / "rng.safetensors"))
    state = {**values, "optimizer": optimizer.groups, "rng": [numbers for numbers, _ in rngs]}
    (folder / "state.json").write_text(strict_json(state), encoding="utf-8")


def restore_rank(folder: Path, state: dict[str, Any], rank: int) -> None:
    """Set this process's generators to those that ``write_state`` wrote for ``rank``."""
    tensors = load_file(str(folder / "rng.safetensors"))
    restore_rng(
        state["rng"][rank],
        {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{rank}/")},
    )


def rng_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of Python's, NumPy's and torch's global generators: (JSON values, tensors)."""
    version, internal, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    values = {
        "python": [version, list(internal), gauss],
        "numpy": [str(algorithm), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
    }
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return values, tensors


@contextmanager
def rng_kept() -> Iterator[None]:
    """Inside, random numbers may be sampled; afterwards the generators are as they were."""
    values, tensors = rng_state()
    try:
        yield
    finally:
        restore_rng(values, tensors)


def restore_rng(values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Set the generators to what ``rng_state`` returned."""
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    algorithm, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
