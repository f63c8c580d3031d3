"""The expansion policy: scores chunks and samples picks from the scores without replacement (REFRAG, A.1).

All picks are sampled sequentially from the same scores: pick t is chunk i with probability ``softmax(s - n)_i``, where
n is infinite for the chunks picked before. This is the Plackett-Luce model for the first places of a ranking.
"""

from __future__ import annotations

import math

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

_INF = float("inf")


def sample_picks(
    scores: torch.Tensor, count: int | torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Sample chunks sequentially, without replacement.

    Parameters
    ----------
    scores : Tensor, floating point [B, L]
        Logits s; ``-inf`` for entries that can't be picked, such as padding after a shorter sequence's last chunk.
    count : int or Tensor, int64 [B]
        Number of picks in each sequence, up to L.
    generator : torch.Generator, optional
        On the scores' device.

    Returns
    -------
    Tensor, int64 [B, n]
        Picks in the order of sampling; n is the largest count. Rows of sequences with a smaller count, or with fewer
        chunks, are padded with -1.

    Raises
    ------
    ValueError
        If the shapes don't fit, a count is negative or above L, or a score is NaN or ``+inf`` (the values of
        the scores are checked on the CPU only).

    Examples
    --------
    >>> scores = torch.tensor([[0.0, 50.0, 100.0], [3.0, -torch.inf, -torch.inf]])
    >>> sample_picks(scores, 2)
    tensor([[ 2,  1],
            [ 0, -1]])
    """
    _check_scores(scores)
    batch, chunks = scores.shape
    if isinstance(count, torch.Tensor):
        if count.shape != (batch,) or count.dtype != torch.int64:
            raise ValueError(f"count: got {count.dtype} {list(count.shape)}, needs an int or int64 [{batch}]")
        counts = count.to(scores.device)
        bounds = (int(counts.min()), int(counts.max())) if batch else (0, 0)
    else:
        counts = torch.full((batch,), count, dtype=torch.int64, device=scores.device)
        bounds = (count, count)
    if bounds[0] < 0 or bounds[1] > chunks:
        wrong = bounds[0] if bounds[0] < 0 else bounds[1]
        raise ValueError(f"count: got {wrong}, needs 0 to {chunks}, the number of chunks")
    # Sorting s + Gumbel noise samples from this distribution (Yellott 1977).
    noise = torch.empty_like(scores, dtype=torch.float64).exponential_(generator=generator).log().neg()
    best, picks = (scores.detach().double() + noise).topk(bounds[1], dim=1)
    surplus = torch.arange(bounds[1], device=scores.device) >= counts[:, None]
    return picks.masked_fill(surplus | (best == -_INF), -1)


def picks_log_prob(scores: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each pick, given the picks before it.

    The sum over a row is the log-probability of the row's picks in this order.

    Parameters
    ----------
    scores : Tensor, floating point [B, L]
        As in ``sample_picks``.
    picks : Tensor, int64 [B, n]
        Chunks in the order of sampling, without duplicates; -1 only at the end of a row.

    Returns
    -------
    Tensor [B, n]
        Differentiable with respect to ``scores``; 0 for -1, ``-inf`` for a chunk that can't be picked. float32, or
        float64 for float64 scores.

    Raises
    ------
    ValueError
        If the shapes don't fit; on the CPU also if a pick is out of range or a duplicate, or a score is NaN or
        ``+inf``.

    Examples
    --------
    >>> picks_log_prob(torch.zeros(1, 3), torch.tensor([[2, 0, 1]])).exp()
    tensor([[0.3333, 0.5000, 1.0000]])
    """
    _check_scores(scores)
    if picks.dim() != 2 or picks.shape[0] != scores.shape[0] or picks.dtype != torch.int64:
        raise ValueError(f"picks: got {picks.dtype} {list(picks.shape)}, needs int64 [{scores.shape[0]}, n]")
    _check_picks(picks, scores.shape[1])
    if not picks.numel() or not scores.shape[1]:
        return scores.new_zeros(picks.shape, dtype=torch.promote_types(scores.dtype, torch.float32))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    made = picks >= 0
    chosen = picks.clamp(min=0)
    hits = torch.zeros(*picks.shape, scores.shape[1], dtype=torch.int32, device=scores.device)
    hits.scatter_(2, chosen[..., None], made[..., None].int())
    taken = (hits.cumsum(1) - hits) > 0  # [B, n, L]: picked before pick t
    left = scores[:, None].masked_fill(taken, -_INF)
    # Where no pick was made, all chunks may have been taken, and logsumexp over -inf alone has no gradient.
    left = torch.where(made[..., None], left, 0.0)
    log_prob = left.gather(2, chosen[..., None])[..., 0] - left.logsumexp(2)
    return torch.where(made, log_prob, 0.0)


def _check_scores(scores: torch.Tensor) -> None:
    if scores.dim() != 2 or not scores.is_floating_point():
        raise ValueError(f"scores: got {scores.dtype} {list(scores.shape)}, needs floating point [B, L]")
    # On other devices, checking the values would synchronize.
    if scores.device.type == "cpu" and bool((scores.isnan() | (scores == _INF)).any()):
        raise ValueError("scores: got NaN or +inf, needs finite numbers or -inf")


