"""Embedding retrieval: ranks passages by the similarity of their embeddings to the question's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refrag.cache import build_once
from refrag.model.encoder import encode_packed, pack_texts
from refrag.model.inputs import Passage
from refrag.store.fingerprint import encoder_digest, tokenizer_digest

Progress = Callable[[Sequence[Any]], Iterable[Any]]  # wraps a sequence to show progress while it is iterated

_BATCH = 32
_TOKENS = 256  # all-MiniLM-L6-v2's maximum length (its sentence_bert_config.json)


class Retriever:
    """Ranks passages by the cosine similarity of mean-pooled embeddings, which are stored in the cache folder.

    Parameters
    ----------
    encoder : PreTrainedModel
        A sentence encoder, with attention "refrag".
    tokenizer : PreTrainedTokenizerBase
        The encoder's tokenizer.
    passages : sequence of Passage
    track : callable, optional
        Wraps the batches to show progress if the embeddings aren't cached yet.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        passages: Sequence[Passage],
        track: Progress = iter,
    ) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.passages = list(passages)
        self.embeds = self._read(_identity(encoder), track)
        if self.passages and not self._is_first(self.embeds[0]):  # of another encoder of this name, or none
            self.embeds = self._read(f"{encoder_digest(encoder)} {tokenizer_digest(tokenizer)}", track)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Return embeddings [N, d_enc], not normalized, of texts truncated to 256 tokens."""
        with torch.inference_mode():
            packed = pack_texts(self.tokenizer, texts, truncate_to=_TOKENS)
            return encode_packed(self.encoder, packed, "mean").float()

    def rank(self, question: str) -> list[tuple[Passage, float]]:
        """Return all passages with their cosine similarity to the question, best first.

        Raises
        ------
        ValueError
            If the question is empty.
        """
        if not question.strip():
            raise ValueError("question: is empty, needs text")
        scores = self.embeds @ torch.nn.functional.normalize(self.embed([question])[0], dim=-1)
        order = scores.argsort(descending=True, stable=True).tolist()
        return [(self.passages[i], float(scores[i])) for i in order]

    def _read(self, encoder: str, track: Progress) -> torch.Tensor:
        """Return the embeddings that are cached for an encoder, or compute them."""
        content = hashlib.blake2b(digest_size=12)
        for text in (encoder, *(passage.text for passage in self.passages)):
            content.update(f"{len(text)} {text}".encode())
        entry = build_once(f"passages-{content.hexdigest()}", lambda folder: self._write(folder, track))
        return load_file(entry / "embeds.safetensors")["embeds"]

    def _is_first(self, row: torch.Tensor) -> bool:
        """Return whether this is the first passage's embedding: a name doesn't tell what the weights are."""
        own = torch.nn.functional.normalize(self.embed([self.passages[0].text])[0], dim=-1)
        return torch.allclose(own.to(row), row, rtol=0, atol=1e-3)

    def _write(self, folder: Path, track: Progress) -> None:
        rows = []
        for start in track(range(0, len(self.passages), _BATCH)):
            rows.append(self.embed([passage.text for passage in self.passages[start : start + _BATCH]]))
        embeds = torch.nn.functional.normalize(torch.cat(rows), dim=-1)
        save_file({"embeds": embeds.clone()}, folder / "embeds.safetensors")


def _identity(encoder: PreTrainedModel) -> str:
    """Return the encoder's name, and the sizes and modification times of its files, which may change at a path."""
    name = encoder.name_or_path or ""
    folder = Path(name)
    files = sorted(folder.glob("*.safetensors")) if name and folder.is_dir() else []
    return f"{name} {[(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]}"
