"""The training loop: a recipe in, a run's folder out. Stands on accelerate.

What is minimised is the recipe's objective (``toolkit.training.objectives``); this loop owns all else. A run's folder
holds recipe.yaml (resolved), data_report.txt, metrics.jsonl, tensorboard/, checkpoints/, plots/, result.json, and
``warmup`` and ``teacher`` of nested runs. With the same recipe, machine, versions, threads and processes, weights after
N steps are bitwise identical whether or not the run was killed and resumed.
"""

import json
import time
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor

from toolkit.config import Recipe, dump
from toolkit.errors import ToolkitError
from toolkit.loading.run import name_of
from toolkit.moe.sharding import ShardedExperts, expert_groups, shard_experts
from toolkit.patching import expert_layers
from toolkit.training import checkpoint
from toolkit.training.accelerator import make_accelerator
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
from toolkit.training.nested import warmup_recipe
from toolkit.training.objectives.base import RunContext, make_objective
from toolkit.training.precision import GradientStep, lower_precision
from toolkit.training.progress import Progress
from toolkit.training.report import line, show
from toolkit.training.resume import RESULT, Start, find_start, prepare_folder, run_folder
from toolkit.training.schedule import make_optimizer, make_scheduler
from toolkit.training.state import load_optimizer, restore_rank, restore_rng, rng_state, write_state
from toolkit.training.tokenizer import load_tokenizer, make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trainer:
    """A run that has been set up; ``fit()`` trains it to the recipe's last step.

    Setting up reads the data, makes or loads tokenizer and model (after the warm-up, if the recipe has one), patches,
    and restores the checkpoint to resume from.

    Args:
        quiet: print nothing.
        nested: part of another run, which has printed its recipe.
    """

    def __init__(self, recipe: Recipe, quiet: bool = False, nested: bool = False) -> None:
        self.recipe = recipe
        self.accelerator = make_accelerator(recipe)
        self._quiet = quiet or not self.accelerator.is_main_process
        if not nested:
            self.log(dump(recipe))
        self.folder = run_folder(recipe)
        start = find_start(recipe)
        self.objective = make_objective(recipe)
        if start is not None:
            self._check_start(start)
        self.log(f"data: {self.objective.describe()}")
        self._warmed_up = self._warm_up(start)

        self.tokenizer = self._make_tokenizer(start)
        set_seed(recipe.seed)
        self.hf_model = self._make_model(start)
        ragged, self.patch_report = patch_model(self.hf_model, recipe.model)
        if start is not None and recipe.model.lora is not None:
            load_adapters(self.hf_model, start.checkpoint)
        self.num_parameters = sum(parameter.numel() for parameter in self.hf_model.parameters())
        self.num_trainable = sum(p.numel() for p in self.hf_model.parameters() if p.requires_grad)
        self.sharded = self._shard_experts(ragged)
        optimizer = make_optimizer(ragged, recipe.optimizer, self._masters, recipe.seed)
        scheduler = make_scheduler(optimizer, recipe.schedule, recipe.train.max_steps)
        self.forward, self.optimizer, self.scheduler = self.accelerator.prepare(ragged, optimizer, scheduler)
        self.ragged: RaggedModel = self.accelerator.unwrap_model(self.forward)
        loss_scaling = recipe.train.mixed_precision == "fp16"
        self.gradients = GradientStep(
            self.accelerator, self.forward, self.optimizer, self.sharded, recipe.optimizer, loss_scaling
        )
        self.objective.bind(self._context())
        # Runs the model: one that cannot take a ragged batch is refused before anything is written.
        self.balancing = Balancing(recipe.train.moe, self.objective.context, self.patch_report)
        self.step, self.seconds, self.num_tokens = 0, 0.0, 0
        self.before_training: dict[str, Any] | None = None
        set_seed(recipe.seed, device_specific=True)
        if start is not None:
            self._restore(start)
        self.accelerator.wait_for_everyone()  # every process has read the folder before one changes it
        if self.accelerator.is_main_process:
            for name in prepare_folder(recipe, start):
                self.log(f"removed {name} of an earlier run")
            write_atomic(self.folder / "recipe.yaml", dump(recipe))
            self.objective.write_report(self.folder)
        roles = ", ".join(f"{count} {role}" for role, count in self.patch_report.roles().items())
        part = f", {self.num_trainable / 1e6:.3f} M trainable" if self.num_trainable != self.num_parameters else ""
        self.log(f"model: {type(self.hf_model).__name__}, {self.num_parameters / 1e6:.2f} M parameters{part}")
        self.log(f"patched: {roles} (numerics: {self.patch_report.numerics})")

    def log(self, text: str) -> None:
        """Print on the main process."""
        if not self._quiet:
            print(text, flush=True)

    def _context(self) -> RunContext:
        return RunContext(
            recipe=self.recipe,
            accelerator=self.accelerator,
            tokenizer=self.tokenizer,
            model=self.ragged,
            initial_model=self._initial_model,
            nested_run=self._nested_run,
            folder=self.folder,
            log=self.log,
        )

    def _warm_up(self, start: Start | None) -> Path | None:
        """Train the warm-up, unless this run is past it; its last checkpoint, None without a warm-up."""
        recipe = warmup_recipe(self.recipe)
        if recipe is None:
            return None
        last = run_folder(recipe) / "checkpoints" / name_of(recipe.train.max_steps)
        if start is not None:
            if not last.is_dir():
                raise ToolkitError(f"{start.checkpoint} was trained from {last}, which is no longer there.")
            return last
        self.log(f"warm-up: {recipe.train.max_steps} steps")
        return self._nested_run(recipe)

    def _nested_run(self, recipe: Recipe) -> Path:
        """Train another recipe inside of this run, or resume it; its last checkpoint."""
        last = run_folder(recipe) / "checkpoints" / name_of(recipe.train.max_steps)
        if recipe.resume_from_checkpoint is False or not last.is_dir():
            train(recipe, self._quiet, nested=True)
        self.accelerator.wait_for_everyone()
        return last

    def _check_start(self, start: Start) -> None:
        before, now = start.state["world_size"], self.accelerator.num_processes
        if before != now:
            raise ToolkitError(f"{start.checkpoint} was written by {before} processes and cannot be resumed by {now}.")
        if start.state["data_fingerprint"] != self.objective.fingerprint:
            raise ToolkitError(
                f"{self.objective.data_changed()} than when {start.checkpoint} was written; resuming needs the same."
            )

    def _make_tokenizer(self, start: Start | None) -> Any:
        if start is not None:
            return load_tokenizer(start.checkpoint, "the checkpoint")
        if self._warmed_up is not None:
            return load_tokenizer(self._warmed_up, "the warm-up")
        recipe, begun = self.recipe, time.monotonic()
        made = make_tokenizer(recipe.tokenizer, recipe.model, self.objective.texts(), recipe.train.max_length)
        self.log(f"tokenizer: {len(made)} tokens, {time.monotonic() - begun:.1f} s")
        return made

    def _initial_model(self) -> "PreTrainedModel":
        """The model that training starts from: after the warm-up, from ``model.name_or_path``, or random."""
        model = self._whole_model()
        lower_precision(model, self.recipe.forward_dtype)
        return model

    def _whole_model(self) -> "PreTrainedModel":
        """The initial model in ``model.dtype``."""
        section = self.recipe.model
        if self._warmed_up is not None:
            model = load_checkpoint(self._warmed_up, section.dtype, "the warm-up")
            model.train()
            return model
        with torch.random.fork_rng():
            set_seed(self.recipe.seed)
            return make_model(section, self.tokenizer, self.recipe.train.max_length)

    def _make_model(self, start: Start | None) -> "PreTrainedModel":
        recipe = self.recipe
        if start is None or recipe.model.lora is not None:
            model = self._whole_model()
        else:
            model = load_checkpoint(start.checkpoint, recipe.forward_dtype, "the checkpoint").train()
        masters = lower_precision(model, recipe.forward_dtype)
        self._masters = None if recipe.train.mixed_precision == "no" else masters
        for tensor in (*model.parameters(), *model.buffers()):
            # Loaded tensors may lie at any address; fresh ones are aligned the same, and bits can depend on it.
            tensor.data = tensor.data.clone()
        return model

    def _shard_experts(self, ragged: RaggedModel) -> ShardedExperts | None:
        section = self.recipe.train.expert_parallel
        if section is None:
            return None
        group, replicas = expert_groups(section.size)
        layers = expert_layers(ragged)
        sharded = shard_experts(ragged, layers, group, chunks=section.chunks, replicas=replicas)
        for parameter in sharded.parameters.values():
            if self._masters is not None and parameter in self._masters:
                self._masters[parameter] = sharded.shard(self._masters[parameter])
        return sharded

    def _whole(self, optimizer: torch.optim.Optimizer | None = None) -> AbstractContextManager[None]:
        """The model with all its experts in every process, as it always is where they are not sharded."""
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
            self.sharded.shard_optimizer(self.optimizer.optimizer)
        self.gradients.load_state_dict(state["loss_scale"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.objective.load_state_dict(state["data"][rank])
        restore_rank(folder, state, rank)
        self.step, self.seconds, self.num_tokens = start.step, state["seconds"], state["num_tokens"]
        self.before_training = state["before_training"]
        self.log(f"resumed from {start.checkpoint}")
        if state["threads"] != torch.get_num_threads():
            self.log(
                f"note: {state['threads']} threads wrote it, {torch.get_num_threads()} resume it; bits may differ from "
                "the uninterrupted run's"
            )

    def fit(self) -> None:
        """Train to ``train.max_steps``, saving as the recipe says and at the end."""
        recipe, last = self.recipe, self.recipe.train.max_steps
        main = self.accelerator.is_main_process
        if recipe.evaluate.do_eval and self.objective.eval_on_start and self.before_training is None:
            self.before_training = self._with_rng_kept(self.evaluate)
            self.log(f"held out, before: {line(self.before_training)}")
        metrics = Metrics(self.folder, self.step, recipe.log.report_to == "tensorboard") if main else None
        recent: deque[tuple[int, float]] = deque(maxlen=20)
        primary = self.objective.primary_metric
        try:
            with Progress(last, self.step, recipe.log.progress_seconds, not self._quiet, primary) as progress:
                while self.step < last:
                    begun = time.perf_counter()
                    rate = self.scheduler.get_last_lr()[0]
                    loss, norm = self.train_step()
                    tokens, values = self.objective.finish()
                    recent.append((tokens, time.perf_counter() - begun))
                    self.seconds += recent[-1][1]
                    self.num_tokens += tokens
                    logged = {
                        "step": self.step,
                        "loss": loss,
                        "learning_rate": rate,
                        "grad_norm": norm,
                        "num_tokens": self.num_tokens,
                        "tokens_per_second": round(tokens / recent[-1][1], 1),
                        **values,
                        **self.balancing.metrics(),
                        **self.gradients.metrics(),
                        "seconds": round(self.seconds, 3),
                    }
                    if metrics is not None:
                        metrics.write(logged)
                    speed = sum(count for count, _ in recent) / sum(seconds for _, seconds in recent)
                    progress.update(self.step, logged[primary], speed)
                    interval = recipe.checkpoint.save_steps
                    if self.step == last or (interval is not None and self.step % interval == 0):
                        if metrics is not None:
                            metrics.sync()
                        self.save()
        finally:
            if metrics is not None:
                metrics.close()
        if main and recipe.log.plot:
            plot_curve(read_metrics(self.folder / METRICS), primary, self.folder, recipe.run_name)

    def _with_rng_kept(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a measure without changing the random numbers that training samples."""
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
                with self.gradients.accumulating(last=index == len(micros) - 1):
                    loss = self.objective.loss(self.forward, micro)
                    total += loss.detach()
                    routers = self.balancing.loss(index)
                    self.gradients.backward(loss if routers is None else loss + routers)
            norm = self.gradients.finish(self.step + 1)
            self.balancing.finish_update()
            updates += 1
        with warnings.catch_warnings():
            # torch takes a first step without updates (all groups dropped) for a wrong order of calls.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.step += 1
        mean = cast(Tensor, self.accelerator.reduce(total / max(updates, 1), "mean"))
        return mean.item(), norm.item()

    def save(self) -> None:
        """Write a checkpoint of this step and remove those that the recipe does not keep."""
        rngs = gather_object([rng_state()])
        positions = gather_object([self.objective.state_dict()])
        with self._whole(self.optimizer.optimizer):
            if self.accelerator.is_main_process:
                folder = self.folder / "checkpoints"
                with checkpoint.writing(folder, self.step) as staging:
                    self._write(staging, rngs, positions)
                checkpoint.prune(folder, self.recipe.checkpoint.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _write(self, staging: Path, rngs: list[Any], positions: list[Any]) -> None:
        save_model(self.hf_model, staging)
        self.tokenizer.save_pretrained(str(staging))
        (staging / "recipe.yaml").write_text(dump(self.recipe), encoding="utf-8")
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "num_tokens": self.num_tokens,
            "before_training": self.before_training,
            "world_size": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "data_fingerprint": self.objective.fingerprint,
            "scheduler": self.scheduler.state_dict(),
            "loss_scale": self.gradients.state_dict(),
            "data": positions,
        }
        write_state(staging / "training", values, self.optimizer.optimizer, self.ragged.model, rngs)

    def result(self) -> dict[str, Any]:
        """What the finished run writes to ``result.json``, with the held-out measure unless the recipe turns it off."""
        lines = read_metrics(self.folder / METRICS)[-20:]
        names = dict.fromkeys(("loss", self.objective.primary_metric))
        result: dict[str, Any] = {
            "run_name": self.recipe.run_name,
            "objective": self.recipe.objective.kind,
            "global_step": self.step,
            "num_parameters": self.num_parameters,
            "num_trainable_parameters": self.num_trainable,
            "num_tokens": self.num_tokens,
            "train_runtime": round(self.seconds, 1),
            "train_tokens_per_second": round(self.num_tokens / max(self.seconds, 1e-9), 1),
            **{name: sum(entry[name] for entry in lines) / max(len(lines), 1) for name in names},
            "numerics": str(self.patch_report.numerics),
            "threads": torch.get_num_threads(),
            "processes": self.accelerator.num_processes,
        }
        if self.recipe.evaluate.do_eval:
            if self.before_training is not None:
                result["before_training"] = self.before_training
            result |= self.evaluate()
        return result


def train(recipe: Recipe, quiet: bool = False, nested: bool = False) -> dict[str, Any]:
    """Run a recipe to its end; returns what it writes to ``result.json``.

    Raises ToolkitError for bad input.
    """
    trainer = Trainer(recipe, quiet, nested)
    try:
        trainer.fit()
        result = trainer.result()
        if trainer.accelerator.is_main_process:
            write_atomic(trainer.folder / RESULT, json.dumps(result, indent=1) + "\n")
            if not quiet:
                show(result, trainer.objective, trainer.folder)
    finally:
        trainer.objective.close()
    return result
