"""Tokenizer mode "refrag": the decoder's tokenizer of a saved RefragProcessor, with a token that marks passages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer
from vllm.tokenizers.hf import get_cached_tokenizer

from refrag.integrations.vllm.passages import MARK


class RefragTokenizer:
    """Loader of the tokenizer for vLLM's tokenizer registry."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load the tokenizer that ``RefragProcessor.save_pretrained`` wrote into ``folder``.

        Adds the mark as a token after the decoder's vocabulary; passages replace it before the decoder reads a prompt.

        Raises
        ------
        ValueError
            If the folder has no such tokenizer.
        """
        own = Path(folder) / "decoder_tokenizer"
        if not own.is_dir():
            raise ValueError(
                f"tokenizer: got {str(folder)!r}, needs a folder that RefragProcessor.save_pretrained wrote"
            )
        tokenizer = AutoTokenizer.from_pretrained(own, *args, **kwargs)
        tokenizer.add_tokens([AddedToken(MARK, special=True, normalized=False)], special_tokens=True)
        return get_cached_tokenizer(tokenizer)
