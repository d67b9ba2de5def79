"""Rollout by actors of Ray: engines in other processes, on this machine or others, with the live weights of a model."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from infer_patches.generation_config import sampling_params
from toolkit import SamplingParams
from toolkit.engine.checks import check_float, check_int
from toolkit.engine.fingerprint import differing_part, model_fingerprint
from toolkit.engine.outputs import Completion, Delta, whole
from toolkit.engine.prompts import Params, Prompt, Prompts, check_params, split_prompts
from toolkit.errors import ToolkitError, first_line
from toolkit.loading.weight_folders import WeightFolders
from toolkit.patching import report_of, weight_version
from toolkit.patching.sharding import check_unsharded
from toolkit.quantised import quantised_weights
from toolkit.training.rollout_worker import ModelSpec, Worker, packed


@dataclass(frozen=True)
class Job:
    """A prompt of a call.

    Args:
        index: of the prompt in the call.
        prompt: a text or token ids.
        params: with a seed.
    """

    index: int
    prompt: Prompt
    params: SamplingParams


class RayEngine:
    """Generates as ``Engine(model)`` does, by engines in actors of Ray.

    The interface is that of ``Engine`` as far as training uses it. ``model`` stays in this process and is trained
    here; a call sends its weights first where they have changed since the last one. A sample depends on its seed,
    position and logits alone, so the samples are those of one ``Engine`` with the same ``seed``, in the same order and
    bit for bit in bitwise mode, however many actors there are and whichever one ran a prompt.

    An actor that has ended is made again with the current weights, and what it had not finished is generated again: to
    the same samples. ``Completion.weight_versions`` are those of ``weight_version(model)``.

    Args:
        model: a Hugging Face model, without adapters, quantised or sharded parameters.
        tokenizer: as for ``Engine``.
        num_workers: actors.
        num_cpus, num_gpus: of each actor, as Ray counts them. Actors with a GPU put their model there.
        weight_folder: a folder that all machines see, through which weights travel; None for Ray's object store.
        max_restarts: how often an actor is made again, all actors together.
        start_timeout: seconds for Ray to start an actor, weights included.
        address: of a cluster (``ray.init``); None for the environment's, or one on this machine.
        numerics: as for ``Engine``; None for the mode that is already patched into ``model``.
        seed: as for ``Engine``.
        engine_args: further arguments of ``Engine``, for each actor.

    Attributes:
        max_model_len: of an actor's engine.
        num_restarts: actors that were made again.

    Raises:
        ToolkitError: a missing package; a bad argument; a model that cannot be sent; an actor that Ray does not start
            in time, that computes by other numerics than this process, or more ends of actors than ``max_restarts``.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any = None, *, num_workers: int = 2, num_cpus: float = 1.0,
        num_gpus: float = 0.0, weight_folder: str | Path | None = None, max_restarts: int = 3,
        start_timeout: float = 600.0, address: str | None = None, numerics: str | None = None, seed: int | None = None,
        **engine_args: Any,
    ) -> None:  # fmt: skip
        try:
            import ray
        except ImportError:
            raise ToolkitError("RayEngine needs the package 'ray': pip install ray.") from None
        self._ray: Any = ray
        count = check_int("num_workers", num_workers, 1)
        self._resources = {
            "num_cpus": check_float("num_cpus", num_cpus, 0, 1e6),
            "num_gpus": check_float("num_gpus", num_gpus, 0, 1e6),
        }
        self._max_restarts = check_int("max_restarts", max_restarts, 0)
        self._timeout = check_float("start_timeout", start_timeout, 0, 1e9, open_low=True)
        _check(model)
        self.model, self._tokenizer, self._engine_args = model, tokenizer, engine_args
        self._room = check_int("max_num_seqs", engine_args.get("max_num_seqs", 64), 1)
        report = report_of(model)
        config = _of(model, "config")
        self._spec = ModelSpec(
            type(model), type(config).from_dict(config.to_dict()),  # without what the patch has set in it
            _of(model, "generation_config"),
            {name: parameter.dtype for name, parameter in model.named_parameters()},
            "cuda" if num_gpus else "cpu", numerics or (None if report is None else report.numerics),
        )  # fmt: skip
        self._seeds = np.random.default_rng(seed)
        self._folders = None if weight_folder is None else WeightFolders(weight_folder)
        self.max_model_len = self.num_restarts = 0
        if not ray.is_initialized():
            ray.init(address=address, include_dashboard=False)
        self._workers: list[Any] = []
        self._version, self._weights = self._send()
        try:
            self._workers = [self._new_worker() for _ in range(count)]
            self._wait([self._start(worker) for worker in self._workers])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RayEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, prompts: Prompts, params: Params = None) -> list[Completion]:
        """Completions of all prompts, in order, ``n`` per prompt: see ``Engine.generate``."""
        finished = [delta.finished for delta in self._run(prompts, params) if delta.finished is not None]
        return sorted(finished, key=lambda one: (one.prompt_index, one.index))

    def stream(self, prompts: Prompts, params: Params = None) -> Iterator[Delta]:
        """A delta of each whole completion as its prompt is finished. Closing the iterator cancels the rest."""
        return self._run(prompts, params)

    def rollout_func(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """What TRL's ``GRPOTrainer(rollout_func=...)`` calls: a completion of each prompt by the trainer's settings.

        Consecutive equal prompts are one request with several completions.

        Args:
            prompts: texts or messages of this process.
            trainer: GRPOTrainer, on ``model``.

        Returns:
            prompt_ids, completion_ids, logprobs: one list per prompt; the log-probabilities are of the distribution
            that was sampled from.
        """
        prompt_ids = [list(ids) for ids in trainer._tokenize_prompts(list(prompts))[0]]
        groups = [(list(ids), len(list(same))) for ids, same in groupby(prompt_ids, key=tuple)]
        config = trainer.generation_config
        params = [
            sampling_params(
                config, trainer.eos_token_ids, config.max_new_tokens, n=count, min_tokens=config.min_new_tokens or 0
            )
            for _, count in groups
        ]
        completions = self.generate([prompt for prompt, _ in groups], params)
        for one in completions:
            if one.error is not None:
                raise ToolkitError(f"a rollout failed: {one.error.rstrip('.')}.")
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [one.token_ids for one in completions],
            "logprobs": [one.sampling_logprobs for one in completions],
        }

    def seed(self, seed: int | Sequence[int] | None) -> None:
        """Begin the seeds of requests without one again."""
        self._seeds = np.random.default_rng(seed)

    def sync_weights(self) -> int:
        """The weight version of ``model``, which all actors have then."""
        if weight_version(self.model) != self._version:
            self._version, self._weights = self._send()
            calls = [worker.load.remote(self._version, self._weights) for worker in self._workers]
            try:
                for at, call in enumerate(calls):
                    try:
                        self._get(call)
                    except self._ray.exceptions.RayActorError as error:
                        self._restart(at, error)
            except BaseException:
                self._version = -1  # not all actors have them: the next call sends them again
                raise
            if self._folders is not None:
                self._folders.remove_previous()
        return self._version

    def sleep(self) -> None:
        """Nothing: the actors' memory is not the trainer's."""

    def wake(self) -> None:
        """Nothing."""

    def stats(self) -> dict[str, float]:
        """weight_version of the last call, num_workers, num_restarts."""
        return {
            "weight_version": self._version,
            "num_workers": len(self._workers),
            "num_restarts": self.num_restarts,
        }

    def close(self) -> None:
        """End the actors. Ray itself keeps running."""
        for worker in self._workers:
            self._ray.kill(worker)
        self._workers, self._weights = [], {}
        if self._folders is not None:
            self._folders.remove_last()

    def _run(self, prompts: Prompts, params: Params) -> Iterator[Delta]:
        if not self._workers:
            raise ToolkitError("the engine is closed; make another one.")
        given = split_prompts(prompts)
        jobs = deque(
            Job(index, prompt, self._seeded(one))
            for index, (prompt, one) in enumerate(zip(given, check_params(params, len(given))))
        )
        self.sync_weights()
        running: dict[Any, tuple[int, Job]] = {}
        try:
            while jobs or running:
                self._assign(jobs, running)
                (done, *_), _ = self._ray.wait(list(running), num_returns=1)
                at, job = running.pop(done)
                try:
                    completions = self._get(done)
                except self._ray.exceptions.RayActorError as error:
                    lost = [job, *(one for by, one in running.values() if by == at)]
                    running = {call: one for call, one in running.items() if one[0] != at}
                    jobs.extendleft(sorted(lost, key=lambda one: -one.index))
                    self._restart(at, error)
                    continue
                for one in completions:
                    one.prompt_index = job.index
                    yield whole(one)
        finally:
            for call in running:
                self._ray.cancel(call)

    def _seeded(self, params: SamplingParams) -> SamplingParams:
        """With the seed that ``Engine`` would give it."""
        return params if params.seed is not None else replace(params, seed=int(self._seeds.integers(2**63)))

    def _assign(self, jobs: deque[Job], running: dict[Any, tuple[int, Job]]) -> None:
        """Hand out prompts while any actor has room in its step: the next one to whoever has the fewest sequences."""
        queued = [0] * len(self._workers)
        for at, job in running.values():
            queued[at] += job.params.num_candidates
        while jobs:
            at = queued.index(min(queued))
            if queued[at] and queued[at] + jobs[0].params.num_candidates > self._room:
                return
            job = jobs.popleft()
            queued[at] += job.params.num_candidates
            running[self._workers[at].generate.remote(job.prompt, job.params)] = at, job

    def _send(self) -> tuple[int, Any]:
        """The weight version, and what an actor loads it from."""
        check_unsharded(self.model, "RayEngine")
        version, state = weight_version(self.model), self.model.state_dict()
        if self._folders is None:
            return version, self._ray.put(packed(state))
        return version, str(self._folders.write(state))

    def _new_worker(self) -> Any:
        return self._ray.remote(Worker).options(**self._resources, max_concurrency=1024).remote()

    def _start(self, worker: Any) -> Any:
        return worker.start.remote(self._spec, self._tokenizer, self._engine_args, self._version, self._weights)

    def _wait(self, starts: list[Any]) -> None:
        """Wait for actors to start, and compare their numerics with those of this process."""
        _, late = self._ray.wait(starts, num_returns=len(starts), timeout=self._timeout)
        if late:
            there = self._ray.cluster_resources()
            raise ToolkitError(
                f"start_timeout must be enough for Ray to start rollout workers, got {self._timeout:g} s, after which "
                f"{len(late)} of {len(starts)} had not started; each needs {self._resources['num_cpus']:g} CPUs and "
                f"{self._resources['num_gpus']:g} GPUs of the cluster's {there.get('CPU', 0):g} and "
                f"{there.get('GPU', 0):g}."
            )
        try:
            found = [self._get(start) for start in starts]
        except self._ray.exceptions.RayActorError as error:
            raise ToolkitError(f"A rollout worker has ended before it was ready ({first_line(error)}).") from None
        self.max_model_len = found[0].max_model_len
        own = model_fingerprint(self.model)
        if own is None or own["numerics"] != "bitwise":
            return
        for theirs in (one.numerics for one in found):
            wrong = differing_part(own, theirs)
            if wrong is not None:
                raise ToolkitError(
                    f"a rollout worker must have the numerics of the trainer, {wrong} {own.get(wrong)!r}, got "
                    f"{theirs.get(wrong)!r}."
                )

    def _restart(self, at: int, error: Exception) -> None:
        """Another actor in the place of one that has ended."""
        if self.num_restarts >= self._max_restarts:
            raise ToolkitError(
                f"A rollout worker has ended after {self.num_restarts} restarts of max_restarts {self._max_restarts}: "
                f"{first_line(error)}."
            )
        self.num_restarts += 1
        self._ray.kill(self._workers[at])
        self._workers[at] = self._new_worker()
        self._wait([self._start(self._workers[at])])

    def _get(self, call: Any) -> Any:
        """What an actor's method returned. Raises its ToolkitError as it is."""
        try:
            return self._ray.get(call)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ToolkitError):
                raise error.cause from None
            raise


