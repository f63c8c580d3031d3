"""The training loop: it learns, and a killed run resumes with the same results."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from refrag.adapters import AdapterError, TrainableSpec, load_adapter, prepare, save_adapter, trained_state
from refrag.training.generators import generator_states, restore_generators
from refrag.training.measures import reconstruction_accuracy
from refrag.training.options import LoopOptions, ReconstructOptions
from refrag.training.passes import cut_passes, make_passes
from refrag.training.samples import Sample, collate_for, next_paragraph
from refrag.training.stages import run_stage
from refrag.training.trainer import Trainer, TrainingError
from safetensors.torch import load_file

from tests.refrag import training_parts
from tests.refrag.train_once import train

FIGURES = ("step", "loss", "tokens", "learning_rate", "held_out_loss")


@pytest.fixture(autouse=True)
def gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def parts(tokenizer, encoder_tokenizer):
    return training_parts.parts(tokenizer, encoder_tokenizer)


def figures(log):
    return [tuple(entry.get(name) for name in FIGURES) for entry in log]


def test_it_learns(tmp_path, tokenizer):
    parts = training_parts.parts(tokenizer, tokenizer, k=1, preset="tokens", pool_segments=1)
    options = ReconstructOptions(
        data=(), output=tmp_path, train_encoder="all", train_decoder="all", steps=60, batch_size=32, learning_rate=1e-2,
        evaluate_every=60, log_every=60, warmup=0.1, max_chunks=1, fixed_length=True, precision="no",
    )  # fmt: skip
    texts = training_parts.documents(tokenizer), training_parts.documents(tokenizer, seed=1)
    before = reconstruction_accuracy(parts.model.eval(), parts=parts, documents=texts[1])
    (after,) = run_stage(parts, options, *texts)
    # 24 words: without the slot, the loss is log(24) = 3.2 and the accuracy 0.04.
    assert before["held_out_loss"] > 9 and after["held_out_loss"] < 2.5
    assert before["first_token_accuracy"] < 0.05 and after["first_token_accuracy"] > 0.3


def test_passes_make_no_difference(tmp_path, tokenizer, encoder_tokenizer):
    """A step doesn't depend on how its samples are split into forward passes: the mean is over the step's tokens."""
    states = []
    for rows in (10_000, 40):
        own = training_parts.parts(tokenizer, encoder_tokenizer)
        for module in own.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        train(tmp_path / str(rows), model=own, steps=2, max_rows=rows)
        states.append(trained_state(own.model))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=2e-5, msg=name)


def test_the_loss_is_that_of_the_model(tmp_path, parts, tokenizer):
    prepare(parts.model, TrainableSpec(train_encoder="all", train_decoder="all")).eval()
    ids = training_parts.documents(tokenizer).token_ids
    samples = [next_paragraph(ids[start : start + 14].tolist(), 8, 4, tokenizer, [1]) for start in (0, 50)]
    prompt, labels = collate_for(parts, samples)
    logits = parts.model(prompt=prompt).logits[0]
    rows = (labels != -100).nonzero()[:, 0]
    by_hand = F.cross_entropy(logits[rows - 1], labels[rows])
    trainer = Trainer(
        parts.model,
        lambda index: samples[index],
        functools.partial(collate_for, parts),
        LoopOptions(steps=1, batch_size=2),
        tmp_path,
    )
    for module in parts.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert trainer.train()[0]["loss"] == pytest.approx(by_hand.item(), rel=1e-5)


def trainer_of(parts, tmp_path, accelerator=None, **settings):
    """Return a trainer of the projector, the encoder and the decoder, which are three groups of the optimizer."""
    prepare(parts.model, TrainableSpec(train_encoder="all", train_decoder="all"))
    ids = training_parts.documents(parts.tokenizer).token_ids
    settings = {"steps": 2, "batch_size": 4, "max_rows": 40, "projector_rate": 1e-3, "encoder_rate": 1e-4, **settings}

    def sample(index):
        return next_paragraph(ids[7 * index : 7 * index + 14].tolist(), 8, 4, parts.tokenizer, [1])

    return Trainer(
        parts.model, sample, functools.partial(collate_for, parts), LoopOptions(**settings), tmp_path,
        accelerator=accelerator,
    )  # fmt: skip


def gradient_norms(trainer):
    """Record the norm of all gradients over the three groups at each optimizer step."""
    norms = []

    def record(optimizer, *arguments):
        groups = [[one.grad for one in group["params"] if one.grad is not None] for group in optimizer.param_groups]
        assert len(groups) == 3 and all(any(grad.any() for grad in group) for group in groups)
        norms.append(torch.nn.utils.get_total_norm([grad for group in groups for grad in group]).item())

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.train()
    return norms


def test_one_norm_is_over_all_gradients(tmp_path, parts):
    assert gradient_norms(trainer_of(parts, tmp_path, max_grad_norm=1e-3)) == [pytest.approx(1e-3)] * 2


def test_gradients_are_unscaled_once(tmp_path, parts, monkeypatch):
    """As for float16 on a GPU, where torch's scaler refuses to unscale twice before a step."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=64.0), True
    trainer = trainer_of(parts, tmp_path, accelerator, max_grad_norm=1e-3)
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
    assert gradient_norms(trainer) == [pytest.approx(1e-3)] * 2


