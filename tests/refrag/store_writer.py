"""Write a store in processes that tests start and kill; imports only what the store needs."""

import os
import signal

import torch
from refrag.model.inputs import Chunk, Passage
from refrag.model.passage_rows import PassageEntry, PassageRows, all_rows
from refrag.store import shard
from refrag.store.fingerprint import Fingerprint, KVFingerprint
from refrag.store.kv_store import KVStore
from refrag.store.store import ChunkStore

LAYERS, HEADS, HEAD_DIM = 3, 2, 8
KV_FINGERPRINT = KVFingerprint("tiny", "r1", "t2", "fixed, k = 4", "1 17", "received", rows=2, whole=1)
WIDTH, CHUNKS, BATCH = 64, 12, 50
FINGERPRINT = Fingerprint("tiny", "r1", "t1", "t2", "fixed, k = 4", "first", True, WIDTH)


def passage(number):
    return Passage("".join(f"passage {number} chunk {chunk}\n" for chunk in range(1 + number % CHUNKS)), f"id {number}")


def chunks(number):
    """Return a passage's chunks, with zero, one or more tokens."""
    lines = passage(number).text.splitlines(keepends=True)
    return [Chunk(line, tuple(range(number, number + index % 5))) for index, line in enumerate(lines)]


def rows(number):
    """Return a passage's embeddings: rows are unique across passages and exact in every dtype."""
    count = 1 + number % CHUNKS
    row = torch.arange(count)[:, None].expand(count, WIDTH // 2)
    return torch.cat([torch.full_like(row, number % 256), torch.full_like(row, number // 256) + 16 * row], 1).float()


def put(store, numbers, **options):
    numbers = list(numbers)
    embeds = torch.cat([torch.empty(0, WIDTH), *map(rows, numbers)])
    return store.put([passage(number) for number in numbers], [chunks(number) for number in numbers], embeds, **options)


def kv_entry(number, full=True):
    """Return the keys and values of a passage, with numbers of its own that are exact in every dtype but float8."""
    lengths = tuple(len(chunk.token_ids) for chunk in kv_chunks(number))
    keep = KV_FINGERPRINT.slot_rule.keep(lengths)

    def rows(count, first):
        numbers = torch.arange(LAYERS * HEADS * count).view(LAYERS, HEADS, count, 1) % 97 + first
        return (numbers + torch.arange(HEAD_DIM) / 128 + number).bfloat16().float()

    tokens = torch.arange(sum(keep), dtype=torch.int32).expand(LAYERS, HEADS, -1)
    slots = PassageRows(rows(sum(keep), 0), rows(sum(keep), 1), tokens, lengths, keep, 2)
    whole = all_rows(rows(sum(lengths), 2), rows(sum(lengths), 3), lengths=lengths, start=2)
    return PassageEntry(slots, whole if full else None)


def kv_chunks(number):
    """Return a passage's chunks, with one or more tokens."""
    return [Chunk(chunk.text, (7, *chunk.token_ids)) for chunk in chunks(number)]


def put_kv(store, numbers, **options):
    numbers = list(numbers)
    entries = [kv_entry(number, store.full) for number in numbers]
    return store.put([passage(number) for number in numbers], [kv_chunks(n) for n in numbers], entries, **options)


def write_forever(folder, connection):
    """Put one shard after another, and send the number of each finished shard."""
    store = ChunkStore.open(folder, FINGERPRINT)
    for number in range(100_000):
        put(store, range(number * BATCH, (number + 1) * BATCH))
        connection.send(number)


def write_and_die(folder, moment, kv=False):
    """Put a shard and die at a given moment during it."""

    def die(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    store = KVStore.open(folder, KV_FINGERPRINT) if kv else ChunkStore.open(folder, FINGERPRINT)
    real = shard.save_file

    def die_half_written(tensors, path, **options):
        real(tensors, path, **options)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    if moment == "half written":
        shard.save_file = die_half_written
    else:
        setattr(
            os, {"before the sync": "fsync", "before the rename": "replace", "after the rename": "open"}[moment], die
        )
    (put_kv if kv else put)(store, range(BATCH, 2 * BATCH))


def write_range(folder, start, end, step):
    """Put passages in small shards."""
    store = ChunkStore.open(folder, FINGERPRINT)
    for first in range(start, end, step):
        put(store, range(first, min(first + step, end)))
