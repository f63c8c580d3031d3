"""Distillation: batches, the loss, whole runs, and interrupted runs."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch
from refrag.adapters import load_adapter, read_adapter
from refrag.bundle import ModelBundle
from refrag.cli import app
from refrag.loading import load_trained
from refrag.model.inputs import Passage
from refrag.training.command_line import parse
from refrag.training.distill import batches
from refrag.training.distill.checkpoint import read_state
from refrag.training.distill.loop import DistillationError, distill
from refrag.training.distill.loss import distillation_loss
from refrag.training.distill.low_rank import SCALE, LowRankLinear
from refrag.training.distill.models import Distillation
from refrag.training.distill.optimizer import rates_at
from refrag.training.distill.options import DistillOptions
from refrag.training.likelihood import target_log_probs
from refrag.training.samples import collate_for, next_paragraph
from refrag.training.token_files import load_tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bench.gpu_report.blocks import training
from tests.refrag import distill_files


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    distill_files.write(folder)
    return folder


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


def decoder_of(place):
    return AutoModelForCausalLM.from_pretrained(place / "decoder")


@pytest.mark.parametrize("lengths", [[[4, 4, 4], [4, 4, 4], [4, 4], [4, 4]], [[4, 4, 4], [3, 4, 1], [4, 2], [3, 3]]])
def test_a_batch_is_what_its_samples_are_one_by_one(lengths):
    k, first, task = 4, 1, 9
    shape = batches.Shape(k, 12, 3, 2, 1, 2, 2)
    continued, rewritten = np.arange(20, 50).reshape(2, 15), np.arange(60, 76).reshape(2, 8)
    for own, after, tokens in zip(lengths, (3, 3, 0, 0), [*continued, *rewritten]):
        tokens[sum(own) + after :] = 0
    picks = np.array([[False, True, False], [True, False, False]])
    runs = [
        batches.Windows(tokens, np.array(own)) for tokens, own in ((continued, lengths[:2]), (rewritten, lengths[2:]))
    ]
    batch = batches.make_batch(shape, *runs, picks, first, task, torch.device("cpu"))
    common = batches.Rows(shape, torch.device("cpu"))
    rows, slots, predicts, targets, encoded, starts = [], [], [], [], [], []

    def chunks_of(tokens, own, places):
        starts.extend(len(encoded) + sum(own[:chunk]) for chunk in range(len(own)))
        encoded.extend(tokens[: sum(own)] + [0] * (places - sum(own)))
        return [tokens[sum(own[:chunk]) : sum(own[: chunk + 1])] for chunk in range(len(own))]

    def write(tokens):
        for token in tokens:
            predicts.append(len(rows) - 1)
            targets.append(token)
            rows.append(token)

    for sample in range(2):
        end = len(rows) + shape.continuation_rows
        rows.append(first)
        for chunk, tokens in enumerate(chunks_of(continued[sample].tolist(), lengths[sample], 12)):
            if picks[sample, chunk]:
                rows += tokens
            else:
                slots.append((len(rows), sample * 3 + chunk))
                rows.append(0)
        before = sum(lengths[sample])
        write(continued[sample, before : before + 3].tolist())
        rows += [0] * (end - len(rows))
    for sample in range(2):
        end = len(rows) + shape.reconstruction_rows
        rows.append(first)
        pieces = chunks_of(rewritten[sample].tolist(), lengths[2 + sample], 8)
        for chunk in range(2):
            slots.append((len(rows), 6 + sample * 2 + chunk))
            rows.append(0)
        rows.append(task)
        write(sum(pieces, []))
        rows += [0] * (end - len(rows))
    assert batch.student_ids.tolist() == rows and batch.targets.tolist() == targets
    assert list(zip(batch.slot_rows.tolist(), batch.slot_chunks.tolist())) == slots
    assert batch.encoder_ids.tolist() == encoded and batch.chunk_starts.tolist() == starts
    assert batch.chunk_lengths.tolist() == sum(lengths, []) and batch.text_tokens == sum(map(sum, lengths)) + 6
    assert batch.student_outputs.tolist() == predicts
    # The teacher's rows predict the same tokens as the student's.
    after = torch.cat([batch.teacher_ids[1:], torch.zeros(1, dtype=torch.int64)])
    assert after[batch.teacher_outputs].tolist() == targets[:6]
    read = common.student.plans.layout.lengths()
    assert [row for own in read for row in own] == [shape.continuation_rows] * 2 + [shape.reconstruction_rows] * 2
    used = [
        places for own, places in zip(lengths, (12, 12, 8, 8)) for places in (sum(own), places - sum(own)) if places
    ]
    assert (batch.encoder or common.encoder).plans.layout.lengths() == [[places] for places in used]
    assert (batch.encoder is None) == (lengths[1] == [4, 4, 4])


@pytest.mark.parametrize("block", [2, 64])
def test_the_loss_and_its_gradient(block):
    torch.manual_seed(0)
    hidden, teacher = torch.randn(7, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    head, targets, weight = torch.randn(11, 6, dtype=torch.float64), torch.randint(11, (7,)), 0.3
    reference = hidden.clone().requires_grad_()
    own, theirs = (reference @ head.T).log_softmax(1), (teacher @ head.T).log_softmax(1)
    kl = (theirs.exp() * (theirs - own[:4])).sum()
    entropy = -own.gather(1, targets[:, None])[:, 0]
    expected = (kl + weight * entropy[:4].sum() + entropy[4:].sum()) / 7
    expected.backward()
    single = hidden.float().requires_grad_()
    loss, sums = distillation_loss(
        single, teacher.float(), targets, head.float(), cross_entropy=weight, block=block
    )  # fmt: skip
    (3 * loss).backward()
    assert torch.isclose(loss.double(), expected, rtol=1e-5)
    assert torch.allclose(sums.double(), torch.stack([kl, entropy[:4].sum(), entropy[4:].sum()]), rtol=1e-4)
    assert torch.allclose(single.grad.double(), 3 * reference.grad, rtol=1e-4, atol=1e-6)


def test_low_rank_products_have_the_gradients_of_their_sum():
    torch.manual_seed(0)
    layer = LowRankLinear(torch.nn.Linear(6, 5, bias=False), 3)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 6, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    (twin @ (layer.weight.double() + SCALE * b @ a).T).pow(2).sum().backward()
    layer(x).pow(2).sum().backward()
    for got, wanted in ((x, twin), (layer.lora_A, a), (layer.lora_B, b)):
        assert torch.allclose(got.grad.double(), wanted.grad, rtol=1e-4, atol=1e-5)


def test_rates_follow_the_progress(place):
    options = distill_files.options(place, linear_alone=0.1, warmup=0.1, floor=0.2)
    assert rates_at(options, 0.05)["linear"] == pytest.approx(options.linear_rate / 2)
    assert rates_at(options, 0.05)["encoder"] == rates_at(options, 0.1)["decoder"] == 0
    assert rates_at(options, 0.2)["encoder"] == pytest.approx(options.encoder_rate)
    assert rates_at(options, 1.0)["decoder"] == pytest.approx(0.2 * options.decoder_rate)
    assert batches.reconstruction_share(options, 0.0) == options.first_reconstruction
    assert batches.reconstruction_share(options, 0.34) == pytest.approx(options.reconstruction)


def test_every_trained_tensor_has_a_gradient(place):
    options = distill_files.options(place)
    run = Distillation(decoder_of(place), options, torch.device("cpu"), torch.float32)
    for name, parameter in run.model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)  # their initial zeros would hide the other factor's gradient
    windows = batches.TokenWindows(*load_tokens([place / "train.tok"])[:2], "train")
    run.loss(batches.batch_at(options, windows, 0, 0.0, 1, torch.device("cpu")))[0].backward()
    named = [(name, parameter) for group in run.trained.values() for name, parameter in group]
    assert len(named) == 2 + 2 * 7 * (2 + 3) and all(bool(parameter.grad.abs().sum() > 0) for _, parameter in named)
    assert not any(parameter.requires_grad for parameter in run.teacher.parameters())
    assert run.table.grad is None


def test_either_attention_may_be_taken(place):
    options = distill_files.options(place, output=place / "faster", steps=1, attention="faster")
    (entry,) = [entry for entry in distill(options) if entry["kind"] == "attention"]
    assert entry["agree"] and entry["cosine"] > 0.9999 and entry["taken"] in entry["seconds"]


def test_rotary_frequencies_keep_their_precision(place):
    run = Distillation(decoder_of(place), distill_files.options(place), torch.device("cpu"), torch.bfloat16)
    assert {value.dtype for value in run.model.buffers()} == {torch.float32}
    assert run.table.dtype == run.teacher.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_slots_become_readable(tmp_path):
    """Random text with 20 different tokens: without reading the slots, the loss is 3.0."""
    generator = np.random.default_rng(0)
    distill_files.write_decoder(tmp_path)
    distill_files.write_tokens(tmp_path / "train.tok", [generator.integers(20, 40, size=60)])
    distill_files.write_tokens(tmp_path / "heldout-rivers.tok", [generator.integers(20, 40, size=60)])
    options = distill_files.options(
        tmp_path, steps=60, contexts=(16,), reconstruction=0.6, first_reconstruction=0.6, encoder_rank=16,
        decoder_rank=16, linear_rate=1e-2, encoder_rate=1e-2, decoder_rate=1e-2, log_every=10, save_seconds=1e9,
    )  # fmt: skip
    losses = [entry["reconstruction"] for entry in distill(options) if entry["kind"] == "step"]
    assert losses[0] > 3 and losses[-1] < 1.6


def test_an_adapter_is_read_by_everything(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    distill_files.write(tmp_path, tokenizer)
    options = distill_files.options(
        tmp_path, output=tmp_path / "learnt", steps=4, encoder_rate=1e-2, decoder_rate=1e-2, linear_rate=1e-2,
        pieces=tmp_path / "pieces", piece_bytes=20_000, keep_state=False,
    )  # fmt: skip
    log = distill(options)
    assert log[-1]["kind"] == "end" and log[-1]["step"] == 4
    written = [json.loads(line) for line in (tmp_path / "learnt" / "log.jsonl").read_text().splitlines()]
    assert written == log == [json.loads(line) for line in (tmp_path / "pieces" / "log.jsonl").read_text().splitlines()]
    # The pieces joined are the file.
    (folder,) = (tmp_path / "pieces").glob("adapter-*")
    joined = b"".join(path.read_bytes() for path in sorted(folder.glob("adapter.safetensors.*")))
    assert joined == (tmp_path / "learnt" / "adapter.safetensors").read_bytes() and folder.name == "adapter-000004"
    # The run's measurements equal those of a model loaded from the adapter through the regular code.
    parts, _ = ModelBundle.load_trained(tmp_path / "learnt", tmp_path / "decoder")
    parts.model.eval()
    assert len(parts.model.encoder.layers) == 2 and parts.model.config.window == 32
    windows = batches.TokenWindows(*load_tokens([tmp_path / "heldout-rivers.tok"])[:2], "rivers")
    drawn = windows.draw(np.random.default_rng(20_251_127), 4, 8, 4, 8)
    samples = [next_paragraph(tokens.tolist(), 32, 4, tokenizer, [1]) for tokens in drawn.tokens]
    with torch.no_grad():
        log_probs, _ = target_log_probs(parts.model, *collate_for(parts, samples))
    final = next(entry for entry in log if entry["kind"] == "final")
    assert -log_probs.mean().item() == pytest.approx(final["figures"]["rivers"]["compressed"], abs=2e-2)
    text = tokenizer.decode(distill_files.documents(1, 7, tokenizer)[0])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text(text)
    result = CliRunner().invoke(app, [
        "eval", "perplexity", "--adapter", str(tmp_path / "learnt"), "--data", f"words={tmp_path / 'text'}", "--output",
        str(tmp_path / "tables"), "--context", "16", "--output-tokens", "4", "--samples", "2", "--rates", "2",
        "--selectors", "random",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    model, processor, _ = load_trained(tmp_path / "learnt")
    prompt = processor(["Read: ", Passage(text), " Who?"])
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, 3)


def test_a_run_that_is_broken_off_leaves_an_adapter_and_goes_on_as_if_it_had_not_been(place, monkeypatch):
    whole = distill_files.options(place, output=place / "whole", steps=6, log_every=5)
    first = distill(whole)
    broken = dataclasses.replace(whole, output=place / "broken")
    compute, calls = Distillation.loss, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 2 + 4:  # two are warm-up
            raise KeyboardInterrupt
        return compute(self, batch)

    monkeypatch.setattr(Distillation, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        distill(broken)
    monkeypatch.setattr(Distillation, "loss", compute)
    for _ in range(50):  # the writer thread may still be running
        if (place / "broken" / "state.pt").exists():
            break
        time.sleep(0.1)
    about, _ = read_adapter(place / "broken")
    assert about["step"] >= 1 and about["decoder_layers"] == 2
    load_adapter(place / "broken", decoder_of(place))
    reached = read_state(place / "broken")["step"]
    with pytest.raises(DistillationError, match="contains a run with k = 4, this one has 8"):
        distill(dataclasses.replace(broken, k=8, contexts=(16,)))
    log = distill(broken)
    assert log[-1]["step"] == 6 and log[0]["step"] == reached
    # The first losses are over all steps since the last entry, also those before the checkpoint.
    losses = [
        {name: entry[name] for name in ("step", "kl", "cross_entropy", "reconstruction")}
        for entries in (first, log)
        for entry in entries
        if entry["kind"] == "step"
    ]
    assert losses[0] == losses[2] and losses[1] == losses[3] and losses[0]["step"] == 5
    one, other = (read_adapter(place / name)[1] for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_that_cannot_be_written_leaves_the_one_before(place, monkeypatch):
    options = distill_files.options(place, output=place / "disk", steps=2, save_seconds=1e9)
    distill(options)
    before = (place / "disk" / "adapter.safetensors").read_bytes()
    (place / "disk" / "state.pt").unlink()

    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("refrag.adapters.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        distill(dataclasses.replace(options, seed=1))
    assert (place / "disk" / "adapter.safetensors").read_bytes() == before


def test_the_clock_ends_a_run_and_its_schedules(place):
    options = distill_files.options(place, output=place / "clock", steps=None, minutes=0.15, log_every=1)
    began = time.monotonic()
    log = distill(options)
    assert time.monotonic() - began < 9 + 5
    steps = [entry for entry in log if entry["kind"] == "step"]
    assert steps[-1]["progress"] > 0.5 and steps[-1]["rates"]["linear"] < options.linear_rate
    assert [entry["kind"] for entry in log[-2:]] == ["final", "end"]
    with pytest.raises(ValueError, match="minutes: got 0.001, needs more than"):
        distill(dataclasses.replace(options, output=place / "short", minutes=0.001))


def test_a_run_goes_on_in_the_time_that_is_left(place, monkeypatch):
    options = distill_files.options(place, output=place / "left", steps=None, minutes=1.0)
    compute, calls = Distillation.loss, []

    def dies(self, batch):
        calls.append(1)
        if len(calls) == 2 + 5:
            raise RuntimeError("a kernel failed")
        return compute(self, batch)

    monkeypatch.setattr(Distillation, "loss", dies)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        distill(options)
    for _ in range(50):
        if (place / "left" / "state.pt").exists():
            break
        time.sleep(0.1)
    before = read_state(place / "left")
    log = distill(dataclasses.replace(options, minutes=0.12, attention="torch"))
    (start,) = [entry for entry in log if entry["kind"] == "start"]
    assert before["elapsed"] < start["train_seconds"] < before["elapsed"] + 0.12 * 60 < before["seconds"]
    assert log[-1]["step"] > before["step"] and read_state(place / "left")["elapsed"] >= start["train_seconds"]


def test_a_nan_ends_a_run_by_name_and_one_alone_does_not(place, monkeypatch):
    compute, poisoned = Distillation.loss, []

    def poison(self, batch):
        poisoned.append(1)
        loss, sums = compute(self, batch)
        return (loss * (math.nan if len(poisoned) - 2 in broken else 1.0)), sums

    monkeypatch.setattr(Distillation, "loss", poison)
    broken = {3}
    options = distill_files.options(place, output=place / "one", log_every=1)
    assert distill(options)[-1]["step"] == 6
    poisoned.clear()
    broken = set(range(4, 100))
    with pytest.raises(DistillationError, match=r"loss: the gradient was not finite for 5 steps.*adapter\.safetensors"):
        distill(dataclasses.replace(options, output=place / "all", steps=20))
    for name in ("one", "all"):
        assert all(bool(value.isfinite().all()) for value in read_adapter(place / name)[1].values())


def test_both_command_lines_fill_the_same_options(place, tmp_path):
    wanted = distill_files.options(place, output=tmp_path / "out", steps=1)
    given = ["--tokens", *wanted.tokens, "--heldout", *wanted.heldout]
    for name in ("decoder", "output", "steps", "k", "encoder_layers", "encoder_rank", "decoder_rank", "output_tokens",
                 "step_tokens", "log_every", "save_seconds", "evaluate_seconds", "evaluate_samples", "final_samples",
                 "device"):  # fmt: skip
        given += ["--" + name.replace("_", "-"), getattr(wanted, name)]
    given = [str(value) for value in [*given, "--contexts", "16,32", "--reconstruction-chunks", "1,2"]]
    assert parse(DistillOptions, "distill", given) == wanted
    result = CliRunner().invoke(app, ["train", "distill", *given])
    assert result.exit_code == 0 and "adapter.safetensors" in result.output, result.output
    assert (tmp_path / "out" / "adapter.safetensors").exists()
    result = CliRunner().invoke(app, ["train", "distill", *given, "--contexts", "16,x"])
    assert result.exit_code == 2 and "--contexts: got '16,x', needs whole numbers" in result.output
    result = CliRunner().invoke(app, ["train", "distill", *given, "--minutes", "1"])
    assert result.exit_code == 2 and "minutes, steps: got 1.0 and 1" in result.output


def test_an_adapter_is_started_from(place, tmp_path):
    options = distill_files.options(place, output=tmp_path / "first", steps=2, decoder_rate=1e-2)
    distill(options)
    log = distill(dataclasses.replace(options, output=tmp_path / "second", start=tmp_path / "first", steps=1))
    one, other = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[row])["figures"]["mean"]
                  for name, row in (("first", -2), ("second", 0)))  # fmt: skip
    assert log[0]["step"] == 0 and other["compressed"] == pytest.approx(one["compressed"], abs=1e-2)
    with pytest.raises(ValueError, match="adapter: got shape .* needs"):
        distill(dataclasses.replace(options, output=tmp_path / "third", start=tmp_path / "first", decoder_rank=2))


def test_the_block_of_the_gpu_report(tmp_path, monkeypatch):
    monkeypatch.delenv("REFRAG_TRAINING_FILES", raising=False)
    results = tmp_path / "left-out.jsonl"
    given = ["--device", "cuda", "--seconds", "9", "--results", str(results)]
    assert training.run("training", training.block, given) == 0
    assert json.loads(results.read_text())["case"] == "left out"
    results = tmp_path / "results.jsonl"
    assert (
        training.run("training", training.block, ["--device", "cpu", "--seconds", "4", "--results", str(results)]) == 0
    )
    cases = [json.loads(line) for line in results.read_text().splitlines()]
    assert cases[-1]["case"] == "distillation" and cases[-1]["steps"] > 0 and "kept" in cases[-1]
    assert {"attention", "evaluation mean", "start", "final rivers"} <= {case["case"] for case in cases}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": None}, "minutes, steps: got None and None"),
        ({"minutes": 1.0}, "minutes, steps: got 1.0 and 6"),
        ({"k": 0}, "k: got 0, needs 1 or more"),
        ({"contexts": (18,)}, "contexts: got 18, needs multiples of k = 4"),
        ({"expanded": 1.0}, "expanded: got 1.0, needs 0 up to 1"),
        ({"betas": (0.9, 1.0)}, r"betas: got \(0.9, 1.0\), needs two numbers from 0 up to 1"),
        ({"pooling": "max"}, "pooling: got 'max', needs one of concat, mean"),
        ({"reconstruction_chunks": ()}, "reconstruction_chunks: got none"),
        ({"encoder_layers": 9}, "layers: got 9, needs 1 to 3"),
        ({"contexts": (4096,)}, "needs 264 for one sample"),
    ],
)
def test_refused_options(place, changed, message):
    with pytest.raises(ValueError, match=message):
        distill(distill_files.options(place, output=place / "refused", **changed))


def test_refused_files(place):
    def refused(message, **changed):
        with pytest.raises(ValueError, match=message):
            distill(distill_files.options(place, output=place / "refused", **changed))

    file = place / "train.tok"
    refused("tokens: got .*train.tok, which is also among the held-out files", heldout=(file,))
    held = distill_files.write_tokens(place / "held.tok", distill_files.documents(2, 5), "heldout-git")
    refused("held.tok: is held out", tokens=(file, held))
    held = distill_files.write_tokens(place / "named.tok", distill_files.documents(2, 5), source="git-man")
    refused("is from git-man, which must be held out", tokens=(file, held))
    copied = distill_files.write_tokens(place / "copied.tok", distill_files.documents(2, 0))
    refused("document 0 of .*copied.tok is also a training document", heldout=(copied,))
    foreign = distill_files.write_tokens(place / "foreign.tok", [np.full(200, 99)])
    refused("tokens: got token 99, needs tokens of the decoder, below 40", tokens=(foreign,))


def test_betas_are_an_option(place):
    """With betas of 0 a step moves each weight by the rate, whatever the steps before it did."""
    kept = []
    for number, betas in enumerate([(0.0, 0.0), (0.9, 0.95)]):
        own = distill_files.options(place, output=place / f"betas{number}", steps=3, betas=betas)
        distill(own)
        kept.append(read_adapter(own.output)[1])
    assert any(not torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
