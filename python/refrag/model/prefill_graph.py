"""A prefill on static tensors, which a GPU replays as one CUDA graph.

The prefill of a compressed prompt is so short that launching its kernels from Python, layer by layer, takes longer than
running them. A graph is captured once for all prompts up to a number of rows, and replayed for each prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

import refrag_kernels as rk
from refrag.model import attention
from refrag.model.acceptance import require_decoder
from refrag.model.inputs import MixedPrompt
from refrag.model.modeling import RefragForCausalLM
from refrag.model.state import key_values
from refrag_kernels import ChunkLayout, ChunkMask

ROW_STEP = 64  # buckets are multiples of this number of rows, so fewer than 64 rows are padding


class PrefillGraph:
    """Prefills prompts of up to ``rows`` rows with static tensors; on a GPU, it replays a CUDA graph.

    The first ``read`` captures the graph, which contains the addresses of the model's weights: create a new one after
    loading an adapter or moving the model. The results equal those of
    ``model(prompt=..., use_cache=True, logits_to_keep=1)`` up to the order in which partial sums are added.

    Parameters
    ----------
    model : RefragForCausalLM
        In eval mode; with any number of latents.
    rows : int
        Maximum number of packed rows in a prompt, over all sequences; the graph always computes this many.
    chunks : int
        Maximum number of chunk embeddings in a prompt.
    sequences : int
        Maximum number of sequences in a prompt.
    ranges_per_block : int
        See ``refrag_kernels.PlanCapacity.for_rows``. 4 is enough for causal prompts; interleaved passages need more.
    pool : optional
        A memory pool to share with other graphs that never run at the same time: the ``pool()`` of one of them, which
        must be kept alive.

    Examples
    --------
    >>> graph = PrefillGraph(model, rows=512, chunks=256)  # doctest: +SKIP
    >>> logits, cache = graph.read(prompt)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: RefragForCausalLM,
        *,
        rows: int,
        chunks: int,
        sequences: int = 1,
        ranges_per_block: int = 4,
        pool: Any = None,
    ) -> None:
        for name, value in (("rows", rows), ("chunks", chunks), ("sequences", sequences)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, needs at least 1")
        require_decoder(model.decoder)
        self.model = model
        self.rows, self.chunks, self.sequences = rows, chunks, sequences
        self._graph: torch.cuda.CUDAGraph | None = None
        self._memory_pool = pool
        self._output: Any = None
        # Tensors created in inference mode can't be refilled outside it.
        with torch.inference_mode(False):
            self._allocate(ranges_per_block)

    def _allocate(self, ranges_per_block: int) -> None:
        model, rows, sequences = self.model, self.rows, self.sequences
        device, on_gpu = model.device, model.device.type == "cuda"
        # Token ids, slots, position ids and each sequence's last row share a buffer, so that one copy fills them all.
        words = 3 * rows + sequences
        self._fields = torch.zeros(words, dtype=torch.int64, device=device)
        self._staging = torch.zeros(words, dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None
        dtype = model.projector.up.weight.dtype
        self._embeds = torch.zeros(self.chunks, model.config.chunk_width, dtype=dtype, device=device)
        self._plans = attention.AttentionPlans(
            ChunkLayout.from_lengths([[1]]),
            ChunkMask.full(),
            causal=True,
            capacity=rk.PlanCapacity.for_rows(rows, sequences=sequences, ranges_per_block=ranges_per_block),
            device=device,
        )

    def fits(self, prompt: MixedPrompt) -> bool:
        """Return whether a prompt's rows, chunks and sequences fit into the static tensors."""
        layout = prompt.layout
        return (
            layout.total_rows <= self.rows
            and len(prompt.chunks) <= self.chunks
            and layout.num_sequences <= self.sequences
            and prompt.latents == self.model.config.latents
            and prompt.kv_slots is None
        )

    def read(self, prompt: MixedPrompt, chunk_embeds: torch.Tensor | None = None) -> tuple[torch.Tensor, Cache]:
        """Prefill a prompt.

        Parameters
        ----------
        prompt : MixedPrompt
            On the CPU, as ``RefragProcessor`` returns it; a prompt on the GPU is copied to the host first.
        chunk_embeds : Tensor [N, d_enc], optional
            Embeddings of the prompt's chunks. Defaults to the prompt's ``chunk_embeds``; if there are none either, the
            chunks are encoded here.

        Returns
        -------
        Tensor [1, B, V], Cache
            Logits of each sequence's last row, and the keys and values of the packed rows. Both are views of the static
            tensors, which the next ``read`` overwrites; ``copy_of`` copies the cache.

        Raises
        ------
        ValueError
            If the prompt doesn't fit, or its plan doesn't fit the capacity.
        """
        if prompt.kv_slots is not None:
            raise ValueError("prompt: got key/value slots, needs embedding slots: a graph computes all rows")
        if not self.fits(prompt):
            layout = prompt.layout
            raise ValueError(
                f"prompt: got {layout.total_rows} rows, {len(prompt.chunks)} chunks and {layout.num_sequences} "
                f"sequences of {prompt.latents} slots per chunk, needs at most {self.rows}, {self.chunks} and "
                f"{self.sequences} of {self.model.config.latents}"
            )
        with torch.no_grad():
            self._fill(prompt, chunk_embeds)
            if self._copied is None:
                self._output = self._forward()
            else:
                if self._graph is None:
                    self._capture()
                assert self._graph is not None
                self._graph.replay()
        logits, cache = self._output
        rows = prompt.layout.total_rows
        return logits[:, : prompt.layout.num_sequences], _first_rows(cache, rows)

    def pool(self) -> Any:
        """Return the graph's memory pool; before the first ``read``, the one passed to the constructor."""
        return self._memory_pool if self._graph is None else self._graph.pool()

    def _fill(self, prompt: MixedPrompt, chunk_embeds: torch.Tensor | None) -> None:
        """Write a prompt into the static tensors; padding rows are text that no row attends to."""
        chunk_embeds = prompt.chunk_embeds if chunk_embeds is None else chunk_embeds
        if chunk_embeds is None and len(prompt.expanded) < len(prompt.chunks):
            chunk_embeds = self.model.encode_chunks(prompt.to(self.model.device).encoder_input)
        if chunk_embeds is not None:
            needed = [len(prompt.chunks), self._embeds.shape[1]]
            if list(chunk_embeds.shape) != needed:
                raise ValueError(
                    f"chunk_embeds: got shape {list(chunk_embeds.shape)}, needs {needed}, one row per chunk"
                )
            self._embeds[: len(chunk_embeds)].copy_(chunk_embeds, non_blocking=True)
        layout = prompt.layout.host()
        # Refill the plans first: if this raises, the static tensors still hold the previous prompt consistently.
        self._plans.refill(layout, self.model.mask(prompt))
        if self._copied is not None:
            self._copied.synchronize()  # wait until the previous copy has read the staging buffer
        staging, total = self._staging.view(-1), layout.total_rows
        token_ids, slots, positions = staging[: 3 * self.rows].view(3, self.rows)
        token_ids[:total], token_ids[total:] = prompt.token_ids, 0
        slots[:total], slots[total:] = prompt.slot_of_row, -1
        positions[:total], positions[total:] = prompt.position_ids, 0
        last = staging[3 * self.rows :]
        last.zero_()
        last[: layout.num_sequences] = layout.sequence_offsets[1:].long() - 1
        self._fields.copy_(staging, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _forward(self) -> tuple[torch.Tensor, Cache]:
        token_ids, slots, positions = self._fields[: 3 * self.rows].view(3, self.rows)
        embeds = self.model.embed_rows(token_ids, slots.to(torch.int32), self._embeds)
        cache = _StaticRows()
        output = attention.packed_pass(
            self.model.decoder,
            self._plans,
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=self._fields[3 * self.rows :],
        )
        return output.logits, cache

    def _capture(self) -> None:
        # Warm up twice on a side stream: this compiles kernels, lets libraries select algorithms and builds the plans.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            self._output = self._forward()
        self._graph = graph


def copy_of(cache: Cache) -> DynamicCache:
    """Return a copy of a cache, to which rows can be appended."""
    copied = DynamicCache()
    for number, (keys, values) in enumerate(key_values(cache)):
        copied.update(keys.clone(), values.clone(), number)
    return copied


class _RowsAsGiven(DynamicLayer):
    """A cache layer that keeps the tensors it receives, whose addresses don't change within a graph."""

    def update(self, key_states, value_states, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class _StaticRows(Cache):
    """An empty cache for one forward pass."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_RowsAsGiven)


def _first_rows(cache: Cache, rows: int) -> Cache:
    """Return a cache of views of the first rows."""
    views = _StaticRows()
    for number, (keys, values) in enumerate(key_values(cache)):
        views.update(keys[:, :, :rows], values[:, :, :rows], number)
    return views
