import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

from toolkit.engine.config import EngineConfig
from toolkit.engine.params import SamplingParams
from toolkit.errors import ToolkitError

BAD = [
    ("n", 0),
    ("n", 1.5),
    ("n", True),
    ("max_tokens", -1),
    ("max_tokens", "16"),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "hot"),
    ("top_k", -2),
    ("top_k", 1.0),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("min_p", -0.01),
    ("min_p", 1.01),
    ("stop", ""),
    ("stop", [""]),
    ("stop", [1]),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", 5),
    ("ignore_eos", 1),
    ("seed", 1.0),
    ("seed", 2**64),
    ("logprobs", -2),
    ("prompt_logprobs", -2),
    ("prompt_logprobs", True),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 1.0}),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", 5),
    ("bad_words", "a"),
    ("bad_words", ["a", ""]),
    ("logits_processors", [1]),
    ("priority", 0.5),
    ("skip_special_tokens", None),
    ("kept_special_tokens", "<s>"),
    ("include_stop_str_in_output", "yes"),
    ("cache_salt", ""),
    ("cache_salt", 7),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 5e-324),
    ("repetition_penalty", 1e30),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_values_are_refused_with_field_bound_and_value(field, value):
    with pytest.raises(ToolkitError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} must be ")
    assert message.endswith(f", got {value!r}.")
    assert "\n" not in message


def test_boundary_values_are_taken():
    SamplingParams(
        n=1, max_tokens=1, min_tokens=1, temperature=0, top_k=-1, top_p=1, min_p=1, seed=-(2**63), logprobs=0
    )
    SamplingParams(max_tokens=None, min_tokens=100, presence_penalty=-2, frequency_penalty=2, seed=2**64 - 1)
    assert SamplingParams(max_tokens=np.int64(4)).max_tokens == 4
    assert type(SamplingParams(temperature=np.float32(0.5)).temperature) is float


def test_other_errors_of_changed_logits():
    with pytest.raises(ToolkitError, match=r"^logit_bias\[3\] must be a finite number .*, got nan\.$"):
        SamplingParams(logit_bias={3: float("nan")})
    with pytest.raises(ToolkitError, match=r"^allowed_token_ids must have >= 1 token ids or be None, got none\.$"):
        SamplingParams(allowed_token_ids=[])


def test_unknown_fields_are_refused_with_the_nearest():
    with pytest.raises(ToolkitError, match="SamplingParams has no argument 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=1.0)
    with pytest.raises(ToolkitError, match="it has n, max_tokens"):
        SamplingParams(zzzzzz=1)
    with pytest.raises(ToolkitError, match="by name"):
        SamplingParams(1)


def test_values_are_normalised_and_copies_are_equal():
    params = SamplingParams(stop="a", stop_token_ids=[1, 2], temperature=1)
    assert (params.stop, params.stop_token_ids) == (("a",), (1, 2))
    assert isinstance(params.temperature, float)
    for other in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), replace(params)):
        assert other == params
    assert replace(params, max_tokens=3).max_tokens == 3
    with pytest.raises(ToolkitError):
        replace(params, max_tokens=-1)


def test_greedy_and_penalised():
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy
    assert not SamplingParams().penalised
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", 0.1), ("frequency_penalty", -0.1)):
        assert SamplingParams(**{name: value}).penalised


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 0),
        ("max_model_len", 1),
        ("block_size", 0),
        ("num_blocks", 0),
        ("num_blocks", 2.0),
        ("swap_space", -1),
        ("swap_space", "4"),
        ("enable_prefix_caching", 1),
        ("seed", -1),
    ],
)
def test_bad_limits_are_refused(field, value):
    with pytest.raises(ToolkitError, match=rf"^{field} must be .*, got {value!r}\.$"):
        EngineConfig.check(**{field: value})


def test_unknown_limits_are_refused_with_the_nearest():
    with pytest.raises(ToolkitError, match="Engine has no argument 'max_num_seq'; did you mean 'max_num_seqs'"):
        EngineConfig.check(max_num_seq=3)
