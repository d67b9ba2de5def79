"""On-policy distillation: the student rolls out, and a teacher says at every token what it would have said.

Agarwal et al., "On-Policy Distillation of Language Models", 2024 (generalised knowledge distillation).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.config import Recipe
from toolkit.errors import ToolkitError
from toolkit.ops.linear_logprob.deferred import token_logprobs
from toolkit.state.batch import RaggedBatch
from toolkit.training import checkpoint
from toolkit.training.examples import in_batches
from toolkit.training.model import Reference, load_checkpoint
from toolkit.training.objectives.base import RunContext
from toolkit.training.objectives.functions import jensen_shannon, kl_divergence, with_tail
from toolkit.training.objectives.on_policy import OnPolicyObjective
from toolkit.training.stages import teacher_recipe


class MicroBatch(NamedTuple):
    """Rows whose next token the student drew, for how many completions, and the teacher's likeliest tokens there."""

    batch: RaggedBatch
    rows: Tensor
    counts: Tensor
    candidates: Tensor
    teacher: Tensor
    share: float


class Distillation(OnPolicyObjective):
    """See ``DistillObjective``. The teacher is frozen; what it says is computed once a rollout."""

    headline = "divergence"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._divergence = {
            "forward": lambda teacher, student: kl_divergence(teacher, student),
            "reverse": lambda teacher, student: kl_divergence(student, teacher),
            "jensen_shannon": lambda teacher, student: jensen_shannon(teacher, student, self.section.weight),
        }[self.section.divergence]

    def bind(self, setting: RunContext) -> None:
        super().bind(setting)
        model = load_checkpoint(self._teacher(), getattr(torch, self.recipe.model.dtype), "objective.teacher.path")
        vocabulary, own = (m.get_input_embeddings().num_embeddings for m in (model, setting.model.model))
        if vocabulary != own:
            raise ToolkitError(
                f"objective.teacher has a vocabulary of {vocabulary}; it must be the student's, which is {own}."
            )
        if self.section.top_k >= vocabulary:
            raise ToolkitError(
                f"objective.top_k is {self.section.top_k}; it must be below the vocabulary, {vocabulary}."
            )
        self.teacher = Reference(model, self.recipe.model, setting.device)

    def _teacher(self) -> Path:
        """The folder of the teacher, which is trained first if there is none yet."""
        if self.section.teacher.path is not None:
            return checkpoint.resolve(self.section.teacher.path)
        tokenizer = self.setting.folder / "tokenizer"
        if self.setting.accelerator.is_main_process:
            self.setting.tokenizer.save_pretrained(str(tokenizer))
        self.setting.accelerator.wait_for_everyone()
        self.setting.say(f"teacher: {self.section.teacher.steps} steps")
        return self.setting.child(teacher_recipe(self.recipe, tokenizer))

    def updates(self, step: int) -> Iterator[Sequence[MicroBatch]]:
        self.begin()
        problems, answers = self.roll_out(step, self.section.completions)
        self.count(problems, answers)
        completions = [one for group in answers for one in group]
        # The last token predicts nothing.
        drawn = [([*one.prompt_token_ids, *one.token_ids[:-1]], len(one.token_ids)) for one in completions]
        packs = in_batches(drawn, lambda item: len(item[0]), self.recipe.train.batch_tokens)
        (total,) = self.setting.total([sum(len(one.token_ids) for one in completions)])
        self.trained_tokens = int(total)
        count = self.setting.largest(len(packs))
        micros = [self._micro(pack, self.setting.world / total) for pack in packs]
        micros += [micros[0]._replace(share=0.0) for _ in range(count - len(micros))]
        yield micros

    def _micro(self, pack: Sequence[tuple[list[int], int]], share: float) -> MicroBatch:
        device = self.setting.device
        batch = RaggedBatch.from_sequences([ids for ids, _ in pack], device=device)
        ends = accumulate(len(ids) for ids, _ in pack)
        places = torch.cat([torch.arange(end - drawn, end) for end, (_, drawn) in zip(ends, pack)]).to(device)
        # Where completions begin alike they share rows; what the teacher says there counts for each of them.
        rows, counts = (places if batch.sample_rows is None else batch.sample_rows[places]).unique(return_counts=True)
        logprobs = self.teacher.logits(batch, rows).float().log_softmax(-1)
        best = logprobs.topk(self.section.top_k, dim=-1)
        return MicroBatch(batch, rows, counts, best.indices, best.values, share)

    def loss(self, forward: Callable[..., Any], micro: MicroBatch) -> Tensor:
        logits = forward(micro.batch, micro.rows)
        student, _ = token_logprobs(logits, micro.candidates)
        each = self._divergence(with_tail(micro.teacher.to(student.dtype)), with_tail(student))
        divergence = (each * micro.counts).sum()
        real = float(micro.share > 0.0)
        self.sums.add(divergence=divergence.item() * real, trained=micro.counts.sum().item() * real)
        return divergence * micro.share

    def rows(self, micro: MicroBatch) -> int:
        if not micro.share:
            return 0
        return len(micro.batch.tokens if micro.batch.sample_rows is None else micro.batch.sample_rows)

    def finish(self) -> tuple[int, dict[str, float]]:
        got = self.take()
        return self.trained_tokens, {"divergence": got["divergence"] / got["trained"], **self.figures(got)}
