"""Values of every sort at the public parameters: each works, or is one short sentence that names the field."""

from dataclasses import fields

import numpy as np
import pytest

from toolkit import LLM, Engine, PoolingParams, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.llm import BeamSearchParams, LoRARequest
from toolkit.testing.models import random_model, tiny_tokenizer

HUGE = 10**5000  # Python refuses to write it, and no float holds it
VALUES = [
    HUGE, -HUGE, 2**63, float("nan"), float("inf"), True, None, "", "x", b"x", "\ud800", [], {}, [None], [HUGE], [""],
    ["\ud800"], {1: HUGE}, {1: float("nan")}, {HUGE: 1.0}, np.array([1, 2]), np.array([]), np.float32(0.5), object,
]  # fmt: skip


def refused(call):
    """Whether a call raises ToolkitError, which must be short; other errors are not caught."""
    try:
        call()
    except ToolkitError as error:
        return len(str(error)) < 600
    return False


@pytest.mark.parametrize("made", [SamplingParams, PoolingParams, BeamSearchParams], ids=lambda one: one.__name__)
def test_a_bad_value_is_one_short_sentence(made):
    needed = {"beam_width": 2, "max_tokens": 2} if made is BeamSearchParams else {}
    for field in fields(made):
        wrong = [refused(lambda: made(**{**needed, field.name: value})) for value in VALUES]  # noqa: B023
        assert sum(wrong) > len(VALUES) // 3, field.name


@pytest.mark.parametrize("field", ["n", "best_of"])
def test_sequences_that_take_all_memory_are_refused(field):
    with pytest.raises(ToolkitError, match=f"^{field} must be an integer >= 1 and <= 16384.*, got 9223372036854775808"):
        SamplingParams(**{field: 2**63})


@pytest.mark.parametrize("form", [{"regex": "a"}, {"grammar": "a"}, {"choice": ["a"]}, {"json": {"const": "a"}}])
def test_forms_have_no_lone_surrogates(form):
    ((kind, given),) = form.items()
    bad = {"const": "\ud800"} if kind == "json" else ["\ud800"] if kind == "choice" else "\ud800"
    with pytest.raises(ToolkitError, match=rf"^structured_outputs.{kind}: text must be Unicode without .* got U\+D800"):
        SamplingParams(structured_outputs={kind: bad})
    assert SamplingParams(structured_outputs={kind: given}).form is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speculative_config": {"num_speculative_tokens": HUGE}}, "num_speculative_tokens of .*<= 65536"),
        ({"speculative_config": {"prompt_lookup_min": HUGE, "prompt_lookup_max": HUGE}}, "prompt_lookup_max of"),
        ({"speculative_config": {"method": "draft_model", "model": 5}}, "model of .* a model that is loaded, got 5"),
        ({"speculative_config": {"method": "draft_model", "model": "a/b"}}, "that is loaded, got 'a/b'; toolkit.LLM"),
        ({"kinds": 5}, "kinds must be a dictionary of state kinds or None, got 5"),
        ({"kinds": {"full": 5}}, "kinds must be a dictionary of state kinds or None, got {'full': 5}"),
        ({"swap_space": HUGE}, "swap_space must be a finite number >= 0, got an integer of 16610 bits"),
    ],
)  # fmt: skip
def test_bad_arguments_of_an_engine(given, message):
    with pytest.raises(ToolkitError, match=message):
        Engine(random_model("llama", layers=1), **given)


def test_adapters_have_names_and_folders(tmp_path):
    engine = Engine(random_model("llama", layers=1), max_model_len=32)
    for name in (None, 5, "", ["a"]):
        with pytest.raises(ToolkitError, match="lora_name must be text that is not empty, got"):
            engine.load_adapter(name, tmp_path)
        with pytest.raises(ToolkitError, match="lora_name must be"):
            engine.unload_adapter(name)
    for folder in (None, 5):
        with pytest.raises(ToolkitError, match="adapter must be the path of a folder, got"):
            engine.load_adapter("a", folder)
    engine.close()
    with pytest.raises(ToolkitError, match="the engine is closed"):
        engine.load_adapter("a", tmp_path)


def test_calls_of_llm_name_what_is_wrong():
    with LLM(random_model("llama", layers=1), tiny_tokenizer()) as llm:
        two = BeamSearchParams(beam_width=2, max_tokens=2)
        for call, message in [
            (lambda: llm.chat(None), "messages must be a conversation or a list of them, got None"),
            (lambda: llm.chat("x"), "messages must be a conversation or a list of them, got 'x'"),
            (lambda: llm.chat([5]), "messages of a conversation must be a list of mappings, got 5"),
            (lambda: llm.chat([{"role": "user", "content": "x"}, 5]), "'messages' is not a list of mappings"),
            (lambda: llm.beam_search("a", None), "params must be BeamSearchParams, got None"),
            (lambda: llm.beam_search([[3] * 9999], two), "prompt must have <= 511 tokens"),
            (lambda: llm.beam_search([[999]], two), r"from 0 to 330, got 999\.$"),
            (lambda: BeamSearchParams(beam_width=2, max_tokens=2, length_penalty=1e9), "length_penalty must be"),
            (lambda: llm.generate("a", lora_request=5), "lora_request must be a LoRARequest, a list of them or None"),
            (lambda: llm.generate("a", lora_request="a"), "lora_request must be a LoRARequest, a list of them or None"),
            (lambda: llm.generate("a", lora_request=LoRARequest(["a"], 1, "b")), "lora_request must be a LoRARequest"),
            (lambda: LLM(None), "model must be a folder, a GGUF file or org/name, got None"),
            (lambda: LLM(random_model("llama"), runner="x"), "runner must be one of auto, generate, pooling, got 'x'"),
            (lambda: LLM(random_model("llama"), runner="pooling", num_blocks=4), "PoolingEngine has no argument"),
        ]:  # fmt: skip
            with pytest.raises(ToolkitError, match=message):
                call()
    with LLM(random_model("llama", layers=1), tiny_tokenizer(), runner="pooling") as llm:
        for texts in ((None, "b"), ("a", 5)):
            with pytest.raises(ToolkitError, match="text_1 and text_2 must be texts or lists of texts, got"):
                llm.score(*texts)
        with pytest.raises(ToolkitError, match="pooling_params must be PoolingParams, a list of them or None, got 5"):
            llm.embed("a", 5)
