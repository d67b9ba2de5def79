"""Supervised fine-tuning: completions and the assistant's turns, packed."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from toolkit.chat import ChatTokenizer, has_images, pictured, take_images
from toolkit.config.objective import OfflineSection
from toolkit.errors import ToolkitError
from toolkit.loading import find_source, load_processor
from toolkit.ops import IGNORED
from toolkit.training.epochs import packed_steps
from toolkit.training.examples import Packed
from toolkit.training.formats import SFT_FORMATS, Options, conversations, read
from toolkit.training.formats import options as line_options
from toolkit.training.given import folder_of
from toolkit.training.images import WithImages
from toolkit.training.jsonl import Line
from toolkit.training.objectives.base import MetricAccumulator, Metrics, RunContext
from toolkit.training.objectives.offline import OfflineObjective
from toolkit.training.preparing import Example, Outcome, pictured_example, supervised
from toolkit.training.progress import counted
from toolkit.training.tasks import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.state.batch import RaggedBatch


class SFTSection(OfflineSection):
    """Cross-entropy, packed.

    ``data_files``: lines with ``messages`` (or ``conversations``), or ``prompt`` and ``completion``, as texts or
    messages, or ``text``; ``tools`` and ``chat_template_kwargs`` beside messages are given to the chat template. Texts
    end with the end-of-text token, turns as the template ends them. Messages may have images among their parts (as
    paths relative to the file, or data URLs), which the model's own processor reads.
    """

    supports_gradient_accumulation: ClassVar[bool] = True
    splits_examples: ClassVar[bool] = True

    kind: Literal["sft"] = "sft"
    assistant_only_loss: bool = True
    """Of messages only the assistant's count, each with its end; false counts all (TRL's default). A template with
    ``{% generation %}`` markers says itself what counts."""
    completion_only_loss: bool = True
    """Of prompts with completions only the completion counts; false counts both."""
    loss_type: Literal["nll", "dft"] = "nll"
    """nll: cross-entropy. dft (Wu et al., 2025): each token's is weighed by its probability."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log of the softmax's normaliser (PaLM, 2022)."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on the embeddings in training, uniform within alpha / sqrt(tokens x hidden size) (NEFTune; Jain et al.,
    2023); null adds none."""

    @model_validator(mode="after")
    def _smoothing_fits(self) -> Self:
        if self.loss_type == "dft" and self.label_smoothing_factor:
            raise ValueError(
                "objective.label_smoothing_factor must be 0 with objective.loss_type 'dft', got "
                f"{self.label_smoothing_factor}"
            )
        return self


class MicroBatch(NamedTuple):
    """Rows of a packed batch that predict something that counts, and the share that they have in the update."""

    batch: "RaggedBatch | WithImages"
    rows: "Tensor"
    targets: "Tensor"
    share: float


class SFT(OfflineObjective[SFTSection]):
    """Cross-entropy of the tokens that count, averaged over those of the whole step."""

    formats = SFT_FORMATS

    @property
    def eval_metric(self) -> str:  # type: ignore[override]
        return "eval_loss" if self.task is None else "eval_accuracy_greedy"

    example_type = Example
    of_task, of_file = "problems", "lines"

    def chat_tokenizer(self, eos_token_ids: Iterable[int]) -> ChatTokenizer:
        section = self.section
        return ChatTokenizer(
            self.context.tokenizer,
            chat_template_kwargs=section.chat_template_kwargs,
            assistant_only_loss=section.assistant_only_loss,
            completion_only_loss=section.completion_only_loss,
            eos_token_ids=eos_token_ids,
        )

    def bind(self, context: RunContext) -> None:
        from toolkit.training.noise import add_embedding_noise
        from toolkit.training.rollout import Rollout

        super().bind(context)
        if self.dataset is not None:
            firsts = (conversations(read(line.value, self.formats)) for line in self.dataset.firsts())
            if any(has_images(messages) for first in firsts for messages in first):
                self.require_processor()
        self.check_data()
        train = self.recipe.train
        self.stream = Packed(
            self.sources(context), self.examples, train.batch_tokens, train.per_device_train_batch_size
        )
        self.rollout = Rollout(context, self.section.rollout)
        if self.section.neftune_noise_alpha is not None:
            add_embedding_noise(context.model.model, self.section.neftune_noise_alpha)
        self._tokens = 0

    def prepare(self, source: Problem | Line) -> Outcome:
        if isinstance(source, Problem):
            tokens = self.chat.completion(source.prompt, source.solution)
        else:
            fields, options = read(source.value, self.formats), line_options(source.value)
            if any(map(has_images, conversations(fields))):
                return self._with_images(source, fields, options)
            if "messages" in fields:
                tokens = self.chat.messages(fields["messages"], *options)
            elif "text" in fields:
                tokens = [self.chat.text(fields["text"])]
            else:
                tokens = self.chat.completion(fields["prompt"], fields["completion"], *options)
        return supervised(tokens, self.recipe.train.max_length, self.section.excess_length_strategy)

    def _with_images(self, line: Line, fields: dict[str, Any], options: Options) -> Outcome:
        """A conversation with images, whose tokens are those of the model's processor."""
        (conversation,) = conversations(fields)
        messages, images = take_images(conversation, folder_of(line.path), line.value.get("images"))
        if "messages" in fields:
            tokens = self.chat.messages(messages, *options)
        else:
            first = len(fields["prompt"])
            tokens = self.chat.completion(messages[:first], messages[first:], *options)
        if len(tokens) > 1:
            raise ToolkitError(
                "must have one turn of the assistant beside images with a chat template that rewrites earlier turns, "
                f"got {len(tokens)}."
            )
        made = pictured(self.processor, tokens[0], images)
        return pictured_example(made, self.recipe.train.max_length, self.section.excess_length_strategy)

    def require_processor(self) -> None:
        """Raise ToolkitError, before any line is read, where the model's processor cannot be had."""
        assert self.processor is not None

    @cached_property
    def processor(self) -> Any:
        """The model's own processor. Raises ToolkitError where the model's folder has none."""
        name = self.context.model.model.name_or_path
        found = load_processor(find_source(name, cached=True)) if name else None
        if found is None:
            raise ToolkitError(f"model.name_or_path must have a processor for data with images, got {name!r}.")
        return found

    def shown(self, example: Example) -> tuple[list[int], list[bool]]:
        last = example.targets[-1]
        ids = example.inputs if last == IGNORED else [*example.inputs, last]
        return ids, [False, *(target != IGNORED for target in example.targets)][: len(ids)]

    def num_steps(self, epochs: float) -> int:
        if self.section.max_check_samples is not None:
            raise ToolkitError(
                "objective.max_check_samples must be null with train.num_train_epochs, which needs the length of every "
                f"line, got {self.section.max_check_samples}."
            )
        train, streams = self.recipe.train, self.line_streams(range(self.num_lines))
        return packed_steps(
            self.lengths, streams, epochs, train.batch_tokens, train.gradient_accumulation_steps,
            train.per_device_train_batch_size,
        )  # fmt: skip

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
            logits,
            micro.targets,
            label_smoothing=section.label_smoothing_factor,
            z_loss=section.z_loss,
            dft=section.loss_type == "dft",
        )  # the mean over the micro-batch
        return loss * micro.share

    def rows(self, micro: MicroBatch) -> int:
        return micro.batch.num_tokens if isinstance(micro.batch, WithImages) else len(micro.batch.tokens)

    def finish(self) -> tuple[int, dict[str, float]]:
        return self._tokens, {}

    def evaluate(self) -> Metrics:
        """Held-out loss of a file's completions, or the accuracy on a task."""
        import torch

        from toolkit.patching.eval_mode import eval_mode
        from toolkit.training.losses import next_token_loss
        from toolkit.training.prompt_sources import TaskPrompts
        from toolkit.training.rollout import eval_completions

        evaluation, context = self.section.evaluation, self.context
        if self.task is not None:
            prompts = TaskPrompts(self.task, self.section.task or {}, self.recipe.seed, evaluation.val_set_size)
            prompts.bind(context.tokenizer)
            accuracy = eval_completions(context, self.rollout, prompts, evaluation.max_eval_samples)
            self.rollout.close()
            return accuracy
        assert self.dataset is not None
        lines = self.dataset.held_out[: evaluation.max_eval_samples]
        mine = lines[context.rank :: context.world_size]
        sums = MetricAccumulator({"loss": 0.0, "tokens": 0.0})
        with torch.no_grad(), eval_mode(context.model):
            shown = counted(mine, len(mine), "held out: lines")
            for example in (example for line in shown for example in self.examples(line)):
                micro = _micro([example], 1.0, context)
                mean = next_token_loss(context.model(micro.batch, micro.rows), micro.targets)
                sums.add(loss=mean.item() * example.counted, tokens=example.counted)
        totals = sums.take(context)
        loss = totals["loss"] / totals["tokens"] if totals["tokens"] else math.nan
        return {"eval_samples": len(lines), "eval_num_tokens": int(totals["tokens"]), "eval_loss": loss}

    def show(self, before: Metrics | None, after: Metrics) -> None:
        from toolkit.training.rollout import show_completions

        if self.task is not None:
            show_completions(before, after)
        elif after["eval_num_tokens"]:
            start = f"{before['eval_loss']:.3f} before, " if before else ""
            print(f"held-out loss: {start}{after['eval_loss']:.3f} after ({after['eval_samples']} lines)")

    def close(self) -> None:
        super().close()
        self.rollout.close()


def _micro(pack: Sequence[Example], share: float, context: RunContext) -> MicroBatch:
    """The packed batch of some examples; those with images come behind the others."""
    import torch

    device = context.device
    pack = sorted(pack, key=lambda example: example.media is not None)
    flat = [target for example in pack for target in example.targets]
    rows = [row for row, target in enumerate(flat) if target != IGNORED]
    return MicroBatch(
        _packed(pack, context),
        torch.tensor(rows, device=device),
        torch.tensor([flat[row] for row in rows], device=device),
        share,
    )


def _packed(pack: Sequence[Example], context: RunContext) -> "RaggedBatch | WithImages":
    from toolkit.patching import choose_rotary_lengths
    from toolkit.state.batch import RaggedBatch

    inputs = [example.inputs for example in pack]
    # With the last target: that is the whole sequence.
    rotary = choose_rotary_lengths(context.model.model, [len(one) + 1 for one in inputs])
    pictured = [example.media for example in pack if example.media is not None]
    if pictured:
        return WithImages.on(context.device, inputs[: len(pack) - len(pictured)], pictured, rotary)
    return RaggedBatch.from_sequences(inputs, device=context.device, share=False, rotary_lengths=rotary)
