"""The vLLM plugin, which lets vLLM serve a RefragForCausalLM and accept passages as a modality.

vLLM finds ``register`` through the entry point ``vllm.general_plugins`` in every process that it starts.

Modules that work without vLLM: ``passages`` validates the passages of a request, ``reading`` decides which chunks to
expand to text, ``messages`` extracts passages from chat messages, and ``folder_encoder`` embeds texts for selectors.
Modules that vLLM calls: ``processing`` makes its inputs, ``model`` computes the embeddings in its worker, and
``tokenizer`` and ``renderer`` read the saved folder and chat messages.

Written for vLLM 0.32; it uses vLLM's registries and patches nothing.
"""

from __future__ import annotations

MODE = "refrag"  # mode of the tokenizer and the renderer: `vllm serve ... --tokenizer-mode refrag`


def register() -> None:
    """Register the model, its tokenizer and its renderer with vLLM. It may be called several times."""
    from vllm import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import refrag.model.config  # noqa: F401  registers the model type with transformers

    if MODE in TokenizerRegistry.tokenizers:
        return
    ModelRegistry.register_model("RefragForCausalLM", f"{__name__}.model:RefragForVllm")
    TokenizerRegistry.register(MODE, f"{__name__}.tokenizer", "RefragTokenizer")
    RENDERER_REGISTRY.register(MODE, f"{__name__}.renderer", "RefragRenderer")
