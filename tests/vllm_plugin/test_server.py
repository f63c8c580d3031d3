"""`vllm serve` with the plugin and the official openai client: no request is lost, and malformed ones are rejected."""

import asyncio
import base64
import io
import re
from pathlib import Path

import openai
import pytest
import torch
from refrag import ChunkStore, Passage, PassageEncoder
from refrag.integrations.vllm.passages import MARK

from tests.vllm_plugin.server import serving

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "vllm.md"
REQUESTS, AT_ONCE = 200, 8


def about(number):
    return (
        f"House {number} of Orla was built in {1600 + number} by masons from the north. It has {number % 7 + 2} floors "
        f"and a cellar in which {number * 3} barrels of wine are kept for the market."
    )


@pytest.fixture(scope="module")
def served(folder, model, processor, tmp_path_factory):
    encoder = PassageEncoder.from_model(model, processor)
    root = tmp_path_factory.mktemp("server")
    store = ChunkStore.create(root / "store", encoder.fingerprint)
    encoder.fill(store, [Passage(about(number), f"house {number}") for number in range(4)])
    with serving(
        folder, root / "log", "--max-model-len", "1024", "--enable-mm-embeds", "--trust-request-mm-kwargs",
        "--mm-processor-kwargs", f'{{"store": "{store.folder}"}}',
    ) as address:  # fmt: skip
        yield address


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0, timeout=600)


def messages(passage, question="\nWhen was it built?"):
    parts = [
        {"type": "text", "text": "Read this: "},
        {"type": "passage", **passage},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": parts}]


def expected(model, processor, text, count, expand=(), question="\nWhen was it built?"):
    parts = processor.apply_chat_template([{"role": "user", "content": ["Read this: ", Passage(text), question]}])
    tokens = model.generate(processor(parts, expand=expand), max_new_tokens=count, do_sample=False)[0]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def answer(client, passage, count=8, **options):
    reply = client.chat.completions.create(
        model="refrag", messages=messages(passage), max_tokens=count, temperature=0, extra_body=options
    )
    return reply.choices[0].message.content


def test_answers_are_those_of_generate(client, model, processor):
    text = about(1)
    compressed = expected(model, processor, text, 8)
    rows = model.encode_chunks(processor([Passage(text)]).encoder_input).detach()
    saved = io.BytesIO()
    torch.save(rows, saved)
    assert answer(client, {"text": text}) == compressed
    assert answer(client, {"id": "house 1"}) == compressed
    assert answer(client, {"embeds": base64.b64encode(saved.getvalue()).decode()}) == compressed
    expanded = expected(model, processor, text, 8, expand=[0])
    assert answer(client, {"text": text}, mm_processor_kwargs={"expand": [0]}) == expanded != compressed


def test_streams(client):
    asked = dict(model="refrag", messages=messages({"text": about(2)}), max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = [event.choices[0].delta.content for event in client.chat.completions.create(**asked, stream=True)]
    assert "".join(piece or "" for piece in pieces) == whole
    assert len([piece for piece in pieces if piece]) > 3


def test_none_of_many_is_lost(served, model, processor):
    async def drive():
        turns = asyncio.Semaphore(AT_ONCE)
        async with openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0, timeout=900) as client:

            async def ask(number):
                async with turns:
                    return await client.chat.completions.create(
                        model="refrag", messages=messages({"text": about(number)}), max_tokens=4, temperature=0
                    )

            return await asyncio.gather(*map(ask, range(REQUESTS)), return_exceptions=True)

    replies = asyncio.run(drive())
    failed = [reply for reply in replies if isinstance(reply, BaseException)]
    assert not failed, failed[:3]
    answers = [reply.choices[0].message.content for reply in replies]
    assert len(answers) == REQUESTS
    for number in range(0, REQUESTS, 29):
        assert answers[number] == expected(model, processor, about(number), 4)


MALFORMED = {
    "no text": ({"text": ""}, {}, "passage 0: text: has no text"),
    "nothing": ({}, {}, "passage 0: is empty"),
    "another field": ({"body": "x"}, {}, "passage 0: got 'body'"),
    "a number": ({"text": 3}, {}, "passage 0: text: got int"),
    "no base64": ({"embeds": "?"}, {}, "passage 0: embeds: is not base64"),
    "no tensor": ({"embeds": "YWJj"}, {}, "passage 0: embeds: is not a tensor"),
    "unknown id": ({"id": "nowhere"}, {}, "nowhere"),
    "too long": ({"text": "word " * 40_000}, {}, "1024"),
    "no such chunk": ({"text": "It rained."}, {"expand": [9]}, "expand: got chunk 9"),
    "no such option": ({"text": "It rained."}, {"store": "x"}, "store"),
    "no such selector": ({"text": "It rained."}, {"selector": "policy"}, "selector: got 'policy'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_passage_is_a_bad_request(name, client):
    passage, options, message = MALFORMED[name]
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as error:
        answer(client, passage, mm_processor_kwargs=options)
    assert error.value.status_code == 400
    assert answer(client, {"text": about(3)}, 2)


@pytest.mark.parametrize("text", [MARK, f"Read {MARK} and {MARK}"])
def test_marks_in_text_are_bad_requests(text, client):
    with pytest.raises(openai.BadRequestError, match="reserved for passages"):
        client.chat.completions.create(model="refrag", messages=[{"role": "user", "content": text}], max_tokens=2)
    with pytest.raises(openai.BadRequestError, match="marks a passage"):
        client.completions.create(model="refrag", prompt=text, max_tokens=2)
    assert answer(client, {"text": about(3)}, 2)


def test_the_example_of_the_page(served, capsys):
    blocks = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "http://127.0.0.1:8000" in block]
    exec(compile(block.replace("http://127.0.0.1:8000", served), str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip()
