"""Supervised fine-tuning: completions only, packed."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from toolkit.config import Recipe
from toolkit.config.objective import SftObjective
from toolkit.errors import ToolkitError
from toolkit.state.batch import RaggedBatch
from toolkit.training.examples import (
    Example,
    Lines,
    LineStream,
    Packed,
    Stream,
    completion_ids,
    conversation,
    example_of,
    prompt_ids,
)
from toolkit.training.objectives.base import TOKENIZER_PROBLEMS, Objective, Setting, Sums
from toolkit.training.objectives.functions import next_token_loss
from toolkit.training.rollout import Rollout, show_success, success
from toolkit.training.tasks import Problem, ProblemStream, make_task

FIELDS = ({"messages": list}, {"prompt": str, "completion": str})


class Micro(NamedTuple):
    """Rows of a packed batch that predict something that counts, and the share that they have in the update."""

    batch: RaggedBatch
    rows: Tensor
    targets: Tensor
    share: float


class Supervised(Objective):
    """Cross-entropy of completions, averaged over the completion tokens of the whole step."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.section = cast(SftObjective, recipe.objective)
        self.task = make_task(self.section.task) if self.section.task is not None else None
        share = self.section.evaluation.held_out
        self.lines = Lines(self.section.data, share, FIELDS) if self.section.data is not None else None
        self.fingerprint = self.lines.fingerprint if self.lines is not None else repr(self.section.task)

    def describe(self) -> str:
        if self.lines is not None:
            return f"{len(self.lines.train)} lines to train on, {len(self.lines.held_out)} held out"
        return f"problems of {self.section.task}, {self.section.evaluation.held_out:.0%} of them held out"

    def texts(self) -> Iterable[str]:
        if self.task is not None:
            stream = ProblemStream(self.task, self.recipe.seed, self.section.evaluation.held_out)
            return [problem.prompt + problem.solution for problem in stream.take(TOKENIZER_PROBLEMS)]
        assert self.lines is not None
        return [_text_of(line) for line in self.lines.train]

    def bind(self, setting: Setting) -> None:
        super().bind(setting)
        section, share = self.section, self.section.evaluation.held_out
        stream: Stream
        if self.task is not None:
            stream = ProblemStream(self.task, self.recipe.seed, share, rank=setting.rank, world=setting.world)
        else:
            assert self.lines is not None
            stream = LineStream(self.lines.train, self.recipe.seed, rank=setting.rank, world=setting.world)
        if not any(self.example(one).counted for one in islice(self._some(), 64)):
            raise ToolkitError(
                "objective has no completion in its first 64 examples that begins within train.max_length, which is "
                f"{self.recipe.train.max_length}."
            )
        self.stream = Packed(stream, self.example, self.recipe.train.batch_tokens)
        self.rollout = Rollout(setting, section.rollout)
        self._tokens = 0

    def _some(self) -> Iterator[Any]:
        yield from (
            self.lines.train
            if self.lines is not None
            else ProblemStream(cast(Any, self.task), self.recipe.seed, self.section.evaluation.held_out).take(64)
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

    def updates(self, step: int) -> Iterator[Sequence[Micro]]:
        packs = [self.stream.next_batch() for _ in range(self.recipe.train.accumulate)]
        counts = [sum(example.counted for example in pack) for pack in packs]
        (total,) = self.setting.total([sum(counts)])
        self._tokens = int(total)
        yield [
            micro_of(pack, count * self.setting.world / total, self.setting.device)
            for pack, count in zip(packs, counts)
        ]

    def loss(self, forward: Callable[..., Any], micro: Micro) -> Tensor:
        logits = forward(micro.batch, micro.rows)
        section = self.section
        loss = next_token_loss(
            logits, micro.targets, label_smoothing=section.label_smoothing, z_loss=section.z_loss
        )  # the mean over the micro-batch
        return loss * micro.share

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
        sums = Sums({"loss": 0.0, "tokens": 0.0})
        setting.model.eval()
        for example in map(self.example, mine):
            if example.counted:
                micro = micro_of([example], 1.0, setting.device)
                mean = next_token_loss(setting.model(micro.batch, micro.rows), micro.targets)
                sums.add(loss=mean.item() * example.counted, tokens=example.counted)
        setting.model.train()
        totals = sums.take(setting)
        loss = totals["loss"] / totals["tokens"] if totals["tokens"] else math.nan
        return {"lines": len(self.lines.held_out[: evaluation.problems]), "tokens": int(totals["tokens"]), "loss": loss}

    def show(self, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
        if self.task is not None:
            show_success(before, after)
        elif after["tokens"]:
            start = f"{before['loss']:.3f} before, " if before else ""
            print(f"held-out loss: {start}{after['loss']:.3f} after ({after['lines']} lines)")

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def close(self) -> None:
        self.rollout.close()


def micro_of(pack: Sequence[Example], share: float, device: torch.device) -> Micro:
    """The packed batch of some examples."""
    flat = [target for example in pack for target in example.targets]
    rows = [row for row, target in enumerate(flat) if target >= 0]
    return Micro(
        RaggedBatch.from_sequences([example.inputs for example in pack], device=device, share=False),
        torch.tensor(rows, device=device),
        torch.tensor([flat[row] for row in rows], device=device),
        share,
    )


def _text_of(line: dict[str, Any]) -> str:
    if "messages" in line:
        return "\n".join(str(message.get("content", "")) for message in line["messages"] if isinstance(message, dict))
    return line["prompt"] + line["completion"]
