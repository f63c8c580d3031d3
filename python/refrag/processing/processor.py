"""RefragProcessor: turns text and passages into the packed rows of a MixedPrompt."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from refrag import deprecated
from refrag.data.chunking import Chunker, FixedChunks, SentenceChunks, describe_chunker
from refrag.model.config import RefragConfig
from refrag.model.encoder import TextEmbedder
from refrag.model.inputs import Chunk, MixedPrompt, Part, Passage, PromptTooLongError, require_text
from refrag.model.packing import Span, pack_chunks, pack_spans, shared_tokens
from refrag.model.passage_rows import PassageEntry, SlotRule
from refrag.processing.chat import render_chat
from refrag.processing.expansion import attention_picks, expanded_chunks, whole_chunks
from refrag.processing.selectors import AttentionSelector, Selector
from refrag.store.kv_store import KVStore
from refrag.store.store import ChunkStore, StoreError


class RefragProcessor:
    """Turns prompts, which are lists of text and passages in any order, into packed rows.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The decoder's tokenizer, which must be a fast one.
    encoder_tokenizer : PreTrainedTokenizerBase
        The encoder's tokenizer. It tokenizes the text of each chunk again.
    k : int
        Number of decoder tokens in a chunk.
    window : int, optional
        Size of the decoder's context window in rows; a longer prompt is an error.
    position_ids : {"contiguous", "original", "parallel"}
        As in RefragConfig.
    encoder_special_tokens : bool
        As in RefragConfig.
    encoder_window : int
        Number of encoder tokens in a window, at most the encoder's positions: ``window`` of RefragConfig.
    chunker : {"fixed", "sentence"} or Chunker
        Splits passages into chunks: FixedChunks(tokenizer, k), SentenceChunks(tokenizer), or a custom chunker.
    latents : int
        Number of slots of a compressed chunk, as in RefragConfig.
    start_token : bool
        Whether to insert the tokenizer's ``bos_token``, if it has one, before a prompt that would begin with a slot.
        Decoders use their first row as an attention sink and read next to nothing from it (arXiv 2309.17453), so a slot
        there would be lost.
    kv_slots : SlotRule, optional
        For key/value slots, as in RefragConfig; needs ``position_ids`` "original" or "parallel". The start token then
        precedes every prompt that begins with a passage.

    Raises
    ------
    ValueError
        If a number is out of range, or ``position_ids`` or ``chunker`` is unknown.

    Examples
    --------
    >>> from transformers import AutoTokenizer
    >>> from refrag import Passage, RefragProcessor, weights
    >>> tokenizer = AutoTokenizer.from_pretrained(weights.decoder_folder())
    >>> encoder_tokenizer = AutoTokenizer.from_pretrained(weights.encoder_folder())
    >>> processor = RefragProcessor(tokenizer, encoder_tokenizer, k=4)
    >>> passage = Passage("The bridge of Orla was built in 1871.")
    >>> prompt = processor([passage, "When was the bridge built?"], expand={1})
    >>> [chunk.text for chunk in prompt.chunks]
    ['The bridge of Or', 'la was built in', ' 187', '1.']
    >>> prompt.layout.lengths()  # the start token, a slot, an expanded chunk, two slots, the question
    [[1, 1, 4, 1, 1, 6]]
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder_tokenizer: PreTrainedTokenizerBase,
        k: int = 16,
        *,
        window: int | None = None,
        position_ids: str = "contiguous",
        encoder_special_tokens: bool = True,
        chunker: str | Chunker = "fixed",
        latents: int = 1,
        encoder_window: int = 0,
        start_token: bool = True,
        kv_slots: SlotRule | None = None,
    ) -> None:
        if kv_slots is not None and position_ids == "contiguous":
            raise ValueError("position_ids: got 'contiguous' with kv_slots, needs original or parallel")
        if kv_slots is not None and kv_slots.rows > k:
            raise ValueError(f"rows: got {kv_slots.rows}, needs 1 to the chunk_size of {k}")
        if position_ids not in ("contiguous", "original", "parallel"):
            raise ValueError(f"position_ids: got {position_ids!r}, needs contiguous, original or parallel")
        for name, value, least in (("k", k, 1), ("window", window, 1), ("latents", latents, 1),
                                   ("encoder_window", encoder_window, 0)):  # fmt: skip
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: got {value!r}, needs an integer of {least} or more")
        self.tokenizer = tokenizer
        self.encoder_tokenizer = encoder_tokenizer
        self.k = k
        self.window = window
        self.position_ids = position_ids
        self.encoder_special_tokens = encoder_special_tokens
        self.latents = latents
        self.encoder_window = encoder_window
        self.start_token = start_token
        self.kv_slots = kv_slots
        self.chunker_name = chunker if isinstance(chunker, str) else None
        self.chunker = self._chunker(chunker) if isinstance(chunker, str) else chunker

    def _chunker(self, name: str) -> Chunker:
        if name not in ("fixed", "sentence"):
            raise ValueError(f"chunker: got {name!r}, needs fixed, sentence or a Chunker")
        return FixedChunks(self.tokenizer, self.k) if name == "fixed" else SentenceChunks(self.tokenizer)

    @classmethod
    def from_config(
        cls,
        config: RefragConfig,
        tokenizer: PreTrainedTokenizerBase,
        encoder_tokenizer: PreTrainedTokenizerBase,
        *,
        chunker: str | Chunker = "fixed",
        start_token: bool = True,
    ) -> RefragProcessor:
        """Create the processor for a model from its config, with the decoder's context window."""
        return cls(
            tokenizer,
            encoder_tokenizer,
            config.chunk_size,
            window=getattr(config.get_text_config(), "max_position_embeddings", None),
            position_ids=config.position_ids,
            encoder_special_tokens=config.encoder_special_tokens,
            chunker=chunker,
            latents=config.latents,
            encoder_window=config.window,
            start_token=start_token,
            kv_slots=config.kv_slots,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write both tokenizers and the settings to ``folder``.

        Raises
        ------
        ValueError
            If the chunker is a custom one, which can't be saved.
        """
        if self.chunker_name is None:
            raise ValueError(f"chunker: got {type(self.chunker).__name__}, needs fixed or sentence to be saved")
        root = Path(folder)
        self.tokenizer.save_pretrained(root / "decoder_tokenizer")
        self.encoder_tokenizer.save_pretrained(root / "encoder_tokenizer")
        fields = ("k", "window", "position_ids", "encoder_special_tokens", "encoder_window", "latents", "start_token")
        settings = {name: getattr(self, name) for name in fields}
        settings["chunker"] = self.chunker_name
        if self.kv_slots is not None:
            settings["kv_slots"] = dataclasses.asdict(self.kv_slots)
        (root / "refrag_processor.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> RefragProcessor:
        """Read what ``save_pretrained`` wrote."""
        root = Path(folder)
        settings = json.loads((root / "refrag_processor.json").read_text())
        if rule := settings.get("kv_slots"):
            settings["kv_slots"] = SlotRule(**rule)
        return cls(
            AutoTokenizer.from_pretrained(root / "decoder_tokenizer"),
            AutoTokenizer.from_pretrained(root / "encoder_tokenizer"),
            **settings,
        )

    def apply_chat_template(
        self, messages: Sequence[dict[str, str | Sequence[Part]]], *, add_generation_prompt: bool = True
    ) -> list[Part]:
        """Apply the decoder's chat template to a conversation.

        Parameters
        ----------
        messages : sequence of dicts
            Each has a "role" and a "content", which is a string or a list of text and passages.

        Returns
        -------
        list of str and Passage
            A prompt for ``__call__``.

        Raises
        ------
        TypeError
            If a message contains anything else. The error message names it.
        ValueError
            If the template omits or repeats a passage.
        """
        return render_chat(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)

    @deprecated.renamed_keyword("chooser", "selector")
    def __call__(
        self,
        prompts: Part | Sequence[Part] | Sequence[Sequence[Part]],
        *,
        expand: float | Collection[int | str] | None = None,
        expand_count: int | Sequence[int] | None = None,
        selector: Selector | None = None,
        question: str | Sequence[str] | None = None,
        max_new_tokens: int = 0,
        store: ChunkStore | KVStore | None = None,
        begin: bool = True,
    ) -> MixedPrompt:
        """Pack a prompt or a batch of prompts.

        Parameters
        ----------
        prompts : list of str and Passage, or a list of such lists
            A single string or Passage is a prompt of one part.
        expand : float or collection of int and str, optional
            The fraction of each prompt's chunks that ``selector`` picks for expansion, from 0 to 1. Or the chunks to
            expand: indices of chunks, counted through the batch, and ids of passages, which are expanded as a whole.
        expand_count : int or sequence of int, optional
            The number of chunks that ``selector`` picks, instead of a fraction: one for all prompts, or one for each.
        selector : Selector, optional
            Picks the chunks to expand. Needed unless nothing, everything or given chunks are expanded. Without a
            fraction or a count, it decides how many chunks to pick.
        question : str or sequence of str, optional
            The question for the selector: one for all prompts, or one for each. Defaults to each prompt's last text.
        max_new_tokens : int
            Number of positions to reserve in the decoder's window.
        store : ChunkStore or KVStore, optional
            A store that holds all passages; they are found by their text, or by their id if they have no text. Their
            chunks and embeddings come from the store, so that the model encodes nothing, and a selector with a
            ``TextEmbedder`` encodes only the question. With key/value slots, a KVStore: the decoder reads no passage.
        begin : bool
            Whether the prompts begin a sequence and get the tokenizer's prefix, such as a BOS token, and the
            ``start_token``. Pass False for a prompt that is appended to a ``GenerationState``.

        Returns
        -------
        MixedPrompt

        Raises
        ------
        TypeError
            If a prompt or a question contains anything but text and passages. The message names the part.
        ValueError
            If a prompt is empty, a passage has no text, ``expand`` is outside 0 to 1 or names an unknown chunk or
            passage, ``expand_count`` exceeds a prompt's chunks, or the number of counts or questions differs from the
            number of prompts.
        StoreError
            If a passage isn't in the store, or the store was filled with another chunker.
        PromptTooLongError
            If a prompt doesn't fit. The message states the excess, and which k or how many expanded chunks would fit.
        """
        batch = _batch(prompts)
        stored, chunk_embeds = None, None
        entries: Sequence[PassageEntry] | None = None
        if store is not None:
            self._check_store(store)
            passages = [part for prompt in batch for part in prompt if isinstance(part, Passage)]
            stored = iter(store.chunks(passages))
            if isinstance(store, KVStore):
                entries = store.get_many(passages)
            else:
                chunk_embeds = store.get_many(passages).rows
        sequences = [self._spans(index, prompt, stored, begin) for index, prompt in enumerate(batch)]
        chunks = [[span for _, span in spans if isinstance(span, Chunk)] for spans in sequences]
        if chunk_embeds is None and self.encoder_window:
            chunk_embeds = self._embedded(sequences, selector)
        questions = self._questions(batch, question)
        by_attention = isinstance(selector, AttentionSelector)
        others = None if by_attention else selector
        shares = (None, None) if by_attention else (expand, expand_count)
        expanded = expanded_chunks(chunks, questions, *shares, others, chunk_embeds)
        if self.kv_slots is not None:
            expanded |= whole_chunks(sequences, self.kv_slots.whole)
        if begin:
            firsts = itertools.accumulate(map(len, chunks), initial=0)
            sequences = [self._started(spans, first in expanded) for spans, first in zip(sequences, firsts)]
        if isinstance(store, KVStore) and begin:
            self._check_shared_text(store, sequences)

        def pack() -> MixedPrompt:
            return pack_spans(
                sequences,
                expanded,
                self.encoder_tokenizer,
                position_ids=self.position_ids,
                encoder_special_tokens=self.encoder_special_tokens,
                chunk_embeds=None if self.kv_slots else chunk_embeds,
                latents=self.latents,
                encoder_window=self.encoder_window,
                kv_slots=self.kv_slots,
                passages=entries,
            )

        packed = pack()
        if isinstance(selector, AttentionSelector):
            picked, entries = attention_picks(selector, packed, chunks, expand, expand_count, begin)
            expanded |= picked
            packed = pack()
        self._check_window(sequences, expanded, packed, max_new_tokens)
        return packed

    def _embedded(self, sequences: Sequence[Sequence[Span]], selector: Selector | None) -> torch.Tensor | None:
        """Return the chunks' embeddings, encoded in their windows, if the selector uses a ``TextEmbedder``."""
        embedder = getattr(selector, "embed", None)
        if not isinstance(embedder, TextEmbedder):
            return None
        texts = pack_chunks(
            sequences, self.encoder_tokenizer, special_tokens=self.encoder_special_tokens, window=self.encoder_window
        )
        with torch.no_grad():
            return embedder.model.encode_chunks(texts)

    def _check_store(self, store: ChunkStore | KVStore) -> None:
        own = describe_chunker(self.chunker)
        held = store.fingerprint.chunker
        if own != held:
            raise StoreError(f"store {store.folder}: chunker: holds {held}, got a processor of {own}")
        rule = store.fingerprint.slot_rule if isinstance(store, KVStore) else None
        if rule != self.kv_slots:
            held, own = (str(one or "embedding slots") for one in (rule, self.kv_slots))
            raise StoreError(f"store {store.folder}: slots: holds {held}, got a processor of {own}")

    def shared_text(self, prompt: Part | Sequence[Part] | None = None) -> list[int]:
        """Return the tokens before the first passage of a prompt, which key/value slots are read behind.

        Parameters
        ----------
        prompt : list of str and Passage, optional
            Defaults to a passage and a question in the chat template, if there is one, as ``refrag generate`` asks.
        """
        if prompt is None:
            prompt = [Passage("a"), "b"]
            if self.tokenizer.chat_template:
                prompt = self.apply_chat_template([{"role": "user", "content": prompt}])
        return shared_tokens(self.spans(prompt))

    def _check_shared_text(self, store: KVStore, sequences: Sequence[Sequence[Span]]) -> None:
        held = store.fingerprint.shared_tokens
        for index, spans in enumerate(sequences):
            got = shared_tokens(spans)
            if got != held and any(isinstance(span, Chunk) for _, span in spans):
                raise StoreError(
                    f"store {store.folder}: shared_text: holds passages read behind "
                    f"{self.tokenizer.decode(held)!r}, got prompt {index} with {self.tokenizer.decode(got)!r}"
                )

    def spans(self, prompt: Part | Sequence[Part]) -> list[Span]:
        """Return a prompt's text and chunks, before packing, for training.

        Raises
        ------
        TypeError, ValueError
            As ``__call__``.
        """
        parts = [prompt] if isinstance(prompt, (str, Passage)) else prompt
        return self._started(self._spans(0, parts, None, True), False)

    def _spans(
        self, index: int, prompt: Sequence[Part], stored: Iterator[list[Chunk]] | None, begin: bool
    ) -> list[Span]:
        """Return the spans of a prompt."""
        spans: list[Span] = []
        passages = 0
        prefix = self.tokenizer("", add_special_tokens=True)["input_ids"]  # for example Llama's <s>; empty for many
        for position, part in enumerate(prompt):
            if isinstance(part, Passage):
                if stored is None and not part.text.strip():
                    raise ValueError(
                        f"passage {part.id or position!r} of prompt {index}: has no text"
                        + (", and no store is given to find its id in" if part.id and not part.text else "")
                    )
                if stored is None:
                    require_text(part.text, f"passage {part.id or position!r} of prompt {index}: text")
                chunks = next(stored) if stored else self.chunker(part.text)
                spans += [(passages, dataclasses.replace(chunk, passage=part.id)) for chunk in chunks]
                passages += 1
            else:
                require_text(part, f"part {position} of prompt {index}", "str or Passage")
                token_ids = self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
                if token_ids:
                    spans.append((-1, token_ids))
        if not spans:
            raise ValueError(f"prompt {index}: is empty, needs text or passages")
        # Don't repeat a prefix that the chat template wrote.
        beginning = spans[0][1] if isinstance(spans[0][1], list) else []
        if begin and prefix and beginning[: len(prefix)] != prefix:
            spans.insert(0, (-1, prefix))
        return spans

    def _started(self, spans: list[Span], is_expanded: bool) -> list[Span]:
        """Return the spans, with the start token before a first chunk that isn't expanded."""
        start = self.tokenizer.bos_token_id
        skipped = is_expanded and self.kv_slots is None  # passages with key/value slots are read behind it
        if skipped or not self.start_token or start is None or not isinstance(spans[0][1], Chunk):
            return spans
        return [(-1, [start]), *spans]

    def _questions(self, batch: Sequence[Sequence[Part]], question: str | Sequence[str] | None) -> list[str]:
        """Return the question of each prompt."""
        if question is None:
            return [next((part for part in reversed(prompt) if isinstance(part, str)), "") for prompt in batch]
        if not isinstance(question, (str, list, tuple)):
            raise TypeError(f"question: got {type(question).__name__}, needs str, or a list of str")
        questions = [question] * len(batch) if isinstance(question, str) else list(question)
        for index, own in enumerate(questions):
            require_text(own, f"question {index}")
        if len(questions) != len(batch):
            raise ValueError(f"question: got {len(questions)} questions, needs {len(batch)}, one for each prompt")
        return questions

    def _check_window(
        self,
        sequences: list[list[Span]],
        expanded: frozenset[int],
        packed: MixedPrompt,
        max_new_tokens: int,
    ) -> None:
        if self.window is None:
            return
        ends = packed.layout.sequence_offsets[1:].tolist()
        starts = packed.layout.sequence_offsets[:-1].tolist()
        first = 0
        for index, (spans, start, end) in enumerate(zip(sequences, starts, ends)):
            positions = int(packed.position_ids[start:end].max()) + 1
            over = max(end - start, positions) + max_new_tokens - self.window
            if over > 0:
                room = self.window - max_new_tokens
                raise PromptTooLongError(
                    f"context: prompt {index} has {max(end - start, positions)} rows"
                    + (f" and {max_new_tokens} new tokens" if max_new_tokens else "")
                    + f", {over} over the decoder's window of {self.window}; "
                    + self._what_fits(spans, first, expanded, room)
                )
            first += sum(isinstance(span, Chunk) for _, span in spans)

    def _what_fits(self, spans: list[Span], first: int, expanded: frozenset[int], room: int) -> str:
        if self.kv_slots is not None:
            return "with key/value slots, all tokens count, so no k fits: shorten it or leave out passages"
        if self.position_ids == "original":
            return (
                "original position ids also count the tokens of compressed chunks, so no k fits; try "
                'position_ids="contiguous"'
            )
        plain, chunk = 0, first
        expanded_lengths: list[int] = []
        compressed: dict[int, list[int]] = {}
        for passage, span in spans:
            if not isinstance(span, Chunk):
                plain += len(span)
                continue
            if chunk in expanded:
                expanded_lengths.append(len(span.token_ids))
            else:
                compressed.setdefault(passage, []).append(len(span.token_ids))
            chunk += 1
        fits = []
        text = plain + sum(expanded_lengths)
        slots = self.latents
        if self.chunker_name == "fixed" and compressed and text + slots * len(compressed) <= room:
            k = self.k + 1
            while text + slots * sum(-(-sum(lengths) // k) for lengths in compressed.values()) > room:
                k += 1
            fits.append(f"k = {k}")
        # Assume that the longest chunks stay expanded, so that the number fits whichever chunks are chosen.
        left = room - plain - slots * (len(expanded_lengths) + sum(map(len, compressed.values())))
        if expanded_lengths and left >= 0:
            longest = itertools.accumulate(length - slots for length in sorted(expanded_lengths, reverse=True))
            fits.append(f"{sum(more <= left for more in longest)} of its {len(expanded_lengths)} expanded chunks")
        if fits:
            return " or ".join(fits) + " would fit"
        if self.chunker_name == "fixed":
            return f"no k fits: {text} tokens are text, shorten it or expand less"
        return "shorten it, omit passages or expand less"


def _batch(prompts: Part | Sequence[Part] | Sequence[Sequence[Part]]) -> Sequence[Sequence[Part]]:
    """Normalize prompts to a list of lists of parts. The parts aren't checked."""
    if isinstance(prompts, (str, Passage)):
        return [[prompts]]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise TypeError(
            f"prompts: got {type(prompts).__name__}, needs a list of str and Passage, or a list of such lists"
        )
    if not prompts:
        raise ValueError("prompts: is empty, needs a prompt")
    if any(isinstance(part, (str, Passage)) for part in prompts):
        return [cast(Sequence[Part], prompts)]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise TypeError(f"prompt {index}: got {type(prompt).__name__}, needs a list of str and Passage")
    return cast(Sequence[Sequence[Part]], prompts)
