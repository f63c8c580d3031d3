"""The files that a run writes: the adapter, optionally also in pieces, and the optimizer's state, all atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from refrag.adapters import save_adapter
from refrag.model.modeling import RefragForCausalLM

_STATE = "state.pt"


class Writer:
    """Writes adapters in a thread, one at a time; each appears under its final name only once it is complete.

    Parameters
    ----------
    model : RefragForCausalLM
        The adapter's file records its config.
    folder : Path
        Folder of ``adapter.safetensors`` and ``state.pt``.
    pieces : Path, optional
        Folder of ``adapter-STEP`` folders with the adapter in pieces and a SHA256SUMS file. Only the newest is kept.
    piece_bytes : int
        Maximum size of a piece.
    """

    def __init__(self, model: RefragForCausalLM, folder: Path, pieces: Path | None, piece_bytes: int) -> None:
        self._model, self._folder = model, folder
        self._pieces, self._piece_bytes = pieces, piece_bytes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(
        self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any], state: Mapping[str, Any] | None
    ) -> None:
        """Write an adapter in the background; wait only for the previous write.

        Parameters
        ----------
        tensors : mapping
            The adapter's tensors, on the CPU; the caller must not change them afterwards.
        notes : mapping
            Metadata for the adapter's file, such as the step.
        state : mapping, optional
            State for resuming the run.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(tensors, notes, state))
        self._thread.start()

    def wait(self) -> None:
        """Wait until everything is written.

        Raises
        ------
        OSError
            If a write failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(
        self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any], state: Mapping[str, Any] | None
    ) -> None:
        try:
            file = save_adapter(self._model, self._folder, tensors, notes)
            if self._pieces is not None:
                write_pieces(file, self._pieces, int(notes["step"]), self._piece_bytes)
            if state is not None:
                part = self._folder / f"{_STATE}.part"
                torch.save(dict(state), part)
                os.replace(part, self._folder / _STATE)
        except BaseException as error:  # raised again by wait(), in the loop's thread
            self._error = error


def write_pieces(file: Path, folder: Path, step: int, piece_bytes: int) -> Path:
    """Write a file in pieces, which ``cat adapter.safetensors.* > adapter.safetensors`` joins again.

    Returns
    -------
    Path
        The folder of the pieces; it replaces the folder of an earlier step.
    """
    final = folder / f"adapter-{step:06d}"
    part = folder / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    whole = file.read_bytes()
    sums = [f"{hashlib.sha256(whole).hexdigest()}  {file.name}"]
    for number, start in enumerate(range(0, len(whole), piece_bytes)):
        (part / f"{file.name}.{number:02d}").write_bytes(whole[start : start + piece_bytes])
    (part / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in folder.glob("adapter-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return the saved state of a run, or None."""
    path = folder / _STATE
    if not path.exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


class Log:
    """A log of JSON lines, appended to one or more files and flushed line by line.

    Parameters
    ----------
    *paths : Path
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **values: Any) -> dict[str, Any]:
        """Append a line, print it, and return it."""
        line = json.dumps(values)
        for path in self._paths:
            with path.open("a") as file:
                file.write(line + "\n")
        print(line, flush=True)
        return values
