"""Replaying a routing: no bit changes when it is the model's own, and another one is really taken."""

import copy
import random

import pytest
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.moe.observer import observing
from toolkit.patching.forward import ragged_forward
from toolkit.state.batch import RaggedBatch
from toolkit.testing.models import random_model
from toolkit.testing.oracle import eager, lifted_to_double


def tree(seed: int, count: int = 5) -> list[list[int]]:
    """Completions of one prompt that part at different places, and one alone."""
    source = random.Random(seed)
    stem = [source.randrange(3, 300) for _ in range(24)]
    found = [
        stem[: source.randint(16, 24)] + [source.randrange(3, 300) for _ in range(source.randint(1, 9))]
        for _ in range(count)
    ]
    return [*found, list(found[0]), [source.randrange(3, 300) for _ in range(5)]]


def own_routing(model: torch.nn.Module, sequence: list[int]) -> torch.Tensor:
    """[tokens, L, K]: what the routers choose for a sequence alone."""
    seen: dict[int, torch.Tensor] = {}

    def observer(layer: int, logits: torch.Tensor, ids: torch.Tensor, *_: object) -> None:
        seen[layer] = ids

    with observing(observer), torch.no_grad():
        ragged_forward(model, RaggedBatch.from_sequences([sequence]))
    return torch.stack([seen[layer] for layer in sorted(seen)], 1)


def other_routing(sequence: list[int], layers: int, k: int, experts: int, seed: int) -> torch.Tensor:
    """Random experts of each token, equal where sequences have equal prefixes."""
    rows = []
    for at in range(len(sequence)):
        generator = torch.Generator().manual_seed(hash((seed, *sequence[: at + 1])) % 2**31)
        rows.append(torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(layers)]))
    return torch.stack(rows)


