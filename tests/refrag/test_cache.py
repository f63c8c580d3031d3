"""The cache folder: complete entries only, one builder at a time, clear errors."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from refrag.cache import CacheError, build_once, cache_folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_builds_once(folder):
    calls = []

    def build(part):
        calls.append(part)
        (part / "file").write_text("whole")

    assert build_once("entry", build) == build_once("entry", build) == folder / "entry"
    assert len(calls) == 1 and (folder / "entry" / "file").read_text() == "whole"


def test_a_build_that_fails_leaves_nothing(folder):
    def build(part):
        (part / "half").write_text("half")
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        build_once("entry", build)
    assert not list(folder.glob("entry*")) and not list(folder.glob(".entry.part*"))


def test_a_killed_build_leaves_no_entry_and_blocks_nobody(folder):
    program = """
        import pathlib, time
        from refrag.cache import build_once
        def build(part):
            (part / "half").write_text("half")
            print("started", flush=True)
            time.sleep(60)
        build_once("entry", build)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "entry").exists() and list(folder.glob(".entry.part*"))
    assert build_once("entry", lambda part: (part / "file").write_text("whole")) == folder / "entry"
    assert [path.name for path in (folder / "entry").iterdir()] == ["file"]
    assert not list(folder.glob(".entry.part*"))


def _build_slowly(marks):
    def build(part):
        (marks / str(os.getpid())).touch()
        time.sleep(0.3)
        (part / "file").touch()

    build_once("entry", build)


def test_two_processes_build_one(folder, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build_slowly, args=(marks,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(marks.iterdir())) == 1


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CacheError, match=r"cache folder .*file/cache: can't be written .*; set REFRAG_CACHE"):
        build_once("entry", lambda part: None)


def test_a_disk_that_is_full(folder):
    def build(part):
        raise OSError(28, "No space left on device")

    with pytest.raises(CacheError, match="can't be written .No space left on device"):
        build_once("entry", build)


def test_default_folder(monkeypatch):
    monkeypatch.delenv("REFRAG_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder()) == "/home/someone/.cache/refrag-kernels"
