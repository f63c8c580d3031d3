"""`refrag generate` and `refrag inspect`, run as by a user."""

import json
import re

import pytest
import torch
from refrag import ExpansionPolicy, Passage, RefragConfig, RefragForCausalLM, RefragProcessor, weights
from refrag.adapters import TrainableSpec, add_policy, prepare, save_adapter
from refrag.bundle import ModelBundle
from refrag.cli import app
from refrag.data.passage_files import read_passages
from refrag.demo.inspection import PromptCounts, draw
from transformers import BertConfig, LlamaConfig
from typer.testing import CliRunner

BRIDGE = "The bridge of Orla was built in 1871 by Ada Lind. It is 40 m long."
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer, encoder_tokenizer):
    """A tiny random model for the real tokenizers, and a policy, saved as by a user."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    decoder = LlamaConfig(**SMALL, vocab_size=len(tokenizer), max_position_embeddings=128, eos_token_id=2)
    encoder = BertConfig(**SMALL, vocab_size=len(encoder_tokenizer))
    config = RefragConfig.from_preset("lclm", decoder, encoder, chunk_size=4)
    RefragForCausalLM(config).save_pretrained(folder)
    RefragProcessor.from_config(config, tokenizer, encoder_tokenizer).save_pretrained(folder)
    ExpansionPolicy(32).save_pretrained(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passages")
    (folder / "bridge.txt").write_text(BRIDGE)
    lines = [{"text": "Eleven kinds of bread.", "id": "baker"}, {"text": "Rain."}]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return folder


def run(command, *arguments, input=None, **environment):
    arguments = [command, "--question", "When was the bridge built?", *map(str, arguments)]
    return CliRunner().invoke(app, arguments, input=input, env={"COLUMNS": "100", **environment})


def test_inspect(saved, files):
    result = run("inspect", files / "bridge.txt", files / "more.jsonl", "--model", saved, "--expand", "2")
    assert result.exit_code == 0, result.output
    expanded = re.findall(r"\[(\d+): (.*?)\]", result.stdout)
    assert len(expanded) == 2 and all(text.strip() in BRIDGE + "Eleven kinds of bread." for _, text in expanded)
    assert "When was the bridge built?<|im_end|>" in result.stdout and "2 of" in result.stdout
    assert "\x1b" not in result.stdout, "no colours where there is no terminal"


def test_expanded_chunks_are_in_colour_unless_the_user_wants_none(saved, files):
    arguments = ("inspect", files / "bridge.txt", "--model", saved, "--selector", "everything")
    green = "\x1b[32m"
    assert green in run(*arguments, FORCE_COLOR="1").stdout
    assert green not in run(*arguments, FORCE_COLOR="1", NO_COLOR="1").stdout


def test_the_drawing_holds_every_chunk_once(saved, files):
    processor = RefragProcessor.from_pretrained(saved)
    prompt = processor(["Read: ", Passage(BRIDGE), "So?"], expand={1, 4})
    picture = draw(prompt, processor.tokenizer)
    one, four = prompt.chunks[1].text, prompt.chunks[4].text
    assert picture.plain == f"Read: [0][1: {one}][2-3][4: {four}][5-{len(prompt.chunks) - 1}]So?"
    styles = {picture.plain[span.start : span.end]: span.style for span in picture.spans}
    assert styles["[0]"] != styles[f"[1: {one}]"]
    hidden = draw(prompt, processor.tokenizer, hidden=True).plain
    assert "".join(re.findall(r"\[\d+[:~] (.*?)\]", hidden, re.DOTALL)) == BRIDGE


def test_counts(saved):
    processor = RefragProcessor.from_pretrained(saved)
    batch = [["Read: ", Passage(BRIDGE)], ["It says: ", Passage("Rain."), "So?"]]
    full = processor(batch, expand=1.0).layout.total_rows
    prompt = processor(batch, expand={0})
    counts = PromptCounts.of(prompt)
    assert (counts.rows, counts.full_rows) == (prompt.layout.total_rows, full)
    assert counts.passage_rows == len(prompt.chunks) - 1 + len(prompt.chunks[0].token_ids)
    # The paper's rate if all chunks have k tokens: 64 tokens, k = 4, 4 of 16 chunks expanded.
    even = PromptCounts(0, 0, 16, 4, 4 * 4 + 12, 64)
    assert even.rate == pytest.approx(4 / (1 - 0.25 + 4 * 0.25))


def test_generate_streams_the_answer(saved, files, tokenizer):
    arguments = (files / "bridge.txt", "--model", saved, "--max-new-tokens", 6)
    result = run("generate", *arguments)
    assert result.exit_code == 0, result.output
    model, processor = RefragForCausalLM.from_pretrained(saved), RefragProcessor.from_pretrained(saved)
    content = [Passage(BRIDGE + "\n\n", "bridge.txt"), "When was the bridge built?"]
    prompt = processor(processor.apply_chat_template([{"role": "user", "content": content}]))
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False)[0]
    assert result.stdout.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip() != ""
    counts = PromptCounts.of(prompt)
    assert str(counts) in result.stderr and "first token after" in result.stderr
    assert "untrained" not in result.stderr
    drawn = {run("generate", *arguments, "--temperature", 5, "--seed", seed).stdout for seed in (1, 1, 2)}
    assert len(drawn) == 2


def test_standard_input(saved, files):
    result = run("inspect", "-", "--model", saved, input=BRIDGE)
    assert result.exit_code == 0 and "0 of 7 chunks" in result.stdout, result.output
    lines = (files / "more.jsonl").read_text()
    result = run("inspect", "-", "--model", saved, "--hidden", input=lines)
    assert "Eleven kinds" in result.stdout and "Rain" in result.stdout and '"id"' not in result.stdout


@pytest.mark.parametrize(
    "how",
    [
        ("nothing",), ("everything",), ("random", "--expand", "50%"), ("cosine", "--expand", "0.5"),
        ("threshold", "--threshold", "-1"), ("perplexity-asc", "--expand", "1"), ("perplexity-desc", "--expand", "1"),
    ],
)  # fmt: skip
def test_every_selector(saved, files, how):
    result = run("inspect", files / "bridge.txt", "--model", saved, "--selector", *how)
    assert result.exit_code == 0, result.output
    expanded, total = map(int, re.search(r"(\d+) of (\d+) chunks", result.stdout).groups())
    share = {
        "nothing": 0,
        "everything": total,
        "threshold": total,
        "random": round(total / 2),
        "cosine": round(total / 2),
    }
    assert expanded == share.get(how[0], 1) and total > 3


def test_policy(saved, files):
    how = ("--selector", "policy", "--policy", saved / "policy", "--expand", "3")
    result = run("inspect", files / "bridge.txt", "--model", saved, *how)
    assert result.exit_code == 0 and "3 of" in result.stdout, result.output


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """The output of a training stage: a projector for the demo's decoder, and a policy."""
    folder = tmp_path_factory.mktemp("stage")
    parts = ModelBundle.load(None, weights.decoder_folder(), k=8, preset="tokens")
    save_adapter(prepare(parts.model, TrainableSpec(train_encoder="none")), folder)
    add_policy(folder, ExpansionPolicy(parts.model.config.chunk_width, width=8, num_heads=2), folder)
    return folder


