"""Answers questions from passages: the code that the integrations with RAG frameworks share."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from refrag import deprecated, weights
from refrag.adapters import load_policy
from refrag.loading import is_adapter, load_model, load_processor, load_trained
from refrag.model.encoder import TextEmbedder
from refrag.model.inputs import Chunk, MixedPrompt, Passage
from refrag.model.modeling import RefragForCausalLM
from refrag.model.policy import ExpansionPolicy
from refrag.processing import selectors
from refrag.processing.processor import Part, RefragProcessor
from refrag.processing.selectors import Selector
from refrag.store.kv_store import KVStore
from refrag.store.store import ChunkStore

TEMPLATE = "Answer the question with the help of these documents.\n\n{passages}\nQuestion: {question}"


class Answerer:
    """Answers questions with a model, its processor and the settings of a prompt.

    Generates one answer at a time; concurrent calls from other threads wait.

    Parameters
    ----------
    model : RefragForCausalLM
    processor : RefragProcessor
        The model's processor.
    template : str
        The user's message, with ``{passages}`` and then ``{question}`` once each. If the decoder has a chat template,
        the message is formatted with it.
    selector : str or Selector, optional
        Selects the chunks to expand to text: a name in ``refrag.processing.selectors.NAMES``, or an object. By default
        cosine if ``expand`` is a fraction above 0 or ``expand_count`` is given, else none.
    expand : float or collection of int and str, optional
        Fraction of the chunks to expand, or which chunks, as for ``RefragProcessor``.
    expand_count : int, optional
        Maximum number of chunks to expand, instead of a fraction.
    policy : ExpansionPolicy, optional
        For the selector "policy".
    store : ChunkStore or KVStore, optional
        Store with all passages, which are looked up by their text, or by their id if they have no text.
    max_new_tokens : int
        Maximum tokens of an answer.
    **generation
        Further arguments of ``model.generate``, such as ``do_sample`` and ``temperature``.

    Raises
    ------
    ValueError
        If the template lacks a placeholder, a number is out of range, or the selector is unknown or lacks an argument
        that it needs.

    Examples
    --------
    With the demo's model, which was trained for about an hour:

    >>> answerer = Answerer.from_pretrained(max_new_tokens=16)
    >>> passages = [Passage("The bridge of Orla was built in 1871.", "orla.txt")]
    >>> answer = answerer.answer("When was the bridge built?", passages)
    >>> answer == "".join(answerer.stream("When was the bridge built?", passages))
    True
    """

    @deprecated.renamed_keyword("chooser", "selector")
    def __init__(
        self,
        model: RefragForCausalLM,
        processor: RefragProcessor,
        *,
        template: str = TEMPLATE,
        selector: str | Selector | None = None,
        expand: float | Collection[int | str] | None = None,
        expand_count: int | None = None,
        policy: ExpansionPolicy | None = None,
        store: ChunkStore | KVStore | None = None,
        max_new_tokens: int = 256,
        **generation: Any,
    ) -> None:
        self._frame = _split_template(template)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: got {max_new_tokens}, needs 1 or more")
        if expand_count is not None and (expand is not None or expand_count < 0):
            both = "" if expand is None else f" with expand = {expand}"
            raise ValueError(f"expand_count: got {expand_count}{both}, needs 0 or more, and no expand")
        self.model = model
        self.processor = processor
        self.expand = expand
        self.store = store
        self.max_new_tokens = max_new_tokens
        self.generation = generation
        if selector is None and (expand_count or (isinstance(expand, float) and 0 < expand < 1)):
            selector = "cosine"
        # Reuse the embeddings that a selector computed; with a store, nothing has to be encoded.
        self._embedder: TextEmbedder | None = None
        if selector in ("cosine", "policy"):
            self._embedder = TextEmbedder(model, processor.encoder_tokenizer)
        if isinstance(selector, str):
            selector = selectors.by_name(selector, model=model, embed=self._embedder, policy=policy)
        self.selector = selector if selector is None or expand_count is None else _AtMost(selector, expand_count)
        self._lock = threading.Lock()

    chooser = deprecated.renamed_attribute("chooser", "selector")

    @classmethod
    @deprecated.renamed_keyword("chooser", "selector")
    def from_pretrained(
        cls, folder: str | Path | None = None, *, k: int | None = None, chunker: str = "fixed", **options: Any
    ) -> Answerer:
        """Load a model and its processor.

        Parameters
        ----------
        folder : str or Path, optional
            Folder that ``save_pretrained`` or a stage of ``refrag train`` wrote; by default the demo's model.
        k : int, optional
            Tokens per chunk; by default the model's, or 8.
        chunker : {"fixed", "sentence"}
        **options
            Further arguments of ``Answerer``.

        Raises
        ------
        ValueError
            If the folder contains no model, or one made for another k.
        """
        path = None if folder is None else Path(folder)
        policy = None
        if path is not None and is_adapter(path):
            model, processor, policy = load_trained(path, k, chunker)
        else:
            model, processor = load_model(path, k), load_processor(path, k, chunker)
            adapter = weights.adapter_file(processor.k) if path is None else None
            if adapter is not None and options.get("selector") == "policy":
                policy = load_policy(adapter)
        return cls(model, processor, **{"policy": policy, **options})

    def prompt(self, question: str, passages: Sequence[Passage]) -> MixedPrompt:
        """Build the prompt for a question and passages.

        Raises
        ------
        ValueError
            If the question is empty, a passage has no text, or ``expand`` names an unknown chunk or passage.
        PromptTooLongError
            If the prompt and the answer don't fit the decoder's window.
        """
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"question: got {question!r}, needs text")
        before, between, after = self._frame
        parts: list[Part] = [before]
        for one in passages:
            if self.store is None:
                # As in training, a blank line separates passages and is compressed with the one before it.
                parts.append(Passage(one.text.rstrip() + "\n\n" if one.text else "", one.id))
            else:
                parts += [one, "\n\n"]  # a store identifies passages by their exact text
        parts.append(between + question.strip() + after)
        if self.processor.tokenizer.chat_template:
            parts = self.processor.apply_chat_template([{"role": "user", "content": parts}])
        return self.processor(
            parts,
            expand=self.expand,
            selector=self.selector,
            question=question.strip(),
            store=self.store,
            max_new_tokens=self.max_new_tokens,
        )

    def answer(self, question: str, passages: Sequence[Passage]) -> str:
        """Return the answer; errors are those of ``prompt``."""
        with self._lock:
            tokens = self._generate(self.prompt(question, passages))
        return str(self.processor.tokenizer.decode(tokens[0], skip_special_tokens=True))

    def stream(self, question: str, passages: Sequence[Passage]) -> AnswerStream:
        """Return an iterator over the answer as it is generated; errors of ``prompt`` are raised at once."""
        with self._lock:
            prompt = self.prompt(question, passages)
        return AnswerStream(self, prompt)

    async def aanswer(self, question: str, passages: Sequence[Passage]) -> str:
        """Run ``answer`` in a thread. If the caller is cancelled, generation stops too."""
        return "".join([piece async for piece in self.astream(question, passages)])

    async def astream(self, question: str, passages: Sequence[Passage]) -> AsyncIterator[str]:
        """Run ``stream`` in a thread."""
        pieces = await asyncio.to_thread(self.stream, question, passages)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            pieces.close()

    def _generate(self, prompt: MixedPrompt, **more: Any) -> torch.Tensor:
        embeds = None
        if self._embedder is not None and self.store is None and prompt.kv_slots is None:
            embeds = self._embedder([chunk.text for chunk in prompt.chunks])
        return self.model.generate(
            prompt, chunk_embeds=embeds, max_new_tokens=self.max_new_tokens, **{**self.generation, **more}
        )


class AnswerStream(Iterator[str]):
    """The pieces of an answer, generated in a thread of its own; returned by ``Answerer.stream``.

    The thread starts at the first ``next``. ``close``, or deleting the object, stops it at the next token.
    """

    def __init__(self, answerer: Answerer, prompt: MixedPrompt) -> None:
        self._answerer = answerer
        self._prompt = prompt
        self._streamer = TextIteratorStreamer(answerer.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop = threading.Event()
        self._failure: list[BaseException] = []
        self._thread: threading.Thread | None = None

    def __next__(self) -> str:
        if self._thread is None:
            # Don't pass self: a reference in the thread would prevent __del__ when the caller drops the stream.
            arguments = (self._answerer, self._prompt, self._streamer, self._stop, self._failure)
            self._thread = threading.Thread(target=_generate_into, args=arguments, daemon=True)
            self._thread.start()
        while not self._stop.is_set():
            try:
                piece = next(self._streamer)
            except StopIteration:
                self._stop.set()
                self._thread.join()
                if self._failure:
                    raise self._failure[0] from None
                break
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop generating. May be called from any thread, at any time."""
        self._stop.set()

    def __del__(self) -> None:
        self._stop.set()


