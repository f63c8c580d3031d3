"""Options that several commands have, and the prompt of `refrag generate` and `refrag inspect` made from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from refrag.model.encoder import TextEmbedder
    from refrag.model.inputs import MixedPrompt
    from refrag.model.modeling import RefragForCausalLM
    from refrag.model.passage_rows import SlotRule
    from refrag.model.policy import ExpansionPolicy
    from refrag.processing.processor import RefragProcessor
    from refrag.processing.selectors import Selector
    from refrag.store.kv_store import KVStore
    from refrag.store.store import ChunkStore

Files = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Passages: .jsonl, .ndjson, .parquet and folders of .txt, as for `refrag encode`; any other file is one "
        "passage; - is standard input."
    ),
]
Question = Annotated[str, typer.Option(help="Question to answer from the passages.")]
Model = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a saved model and processor or of a training stage, or `distilled` for a bundled adapter; by "
        "default the demo's model."
    ),
]
Encoder = Annotated[
    str | None,
    typer.Option(help="Folder or name of the model that a training stage started from, if it has moved since."),
]
Decoder = Encoder
K = Annotated[int | None, typer.Option("--k", help="Tokens per chunk; by default the model's, 8 for the demo's.")]
Chunker = Annotated[str, typer.Option(help="How passages are split into chunks: fixed or sentence.")]
SelectorName = Annotated[
    str | None,
    typer.Option(
        "--selector",
        "--chooser",
        help="Selector of the chunks to expand: nothing, everything, random, cosine, threshold, perplexity-asc, "
        "perplexity-desc or policy, with --slots kv also attention; cosine if only --expand is given.",
    ),
]
Expand = Annotated[
    str | None,
    typer.Option(help="Chunks to expand: a fraction such as 0.25 or 25%, or a whole number."),
]
Threshold = Annotated[
    float | None, typer.Option(help="For the selector threshold: minimum cosine to the question, -1 to 1.")
]
Policy = Annotated[
    Path | None,
    typer.Option(help="For the selector policy: folder of a saved ExpansionPolicy; by default the model's own."),
]
Store = Annotated[
    Path | None,
    typer.Option(help="Store with the passages' embeddings, written by `refrag encode`."),
]
Slots = Annotated[
    str | None,
    typer.Option(
        help="Slots of compressed chunks: embedding, as in the paper, or kv, rows of the decoder's own keys and "
        "values, which need no training; by default those of the model."
    ),
]
SlotRows = Annotated[int, typer.Option(help="With --slots kv, rows that each layer and head keeps of a chunk.")]
SlotRuleName = Annotated[
    str, typer.Option(help="With --slots kv, which rows: received (most attention in their passage) or distinct.")
]
SlotWhole = Annotated[
    int, typer.Option(help="With --slots kv, chunks at the end of each passage that keep all their rows.")
]
Ids = Annotated[list[str] | None, typer.Option("--id", help="Id of a passage in the store; may be repeated.")]
Seed = Annotated[int, typer.Option(help="Seed of the selector random, and of sampling.")]


@dataclasses.dataclass
class PromptOptions:
    """The options that determine a prompt; loads the model on first use."""

    files: list[Path]
    question: str
    model_folder: Path | None
    k: int | None
    chunker: str
    selector: str | None
    expand: str | None
    threshold: float | None
    policy: Path | None
    seed: int
    encoder: str | None = None
    decoder: str | None = None
    store: Path | None = None
    ids: list[str] | None = None
    slots: str | None = None
    slot_rows: int = 1
    slot_rule: str = "received"
    slot_whole: int = 0

    _model: RefragForCausalLM | None = None
    _embedder: TextEmbedder | None = None
    _stage_policy: ExpansionPolicy | None = None

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("--question: is empty, needs text")
        if self.ids and self.store is None:
            raise ValueError(f"--id: got {self.ids[0]}, needs --store, too")
        if not self.files and not self.ids:
            raise ValueError("passages: got none, needs files, or - for standard input, or --id with --store")
        if self.threshold is not None and self.selector != "threshold":
            raise ValueError(f"--threshold: got {self.threshold}, needs --selector threshold, too")
        if self.policy is not None and self.selector != "policy":
            raise ValueError(f"--policy: got {self.policy}, needs --selector policy, too")
        if self.k is not None and self.k < 1:
            raise ValueError(f"--k: got {self.k}, needs 1 or more")
        self.amount = amount(self.expand)
        self.kv_slots = slot_rule(self.slots, self.slot_rows, self.slot_rule, self.slot_whole)

    def model(self) -> RefragForCausalLM:
        """Return the model, loaded once."""
        if self._model is None:
            from refrag.loading import load_kv_model, load_model

            if self.kv_slots is not None:
                self._model = load_kv_model(self.model_folder, self.k, self.kv_slots)
            else:
                self._model = load_model(self.model_folder, self.k)
        return self._model

    def prompt(self, max_new_tokens: int = 0) -> tuple[RefragProcessor, MixedPrompt]:
        """Build the prompt and return it together with its processor, processor first."""
        from refrag.data.passage_files import read_passages
        from refrag.model.inputs import Passage

        passages = read_passages(self.files)
        processor = self._processor()
        parts: Any = []
        if self.store is None:
            # A blank line separates passages. It is compressed with the passage before it.
            parts += [Passage(one.text.rstrip() + "\n\n", one.id) for one in passages]
        else:
            # The store identifies passages by their exact text, so the blank line is text of its own.
            for passage in [*passages, *(Passage(id=name) for name in self.ids or ())]:
                parts += [passage, "\n\n"]
        parts.append(self.question.strip())
        if processor.tokenizer.chat_template:
            parts = processor.apply_chat_template([{"role": "user", "content": parts}])
        selector, store = self._selector(processor), self._open_store(processor)
        try:
            prompt = processor(
                parts, selector=selector, question=self.question.strip(), max_new_tokens=max_new_tokens, store=store,
                **self.amount,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(str(error).replace("expand_count:", "--expand:")) from None
        return processor, prompt

    def _processor(self) -> RefragProcessor:
        """Load the processor, and the model and policy of a training stage."""
        from refrag.loading import is_adapter, load_kv_processor, load_processor, load_trained, with_kv_slots

        if self.model_folder is not None and is_adapter(self.model_folder):
            self._model, processor, self._stage_policy = load_trained(
                self.model_folder, self.k, self.chunker, encoder=self.encoder, decoder=self.decoder
            )
            if self.kv_slots is None:
                return processor
            self._model.config.use_kv_slots(self.kv_slots)
            return with_kv_slots(processor, self.kv_slots)
        for name in ("encoder", "decoder"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name}: needs --model with the folder of a training stage, too")
        if self.kv_slots is not None:
            return load_kv_processor(self.model_folder, self.k, self.kv_slots, self.chunker)
        processor = load_processor(self.model_folder, self.k, self.chunker)
        if self.slots == "embedding" and processor.kv_slots is not None:
            raise ValueError(f"--slots: got embedding, but {self.model_folder} was saved with key/value slots")
        return processor

    def _open_store(self, processor: RefragProcessor) -> ChunkStore | KVStore | None:
        """Open the store; refuse one that was filled with another model, another chunker or other slots."""
        if self.store is None:
            return None
        from refrag.store.fingerprint import Fingerprint, KVFingerprint
        from refrag.store.kv_store import KVStore
        from refrag.store.store import ChunkStore

        model = self.model()
        if (rule := processor.kv_slots) is not None:
            shared = processor.shared_text()
            return KVStore.open(self.store, KVFingerprint.of(model.decoder, processor, rule, shared))
        return ChunkStore.open(self.store, Fingerprint.of(model.encoder, processor, model.config))

    def chunk_embeds(self, prompt: MixedPrompt) -> Any:
        """Return the embeddings that the selector computed for the prompt's chunks, or None."""
        if self._embedder is None or prompt.chunk_embeds is not None or prompt.kv_slots is not None:
            return None
        return self._embedder([chunk.text for chunk in prompt.chunks])

    def _selector(self, processor: RefragProcessor) -> Selector | None:
        from refrag.model.encoder import TextEmbedder
        from refrag.processing import selectors

        name = self.selector
        if name is None and self.expand is not None:
            name = "cosine"
        if name is None:
            return None
        if name not in selectors.NAMES:
            raise ValueError(f"--selector: got {name!r}, needs one of {', '.join(selectors.NAMES)}")
        counted = ("random", "cosine", "perplexity-asc", "perplexity-desc", "policy", "attention")
        if name in counted and self.expand is None:
            raise ValueError(f"--expand: not given, but --selector {name} needs a fraction or a number of chunks")
        if name == "threshold" and self.threshold is None:
            raise ValueError("--threshold: not given, but --selector threshold needs a cosine from -1 to 1")
        policy = self._policy(processor.k) if name == "policy" else None
        if name in ("cosine", "threshold", "policy"):
            self._embedder = TextEmbedder(self.model(), processor.encoder_tokenizer)
        return selectors.by_name(
            name,
            model=self.model() if name == "attention" or name.startswith("perplexity") else None,
            embed=self._embedder,
            threshold=self.threshold,
            policy=policy,
            seed=self.seed,
        )

    def _policy(self, k: int) -> ExpansionPolicy:
        """Return the policy that the options name, or the policy of the model."""
        if self.policy is None and self._stage_policy is not None:
            return self._stage_policy
        from refrag import weights
        from refrag.adapters import load_policy
        from refrag.model.policy import ExpansionPolicy

        adapter = weights.adapter_file(k) if self.model_folder is None else None
        if self.policy is None and adapter is not None:
            return load_policy(adapter)
        if self.policy is None or not (self.policy / "config.json").is_file():
            raise ValueError(f"--policy: got {self.policy}, needs the folder of a saved ExpansionPolicy")
        return ExpansionPolicy.from_pretrained(self.policy).eval()