def test_the_folder_of_a_training_stage(stage, files):
    arguments = (files / "bridge.txt", "--model", stage, "--selector", "policy", "--expand", "1")
    drawn = run("inspect", *arguments)
    assert drawn.exit_code == 0 and "1 of 4 chunks" in drawn.stdout, drawn.output
    answer = run("generate", *arguments, "--max-new-tokens", 2)
    assert answer.exit_code == 0 and "1 of 4 chunks" in answer.stderr, answer.output
    assert "untrained" not in answer.stderr
    wrong = run("inspect", *arguments, "--k", 4)
    assert wrong.exit_code == 2 and "--k: got 4, needs 8" in wrong.stderr
    wrong = run("inspect", *arguments, "--encoder", weights.encoder_folder())
    assert wrong.exit_code == 2 and "was trained on encoder" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bridge.txt", "--encoder", "x"), "--encoder: needs --model with the folder of a training stage"),
        ((), "passages: got none, needs files, or - for standard input"),
        (("bridge.txt", "--expand", "99"), "--expand: got 99 for prompt 0, needs 0 to "),
        (("bridge.txt", "--expand", "1.5"), "--expand: got '1.5', needs a fraction such as 0.25"),
        (("bridge.txt", "--expand", "half"), "--expand: got 'half'"),
        (("bridge.txt", "--selector", "best"), "--selector: got 'best', needs one of nothing, everything"),
        (("bridge.txt", "--selector", "cosine"), "--expand: not given, but --selector cosine needs a fraction"),
        (("bridge.txt", "--selector", "threshold"), "--threshold: not given"),
        (("bridge.txt", "--threshold", "0.5"), "--threshold: got 0.5, needs --selector threshold"),
        (("bridge.txt", "--selector", "policy", "--expand", "1"), "--policy: got None, needs the folder"),
        (("bridge.txt", "--k", "8"), "--k: got 8, needs 4, which the model was made for"),
        (("missing.txt",), "missing.txt"),
        (("bad.jsonl",), "bad.jsonl:2: is not JSON"),
        (("textless.jsonl",), "textless.jsonl:1: has no field 'text', only id"),
        (("empty.txt",), "empty.txt: has no text"),
        (("bytes.bin",), "bytes.bin: is not UTF-8 (byte 0)"),
        (("long.txt", "--expand", "100%"), "over the decoder's window of 128; "),
    ],
)
def test_bad_input_is_one_clear_line(saved, files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    (files / "bad.jsonl").write_text('{"text": "a"}\nnot JSON\n')
    (files / "textless.jsonl").write_text('{"id": "a"}\n')
    (files / "empty.txt").write_text(" \n")
    (files / "bytes.bin").write_bytes(b"\xff\xfe")
    (files / "long.txt").write_text("word " * 200)
    for command in ("inspect", "generate"):
        result = run(command, *arguments, "--model", saved)
        assert result.exit_code == 2, result.output
        assert message in result.stderr and "Traceback" not in result.output and not result.stdout


def test_a_folder_without_a_model(files, tmp_path):
    result = run("generate", files / "bridge.txt", "--model", tmp_path)
    assert result.exit_code == 2 and "has no refrag_processor.json, needs a folder" in result.stderr


def test_a_prompt_that_leaves_no_room_for_the_answer(saved, files):
    result = run("generate", files / "bridge.txt", "--model", saved, "--max-new-tokens", 120)
    assert result.exit_code == 2 and "and 120 new tokens" in result.stderr


def test_passages_of_files(files):
    passages = read_passages([files / "more.jsonl", files / "bridge.txt"])
    assert [passage.id for passage in passages] == ["baker", None, "bridge.txt"]
    assert passages[2].text == BRIDGE
