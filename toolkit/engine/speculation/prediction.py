"""Drafts from the output that a request predicts: ``SamplingParams.predicted_token_ids``."""

from collections.abc import Sequence as Items

from toolkit.engine.request import Sequence
from toolkit.engine.speculation.drafter import Draft


class PredictionDrafter:
    """Drafts what the prediction has where the output follows it, for sequences of requests that have one."""

    seconds_per_token = 0.0

    def propose(self, sequences: Items[Sequence], most: Items[int]) -> list[Draft]:
        return [_draft(one, count) for one, count in zip(sequences, most, strict=True)]

    def observe(self, sequence: Sequence) -> None:
        pass

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass


def _draft(sequence: Sequence, count: int) -> Draft:
    prediction = sequence.prediction
    if prediction is None or not (tokens := prediction.draft(count)):
        return Draft()
    return Draft(tokens, prediction.match, predicted=True)
