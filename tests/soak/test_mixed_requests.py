"""Short requests of every sort in one engine, for a long time: none is wrong, no block is lost, memory stays flat.

The number of requests is 500 at the level ``sweep`` and 100,000 at ``soak``, or TOOLKIT_SOAK_REQUESTS.
"""

import os
import random
import re
import threading
from collections import Counter

import pytest

import toolkit
from tests.helpers.adapter_folders import save_adapter
from toolkit.engine import AsyncEngine, Engine, SamplingParams
from toolkit.testing.models import random_model, tiny_tokenizer

CLIENTS = 8
CHECKED = 20  # one of so many answers is computed again, alone
FORMS = ["[ab]{3,9}", "(the|a) (page|engine)", "[0-9]{2,4}", "x+y"]
ADAPTERS = ("one", "two", "three")
SOAK = int(os.environ.get("TOOLKIT_SOAK_REQUESTS", "100000"))
MIB = 1 << 20


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Client(threading.Thread):
    """Asks one request after the other, of random sorts, and looks at every answer.

    Args:
        engine: that all clients share.
        count: requests.
        seed: of what is asked.
        prefixes: beginnings of prompts.
    """

    def __init__(self, engine, count, seed, prefixes):
        super().__init__()
        self.engine = engine
        self.count = count
        self.chance = random.Random(seed)
        self.prefixes = prefixes
        self.happened = Counter()
        self.kept = []  # (prompt, parameters, completions) to be computed again
        self.error = None

    def run(self):
        try:
            for _ in range(self.count):
                sort = self.chance.choice(("whole", "whole", "streamed", "cancelled", "late", "formed", "predicted"))
                self.happened[sort] += 1
                getattr(self, sort)(self.prompt(), self.params())
        except BaseException as error:
            self.error = error

    def prompt(self):
        first = self.chance.choice(self.prefixes)
        return [*first[: self.chance.randint(1, len(first))], self.chance.randrange(3, 90)]

    def params(self, **given):
        chance = self.chance
        defaults = {
            "n": chance.choice((1, 1, 1, 2)),
            "max_tokens": chance.randint(1, 12),
            "temperature": chance.choice((0.0, 1.0)),
            "repetition_penalty": chance.choice((1.0, 1.0, 1.2)),
            "dry_multiplier": chance.choice((0.0, 0.0, 1.0)),
            "typical_p": chance.choice((1.0, 1.0, 0.7)),
            "xtc_probability": chance.choice((0.0, 0.0, 0.5)),
            "logprobs": chance.choice((None, None, 2)),
            "priority": chance.choice((0, 0, -1, 1)),
            "cache_salt": chance.choice((None, None, None, "salt")),
            "lora_name": chance.choice((None, None, None, *ADAPTERS)),
            "seed": chance.randrange(1 << 40),
        }
        return SamplingParams(**{**defaults, **given})

    def answered(self, prompt, params, completions):
        for one in completions:
            assert one.finish_reason in ("stop", "length"), one
            assert len(one.token_ids) == len(one.logprobs) <= params.max_tokens
        if self.chance.randrange(CHECKED) == 0:
            self.kept.append((prompt, params, completions))

    def whole(self, prompt, params):
        self.answered(prompt, params, self.engine.generate([prompt], params))

    def streamed(self, prompt, params):
        tokens, logprobs, texts = ({at: [] for at in range(params.n)} for _ in range(3))
        finished = {}
        for delta in self.engine.stream([prompt], params):
            assert delta.index not in finished
            tokens[delta.index] += delta.token_ids
            logprobs[delta.index] += delta.logprobs
            texts[delta.index].append(delta.text)
            if delta.finished is not None:
                finished[delta.index] = delta.finished
        for at, one in finished.items():
            assert (one.token_ids, one.logprobs, one.text) == (tokens[at], logprobs[at], "".join(texts[at]))
        self.answered(prompt, params, [finished[at] for at in range(params.n)])

    def cancelled(self, prompt, params):
        deltas = self.engine.stream([prompt], params)
        for _ in range(self.chance.randint(0, 4)):
            next(deltas, None)
        deltas.close()

    def late(self, prompt, params):
        timed = self.params(timeout=self.chance.choice((1e-4, 5e-3)))
        for one in self.engine.generate([prompt], timed):
            self.happened[one.finish_reason] += 1
            assert one.finish_reason in ("stop", "length", "timeout")

    def formed(self, prompt, params):
        form = self.chance.choice(FORMS)
        params = self.params(structured_outputs={"regex": form}, max_tokens=16)
        completions = self.engine.generate([prompt], params)
        self.answered(prompt, params, completions)
        for one in completions:
            if one.finish_reason == "stop":
                self.happened["complete"] += 1
                assert re.fullmatch(form, one.text), (form, one.text)

    def predicted(self, prompt, params):
        (first, *_) = self.engine.generate([prompt], params)
        predicted = list(first.token_ids)
        if self.chance.random() < 0.5:
            predicted[self.chance.randrange(len(predicted))] = 5
        params = self.params(
            n=1, seed=params.seed, temperature=params.temperature, max_tokens=params.max_tokens,
            repetition_penalty=params.repetition_penalty, dry_multiplier=params.dry_multiplier,
            typical_p=params.typical_p, xtc_probability=params.xtc_probability,
            lora_name=params.lora_name, predicted_token_ids=predicted,
        )  # fmt: skip
        (again,) = self.engine.generate([prompt], params)
        assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)
        self.answered(prompt, params, [again])


