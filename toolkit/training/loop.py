"""The training loop: a recipe in, a run's folder out. Stands on accelerate.

What is minimised is the recipe's objective (``toolkit.training.objectives``); this loop owns all else. A run's folder
holds recipe.yaml (resolved), data_report.txt, metrics.jsonl, details.jsonl, tensorboard/, checkpoints/, plots/,
export/, result.json, and ``warmup`` and ``teacher`` of nested runs. With the same recipe, machine, versions, threads
and processes, weights after N steps are bitwise identical whether or not the run was killed and resumed.
"""

import math
import signal
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from torch import Tensor

from toolkit.config import Recipe, dump
from toolkit.errors import ToolkitError
from toolkit.exporting.completeness import checkpoint_folder
from toolkit.files import write_atomic
from toolkit.loading import processor_files
from toolkit.loading.run import name_of
from toolkit.strict_json import strict_json
from toolkit.training import checkpoint
from toolkit.training.accelerator import make_accelerator
from toolkit.training.adapters import check_added_tokens
from toolkit.training.averaging import AveragedWeights
from toolkit.training.best import Measures
from toolkit.training.epochs import in_steps
from toolkit.training.final_exports import check_exports, write_exports
from toolkit.training.indexers import IndexerTraining, freeze_indexers
from toolkit.training.loggers import check_loggers
from toolkit.training.measuring import load_best, measure, name_best
from toolkit.training.metrics import FILE as METRICS
from toolkit.training.metrics import Metrics, plot_curve, read_metrics
from toolkit.training.model import RaggedModel, checkpoint_layers, patch_model
from toolkit.training.moe import Balancing
from toolkit.training.nested import warmup_recipe
from toolkit.training.objectives.base import RunContext, make_objective
from toolkit.training.progress import Progress, showing
from toolkit.training.report import about_model, line, result_of, show
from toolkit.training.resume import RESULT, Start, check_start, find_start, prepare_folder, run_folder
from toolkit.training.run_state import restore_run, write_averaged, write_run
from toolkit.training.schedule import advance, make_scheduler
from toolkit.training.signals import Interrupted, StopRequest
from toolkit.training.start_model import StartModel
from toolkit.training.state import rng_kept, rng_state
from toolkit.training.strategies import make_strategy
from toolkit.training.tokenizer import load_tokenizer, make_tokenizer


