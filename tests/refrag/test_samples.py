"""Training samples: their layout, and which tokens count in the loss."""

import random

import numpy as np
from refrag import RefragProcessor
from refrag.data.documents import Documents
from refrag.training.samples import (
    answer_sampler,
    collate,
    next_paragraph,
    next_paragraph_sampler,
    random_picks,
    reconstruction,
    reconstruction_sampler,
)
from refrag.training.schedules import constant_schedule, curriculum_schedule, scaled_table, shuffled_schedule

TEXT = "The bridge of Orla was built in 1871 by two brothers from the valley."


def test_reconstruction_repeats_its_chunks(tokenizer, encoder_tokenizer):
    ids = tokenizer(TEXT)["input_ids"][:12]
    sample = reconstruction(ids, 4, tokenizer, [1])
    prompt, labels = collate([sample] * 2, encoder_tokenizer, position_ids="contiguous", special_tokens=True)
    assert prompt.layout.lengths() == [[1, 1, 1, 1, 12]] * 2
    assert prompt.token_ids.tolist() == [1, 0, 0, 0, *ids] * 2
    assert labels.tolist() == [-100] * 4 + ids + [-100] * 4 + ids
    assert "".join(chunk.text for chunk in prompt.chunks[:3]) == tokenizer.decode(ids)
    assert [chunk.token_ids for chunk in prompt.chunks[:3]] == [tuple(ids[i : i + 4]) for i in (0, 4, 8)]


def test_next_paragraph_counts_only_what_follows(tokenizer, encoder_tokenizer):
    ids = tokenizer(TEXT)["input_ids"][:14]
    sample = next_paragraph(ids, 8, 4, tokenizer, [1], expanded={1})
    assert (sample.num_rows, sample.num_chunks, sample.num_targets) == (1 + 1 + 4 + 6, 2, 6)
    first = next_paragraph(ids, 8, 4, tokenizer, [1])
    prompt, labels = collate([first, sample], encoder_tokenizer, position_ids="contiguous", special_tokens=True)
    assert prompt.layout.lengths() == [[1, 1, 1, 6], [1, 1, 4, 6]]
    assert prompt.expanded == {3}  # chunk numbers run through the batch
    assert prompt.token_ids[9:].tolist() == [1, 0, *ids[4:]]
    assert labels.tolist() == [-100] * 3 + ids[8:] + [-100] * 6 + ids[8:]


def test_samplers_depend_on_nothing_but_seed_and_number(tokenizer):
    documents = Documents(np.arange(5000) % 900 + 100, np.array([0, 2000, 5000]))
    schedule = curriculum_schedule(200, 8, seed=1)
    make = dict(windows_of=documents.windows, schedule=schedule, k=4, tokenizer=tokenizer, prefix=[1])
    for build in (
        lambda seed: reconstruction_sampler(**make, seed=seed),
        lambda seed: next_paragraph_sampler(**make, seed=seed, output_tokens=5, expand=0.5),
    ):
        forwards = [build(7)(index) for index in range(20)]
        backwards = [build(7)(index) for index in reversed(range(20))]
        assert forwards == backwards[::-1]
        assert forwards != [build(8)(index) for index in range(20)]
    drawn = [build(7)(index) for index in range(20)]
    assert [sample.num_chunks for sample in drawn] == [schedule(index) for index in range(20)]
    assert all(len(sample.expanded) == round(0.5 * sample.num_chunks) for sample in drawn)


def test_questions_are_shuffled_once_an_epoch(tokenizer, encoder_tokenizer, monkeypatch):
    questions = [{"question": f"{number}?", "passages": ["Rain."], "answer": str(number)} for number in range(20)]
    shuffles = []

    class Random(random.Random):
        def sample(self, population, k):
            shuffles.append(k) if k == len(questions) else None
            return super().sample(population, k)

    monkeypatch.setattr("refrag.training.samples.random.Random", Random)
    processor = RefragProcessor(tokenizer, encoder_tokenizer, k=4)
    sample = answer_sampler(questions, processor, seed=3)
    answers = [tokenizer.decode(sample(index).spans[-1][1][:-1]) for index in range(60)]
    for epoch in range(3):
        assert sorted(map(int, answers[20 * epoch : 20 * epoch + 20])) == list(range(20))
    assert answers[:20] != answers[20:40] and len(shuffles) == 3
    again = answer_sampler(questions, processor, seed=3)
    for index in (37, 2, 58):
        assert tokenizer.decode(again(index).spans[-1][1][:-1]) == answers[index]


def test_schedules():
    ordered, shuffled = (make(500, 16, seed=0) for make in (curriculum_schedule, shuffled_schedule))
    total = sum(map(sum, scaled_table(500, max_chunks=16).values()))
    assert sorted(map(ordered, range(total))) == sorted(map(shuffled, range(total)))
    assert sum(map(ordered, range(50))) < sum(map(shuffled, range(50)))
    assert ordered(total + 5) == ordered(total - 1)  # rounding may leave a run a few samples short
    assert constant_schedule(3)(99) == 3
    assert random_picks(10, 0.3, 0, 5) == random_picks(10, 0.3, 0, 5)
    assert len(random_picks(10, 0.3, 0, 5)) == 3
