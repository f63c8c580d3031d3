"""Inspects a prompt: counts its rows, and draws its text, slots and expanded chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from refrag.model.inputs import MixedPrompt

SLOT, EXPANDED, HIDDEN = "bold cyan", "green", "dim cyan"


@dataclasses.dataclass(frozen=True)
class PromptCounts:
    """Counts of a prompt.

    Attributes
    ----------
    rows : int
        Number of rows that the decoder reads.
    full_rows : int
        Number of rows if all chunks were text.
    chunks, expanded : int
        Number of chunks, and of expanded ones among them.
    passage_rows, passage_tokens : int
        Number of rows and of tokens of the passages.

    Examples
    --------
    >>> from refrag import Passage, RefragProcessor, loading
    >>> processor = loading.load_processor(None, k=4)
    >>> counts = PromptCounts.of(processor([Passage("The bridge of Orla was built in 1871."), "When?"], expand={0}))
    >>> print(counts)
    9 rows for 16 tokens (1.8 x), 1 of 4 chunks expanded, passages compressed 2.0 x
    """

    rows: int
    full_rows: int
    chunks: int
    expanded: int
    passage_rows: int
    passage_tokens: int

    @staticmethod
    def of(prompt: MixedPrompt) -> PromptCounts:
        """Count the rows of a prompt, or of a batch."""
        sizes = [len(chunk.token_ids) for chunk in prompt.chunks]
        tokens = sum(sizes)
        # A chunk of fewer tokens than key/value slots keeps all of them.
        slots = [prompt.latents if prompt.kv_slots is None else min(prompt.latents, size) for size in sizes]
        rows = sum(size if index in prompt.expanded else slots[index] for index, size in enumerate(sizes))
        total = prompt.layout.total_rows
        return PromptCounts(total, total - rows + tokens, len(sizes), len(prompt.expanded), rows, tokens)

    @property
    def rate(self) -> float:
        """Compression rate of the passages: k / (1 - p + kp) if a fraction p of the chunks is expanded (A.1)."""
        return self.passage_tokens / self.passage_rows if self.passage_rows else 1.0

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows for {self.full_rows:,} tokens ({self.full_rows / max(self.rows, 1):.1f} x), "
            f"{self.expanded:,} of {self.chunks:,} chunks expanded, passages compressed {self.rate:.1f} x"
        )


def draw(prompt: MixedPrompt, tokenizer: PreTrainedTokenizerBase, *, hidden: bool = False) -> Text:
    """Draw a prompt: text as it is, ``[3]`` for the slot of chunk 3, ``[4: its text]`` for expanded chunk 4.

    The brackets distinguish them even without colours. Adjacent slots are drawn as one range.

    Parameters
    ----------
    prompt : MixedPrompt
    tokenizer : PreTrainedTokenizerBase
        The decoder's.
    hidden : bool
        Whether to show the text of compressed chunks too, as ``[3~ its text]``.

    Returns
    -------
    rich.text.Text

    Examples
    --------
    >>> from refrag import Passage, RefragProcessor, loading
    >>> processor = loading.load_processor(None, k=4)
    >>> prompt = processor(["Read: ", Passage("The bridge of Orla was built in 1871."), " When?"], expand={2})
    >>> draw(prompt, processor.tokenizer).plain
    'Read: [0-1][2:  187][3] When?'
    """
    picture = Text()
    run: list[int] = []

    def end_run() -> None:
        if run:
            picture.append(f"[{run[0]}]" if len(run) == 1 else f"[{run[0]}-{run[-1]}]", SLOT)
            run.clear()

    for chunk, token_ids, sequence in _spans(prompt):
        if sequence:
            end_run()
            picture.append("\n\n" if picture else "")
        if chunk is None:
            end_run()
            picture.append(str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)))
        elif chunk in prompt.expanded:
            end_run()
            picture.append(f"[{chunk}: {prompt.chunks[chunk].text}]", EXPANDED)
        elif hidden:
            picture.append(f"[{chunk}~", SLOT)
            picture.append(f" {prompt.chunks[chunk].text}", HIDDEN)
            picture.append("]", SLOT)
        else:
            run.append(chunk)
    end_run()
    return picture


def _spans(prompt: MixedPrompt) -> Iterator[tuple[int | None, list[int], bool]]:
    """Yield each span's chunk number or None, its token ids, and whether it begins a sequence."""
    token_ids = prompt.token_ids.tolist()
    passages = iter(prompt.passage_of_span.tolist())
    row = chunk = 0
    for lengths in prompt.layout.lengths():
        for index, rows in enumerate(lengths):
            of_passage = next(passages) >= 0
            yield (chunk if of_passage else None), token_ids[row : row + rows], index == 0
            chunk += of_passage
            row += rows
