"""Tokenizer mode "refrag": the decoder's tokenizer of a saved RefragProcessor, which knows the mark of a passage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer
from vllm.tokenizers.hf import get_cached_tokenizer

from refrag.integrations.vllm.passages import MARK


class RefragTokenizer:
    """What vLLM's tokenizer registry loads."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load the tokenizer that ``RefragProcessor.save_pretrained`` wrote into ``folder``.

        The mark is a token of its own, behind the decoder's vocabulary: passages are put in its place before the
        decoder sees a prompt.

        Raises
        ------
        ValueError
            If there is none.
        """
        own = Path(folder) / "decoder_tokenizer"
        if not own.is_dir():
            raise ValueError(
                f"tokenizer: got {str(folder)!r}, needs a folder into which RefragProcessor.save_pretrained wrote"
            )
        tokenizer = AutoTokenizer.from_pretrained(own, *args, **kwargs)
        tokenizer.add_tokens([AddedToken(MARK, special=True, normalized=False)], special_tokens=True)
        return get_cached_tokenizer(tokenizer)
