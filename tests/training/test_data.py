"""Documents, split and packing: nothing lost, nothing twice, and a position that is exact."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from toolkit.config.schema import DataSection, ModelSection, TokenizerSection
from toolkit.errors import ToolkitError
from toolkit.training import corpus
from toolkit.training.data import PackedStream, encode
from toolkit.training.tokenizer import END_OF_TEXT, load_tokenizer, make_tokenizer, train_tokenizer

RANDOM = ModelSection(config={"model_type": "llama"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    chance = random.Random(0)
    for index in range(60):
        words = [chance.choice(["alpha", "beta", "λ", "\t", "\r\n", "x = 1", END_OF_TEXT]) for _ in range(index * 3)]
        inner = root / f"p{index % 7}"
        inner.mkdir(exist_ok=True)
        (inner / f"f{index}.py").write_bytes(" ".join(words).encode())
    (root / "p0" / "odd.py").write_bytes(b"caf\xe9 \xff")
    (root / "p0" / "notes.md").write_text("not python")
    (root / "tests").mkdir()
    (root / "tests" / "t.py").write_text("left out")
    return root


@pytest.fixture(scope="module")
def files(folder: Path) -> list[corpus.SourceFile]:
    return corpus.list_files(DataSection(data_dir=str(folder)))


@pytest.fixture(scope="module")
def tokenizer(files: list[corpus.SourceFile]) -> Any:
    return train_tokenizer([file.read() for file in files], 300, 64)


def make(files: list[corpus.SourceFile], tokenizer: Any, **changes: Any) -> PackedStream:
    arguments = {"batch_tokens": 37, "max_length": 16, "interleave": 5, "seed": 3} | changes
    return PackedStream(files, tokenizer, **arguments)


def test_listing(folder: Path, files: list[corpus.SourceFile]) -> None:
    names = [file.name for file in files]
    assert names == sorted(names)
    assert len(names) == 60  # 59 non-empty of 60, and odd.py; no .md, no tests/
    assert "p0/odd.py" in names
    assert all(Path(file.path).stat().st_size == file.size for file in files)
    with pytest.raises(ToolkitError, match=r"data\.data_dir must be a folder or 'stdlib', got '/nowhere'\."):
        corpus.list_files(DataSection(data_dir="/nowhere"))
    with pytest.raises(ToolkitError, match="must hold a non-empty file that matches"):
        corpus.list_files(DataSection(data_dir=str(folder), include=["*.rs"]))


def test_the_standard_library_is_found_without_its_tests() -> None:
    names = {file.name for file in corpus.list_files(DataSection())}
    assert "os.py" in names
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")[:-1]) for name in names)


def test_split_is_disjoint_complete_and_does_not_move(files: list[corpus.SourceFile]) -> None:
    train, held = corpus.split(files, 0.3)
    assert {f.name for f in train} | {f.name for f in held} == {f.name for f in files}
    assert not {f.name for f in train} & {f.name for f in held}
    assert 5 <= len(held) <= 30
    fewer_train, fewer_held = corpus.split(files[::2], 0.3)
    assert set(fewer_held) <= set(held)
    assert set(fewer_train) <= set(train)
    # The hash is fixed across processes and versions, so that a held-out file stays held out.
    assert corpus.digest("p0/f0.py") == 0xA92504FAE0183ED8
    with pytest.raises(ToolkitError, match="must leave a file on the held-out side"):
        corpus.split(files[:2], 1e-9)


def test_take_bytes_takes_whole_files_within_the_budget(files: list[corpus.SourceFile]) -> None:
    taken = corpus.take_bytes(files, 2000)
    assert 0 < sum(file.size for file in taken) <= 2000
    assert set(taken) <= set(files)
    assert set(corpus.take_bytes(files, None)) == set(files)
    assert len(corpus.take_bytes(files, 1)) == 1


def test_tokenizer_is_lossless_and_keeps_special_tokens_out_of_text(
    files: list[corpus.SourceFile], tokenizer: Any, tmp_path: Path
) -> None:
    texts = [file.read() for file in files] + ["a\r\n\r\tb", "é漢🙂", f"x{END_OF_TEXT}y", "", " "]
    tokenizer.save_pretrained(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    for text in texts:
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
        assert encode(loaded, text) == ids
    assert len(tokenizer) <= 300
    assert loaded.eos_token == loaded.bos_token == END_OF_TEXT


def test_tokenizer_training_is_deterministic(files: list[corpus.SourceFile], tokenizer: Any) -> None:
    again = train_tokenizer([file.read() for file in files], 300, 64)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_path_without_tokenizer_is_one_sentence(tmp_path: Path, files: list[corpus.SourceFile]) -> None:
    for path, text in (
        (str(tmp_path / "no"), "a folder, a GGUF file or a repository of the Hub such as org/name"),
        (str(tmp_path), "the folder of a model or of a training run"),
    ):
        with pytest.raises(ToolkitError, match=f"tokenizer.name_or_path must be {text}, got '{path}'") as caught:
            make_tokenizer(TokenizerSection(name_or_path=path), RANDOM, files, 64)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch_tokens", "max_length", "interleave"), [(37, 16, 5), (64, 64, 1), (5, 2, 60), (401, 7, 3)]
)
def test_packing_loses_and_repeats_nothing(
    files: list[corpus.SourceFile], tokenizer: Any, batch_tokens: int, max_length: int, interleave: int
) -> None:
    """Follow every document through the batches: each token is a target once, in order."""
    eos = tokenizer.eos_token_id
    documents = {file.name: [eos, *encode(tokenizer, file.read()), eos] for file in files}
    transitions = sum(len(ids) - 1 for ids in documents.values())
    stream = make(files, tokenizer, batch_tokens=batch_tokens, max_length=max_length, interleave=interleave)
    chunks: list[tuple[list[int], list[int]]] = []
    # Two epochs and what may still be open at their end.
    while stream.epoch < 2 or any(epoch < 2 for epoch, _, _ in stream.state_dict()["open"]):
        batch = stream.next_batch()
        assert sum(map(len, batch.inputs)) == batch_tokens
        assert all(0 < len(chunk) <= max_length for chunk in batch.inputs)
        assert list(map(len, batch.inputs)) == list(map(len, batch.targets))
        chunks += zip(batch.inputs, batch.targets)
    # Independent reassembly: chunks come from the open slots in turn; a slot takes the next document when one ends.
    order = [f.name for epoch in range(20) for f in corpus.in_hash_order(files, f"3/{epoch}")]
    slots = [documents[name] for name in order[:interleave]]
    at, following, finished, seen = [0] * interleave, interleave, 0, 0
    for index, (inputs, targets) in enumerate(chunks):
        slot = index % interleave
        start = at[slot]
        assert inputs == slots[slot][start : start + len(inputs)]
        assert targets == slots[slot][start + 1 : start + 1 + len(targets)]
        at[slot] += len(targets)
        seen += len(targets)
        if at[slot] == len(slots[slot]) - 1:
            finished += 1
            slots[slot], at[slot] = documents[order[following]], 0
            following += 1
    assert finished >= 2 * len(files)
    assert seen >= 2 * transitions


def test_position_brings_back_the_same_batches(files: list[corpus.SourceFile], tokenizer: Any) -> None:
    files = files[:20]
    stream = make(files, tokenizer)
    batches, states = [], []
    for _ in range(150):
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(stream.next_batch())
    assert stream.epoch >= 1  # so that positions whose open documents lie in two epochs are among them
    assert any(len({epoch for epoch, _, _ in state["open"]}) == 2 for state in states)
    for at in random.Random(1).sample(range(140), 25):
        resumed = make(files, tokenizer)
        resumed.load_state_dict(states[at])
        assert [resumed.next_batch() for _ in range(8)] == batches[at : at + 8]


def test_order_changes_with_seed_and_epoch_only(files: list[corpus.SourceFile], tokenizer: Any) -> None:
    first = [make(files, tokenizer).next_batch() for _ in range(2)]
    assert first[0] == first[1]
    assert make(files, tokenizer, seed=4).next_batch() != first[0]
    assert make(list(reversed(files)), tokenizer).next_batch() == first[0]
    assert corpus.in_hash_order(files, "3/0") != corpus.in_hash_order(files, "3/1")


def test_ranks_share_the_files_without_overlap(files: list[corpus.SourceFile], tokenizer: Any) -> None:
    shares = [make(files, tokenizer, rank=rank, world_size=3)._share(0) for rank in range(3)]
    names = [file.name for share in shares for file in share]
    assert sorted(names) == sorted(file.name for file in files)
    with pytest.raises(ToolkitError, match="must hold a training file for each of 3 processes, got 2"):
        make(files[:2], tokenizer, world_size=3)
