"""While something is timed, training stands still."""

import threading

import pytest
from refrag.training.pause import lock_file, training_paused, wait_while_paused
from train_once import train


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("REFRAG_PAUSE_LOCK", str(tmp_path / "lock"))
    assert lock_file() == tmp_path / "lock"


def held_up(call):
    """Whether a call waits while training is paused, and only then."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (call(), done.set()))
    with training_paused():
        thread.start()
        waited = not done.wait(0.5)
    thread.join(60)
    return waited and done.is_set()


def test_nobody_waits_for_nothing():
    wait_while_paused()
    with training_paused():
        pass
    wait_while_paused()


def test_it_waits():
    assert held_up(wait_while_paused)
    assert not held_up(lambda: None)


def test_benchmarks_take_turns():
    def other():
        with training_paused():
            pass

    assert held_up(other)


def test_a_training_step_waits(tmp_path):
    log = tmp_path / "run" / "log.jsonl"
    thread = threading.Thread(target=lambda: train(tmp_path / "run", steps=2))
    with training_paused():
        thread.start()
        thread.join(10)
        assert thread.is_alive() and not log.exists()
    thread.join(100)
    assert log.read_text().count("\n") == 2
