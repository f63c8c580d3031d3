"""Benchmark a running vLLM server: the same passages as text and as slots, measured as in `vllm bench serve`.

vllm serve FOLDER --tokenizer-mode refrag --served-model-name refrag --mm-processor-kwargs '{"store": "STORE"}' ...
python -m bench.serving --url http://127.0.0.1:8000 --json serving.json

Requests are streamed, several at a time. The ways alternate each round, and every request has passages of its own.
Needs the package openai, and for "store" a store made with `--fill FOLDER STORE`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import re
import statistics
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from refrag import Passage
from refrag.demo.corpus import python_reference

WAYS = ("text", "slots", "store")
QUESTION = "\nWhat is this about?"


@dataclasses.dataclass(frozen=True)
class Timed:
    """A timed request: milliseconds to the first token and in total, prompt rows and new tokens."""

    first: float
    whole: float
    prompt: int
    new: int


def requests(count: int, passages: int) -> list[list[Passage]]:
    """Return ``passages`` distinct passages for each of ``count`` requests."""
    corpus = [passage for passage in python_reference() if len(passage.text.split()) >= 100]
    needed = count * passages
    if needed > len(corpus):
        raise SystemExit(f"--requests x --passages x --rounds: got {needed} passages, needs at most {len(corpus)}")
    return [corpus[index * passages : (index + 1) * passages] for index in range(count)]


def content(way: str, passages: Sequence[Passage]) -> list[dict[str, str]]:
    """Return the message's parts."""
    parts = {
        "text": [{"type": "text", "text": passage.text} for passage in passages],
        "slots": [{"type": "passage", "text": passage.text} for passage in passages],
        "store": [{"type": "passage", "id": passage.id} for passage in passages],
    }[way]
    if way == "text":  # a single part: chat templates may insert text between parts
        return [{"type": "text", "text": "".join(part["text"] for part in parts) + QUESTION}]
    return [*parts, {"type": "text", "text": QUESTION}]


async def ask(client, model: str, parts: list[dict[str, str]], new: int) -> Timed:
    """Send one request and read its stream."""
    start = time.perf_counter()
    first, usage = None, None
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": parts}], max_tokens=new, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for event in stream:
        # The first event carries only the role.
        if first is None and event.choices and event.choices[0].delta.content:
            first = time.perf_counter()
        usage = event.usage or usage
    end = time.perf_counter()
    return Timed(1e3 * ((first or end) - start), 1e3 * (end - start), usage.prompt_tokens, usage.completion_tokens)


async def drive(client, model: str, jobs: Sequence[list[dict[str, str]]], at_once: int, new: int):
    """Run all requests; return each request's times, and the total seconds."""
    turns = asyncio.Semaphore(at_once)

    async def one(parts):
        async with turns:
            return await ask(client, model, parts, new)

    start = time.perf_counter()
    return await asyncio.gather(*map(one, jobs)), time.perf_counter() - start


def kv_blocks(url: str) -> tuple[int, int]:
    """Return the server's number of KV blocks and the block size in rows, from its metrics."""
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    line = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info"))
    fields = dict(re.findall(r'(\w+)="([^"]*)"', line))
    return int(fields["num_gpu_blocks"]), int(fields["block_size"])


def summary(timed: Sequence[Timed], seconds: float, blocks: int, block: int) -> dict[str, float]:
    """Return the figures of one way."""
    first = sorted(one.first for one in timed)
    rows = round(statistics.mean(one.prompt for one in timed))
    new = max(one.new for one in timed)
    return {
        "requests": len(timed),
        "prompt_rows": rows,
        "ttft_median_ms": statistics.median(first),
        "ttft_p10_ms": first[len(first) // 10],
        "ttft_p90_ms": first[-1 - len(first) // 10],
        "requests_per_s": len(timed) / seconds,
        "new_tokens_per_s": sum(one.new for one in timed) / seconds,
        "kv_blocks": blocks,
        "requests_that_fit": blocks // -(-(rows + new) // block),
    }


async def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time all ways, alternating each round."""
    import openai

    per_round = options.requests
    given = requests(per_round * options.rounds + 1, options.passages)
    timed: dict[str, list[Timed]] = {way: [] for way in options.ways}
    seconds = dict.fromkeys(options.ways, 0.0)
    async with openai.AsyncOpenAI(base_url=f"{options.url}/v1", api_key="none", max_retries=0, timeout=3600) as client:
        for way in options.ways:
            await ask(client, options.model, content(way, given[-1]), options.new)
        for number in range(options.rounds):
            own = given[number * per_round : (number + 1) * per_round]
            for way in options.ways:
                jobs = [content(way, passages) for passages in own]
                results, took = await drive(client, options.model, jobs, options.at_once, options.new)
                timed[way] += results
                seconds[way] += took
    blocks, block = kv_blocks(options.url)
    return {way: summary(timed[way], seconds[way], blocks, block) for way in options.ways}


def fill(folder: str, store: str) -> None:
    """Encode the corpus into a store for the server."""
    from refrag import ChunkStore, PassageEncoder
    from refrag.loading import load_model, load_processor

    encoder = PassageEncoder.from_model(load_model(Path(folder)), load_processor(Path(folder)))
    encoder.fill(ChunkStore.create(store, encoder.fingerprint), python_reference())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="refrag")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--passages", type=int, default=5, help="passages per request, about 200 tokens each")
    parser.add_argument("--requests", type=int, default=8, help="requests per way and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--new", type=int, default=8, help="tokens to generate")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--fill", nargs=2, metavar=("FOLDER", "STORE"), help="make the store and exit")
    options = parser.parse_args()
    if options.fill:
        fill(*options.fill)
        return
    rows = asyncio.run(measure(options))
    for way, row in rows.items():
        print(f"{way:6} " + "  ".join(f"{name} {value:,.4g}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
