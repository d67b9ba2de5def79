"""``toolkit.LLM``: generation, chats, embeddings, scores and classes with vLLM's names."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText

from tests.helpers.image_models import data_url, picture, save_qwen2_vl
from tests.helpers.pooling_models import SEQUENCES, TOKENS, bert_tokenizer, hidden_of, logits_of, pooling_model
from toolkit import LLM, PoolingParams, SamplingParams
from toolkit.errors import ToolkitError
from toolkit.testing.models import random_model, tiny_tokenizer

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm():
    with LLM(random_model("llama"), tiny_tokenizer()) as made:
        yield made


def continued(ids, count=6):
    """Greedy tokens by transformers."""
    model = random_model("llama")
    with torch.no_grad():
        for _ in range(count):
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_prompts_are_taken_in_every_form_that_vllm_takes(llm):
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Small random")["input_ids"]
    for given, prompt in [
        ("Small random", "Small random"),
        (["Small random"], "Small random"),
        ({"prompt": "Small random"}, "Small random"),
        ({"prompt_token_ids": ids}, None),
        ([{"prompt_token_ids": ids}], None),
        (ids, None),
        ([ids], None),
    ]:
        (found,) = llm.generate(given, GREEDY)
        assert (found.prompt, found.prompt_token_ids, found.finished) == (prompt, ids, True)
        (output,) = found.outputs
        assert output.token_ids == continued(ids)
        assert (output.text, output.finish_reason) == (
            tokenizer.decode(output.token_ids, skip_special_tokens=True),
            "length",
        )


def test_several_completions_and_log_probabilities_of_each_prompt(llm):
    params = [SamplingParams(n=3, seed=5, max_tokens=4, logprobs=2, ignore_eos=True), GREEDY]
    first, second = llm.generate(["Small", "models of"], params)
    assert int(second.request_id) == int(first.request_id) + 1
    assert [one.index for one in first.outputs] == [0, 1, 2]
    assert second.outputs[0].logprobs is None
    model = random_model("llama")
    for output in first.outputs:
        ids = [*first.prompt_token_ids, *output.token_ids]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert output.cumulative_logprob == pytest.approx(
            sum(float(logprobs[len(first.prompt_token_ids) - 1 + at, one]) for at, one in enumerate(output.token_ids)),
            abs=1e-4,
        )
        for at, (token, found) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            row = logprobs[len(first.prompt_token_ids) - 1 + at]
            best = row.topk(2).indices.tolist()
            assert set(found) == {token, *best}
            assert [found[one].rank for one in best] == [1, 2]
            assert found[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert found[token].decoded_token == tiny_tokenizer().decode([token])


def test_chats_go_through_the_template(llm):
    messages = [{"role": "user", "content": "Small random"}]
    one, two = llm.chat([messages, [*messages, {"role": "assistant", "content": "mo"}, *messages]], GREEDY)
    assert one.prompt == "user: Small random\nassistant: "
    assert one.prompt_token_ids == tiny_tokenizer()(one.prompt)["input_ids"]
    assert one.outputs[0].token_ids == continued(one.prompt_token_ids)
    assert two.prompt.count("user: ") == 2
    assert llm.chat(messages, GREEDY)[0].outputs[0].token_ids == one.outputs[0].token_ids
    assert llm.chat(messages, GREEDY, chat_template="{{ messages[0]['content'] }}")[0].prompt == "Small random"


def test_a_folder_brings_tokenizer_and_defaults(tmp_path):
    random_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 7, "max_new_tokens": 3}))
    with LLM(str(tmp_path), max_num_seqs=2) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5, top_k=7, max_tokens=3)
        assert llm.engine.config.max_num_seqs == 2
        (found,) = llm.generate("Small")
        assert len(found.outputs[0].token_ids) <= 3
    with LLM(str(tmp_path), generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_a_bar_is_shown_where_it_is_asked_for(llm, capsys):
    llm.generate(["Small", "random"], GREEDY)
    assert capsys.readouterr().err == ""  # no terminal
    llm.generate(["Small", "random"], GREEDY, use_tqdm=True)
    shown = capsys.readouterr()
    assert "Processed prompts" in shown.err
    assert "2/2" in shown.err
    assert shown.out == ""
    told = []

    class Bar:
        def __init__(self, **about):
            told.append(about["total"])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            told.append(count)

    llm.generate(["Small", "random"], GREEDY, use_tqdm=Bar)
    assert told == [2, 1, 1]


def test_nothing_is_left_running_when_a_call_is_broken_off(llm):
    class Broken(Exception):
        pass

    class Bar:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            raise Broken

    params = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=50, ignore_eos=True)]
    with pytest.raises(Broken):
        llm.generate(["Small", "random"], params, use_tqdm=Bar)
    llm.engine.step()
    assert not llm.engine.has_work
    assert len(llm.generate("Small", GREEDY)) == 1


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_embeddings_of_texts_have_all_special_tokens(family):
    tokenizer = bert_tokenizer() if family == "bert" else tiny_tokenizer()
    llm = LLM(pooling_model(family), tokenizer)
    assert llm.runner == "pooling"
    texts = ["play the game", "a game", "play"]
    plain, at = pooling_model(family), 0 if family == "bert" else -1
    for text, found in zip(texts, llm.embed(texts), strict=True):
        ids = tokenizer(text)["input_ids"]
        assert (found.prompt, found.prompt_token_ids) == (text, ids)
        assert found.outputs.hidden_size == 64
        expected = F.normalize(hidden_of(plain, ids)[at], dim=0)
        torch.testing.assert_close(torch.tensor(found.outputs.embedding), expected, **CLOSE)
    (cut,) = llm.embed([5, 6, 7, 8], PoolingParams(dimensions=8, truncate_prompt_tokens=2))
    assert cut.prompt is None
    expected = F.normalize(hidden_of(plain, [7, 8])[at, :8], dim=0)
    torch.testing.assert_close(torch.tensor(cut.outputs.embedding), expected, **CLOSE)
    (tokens,) = llm.encode({"prompt_token_ids": [5, 6]}, PoolingParams(normalize=False), pooling_task="token_embed")
    torch.testing.assert_close(tokens.outputs.data, hidden_of(plain, [5, 6]), **CLOSE)


def test_scores_of_embeddings_are_cosines():
    llm, tokenizer, plain = LLM(pooling_model("qwen3"), tiny_tokenizer()), tiny_tokenizer(), pooling_model("qwen3")

    def cosine(one, other):
        a, b = (hidden_of(plain, tokenizer(text)["input_ids"])[-1] for text in (one, other))
        return float(F.cosine_similarity(a, b, dim=0))

    texts = ["Small random", "models of the", "Small random"]
    for given, pairs in [
        (("Small", "random"), [("Small", "random")]),
        (("Small", texts), [("Small", one) for one in texts]),
        ((texts, texts[::-1]), list(zip(texts, texts[::-1]))),
        ((["Small"], texts), [("Small", one) for one in texts]),
    ]:
        found = llm.score(*given)
        assert [one.outputs.score for one in found] == pytest.approx([cosine(*pair) for pair in pairs], abs=1e-5)
        assert found[0].prompt_token_ids == [t for text in pairs[0] for t in tokenizer(text)["input_ids"]]
    with pytest.raises(ToolkitError, match="text_1 must have 1 text, or one for each of text_2, got 2 and 3"):
        llm.score(texts[:2], texts)


def test_cross_encoders_read_pairs_with_their_types():
    tokenizer, plain = bert_tokenizer(), pooling_model("bert", SEQUENCES, num_labels=1)
    llm = LLM(pooling_model("bert", SEQUENCES, num_labels=1), tokenizer)
    documents = ["play", "a game", "the player"]
    found = llm.score("play the game", documents)
    for document, one in zip(documents, found, strict=True):
        pair = tokenizer("play the game", document)
        assert any(pair["token_type_ids"])
        logits = logits_of(plain, pair["input_ids"], token_type_ids=torch.tensor([pair["token_type_ids"]]))
        assert one.outputs.score == pytest.approx(float(logits.sigmoid()), abs=1e-5)
        assert one.prompt_token_ids == pair["input_ids"]
    rewards = llm.reward(documents)
    raw = [logits_of(plain, tokenizer(text)["input_ids"]) for text in documents]
    torch.testing.assert_close([one.outputs.data for one in rewards], raw, **CLOSE)


def test_classes_of_texts_and_of_their_tokens():
    plain, tokenizer = pooling_model("qwen3", SEQUENCES, num_labels=3), tiny_tokenizer()
    llm = LLM(pooling_model("qwen3", SEQUENCES, num_labels=3), tokenizer)
    (found,) = llm.classify("Small random")
    expected = logits_of(plain, found.prompt_token_ids).softmax(-1)
    assert found.outputs.num_classes == 3
    torch.testing.assert_close(torch.tensor(found.outputs.probs), expected, **CLOSE)
    with pytest.raises(ToolkitError, match="for scores, got classify with 3 labels"):
        llm.score("Small", "random")
    tokens = LLM(pooling_model("qwen3", TOKENS), tokenizer).encode("Small random")[0]
    assert tokens.outputs.data.shape == (len(tokens.prompt_token_ids), 2)


def test_the_wrong_kind_of_model_is_one_sentence(llm):
    with pytest.raises(
        ToolkitError, match=r"runner must be 'pooling' for embeddings, scores and classes, got 'generate'"
    ):
        llm.embed("Small")
    pooled = LLM(pooling_model("qwen3"))
    with pytest.raises(ToolkitError, match="runner must be 'generate' to generate, got 'pooling'"):
        pooled.generate([5, 6])
    with pytest.raises(ToolkitError, match="prompt must be token ids, since the model has no tokenizer, got a text"):
        pooled.embed("Small")
    with pytest.raises(ToolkitError, match="task must be one of embed, token_embed, got 'classify' of Qwen3Model"):
        pooled.classify([5, 6])
    with pytest.raises(ToolkitError, match="model must have a head for rewards"):
        pooled.reward([5, 6])
    with pytest.raises(ToolkitError, match="pooling_params must be one, or one per prompt"):
        pooled.embed([[5, 6]], [PoolingParams()] * 2)
    with pytest.raises(ToolkitError, match="prompt must have 'prompt' or 'prompt_token_ids' alone, got 'image'"):
        pooled.embed({"image": 1})
    with pytest.raises(ToolkitError, match=r"pooler_config must be None for runner 'generate'"):
        LLM(random_model("llama"), pooler_config={"pooling_type": "mean"})
    with pytest.raises(ToolkitError, match=r"max_num_seqs"):
        LLM(pooling_model("qwen3"), max_num_seqs=0)


def test_a_folder_of_sentence_transformers_is_embedded_as_its_files_say(tmp_path):
    pooling_model("bert").save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    found = [{"idx": at, "path": path, "type": f"x.{kind}"} for at, (path, kind) in enumerate(kinds)]
    (tmp_path / "modules.json").write_text(json.dumps(found))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    llm = LLM(str(tmp_path))
    (output,) = llm.embed("play the game")
    expected = hidden_of(pooling_model("bert"), output.prompt_token_ids).mean(0)
    torch.testing.assert_close(torch.tensor(output.outputs.embedding), expected, **CLOSE)
    long = " ".join(["play"] * 30)
    with pytest.raises(ToolkitError, match="must have"):
        llm.embed(long)
    (output,) = llm.embed(long, PoolingParams(truncate_prompt_tokens=-1))
    assert output.prompt_token_ids == bert_tokenizer()(long, truncation=True, max_length=9)["input_ids"]
    (output,) = LLM(str(tmp_path), pooler_config={"normalize": True}).embed("play")
    assert torch.tensor(output.outputs.embedding).norm() == pytest.approx(1.0, abs=1e-5)


def test_chats_have_images_where_the_model_takes_them(tmp_path):
    folder = save_qwen2_vl(tmp_path / "pictures")
    image, text = picture((200, 20, 20)), {"type": "text", "text": "what is it?"}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(image)}}, text]}]
    with LLM(str(folder)) as llm:
        (found,) = llm.chat(messages, GREEDY)
        with pytest.raises(ToolkitError, match=r"messages must have images that Pillow reads in messages\[0\]"):
            llm.chat([{"role": "user", "content": [{"type": "image", "path": "none.png"}, text]}], GREEDY)
        model, processor = (
            AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(),
            llm.engine.processor,
        )
        bare = [{"role": "user", "content": [{"type": "image"}, text]}]
        prompt = processor.tokenizer.apply_chat_template(bare, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[prompt], images=[[image]], add_special_tokens=False, return_tensors="pt")
    assert (found.prompt, found.prompt_token_ids) == (prompt, inputs["input_ids"][0].tolist())
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    out = model.generate(
        **inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6, eos_token_id=None, pad_token_id=0
    )
    assert found.outputs[0].token_ids == out[0, len(found.prompt_token_ids) :].tolist()
    with (
        LLM(random_model("llama"), tiny_tokenizer()) as plain,
        pytest.raises(ToolkitError, match="messages must be text"),
    ):
        plain.chat(messages, GREEDY)


def test_a_sleeping_engine_is_an_error_and_no_endless_wait(llm):
    llm.engine.sleep()
    for call in (llm.generate, lambda text, params: llm.chat([{"role": "user", "content": text}], params)):
        with pytest.raises(ToolkitError, match="the engine is asleep; call llm"):
            call("Small", GREEDY)
    assert not llm.engine.has_work
    llm.engine.wake()
    assert llm.generate("Small", GREEDY)[0].outputs[0].finish_reason == "length"


def test_log_probabilities_of_the_model_and_of_what_was_sampled_from(llm):
    """With a form the two differ: the second is among the allowed tokens."""
    params = SamplingParams(max_tokens=9, seed=0, logprobs=0, structured_outputs={"choice": ["a", "b"]})
    (output,) = llm.generate("Small", params)[0].outputs
    first = output.token_ids[0]
    own = [llm.engine.generate(["Small"], SamplingParams(max_tokens=1, seed=0, logprobs=-1))[0].top_logprobs[0][one]
           for one in llm.tokenizer.convert_tokens_to_ids(["a", "b"])]  # fmt: skip
    assert output.logprobs[0][first].logprob in own
    expected = torch.tensor(own).double().log_softmax(-1)[own.index(output.logprobs[0][first].logprob)]
    assert output.sampling_logprobs[0] == pytest.approx(float(expected), abs=1e-6)
    assert output.sampling_logprobs[1:] == [0.0] * (len(output.token_ids) - 1)  # nothing but the end may follow


def test_a_draft_model_may_be_a_folder(tmp_path):
    random_model("llama", layers=1, seed=1).save_pretrained(tmp_path)
    config = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3, "adaptive": False}
    with LLM(random_model("llama"), speculative_config=config) as llm:
        (found,) = llm.generate([[5, 6, 7]], GREEDY)
        assert found.outputs[0].token_ids == continued([5, 6, 7])
        assert llm.engine.stats()["spec_decode_num_draft_tokens"] > 0
    with pytest.raises(ToolkitError, match="model of speculative_config must be a folder, a GGUF file or a repository"):
        LLM(random_model("llama"), speculative_config={**config, "model": str(tmp_path / "nowhere")})