def rounds(engine, count, seed, prefixes):
    """``count`` requests of all clients; what happened, and what is to be computed again."""
    clients = [Client(engine, count // CLIENTS, seed + at, prefixes) for at in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
        if client.error is not None:
            raise client.error
    return sum((client.happened for client in clients), Counter()), [one for client in clients for one in client.kept]


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(500, marks=pytest.mark.sweep),
        pytest.param(SOAK, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
def test_mixed_requests(count, tmp_path):
    pytest.importorskip("peft")
    tokenizer = tiny_tokenizer()
    model = random_model("llama", layers=1, vocabulary=len(tokenizer))
    folders = [save_adapter(model, tmp_path / name, at, rank=2 + at) for at, name in enumerate(ADAPTERS)]
    toolkit.patch(model)
    chance = random.Random(0)
    prefixes = [[chance.randrange(3, 90) for _ in range(30)] for _ in range(12)]
    engine = Engine(
        model, tokenizer, block_size=4, num_blocks=16, max_num_seqs=8, max_num_batched_tokens=48, max_model_len=64,
        swap_space=1e-5, kv_host_space=1e-4, kv_disk_space=2e-4, kv_disk_folder=str(tmp_path / "disk"), seed=1,
        speculative_config={"method": "ngram", "prompt_lookup_min": 1, "adaptive": False}, max_loras=2,
    )  # fmt: skip
    same = random_model("llama", layers=1, vocabulary=len(tokenizer))
    plain = Engine(same, tokenizer, block_size=4, max_model_len=64, enable_prefix_caching=False)
    for name, folder in zip(ADAPTERS, folders):
        engine.load_adapter(name, folder)
        plain.load_adapter(name, folder)
    happened, resident, parts = Counter(), [], 5
    with AsyncEngine(engine, max_queued_seqs=64) as running:
        for part in range(parts):
            found, kept = rounds(running, count // parts, 100 * part, prefixes)
            happened += found
            for prompt, params, completions in kept:
                alone = plain.generate([prompt], params)
                assert [one.token_ids for one in completions] == [one.token_ids for one in alone]
                assert [one.logprobs for one in completions] == [one.logprobs for one in alone]
                assert [one.top_logprobs for one in completions] == [one.top_logprobs for one in alone]
                happened["compared"] += 1
            running.call(engine.check_integrity)
            resident.append(resident_bytes())
        stats = running.engine.stats()
    print(dict(happened), stats, [value // MIB for value in resident])
    for sort in ("whole", "streamed", "cancelled", "late", "timeout", "formed", "complete", "predicted", "compared"):
        assert happened[sort] >= count // 200, happened
    for name in ("num_preemptions", "num_swaps", "spec_decode_num_accepted_tokens", "kv_host_hits", "kv_disk_hits"):
        assert stats[name] > 0, stats
    assert stats["num_used_blocks"] == stats["num_requests_running"] == stats["num_requests_waiting"] == 0
    assert not engine.speculation.failed
    assert not engine.has_work
    assert list((tmp_path / "disk").iterdir()) == []
    assert engine.adapters.num_evictions > 3
    if count >= 20_000:  # before, caches fill
        assert resident[-1] - resident[1] < 48 * MIB, [value // MIB for value in resident]