def _check_picks(picks: torch.Tensor, chunks: int) -> None:
    if picks.device.type != "cpu" or not picks.numel():
        return
    if int(picks.min()) < -1 or int(picks.max()) >= chunks:
        wrong = picks[(picks < -1) | (picks >= chunks)][0]
        raise ValueError(f"picks: got {int(wrong)}, needs -1 to {chunks - 1}")
    if bool(((picks[:, 1:] >= 0) & (picks[:, :-1] < 0)).any()):
        raise ValueError("picks: got a pick after -1, needs -1 only at the end of a row")
    ordered = picks.sort(1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError("picks: got a chunk twice in a row, needs each once")


class ExpansionPolicy(nn.Module, PyTorchModelHubMixin):
    """Scores how much each chunk gains from expansion: a transformer over the chunks' embeddings (REFRAG, A.1).

    The paper specifies two layers, but not the width, the number of heads or the position encoding. Here the embeddings
    are normalized to length 1 and projected to ``width``, sinusoids encode the order of a sequence's chunks, and the
    number of chunks is not limited. The last layer is initialized to zero, so that an untrained policy picks at random.
    ``save_pretrained`` and ``from_pretrained`` write and read a folder.

    Parameters
    ----------
    embedding_size : int
        d_enc, the size of a chunk's embedding.
    width : int
    num_layers : int
    num_heads : int

    Raises
    ------
    ValueError
        If ``width`` is not an even multiple of ``num_heads``.

    Examples
    --------
    >>> policy = ExpansionPolicy(embedding_size=384)
    >>> embeds = torch.randn(2, 5, 384)
    >>> scores = policy(embeds, torch.tensor([5, 3]))
    >>> scores.shape, scores[1, 3:].tolist()
    (torch.Size([2, 5]), [-inf, -inf])
    >>> picks = sample_picks(scores, torch.tensor([2, 1]))
    """

    def __init__(self, embedding_size: int, width: int = 256, num_layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        if width % num_heads or width % 2:
            raise ValueError(f"width: got {width}, needs an even multiple of num_heads = {num_heads}")
        self.embedding_size = embedding_size
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(embedding_size)
        self.input = nn.Linear(embedding_size, width)
        # Smaller than the sinusoids: the policy learns the value of a position before the value of a text.
        nn.init.normal_(self.input.weight, std=0.3)
        nn.init.zeros_(self.input.bias)
        layer = nn.TransformerEncoderLayer(
            width, num_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def settings(self) -> dict[str, int]:
        """Return the arguments of the constructor."""
        return {
            "embedding_size": self.embedding_size,
            "width": self.input.out_features,
            "num_layers": len(self.layers.layers),
            "num_heads": self.num_heads,
        }

    def forward(self, chunk_embeds: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """Return the scores of each sequence's chunks.

        Parameters
        ----------
        chunk_embeds : Tensor [B, L, d_enc]
            From ``RefragForCausalLM.encode_chunks``; rows after a sequence's last chunk are ignored.
        counts : Tensor, int64 [B], optional
            Number of chunks in each sequence. Defaults to L.

        Returns
        -------
        Tensor [B, L]
            ``-inf`` after a sequence's last chunk.

        Raises
        ------
        ValueError
            If the shapes don't fit.
        """
        if chunk_embeds.dim() != 3 or chunk_embeds.shape[2] != self.embedding_size:
            raise ValueError(
                f"chunk_embeds: got {list(chunk_embeds.shape)}, needs [B, L, {self.embedding_size}], the policy's size"
            )
        batch, length, _ = chunk_embeds.shape
        if counts is None:
            counts = torch.full((batch,), length, device=chunk_embeds.device)
        elif counts.shape != (batch,):
            raise ValueError(f"counts: got {list(counts.shape)}, needs [{batch}], one per sequence")
        if not batch or not length:
            return chunk_embeds.new_zeros(batch, length)
        absent = torch.arange(length, device=chunk_embeds.device) >= counts[:, None]
        # Zeros instead of NaN: attention multiplies padding by 0, but 0 * NaN is NaN.
        normed = self.norm(chunk_embeds.masked_fill(absent[..., None], 0.0).to(self.input.weight.dtype))
        # Normalize to length 1, not to variance 1 per dimension: an optimizer's step has the same size for all weights
        # and would otherwise move the scores further for larger embeddings. With thousands of dimensions, it would undo
        # what was learned.
        hidden = self.input(normed * self.embedding_size**-0.5)
        hidden = hidden + _sinusoids(length, hidden.shape[2], hidden)
        # Don't mask sequences without chunks: their attention rows would be fully masked.
        padding = absent & (counts > 0)[:, None]
        return self.score(self.layers(hidden, src_key_padding_mask=padding))[..., 0].masked_fill(absent, -_INF)


def _sinusoids(length: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return the position encodings [length, width] of "Attention is all you need", section 3.5."""
    rates = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).to(like.dtype)
