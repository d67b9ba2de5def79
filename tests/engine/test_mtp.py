"""The multi-token prediction layer of a checkpoint drafts what its formula says, and changes no bit."""

import dataclasses
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import toolkit
from tests.engine.test_speculation import VOCABULARY, engine_of, requests, run
from tests.helpers.mtp_checkpoint import change_tensors, save_with_mtp
from toolkit.errors import ToolkitError
from toolkit.exporting import export
from toolkit.exporting.unread import copy_unread
from toolkit.loading import load_model
from toolkit.loading.tensors import weight_files
from toolkit.testing.models import random_model

LAYOUTS = {"deepseek_v3_moe": "layer", "qwen3_next_moe": "top", "glm4_moe": "layer", "qwen3_next": "top"}
FAST = ("deepseek_v3_moe", "qwen3_next_moe")  # of each layout one
CONFIG = {"method": "mtp", "num_speculative_tokens": 3, "adaptive": False}


@pytest.fixture(
    scope="module", params=[pytest.param(one, marks=[pytest.mark.sweep] * (one not in FAST)) for one in LAYOUTS]
)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    save_with_mtp(request.param, path, LAYOUTS[request.param])
    return path


def loaded(folder):
    return load_model(str(folder))[0]


@pytest.mark.parametrize("settings", [{}, {"num_blocks": 24, "swap_space": 1, "max_num_batched_tokens": 7}], ids=repr)
def test_mtp_changes_no_bit(folder, settings):
    model = loaded(folder)
    prompts, params = requests(random.Random(5), 6)
    params = [dataclasses.replace(one, stop_token_ids=None, ignore_eos=True) for one in params]
    expected = run(engine_of(model, **settings), prompts, params)
    engine = engine_of(model, **settings, speculative_config=CONFIG)
    for _ in range(2):  # the second one finds prefixes that the first one left
        assert run(engine, prompts, params) == expected
    drafter = engine.speculation.drafter
    assert not engine.speculation.failed
    assert not drafter._known
    drafter.block_manager.check_integrity([])
    assert engine.speculation.num_drafts > 30


def drafts_of(engine, prompt, count):
    """What is drafted behind a greedy completion as it grows: (tokens, draft)."""
    found, propose = [], engine.speculation.drafter.propose

    def watched(sequences, most):
        drafts = propose(sequences, most)
        found.extend((list(one.tokens), draft.tokens) for one, draft in zip(sequences, drafts))
        return drafts

    engine.speculation.drafter.propose = watched
    engine.generate([prompt], toolkit.SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
    return found


def stock_draft(main, layer, tokens, count):
    """The greedy draft of transformers' own layer in float64, over the whole sequence anew for every token."""
    drafted = []
    with torch.no_grad():
        hidden = main.model(torch.tensor([tokens[:-1]])).last_hidden_state
        while len(drafted) < count:
            ids = torch.tensor([[*tokens, *drafted][1:]])
            positions = torch.arange(ids.shape[1])[None]
            out = layer.forward_layer(0, hidden, positions, None, input_ids=ids)
            drafted.append(int(layer.shared_head(out[:, -1]).argmax()))
            hidden = torch.cat([hidden, out[:, -1:]], 1)
    return drafted


def test_mtp_drafts_what_the_stock_layer_does(folder):
    mtp_model = pytest.importorskip("transformers.modeling_layers").MtpModel
    prompt = random.Random(1).choices(range(VOCABULARY), k=21)
    with engine_of(loaded(folder), speculative_config=CONFIG) as engine:
        found = drafts_of(engine, prompt, 24)
    main = loaded(folder)
    main.config.num_mtp_layers, main.config.mtp_layer_types = 1, ["full_attention"]
    main.set_experts_implementation("eager")  # the other has no float64
    main._keys_to_ignore_on_load_unexpected = [r"layers\.2\.", r"^mtp\."]
    main.config.name_or_path = str(folder)
    layer = mtp_model.from_pretrained(main).eval().double()
    main.double()
    checked = [draft == stock_draft(main, layer, tokens, len(draft)) for tokens, draft in found if draft]
    assert len(checked) > 10
    assert all(checked)


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.sweep), 1.0])
def test_what_the_layer_foretells_is_accepted(tmp_path, temperature):
    """Where the next token depends on the last one alone, and the layer has learnt how, every draft is right."""
    save_with_mtp("deepseek_v3", tmp_path)

    def simple(name, tensor):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            return torch.zeros_like(tensor)
        if "norm" in name:
            return torch.ones_like(tensor)
        if name.endswith("eh_proj.weight"):
            return torch.cat([torch.eye(len(tensor)), torch.zeros(len(tensor), len(tensor))], 1)
        return tensor

    change_tensors(tmp_path, simple)
    model = loaded(tmp_path)
    params = toolkit.SamplingParams(max_tokens=40, temperature=temperature, seed=1, ignore_eos=True)
    prompts = [[3, 4, 5], [6, 7]]
    expected = run(engine_of(model), prompts, params)
    engine = engine_of(model, speculative_config=CONFIG)
    assert run(engine, prompts, params) == expected
    # Sums of the two models differ in their last bits, which decides no sample here.
    assert engine.speculation.num_accepted_tokens == engine.speculation.num_draft_tokens > 50


