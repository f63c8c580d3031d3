"""The models of distillation: a frozen decoder as the teacher, and the same decoder reading slots as the student."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from refrag.model.acceptance import FamilyError
from refrag.model.attention import NAME, no_mask
from refrag.model.modeling import RefragForCausalLM
from refrag.model.token_encoder import first_layers
from refrag.training.distill.attention import GROUPED
from refrag.training.distill.batches import Batch, Packed, Rows
from refrag.training.distill.loss import distillation_loss
from refrag.training.distill.low_rank import add_low_rank, update_names
from refrag.training.distill.options import DistillOptions

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Distillation:
    """Teacher, student, and the student's trained parameters.

    Parameters
    ----------
    decoder : PreTrainedModel
        The pretrained decoder, in float32. It becomes the student's. Its logits must be the product of its output
        layer and its last hidden states, without a scale, a softcap or a bias, and its token embeddings unscaled.
    options : DistillOptions
    device : torch.device
    dtype : torch.dtype
        Dtype of frozen weights and activations; trained parameters are float32.

    Attributes
    ----------
    model : RefragForCausalLM
        The student: all its linear layers except the projector's are ``LowRankLinear``.
    teacher : nn.Module
        The base model of the pretrained decoder.
    trained : dict of str to list of (str, Parameter)
        The named parameters of the groups "linear" (the projector), "encoder" and "decoder".

    Raises
    ------
    FamilyError
        If the decoder computes its logits in another way; states the difference.
    """

    def __init__(
        self, decoder: PreTrainedModel, options: DistillOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(options.seed)
        decoder.requires_grad_(False)
        _require_plain_logits(decoder)
        encoder = first_layers(decoder, options.encoder_layers)
        self.options, self.device, self.dtype = options, device, dtype
        self.model = RefragForCausalLM.from_parts(
            encoder, decoder, options.k, preset="tokens", pooling=options.pooling, pool_segments=options.segments,
            projector_bias=False, encoder_window=max(options.contexts),
        )  # fmt: skip
        self.model.requires_grad_(False).train()
        self.model.to(device)  # type: ignore[call-arg, arg-type]  # transformers' decorator keeps self for mypy
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)  # but not the buffers: rotary frequencies need float32
        self.teacher: Any = copy.deepcopy(decoder.base_model)
        add_low_rank(self.model.encoder, options.encoder_rank, _LINEARS)
        add_low_rank(self.model.decoder, options.decoder_rank, _LINEARS)
        part: Any
        for part in (self.teacher, self.model.encoder, self.model.decoder):
            _fuse_norms(part)
            for layer in part.base_model.layers if options.compile else ():
                layer.compile()
        self.model.projector.float()
        self._start_projector()
        self.model.projector.up.requires_grad_(True)
        self.model.encoder.norm.float().requires_grad_(True)
        self.trained: dict[str, list[tuple[str, nn.Parameter]]] = {"linear": [], "encoder": [], "decoder": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or name.endswith((".lora_A", ".lora_B")):
                part_name = name.split(".", 1)[0]
                self.trained["linear" if part_name == "projector" else part_name].append((name, parameter))
        self.rows = functools.cache(lambda shape: Rows(shape, device))

    @property
    def table(self) -> torch.Tensor:
        """The decoder's token embeddings [V, d]."""
        return self.model.get_input_embeddings().weight

    @property
    def head(self) -> torch.Tensor:
        """The decoder's output layer [V, d]."""
        return self.model.get_output_embeddings().weight  # type: ignore[return-value]

    def use_attention(self, name: str) -> None:
        """Set the attention of all layers: "refrag" for refrag_kernels', or "torch"."""
        implementation = {"refrag": NAME, "torch": GROUPED}[name]
        for part in (self.teacher, self.model.encoder, self.model.decoder):
            part.set_attn_implementation(implementation)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of a batch, and the sums that ``distillation_loss`` returns."""
        rows = self.rows(batch.shape)
        taught = self.table[:0]
        if batch.shape.continuations:
            with torch.no_grad():
                states = hidden_of(self.teacher, self.embed(batch.teacher_ids), rows.teacher)
                taught = states[batch.teacher_outputs]
        return distillation_loss(
            self.student_hidden(batch), taught, batch.targets, self.head,
            cross_entropy=self.options.cross_entropy, block=self.options.block_rows,
        )  # fmt: skip

    def student_hidden(self, batch: Batch) -> torch.Tensor:
        """Return the student's last hidden states of the rows that predict a target."""
        rows = self.rows(batch.shape)
        slots = self.slots(batch)
        text = self.embed(batch.student_ids)
        mixed = text.index_copy(0, batch.slot_rows, slots.index_select(0, batch.slot_chunks))
        return hidden_of(self.model.decoder.base_model, mixed, rows.student).index_select(0, batch.student_outputs)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look tokens up in the decoder's embedding table."""
        return nn.functional.embedding(token_ids, self.table)

    def slots(self, batch: Batch) -> torch.Tensor:
        """Encode a batch's windows of chunks; return one slot per chunk [N, d]."""
        packed = batch.encoder or self.rows(batch.shape).encoder
        embeds = self.model.encoder.get_input_embeddings()(batch.encoder_ids)
        states = hidden_of(self.model.encoder, embeds, packed)
        pooled = self._pooled(states, batch)
        projector = self.model.projector
        projected = nn.functional.linear(pooled, projector.up.weight.to(pooled.dtype))
        return nn.functional.linear(projected, projector.down.weight.to(pooled.dtype))

    def _pooled(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Pool each chunk's states by concatenation or by their mean, as ``encode_packed`` does."""
        concat = self.options.pooling == "concat"
        if batch.encoder is None:
            chunks = states.view(-1, self.options.k, states.shape[-1])
            return chunks.flatten(1) if concat else chunks.mean(1)
        starts, lengths = batch.chunk_starts[:, None], batch.chunk_lengths[:, None]
        places = torch.arange(self.options.k, device=states.device)
        if concat:  # repeat the states of a shorter chunk, so that there are k
            return states[starts + places * lengths // self.options.k].flatten(1)
        kept = (places < lengths)[..., None]
        return states[starts + places.minimum(lengths - 1)].mul(kept).sum(1) / lengths.to(states.dtype)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors by their names in its file: on the device, not copied."""
        state = {update_names(name): value.detach() for group in self.trained.values() for name, value in group}
        return {**state, "projector.down.weight": self.model.projector.down.weight.detach()}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load the tensors of an adapter's file.

        Raises
        ------
        ValueError
            If a tensor is missing, unknown or of another shape.
        """
        own = self.state()
        for name in sorted(own.keys() | tensors.keys()):
            if name.startswith("policy."):
                continue
            got, wanted = tensors.get(name), own.get(name)
            if got is None or wanted is None or got.shape != wanted.shape:
                shapes = [None if tensor is None else list(tensor.shape) for tensor in (got, wanted)]
                raise ValueError(f"adapter: got shape {shapes[0]} for {name}, needs {shapes[1]}")
            wanted.copy_(got)

    @torch.no_grad()
    def _start_projector(self) -> None:
        """Initialize the projector to average a chunk's states."""
        projector, width = self.model.projector, self.table.shape[1]
        identity = torch.eye(width, device=self.device)
        projector.up.weight.copy_(identity.repeat(1, self.options.segments) / self.options.segments)
        projector.down.weight.copy_(identity)

    @torch.no_grad()
    def fit_scale(self, batch: Batch) -> None:
        """Scale the projector so that the slots of a batch have the root mean square of token embeddings."""
        size = self.table.float().pow(2).mean().sqrt()
        self.model.projector.down.weight.mul_(size / self.slots(batch).float().pow(2).mean().sqrt())


def hidden_of(base: Any, embeds: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Run a base model over packed rows [T, d]; return its last hidden states [T, d]."""
    output = base(
        inputs_embeds=embeds[None],
        attention_mask=no_mask(embeds.device),
        position_ids=packed.positions,
        refrag_plans=packed.plans,
        use_cache=False,
    )
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


@torch.no_grad()
def _require_plain_logits(decoder: Any) -> None:
    """Refuse a decoder whose logits aren't the output layer's product with the hidden states of its embedded tokens."""
    table = decoder.get_input_embeddings().weight
    ids = torch.arange(len(table), device=table.device)[:: max(1, len(table) // 16)][None, :16]
    training = decoder.training
    decoder.eval()
    wanted = decoder(input_ids=ids, use_cache=False, return_dict=True).logits.float()
    embeds = nn.functional.embedding(ids, table)
    hidden = decoder.base_model(inputs_embeds=embeds, use_cache=False, return_dict=True).last_hidden_state
    got = (hidden @ decoder.get_output_embeddings().weight.t()).float()
    decoder.train(training)
    difference = float((got - wanted).norm() / wanted.norm())
    if not difference < 1e-3:
        raise FamilyError(
            f"decoder: got {type(decoder).__name__}, which scales or caps its logits or its token embeddings, needs "
            f"one that doesn't: relative difference of the logits {difference:.2g}"
        )


class _FusedNorm(nn.Module):
    """RMS norm in one fused kernel; transformers' own launches seven."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon)


def _fuse_norms(part: nn.Module) -> None:
    for module in list(part.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(module, name, _FusedNorm(child))
