"""What a run leaves behind: the adapter, whole at any second, in pieces where asked for, and the optimizer's state."""

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
    """Writes adapters in a thread, one at a time; each appears under its name only once it is whole.

    Parameters
    ----------
    model : RefragForCausalLM
        Whose config the adapter's file describes.
    folder : Path
        For ``adapter.safetensors`` and ``state.pt``.
    pieces : Path, optional
        For folders ``adapter-STEP`` with the adapter in pieces and their SHA256SUMS; the newest stays.
    piece_bytes : int
    """

    def __init__(self, model: RefragForCausalLM, folder: Path, pieces: Path | None, piece_bytes: int) -> None:
        self._model, self._folder = model, folder
        self._pieces, self._piece_bytes = pieces, piece_bytes
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(
        self, tensors: Mapping[str, torch.Tensor], notes: Mapping[str, Any], state: Mapping[str, Any] | None
    ) -> None:
        """Write what training has reached. Returns as soon as the writing of the one before has ended.

        Parameters
        ----------
        tensors : mapping
            Of the adapter, on the CPU; the caller doesn't change them any more.
        notes : mapping
            What the file says beside them: the step, say.
        state : mapping, optional
            For ``resume``.
        """
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(tensors, notes, state))
        self._thread.start()

    def wait(self) -> None:
        """Return when everything is written.

        Raises
        ------
        OSError
            If something couldn't be.
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
        except BaseException as error:  # raised by wait(), in the loop's thread
            self._error = error


def write_pieces(file: Path, folder: Path, step: int, piece_bytes: int) -> Path:
    """Write a file in pieces: ``cat adapter.safetensors.* > adapter.safetensors`` joins them again.

    Returns
    -------
    Path
        The folder of the pieces, which replaces that of an earlier step.
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
    """Return the state that a run left behind, or None."""
    path = folder / _STATE
    if not path.exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


class Log:
    """A log of JSON lines in one or more files; each line is there as soon as it is written.

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
