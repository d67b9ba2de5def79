"""What ``toolkit watch`` shows of a step beside its metrics: completions, the engine's blocks, tokens of each expert.

``details.jsonl`` in the run's folder has a line for every ``log.details_steps``-th step that has any of them:

    step         as in metrics.jsonl
    completions  the first ``log.num_completions``: prompt, completion, reward (null where there is none), tokens,
                 logprob (nats, of the whole completion under the weights that sampled it) and finish_reason
    groups       the blocks of the engine and its prefix tree (``engine.block_map``) in the middle of the step's first
                 round of rollouts
    expert_load  a list for each MoE layer: tokens of the step that each expert had
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolkit.config.outputs import LogSection

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.engine import Engine
    from toolkit.engine.outputs import Completion

FILE = "details.jsonl"


class StepDetails:
    """Gathers the details of the steps that have a line. Only a process that writes metrics gathers any.

    Args:
        section: ``log`` of the recipe.
    """

    def __init__(self, section: LogSection) -> None:
        self._section = section
        self._wanted = False
        self._found: dict[str, Any] = {}

    def begin(self, step: int) -> None:
        """``step`` is the next one."""
        every = self._section.details_steps
        self._wanted = every is not None and (step - 1) % every == 0
        self._found = {}

    def add_completions(
        self,
        prompts: Sequence[str],
        completions: "Sequence[Sequence[Completion]]",
        rewards: Sequence[Sequence[float]],
    ) -> None:
        """Completions of each prompt and their rewards, as a round of rollouts gives them."""
        if not self._wanted:
            return
        kept = self._found.setdefault("completions", [])
        for prompt, group, values in zip(prompts, completions, rewards):
            for one, reward in zip(group, values):
                if len(kept) == self._section.num_completions:
                    return
                kept.append(
                    {
                        "prompt": prompt,
                        "completion": one.text,
                        "reward": reward,
                        "tokens": len(one.logprobs),
                        "logprob": sum(one.logprobs),
                        "finish_reason": one.finish_reason,
                    }
                )

    def add_blocks(self, engine: "Engine") -> None:
        """The engine's blocks, in the middle of a rollout; the first of a step count."""
        if self._wanted and "groups" not in self._found:
            from toolkit.engine.block_map import block_maps

            self._found["groups"] = block_maps(engine)

    def add_expert_load(self, loads: "Sequence[Tensor]") -> None:
        """[experts] tokens of each layer's, over all processes."""
        if self._wanted and loads:
            self._found["expert_load"] = [load.tolist() for load in loads]

    def take(self) -> dict[str, Any]:
        """What was found of the step; empty where there is nothing to write."""
        found, self._found = self._found, {}
        return found
