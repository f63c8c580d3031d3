"""Option files: valid contents, precedence of the command line, and repeating a run from its own file."""

import dataclasses
import json
from pathlib import Path

import pytest
import typer
from refrag.commands.option_commands import option_command
from refrag.training.arguments import arguments
from refrag.training.command_line import parse
from refrag.training.config_files import read_config, write_config
from refrag.training.distill.options import DistillOptions
from refrag.training.options import (
    FinetuneOptions,
    LoopOptions,
    PerplexityOptions,
    PolicyOptions,
    PretrainOptions,
    ReconstructOptions,
)
from typer.testing import CliRunner

# As written by a run at b88c934.
STAGE = {
    "objective": "next_paragraph",
    "trained": {"encoder": "none", "decoder": "lora", "rank": 2},
    "settings": {
        "steps": 3, "batch_size": 4, "learning_rate": 0.01, "projector_rate": None, "encoder_rate": None,
        "warmup": 0.04, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_rows": 4096, "checkpoint_every": 1,
        "log_every": 1, "evaluate_every": 2, "seed": 0,
    },
    "max_chunks": 2, "curriculum": False, "output_tokens": 128, "expand": 0.1, "fixed_length": True,
}  # fmt: skip

FULL = {
    ReconstructOptions: dict(output="run/1", data=["a", "hub:train"], decoder="/mödel \"x\"", betas=[0.5, 1e-9]),
    PretrainOptions: dict(output="run/2", data=["b"], start="run/1", curriculum=False, learning_rate=1e-20),
    FinetuneOptions: dict(output="run/3", data="questions.jsonl", pooling="mean", precision="no"),
    PolicyOptions: dict(output="run/4", data=["b"], adapter="run/3", expand=0.25),
    PerplexityOptions: dict(output="t", data=["x=b"], adapter="run/4", rates=[2, 4], selectors=[], untrained=False),
    DistillOptions: dict(output="d", tokens=["a.tok"], heldout=["b.tok"], minutes=7, contexts=[64], compile=True),
}  # fmt: skip


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("options", FULL, ids=lambda options: options.__name__)
def test_what_is_written_is_read(tmp_path, options):
    made = options(**FULL[options])
    write_config(made, tmp_path)
    assert options(**read_config(tmp_path / "options.toml", options)) == made
    assert isinstance(made.output, Path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'data = ["texts"]\nlearning_rate = 2e-5\nprecision = "no"\nmax_grad_norm = 1\ncurriculum = false\n'),
        ("a.yaml", "data: [texts]\nlearning_rate: 2e-5\nprecision: no\nmax_grad_norm: 1\ncurriculum: false\n"),
        ("a.yml", "data:\n- texts\nlearning_rate: 0.00002\nprecision: 'no'\nmax_grad_norm: 1.\ncurriculum: False\n"),
        ("a.json", '{"data": ["texts"], "learning_rate": 2e-5, "precision": "no", "max_grad_norm": 1, '
                   '"curriculum": false}'),
    ],
)  # fmt: skip
def test_formats_say_the_same(tmp_path, name, text):
    values = read_config(write(tmp_path / name, text), ReconstructOptions)
    expected = {"data": ("texts",), "learning_rate": 2e-5, "precision": "no", "max_grad_norm": 1.0, "curriculum": False}
    assert values == expected and [type(values[name]) for name in expected] == list(map(type, expected.values()))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "learning_rat = 1.0", r"a\.toml: got learning_rat, .*; did you mean learning_rate\?"),
        ("a.toml", "batch-size = 2", "got batch-size, .*; did you mean batch_size"),
        ("a.toml", "output_tokens = 2", "got output_tokens, which isn't an option of this command"),
        ("a.toml", "[settings]\nsteps = 2", "got settings, which isn't an option"),
        ("a.toml", "steps = 2.5", r"a\.toml: steps: got 2\.5, needs a whole number"),
        ("a.toml", "steps = true", "steps: got True, needs a whole number"),
        ("a.toml", "learning_rate = 'high'", "learning_rate: got 'high', needs a number"),
        ("a.toml", "curriculum = 1", "curriculum: got 1, needs true or false"),
        ("a.toml", "output = 1", "output: got 1, needs a path"),
        ("a.toml", "k = '8'", "k: got '8', needs a whole number"),
        ("a.toml", "data = 'texts'", "data: got 'texts', needs a list of names"),
        ("a.toml", "betas = [0.9, 'x']", "betas: got 'x', needs a list of numbers"),
        ("a.toml", "train_encoder = 'half'", "train_encoder: got 'half', needs one of all, lora, none"),
        ("a.toml", "steps = ", r"a\.toml: can't be read as TOML"),
        ("a.yaml", "steps: [", r"a\.yaml: can't be read as YAML"),
        ("a.yaml", "- steps", "needs options by name"),
        ("a.json", "{", "can't be read as JSON"),
        ("a.txt", "steps = 1", r"a\.txt: needs one of the suffixes \.toml, \.yaml, \.yml, \.json"),
    ],
)
def test_refused(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path / name, text), ReconstructOptions)


