"""Supervised fine-tuning: completions only, packed."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from toolkit.config import Recipe
from toolkit.config.objective import SftObjective
from toolkit.errors import ToolkitError
from toolkit.patching.eval_mode import eval_mode
from toolkit.state.batch import RaggedBatch
from toolkit.training.examples import Example, Packed, completion_ids, conversation, example_of, prompt_ids
from toolkit.training.objectives.base import MetricAccumulator, RunContext
from toolkit.training.objectives.functions import next_token_loss
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.rollout import Rollout, show_success, success
from toolkit.training.tasks import Problem, ProblemStream


class MicroBatch(NamedTuple):
    """Rows of a packed batch that predict something that counts, and the share that they have in the update."""

    batch: RaggedBatch
    rows: Tensor
    targets: Tensor
    share: float


class Supervised(OfflineObjective):
    """Cross-entropy of completions, averaged over the completion tokens of the whole step."""

    fields = ({"messages": list}, {"prompt": str, "completion": str})
    of_task, of_file = "problems", "lines"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.section = cast(SftObjective, recipe.objective)

    @staticmethod
    def text_of(line: dict[str, Any]) -> str:
        if "messages" in line:
            messages = line["messages"]
            return "\n".join(str(message.get("content", "")) for message in messages if isinstance(message, dict))
        return line["prompt"] + line["completion"]

    def bind(self, setting: RunContext) -> None:
        super().bind(setting)
        sources = self.sources(setting)
        if not any(self.example(one).counted for one in islice(self._some(), 64)):
            raise ToolkitError(
                "objective has no completion in its first 64 examples that begins within train.max_length, which is "
                f"{self.recipe.train.max_length}."
            )
        self.stream = Packed(sources, self.example, self.recipe.train.batch_tokens)
        self.rollout = Rollout(setting, self.section.rollout)
        self._tokens = 0

    def _some(self) -> Iterator[Any]:
        yield from (
            self.lines.train
            if self.lines is not None
            else ProblemStream(cast(Any, self.task), self.recipe.seed, self.share).take(64)
        )

    def example(self, source: Problem | dict[str, Any]) -> Example:
        """Inputs and targets of a problem or a line."""
        tokenizer, longest = self.setting.tokenizer, self.recipe.train.max_length
        if isinstance(source, Problem):
            prompt, completion = source.prompt, source.solution
        elif "messages" in source:
            return conversation(tokenizer, self.section.chat_template, source["messages"], longest)
        else:
            prompt, completion = source["prompt"], source["completion"]
        return example_of(prompt_ids(tokenizer, prompt), completion_ids(tokenizer, completion), longest)

    def updates(self, step: int) -> Iterator[Sequence[MicroBatch]]:
        packs = [self.stream.next_batch() for _ in range(self.recipe.train.accumulate)]
        counts = [sum(example.counted for example in pack) for pack in packs]
        (total,) = self.setting.total([sum(counts)])
        self._tokens = int(total)
        yield [
            micro_of(pack, count * self.setting.world / total, self.setting.device)
            for pack, count in zip(packs, counts)
        ]

    def loss(self, forward: Callable[..., Any], micro: MicroBatch) -> Tensor:
        logits = forward(micro.batch, micro.rows)
        section = self.section
        loss = next_token_loss(
            logits, micro.targets, label_smoothing=section.label_smoothing, z_loss=section.z_loss
        )  # the mean over the micro-batch
        return loss * micro.share

    def rows(self, micro: MicroBatch) -> int:
        return len(micro.batch.tokens)

    def finish(self) -> tuple[int, dict[str, float]]:
        return self._tokens, {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out loss of a file's completions, or a task's success."""
        evaluation, setting = self.section.evaluation, self.setting
        if self.task is not None:
            found = success(setting, self.rollout, self.task, evaluation.problems, evaluation.held_out)
            self.rollout.close()
            return found
        assert self.lines is not None
        mine = self.lines.held_out[: evaluation.problems][setting.rank :: setting.world]
        sums = MetricAccumulator({"loss": 0.0, "tokens": 0.0})
        with eval_mode(setting.model):
            for example in map(self.example, mine):
                if example.counted:
                    micro = micro_of([example], 1.0, setting.device)
                    mean = next_token_loss(setting.model(micro.batch, micro.rows), micro.targets)
                    sums.add(loss=mean.item() * example.counted, tokens=example.counted)
        totals = sums.take(setting)
        loss = totals["loss"] / totals["tokens"] if totals["tokens"] else math.nan
        return {"lines": len(self.lines.held_out[: evaluation.problems]), "tokens": int(totals["tokens"]), "loss": loss}

    def show(self, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
        if self.task is not None:
            show_success(before, after)
        elif after["tokens"]:
            start = f"{before['loss']:.3f} before, " if before else ""
            print(f"held-out loss: {start}{after['loss']:.3f} after ({after['lines']} lines)")

    def close(self) -> None:
        self.rollout.close()


def micro_of(pack: Sequence[Example], share: float, device: torch.device) -> MicroBatch:
    """The packed batch of some examples."""
    flat = [target for example in pack for target in example.targets]
    rows = [row for row, target in enumerate(flat) if target >= 0]
    return MicroBatch(
        RaggedBatch.from_sequences([example.inputs for example in pack], device=device, share=False),
        torch.tensor(rows, device=device),
        torch.tensor([flat[row] for row in rows], device=device),
        share,
    )