class _AtMost:
    """Makes a selector pick a fixed number of chunks, or all chunks of a prompt that has fewer."""

    def __init__(self, selector: Selector, most: int) -> None:
        self.selector = selector
        self.most = most

    def __call__(self, question: str, chunks: Sequence[Chunk], count: int | None) -> Collection[int]:
        return self.selector(question, chunks, min(self.most, len(chunks)))


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def _generate_into(
    answerer: Answerer,
    prompt: MixedPrompt,
    streamer: TextIteratorStreamer,
    stop: threading.Event,
    failure: list[BaseException],
) -> None:
    try:
        criteria = StoppingCriteriaList([*(answerer.generation.get("stopping_criteria") or ()), _Stopped(stop)])
        with answerer._lock:
            if not stop.is_set():
                answerer._generate(prompt, streamer=streamer, stopping_criteria=criteria)
    except BaseException as error:
        failure.append(error)
    finally:
        streamer.on_finalized_text("", stream_end=True)  # release a waiting caller in any case


def _split_template(template: str) -> tuple[str, str, str]:
    """Split a template into the text before the passages, before the question, and after it."""
    before, passages, rest = template.partition("{passages}")
    between, question, after = rest.partition("{question}")
    if not (passages and question) or "{passages}" in rest or "{question}" in after:
        raise ValueError(f"template: got {template!r}, needs {{passages}} and then {{question}}, once each")
    return before, between, after
