"""Supervised fine-tuning: completions only, packed."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from toolkit.config.objective import OfflineSection
from toolkit.errors import ToolkitError
from toolkit.ops import IGNORED
from toolkit.training.examples import Example, Packed, completion_ids, conversation, example_of, prompt_ids
from toolkit.training.objectives.base import MetricAccumulator, Metrics, RunContext
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.tasks import Problem, ProblemStream

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.state.batch import RaggedBatch


class SFTSection(OfflineSection):
    """Cross-entropy of completions only, packed.

    ``data_files``: lines with ``messages``, or ``prompt`` and ``completion``. In a conversation every message of the
    assistant counts, and its end; nothing else does.
    """

    supports_gradient_accumulation: ClassVar[bool] = True

    kind: Literal["sft"] = "sft"
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's normaliser (PaLM, 2022)."""


class MicroBatch(NamedTuple):
    """Rows of a packed batch that predict something that counts, and the share that they have in the update."""

    batch: "RaggedBatch"
    rows: "Tensor"
    targets: "Tensor"
    share: float


class SFT(OfflineObjective[SFTSection]):
    """Cross-entropy of completions, averaged over the completion tokens of the whole step."""

    fields = ({"messages": list}, {"prompt": str, "completion": str})
    of_task, of_file = "problems", "lines"

    @staticmethod
    def text_of(line: dict[str, Any]) -> str:
        if "messages" in line:
            messages = line["messages"]
            return "\n".join(str(message.get("content", "")) for message in messages if isinstance(message, dict))
        return f"{line['prompt']}{line['completion']}"

    def bind(self, context: RunContext) -> None:
        from toolkit.training.rollout import Rollout

        super().bind(context)
        sources = self.sources(context)
        if not any(self.example(one).counted for one in islice(self._some(), 64)):
            raise ToolkitError(
                "objective has no completion in its first 64 examples that begins within train.max_length, which is "
                f"{self.recipe.train.max_length}; raise it."
            )
        self.stream = Packed(sources, self.example, self.recipe.train.batch_tokens)
        self.rollout = Rollout(context, self.section.rollout)
        self._tokens = 0

    def _some(self) -> Iterator[Any]:
        yield from (
            self.dataset.train
            if self.dataset is not None
            else ProblemStream(self.task, self.recipe.seed, self.val_set_size).take(64)  # type: ignore[arg-type]
        )

    def example(self, source: Problem | dict[str, Any]) -> Example:
        """Inputs and targets of a problem or a line."""
        tokenizer, longest = self.context.tokenizer, self.recipe.train.max_length
        if isinstance(source, Problem):
            prompt, completion = source.prompt, source.solution
        elif "messages" in source:
            return conversation(tokenizer, self.section.chat_template, source["messages"], longest)
        else:
            prompt, completion = source["prompt"], source["completion"]
        return example_of(prompt_ids(tokenizer, prompt), completion_ids(tokenizer, completion), longest)

    def updates(self, step: int) -> Iterator[Sequence[MicroBatch]]:
        packs = [self.stream.next_batch() for _ in range(self.recipe.train.gradient_accumulation_steps)]
        counts = [sum(example.counted for example in pack) for pack in packs]
        (total,) = self.context.reduce_sum([sum(counts)])
        self._tokens = int(total)
        yield [
            _micro(pack, count * self.context.world_size / total, self.context) for pack, count in zip(packs, counts)
        ]

    def loss(self, forward: Callable[..., Any], micro: MicroBatch) -> "Tensor":
        from toolkit.training.losses import next_token_loss

        logits = forward(micro.batch, micro.rows)
        section = self.section
        loss = next_token_loss(
            logits, micro.targets, label_smoothing=section.label_smoothing_factor, z_loss=section.z_loss
        )  # the mean over the micro-batch
        return loss * micro.share

    def rows(self, micro: MicroBatch) -> int:
        return len(micro.batch.tokens)

    def finish(self) -> tuple[int, dict[str, float]]:
        return self._tokens, {}

    def evaluate(self) -> Metrics:
        """Held-out loss of a file's completions, or the accuracy on a task."""
        import torch

        from toolkit.patching.eval_mode import eval_mode
        from toolkit.training.losses import next_token_loss
        from toolkit.training.rollout import eval_accuracy

        evaluation, context = self.section.evaluation, self.context
        if self.task is not None:
            accuracy = eval_accuracy(
                context, self.rollout, self.task, evaluation.max_eval_samples, evaluation.val_set_size
            )
            self.rollout.close()
            return accuracy
        assert self.dataset is not None
        lines = self.dataset.held_out[: evaluation.max_eval_samples]
        mine = lines[context.rank :: context.world_size]
        sums = MetricAccumulator({"loss": 0.0, "tokens": 0.0})
        with torch.no_grad(), eval_mode(context.model):
            for example in map(self.example, mine):
                if example.counted:
                    micro = _micro([example], 1.0, context)
                    mean = next_token_loss(context.model(micro.batch, micro.rows), micro.targets)
                    sums.add(loss=mean.item() * example.counted, tokens=example.counted)
        totals = sums.take(context)
        loss = totals["loss"] / totals["tokens"] if totals["tokens"] else math.nan
        return {"eval_samples": len(lines), "eval_num_tokens": int(totals["tokens"]), "eval_loss": loss}

    def show(self, before: Metrics | None, after: Metrics) -> None:
        from toolkit.training.rollout import show_accuracy

        if self.task is not None:
            show_accuracy(before, after)
        elif after["eval_num_tokens"]:
            start = f"{before['eval_loss']:.3f} before, " if before else ""
            print(f"held-out loss: {start}{after['eval_loss']:.3f} after ({after['eval_samples']} lines)")

    def close(self) -> None:
        self.rollout.close()


def _micro(pack: Sequence[Example], share: float, context: RunContext) -> MicroBatch:
    """The packed batch of some examples."""
    import torch

    from toolkit.patching import choose_rotary_lengths
    from toolkit.state.batch import RaggedBatch

    device, inputs = context.device, [example.inputs for example in pack]
    # With the last target: that is the whole sequence.
    rotary = choose_rotary_lengths(context.model.model, [len(one) + 1 for one in inputs])
    flat = [target for example in pack for target in example.targets]
    rows = [row for row, target in enumerate(flat) if target != IGNORED]
    return MicroBatch(
        RaggedBatch.from_sequences(inputs, device=device, share=False, rotary_lengths=rotary),
        torch.tensor(rows, device=device),
        torch.tensor([flat[row] for row in rows], device=device),
        share,
    )