def gradients(model: torch.nn.Module, logprobs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack([(one * torch.linspace(1, 2, len(one)).to(one.dtype)).sum() for one in logprobs]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
def test_the_models_own_routing_changes_no_bit(share: bool) -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    for seed in range(3):
        sequences = tree(seed)
        routing = [own_routing(model, one).int() for one in sequences]
        plain = toolkit.token_logprobs(model, sequences, share=share)
        wanted = gradients(model, plain)
        replayed = toolkit.token_logprobs(model, sequences, share=share, routing=routing)
        assert all(torch.equal(one, other) for one, other in zip(plain, replayed))
        assert all(torch.equal(one, wanted[name]) for name, one in gradients(model, replayed).items())
        # The last token may be missing.
        short = toolkit.token_logprobs(model, sequences, share=share, routing=[one[:-1] for one in routing])
        assert all(torch.equal(one, other) for one, other in zip(plain, short))
        for name, one in gradients(model, short).items():
            torch.testing.assert_close(one, wanted[name], rtol=1e-4, atol=1e-5)


def test_another_routing_is_really_taken() -> None:
    """Against transformers' own forward with its routers' choice replaced, in float64, with all gradients."""
    stock = eager(random_model("qwen3_moe").double())
    model = copy.deepcopy(stock)
    toolkit.patch(model)
    gates = [module for name, module in stock.named_modules() if name.endswith(".gate")]
    current: dict[str, torch.Tensor] = {}

    def forced(layer: int, gate: torch.nn.Module) -> None:
        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = hidden.flatten(0, -2) @ gate.weight.T
            ids = current["routing"][:, layer]
            scores = logits.softmax(-1).gather(1, ids)
            return logits, scores / scores.sum(-1, keepdim=True), ids

        gate.forward = forward  # type: ignore[method-assign, assignment]

    for layer, gate in enumerate(gates):
        forced(layer, gate)
    sequences = tree(7)
    k, experts = stock.config.num_experts_per_tok, gates[0].weight.shape[0]
    routing = [other_routing(one, len(gates), k, experts, 3) for one in sequences]
    with lifted_to_double():
        exact = []
        for sequence, current["routing"] in zip(sequences, routing):
            logits = stock(torch.tensor([sequence]), use_cache=False).logits[0, :-1]
            exact.append(logits.log_softmax(-1).gather(1, torch.tensor(sequence[1:])[:, None])[:, 0])
        wanted = gradients(stock, exact)
        assert RaggedBatch.from_sequences(sequences, routing=routing).multiplicity is not None
        for share in (True, False):
            got = toolkit.token_logprobs(model, sequences, share=share, routing=[one[:-1] for one in routing])
            for one, other in zip(got, exact):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
            found = gradients(model, got)
            assert set(found) == set(wanted)
            for name, gradient in wanted.items():
                assert (found[name] - gradient).norm() <= 1e-10 * gradient.norm(), name


@pytest.mark.parametrize("numerics", ["bitwise", "fast"])
def test_the_ids_that_a_forward_uses_are_the_replayed_ones(numerics: str) -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model, numerics=numerics)
    sequences = tree(2)
    routing = [other_routing(one, 2, 3, 12, 1) for one in sequences]
    batch = RaggedBatch.from_sequences(sequences, routing=routing)
    seen: dict[int, torch.Tensor] = {}

    def observer(layer: int, logits: torch.Tensor, ids: torch.Tensor, *_: object) -> None:
        seen[layer] = ids

    with observing(observer):
        changed = ragged_forward(model, batch)
    rows = batch.sample_rows
    assert rows is not None
    for layer in range(2):
        assert torch.equal(seen[layer][rows], torch.cat([one[:, layer] for one in routing]))
    plain = ragged_forward(model, RaggedBatch.from_sequences(sequences))
    assert (changed + 0.0 - plain).abs().max() > 0.1


def test_sequences_share_rows_only_as_far_as_they_were_routed_alike() -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    first = tree(4)[0]
    sequences = [first, first, first[:-3]]
    routing = [other_routing(one, 2, 3, 12, 1) for one in sequences]
    routing[1] = routing[1].clone()
    routing[1][10:, 0] = (routing[1][10:, 0] + 1) % 12
    routing[2] = routing[2][:-1]
    batch = RaggedBatch.from_sequences(sequences, routing=routing)
    # The third lacks its last token's experts, so that one gets a separate row.
    assert len(batch.tokens) == len(first) + len(first) - 10 + 1
    together = toolkit.token_logprobs(model, sequences, routing=routing)
    for sequence, experts, values in zip(sequences, routing, together):
        assert torch.equal(values, toolkit.token_logprobs(model, [sequence], routing=[experts])[0])
    assert not torch.equal(together[0], together[1])


def test_layers_that_run_again_are_routed_alike() -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    sequences = tree(5)
    routing = [other_routing(one, 2, 3, 12, 9) for one in sequences]
    model.train()
    wanted = gradients(model, toolkit.token_logprobs(model, sequences, routing=routing))
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        found = gradients(model, toolkit.token_logprobs(model, sequences, routing=routing))
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_short_and_empty_sequences() -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    sequences: list[list[int]] = [[], [5], [6, 7]]
    routing = [
        torch.zeros(0, 2, 3, dtype=torch.int64),
        torch.zeros(0, 2, 3, dtype=torch.int16),
        torch.ones(1, 2, 3).int(),
    ]
    values = toolkit.token_logprobs(model, sequences, routing=routing)
    assert [len(one) for one in values] == [0, 0, 1]
    batch = RaggedBatch.from_sequences(sequences, routing=routing)
    assert batch.routing is not None
    assert batch.routing[0].tolist() == [[0, 1, 2], [1, 1, 1], [1, 1, 1]]
    assert RaggedBatch.from_sequences([], routing=[]).routing is None


def test_what_cannot_be_replayed_is_one_sentence() -> None:
    model = random_model("qwen3_moe")
    toolkit.patch(model)
    sequence = [5, 6, 7, 8]
    good = torch.zeros(3, 2, 3, dtype=torch.int64) + torch.arange(3)

    def refused(*routing: torch.Tensor) -> str:
        with pytest.raises(ToolkitError) as caught:
            toolkit.token_logprobs(model, [sequence], routing=routing)
        return str(caught.value)

    assert "routing must have a tensor for each of 1 sequences, got 2." in refused(good, good)
    assert "got shape [2, 2, 3]" in refused(good[:2])
    assert "dtype torch.float32" in refused(good.float())
    assert "experts of routing[0] must be >= 0, got -1." in refused(good - 1)
    assert "experts of a routing must be < 12, got 14." in refused(good + 12)
    assert "topk_ids must be [4, 3], got [4, 2]." in refused(good[..., :2])
    assert "routing must have each of the model's layers of experts, got 1." in refused(good[:, :1])
    assert "in each of its 4 layers, got none for [2, 3]" in refused(good.repeat(1, 2, 1))
    with pytest.raises(ToolkitError, match=r"routing\[1\] must have .* has shape \[3, 2, 3\], got \[1, 1, 3\]"):
        toolkit.token_logprobs(model, [sequence, [5, 6]], routing=[good, good[:1, :1]])
    dense = random_model("llama")
    toolkit.patch(dense)
    with pytest.raises(ToolkitError, match=r"got none for \[0, 1\]\. Replay needs every router patched"):
        toolkit.token_logprobs(dense, [sequence], routing=[good])
