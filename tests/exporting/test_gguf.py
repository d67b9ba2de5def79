"""GGUF files: llama.cpp computes the model that was exported, in every format within its rounding."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tokenizers import make_tokenizer
from toolkit.errors import ToolkitError
from toolkit.exporting import MANIFEST, export
from toolkit.loading import load_model
from toolkit.patching import patch
from toolkit.testing.models import random_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("libgguf", reason="needs libgguf, which writes K-quants")
pytest.importorskip("xllamacpp", reason="needs xllamacpp, which opens GGUF files")

from tests.helpers.llama_cpp import differences, served  # noqa: E402

VOCABULARY = 340
EXACT = 2e-4
"""Largest difference of a log-probability between two float32 implementations of these models."""
TABLE = 5e-4
"""The same where GELU is looked up: an argument next to a float16 boundary takes its neighbour's value."""
ACTIVATIONS = 0.1
"""The same where inputs of linear layers are rounded to 8 bits: a value between two takes the other one."""
GEMMA3 = {
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}
NEXT = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def sharpened(model: Any) -> Any:
    """Weights so large that logits differ clearly, and norms that are no ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(2)
    return model


def make(family: str, hidden: int = 48, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if family in ("llama", "qwen3", "qwen3_moe", "lfm2", "mistral") and not changes:
        return sharpened(random_model(family, hidden=hidden, vocabulary=VOCABULARY))
    common = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    sizes = GEMMA3 if family == "gemma3_text" else {**common, "max_position_embeddings": 128}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": VOCABULARY, "hidden_size": hidden}
    config = AutoConfig.for_model(family, **{**ids, **sizes, **changes})
    return sharpened(AutoModelForCausalLM.from_config(config).eval())


def sequences(count: int = 2, length: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(5, VOCABULARY, (count, length), generator=generator).tolist()


def use_llama_cpps_gelu(model: Any) -> None:
    """On a CPU llama.cpp looks GELU up in a table of float16 values of float16 arguments."""
    for layer in model.model.layers:
        exact = layer.mlp.act_fn
        layer.mlp.act_fn = torch.nn.Identity()
        layer.mlp.act_fn.forward = lambda x, exact=exact: exact(x.half().float()).half().float()


def rounded_activations(x: torch.Tensor, form: str) -> torch.Tensor:
    """To bfloat16, or to 8 bits: a float16 scale for each 32, beside K-quants a float32 scale for each 256."""
    if form == "bf16":
        return x.bfloat16().float()
    blocks = x.unflatten(-1, (-1, 256 if form in ("q4_k", "q6_k") and x.shape[-1] % 256 == 0 else 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    whole = (blocks / scale.clamp(min=1e-30)).round()
    return (whole * (scale if blocks.shape[-1] == 256 else scale.half().float())).flatten(-2)


CASES = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "llama, linear rope": ("llama", {"rope_parameters": ROPE["linear"]}),
    "llama, yarn": ("llama", {"rope_parameters": ROPE["yarn"]}),
    "llama 3's rope": ("llama", {"rope_parameters": ROPE["llama3"]}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": ROPE["yarn"], "head_dim": 24}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma3_text": ("gemma3_text", {}),
    "lfm2": ("lfm2", {}),
    "qwen3_next": ("qwen3_next", NEXT),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_model(case, tmp_path):
    family, changes = CASES[case]
    model = make(family, **changes)
    with served(export(model, tmp_path / "out", "gguf", make_tokenizer(), "f32")) as server:
        if family == "gemma3_text":
            use_llama_cpps_gelu(model)
        seen = differences(server, model, sequences(1, 56 if "rope" in case or "yarn" in case else 32), EXACT)
    assert seen.largest < (TABLE if family == "gemma3_text" else EXACT), seen
    assert seen.other_argmax == 0
    assert seen.decided > seen.positions / 2, seen


def test_a_patched_model_exports_the_same_file(tmp_path):
    model, tokenizer = make("qwen3"), make_tokenizer()
    before = export(model, tmp_path / "before", "gguf", tokenizer, "q8_0") / "model.gguf"
    patch(model)
    after = export(model, tmp_path / "after", "gguf", tokenizer, "q8_0") / "model.gguf"
    assert before.read_bytes() == after.read_bytes()


HEADS = {"q5_k": "Q6_K", "q4_k": "Q6_K", "q4_0": "Q6_K"}
# Largest error of a value beside the largest of its block of 32 or 256: half a step of the format, K-quants with the
# error of their quantised scales and minima.
ROUNDING = {
    "bf16": 2**-8,
    "f16": 2**-11,
    "q8_0": 0.5 / 127 + 2**-10,
    "q6_k": 0.04,
    "q5_k": 0.05,
    "q4_k": 0.1,
    "q4_0": 0.13,
}


@pytest.mark.parametrize("form", ROUNDING)
def test_weights_are_those_of_the_model_within_the_rounding_of_the_format(form, tmp_path):
    model = random_model("llama", hidden=256, vocabulary=VOCABULARY)
    path = export(model, tmp_path / "out", "gguf", make_tokenizer(), form)
    tensors = {one.name: one for one in gguf.GGUFReader(path / "model.gguf").tensors}
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    assert tensors["output.weight"].tensor_type.name == {"q5_k": "Q6_K", "q4_k": "Q6_K", "q4_0": "Q6_K"}.get(
        form, form.upper()
    )
    ours = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    one = tensors["blk.0.ffn_up.weight"]
    assert one.tensor_type.name == form.upper()
    theirs = gguf.quants.dequantize(one.data, one.tensor_type).astype(np.float32).reshape(ours.shape)
    blocks = (
        np.abs(ours).reshape(-1, 32 if form in ("q8_0", "q4_0") else 256 if "_k" in form else 1).max(-1, keepdims=True)
    )
    error = np.abs(theirs - ours).reshape(blocks.shape[0], -1) / np.maximum(
        blocks, 2.0**-14
    )  # the smallest normal float16
    assert 0 < error.max() < ROUNDING[form]


@pytest.mark.parametrize("form", ["bf16", "q8_0", "q6_k", "q4_k"])
def test_llama_cpp_computes_the_rounded_model(form, tmp_path):
    """The oracle: the file's weights in float32, and inputs of linear layers rounded as llama.cpp rounds them."""
    torch.manual_seed(0)
    model = random_model("llama", hidden=256, vocabulary=VOCABULARY)
    path = export(model, tmp_path / "out", "gguf", make_tokenizer(), form)
    rounded = load_model(str(path / "model.gguf"))[0]
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs: (rounded_activations(inputs[0], form),))
    with served(path) as server:
        seen = differences(server, rounded, sequences(1, 24), ACTIVATIONS)
    assert 0 < seen.largest < ACTIVATIONS, seen
    assert seen.other_argmax == 0