def test_nobody_can_stall_a_step_by_a_file(tmp_path, parts, monkeypatch):
    """Nothing in the temporary folder, which other users share, is read or created."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    trainer_of(parts, tmp_path / "run").train()
    assert not list((tmp_path / "shared").iterdir())


def test_a_killed_run_goes_on_to_the_same_losses(tmp_path):
    whole = figures(train(tmp_path / "whole"))
    assert len(whole) == 12 and len({loss for _, loss, *_ in whole}) == 12
    folder = tmp_path / "killed"
    command = [sys.executable, Path(__file__).with_name("train_once.py"), folder]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "log.jsonl"
    try:
        deadline = time.monotonic() + 120
        # After a checkpoint, so that part of the log must be discarded.
        while not (log.exists() and log.read_text().count("\n") >= 4):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "adapter.safetensors").exists()
    assert figures(train(folder)) == whole
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2  # older ones are deleted


def in_two_processes(folder, *options, script="train_once.py"):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(Path(__file__).with_name(script), folder, *options),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        errors = process.communicate(timeout=200)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def trained_in_two_processes(folder, *options):
    code, errors = in_two_processes(folder, "--no-dropout", *options)
    assert code == 0, errors[-3000:]
    about = "FSDP 2" if "--shard" in options else "MULTI_CPU 2"
    assert [(folder / f"process-{index}").read_text() for index in range(2)] == [about, about]
    return figures([json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("options", [(), ("--shard",)], ids=["DDP", "FSDP"])
def test_two_processes_take_the_same_steps(tmp_path, options):
    """Each process takes its share of a step's samples; the mean is over the tokens of both."""
    alone = figures(train(tmp_path / "alone", dropout=False))
    adapter = load_file(tmp_path / "alone" / "adapter.safetensors")
    close = [tuple(value and pytest.approx(value, rel=2e-4) for value in one) for one in alone]
    assert len(close) == 12 and trained_in_two_processes(tmp_path / "both", *options) == close
    # Checkpoints are not sharded: two processes resume from a single process's.
    shutil.rmtree(max((tmp_path / "alone" / "checkpoints").iterdir()))
    (tmp_path / "alone" / "adapter.safetensors").unlink()
    assert trained_in_two_processes(tmp_path / "alone", *options) == close
    for folder in ("both", "alone"):
        written = load_file(tmp_path / folder / "adapter.safetensors")
        assert written.keys() == adapter.keys()
        for name, value in adapter.items():
            torch.testing.assert_close(written[name], value, rtol=2e-2, atol=2e-4, msg=name)


def test_a_batch_that_does_not_divide_by_the_processes(tmp_path):
    """With sharded parameters, processes wait for each other's passes; 3 samples would give 2 and 1 passes."""
    settings = {"steps": 4, "batch_size": 3, "max_rows": 16}
    alone = figures(train(tmp_path / "alone", dropout=False, **settings))
    close = [tuple(value and pytest.approx(value, rel=2e-4) for value in one) for one in alone]
    options = [f"{name}={value}" for name, value in settings.items()]
    assert len(close) == 4 and trained_in_two_processes(tmp_path / "both", "--shard", *options) == close


