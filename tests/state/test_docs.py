"""docs/state.md: its example kind passes the contract tests, and serves an engine."""

import re
from pathlib import Path

import pytest
import test_pool as contract
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.state import kinds

TEXT = (Path(__file__).parents[2] / "docs" / "state.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.fixture
def example():
    names: dict = {}
    try:
        for block in BLOCKS:
            exec(block, names)
        yield names
    finally:
        kinds.StateKind._registry.pop("int8", None)


def test_the_example_is_as_long_as_it_says(example) -> None:
    (kind,) = [block for block in BLOCKS if "class Int8Attention" in block]
    lines = [line for line in kind.split("class ")[1].splitlines() if line.strip()]
    (said,) = re.findall(r"Those (\d+) lines", TEXT)
    assert len(lines) == int(said)


def test_the_example_kind_passes_the_contract_tests(example) -> None:
    for check, cases in (
        (contract.test_step_by_step_equals_all_at_once, [()]),
        (contract.test_writes_after_a_fork_stay_apart, [(0,), (3,), (4,), (10,)]),
        (contract.test_truncate_and_continue_equals_never_having_run_further, [(0,), (4,), (6,)]),
        (contract.test_a_prefix_hit_continues_as_if_it_had_been_computed, [()]),
        (contract.test_swap_is_identity_in_any_free_blocks, [()]),
        (contract.test_sleep_frees_the_memory_and_wake_allocates_it, [()]),
        (contract.test_bytes_are_those_of_its_blocks, [()]),
    ):
        for case in cases:
            check(contract.Sequences("int8"), *case)
    sequences = contract.Sequences("int8")
    tables, rows = sequences.block_manager.new_block_tables(None), sequences.rows(9, 0)
    sequences.append(tables, rows)
    for read, given in zip(sequences.read(tables), rows):
        assert (read - given).abs().max() <= given.abs().amax() / 250


def test_an_engine_on_the_example_kind_is_close_to_the_model(example) -> None:
    model, output = example["model"], example["output"]
    expected = toolkit.token_logprobs(model, [output.prompt_token_ids + output.token_ids])[0][3:].detach()
    torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=0, atol=0.1)
    with toolkit.Engine(model) as engine:
        assert example["bytes_int8"] < 0.35 * engine.pool.bytes
    prompts = [list(range(3, 3 + n)) for n in (20, 9, 31)]
    params = toolkit.SamplingParams(max_tokens=12, ignore_eos=True, seed=1, n=2)
    outcomes = []
    for limits in ({}, {"block_size": 4, "num_blocks": 14, "max_num_batched_tokens": 8, "swap_space": None}):
        with toolkit.Engine(model, kinds={"full": "int8"}, **limits) as engine:
            outcomes.append([(one.token_ids, one.logprobs) for one in engine.generate(prompts, params)])
    assert outcomes[0] == outcomes[1]


def test_an_unknown_kind_is_refused(example) -> None:
    with pytest.raises(ToolkitError, match=r"state kind must be one of .*, got 'int4'"):
        toolkit.Engine(example["model"], kinds={"full": "int4"})
    with pytest.raises(ToolkitError, match="a key of kinds must be one of full, got 'latent'"):
        toolkit.Engine(example["model"], kinds={"latent": "int8"})
