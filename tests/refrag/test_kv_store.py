"""KVStore: lookups, dtypes, refusals, and the state after a writer dies; the rest is that of ChunkStore."""

import dataclasses
import multiprocessing
import pickle
import time

import pytest
import torch
from refrag import ChunkStore, Passage, StoreError, UnknownPassageError
from refrag.model.passage_rows import PassageEntry, PassageRows
from refrag.store.fingerprint import KVFingerprint
from refrag.store.kv_store import KVStore

from tests.refrag import store_writer
from tests.refrag.store_writer import BATCH, FINGERPRINT, KV_FINGERPRINT, kv_chunks, kv_entry, passage, put_kv


@pytest.fixture
def store(tmp_path):
    return KVStore.create(tmp_path / "store", KV_FINGERPRINT, full=True)


def check(store, numbers):
    """Check that every passage is found with its own rows, by text and by id."""
    numbers = list(numbers)
    assert len(store) == len(numbers)
    exact = store.dtype != torch.float8_e4m3fn
    for found_by in ([Passage(passage(n).text) for n in numbers], [Passage(id=passage(n).id) for n in numbers]):
        for number, got in zip(numbers, store.get_many(found_by), strict=True):
            expected = kv_entry(number, store.full)
            for mine, theirs in ((got.slots, expected.slots), (got.full, expected.full)):
                if theirs is None:
                    assert mine is None
                    continue
                assert (mine.lengths, mine.keep, mine.start) == (theirs.lengths, theirs.keep, theirs.start)
                assert torch.equal(mine.rows, theirs.rows) and mine.keys.dtype == store.dtype
                mine = mine.to("cpu", torch.float32)
                for held, put in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                    # e4m3 has 3 bits after the leading one: half of the last is 2^-4 of a number.
                    assert torch.equal(held, put) if exact else ((held - put).abs() <= 2**-4 * put.abs() + 1e-6).all()
        assert store.chunks(found_by) == [kv_chunks(n) for n in numbers]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("full", [False, True])
def test_put_passages_are_found(tmp_path, dtype, full):
    store = KVStore.create(tmp_path, KV_FINGERPRINT, dtype, full=full)
    assert put_kv(store, [3, 1, 4, 1, 15]) == (4, 1, 0) and put_kv(store, [9, 4]) == (1, 1, 0)
    put_kv(store, [], aliases=[Passage(passage(9).text, "again")])  # a shard of ids only
    check(store, [1, 3, 4, 9, 15])
    check(KVStore.open(tmp_path, KV_FINGERPRINT), [15, 1, 3, 4, 9])
    reopened = pickle.loads(pickle.dumps(store))
    check(reopened, [1, 3, 4, 9, 15])
    assert reopened.full == full and torch.equal(reopened.get(Passage(id="again")).slots.rows, kv_entry(9).slots.rows)
    assert store.get_many([]) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_an_expanded_chunk_is_a_gather(tmp_path, dtype):
    store = KVStore.create(tmp_path, KV_FINGERPRINT, dtype, full=True)
    put_kv(store, [4])
    entry, lengths = store.get(passage(4)), kv_entry(4).slots.lengths
    keep = [length if index in (1, 3) else held for index, (length, held) in enumerate(zip(lengths, entry.slots.keep))]
    taken = entry.take(keep).to("cpu", torch.float32)
    slots, full = (part.to("cpu", torch.float32) for part in (entry.slots, entry.full))
    row = token = first = 0
    for length, held, kept in zip(lengths, entry.slots.keep, keep):
        source, start = (full, token) if kept != held else (slots, row)
        for name in ("keys", "values", "rows"):
            expected = getattr(source, name)[:, :, start : start + kept]
            assert torch.equal(getattr(taken, name)[:, :, first : first + kept], expected)
        row, token, first = row + held, token + length, first + kept
    assert first == taken.keys.shape[2]
    with pytest.raises(ValueError, match=r"keep: got 1 rows of chunk 3, needs the 2 that are held, or all 4"):
        entry.take([*keep[:3], 1, keep[4]])


def test_float8_scales_each_row(tmp_path):
    """Rows of any size keep their relative accuracy, and rows of zeros stay zeros."""
    store = KVStore.create(tmp_path, KV_FINGERPRINT, torch.float8_e4m3fn)
    entry = kv_entry(4, full=False)
    sizes = torch.logspace(-20, 20, entry.slots.keys[..., 0].numel()).view(entry.slots.keys.shape[:3])
    sizes[0, 0, 0] = 0
    entry = PassageEntry(dataclasses.replace(entry.slots, keys=entry.slots.keys * sizes[..., None]))
    store.put([passage(4)], [kv_chunks(4)], [entry])
    got = store.get(passage(4)).slots.to("cpu", torch.float32).keys
    assert ((got - entry.slots.keys).abs() <= 2**-4 * entry.slots.keys.abs()).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "other", "revision": "r2"}, r"decoder: holds keys and values of tiny \(revision r1\), got other"),
        ({"tokenizer": "t3"}, "tokenizer: holds t2, got t3"),
        ({"chunker": "fixed, k = 8"}, "chunker: holds fixed, k = 4, got fixed, k = 8"),
        ({"shared_text": "1 18"}, "shared_text: holds 1 17, got 1 18"),
        ({"rule": "distinct", "whole": 0}, "rule: holds received, got distinct; whole: holds 1, got 0"),
        ({"rows": 1}, "rows: holds 2, got 1"),
    ],
)
def test_another_fingerprint_is_refused(store, changes, message):
    put_kv(store, [1])
    other = dataclasses.replace(KV_FINGERPRINT, **changes)
    with pytest.raises(StoreError, match=message):
        KVStore.open(store.folder, other)
    assert KVStore.create(store.folder / "other", other)._key("x") != store._key("x")
    KVStore.open(store.folder, dataclasses.replace(KV_FINGERPRINT, decoder="/elsewhere/tiny"))


