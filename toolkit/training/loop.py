"""The training loop: a recipe in, a run's folder out. Stands on accelerate.

A run's folder holds recipe.yaml (resolved), metrics.jsonl, tensorboard/, checkpoints/, loss.png
and result.json. With the same recipe, machine, versions, threads and processes, weights after N steps are the
same bits whether or not the run was killed and resumed on the way.
"""

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor

from toolkit.config import Recipe, dump
from toolkit.errors import ToolkitError
from toolkit.state.batch import RaggedBatch
from toolkit.training import checkpoint, corpus
from toolkit.training.data import PackedStream
from toolkit.training.files import write_atomic
from toolkit.training.metrics import FILE as METRICS
from toolkit.training.metrics import Metrics, plot_loss, read_metrics
from toolkit.training.model import RaggedModel, load_checkpoint, make_model, patch_model, without_bars
from toolkit.training.objectives import next_token_loss
from toolkit.training.progress import Progress
from toolkit.training.report import figures, show
from toolkit.training.resume import Start, find_start, prepare_folder, run_folder
from toolkit.training.schedule import make_optimizer, make_scheduler
from toolkit.training.state import load_optimizer, restore_rng, rng_state, save_optimizer
from toolkit.training.tokenizer import load_tokenizer, make_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Trainer:
    """A run that has been set up; ``fit()`` trains it to the recipe's last step.

    Setting up reads the data, makes or loads tokenizer and model, patches, and restores the checkpoint to
    resume from.
    """

    def __init__(self, recipe: Recipe, quiet: bool = False) -> None:
        self.recipe = recipe
        self.accelerator = Accelerator(
            gradient_accumulation_steps=recipe.train.accumulate, step_scheduler_with_optimizer=False
        )
        if self.accelerator.distributed_type not in _DISTRIBUTED:
            raise ToolkitError(
                f"accelerate is set up for {self.accelerator.distributed_type}; allowed are one process and "
                "plain data parallel."
            )
        self._quiet = quiet or not self.accelerator.is_main_process
        self.say(dump(recipe))
        self.folder = run_folder(recipe)
        start = find_start(recipe)
        files = corpus.list_files(recipe.data)
        train_files, self.held_out_files = corpus.split(files, recipe.data.held_out)
        self._fingerprint = corpus.fingerprint(files)
        if start is not None:
            self._check_start(start)
        self.say(f"data: {len(train_files)} files to train on, {len(self.held_out_files)} held out")

        self.tokenizer = self._make_tokenizer(start, train_files)
        set_seed(recipe.seed)
        self.hf_model = self._make_model(start)
        ragged, self.patch_report = patch_model(self.hf_model, recipe.model)
        optimizer = make_optimizer(ragged, recipe.optimizer)
        scheduler = make_scheduler(optimizer, recipe.schedule, recipe.train.steps)
        self.forward, self.optimizer, self.scheduler = self.accelerator.prepare(ragged, optimizer, scheduler)
        self.ragged: RaggedModel = self.accelerator.unwrap_model(self.forward)
        self.stream = PackedStream(
            train_files,
            self.tokenizer,
            batch_tokens=recipe.train.batch_tokens,
            max_length=recipe.train.max_length,
            interleave=recipe.data.interleave,
            seed=recipe.seed,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        with torch.no_grad():  # a model that cannot take a ragged batch is refused before anything is written
            self.ragged(RaggedBatch.from_sequences([[0]], device=self.accelerator.device))
        self.step, self.seconds = 0, 0.0
        set_seed(recipe.seed, device_specific=True)
        if start is not None:
            self._restore(start)
        self.accelerator.wait_for_everyone()  # every process has looked before one changes the folder
        if self.accelerator.is_main_process:
            for name in prepare_folder(recipe, start):
                self.say(f"removed {name} of an earlier run")
            write_atomic(self.folder / "recipe.yaml", dump(recipe))
        self.parameters = sum(parameter.numel() for parameter in self.hf_model.parameters())
        roles = ", ".join(f"{count} {role}" for role, count in self.patch_report.roles().items())
        self.say(f"model: {type(self.hf_model).__name__}, {self.parameters / 1e6:.2f} M parameters")
        self.say(f"patched: {roles} (numerics: {self.patch_report.numerics})")

    def say(self, line: str) -> None:
        """Print on the main process."""
        if not self._quiet:
            print(line, flush=True)

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens of an optimizer step, over all processes."""
        train = self.recipe.train
        return train.batch_tokens * train.accumulate * self.accelerator.num_processes

    def _check_start(self, start: Start) -> None:
        world = self.accelerator.num_processes
        if start.state["world"] != world:
            raise ToolkitError(
                f"{start.checkpoint} was written by {start.state['world']} processes and cannot be resumed by {world}."
            )
        if start.state["files"] != self._fingerprint:
            raise ToolkitError(
                f"data.root '{self.recipe.data.root}' has other files than when {start.checkpoint} was "
                "written; resuming needs the same."
            )

    def _make_tokenizer(self, start: Start | None, train_files: list[corpus.SourceFile]) -> Any:
        if start is not None:
            return load_tokenizer(start.checkpoint, "the checkpoint")
        recipe, begun = self.recipe, time.monotonic()
        made = make_tokenizer(recipe.tokenizer, recipe.model.path, train_files, recipe.train.max_length)
        self.say(f"tokenizer: {len(made)} tokens, {time.monotonic() - begun:.1f} s")
        return made

    def _make_model(self, start: Start | None) -> "PreTrainedModel":
        section = self.recipe.model
        if start is None:
            model = make_model(section, self.tokenizer, self.recipe.train.max_length)
        else:
            model = load_checkpoint(start.checkpoint, getattr(torch, section.dtype), "the checkpoint").train()
        for tensor in (*model.parameters(), *model.buffers()):
            # Loaded tensors may lie at any address; fresh ones are aligned alike, and bits can depend on it.
            tensor.data = tensor.data.clone()
        return model

    def _restore(self, start: Start) -> None:
        state, folder = start.state, start.checkpoint / "training"
        rank = self.accelerator.process_index
        load_optimizer(
            self.optimizer.optimizer, self.ragged.model, folder / "optimizer.safetensors", state["optimizer"]
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.stream.load_state_dict(state["data"][rank])
        tensors = load_file(str(folder / "rng.safetensors"))
        mine = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(f"{rank}/")}
        restore_rng(state["rng"][rank], mine)
        self.step, self.seconds = start.step, state["seconds"]
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
        metrics = Metrics(self.folder, self.step, recipe.log.tensorboard) if main else None
        times: deque[float] = deque(maxlen=20)
        try:
            with Progress(last, self.step, recipe.log.every, not self._quiet) as progress:
                while self.step < last:
                    begun = time.perf_counter()
                    rate = self.scheduler.get_last_lr()[0]
                    loss, norm = self.train_step()
                    times.append(time.perf_counter() - begun)
                    self.seconds += times[-1]
                    speed = self.tokens_per_step * len(times) / sum(times)
                    if metrics is not None:
                        metrics.write(
                            {
                                "step": self.step,
                                "loss": loss,
                                "learning_rate": rate,
                                "gradient_norm": norm,
                                "tokens": self.step * self.tokens_per_step,
                                "tokens_per_second": round(self.tokens_per_step / times[-1], 1),
                                "epoch": self.stream.epoch,
                                "seconds": round(self.seconds, 3),
                            }
                        )
                    progress.update(self.step, loss, speed)
                    every = recipe.checkpoint.every
                    if self.step == last or (every is not None and self.step % every == 0):
                        if metrics is not None:
                            metrics.sync()
                        self.save()
        finally:
            if metrics is not None:
                metrics.close()
        if main and recipe.log.plot:
            plot_loss(read_metrics(self.folder / METRICS), self.folder / "loss.png", recipe.name)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step; returns the mean loss before it (nats per token) and the gradient's norm."""
        total = torch.zeros((), device=self.accelerator.device)
        norm = torch.zeros(())
        for _ in range(self.recipe.train.accumulate):
            batch, targets = self._next_batch()
            with self.accelerator.accumulate(self.forward):
                loss = next_token_loss(self.forward(batch), targets)
                self.accelerator.backward(loss)
                total += loss.detach() / self.recipe.train.accumulate
                if self.accelerator.sync_gradients:
                    norm = self._clip()
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
        self.step += 1
        mean = cast(Tensor, self.accelerator.reduce(total, "mean"))
        return mean.item(), norm.item()

    def _next_batch(self) -> tuple[RaggedBatch, Tensor]:
        packed, device = self.stream.next_batch(), self.accelerator.device
        targets = torch.tensor([token for targets in packed.targets for token in targets], device=device)
        return RaggedBatch.from_sequences(packed.inputs, device=device), targets

    def _clip(self) -> Tensor:
        limit = self.recipe.optimizer.clip
        norm = self.accelerator.clip_grad_norm_(self.forward.parameters(), math.inf if limit is None else limit)
        assert norm is not None
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
        positions = gather_object([self.stream.state_dict()])
        if self.accelerator.is_main_process:
            folder = self.folder / "checkpoints"
            with checkpoint.writing(folder, self.step) as aside:
                self._write(aside, [values for values, _ in rngs], [tensors for _, tensors in rngs], positions)
            checkpoint.prune(folder, self.recipe.checkpoint.keep)
        self.accelerator.wait_for_everyone()

    def _write(
        self, aside: Path, rngs: list[dict[str, Any]], tensors: list[dict[str, Tensor]], positions: list[Any]
    ) -> None:
        with without_bars():
            self.ragged.model.save_pretrained(str(aside))
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
            "world": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "files": self._fingerprint,
            "optimizer": groups,
            "scheduler": self.scheduler.state_dict(),
            "data": positions,
            "rng": rngs,
        }
        (training / "state.json").write_text(json.dumps(state), encoding="utf-8")


def train(recipe: Recipe, quiet: bool = False) -> dict[str, Any]:
    """Run a recipe to its end; returns what it writes to ``result.json``.

    Raises ToolkitError for bad input.
    """
    trainer = Trainer(recipe, quiet)
    trainer.fit()
    result = figures(trainer)
    if trainer.accelerator.is_main_process:
        write_atomic(trainer.folder / "result.json", json.dumps(result, indent=1) + "\n")
        if not quiet:
            show(result, trainer.folder)
    return result