def rollout_func(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
    """``RayEngine.rollout_func`` without an engine: for ``GRPOTrainer(rollout_func=...)`` and for a recipe.

    The first call makes the engine, with the defaults of ``RayEngine``; a call for another model ends it and makes
    another one. Samples depend on the weights, the seed of ``trainer.args``, the process and the step.
    """
    engine = _kept.get("engine")
    if engine is None or engine.model is not trainer.model:
        if engine is not None:
            engine.close()
        _kept["engine"] = engine = RayEngine(trainer.model, trainer.processing_class)
    process = getattr(trainer.accelerator, "process_index", 0)
    engine.seed([trainer.args.seed, process, trainer.state.global_step])
    return engine.rollout_func(prompts, trainer)


_kept: dict[str, RayEngine] = {}
"""The engine of ``rollout_func``."""


def _of(model: Any, name: str) -> Any:
    return getattr(model, name, None)


def _check(model: nn.Module) -> None:
    """Raise ToolkitError for a model that its class, configuration and state dict do not describe."""
    if _of(model, "config") is None:
        raise ToolkitError(f"model must be a Hugging Face model, got {type(model).__name__}.")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ToolkitError(f"model must have no adapters with RayEngine, got {type(model).__name__}; merge them first.")
    name = next((name for name, _ in quantised_weights(model)), None)
    if name is not None:
        raise ToolkitError(f"model must have no quantised weights with RayEngine, got {name}.")
