"""A reward model as a reward function: a folder with one score a sequence in ``objective.reward_funcs``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolkit.errors import ToolkitError
from toolkit.packing import in_batches

if TYPE_CHECKING:
    import torch

    from toolkit.config import Recipe


class RewardModelFunction:
    """Scores of prompts with their completions, by a frozen model of transformers' sequence classification.

    As in TRL: messages are rendered by the reward model's own chat template, texts are joined, and no token is added
    before or behind. Common prefixes are computed once.

    Args:
        name: folder, or repository of the Hub.
        field: of the recipe, for errors.

    Raises:
        ToolkitError: there is no such model, it has no head with one score, or no tokenizer.
    """

    def __init__(self, name: str, field: str) -> None:
        from toolkit.loading import find_source
        from toolkit.loading.tokenizer import load_tokenizer
        from toolkit.training.score_model import is_score_model

        source = find_source(name, field=field)
        if not is_score_model(source):
            raise ToolkitError(
                f"{field} must be a function by module:function, or a model with one score a sequence, got '{name}'."
            )
        self._name, self._field = name, field
        self._tokenizer = load_tokenizer(source)
        if self._tokenizer is None:
            raise ToolkitError(f"{field} must be a model with a tokenizer, got '{name}'.")
        self._model: Any = None

    def open(self, recipe: "Recipe", device: "torch.device") -> None:
        """Load the model and patch it, with the numerics of the recipe's."""
        from toolkit.training.reference import Reference
        from toolkit.training.score_model import load_score_model

        model = load_score_model(self._name, recipe.forward_dtype, self._field)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = Reference(model, recipe.model, device).model
        self._batch_tokens = recipe.train.batch_tokens

    def token_ids(self, prompt: Any, completion: Any) -> list[int]:
        """The sequence of a prompt and its completion, texts or messages."""
        from toolkit.chat import render
        from toolkit.chat.tokens import encode

        if isinstance(prompt, str):
            text = prompt + completion
        else:
            text = render(self._tokenizer, [*prompt, *completion])
        return encode(self._tokenizer, text) or [self._tokenizer.eos_token_id]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """A score for each completion."""
        import torch

        from toolkit.training.score_model import sequence_scores

        sequences = [self.token_ids(prompt, one) for prompt, one in zip(prompts, completions, strict=True)]
        scores: list[float] = []
        with torch.no_grad():
            for batch in in_batches(sequences, len, self._batch_tokens):
                scores += sequence_scores(self._model, batch).flatten().tolist()
        return scores
