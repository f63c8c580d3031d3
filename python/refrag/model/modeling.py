"""RefragForCausalLM: an encoder, a projector, and a decoder whose input mixes tokens and chunk embeddings."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import refrag_kernels as rk
from refrag.model import attention
from refrag.model.acceptance import FamilyError, accept_decoder, accept_encoder, require_decoder
from refrag.model.config import RefragConfig
from refrag.model.encoder import encode_packed
from refrag.model.feed_forward import fuse_feed_forward
from refrag.model.generation import PackedPrefill, packed_prefill, padded_inputs, refuse_options, require_empty
from refrag.model.inference_linear import use_inference_linears
from refrag.model.inputs import Chunk, MixedPrompt, PackedTexts
from refrag.model.key_rotation import KeyRotation
from refrag.model.merged import merged_state
from refrag.model.projector import ChunkProjector
from refrag.model.slot_prefill import padded_slots, prefill_of
from refrag.model.slot_state import append_prompt, check_slots, expand_slots
from refrag.model.state import GenerationState, first_step, generate_from, text_prompt
from refrag.model.targets import kept_rows, next_tokens
from refrag.model.token_scale import token_scale_of
from refrag_kernels import ChunkMask


class RefragForCausalLM(PreTrainedModel, GenerationMixin):
    """REFRAG (arXiv 2509.01092) with an encoder and a causal decoder of transformers; docs/families.md lists them.

    Examples
    --------
    >>> from transformers import BertConfig, LlamaConfig
    >>> small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    >>> model = RefragForCausalLM(RefragConfig(text_config=LlamaConfig(**small), encoder_config=BertConfig(**small)))
    >>> from refrag_kernels import ChunkLayout
    >>> chunks = PackedTexts(torch.tensor([5, 6, 7, 8, 9]), ChunkLayout.from_lengths([[3, 2]]))  # two chunks' tokens
    >>> model.encode_chunks(chunks).shape
    torch.Size([2, 32])

    With real text and trained transformers models ``encoder`` and ``decoder``:

    >>> model = RefragForCausalLM.from_parts(encoder, decoder, k=16)  # doctest: +SKIP
    >>> processor = RefragProcessor.from_config(model.config, tokenizer, encoder_tokenizer)  # doctest: +SKIP
    >>> prompt = processor(["Read this: ", Passage("..."), "When was the bridge built?"])  # doctest: +SKIP
    >>> model.generate(prompt, max_new_tokens=32)  # doctest: +SKIP
    """

    config: RefragConfig
    config_class = RefragConfig
    base_model_prefix = "refrag"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    _key_rotation: tuple[PreTrainedModel, KeyRotation] | None = None  # of the decoder that it was made for

    def __init__(self, config: RefragConfig) -> None:
        super().__init__(config)
        # Keep an attention implementation that the user chose; packed rows are then refused.
        chosen = [part._attn_implementation for part in (config.encoder_config, config.text_config)]
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.decoder = AutoModelForCausalLM.from_config(config.text_config)
        if chosen[0] in (None, attention.NAME):
            accept_encoder(self.encoder)
        if chosen[1] in (None, attention.NAME):
            accept_decoder(self.decoder)
        fuse_feed_forward(self.encoder)
        use_inference_linears(self.encoder)
        use_inference_linears(self.decoder)
        self.projector = ChunkProjector(config)
        self.post_init()

    @classmethod
    def from_parts(
        cls, encoder: PreTrainedModel, decoder: PreTrainedModel, k: int = 16, *, preset: str = "paper", **fields: Any
    ) -> RefragForCausalLM:
        """Connect a trained encoder and decoder with a new, untrained projector.

        Both models are used in place, not copied, and changed: their attention becomes "refrag", which computes the
        same as "sdpa" without a plan, the encoder's feed-forward layers are fused where possible, and linear layers use
        faster matrix products for inference on the CPU.

        Parameters
        ----------
        encoder : PreTrainedModel
            A text encoder (AutoModel). Both it and the decoder are probed on a few rows.
        decoder : PreTrainedModel
            A causal language model (AutoModelForCausalLM).
        k : int
            Number of decoder tokens in a chunk.
        preset : {"paper", "lclm"}
        **fields
            Further fields of RefragConfig.

        Raises
        ------
        FamilyError
            If packed rows can't reproduce the results of the encoder or the decoder, or if one of them can't be
            rebuilt from its config. The message names the model and the difference.
        """
        config = RefragConfig.from_preset(preset, decoder.config, encoder.config, chunk_size=k, **fields)
        try:
            with torch.device("meta"):
                model = cls(config)
        except FamilyError:
            raise
        except ValueError as error:  # transformers raises it if the config has no model of this kind
            raise FamilyError(
                f"encoder, decoder: got {type(encoder).__name__} and {type(decoder).__name__}, which AutoModel and "
                f"AutoModelForCausalLM can't build from their configs: {str(error).splitlines()[0][:200]}"
            ) from error
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            made = type(getattr(model, name))
            if isinstance(part, PreTrainedModel) and not isinstance(part, made):
                raise FamilyError(
                    f"{name}: got {type(part).__name__}, needs {made.__name__}, which its config builds: otherwise "
                    "from_pretrained couldn't load what save_pretrained wrote"
                )
        model.encoder, model.decoder = encoder, decoder
        accept_encoder(encoder)
        accept_decoder(decoder)
        fuse_feed_forward(encoder)
        use_inference_linears(encoder)
        use_inference_linears(decoder)
        model.projector = ChunkProjector(config).to(device=decoder.device, dtype=decoder.dtype)
        model.generation_config = copy.deepcopy(decoder.generation_config)
        return model.train(decoder.training)

    def save_pretrained(  # type: ignore[override]  # the rest of transformers' arguments is in kwargs
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model as ``transformers.PreTrainedModel.save_pretrained`` does, with low-rank adapters merged.

        Raises
        ------
        ValueError
            If a layer has an adapter that can't be merged.
        """
        state_dict = merged_state(self) if state_dict is None else state_dict
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the decoder's token embeddings and output layer, as ``transformers.PreTrainedModel`` does."""
        table = self.decoder.resize_token_embeddings(*args, **kwargs)
        self.config.get_text_config().vocab_size = self.decoder.config.get_text_config().vocab_size
        return table

    def encode_chunks(self, texts: PackedTexts) -> torch.Tensor:
        """Encode chunks in one packed pass.

        The embeddings can be stored and reused: they don't depend on the projector or the decoder.

        Parameters
        ----------
        texts : PackedTexts
            N chunks from a ``RefragProcessor``.

        Returns
        -------
        Tensor [N, d_enc]
        """
        return encode_packed(self.encoder, texts, self.config.pooling, self.config.pool_segments)

    def embed(self, prompt: MixedPrompt, chunk_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Build the decoder's input: token embeddings, and projected chunk embeddings in the slots.

        Parameters
        ----------
        prompt : MixedPrompt
        chunk_embeds : Tensor [N, d_enc], optional
            From ``encode_chunks``. Defaults to the prompt's ``chunk_embeds``; if there are none either, the chunks are
            encoded here.

        Returns
        -------
        Tensor [T, d_dec]

        Raises
        ------
        ValueError
            If ``chunk_embeds`` doesn't have a row for each of the prompt's N chunks, or the prompt was packed with
            another number of latents.
        """
        if prompt.kv_slots is not None:
            raise ValueError("prompt: got key/value slots, which have no embeddings; needs read() or generate()")
        if prompt.latents != self.config.latents:
            raise ValueError(
                f"prompt: got {prompt.latents} slots per chunk, needs {self.config.latents}, the config's latents"
            )
        needed = [len(prompt.chunks), self.config.chunk_width]
        if chunk_embeds is None:
            chunk_embeds = prompt.chunk_embeds
        if chunk_embeds is None:
            if len(prompt.expanded) == len(prompt.chunks):
                chunk_embeds = torch.zeros(needed, dtype=self.projector.up.weight.dtype, device=self.device)
            else:
                chunk_embeds = self.encode_chunks(prompt.encoder_input)
        if list(chunk_embeds.shape) != needed:
            raise ValueError(f"chunk_embeds: got shape {list(chunk_embeds.shape)}, needs {needed}, one row per chunk")
        return self.embed_rows(prompt.token_ids, prompt.slot_of_row, chunk_embeds)

    def embed_rows(
        self, token_ids: torch.Tensor, slot_of_row: torch.Tensor, chunk_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Build the decoder's input from tensors on the device, without the checks of ``embed``.

        Parameters
        ----------
        token_ids : Tensor, int64 [T]
        slot_of_row : Tensor, int32 [T]
            -1 for text, else the index of a row of the projected ``chunk_embeds``.
        chunk_embeds : Tensor [N, d_enc]

        Returns
        -------
        Tensor [T, d_dec]
        """
        table = self.get_input_embeddings()
        token_scale = token_scale_of(table)
        chunks = self.projector.norm(chunk_embeds.to(table.weight.dtype))
        weights, activation = self.projector.weights(), self.projector.activation
        # Sharded tables are only gathered while their module runs.
        if self.config.latents == 1 and not hasattr(table.weight, "full_tensor"):
            return rk.embed_mixed(
                token_ids, table.weight, chunks, slot_of_row, *weights, activation=activation, token_scale=token_scale
            )
        text = table(token_ids)
        if not len(chunks):
            return text
        slots = rk.project_chunks(chunks, *weights, activation=activation).view(-1, text.shape[1])
        return torch.where((slot_of_row >= 0)[:, None], slots[slot_of_row.clamp(min=0).long()], text)

    def mask(self, prompt: MixedPrompt) -> ChunkMask:
        """Return the decoder's mask: which spans of a prompt attend to which."""
        if self.config.decoder_mask == "passages":
            return ChunkMask.passages(prompt.passage_of_span)
        return ChunkMask.full()

    def plans(self, prompt: MixedPrompt) -> attention.AttentionPlans:
        """Return the decoder's attention plans for a prompt."""
        return attention.AttentionPlans(prompt.layout, self.mask(prompt), causal=True)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        labels: torch.Tensor | None = None,
        prompt: MixedPrompt | None = None,
        chunk_embeds: torch.Tensor | None = None,
        prefill: PackedPrefill | GenerationState | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the decoder on a packed ``prompt``, or on padded tokens as any transformers decoder.

        Parameters
        ----------
        prompt : MixedPrompt, optional
            Packed rows, which replace ``input_ids``, ``inputs_embeds``, ``attention_mask`` and ``position_ids``.
        chunk_embeds : Tensor [N, d_enc], optional
            Embeddings of the prompt's chunks, as in ``embed``.
        logits_to_keep : int
            With a prompt: compute logits for this many last rows of every sequence only; 0 for all rows.
        labels : Tensor, int64 [T] or [1, T], optional
            With a prompt: the target token of each row, as in ``prompt.token_ids``; -100 to ignore it. The preceding
            row of the sequence predicts it, so a sequence's first label is ignored. Labels of slots are ignored, too.
            The loss is the mean cross-entropy, or the sum divided by ``num_items_in_batch``.
        prefill : PackedPrefill, optional
            Passed by ``generate`` to its first step.

        Returns
        -------
        CausalLMOutputWithPast, or a tuple with ``return_dict=False``
            With a prompt: logits [1, T, V], or [1, B * logits_to_keep, V]; the loss with ``labels``.

        Raises
        ------
        ValueError
            If an argument conflicts with the prompt's contents, the cache isn't empty, or ``labels`` don't match the
            prompt's T rows or come with ``logits_to_keep``.
        """
        if isinstance(prefill, GenerationState):
            return first_step(prefill)
        if prefill is not None:
            assert inputs_embeds is not None  # generate passes both to its first step
            copies = inputs_embeds.shape[0] // prefill.rows.shape[0]
            hidden_states = bool(kwargs.get("output_hidden_states"))
            return packed_prefill(self.decoder, prefill, past_key_values, copies, hidden_states=hidden_states)
        if prompt is None:
            return self.decoder(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                logits_to_keep=logits_to_keep, labels=labels, **kwargs,
            )  # fmt: skip
        taken = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                 "inputs_embeds": inputs_embeds}  # fmt: skip
        for name, value in taken.items():
            if value is not None:
                raise ValueError(f"{name}: got a value together with a prompt, needs None: the prompt provides it")
        require_decoder(self.decoder)
        require_empty(past_key_values)
        prompt = prompt.to(self.device)
        targets = None if labels is None else next_tokens(prompt, labels, logits_to_keep)
        items = kwargs.pop("num_items_in_batch", None)
        as_tuple = kwargs.pop("return_dict", None) is False
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions: got True, needs False: packed rows never materialize attention weights"
            )
        output = attention.packed_pass(
            self.decoder,
            self.plans(prompt),
            inputs_embeds=self.embed(prompt, chunk_embeds)[None],
            position_ids=prompt.position_ids[None],
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=kept_rows(prompt, logits_to_keep),
            **kwargs,
        )
        if targets is not None:
            output.loss = self.loss_function(
                output.logits, None, output.logits.shape[-1], num_items_in_batch=items, shift_labels=targets
            )
        if as_tuple:  # in the order of the fields, though the loss was set last
            values = (getattr(output, field.name) for field in dataclasses.fields(output))
            return tuple(value for value in values if value is not None)  # type: ignore[return-value]
        return output

    def generate(  # type: ignore[override]  # prompt takes the place of transformers' inputs
        self,
        prompt: MixedPrompt | torch.Tensor | None = None,
        *,
        chunk_embeds: torch.Tensor | None = None,
        state: GenerationState | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate from a prompt with transformers' ``generate``.

        The prefill runs on packed rows, without padding; its keys and values are then copied into transformers' cache.

        Parameters
        ----------
        prompt : MixedPrompt
            Other values are passed to transformers unchanged.
        chunk_embeds : Tensor [N, d_enc], optional
            Embeddings of the prompt's chunks, as in ``embed``.
        state : GenerationState, optional
            The rows read so far, of one sequence. A prompt is appended to it; without a prompt, generation continues
            from it. The state is extended by the prompt and the generated tokens. Doesn't support beams.
        **kwargs
            As for ``transformers.GenerationMixin.generate``.

        Returns
        -------
        Tensor, int64 [B, new tokens], or transformers' output object with ``return_dict_in_generate=True``
            The new tokens only.
        """
        # mypy doesn't see that PreTrainedModel and GenerationMixin together satisfy this method's type of self.
        generate: Callable[..., Any] = super().generate  # type: ignore[misc]
        if state is not None:
            if isinstance(prompt, torch.Tensor):
                raise ValueError("prompt: got a tensor together with a state, needs a MixedPrompt")
            require_decoder(self.decoder)
            refuse_options(self.generation_config, kwargs, state=True)
            with torch.no_grad(), state.restored_on_error():
                append_prompt(self, state, prompt, chunk_embeds)
                return generate_from(self, state, generate, kwargs)
        if not isinstance(prompt, MixedPrompt):
            return generate(prompt, **kwargs)
        require_decoder(self.decoder)
        refuse_options(self.generation_config, kwargs, state=prompt.kv_slots is not None)
        with torch.no_grad():
            check_slots(self, prompt, chunk_embeds)
            if prompt.kv_slots is not None:
                return generate(**padded_slots(prefill_of(self, prompt)), **kwargs)
            prompt = prompt.to(self.device)
            embeds = self.embed(prompt, chunk_embeds)
            return generate(**padded_inputs(prompt, embeds, self.plans(prompt)), **kwargs)

    @property
    def key_rotation(self) -> KeyRotation:
        """Moves the decoder's keys to other positions; a ValueError if they can't be moved."""
        if self._key_rotation is None or self._key_rotation[0] is not self.decoder:
            self._key_rotation = (self.decoder, KeyRotation(self.decoder))
        return self._key_rotation[1]

    def read(
        self,
        prompt: MixedPrompt,
        state: GenerationState | None = None,
        *,
        chunk_embeds: torch.Tensor | None = None,
    ) -> GenerationState:
        """Prefill a prompt incrementally, after the rows of ``state``; ``generate(state=...)`` continues from there.

        Only the new rows are computed. The results equal those of one long prompt.

        Parameters
        ----------
        prompt : MixedPrompt
            One sequence, made with ``begin=False`` if it is appended to a state.
        state : GenerationState, optional
            Extended in place. Defaults to a new state.
        chunk_embeds : Tensor [N, d_enc], optional
            Embeddings of the prompt's chunks, as in ``embed``.

        Returns
        -------
        GenerationState

        Raises
        ------
        ValueError
            If the prompt is empty or has several sequences.
        PromptTooLongError
            If it doesn't fit into the decoder's window together with the state's rows.
        """
        require_decoder(self.decoder)
        state = GenerationState() if state is None else state
        append_prompt(self, state, prompt, chunk_embeds)
        return state

    def expand(self, state: GenerationState, chunk: int | str | Chunk) -> None:
        """Append a chunk's text to a running generation, without recomputing the rows before it.

        With key/value slots, nothing is appended: the chunk's rows replace its slots, from the full rows if they are
        held, and only the text in the state is computed again.

        Parameters
        ----------
        state : GenerationState
        chunk : int, str or Chunk
            Index of a chunk among all chunks read so far, the id of a passage for the text of all its chunks, or a
            chunk.

        Raises
        ------
        ValueError
            If the chunk or passage is unknown.
        PromptTooLongError
            If it doesn't fit into the decoder's window.
        """
        if state.entries:
            with torch.no_grad():
                expand_slots(self, state, chunk)
            return
        self.read(text_prompt(state.tokens_of(chunk), self.config.latents), state)

    def prepare_inputs_for_generation(  # type: ignore[override]  # the rest of transformers' arguments is in kwargs
        self,
        input_ids: torch.LongTensor,
        inputs_embeds: torch.Tensor | None = None,
        prefill: PackedPrefill | GenerationState | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # generate() inspects this signature: it only accepts inputs_embeds if the signature has it.
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]  # as in generate
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration and prefill is not None:
            inputs["prefill"] = prefill
        return inputs


AutoModel.register(RefragConfig, RefragForCausalLM)
AutoModelForCausalLM.register(RefragConfig, RefragForCausalLM)
