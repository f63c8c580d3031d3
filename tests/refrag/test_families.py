"""Families of transformers: a dozen in every run; all with REFRAG_FAMILIES=all, which writes docs/families.md."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from tests.refrag import families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
DECODERS = "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text phi3 granite cohere olmo2 gpt_oss".split()
ENCODERS = {"bert": "packed", "roberta": "packed", "modernbert": "packed", "mpnet": "padded", "qwen3": "packed, causal"}
SECONDS = 120  # per family


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_that_must_work(kind):
    assert families.check_decoder(kind) == "works"
    assert rows("Decoders")[kind] == "works"


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_that_must_work(kind):
    assert families.check_encoder(kind) == ENCODERS[kind]
    assert rows("Encoders")[kind] == ENCODERS[kind]


def test_each_family_of_transformers_has_a_row():
    version = re.search(r"transformers (\d+(?:\.\d+)*)", PAGE.read_text())[1]
    if version != transformers.__version__:
        pytest.skip(f"the page was made with transformers {version}")
    assert list(rows("Decoders")) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sorted([*rows("Encoders"), *no_text()]) == sorted(MODEL_MAPPING_NAMES)


@pytest.mark.skipif(os.environ.get("REFRAG_FAMILIES") != "all", reason="make test-families")
@pytest.mark.parametrize("section", ["Decoders", "Encoders"])
def test_every_family_of_transformers(section):
    kinds = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if section == "Decoders" else MODEL_MAPPING_NAMES)
    made, failures, silent = {}, [], []
    for kind in kinds:
        try:
            if section == "Encoders" and not takes_text(kind):
                silent.append(kind)
                continue
            with limited(SECONDS):
                made[kind] = families.check_decoder(kind) if section == "Decoders" else families.check_encoder(kind)
        except families.Differs as error:
            failures.append(f"{kind}: {error}")
        except Exception as error:  # a config that doesn't accept these sizes
            reason = re.sub(r" from '/[^']*'", "", " ".join(str(error).split()))  # without package paths
            made[kind] = f"not tried: {type(error).__name__}: {reason[:120]}"
        torch.manual_seed(0)
    before, verdicts = PAGE.read_text(), rows(section)
    PAGE.write_text(replaced(before, section, made, silent))
    assert not failures
    changed = {kind: (verdicts.get(kind), text) for kind, text in rows(section).items()}
    changed = {kind: both for kind, both in changed.items() if verdict(both[0]) != verdict(both[1])}
    # Which families can't be tried depends on the machine and its installed packages.
    changed = {kind: both for kind, both in changed.items() if "not tried" not in map(verdict, both)}
    assert not changed, f"{PAGE} was out of date and has been rewritten"


def takes_text(kind):
    """Return whether the family's model takes tokens as its first input."""
    known = MODEL_MAPPING[CONFIG_MAPPING[kind]]
    return (known[0] if isinstance(known, tuple) else known).main_input_name == "input_ids"


def rows(section):
    """Return a table of the page as family -> text."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.MULTILINE))


def no_text():
    """Return the families that the page lists as taking no text."""
    return re.findall(r"`([^`]+)`", PAGE.read_text().split("## Without text\n")[1].split(": ")[1])


def replaced(page, section, made, silent):
    """Return the page with a section's table replaced."""
    table = "\n".join(f"| `{kind}` | {text.replace('|', '/').replace('`', '')} |" for kind, text in made.items())
    head, tail = page.split(f"## {section}\n")
    before, rest = tail.split("| --- | --- |\n")[0], tail.split("\n\n## ", 1)[1:]
    page = f"{head}## {section}\n{before}| --- | --- |\n{table}\n\n## {rest[0]}"
    if silent:
        head, tail = page.split("## Without text\n")
        page = f"{head}## Without text\n{tail.split(': ', 1)[0]}: {', '.join(f'`{kind}`' for kind in silent)}.\n"
    return re.sub(r"transformers \d+(\.\d+)*", f"transformers {transformers.__version__}", page, count=1)


def verdict(text):
    """Return a row's verdict without its reason: "works", "packed, causal", "refused", "not tried"."""
    return "not listed" if text is None else text.partition(":")[0]


@contextlib.contextmanager
def limited(seconds):
    def stop(*_):
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
