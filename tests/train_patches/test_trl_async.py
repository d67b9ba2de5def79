"""The parts of TRL's AsyncGRPOTrainer on a server; ``tests/soak/test_async_grpo.py`` runs it."""

import socket
from types import SimpleNamespace

import pytest
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model
from train_patches.trl_async import async_grpo_trainer
from train_patches.trl_async.transfer import FolderWeightTransfer, ServedWeights

packing = pytest.importorskip("trl.experimental.async_grpo.packing")

PROMPT = [5, 9, 11, 4]
# Two that end with different tokens, the beginning of another, the same twice, another prompt, a conversation whose
# middle is not trained.
SAMPLES = [
    ([*PROMPT, 7, 8, 9], [0] * 4 + [1] * 3),
    ([*PROMPT, 7, 8, 10], [0] * 4 + [1] * 3),
    ([*PROMPT, 7, 8], [0] * 4 + [1] * 2),
    ([*PROMPT, 7, 8], [0] * 4 + [1] * 2),
    ([6, 9, 20, 21], [0, 0, 1, 1]),
    ([*PROMPT, 30, 31, 32, 33, 34], [0] * 4 + [1, 0, 0, 1, 1]),
]


def packed():
    row = packing.TreeRow()
    for at, (tokens, mask) in enumerate(SAMPLES):
        sample = {"input_ids": tokens, "completion_mask": mask, "old_log_probs": [0.0] * len(tokens)}
        row.add({name: torch.tensor(value) for name, value in sample.items()} | {"advantage": 1.0, "group_id": at})
    return row.pack()


def test_a_packed_row_has_the_bits_and_the_gradients_of_its_samples():
    from train_patches.trl_async.forward import TreeForward

    model = random_model("qwen3")
    toolkit.patch(model)
    row = packed()
    forward = TreeForward(model)
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    inputs = {name: row[name].unsqueeze(0) for name in ("input_ids", "position_ids", "shift_labels")}
    output = forward(**inputs, **{name: row[name] for name in names}, fused_lm_head=True)
    found = output.log_probs.flatten()[row["token_index"]]
    weights = torch.linspace(0.5, 2.0, len(found))
    (found * weights).sum().backward()
    grads = {name: one.grad.clone() for name, one in model.named_parameters()}
    model.zero_grad()

    samples = [torch.tensor(tokens) for tokens, _ in SAMPLES]
    masks = [torch.tensor(mask[1:]).bool() for _, mask in SAMPLES]
    alone = [toolkit.token_logprobs(model, [one])[0][mask] for one, mask in zip(samples, masks)]
    expected = torch.cat(alone)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    (expected * weights).sum().backward()
    for name, one in model.named_parameters():
        torch.testing.assert_close(grads[name], one.grad, rtol=1e-4, atol=1e-5)
    logits = model(samples[4].unsqueeze(0)).logits[0, 1].double()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    at = row["token_index"][row["segment_id"] == 4][0]
    assert output.entropy.flatten()[at].item() == pytest.approx(entropy.item(), abs=1e-4)
    for number, (tokens, mask) in enumerate(SAMPLES):  # what identifies a sample
        last = row["token_index"][row["segment_id"] == number][-1]
        assert forward.row.tokens_to(int(last)).tolist() == tokens[: len(mask) - mask[::-1].index(1)]


SETTINGS = {
    "bf16": False, "fp16": False, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None,
    "repetition_penalty": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "arguments", "sentence"),
    [
        ({"bf16": True}, {}, r"args\.bf16 must be False with toolkit serve, got True\."),
        ({"temperature": 0.7}, {}, r"args\.temperature must be 1\.0 with toolkit serve, got 0\.7\."),
        ({}, {"peft_config": 3}, r"peft_config must be None with toolkit serve, got int\."),
    ],
)
def test_settings_that_the_server_s_log_probabilities_do_not_have(settings, arguments, sentence):
    args = SimpleNamespace(**SETTINGS | settings)
    with pytest.raises(ToolkitError, match=sentence):
        async_grpo_trainer("model", args=args, weight_folder="weights", **arguments)


def test_a_silent_server_is_a_sentence(tmp_path):
    with socket.socket() as closed:  # bound, not listening
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        transfer = FolderWeightTransfer(SimpleNamespace(server_url=url), tmp_path, server_timeout=0)
        transfer.check()  # nothing has been sent
        transfer.served = ServedWeights(1, 1)
        with pytest.raises(ToolkitError, match=rf"The server at {url} does not answer \(ConnectionError\): start the"):
            transfer.check()
