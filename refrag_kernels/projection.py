"""project_chunks and embed_mixed: project chunk embeddings, and write them into the mixed sequence."""

from __future__ import annotations

import dataclasses

import torch

from refrag_kernels import pytree, values
from refrag_kernels.registration import register_op
from refrag_kernels.selection import available, effective_backend
from refrag_kernels.support import REFERENCE, Support
from refrag_kernels.validation import (
    FLOAT_DTYPES,
    autocast_is_on,
    check_dtype,
    check_last_contiguous,
    check_number,
    check_same_device,
    check_same_dtype,
    check_shape,
    remembered,
)

_FAMILY = "projection"
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "tanh", "none")


@dataclasses.dataclass(frozen=True, eq=False)
class PackedProjection:
    """The weights of a projection, packed once into the layout of the CPU kernels, for inference.

    ``project_chunks`` and ``embed_mixed`` accept it in place of the four tensors. It keeps the original tensors,
    detached, for other backends. Later changes of the weights don't change the packed copy.

    Attributes
    ----------
    w1, b1, w2, b2 : Tensor or None
        The weights, detached.
    activation : str
        The activation between the two layers.
    packed : Tensor or None
        The weights in the CPU kernels' opaque layout; None if those can't run.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, strides, devices or the activation are wrong.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> up, down = torch.nn.Linear(8, 16), torch.nn.Linear(16, 16)
    >>> packed = rk.PackedProjection.from_weights(up.weight, up.bias, down.weight, down.bias)
    >>> rk.project_chunks(torch.randn(3, 8), packed).shape
    torch.Size([3, 16])
    """

    w1: torch.Tensor
    b1: torch.Tensor | None
    w2: torch.Tensor
    b2: torch.Tensor | None
    activation: str
    packed: torch.Tensor | None = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Check, detach and pack the weights."""
        _check_weights(self.w1, self.b1, self.w2, self.b2, self.activation)
        for name in ("w1", "b1", "w2", "b2"):
            weight = getattr(self, name)
            object.__setattr__(self, name, None if weight is None else weight.detach())
        packs = "cpu" in available("project_chunks", self.w1.device)
        packs = packs and self.w1.dtype == self.w2.dtype != torch.float64
        packed = torch.ops.refrag_cpu.pack_projection(self.w1, self.w2) if packs else None
        object.__setattr__(self, "packed", packed)

    @staticmethod
    def from_weights(
        w1: torch.Tensor,
        b1: torch.Tensor | None,
        w2: torch.Tensor,
        b2: torch.Tensor | None,
        activation: str = "gelu",
    ) -> PackedProjection:
        """Pack the weights of a projection; the arguments are those of ``project_chunks``."""
        return PackedProjection(w1, b1, w2, b2, activation)


pytree.register(PackedProjection, constants=("activation",))


def _check_weights(
    w1: torch.Tensor, b1: torch.Tensor | None, w2: torch.Tensor, b2: torch.Tensor | None, activation: str
) -> None:
    check_dtype("w1", w1, *FLOAT_DTYPES)
    check_shape("w1", w1, "h", "d_enc")
    check_shape("w2", w2, "d_dec", w1.shape[0])
    present = {"w1": w1, "w2": w2}
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None:
            check_shape(name, bias, weight.shape[0])
            present[name] = bias
    check_same_dtype(**present)
    check_same_device(**present)
    check_last_contiguous(**present)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, needs one of {', '.join(ACTIVATIONS)}")


def _check_chunks(chunks: torch.Tensor, w1: torch.Tensor) -> None:
    check_dtype("chunks", chunks, *FLOAT_DTYPES)
    check_shape("chunks", chunks, "N", w1.shape[1])
    check_same_dtype(w1=w1, chunks=chunks)
    check_same_device(w1=w1, chunks=chunks)
    check_last_contiguous(chunks=chunks)


@remembered
def _check_project(chunks, w1, b1, w2, b2, activation):
    _check_weights(w1, b1, w2, b2, activation)
    _check_chunks(chunks, w1)


@remembered
def _check_embed(token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation):
    _check_project(chunks, w1, b1, w2, b2, activation)
    check_dtype("token_ids", token_ids, torch.int64)
    check_shape("token_ids", token_ids, "T")
    check_dtype("slot_of_row", slot_of_row, torch.int32)
    check_shape("slot_of_row", slot_of_row, token_ids.shape[0])
    check_dtype("token_table", token_table, *FLOAT_DTYPES)
    check_shape("token_table", token_table, "V", w2.shape[0])
    check_same_dtype(w1=w1, token_table=token_table)
    check_same_device(w1=w1, token_ids=token_ids, token_table=token_table, slot_of_row=slot_of_row)
    check_last_contiguous(token_ids=token_ids, token_table=token_table, slot_of_row=slot_of_row)


def _empty_like_weights(*tensors):
    """Return uninitialized gradients; that of an absent tensor has no elements."""
    dtype_of = tensors[0]
    return tuple(dtype_of.new_empty(0) if t is None else dtype_of.new_empty(t.shape) for t in tensors)


def _fake_project(chunks, w1, b1, w2, b2, activation, packed, *, backend=None):
    _check_project(chunks, w1, b1, w2, b2, activation)
    return chunks.new_empty(chunks.shape[0], w2.shape[0])


def _fake_project_backward(grad, chunks, w1, b1, w2, b2, activation, *, backend=None):
    return _empty_like_weights(chunks, w1, b1, w2, b2)


def _setup_project(ctx, inputs, keyword_only_inputs, output):
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = effective_backend(keyword_only_inputs["backend"])


def _present(gradients, tensors):
    return (None if tensor is None else gradient for gradient, tensor in zip(gradients, tensors))


def _backward_project(ctx, grad):
    tensors = ctx.saved_tensors
    op = torch.ops.refrag.project_chunks_backward
    gradients = op(grad.contiguous(), *tensors, ctx.activation, backend=ctx.backend)
    return *_present(gradients, tensors), None, None


def _fake_embed(
    token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation, token_scale, packed, *, backend=None
):
    _check_embed(token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation)
    return token_table.new_empty(token_ids.shape[0], token_table.shape[1])


def _fake_embed_backward(
    grad, token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation, token_scale, *, backend=None
):
    return _empty_like_weights(token_table, chunks, w1, b1, w2, b2)


def _setup_embed(ctx, inputs, keyword_only_inputs, output):
    *tensors, ctx.activation, ctx.token_scale, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = effective_backend(keyword_only_inputs["backend"])


def _backward_embed(ctx, grad):
    tensors = ctx.saved_tensors
    op = torch.ops.refrag.embed_mixed_backward
    gradients = op(grad.contiguous(), *tensors, ctx.activation, ctx.token_scale, backend=ctx.backend)
    _, table, chunks, _, *weights = tensors
    dtable, dchunks, *dweights = _present(gradients, (table, chunks, *weights))
    return None, dtable, dchunks, None, *dweights, None, None, None


_FORWARD = [Support("cuda", exact_matmul=True), Support("triton")]
# Five large matrix products, for which torch's own are as fast as any.
_BACKWARD = [
    Support("cuda", missing="has no gradients of a projection"),
    Support("triton"),
    Support("cpu", FLOAT_DTYPES, fallback="reference"),
    REFERENCE,
]
_WEIGHTS = "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation"
_ROWS = "Tensor token_ids, Tensor token_table, Tensor chunks, Tensor slot_of_row"
_project_chunks = register_op(
    f"project_chunks(Tensor chunks, {_WEIGHTS}, Tensor? packed, *, str? backend=None) -> Tensor",
    family=_FAMILY,
    support=[*_FORWARD, Support("cpu", binds=True), REFERENCE],
    fake=_fake_project,
    setup_context=_setup_project,
    backward=_backward_project,
    autocast=("chunks", "w1", "b1", "w2", "b2"),
)
register_op(
    f"project_chunks_backward(Tensor grad, Tensor chunks, {_WEIGHTS}, *, str? backend=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    family=_FAMILY,
    support=_BACKWARD,
    fake=_fake_project_backward,
)
_embed_mixed = register_op(
    f"embed_mixed({_ROWS}, {_WEIGHTS}, float token_scale, Tensor? packed, *, str? backend=None) -> Tensor",
    family=_FAMILY,
    support=[*_FORWARD, Support("cpu"), REFERENCE],
    fake=_fake_embed,
    values=values.check_embed_mixed,
    dtype_of="token_table",
    setup_context=_setup_embed,
    backward=_backward_embed,
    autocast=("token_table", "chunks", "w1", "b1", "w2", "b2"),
)
register_op(
    f"embed_mixed_backward(Tensor grad, {_ROWS}, {_WEIGHTS}, float token_scale, *, str? backend=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    family=_FAMILY,
    support=_BACKWARD,
    fake=_fake_embed_backward,
)


def _weights(w1, b1, w2, b2, activation):
    """Return w1, b1, w2, b2, activation and packed from the arguments of a public function."""
    if isinstance(w1, PackedProjection):
        if b1 is not None or w2 is not None or b2 is not None:
            raise TypeError("w1: got a PackedProjection beside other weights, needs it alone: it holds all four")
        # Autocast casts the weights, not the packed copy.
        packed = None if autocast_is_on(w1.w1.device) else w1.packed
        return w1.w1, w1.b1, w1.w2, w1.b2, w1.activation, packed
    if w2 is None:
        raise TypeError("w2: got None, needs a Tensor [d_dec, h]")
    return w1, b1, w2, b2, activation, None


def project_chunks(
    chunks: torch.Tensor,
    w1: torch.Tensor | PackedProjection,
    b1: torch.Tensor | None = None,
    w2: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    backend: str | None = None,
) -> torch.Tensor:
    """Project chunk embeddings into the decoder's embedding space: REFRAG's two-layer phi (section 2).

    ``phi(c) = w2 act(w1 c + b1) + b2``

    Parameters
    ----------
    chunks : Tensor [N, d_enc]
        Chunk embeddings: float32, bfloat16 or float16 (the reference also float64). The last dimension must be
        contiguous, here and in the weights.
    w1 : Tensor [h, d_enc], or PackedProjection
        First layer, in the order of torch.nn.Linear. A PackedProjection replaces all weights and the activation.
    b1 : Tensor [h], optional
    w2 : Tensor [d_dec, h]
        Second layer.
    b2 : Tensor [d_dec], optional
    activation : {"gelu", "gelu_tanh", "silu", "relu", "tanh", "none"}
    backend : str, optional
        Backends that may run this call, in order; default the fastest that supports it.

    Returns
    -------
    Tensor [N, d_dec]
        In the dtype of ``chunks``. Differentiable in chunks and weights, once.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, strides, devices or the activation are wrong.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> w1, w2 = torch.randn(32, 16), torch.randn(32, 32)
    >>> rk.project_chunks(torch.randn(5, 16), w1, None, w2, torch.zeros(32), activation="silu").shape
    torch.Size([5, 32])
    """
    w1, b1, w2, b2, activation, packed = _weights(w1, b1, w2, b2, activation)
    _check_project(chunks, w1, b1, w2, b2, activation)
    return _project_chunks(chunks, w1, b1, w2, b2, activation, packed, backend=backend)


def embed_mixed(
    token_ids: torch.Tensor,
    token_table: torch.Tensor,
    chunks: torch.Tensor,
    slot_of_row: torch.Tensor,
    w1: torch.Tensor | PackedProjection,
    b1: torch.Tensor | None = None,
    w2: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    token_scale: float = 1.0,
    backend: str | None = None,
) -> torch.Tensor:
    """Build the decoder's input: token embeddings in text rows, projected chunks in slots (REFRAG, section 2).

    Row t is ``token_table[token_ids[t]] * token_scale`` where ``slot_of_row[t]`` is -1, and else the projection of
    ``chunks[slot_of_row[t]]``, which is written there without an intermediate [N, d_dec] tensor.

    Parameters
    ----------
    token_ids : Tensor [T], int64
        Token of each text row; ignored, not checked, in slots.
    token_table : Tensor [V, d_dec]
        The decoder's token embeddings, in the dtype of the weights.
    chunks : Tensor [N, d_enc]
        Chunk embeddings. A chunk may be in any number of slots, or none.
    slot_of_row : Tensor [T], int32
        -1 for text, else a row of ``chunks``.
    w1, b1, w2, b2, activation
        The projection, as in ``project_chunks``; ``w1`` may be a PackedProjection.
    token_scale : float
        Factor of the text rows: Gemma's decoders scale their token embeddings.
    backend : str, optional
        Backends that may run this call, in order; default the fastest that supports it.

    Returns
    -------
    Tensor [T, d_dec]
        Differentiable in token_table, chunks and weights, once.

    Raises
    ------
    TypeError, ValueError
        If dtypes, shapes, strides, devices or the activation are wrong.
    IndexError
        On the CPU, if a slot is not a row of ``chunks`` or the token of a text row is not in the table.

    Examples
    --------
    >>> import torch, refrag_kernels as rk
    >>> table, chunks = torch.randn(100, 32), torch.randn(2, 16)
    >>> ids, slots = torch.tensor([5, 0, 0, 7]), torch.tensor([-1, 0, 1, -1], dtype=torch.int32)
    >>> w1, w2 = torch.randn(32, 16), torch.randn(32, 32)
    >>> rows = rk.embed_mixed(ids, table, chunks, slots, w1, None, w2, None)
    >>> bool((rows[0] == table[5]).all()), rows.shape
    (True, torch.Size([4, 32]))
    """
    w1, b1, w2, b2, activation, packed = _weights(w1, b1, w2, b2, activation)
    _check_embed(token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation)
    check_number("token_scale", token_scale)
    return _embed_mixed(
        token_ids, token_table, chunks, slot_of_row, w1, b1, w2, b2, activation, token_scale, packed, backend=backend
    )
