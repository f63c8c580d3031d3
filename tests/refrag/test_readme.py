"""The code in the README runs."""

import re
from pathlib import Path

import pytest
from refrag import weights

TEXT = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_there_is_one_block_for_the_ops_and_one_for_the_model():
    assert ["refrag_kernels" in block for block in BLOCKS] == [True, False]


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_block(block):
    # The same models from the demo's cache, since tests have no network.
    code = BLOCKS[block].replace('"sentence-transformers/all-MiniLM-L6-v2"', repr(str(weights.encoder_folder())))
    code = code.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(str(weights.decoder_folder())))
    names = {}
    exec(code, names)
    if "tokens" in names:
        assert names["tokens"].shape[0] == 1 and 1 <= names["tokens"].shape[1] <= 40
    else:
        assert names["out"].shape == (names["rows"], 9, 64)
