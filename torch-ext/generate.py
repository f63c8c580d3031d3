"""Write the Hub kernel's Python, ``refrag_ops/__init__.py``, from the ops of refrag_kernels.

Run as ``PYTHONPATH=. python torch-ext/generate.py``; tests/packaging/test_hub_kernel.py finds it out of date.

Signatures, docstrings and constants are those of the library; how an op calls its kernel is here. A parameter that the
library gains or renames stops the script.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import refrag_kernels as rk
from refrag_kernels.cuda_kernels.projection import MAX_SMALL_M
from refrag_kernels.pooling import MODES
from refrag_kernels.projection import ACTIVATIONS
from refrag_kernels.support import OPS

OUTPUT = Path(__file__).parent / "refrag_ops" / "__init__.py"
_LEFT_OUT = {"backend"}  # there is one
_REQUIRED = {"w1", "b1", "w2", "b2"}  # beside a PackedProjection the library has defaults for them
_TYPES = {
    "w1": "torch.Tensor",
    "w2": "torch.Tensor",
    "visible": "tuple[torch.Tensor, torch.Tensor] | None",
}
_BODIES = {
    "paged_attention": """
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: got {softcap}, needs a positive number or None")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"window: got {window}, needs at least 1")
    left = -1 if window is None else window - 1 if isinstance(window, int) else window[0]
    indptr, ranges = (None, None) if visible is None else visible
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = ops.paged_attention(
        q, k_pages, v_pages, page_table, kv_lengths, q_offsets, indptr, ranges, scale, softcap or 0.0, left, 0, sinks
    )
    return (out, lse) if return_lse else out
""",
    "append_kv": """
    ops.append_kv(k, v, k_pages, v_pages, page_table, kv_lengths, q_offsets)
""",
    "merge_states": """
    return ops.merge_states(out_a.contiguous(), lse_a.contiguous(), out_b.contiguous(), lse_b.contiguous())
""",
    "pool_chunks": """
    if mode not in _MODES:
        raise ValueError(f"mode: got {mode!r}, needs one of {', '.join(_MODES)}")
    return ops.pool_chunks(hidden, chunk_offsets, mode)
""",
    "project_chunks": """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, needs one of {', '.join(_ACTIVATIONS)}")
    half = chunks.dtype in (torch.float16, torch.bfloat16)
    if half and chunks.shape[0] <= _MAX_SMALL_M and w1.shape[0] % 8 == 0 and w1.shape[1] % 8 == 0:
        return ops.project_chunks(chunks, w1, b1, w2, b2, activation, None)
    return F.linear(_ACTIVATIONS[activation](F.linear(chunks, w1, b1)), w2, b2)
""",
    "embed_mixed": """
    projected = project_chunks(chunks, w1, b1, w2, b2, activation=activation)
    return ops.assemble_mixed(token_ids, token_table, projected, slot_of_row, token_scale)
""",
}
_FUNCTIONS = {
    "gelu": "F.gelu",
    "gelu_tanh": 'lambda x: F.gelu(x, approximate="tanh")',
    "silu": "F.silu",
    "relu": "F.relu",
    "tanh": "torch.tanh",
    "none": "lambda x: x",
}
_HEAD = '''\
"""CUDA kernels for compressed retrieval-augmented decoding (REFRAG): paged attention, pooling, projection, assembly.

The ops of the library ``refrag_kernels`` that need neither a plan nor a gradient, for inference. Each kernel checks its
indices and drops what leaves a tensor. Written by torch-ext/generate.py: change that, or refrag_kernels.
"""

from __future__ import annotations  # the Hub takes Python 3.9

import torch
import torch.nn.functional as F

from ._ops import add_op_namespace_prefix, ops
'''
_FAKES = """
@torch.library.register_fake(add_op_namespace_prefix("paged_attention"))
def _(q, *_):
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake(add_op_namespace_prefix("append_kv"))
def _(*_):
    return None


@torch.library.register_fake(add_op_namespace_prefix("merge_states"))
def _(out_a, lse_a, out_b, lse_b):
    return torch.empty_like(out_a), torch.empty_like(lse_a)