def test_a_stage_of_before_is_read(tmp_path):
    path = write(tmp_path / "stage.json", json.dumps(STAGE))
    made = PretrainOptions(data=("texts",), output=tmp_path, **read_config(path, PretrainOptions))
    assert (made.train_encoder, made.train_decoder, made.rank) == ("none", "lora", 2)
    for name, value in {**STAGE["settings"], "max_chunks": 2, "curriculum": False, "output_tokens": 128, "expand": 0.1,
                        "fixed_length": True}.items():  # fmt: skip
        assert getattr(made, name) == value
    with pytest.raises(ValueError, match="was written by stage next_paragraph, needs one of stage reconstruction"):
        read_config(path, ReconstructOptions)


def both(given):
    """Return the options that each of the two command lines parses from the same arguments, or its error."""
    got, app = [], typer.Typer()
    app.command()(option_command(PretrainOptions)(lambda options, console: got.append(options)))
    result = CliRunner().invoke(app, given)
    got.append(result.output if result.exit_code else parse(PretrainOptions, "pretrain", given))
    return got


def test_the_command_line_wins(tmp_path):
    text = 'data = ["texts"]\noutput = "run"\nsteps = 7\nbetas = [0.5, 0.6]\ncurriculum = false\nwarmup = 0.5\n'
    given = ["--config", str(write(tmp_path / "recipe.toml", text))]
    wanted = PretrainOptions(data=["texts"], output="run", steps=7, betas=(0.5, 0.6), curriculum=False, warmup=0.5)
    assert both(given) == [wanted, wanted]
    given += ["--data", "a", "--data", "b", "--steps", "9", "--betas", "0.1,0.2", "--curriculum", "--warmup", "0.04"]
    wanted = dataclasses.replace(wanted, data=["a", "b"], steps=9, betas=(0.1, 0.2), curriculum=True, warmup=0.04)
    assert both(given) == [wanted, wanted]


def test_what_is_required_may_be_in_the_file_only(tmp_path, capsys):
    given = ["--config", str(write(tmp_path / "recipe.toml", 'data = ["texts"]\n'))]
    (message,) = both(given)
    assert "Missing option '--output'" in message
    with pytest.raises(SystemExit):
        parse(PretrainOptions, "pretrain", given)
    assert "required: --output" in capsys.readouterr().err
    assert len(both([*given, "--output", "run"])) == 2
    (message,) = both(["--config", str(write(tmp_path / "recipe.toml", "step = 1"))])
    assert "did you mean steps?" in " ".join(message.split())


def test_an_earlier_name_is_taken(tmp_path):
    given = ["--adapter", "a", "--output", "t", "--data", "x=y"]
    wanted = PerplexityOptions(adapter="a", output="t", data=["x=y"], selectors=["random", "cosine"])
    for name in ("selectors", "choosers"):
        file = write(tmp_path / "a.toml", f'{name} = ["random", "cosine"]')
        assert parse(PerplexityOptions, "perplexity", [*given, f"--{name}", "random,cosine"]) == wanted
        assert parse(PerplexityOptions, "perplexity", [*given, "--config", str(file)]) == wanted


@pytest.mark.parametrize("options", [*FULL, LoopOptions])
def test_every_option_says_what_it_is(options):
    for argument in arguments(options):
        assert argument.help.endswith(".") and "``" not in argument.help, argument
        assert argument.kind in (str, int, float, bool, Path)