def test_a_store_of_the_other_slots_is_refused(store, tmp_path):
    with pytest.raises(StoreError, match="store .*: holds keys and values, needs embeddings for a ChunkStore"):
        ChunkStore.open(store.folder)
    ChunkStore.create(tmp_path / "embeddings", FINGERPRINT)
    with pytest.raises(StoreError, match="store .*: holds embeddings, needs keys and values for a KVStore"):
        KVStore.open(tmp_path / "embeddings")


def test_bad_input_writes_nothing(store):
    passages, chunks, entries = [passage(2), passage(3)], [kv_chunks(2), kv_chunks(3)], [kv_entry(2), kv_entry(3)]
    slots, full = entries[1].slots, entries[1].full
    holed = slots.values.clone()
    holed[1, 1, 2, 3] = torch.nan
    for entry, message in (
        (PassageEntry(dataclasses.replace(slots, values=holed), full), "a row isn't finite in torch.bfloat16"),
        (PassageEntry(slots, dataclasses.replace(full, keys=full.keys * 1e38)), "a row isn't finite in torch.bfl"),
        (PassageEntry(slots), "got no full rows, which the store .* holds"),
        (PassageEntry(dataclasses.replace(slots, start=3), full), "rows behind 3 tokens, needs .* and 2"),
        (PassageEntry(full, full), r"with \[1, 2, 3, 4\] rows behind 2 tokens, needs \[1, 2, 3, 4\], \[1, 2, 2, 4\]"),
        (kv_entry(2), r"passage 'id 3': got chunks of \[1, 2, 3\] tokens"),
    ):
        with pytest.raises(StoreError, match=message):
            store.put(passages, chunks, [entries[0], entry])
    with pytest.raises(StoreError, match="entries: got 1, needs 2, one for each passage"):
        store.put(passages, chunks, entries[:1])
    narrow = dataclasses.replace(slots, keys=slots.keys[..., :4], values=slots.values[..., :4])
    with pytest.raises(StoreError, match="entries: got rows of .* layers, heads and head_dim, needs one shape"):
        store.put(passages, chunks, [entries[0], PassageEntry(narrow, full)])
    assert not list(store.folder.glob("shard-*"))
    with pytest.raises(UnknownPassageError, match="passage 'id 2': its text is not in store"):
        store.get_many([passage(2)])
    with pytest.raises(StoreError, match="dtype: got torch.float64, needs one of bfloat16, float16, float32, float8"):
        KVStore.create(store.folder / "double", KV_FINGERPRINT, torch.float64)


@pytest.mark.parametrize("moment", ["half written", "before the rename", "after the rename"])
def test_a_writer_killed_at_each_step(store, moment):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["refrag.store.kv_store"])
    put_kv(store, range(BATCH))
    writer = context.Process(target=store_writer.write_and_die, args=(store.folder, moment, True))
    writer.start()
    writer.join(60)
    assert writer.exitcode == -9
    whole = 2 * BATCH if moment == "after the rename" else BATCH
    store.refresh()
    check(store, range(whole))
    put_kv(store, range(3 * BATCH))  # the next writer continues and cleans up
    check(KVStore.open(store.folder, KV_FINGERPRINT), range(3 * BATCH))
    assert not list(store.folder.glob(".part-*"))


def test_damaged_shards_are_named(store):
    put_kv(store, [1])
    shard = store.folder / "shard-00000000.safetensors"
    whole = shard.read_bytes()
    for cut in (0, 100, len(whole) - 1):
        shard.write_bytes(whole[:cut])
        with pytest.raises(StoreError, match="shard-00000000.safetensors: is damaged"):
            KVStore.open(store.folder)


def test_ten_passages_take_little_time(tmp_path):
    """Ten passages of 400 tokens at k = 8, of SmolLM2-135M's size, are found in 2 ms once the files are mapped."""
    fingerprint = KVFingerprint("tiny", "r1", "t2", "fixed, k = 8", "1", "received", rows=1, whole=0)
    store = KVStore.create(tmp_path, fingerprint)
    chunk = store_writer.Chunk("eight tokens. ", tuple(range(8)))
    passages = [Passage("eight tokens. " * 50 + " " * index) for index in range(30)]
    rows = torch.arange(50, dtype=torch.int32).expand(30, 3, -1)
    for first in range(0, 30, 10):
        entry = PassageEntry(PassageRows(*(torch.randn(2, 30, 3, 50, 64)), rows, (8,) * 50, (1,) * 50, 1))
        own = passages[first : first + 10]
        chunks = [[chunk] * 49 + [dataclasses.replace(chunk, text=chunk.text + " " * (first + i))] for i in range(10)]
        store.put(own, chunks, [entry] * 10)
    reader = KVStore.open(tmp_path, fingerprint)
    asked = [passages[index] for index in (0, 11, 22, 3, 14, 25, 6, 17, 28, 9)]
    assert all(entry.slots.keys.shape == (30, 3, 50, 64) for entry in reader.get_many(asked))
    times = []
    for _ in range(50):
        start = time.perf_counter()
        reader.get_many(asked)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3
