"""`refrag train` and `refrag eval`: all stages in sequence on small models."""

import json

import pytest
import torch
from refrag import weights
from refrag.cli import app
from refrag.loading import trained_sources
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from tests.refrag import tiny, training_parts


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer, encoder_tokenizer):
    folder = tmp_path_factory.mktemp("train")
    parts = training_parts.parts(tokenizer, encoder_tokenizer)
    parts.model.decoder.save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    (folder / "texts").mkdir()
    documents = training_parts.documents(tokenizer, count=24)
    for number, (start, end) in enumerate(zip(documents.offsets, documents.offsets[1:])):
        (folder / "texts" / f"{number}.txt").write_text(tokenizer.decode(documents.token_ids[start:end]))
    with open(folder / "questions.jsonl", "w") as file:
        for number in range(8):
            entry = {"question": "When?", "passages": [f"It was built in {number}.", "It rained."], "answer": "Then."}
            file.write(json.dumps(entry) + "\n")
    return folder


@pytest.fixture(autouse=True)
def gradients(workplace, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(workplace / "cache"))
    with torch.enable_grad():
        yield


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exit_code not in (0, 2):
        raise result.exception
    return result


def train(stage, workplace, *arguments):
    common = ["--decoder", workplace / "decoder", "--preset", "tokens", "--k", 4, "--rank", 2, "--steps", 3,
              "--batch-size", 4, "--precision", "no"]  # fmt: skip
    return run("train", stage, *common, *arguments)


def test_the_recipe(workplace):
    texts = ["--data", workplace / "texts", "--held-out", 0.2]
    parts = ["--train-encoder", "none", "--train-decoder", "lora"]
    stages = [workplace / name for name in ("reconstruction", "pretraining", "answers", "policy", "tables")]
    result = train("reconstruct", workplace, *texts, *parts, "--max-chunks", 4, "--output", stages[0])
    assert result.exit_code == 0 and "adapter.safetensors" in result.output, result.output
    result = train("pretrain", workplace, *texts, *parts, "--max-chunks", 4, "--output-tokens", 4, "--expand", 0.25,
                   "--start", stages[0], "--output", stages[1])  # fmt: skip
    assert result.exit_code == 0, result.output
    result = train("finetune", workplace, "--data", workplace / "questions.jsonl", *parts, "--held-out", 0.25,
                   "--start", stages[1], "--output", stages[2])  # fmt: skip
    assert result.exit_code == 0, result.output
    for folder in stages[:3]:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert log[-1]["step"] == 3 and log[-1]["held_out_loss"] > 0
    result = run("train", "policy", *texts, "--adapter", stages[2], "--chunks", 4, "--output-tokens", 4, "--steps", 2,
                 "--contexts", 2, "--rollouts", 3, "--expand", 0.25, "--width", 16, "--output", stages[3])  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run("eval", "perplexity", "--adapter", stages[3], "--data", f"words={workplace / 'texts'}",
                 "--output", stages[4], "--context", 16, "--output-tokens", 4,
                 "--samples", 2, "--rates", "2", "--selectors", "random")  # fmt: skip
    assert result.exit_code == 0, result.output
    table = json.loads((stages[4] / "perplexity.json").read_text())
    names = [row["condition"] for row in table["tables"]["words"]]
    assert names[-3:] == ["compressed", "random, 2x", "policy, 2x"] and "full context (untrained)" in names
    assert table["settings"]["k"] == 4


def test_a_run_is_repeated_from_its_options(workplace):
    torch.manual_seed(0)  # as in a new process, since the projector's initialization is random
    result = train("reconstruct", workplace, "--data", workplace / "texts", "--held-out", 0.2, "--max-chunks", 2,
                   "--train-encoder", "none", "--output", workplace / "first")  # fmt: skip
    assert result.exit_code == 0, result.output
    again = ["--config", workplace / "first" / "options.toml", "--output", workplace / "again"]
    torch.manual_seed(0)
    assert run("train", "reconstruct", *again).exit_code == 0
    logs = [(workplace / name / "log.jsonl").read_text() for name in ("first", "again")]
    losses = [[json.loads(line)["held_out_loss"] for line in log.splitlines()] for log in logs]
    assert losses[0] == losses[1]
    first, second = ((workplace / name / "options.toml").read_text() for name in ("first", "again"))
    assert second == first.replace(str(workplace / "first"), str(workplace / "again")) and "steps = 3\n" in first
    assert not (workplace / "first" / "stage.json").exists()


def test_an_adapter_knows_its_encoder_and_decoder(workplace, encoder_tokenizer):
    torch.manual_seed(0)
    small = {**tiny._ENCODER, "vocab_size": len(encoder_tokenizer), "num_hidden_layers": 1}
    BertModel(BertConfig(**small)).save_pretrained(workplace / "encoder")
    encoder_tokenizer.save_pretrained(workplace / "encoder")
    result = train("reconstruct", workplace, "--preset", "lclm", "--encoder", workplace / "encoder", "--output",
                   workplace / "lclm", "--data", workplace / "texts", "--held-out", 0.2, "--max-chunks", 2,
                   "--steps", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert trained_sources(workplace / "lclm") == (str(workplace / "encoder"), str(workplace / "decoder"))
    assert trained_sources(workplace / "lclm", "one", "two") == ("one", "two")
    result = run("eval", "perplexity", "--adapter", workplace / "lclm", "--data", f"words={workplace / 'texts'}",
                 "--output", workplace / "lclm-table", "--context", 16, "--output-tokens", 4, "--samples", 1,
                 "--rates", "2", "--selectors", "cosine")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (workplace / "lclm-table" / "perplexity.md").exists()
    # An adapter that doesn't name them is for the demo's models.
    shipped = weights.adapter_file(8)
    assert trained_sources(shipped) == (None, str(weights.decoder_folder()))


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("reconstruct", ["--data", "missing.txt"], "missing.txt, which does not exist"),
        ("reconstruct", ["--data", "texts", "--max-chunks", 256], "needs 1024 for one sample"),
        ("reconstruct", ["--data", "texts", "--train-decoder", "half"], "train_decoder: got 'half'"),
        ("pretrain", ["--data", "texts", "--steps", 0], "steps: got 0"),
        ("finetune", ["--data", "broken.jsonl"], "broken.jsonl:2: got 'nonsense'"),
        ("finetune", ["--data", "lacking.jsonl"], "questions: number 0 has no passages, answer"),
    ],
)
def test_mistakes_get_one_line(workplace, monkeypatch, stage, arguments, message):
    monkeypatch.chdir(workplace)
    (workplace / "broken.jsonl").write_text('{"question": "a", "passages": ["b"], "answer": "c"}\nnonsense\n')
    (workplace / "lacking.jsonl").write_text('{"question": "a"}\n')
    result = train(stage, workplace, *arguments, "--output", workplace / "none")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (workplace / "none" / "adapter.safetensors").exists()
