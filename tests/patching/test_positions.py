"""Tables of positions that count a token's place in its row."""

import pytest
import torch
from torch import Tensor, nn

from toolkit.numerics import Numerics
from toolkit.patching import patch, token_logprobs
from toolkit.patching.claim import Claim, Skipped
from toolkit.patching.roles import positions
from toolkit.testing.architectures import small_model
from toolkit.testing.coverage.causal import measure


class _Plus2(nn.Embedding):
    def forward(self, input_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
        at = torch.arange(past_key_values_length, past_key_values_length + input_ids.shape[1]) + 2
        return super().forward(at.expand(input_ids.shape[0], -1))


class _OfShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.randn(32, 6))

    @torch.no_grad()
    def forward(self, shape: torch.Size, past_key_values_length: int = 0) -> Tensor:
        return self.table[past_key_values_length : past_key_values_length + shape[1]]


class _Given(nn.Embedding):
    def forward(self, ids: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(past_key_values_length, past_key_values_length + ids.shape[1])
        return super().forward(position_ids[None] * 2)


class _WithoutPadding(nn.Embedding):
    """Padding has no position."""

    def forward(self, input_ids: Tensor, past_key_values_length: int = 0) -> Tensor:
        real = (input_ids != 1).long()
        return super().forward((real.cumsum(1) + past_key_values_length) * real)


@pytest.mark.parametrize("module", [_Plus2(40, 6), _OfShape(), _Given(80, 6)], ids=lambda one: type(one).__name__)
def test_a_table_is_proven(module):
    (claim,) = positions.find(nn.ModuleList([module]), Numerics.BITWISE)
    assert isinstance(claim, Claim)
    assert (claim.role, claim.error.worst()) == ("positions", 0.0)


def test_a_table_that_reads_tokens_is_refused():
    (skipped,) = positions.find(nn.ModuleList([_WithoutPadding(40, 6)]), Numerics.BITWISE)
    assert isinstance(skipped, Skipped)


def test_log_probabilities_are_the_models_own_for_each_sequence():
    model = small_model("bart")
    sequences = [[5, 9, 31, 7, 8], [17, 44, 6]]
    with torch.no_grad():
        expected = []
        for one in sequences:
            logits = model(input_ids=torch.tensor([one]), use_cache=False).logits[0].log_softmax(-1)
            expected.append(logits[:-1].gather(1, torch.tensor(one[1:])[:, None])[:, 0])
        patch(model)
        got = token_logprobs(model, sequences)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "model_type", ["bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus", "plbart"]
)
def test_families_are_covered(model_type):
    row = measure(model_type)
    assert row.verdict == "covered", (row.reason, row)