def test_rows_that_blocks_do_not_divide_get_the_next_format(tmp_path):
    model = random_model("llama", hidden=48, vocabulary=VOCABULARY)  # neither 256 nor 32 divides 48
    path = export(model, tmp_path / "out", "gguf", make_tokenizer(), "q4_k")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "F16"  # rows of 48
    with served(path) as server:
        assert differences(server, model, sequences(1, 8), 0.0).largest < 0.5


def test_what_llama_cpp_generates_is_in_the_manifest(tmp_path):
    model = make("llama")
    prompts = sequences(2, 9)
    path = export(model, tmp_path / "out", "gguf", make_tokenizer(), "f32", prompts, 8)
    proof = json.loads((path / MANIFEST).read_text())["proof"]
    assert proof["consumer"].startswith("xllamacpp ")
    for prompt, output in zip(prompts, proof["outputs"]):
        made = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0
        )
        assert made[0, len(prompt) :].tolist() == output


@pytest.mark.parametrize("family", ["llama", "qwen2", "lfm2"])
def test_the_file_opens_here_again_and_may_be_patched(family, tmp_path):
    model, tokenizer = make(family), make_tokenizer()
    path = export(model, tmp_path / "out", "gguf", tokenizer, "f32")
    again, its_tokenizer = load_model(str(path / "model.gguf"))
    ids = torch.tensor(sequences(1, 24))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        patch(again)
        assert (again(ids).logits - model(ids).logits).abs().max() < 1e-3
    text = "the quick brown fox 0123456789 says hello.\n\nno"
    assert its_tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_short_prompt_after_a_long_one_sees_nothing_of_it(tmp_path):
    model = make("gemma3_text", hidden=64)
    path = export(model, tmp_path / "out", "gguf", make_tokenizer(), "f32")
    with served(path) as server:
        alone = server.generate([3, 4], 6)
    with served(path) as server:
        server.generate(sequences(1, 20)[0], 6)
        assert server.generate([3, 4], 6) == alone


REFUSED = [
    ("gpt_neox", {}, "model_type must be one of llama, .*got 'gpt_neox'"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window of qwen2 must be null"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act of llama must be one of silu, swish, got 'gelu'"),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts": 4}, "norm_topk_prob of qwen3_moe must be true"),
    ("gemma3_text", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar of gemma3_text must be the head size"),
    (
        "llama",
        {"rope_parameters": {**ROPE["linear"], "rope_type": "dynamic"}},
        "rope_type must be one of",
    ),
    (
        "llama",
        {"rope_parameters": {**ROPE["yarn"], "attention_factor": 0.5}},
        "attention_factor must be null, as llama.cpp takes",
    ),
    ("qwen3_next", NEXT | {"linear_value_head_dim": 12}, "linear_value_head_dim of qwen3_next must be linear_key_head"),
    (
        "qwen3_next",
        NEXT | {"layer_types": ["full_attention", "linear_attention", "linear_attention"]},
        "layer_types must repeat with",
    ),
    ("llama", {"eos_token_id": [2, 5, 6, 7]}, "at most 3 tokens that end a text, got"),
]


@pytest.mark.parametrize(("family", "changes", "sentence"), REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(family, changes, sentence, tmp_path):
    with pytest.raises(ToolkitError, match=sentence):
        export(make(family, **changes), tmp_path / "out", "gguf", make_tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ToolkitError, match="tokenizer must be given for an export to 'gguf'"):
        export(make("llama"), tmp_path / "out", "gguf")