def test_a_batch_of_fewer_samples_than_processes_is_one_error(tmp_path, parts):
    processes = types.SimpleNamespace(num_processes=3, process_index=0, device=torch.device("cpu"))
    with pytest.raises(TrainingError, match="^batch_size: got 2, needs 3 or more, one sample for each process$"):
        trainer_of(parts, tmp_path, processes, batch_size=2)


@pytest.mark.parametrize("counts", [(3, 1), (1, 3), (1, 1), (7, 7), (2, 9)])
@pytest.mark.parametrize("max_rows", [12, 30, 1000])
def test_passes_are_as_many_in_every_process(counts, max_rows):
    """Whatever each process has to read, every pass is within bounds and every sample is in exactly one pass."""
    draw = random.Random(0)
    processes = [[Sample(((-1, [1] * draw.randrange(4, 15)),), 0) for _ in range(count)] for count in counts]
    cut = [cut_passes(samples, max_rows) for samples in processes]
    most = max(map(len, cut))
    for samples, own in zip(processes, cut):
        passes = make_passes(own, most)
        assert len(passes) == most
        assert sorted(map(id, samples)) == sorted(id(sample) for part in passes for sample in part)
        for part in passes:
            assert len(part) <= 1 or sum(sample.num_rows for sample in part) <= max_rows


def test_an_empty_pass_changes_nothing(tmp_path, tokenizer, encoder_tokenizer, monkeypatch):
    """A process without samples left still runs its passes, since the others wait for them."""
    states = []
    for count in (0, 9):
        own = training_parts.parts(tokenizer, encoder_tokenizer)
        for module in own.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer = trainer_of(own, tmp_path / str(count))
        monkeypatch.setattr(trainer, "_most_passes", lambda passes, count=count: max(len(passes), count))
        log = trainer.train()
        states.append((figures(log), trained_state(own.model)))
    (losses, wanted), (others, got) = states
    assert others == [tuple(value and pytest.approx(value, rel=1e-5) for value in one) for one in losses]
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5, msg=name)


class Stopped(Exception):
    pass


def test_the_first_loss_after_a_stop_is_over_all_its_steps(tmp_path, tokenizer, encoder_tokenizer):
    """It includes steps before the checkpoint whose losses are in no log entry yet."""

    def train_once(folder, last_sample):
        own = training_parts.parts(tokenizer, encoder_tokenizer)
        trainer = trainer_of(own, folder, steps=9, log_every=4, checkpoint_every=3)
        inner = trainer.sampler

        def sampler(index):
            if index > last_sample:
                raise Stopped
            return inner(index)

        trainer.sampler = sampler
        return trainer.train()

    whole = figures(train_once(tmp_path / "whole", 99))
    assert [step for step, *_ in whole] == [4, 8, 9]
    with pytest.raises(Stopped):
        train_once(tmp_path / "stopped", 4 * 7 - 1)  # in the 8th step, after the checkpoint of the 6th
    assert figures(train_once(tmp_path / "stopped", 99)) == whole


def test_every_processs_generators_go_on(tmp_path):
    code, errors = in_two_processes(tmp_path, script="generators_once.py")
    assert code == 0, errors[-3000:]
    drawn = [json.loads((tmp_path / f"process-{index}").read_text()) for index in range(2)]
    for before, after, fresh in drawn:
        assert before == after != fresh
    assert drawn[0][0] != drawn[1][0] and drawn[0][2] == drawn[1][2]