class Trainer:
    """A run that has been set up; ``fit()`` trains it to the recipe's last step.

    Setting up reads the data, makes or loads tokenizer and model (after the warm-up, if the recipe has one), patches,
    and restores the checkpoint to resume from.

    Args:
        quiet: print nothing.
        nested: part of another run, which has printed its recipe.
        stop: asked to stop, the run saves a checkpoint at the next step boundary and raises ``Interrupted``.
    """

    def __init__(
        self, recipe: Recipe, quiet: bool = False, nested: bool = False, stop: StopRequest | None = None
    ) -> None:
        self.recipe, self.stop = recipe, StopRequest() if stop is None else stop
        check_exports(recipe)
        check_loggers(recipe)
        self.accelerator = make_accelerator(recipe)
        self._quiet = quiet or not self.accelerator.is_main_process
        if not nested:
            self.log(dump(recipe))
        self.folder = run_folder(recipe)
        self._start = start = find_start(recipe)
        self._prepared = False
        with self._showing():
            self.objective = make_objective(recipe)
        if start is not None:
            check_start(start, self.objective)
        self.log(f"data: {self.objective.describe()}")
        self._warmed_up = self._warm_up(start)

        with self._showing():
            self.tokenizer = self._make_tokenizer(start)
        set_seed(recipe.seed)
        self._start_model = StartModel(recipe, self.tokenizer, self.objective.head, self._warmed_up)
        self.hf_model, self._masters = self._start_model.make(start, self.log)
        self.processor_files = processor_files(checkpoint_folder(self.hf_model))
        saved = None if start is None else start.checkpoint
        ragged, self.patch_report = patch_model(self.hf_model, recipe.model, saved)
        if recipe.model.lora is not None:
            check_added_tokens(self.hf_model, recipe.tokenizer.added_tokens)
        if recipe.train.gradient_checkpointing:
            checkpoint_layers(self.hf_model)
        idle = None if recipe.train.indexer_loss_coef else freeze_indexers(self.hf_model, self.patch_report)
        if idle is not None:
            self.log(f"frozen: {idle}")
        self.num_parameters = sum(parameter.numel() for parameter in self.hf_model.parameters())
        self.num_trainable = sum(p.numel() for p in self.hf_model.parameters() if p.requires_grad)
        self.strategy = strategy = make_strategy(recipe, self.accelerator)
        strategy.wrap(ragged, self._masters)
        self.forward, self.optimizer, self.gradients = strategy.forward, strategy.optimizer, strategy.gradients
        self.ragged: RaggedModel = strategy.ragged
        with self._showing():
            self.objective.bind(self._context())
        self.recipe = recipe = in_steps(recipe, self.objective)
        self.scheduler = self.accelerator.prepare(
            make_scheduler(self.optimizer.optimizer, recipe.schedule, recipe.train.max_steps)
        )
        # Runs the model: one that cannot take a ragged batch is refused before anything is written.
        with strategy.inference():
            self.balancing = Balancing(recipe.train.moe, self.objective.context, self.patch_report)
            self.indexers = IndexerTraining(recipe.train.indexer_loss_coef, self.objective.context, self.patch_report)
        decay = recipe.train.ema_decay
        self.averaged = None if decay is None else AveragedWeights(self.hf_model, decay, strategy)
        self.step, self.seconds, self.num_tokens = 0, 0.0, 0
        self._saved = 0 if start is None else start.step
        self._stopping = False
        self.before_training: dict[str, Any] | None = None
        self.measured: tuple[int, dict[str, Any]] | None = None  # by the weights as they are after that step
        self.measures = Measures(recipe.evaluate, self.objective.eval_metric)
        set_seed(recipe.seed, device_specific=not recipe.train.distributed.same_data)
        if start is not None:
            restore_run(self, start)
        self._prepare_folder()
        if self.accelerator.is_main_process:
            write_atomic(self.folder / "recipe.yaml", dump(recipe))
            self.objective.write_report(self.folder)
        for text in about_model(self):
            self.log(text)

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
            initial_model=self._start_model.initial,
            nested_run=self._nested_run,
            folder=self.folder,
            log=self.log,
            stop=self.stop,
            gathered=self.strategy.inference,
            whole=self.strategy.whole,
            averaged=self._average_applied,
            same_data=self.recipe.train.distributed.same_data,
        )

    def _prepare_folder(self) -> None:
        """Make the folder this run's: from here on a run that is interrupted is resumed, not started again."""
        if self._prepared:
            return
        self._prepared = True
        self.accelerator.wait_for_everyone()  # every process has read the folder before one changes it
        if self.accelerator.is_main_process:
            for name in prepare_folder(self.recipe, self._start):
                self.log(f"removed {name} of an earlier run")
        self.stop.started = True

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
            self._prepare_folder()
            train(recipe, self._quiet, nested=True, stop=self.stop)
        self.accelerator.wait_for_everyone()
        return last

    def _make_tokenizer(self, start: Start | None) -> Any:
        if start is not None:
            return load_tokenizer(start.checkpoint, "the checkpoint")
        if self._warmed_up is not None:
            return load_tokenizer(self._warmed_up, "the warm-up")
        recipe, begun = self.recipe, time.monotonic()
        made = make_tokenizer(recipe.tokenizer, recipe.model, self.objective.texts(), recipe.train.max_length)
        self.log(f"tokenizer: {len(made)} tokens, {time.monotonic() - begun:.1f} s")
        return made

    def evaluate(self) -> dict[str, Any]:
        """The objective's held-out measure. All processes must call it."""
        with self._average_applied(), self.strategy.inference(), self._showing():
            return self.objective.evaluate()

    def _showing(self) -> AbstractContextManager[None]:
        """Inside, what takes long is shown on the main process."""
        return showing(self.recipe.log.progress_seconds, None if self._quiet else self.log)

    def _average_applied(self) -> AbstractContextManager[None]:
        """Inside, the model has the moving average of its weights, where the recipe asks for one."""
        return nullcontext() if self.averaged is None else self.averaged.applied()

    def fit(self) -> None:
        """Train to ``train.max_steps``, saving as the recipe says and at the end.

        Raises:
            Interrupted: a signal asked to stop, and the last step done is saved.
        """
        recipe, last, main = self.recipe, self.recipe.train.max_steps, self.accelerator.is_main_process
        if recipe.evaluate.do_eval and self.objective.eval_on_start and self.before_training is None:
            with rng_kept():
                self.before_training = self.evaluate()
            self.log(f"held out, before: {line(self.before_training)}")
        if self.measures.owed(self.step):
            measure(self)
        name_best(self)
        metrics = Metrics(recipe, self.folder, self.step, self.objective.context.details) if main else None
        recent: deque[tuple[int, float]] = deque(maxlen=20)
        primary = self.objective.primary_metric
        try:
            with (
                self.stop.deferred(),
                Progress(last, self.step, recipe.log.progress_seconds, not self._quiet, primary) as progress,
            ):
                while self.step < last and not self.measures.stopped:
                    begun, position = time.perf_counter(), self._position()
                    rate = self.scheduler.get_last_lr()[0]
                    try:
                        loss, norm = self.train_step()
                    except Interrupted:  # in a rollout, before the weights changed
                        self._save_once(metrics, position)
                        raise self._interruption() from None
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
                        **self.indexers.metrics(),
                        **self.gradients.metrics(),
                        "seconds": round(self.seconds, 3),
                    }
                    improved = False
                    if self.measures.due(self.step):
                        try:
                            measured, improved = measure(self)
                        except Interrupted:  # in a rollout; it is measured when the run resumes
                            self._save_once(metrics)
                            raise self._interruption() from None
                        logged |= {name: value for name, value in measured.items() if isinstance(value, (int, float))}
                    if metrics is not None:
                        metrics.write(logged)
                    speed = sum(count for count, _ in recent) / sum(seconds for _, seconds in recent)
                    progress.update(self.step, logged[primary], speed)
                    interval = recipe.checkpoint.save_steps
                    due = self.step == last or (interval is not None and self.step % interval == 0)
                    if due or self.measures.stopped or (improved and recipe.evaluate.load_best_model_at_end):
                        self._save_once(metrics)
                        name_best(self)
                    if self._stopping or (self.accelerator.num_processes == 1 and self.stop.requested):
                        self._save_once(metrics)
                        raise self._interruption()
        finally:
            if metrics is not None:
                metrics.close()
        if self.measures.stopped:
            self.log(f"stopped after step {self.step}: {self.measures.describe()}")
        load_best(self)
        write_averaged(self)
        if main and recipe.log.plot:
            plot_curve(read_metrics(self.folder / METRICS), primary, self.folder, recipe.run_name)

    def _position(self) -> tuple[Any, Any]:
        """What a checkpoint holds of this process alone: its generators, and where it is in the data."""
        return rng_state(), self.objective.state_dict()

    def _interruption(self) -> Interrupted:
        """Said by the main process before any other one ends, at which a launcher would end them all."""
        if self.accelerator.is_main_process:
            self.stop.announce()
        self.accelerator.wait_for_everyone()
        return self.stop.interruption()

    def _save_once(self, metrics: Metrics | None, position: tuple[Any, Any] | None = None) -> None:
        """Save this step, unless it is saved or there is nothing of it."""
        if self.step > self._saved:
            if metrics is not None:
                metrics.sync()
            self.save(position)

    def train_step(self) -> tuple[float, float]:
        """One step; returns its mean loss over its updates, and the gradient's norm at the last of them.

        Updates that were skipped are left out of the mean, which is NaN where all were.
        """
        total = torch.zeros((), device=self.accelerator.device)
        norm = torch.zeros(())
        updates = done = 0
        for micros in self.objective.updates(self.step):
            self.balancing.begin(micros, self.objective.rows)
            self.indexers.begin(micros, self.objective.rows)
            of_update = torch.zeros_like(total)
            for index, micro in enumerate(micros):
                with self.gradients.accumulating(last=index == len(micros) - 1):
                    loss = self.objective.loss(self.forward, micro)
                    of_update += loss.detach()
                    for auxiliary in (self.balancing.loss(index), self.indexers.loss(index)):
                        loss = loss if auxiliary is None else loss + auxiliary
                    self.gradients.backward(loss)
            norm = self.gradients.finish(self.step + 1, of_update)
            self.balancing.finish_update(self.gradients.updated)
            updates += 1
            if self.gradients.updated:
                done += 1
                total += of_update
            else:
                self.log(f"step {self.step + 1} skipped: loss {of_update:.4g}, gradient norm {norm:.4g}")
        if done or not updates:
            advance(self.scheduler)
            if self.averaged is not None:
                self.averaged.update()
        else:
            total += math.nan
        self.step += 1
        self.objective.stepped(self.step)
        # The processes stop after the same step, whichever of them was asked to.
        asked = torch.full_like(total, float(self.stop.requested))
        means = cast(Tensor, self.accelerator.reduce(torch.stack([total / max(done, 1), asked]), "mean"))
        mean, stopping = means.tolist()
        if stopping:
            self.stop.accept(signal.SIGTERM)
        self._stopping = bool(stopping)
        return mean, norm.item()

    def save(self, position: tuple[Any, Any] | None = None) -> None:
        """Write a checkpoint of this step and remove those that the recipe does not keep.

        Args:
            position: of this process when the step ended; None where that is now.
        """
        own = self._position() if position is None else position
        gathered = self.objective.context.gather_objects(own)
        rngs, positions = [rng for rng, _ in gathered], [data for _, data in gathered]
        averages = None if self.averaged is None else self.averaged.whole()
        with self.strategy.saving() as optimizer:
            if optimizer is not None:
                folder = self.folder / "checkpoints"
                with checkpoint.writing(folder, self.step) as staging:
                    write_run(self, staging, rngs, positions, optimizer, averages)
                checkpoint.prune(folder, self.recipe.checkpoint.save_total_limit, self.measures.best_step)
        self._saved = self.step
        self.accelerator.wait_for_everyone()


def train(recipe: Recipe, quiet: bool = False, nested: bool = False, stop: StopRequest | None = None) -> dict[str, Any]:
    """Run a recipe to its end; returns what it writes to ``result.json``. Arguments as for ``Trainer``.

    Raises:
        ToolkitError: bad input.
        Interrupted: ``stop`` was asked to stop the run, which resumes with ``resume_from_checkpoint=true``.
    """
    trainer = Trainer(recipe, quiet, nested, stop)
    try:
        trainer.fit()
        result = result_of(trainer)
        if trainer.accelerator.is_main_process:
            write_atomic(trainer.folder / RESULT, strict_json(result, indent=1) + "\n")
            if not quiet:
                show(result, trainer.objective, trainer.folder)
            if recipe.export:
                result["exports"] = write_exports(trainer)
                write_atomic(trainer.folder / RESULT, strict_json(result, indent=1) + "\n")
        trainer.accelerator.wait_for_everyone()
    finally:
        trainer.objective.close()
    return result
