"""TRL's ``rollout_func``: a user's function makes the completions that a policy is trained on."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from toolkit.engine.outputs import Completion
from toolkit.errors import ToolkitError
from toolkit.patching import sequence_readings
from toolkit.patching.eval_mode import eval_mode
from toolkit.training.objectives.base import RunContext
from toolkit.training.readings import Reading
from toolkit.training.tasks.base import call_checked, imported

if TYPE_CHECKING:
    from toolkit.training.prompts import Prompts

REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
_FIELD = "objective.rollout_func"


@dataclass(slots=True)
class GivenCompletion(Completion):
    """A completion of a user's function. ``logprobs`` are of the model's tokens alone.

    Args:
        sampled: for each of ``token_ids`` whether the model sampled it; None for all.
        columns: for reward functions.
    """

    sampled: list[bool] | None = None
    columns: dict[str, Any] = field(default_factory=dict)


class RolloutTrainer:
    """What a function is given in the place of TRL's ``GRPOTrainer``: those attributes of it that a rollout reads.

    Args:
        context: of the run.
        prompts: whose tokens ``_tokenize_prompts`` makes.

    Attributes:
        model: the model in training, patched.
        processing_class: the tokenizer.
        accelerator: of the run.
        args: ``num_generations``, ``max_completion_length``, ``temperature``, ``seed``, ``max_steps``, ``output_dir``
            and the fields of the recipe's section ``objective``.
        state: ``global_step``, counted from 0, and ``max_steps``.
        generation_config: of transformers; what completions are sampled by.
        eos_token_ids: tokens that end a completion.
        num_generations, max_completion_length, temperature: as in ``args``.
    """

    def __init__(self, context: RunContext, prompts: "Prompts") -> None:
        from transformers import GenerationConfig

        from toolkit.training.model import eos_token_ids

        recipe, section = context.recipe, context.recipe.objective
        rollout: Any = section.rollout  # type: ignore[attr-defined]
        self._prompts = prompts
        self._problems: list[Any] = []
        self.model: Any = context.model.model
        self.processing_class = context.tokenizer
        self.accelerator = context.accelerator
        self.num_generations: int = section.num_generations  # type: ignore[attr-defined]
        self.max_completion_length: int = rollout.max_completion_length
        self.temperature: float = rollout.temperature
        self.eos_token_ids = eos_token_ids(self.model)
        self.generation_config = GenerationConfig(
            max_new_tokens=self.max_completion_length, do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0,
            eos_token_id=self.eos_token_ids, pad_token_id=context.tokenizer.pad_token_id,
        )  # fmt: skip
        self.args = SimpleNamespace(
            **{name: getattr(section, name) for name in type(section).model_fields},
            max_completion_length=self.max_completion_length,
            temperature=self.temperature,
            seed=recipe.seed,
            max_steps=recipe.train.max_steps,
            output_dir=str(context.folder),
        )
        self.state = SimpleNamespace(global_step=0, max_steps=recipe.train.max_steps)

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """As TRL's: token ids of each prompt; no images."""
        problems = self._problems if len(prompts) == len(self._problems) else [self._problems[0]] * len(prompts)
        return [self._prompts.encode(prompt, one) for prompt, one in zip(prompts, problems)], None, {}