def test_a_devices_generator_goes_on(monkeypatch):
    """On a GPU, dropout uses the device's own generator."""
    device = torch.device("cuda", 1)
    held = {device: torch.tensor([7])}

    def put(state, which):
        held[which] = state

    module = types.SimpleNamespace(get_rng_state=held.get, set_rng_state=put)
    monkeypatch.setattr(torch, "get_device_module", {device: module}.get)
    accelerator = types.SimpleNamespace(device=device, process_index=0)
    states = generator_states(accelerator)
    held[device] = torch.tensor([9])
    drawn = torch.rand(3)
    restore_generators(accelerator, states)
    assert held == {device: torch.tensor([7])} and torch.equal(torch.rand(3), drawn)
    accelerator.process_index = 1  # of a run that resumes with more processes
    restore_generators(accelerator, states)


def test_low_rank_updates_have_one_scale(tmp_path, tokenizer, encoder_tokenizer, parts, monkeypatch):
    """The scale used in training is the one used for merging."""
    monkeypatch.setattr("refrag.adapters.LORA_SCALE", 3)
    prepare(parts.model, TrainableSpec(train_encoder="lora", train_decoder="lora", rank=2)).eval()
    for name, value in parts.model.named_parameters():
        if ".lora_B." in name:
            value.data.normal_(0, 0.1).copy_(value.data.bfloat16())  # the file holds bfloat16
        elif value.requires_grad:
            value.data.copy_(value.data.bfloat16())
    save_adapter(parts.model, tmp_path)
    fresh = training_parts.parts(tokenizer, encoder_tokenizer)
    loaded, _ = load_adapter(tmp_path, fresh.model.decoder, fresh.model.encoder)
    ids = training_parts.documents(tokenizer).token_ids[:14].tolist()
    prompt, _ = collate_for(parts, [next_paragraph(ids, 8, 4, tokenizer, [1])])
    torch.testing.assert_close(loaded.eval()(prompt=prompt).logits, parts.model(prompt=prompt).logits)


def test_betas_are_a_setting(tmp_path, parts):
    for betas in ((0.9, 0.98), (0.5, 0.6)):
        options = {} if betas == (0.9, 0.98) else {"betas": betas}
        trainer = trainer_of(parts, tmp_path / str(betas), **options)
        assert [group["betas"] for group in trainer.optimizer.param_groups] == [betas] * 3
    for betas in ((0.9,), (0.9, 1.0), (-0.1, 0.9)):
        with pytest.raises(ValueError, match="betas: got"):
            LoopOptions(steps=1, betas=betas)


def test_a_checkpoint_from_before_a_setting_resumes(tmp_path, tokenizer, encoder_tokenizer):
    def own():
        return training_parts.parts(tokenizer, encoder_tokenizer)

    trainer_of(own(), tmp_path).train()
    (signature,) = tmp_path.rglob("step-00000002/signature.json")
    written = json.loads(signature.read_text())
    del written["settings"]["betas"]
    signature.write_text(json.dumps(written))
    assert len(trainer_of(own(), tmp_path).train()) == 1
    with pytest.raises(TrainingError, match="written with settings"):
        trainer_of(own(), tmp_path, betas=(0.9, 0.99)).train()


def test_a_checkpoint_keeps_the_names_of_its_settings(tmp_path, parts):
    """As written by a run of b88c934 with these options, before betas were a setting."""
    train(tmp_path, model=parts, steps=3)
    (path,) = tmp_path.rglob("step-00000003/signature.json")
    recorded = {
        "settings": {
            "steps": 3, "batch_size": 6, "learning_rate": 0.003, "projector_rate": None, "encoder_rate": None,
            "warmup": 0.04, "weight_decay": 0.0, "max_grad_norm": 1.0, "max_rows": 64, "checkpoint_every": 3,
            "log_every": 1, "evaluate_every": 4, "seed": 0,
        },
        "k": 4, "pooling": "first", "decoder": ["llama", 32, 2], "encoder": ["bert", 32, 1],
        "objective": "next_paragraph", "trained": {"encoder": "all", "decoder": "lora", "rank": 4},
    }  # fmt: skip
    own = json.loads(path.read_text())
    assert own["settings"].pop("betas") == [0.9, 0.98] and own == recorded


