"""Offloaded prefixes: contents come back bit by bit, least recently used ones go first, damage is noticed."""

import os
import random
import signal
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch

from toolkit.state import BlockManager, Group, PrefixIndex, PrefixKey, StatePool, StateSpec, kinds
from toolkit.state.kinds import StateKind
from toolkit.state.offloading import PrefixOffloading
from toolkit.state.offloading.disk import DiskCache
from toolkit.state.offloading.entries import Entry, node_digest, prefix_digests
from toolkit.state.offloading.files import read_entries, write_entries
from toolkit.state.offloading.host import HostCache
from toolkit.state.pool import group_of

KEY = PrefixKey(3, "style", 2, "salt", 64, 9)


class Misaligned(StateKind):
    """Bytes of an odd number before floats of 8 bytes."""

    kind = "misaligned"
    op = "attend"

    @classmethod
    def entries(cls, spec, block_size, dtype):
        return [((block_size, 3), torch.int8), ((), torch.bool), ((2,), torch.float64), ((block_size, 1), dtype)]

    @classmethod
    def inputs(cls, spec):
        return spec.shapes

    def write(self, rows, view, query_offsets):
        raise NotImplementedError

    def read(self, blocks, length):
        raise NotImplementedError


def fill(store, seed):
    """Random bytes, NaN among them."""
    raw = torch.randint(0, 256, (store.nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if store.dtype == torch.bool:
        raw %= 2
    store.copy_(raw.view(store.dtype).view(store.shape))


def raw_bytes(store, blocks):
    return [store[block].reshape(-1).contiguous().view(torch.uint8).clone() for block in blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_blocks_of_every_kind_come_back_bit_by_bit(dtype, monkeypatch):
    names = [*sorted(kinds.registered()), "misaligned"]
    monkeypatch.setitem(StateKind._registry, "misaligned", Misaligned)
    specs = [StateSpec(at, name, ((2, 3), (2, 5)), window=7) for at, name in enumerate(names)]
    counts = {group_of(spec): 9 for spec in specs}
    pool = StatePool(specs, counts, 4, dtype)
    stores = [store for state in pool.states for store in state.stores]
    for seed, store in enumerate(stores):
        fill(store, seed)
    for group in range(len(pool.groups)):
        mine = [store for state, at in zip(pool.states, pool.members) if at == group for store in state.stores]
        others = [store.clone() for store in stores if not any(store is one for one in mine)]
        before = [raw_bytes(store, (7, 2, 0)) for store in mine]
        packed = pool.pack(group, [7, 2, 0])
        assert packed.shape == (3, pool.group_bytes[group])
        for blocks in ((1, 3, 8), (5,)):
            pool.unpack(group, blocks, list(packed)[: len(blocks)])
            for store, saved in zip(mine, before):
                for found, expected in zip(raw_bytes(store, blocks), saved):
                    assert torch.equal(found, expected)
        rest = [store for store in stores if not any(store is one for one in mine)]
        assert all(
            torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in pair)) for pair in zip(rest, others)
        )


def entry_of(number, group=0, size=8, key=KEY):
    return Entry((group, number.to_bytes(32, "big")), key, torch.full((size,), number % 256, dtype=torch.uint8))


@pytest.mark.parametrize("seed", range(20))
def test_the_host_cache_is_a_list_in_the_order_of_use(seed, tmp_path):
    """And so is the one on disk."""
    chance = random.Random(seed)
    capacity = chance.choice((0, 30, 100, None))
    cache, oracle, evictions = HostCache(capacity), OrderedDict(), 0
    for _ in range(200):
        one = entry_of(chance.randrange(12), size=chance.randint(1, 40))
        if one.id in oracle and chance.random() < 0.5:
            assert cache.has(one.id, KEY)
            assert not cache.has(one.id, KEY._replace(weights=4))
            assert torch.equal(cache.get(one.id), oracle[one.id])
            oracle.move_to_end(one.id)
        else:
            oracle.pop(one.id, None)
            oracle[one.id] = one.content
            out = []
            while capacity is not None and sum(map(len, oracle.values())) > capacity:
                chosen = one.id if len(one.content) > capacity else next(iter(oracle))
                out.append((chosen, oracle.pop(chosen)))
            evictions += len(out) if len(one.content) <= (capacity if capacity is not None else 99) else 0
            assert [found.id for found in cache.put(one)] == [found for found, _ in out]
        assert [found.id for found in cache.entries()] == list(oracle)
        cache.check_integrity()
    assert cache.evictions == evictions
    cache.drop_outdated(KEY._replace(weights=4))
    assert (len(cache), cache.bytes) == (0, 0)


def test_the_disk_cache_drops_the_least_recently_used(tmp_path):
    cache = DiskCache(None, tmp_path / "made", [8, 40])
    cache.put(entry_of(1))
    room = 3 * cache.bytes
    cache.close()
    assert list((tmp_path / "made").iterdir()) == []
    cache = DiskCache(room, tmp_path / "made", [8, 40])
    for number in (1, 2, 3):
        cache.put(entry_of(number))
    assert cache.get(entry_of(1).id).tolist() == [1] * 8
    cache.put(entry_of(2))  # there is nothing to write, it was used
    cache.put(entry_of(4))
    cache.check_integrity()
    assert [cache.has(entry_of(number).id, KEY) for number in range(1, 5)] == [True, True, False, True]
    assert (cache.hits, cache.evictions, cache.failures) == (1, 1, 0)
    assert [one.content.tolist() for one in cache.entries()] == [[1] * 8, [2] * 8, [4] * 8]
    cache.drop_outdated(KEY._replace(adapter="other", adapter_version=9))
    assert len(cache) == 3
    cache.drop_outdated(KEY._replace(adapter_version=9))
    cache.check_integrity()
    assert (len(cache), cache.bytes) == (0, 0)


def test_a_block_that_cannot_be_written_or_read_is_no_block(tmp_path):
    cache = DiskCache(None, tmp_path, [8])
    cache.put(entry_of(1))
    cache.put(entry_of(2))
    (first, second) = sorted(path for path in cache.folder.iterdir() if path.suffix == ".safetensors")
    first.write_bytes(first.read_bytes()[:-3])
    os.replace(first, second)
    first.write_bytes(b"")
    assert cache.get(entry_of(1).id) is cache.get(entry_of(2).id) is None
    assert (len(cache), cache.bytes, cache.failures) == (0, 0, 2)
    cache.folder.joinpath("2.safetensors").mkdir()  # as a full device, it takes no file
    cache.put(entry_of(3))
    assert (len(cache), cache.bytes, cache.failures) == (0, 0, 3)


@pytest.mark.sweep
def test_folders_that_killed_processes_left_are_removed_and_others_are_not(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom toolkit.state.offloading.disk import DiskCache\n"
        f"cache = DiskCache(None, Path({str(tmp_path)!r}), [8])\nprint(cache.folder, flush=True)\n"
        "sys.stdin.read()\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, living = (process.stdout.readline().strip() for process in processes)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].communicate()
    assert os.path.isdir(killed)
    cache = DiskCache(None, tmp_path, [8])
    assert sorted(map(str, tmp_path.iterdir())) == sorted([living, str(cache.folder)])
    processes[1].communicate("")  # it ends, and removes its own
    assert list(tmp_path.iterdir()) == [cache.folder]
    cache.close()
    assert list(tmp_path.iterdir()) == []


def saved(path, count=6):
    chance = torch.Generator().manual_seed(0)
    entries = [
        Entry(
            (at % 2, at.to_bytes(32, "big")),
            KEY._replace(salt=None if at == 2 else f"salt {at}", rotary=at or None),
            torch.randint(0, 256, (8 + 32 * (at % 2),), dtype=torch.uint8, generator=chance),
        )
        for at in range(count)
    ]
    write_entries(path, entries, "the model")
    return entries


def same(one, other):
    return (one.id, one.key) == (other.id, other.key) and torch.equal(one.content, other.content)


def test_entries_come_back_under_the_versions_of_now(tmp_path):
    path, now = tmp_path / "one.safetensors", {"style": PrefixKey(40, "style", 41)}
    entries = saved(path)
    found, skipped = read_entries(path, "the model", now, [8, 40])
    assert skipped == 0
    for one, entry in zip(found, entries, strict=True):
        assert same(one, Entry(entry.id, entry.key._replace(weights=40, adapter_version=41), entry.content))
    for fingerprint, key, sizes, left in (
        ("another model", now, [8, 40], 0),
        ("the model", {None: PrefixKey(40)}, [8, 40], 0),
        ("the model", now, [8, 41], 3),
        ("the model", now, [8], 0),
    ):
        found, skipped = read_entries(path, fingerprint, key, sizes)
        assert len(found) == left
        assert skipped in (6 - left, 1)


def test_no_damage_goes_unnoticed(tmp_path):
    path, chance = tmp_path / "one.safetensors", random.Random(0)
    entries = saved(path)
    whole = path.read_bytes()
    damaged = 0
    for at in [*range(0, len(whole), 9), *range(len(whole) - 60, len(whole))]:
        content = bytearray(whole)
        content[at] ^= 1 << chance.randrange(8)
        path.write_bytes(content if chance.random() < 0.9 else content[: max(1, at)])
        found, skipped = read_entries(path, "the model", {"style": KEY}, [8, 40])
        assert all(any(same(one, entry) for entry in entries) for one in found)
        damaged += skipped > 0
    assert damaged > 150


@pytest.mark.parametrize("seed", range(5))
def test_a_digest_names_a_prefix_of_a_key(seed):
    chance = random.Random(seed)
    index, digests, keys = PrefixIndex(2), {}, [KEY, KEY._replace(salt=None), KEY._replace(rotary=8)]
    for block in range(60):
        key = chance.choice(keys)
        tokens = [chance.choice((1, 2, -(1 << 300))) for _ in range(2 * chance.randint(1, 4))]
        node = None
        for end in range(2, len(tokens) + 1, 2):
            node = index.register(block * 10 + end if end == len(tokens) else None, node, tokens[end - 2 : end], key)
        found = prefix_digests(tokens, 2, key)
        assert found[-1] == node_digest(node)
        assert prefix_digests([*tokens, 5], 2, key) == found
        for end, digest in enumerate(found, 1):
            named = (key, tuple(tokens[: 2 * end]))
            assert digests.setdefault(digest, named) == named
    later = KEY._replace(weights=9, adapter_version=9)
    assert prefix_digests([1, 2], 2, later) == prefix_digests([1, 2], 2, KEY)


def test_evicted_blocks_are_kept_before_others_write_to_them():
    specs = [StateSpec(0, "full", ((1, 2), (1, 2)))]
    pool = StatePool(specs, {Group(): 2}, 2)
    manager = BlockManager(pool.groups, [2], 2)
    offloading = PrefixOffloading(pool, manager, None)
    tables = manager.new_block_tables(KEY)
    tables.reserve(4)
    for at, block in enumerate(tables.parts[0].blocks):
        pool.states[0].stores[0][block] = at + 1.0
    tables.commit([7, 8, 9, 10], KEY)
    tables.release()
    other = manager.new_block_tables(None)
    other.reserve(4)
    for block in other.parts[0].blocks:
        pool.states[0].stores[0][block] = -1.0
    assert offloading.stats()["kv_host_blocks"] == 2
    fresh = manager.new_block_tables(KEY)
    assert fresh.match_prefix([7, 8, 9, 10, 11]) == 0
    assert offloading.restore(fresh, [7, 8, 9, 10, 11]) == 0  # both blocks are held
    other.release()
    assert offloading.restore(fresh, [7, 8, 9, 10, 11], lambda length: length < 4) == 2
    assert offloading.restore(fresh, [7, 8, 9, 10, 11]) == 4
    fresh.release()
    assert fresh.match_prefix([7, 8, 9, 10, 11]) == 4
    values = [float(pool.states[0].stores[0][block].flatten()[0]) for block in fresh.parts[0].blocks]
    assert values == [1.0, 2.0]
    manager.check_integrity([fresh, other])
    offloading.check_integrity()