def slot_rule(slots: str | None, rows: int, rule: str, whole: int) -> SlotRule | None:
    """Convert ``--slots`` and its options to a rule; None for embedding slots, or those of the model.

    Raises
    ------
    ValueError
        If one of them is invalid, or given without ``--slots kv``.
    """
    if slots not in (None, "embedding", "kv"):
        raise ValueError(f"--slots: got {slots!r}, needs embedding or kv")
    if slots != "kv":
        for name, got, default in (("rows", rows, 1), ("rule", rule, "received"), ("whole", whole, 0)):
            if got != default:
                raise ValueError(f"--slot-{name}: got {got}, needs --slots kv, too")
        return None
    from refrag.model.passage_rows import SlotRule

    try:
        return SlotRule(rows, rule, whole)
    except ValueError as error:
        raise ValueError(f"--slot-{error}") from None


def amount(text: str | None) -> dict[str, Any]:
    """Convert ``--expand`` to arguments of the processor.

    Raises
    ------
    ValueError
        If it is neither a fraction nor a whole number.

    Examples
    --------
    >>> amount("0.25"), amount("25%"), amount("4"), amount(None)
    ({'expand': 0.25}, {'expand': 0.25}, {'expand_count': 4}, {})
    """
    if text is None:
        return {}
    wanted = text.strip()
    try:
        if wanted.isdecimal():
            return {"expand_count": int(wanted)}
        share = float(wanted[:-1]) / 100 if wanted.endswith("%") else float(wanted)
        if not 0 <= share <= 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--expand: got {text!r}, needs a fraction such as 0.25 or 25%, or a whole number of chunks"
        ) from None
    return {"expand": share}