@torch.library.register_fake(add_op_namespace_prefix("pool_chunks"))
def _(hidden, chunk_offsets, mode):
    return hidden.new_empty(chunk_offsets.shape[0] - 1, hidden.shape[1])


@torch.library.register_fake(add_op_namespace_prefix("project_chunks"))
def _(chunks, w1, b1, w2, b2, activation, packed):
    return chunks.new_empty(chunks.shape[0], w2.shape[0])


@torch.library.register_fake(add_op_namespace_prefix("assemble_mixed"))
def _(token_ids, token_table, projected, slot_of_row, token_scale):
    return token_table.new_empty(token_ids.shape[0], token_table.shape[1])
"""


def _takes(name: str) -> str:
    """Return which dtypes and head dimensions an op's kernel takes, as a sentence."""
    support = OPS[name].implementations["cuda"].support
    dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in support.dtypes)
    return f"{dtypes}; D is {' or '.join(map(str, support.head_dims))}."


def _docstring(function) -> str:
    """Return the parts of a docstring that hold for the Hub's op: the meaning, the parameters and what is returned."""
    text = re.sub(r"\s*\n\n(Raises|Notes|Examples)\n-+\n.*", "\n", inspect.getdoc(function), flags=re.DOTALL)
    text = re.sub(r"\nbackend : .*\n(?:    .*\n)*", "\n", text)
    if function is rk.paged_attention:
        text = re.sub(r"float32, bfloat16 or float16.*?at most \d+\.", _takes("paged_attention"), text, flags=re.DOTALL)
    # Sentences on what the Hub's ops lack, within their paragraph.
    text = re.sub(r"(?:(?<=\. )|(?<=    ))(?:A PackedProjection|Differentiable)[^.]*\.(?: |(?=\n)|$)", "", text)
    text = re.sub(r", or PackedProjection|; ``w1`` may be a PackedProjection| \(the reference[^)]*\)", "", text)
    lines = [line.rstrip() for line in text.splitlines()]
    return re.sub(r"\n\n(?=    )", "\n", "\n".join(lines)).strip()


def _op(name: str) -> str:
    """Return the source of one op."""
    function, parameters, starred = getattr(rk, name), [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in _LEFT_OUT:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parameters, starred = [*parameters, "*"], True
        has_default = parameter.default is not parameter.empty and parameter.name not in _REQUIRED
        default = f" = {_literal(parameter.default)}" if has_default else ""
        parameters.append(f"{parameter.name}: {_TYPES.get(parameter.name, parameter.annotation)}{default}")
    body = _BODIES[name]
    used = {node.id for node in ast.walk(ast.parse(inspect.cleandoc(body))) if isinstance(node, ast.Name)}
    unused = {parameter.partition(":")[0] for parameter in parameters} - used - {"*"}
    if unused:
        raise SystemExit(f"{name}: the body in torch-ext/generate.py does not use {', '.join(sorted(unused))}")
    listed = "".join(f"    {parameter},\n" for parameter in parameters)
    doc = "\n".join(f"    {line}".rstrip() for line in _docstring(function).splitlines())
    returns = inspect.signature(function).return_annotation
    return f'def {name}(\n{listed}) -> {returns}:\n    """{doc.strip()}\n    """\n{body.strip(chr(10))}\n'


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def source() -> str:
    """Return the package's source."""
    activations = "".join(f'    "{name}": {_FUNCTIONS[name]},\n' for name in ACTIVATIONS)
    constants = [
        f"_ACTIVATIONS = {{\n{activations}}}",
        f"_MODES = ({', '.join(map(_literal, MODES))})",
        "# Up to so many chunks one kernel reads each weight once; torch's products are faster for more.",
        f"_MAX_SMALL_M = {MAX_SMALL_M}",
    ]
    names = ", ".join(f'"{name}"' for name in sorted(_BODIES))
    parts = [
        _HEAD,
        *constants,
        "\n",
        *(_op(name) + "\n" for name in _BODIES),
        _FAKES.lstrip("\n"),
        f"\n__all__ = [{names}]",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(source())