def test_mtp_follows_new_weights_and_sleeps(folder):
    model = loaded(folder)
    prompts, params = requests(random.Random(5), 6)
    engine = engine_of(model, speculative_config=CONFIG)
    run(engine, prompts, params)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1.5)
    model.model.embed_tokens.weight.data.mul_(1.2)
    engine.submit_batch(prompts, params)
    deltas = [delta for _ in range(4) for delta in engine.step()]
    engine.sleep()
    engine.wake()
    while engine.has_work:
        deltas += engine.step()
    expected = run(engine_of(model), prompts, params)
    finished = {(one.prompt_index, one.index): one.finished for one in deltas if one.finished is not None}
    assert [finished[one.prompt_index, one.index].token_ids for one in expected] == [one.token_ids for one in expected]
    assert not engine.speculation.failed
    layer = engine.speculation.drafter.backend.model
    assert layer.lm_head.weight is model.lm_head.weight
    assert layer.model.embed_tokens.weight is model.model.embed_tokens.weight


@pytest.mark.sweep
def test_what_a_checkpoint_lacks_is_named(tmp_path):
    found = save_with_mtp("deepseek_v3", tmp_path / "whole")
    random_model("llama", vocabulary=VOCABULARY).save_pretrained(tmp_path / "none")
    cases = [
        (loaded(tmp_path / "none"), r"for a checkpoint without a multi-token prediction layer, got '.*none'\.$"),
        (
            random_model("llama"),
            r"than 'mtp' for a model that was loaded from no folder of .* 'none'\.$",
        ),
    ]
    for model, sentence in cases:
        with pytest.raises(ToolkitError, match=sentence):
            engine_of(model, speculative_config=CONFIG)
    model = loaded(tmp_path / "whole")
    for lost, sentence in [
        ("hnorm.weight", r"lacks 'model\.layers\.2\.hnorm\.weight'\.$"),
        ("input_layernorm.weight", r"must be a decoder layer of DeepseekV3ForCausalLM, .* model\.layers\.0\.input_lay"),
    ]:
        name = next(one for one in found if one.endswith(lost))
        save_without(tmp_path / "whole", name)
        with pytest.raises(ToolkitError, match=sentence):
            engine_of(model, speculative_config=CONFIG)
        save_with_mtp("deepseek_v3", tmp_path / "whole")


def save_without(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_an_export_keeps_the_layer(folder, tmp_path):
    model = loaded(folder)
    model.lm_head.weight.data.mul_(1.5)  # trained, say
    path = export(model, tmp_path / "exported")
    before, after = stored(folder), stored(path)
    assert before.keys() == after.keys()
    trained = {name for name in before if not torch.equal(before[name], after[name])}
    assert trained == {"lm_head.weight"}
    again = loaded(path)
    prompts, params = requests(random.Random(5), 3)
    engine = engine_of(again, speculative_config=CONFIG)
    assert run(engine, prompts, params) == run(engine_of(model), prompts, params)
    assert not engine.speculation.failed


@pytest.mark.sweep
def test_an_export_in_several_files_keeps_the_layer(tmp_path):
    save_with_mtp("deepseek_v3", tmp_path / "one")
    model = loaded(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="50KB")
    names = [name for name in stored(tmp_path / "one") if name.startswith("model.layers.2.")]
    copy_unread(names, tmp_path / "one", tmp_path / "several")
    before, after = stored(tmp_path / "one"), stored(tmp_path / "several")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def stored(folder):
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(folder / file).items()}
