"""The training loop: a recipe in, a run's folder out. Stands on accelerate.

What is minimised is the recipe's objective (``toolkit.training.objectives``); this loop owns all else. A run's folder
holds recipe.yaml (resolved), metrics.jsonl, tensorboard/, checkpoints/, a curve and result.json, and the folders
``warmup`` and ``teacher`` of runs that come first. With the same recipe, machine, versions, threads and processes,
weights after N steps are the same bits whether or not the run was killed and resumed on the way.
"""

import json
import math
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.config import Recipe, dump
from toolkit.errors import ToolkitError
from toolkit.moe.sharding import ShardedExperts, expert_groups, shard_experts
from toolkit.patching import expert_layers
from toolkit.training import checkpoint
from toolkit.training.files import write_atomic
from toolkit.training.metrics import FILE as METRICS
from toolkit.training.metrics import Metrics, plot_curve, read_metrics
from toolkit.training.model import (
    RaggedModel,
    load_adapters,
    load_checkpoint,
    make_model,
    patch_model,
    save_model,
)
from toolkit.training.moe import Balancing
from toolkit.training.objectives.base import RunContext, make_objective
from toolkit.training.progress import Progress
from toolkit.training.report import figures, show
from toolkit.training.resume import Start, find_start, prepare_folder, run_folder
from toolkit.training.schedule import make_optimizer, make_scheduler
from toolkit.training.stages import warmup_recipe
from toolkit.training.state import load_optimizer, restore_rng, rng_state, save_optimizer
from toolkit.training.tokenizer import load_tokenizer, make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Trainer:
    """A run that has been set up; ``fit()`` trains it to the recipe's last step.

    Setting up reads the data, makes or loads tokenizer and model (after the warm-up, if the recipe has one), patches,
    and restores the checkpoint to resume from. ``child``: part of another run, which has said what there is to say.
    """

    def __init__(self, recipe: Recipe, quiet: bool = False, child: bool = False) -> None:
        self.recipe = recipe
        self.accelerator = Accelerator(step_scheduler_with_optimizer=False)
        if self.accelerator.distributed_type not in _DISTRIBUTED:
            raise ToolkitError(
                f"accelerate is set up for {self.accelerator.distributed_type}; allowed are one process and "
                "plain data parallel."
            )
        self._quiet = quiet or not self.accelerator.is_main_process
        if not child:
            self.say(dump(recipe))
        self.folder = run_folder(recipe)
        start = find_start(recipe)
        self.objective = make_objective(recipe)
        if start is not None:
            self._check_start(start)
        self.say(f"data: {self.objective.describe()}")
        self._found = self._come_first(start)

        self.tokenizer = self._make_tokenizer(start)
        set_seed(recipe.seed)
        self.hf_model = self._make_model(start)
        ragged, self.patch_report = patch_model(self.hf_model, recipe.model)
        if start is not None and recipe.model.lora is not None:
            load_adapters(self.hf_model, start.checkpoint)
        self.parameters = sum(parameter.numel() for parameter in self.hf_model.parameters())
        self.trained = sum(p.numel() for p in self.hf_model.parameters() if p.requires_grad)
        self.sharded = self._share_experts(ragged)
        optimizer = make_optimizer(ragged, recipe.optimizer)
        scheduler = make_scheduler(optimizer, recipe.schedule, recipe.train.steps)
        self.forward, self.optimizer, self.scheduler = self.accelerator.prepare(ragged, optimizer, scheduler)
        self.ragged: RaggedModel = self.accelerator.unwrap_model(self.forward)
        self.objective.bind(self._setting())
        # Runs the model: one that cannot take a ragged batch is refused before anything is written.
        self.balancing = Balancing(recipe.train.moe, self.objective.setting, self.patch_report)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.before: dict[str, Any] | None = None
        set_seed(recipe.seed, device_specific=True)
        if start is not None:
            self._restore(start)
        self.accelerator.wait_for_everyone()  # every process has looked before one changes the folder
        if self.accelerator.is_main_process:
            for name in prepare_folder(recipe, start):
                self.say(f"removed {name} of an earlier run")
            write_atomic(self.folder / "recipe.yaml", dump(recipe))
        roles = ", ".join(f"{count} {role}" for role, count in self.patch_report.roles().items())
        part = f", {self.trained / 1e6:.3f} M of them trained" if self.trained != self.parameters else ""
        self.say(f"model: {type(self.hf_model).__name__}, {self.parameters / 1e6:.2f} M parameters{part}")
        self.say(f"patched: {roles} (numerics: {self.patch_report.numerics})")

    def say(self, line: str) -> None:
        """Print on the main process."""
        if not self._quiet:
            print(line, flush=True)

    def _setting(self) -> RunContext:
        return RunContext(
            recipe=self.recipe,
            accelerator=self.accelerator,
            tokenizer=self.tokenizer,
            model=self.ragged,
            found=self._found_model,
            child=self._child,
            folder=self.folder,
            say=self.say,
        )

    def _come_first(self, start: Start | None) -> Path | None:
        """Train the warm-up, unless this run is past it; the checkpoint to begin with, None without a warm-up."""
        recipe = warmup_recipe(self.recipe)
        if recipe is None:
            return None
        last = run_folder(recipe) / "checkpoints" / checkpoint.name_of(recipe.train.steps)
        if start is not None:
            if not last.is_dir():
                raise ToolkitError(f"{start.checkpoint} was trained on from {last}, which is no longer there.")
            return last
        self.say(f"warm-up: {recipe.train.steps} steps")
        return self._child(recipe)

    def _child(self, recipe: Recipe) -> Path:
        """Train another recipe inside of this run, or go on with it; its last checkpoint."""
        last = run_folder(recipe) / "checkpoints" / checkpoint.name_of(recipe.train.steps)
        if recipe.resume == "never" or not last.is_dir():
            train(recipe, self._quiet, child=True)
        self.accelerator.wait_for_everyone()
        return last

    def _check_start(self, start: Start) -> None:
        world = self.accelerator.num_processes
        if start.state["world"] != world:
            raise ToolkitError(
                f"{start.checkpoint} was written by {start.state['world']} processes and cannot be resumed by {world}."
            )
        if start.state["data_fingerprint"] != self.objective.fingerprint:
            what = {"pretrain": f"data.root '{self.recipe.data.root}' has other files"}
            other = what.get(self.recipe.objective.kind, "objective.data has other lines")
            raise ToolkitError(f"{other} than when {start.checkpoint} was written; resuming needs the same.")

    def _make_tokenizer(self, start: Start | None) -> Any:
        if start is not None:
            return load_tokenizer(start.checkpoint, "the checkpoint")
        if self._found is not None:
            return load_tokenizer(self._found, "the warm-up")
        recipe, begun = self.recipe, time.monotonic()
        made = make_tokenizer(recipe.tokenizer, recipe.model.path, self.objective.texts(), recipe.train.max_length)
        self.say(f"tokenizer: {len(made)} tokens, {time.monotonic() - begun:.1f} s")
        return made

    def _found_model(self) -> "PreTrainedModel":
        """The model as training finds it: after the warm-up, from ``model.path``, or random."""
        section = self.recipe.model
        if self._found is not None:
            return load_checkpoint(self._found, getattr(torch, section.dtype), "the warm-up").train()
        with torch.random.fork_rng():
            set_seed(self.recipe.seed)
            return make_model(section, self.tokenizer, self.recipe.train.max_length)

    def _make_model(self, start: Start | None) -> "PreTrainedModel":
        section = self.recipe.model
        if start is None or section.lora is not None:
            model = self._found_model()
        else:
            model = load_checkpoint(start.checkpoint, getattr(torch, section.dtype), "the checkpoint").train()
        for tensor in (*model.parameters(), *model.buffers()):
            # Loaded tensors may lie at any address; fresh ones are aligned alike, and bits can depend on it.
            tensor.data = tensor.data.clone()
        return model

    def _share_experts(self, ragged: RaggedModel) -> ShardedExperts | None:
        section = self.recipe.train.expert_parallel
        if section is None:
            return None
        group, replicas = expert_groups(section.size)
        layers = expert_layers(ragged)
        return shard_experts(ragged, layers, group, chunks=section.chunks, replicas=replicas)

    def _whole(self, optimizer: torch.optim.Optimizer | None = None) -> AbstractContextManager[None]:
        """The model with all its experts in every process, which it always has where they are not shared out."""
        return nullcontext() if self.sharded is None else self.sharded.gathered(optimizer)

    def evaluate(self) -> dict[str, Any]:
        """The objective's held-out measure. All processes must call it."""
        with self._whole():
            return self.objective.evaluate()

    def _restore(self, start: Start) -> None:
        state, folder = start.state, start.checkpoint / "training"
        rank = self.accelerator.process_index
        load_optimizer(
            self.optimizer.optimizer, self.ragged.model, folder / "optimizer.safetensors", state["optimizer"]
        )
        if self.sharded is not None:
            self.sharded.take_part(self.optimizer.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        self.objective.load_state_dict(state["data"][rank])
        tensors = load_file(str(folder / "rng.safetensors"))
        mine = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{rank}/")}
        restore_rng(state["rng"][rank], mine)
        self.step, self.seconds, self.tokens = start.step, state["seconds"], state["tokens"]
        self.before = state["before"]
        self.say(f"resumed from {start.checkpoint}")
        if state["threads"] != torch.get_num_threads():
            self.say(
                f"note: {state['threads']} threads wrote it, {torch.get_num_threads()} go on; bits may "
                "differ from the uninterrupted run's"
            )

    def fit(self) -> None:
        """Train to ``train.steps``, saving as the recipe says and at the end."""
        recipe, last = self.recipe, self.recipe.train.steps
        main = self.accelerator.is_main_process
        if recipe.evaluate.enabled and self.objective.before and self.before is None:
            self.before = self._apart(self.evaluate)
            self.say(f"held out, before: {_line(self.before)}")
        metrics = Metrics(self.folder, self.step, recipe.log.tensorboard) if main else None
        recent: deque[tuple[int, float]] = deque(maxlen=20)
        headline = self.objective.headline
        try:
            with Progress(last, self.step, recipe.log.every, not self._quiet, headline) as progress:
                while self.step < last:
                    begun = time.perf_counter()
                    rate = self.scheduler.get_last_lr()[0]
                    loss, norm = self.train_step()
                    tokens, values = self.objective.finish()
                    recent.append((tokens, time.perf_counter() - begun))
                    self.seconds += recent[-1][1]
                    self.tokens += tokens
                    line = {
                        "step": self.step,
                        "loss": loss,
                        "learning_rate": rate,
                        "gradient_norm": norm,
                        "tokens": self.tokens,
                        "tokens_per_second": round(tokens / recent[-1][1], 1),
                        **values,
                        **self.balancing.figures(),
                        "seconds": round(self.seconds, 3),
                    }
                    if metrics is not None:
                        metrics.write(line)
                    speed = sum(count for count, _ in recent) / sum(seconds for _, seconds in recent)
                    progress.update(self.step, line[headline], speed)
                    every = recipe.checkpoint.every
                    if self.step == last or (every is not None and self.step % every == 0):
                        if metrics is not None:
                            metrics.sync()
                        self.save()
        finally:
            if metrics is not None:
                metrics.close()
        if main and recipe.log.plot:
            plot_curve(read_metrics(self.folder / METRICS), headline, self.folder / f"{headline}.png", recipe.name)

    def _apart(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a measure without leaving a trace in the random numbers that training draws."""
        values, tensors = rng_state()
        try:
            return measure()
        finally:
            restore_rng(values, tensors)

    def train_step(self) -> tuple[float, float]:
        """One step; returns its mean loss over its updates, and the gradient's norm at the last of them."""
        total = torch.zeros((), device=self.accelerator.device)
        norm = torch.zeros(())
        updates = 0
        for micros in self.objective.updates(self.step):
            self.balancing.begin(micros, self.objective.rows)
            for index, micro in enumerate(micros):
                # Gradients are averaged over the processes with the last part.
                last = index == len(micros) - 1
                with nullcontext() if last else self.accelerator.no_sync(self.forward):
                    loss = self.objective.loss(self.forward, micro)
                    total += loss.detach()
                    routers = self.balancing.loss(index)
                    self.accelerator.backward(loss if routers is None else loss + routers)
            norm = self._clip()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.balancing.finish_update()
            updates += 1
        with warnings.catch_warnings():
            # A first step without updates (all groups dropped, say) would be taken for a mistake in the order.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.step += 1
        mean = cast(Tensor, self.accelerator.reduce(total / max(updates, 1), "mean"))
        return mean.item(), norm.item()

    def _clip(self) -> Tensor:
        limit = math.inf if self.recipe.optimizer.clip is None else self.recipe.optimizer.clip
        if self.sharded is not None:
            self.sharded.reduce()
            norm = self.sharded.clip(self.forward.parameters(), limit)
        else:
            norm = cast(Tensor, self.accelerator.clip_grad_norm_(self.forward.parameters(), limit))
        if not torch.isfinite(norm):
            raise ToolkitError(
                f"The gradient of step {self.step + 1} is not finite (norm {norm.item()}); lower "
                f"optimizer.lr, which is {self.recipe.optimizer.lr}."
            )
        return norm

    def save(self) -> None:
        """Write a checkpoint of this step and remove those that the recipe does not keep."""
        values, tensors = rng_state()
        rngs = gather_object([(values, tensors)])
        positions = gather_object([self.objective.state_dict()])
        with self._whole(self.optimizer.optimizer):
            if self.accelerator.is_main_process:
                folder = self.folder / "checkpoints"
                with checkpoint.writing(folder, self.step) as aside:
                    self._write(aside, [values for values, _ in rngs], [tensors for _, tensors in rngs], positions)
                checkpoint.prune(folder, self.recipe.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _write(
        self, aside: Path, rngs: list[dict[str, Any]], tensors: list[dict[str, Tensor]], positions: list[Any]
    ) -> None:
        save_model(self.hf_model, aside)
        self.tokenizer.save_pretrained(str(aside))
        (aside / "recipe.yaml").write_text(dump(self.recipe), encoding="utf-8")
        training = aside / "training"
        training.mkdir()
        groups = save_optimizer(self.optimizer.optimizer, self.ragged.model, training / "optimizer.safetensors")
        flat = {f"{rank}/{name}": t for rank, named in enumerate(tensors) for name, t in named.items()}
        save_file(flat, str(training / "rng.safetensors"))
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "before": self.before,
            "world": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "data_fingerprint": self.objective.fingerprint,
            "optimizer": groups,
            "scheduler": self.scheduler.state_dict(),
            "data": positions,
            "rng": rngs,
        }
        (training / "state.json").write_text(json.dumps(state), encoding="utf-8")


def train(recipe: Recipe, quiet: bool = False, child: bool = False) -> dict[str, Any]:
    """Run a recipe to its end; returns what it writes to ``result.json``.

    Raises ToolkitError for bad input.
    """
    trainer = Trainer(recipe, quiet, child)
    try:
        trainer.fit()
        result = figures(trainer)
        if trainer.accelerator.is_main_process:
            write_atomic(trainer.folder / "result.json", json.dumps(result, indent=1) + "\n")
            if not quiet:
                show(trainer, result)
    finally:
        trainer.objective.close()
    return result


def _line(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