def test_a_checkpoint_of_another_run_is_refused(tmp_path, tokenizer, encoder_tokenizer):
    train(tmp_path, steps=3)
    kept = sorted(tmp_path.rglob("*"))
    with pytest.raises(TrainingError, match="written with k = 4, this run has 8"):
        train(tmp_path, steps=3, model=training_parts.parts(tokenizer, encoder_tokenizer, k=8))
    with pytest.raises(TrainingError, match="written with settings"):
        train(tmp_path, steps=3, learning_rate=1.0)
    assert sorted(tmp_path.rglob("*")) == kept


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, parts):
    with torch.no_grad():
        parts.model.projector.up.weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="loss: got nan in step 1, samples 0 to 5; the newest checkpoint is none"):
        train(tmp_path, model=parts)
    assert not (tmp_path / "adapter.safetensors").exists()


def test_no_document_is_long_enough(tmp_path, parts, tokenizer):
    texts = [training_parts.documents(tokenizer, words=5)] * 2
    options = ReconstructOptions(data=(), output=tmp_path, steps=1, max_chunks=64, precision="no")
    with pytest.raises(ValueError, match="needs 256 for one sample"):
        run_stage(parts, options, *texts)


def test_only_what_is_to_be_trained_is(tmp_path, parts):
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    train(tmp_path, model=parts, steps=2)
    changed = set()
    for name, value in parts.model.state_dict().items():
        original = name.replace(".base_layer.", ".")
        if original not in before or not torch.equal(value, before[original]):
            changed.add(name)
    assert changed <= {name for name in changed if name.startswith(("encoder.", "projector.")) or ".lora_" in name}
    assert any(name.startswith("encoder.") for name in changed) and any(".lora_B" in name for name in changed)


def test_an_adapter_makes_the_trained_model(tmp_path, tokenizer, encoder_tokenizer, parts):
    train(tmp_path, model=parts, steps=3)
    own = trained_state(parts.model)
    with torch.no_grad():  # the file holds bfloat16
        for value in own.values():
            value.copy_(value.bfloat16())
    fresh = training_parts.parts(tokenizer, encoder_tokenizer)
    loaded, policy = load_adapter(tmp_path, fresh.model.decoder, fresh.model.encoder)
    assert policy is None and not any("lora" in name for name, _ in loaded.named_parameters())
    texts = training_parts.documents(tokenizer, seed=2)
    with torch.no_grad():
        ways = [
            reconstruction_accuracy(model.eval(), parts=dataclasses.replace(parts, model=model), documents=texts)
            for model in (parts.model, loaded)
        ]
    assert ways[0]["held_out_loss"] == pytest.approx(ways[1]["held_out_loss"], rel=1e-4)
    untrained = training_parts.parts(tokenizer, encoder_tokenizer)
    third = reconstruction_accuracy(untrained.model.eval(), parts=untrained, documents=texts)
    assert abs(third["held_out_loss"] - ways[0]["held_out_loss"]) > 1e-3


def test_an_adapter_of_another_model_is_refused(tmp_path, parts, encoder_tokenizer, tokenizer):
    save_adapter(prepare(parts.model, TrainableSpec()), tmp_path)
    other = training_parts.parts(tokenizer, encoder_tokenizer).model
    other.decoder.config.num_hidden_layers = 3
    with pytest.raises(AdapterError, match="trained on decoder llama 32 2 49152, got llama 32 3 49152"):
        load_adapter(tmp_path, other.decoder, other.encoder)
    (tmp_path / "adapter.safetensors").write_bytes(b"nonsense")
    with pytest.raises(AdapterError, match="can't be read"):
        load_adapter(tmp_path, other.decoder, other.encoder)
    with pytest.raises(AdapterError, match="can't be read"):
        load_adapter(tmp_path / "missing", other.decoder, other.encoder)


@pytest.mark.parametrize("field", ["steps", "batch_size", "max_rows"])
def test_bad_settings(field):
    with pytest.raises(ValueError, match=f"{field}: got 0"):
        LoopOptions(**{"steps": 1, field: 0})
    with pytest.raises(ValueError, match="decoder: got 'some'"):
        TrainableSpec(train_decoder="some")


def test_the_log_is_json_lines(tmp_path):
    train(tmp_path, steps=2)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[1]["tokens"] == 2 * 6 * 8