class RolloutFunction:
    """Calls ``objective.rollout_func`` and checks what it returns.

    Raises:
        ToolkitError: the function cannot be imported, raises, or returns something else than TRL asks for.
    """

    def __init__(self, name: str, context: RunContext, prompts: "Prompts") -> None:
        self._name, self._context, self._prompts = name, context, prompts
        self._function = imported(name, _FIELD, "a function")
        if not callable(self._function):
            raise ToolkitError(f"{_FIELD} must be a function, got '{name}'.")
        self.trainer = RolloutTrainer(context, prompts)

    def __call__(self, problems: Sequence[Any], step: int) -> list[list[GivenCompletion]]:
        """``num_generations`` completions of each problem.

        Args:
            step: counted from 0.
        """
        trainer, several = self.trainer, self.trainer.num_generations
        repeated = [problem for problem in problems for _ in range(several)]
        trainer._problems, trainer.state.global_step = repeated, step
        prompts = [copy.deepcopy(self._prompts.prompt(problem)) for problem in repeated]
        with call_checked(f"the function {self._name}", "a step's prompts", passing=(ToolkitError,)):
            output = self._function(prompts, trainer)
        found = self._checked(output, len(repeated))
        return [found[at : at + several] for at in range(0, len(found), several)]

    def _checked(self, output: Any, count: int) -> list[GivenCompletion]:
        where = f"the function {self._name}"
        missing = [name for name in REQUIRED if not isinstance(output, Mapping) or name not in output]
        if missing:
            raise ToolkitError(f"{where} must return a mapping with {', '.join(REQUIRED)}, got none of {missing}.")
        lists = {name: output[name] for name in (*REQUIRED, "env_mask") if output.get(name) is not None}
        lists = {name: value.tolist() if hasattr(value, "tolist") else list(value) for name, value in lists.items()}
        for name, value in lists.items():
            if len(value) != count:
                raise ToolkitError(f"{where} must return {count} of {name}, one for each prompt, got {len(value)}.")
        prompts, completions = ([[int(token) for token in ids] for ids in lists[name]] for name in REQUIRED[:2])
        most = self._context.recipe.train.max_length
        for at, (prompt, completion) in enumerate(zip(prompts, completions)):
            if not prompt or not completion or len(prompt) + len(completion) > most:
                raise ToolkitError(
                    f"{where} must return prompts and completions of at least a token each and of at most {most} "
                    f"(train.max_length) together, got {len(prompt)} and {len(completion)} in the entry {at}."
                )
        masks = [[bool(one) for one in mask] for mask in lists["env_mask"]] if "env_mask" in lists else [None] * count
        sampled = lists["logprobs"] if "logprobs" in lists else self._logprobs(prompts, completions)
        columns = {name: value for name, value in output.items() if name not in (*REQUIRED, "env_mask")}
        found = []
        for at, (prompt, completion, mask, logprobs) in enumerate(zip(prompts, completions, masks, sampled)):
            values = [float(value[0] if isinstance(value, (list, tuple)) else value) for value in logprobs]
            if len(values) != len(completion) or (mask is not None and len(mask) != len(completion)):
                raise ToolkitError(
                    f"{where} must return logprobs and env_mask with a value for each of {len(completion)} tokens of a "
                    f"completion, got {len(values)} and {len(mask or ())} in the entry {at}."
                )
            values = values if mask is None else [value for value, own in zip(values, mask) if own]
            own = {name: value[at] if isinstance(value, list) else value for name, value in columns.items()}
            found.append(self._completion(at, prompt, completion, values, mask, own))
        return found

    def _completion(
        self, at: int, prompt: list[int], ids: list[int], logprobs: list[float], mask: list[bool] | None,
        columns: dict[str, Any],
    ) -> GivenCompletion:  # fmt: skip
        trainer = self.trainer
        text = str(trainer.processing_class.decode(ids, skip_special_tokens=True))
        return GivenCompletion(
            -1, at // trainer.num_generations, at % trainer.num_generations, prompt, ids, logprobs, logprobs, text,
            "stop" if ids[-1] in trainer.eos_token_ids else "length", sampled=mask, columns=columns,
        )  # fmt: skip

    @torch.no_grad()
    def _logprobs(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """By the training forward, where the function does not know them."""
        model = self._context.model.model
        sequences = [prompt + completion for prompt, completion in zip(prompts, completions)]
        with eval_mode(model):
            read, last = Reading(self.trainer.temperature), [len(completion) for completion in completions]
            values = sequence_readings(model, sequences, read, last=last)[0]
        return [one.tolist() for one in values]
