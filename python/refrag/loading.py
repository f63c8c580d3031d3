"""Load a model and its processor from a folder, or from the demo's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from refrag import weights
from refrag.adapters import adapter_path, load_adapter, read_adapter
from refrag.model.config import RefragConfig
from refrag.model.modeling import RefragForCausalLM
from refrag.model.passage_rows import SlotRule
from refrag.model.policy import ExpansionPolicy
from refrag.processing.processor import RefragProcessor

DEFAULT_K = 8  # the bundled adapter was trained for it


def load_model(folder: Path | None, k: int | None = None) -> RefragForCausalLM:
    """Load a model that ``save_pretrained`` wrote, or, without a folder, the demo's model.

    The demo's model is SmolLM2-135M with the adapter trained for this k. If there is no such adapter, it is
    SmolLM2-135M and MiniLM, joined by an untrained projector.

    Parameters
    ----------
    folder : Path, optional
    k : int, optional
        Tokens per chunk; by default those of the folder's model, or 8.

    Raises
    ------
    ValueError
        If the folder contains no model, or one made for another k.
    """
    with weights.quiet_transformers(), torch.random.fork_rng(devices=[]):
        if folder is not None:
            _require(folder, "config.json")
            _check_k(k, RefragConfig.from_pretrained(folder).chunk_size)
            return RefragForCausalLM.from_pretrained(folder).eval()
        own = DEFAULT_K if k is None else k
        decoder = AutoModelForCausalLM.from_pretrained(weights.decoder_folder(), local_files_only=True)
        if trained := weights.adapter_file(own):
            return load_adapter(trained, decoder)[0].eval()
        torch.manual_seed(0)  # the projector's weights
        encoder = AutoModel.from_pretrained(weights.encoder_folder(), local_files_only=True)
        return RefragForCausalLM.from_parts(encoder, decoder, own, preset="lclm").eval()


def load_processor(folder: Path | None, k: int | None = None, chunker: str = "fixed") -> RefragProcessor:
    """Load the processor of the model that ``load_model`` returns, without the model's weights.

    Parameters
    ----------
    folder : Path, optional
        Folder that ``RefragForCausalLM.save_pretrained`` and ``RefragProcessor.save_pretrained`` wrote.
    k : int, optional
    chunker : {"fixed", "sentence"}

    Raises
    ------
    ValueError
        If the folder contains no processor, or one made for another k.
    """
    if folder is not None:
        _require(folder, "refrag_processor.json")
        processor = RefragProcessor.from_pretrained(folder)
        _check_k(k, processor.k)
        if chunker == processor.chunker_name:
            return processor
        return RefragProcessor(
            processor.tokenizer, processor.encoder_tokenizer, processor.k, window=processor.window, chunker=chunker,
            position_ids=processor.position_ids, encoder_special_tokens=processor.encoder_special_tokens,
            latents=processor.latents, encoder_window=processor.encoder_window, start_token=processor.start_token,
            kv_slots=processor.kv_slots,
        )  # fmt: skip
    own = DEFAULT_K if k is None else k
    trained = weights.adapter_file(own)
    # The trained adapter's encoder uses the decoder's tokenizer.
    decoder = weights.decoder_folder()
    encoder = decoder if trained else weights.encoder_folder()
    parts = [AutoConfig.from_pretrained(path, local_files_only=True) for path in (decoder, encoder)]
    fields = {"chunk_size": own} if trained is None else read_adapter(trained)[0]["fields"]
    config = RefragConfig.from_preset("lclm" if trained is None else "tokens", *parts, **fields)
    tokenizers = [AutoTokenizer.from_pretrained(path, local_files_only=True) for path in (decoder, encoder)]
    return RefragProcessor.from_config(config, *tokenizers, chunker=chunker)


def load_kv_model(folder: Path | None, k: int | None, rule: SlotRule) -> RefragForCausalLM:
    """Load a model for key/value slots: that of ``load_model``, or without a folder SmolLM2-135M as it comes.

    Parameters
    ----------
    folder : Path, optional
    k : int, optional
        Tokens per chunk; by default those of the folder's model, or 8.
    rule : SlotRule

    Raises
    ------
    ValueError
        As ``load_model``; or if the rule keeps more rows than a chunk has.
    """
    if folder is not None:
        model = load_model(folder, k)
    else:
        with weights.quiet_transformers(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the projector's weights, which key/value slots don't use
            encoder = AutoModel.from_pretrained(weights.encoder_folder(), local_files_only=True)
            decoder = AutoModelForCausalLM.from_pretrained(weights.decoder_folder(), local_files_only=True)
            model = RefragForCausalLM.from_parts(encoder, decoder, k or DEFAULT_K, preset="kv").eval()
    model.config.use_kv_slots(rule)
    return model


def load_kv_processor(folder: Path | None, k: int | None, rule: SlotRule, chunker: str = "fixed") -> RefragProcessor:
    """Load the processor of the model that ``load_kv_model`` returns, without the model's weights.

    Raises
    ------
    ValueError
        As ``load_processor``; or if the rule keeps more rows than a chunk has.
    """
    if folder is not None:
        return with_kv_slots(load_processor(folder, k, chunker), rule)
    parts = [AutoConfig.from_pretrained(path, local_files_only=True) for path in _demo_folders()]
    config = RefragConfig.from_preset("kv", *parts, chunk_size=k or DEFAULT_K)
    config.use_kv_slots(rule)
    tokenizers = [AutoTokenizer.from_pretrained(path, local_files_only=True) for path in _demo_folders()]
    return RefragProcessor.from_config(config, *tokenizers, chunker=chunker)


def with_kv_slots(processor: RefragProcessor, rule: SlotRule) -> RefragProcessor:
    """Return the processor of a model for the same model with key/value slots.

    Raises
    ------
    ValueError
        If the rule keeps more rows than a chunk has.
    """
    return RefragProcessor(
        processor.tokenizer, processor.encoder_tokenizer, processor.k, window=processor.window,
        chunker=processor.chunker_name or processor.chunker,
        position_ids="original" if processor.position_ids == "contiguous" else processor.position_ids,
        encoder_special_tokens=processor.encoder_special_tokens, latents=processor.latents,
        encoder_window=processor.encoder_window, start_token=processor.start_token, kv_slots=rule,
    )  # fmt: skip


def _demo_folders() -> tuple[Path, Path]:
    return weights.decoder_folder(), weights.encoder_folder()


def is_adapter(folder: Path | None) -> bool:
    """Return whether this is an adapter: a folder from ``refrag train``, its file, or the name of a bundled one."""
    return folder is not None and adapter_path(folder) is not None


def load_trained(
    folder: Path,
    k: int | None = None,
    chunker: str = "fixed",
    *,
    encoder: str | None = None,
    decoder: str | None = None,
) -> tuple[RefragForCausalLM, RefragProcessor, ExpansionPolicy | None]:
    """Load the model that a training stage wrote, its processor, and its policy if it has one.

    Parameters
    ----------
    folder : Path
    k : int, optional
    chunker : {"fixed", "sentence"}
    encoder, decoder : str, optional
        Folders or names of the models it was trained on; by default those that ``trained_sources`` finds.

    Raises
    ------
    ValueError
        If the adapter was trained on other models, or for another k.
    """
    from refrag.bundle import ModelBundle

    _check_k(k, read_adapter(folder)[0]["fields"]["chunk_size"])
    encoder, decoder = trained_sources(folder, encoder, decoder)
    with weights.quiet_transformers():
        parts, policy = ModelBundle.load_trained(folder, decoder, encoder=encoder)
    tokenizers = (parts.tokenizer, parts.encoder_tokenizer)
    processor = RefragProcessor.from_config(parts.model.config, *tokenizers, chunker=chunker)
    return parts.model.eval(), processor, policy


def trained_sources(adapter: Path, encoder: str | None = None, decoder: str | None = None) -> tuple[str | None, str]:
    """Return the encoder and decoder to load for an adapter: the given ones, or else those that it was trained on.

    The demo's model replaces a folder that no longer exists; loading checks whether it fits.

    Parameters
    ----------
    adapter : Path
    encoder, decoder : str, optional

    Returns
    -------
    encoder : str or None
        None for an encoder built from the decoder's token embeddings.
    decoder : str

    Raises
    ------
    AdapterError
        If the file is not an adapter.
    """
    about = read_adapter(adapter)[0]
    # Adapters from before the sources were recorded were trained on the demo's models.
    sources = about.get("sources", {"encoder": "" if about["fields"]["pooling"] == "concat" else None, "decoder": None})
    if encoder is None and sources["encoder"] != "":
        encoder = _present(sources["encoder"]) or str(weights.encoder_folder())
    return encoder, decoder or _present(sources["decoder"]) or str(weights.decoder_folder())


def _present(source: str | None) -> str | None:
    """Return a source, or None if it is a folder that doesn't exist."""
    return source if source and (not Path(source).is_absolute() or Path(source).is_dir()) else None


def _require(folder: Path, file: str) -> None:
    if not (folder / file).is_file():
        raise ValueError(
            f"--model: {folder} has no {file}, needs a folder that RefragForCausalLM.save_pretrained and "
            "RefragProcessor.save_pretrained wrote, a training stage's folder, or 'distilled'"
        )


def _check_k(asked: int | None, made_for: int) -> None:
    if asked not in (None, made_for):
        raise ValueError(f"--k: got {asked}, needs {made_for}, which the model was made for")
