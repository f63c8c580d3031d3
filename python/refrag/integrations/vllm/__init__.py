"""The vLLM plugin: a RefragForCausalLM served by vLLM, with passages as a modality of their own.

vLLM finds ``register`` by the entry point ``vllm.general_plugins`` in every process that it starts.

Modules that need no vLLM: ``passages`` checks what a request gives, ``reading`` settles which chunks stand as text,
``messages`` takes passages out of chat messages, ``folder_encoder`` embeds texts for selectors. Those that vLLM calls:
``processing`` makes its inputs, ``model`` computes the embeddings in its worker, ``tokenizer`` and ``renderer`` read
the saved folder and chat messages.

Written for vLLM 0.32; it uses vLLM's registries and replaces nothing of it.
"""

from __future__ import annotations

MODE = "refrag"  # of the tokenizer and the renderer: `vllm serve ... --tokenizer-mode refrag`


def register() -> None:
    """Tell vLLM of the model, its tokenizer and its renderer; may be called any number of times."""
    from vllm import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import refrag.model.config  # noqa: F401  transformers then knows the model type

    if MODE in TokenizerRegistry.tokenizers:
        return
    ModelRegistry.register_model("RefragForCausalLM", f"{__name__}.model:RefragForVllm")
    TokenizerRegistry.register(MODE, f"{__name__}.tokenizer", "RefragTokenizer")
    RENDERER_REGISTRY.register(MODE, f"{__name__}.renderer", "RefragRenderer")
