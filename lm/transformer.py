"""A decoder-only transformer over vectors. What ids mean, going in and coming out, is the head's matter (heads.py).

Pre-norm blocks with RMSNorm, SwiGLU, grouped-query attention and QK-norm, as in Qwen3 (arXiv:2505.09388); rotary
positions (rotary.py).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reelm.lm.attention import CHOICES, attention
from reelm.lm.cache import Cache
from reelm.lm.cross_attention import CrossAttention, Told
from reelm.lm.layouts import Layout, View
from reelm.lm.linear import Linear
from reelm.lm.norm import RMSNorm, rms_norm
from reelm.lm.packed import Packed, tables
from reelm.lm.rotary import Rotary, rotate
from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import Special


class Attention(nn.Module):
    """Self-attention with normalised, rotated queries and keys."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int, backend: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width, self.backend = heads, kv_heads, head_width, backend
        self.qkv = Linear(width, (heads + 2 * kv_heads) * head_width)
        self.query_gain = nn.Parameter(torch.ones(head_width))
        self.key_gain = nn.Parameter(torch.ones(head_width))
        self.out = Linear(heads * head_width, width)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        prefix: int,
        cache: Cache | None = None,
        layer: int = 0,
        view: View | None = None,
    ) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, -1, self.head_width)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 2)
        gain = torch.cat([self.query_gain.expand(self.heads, -1), self.key_gain.expand(self.kv_heads, -1)])
        qk = rotate(rms_norm(qk, gain), cos.to(qk.dtype), sin.to(qk.dtype))
        q, k = qk.transpose(1, 2).split([self.heads, self.kv_heads], 1)  # (B, heads, L, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
            q = q.to(k.dtype)
        y = attention(q, k, v, prefix, self.backend) if view is None else view(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, 2 * hidden)
        self.out = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    def __init__(
        self, attention: Attention, mlp: SwiGLU, width: int, dropout: float, cross: CrossAttention | None = None
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(width), attention
        self.mlp_norm, self.mlp = RMSNorm(width), mlp
        self.dropout, self.cross = dropout, cross

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        prefix: int,
        cache: Cache | None = None,
        layer: int = 0,
        view: View | None = None,
        told: Told | None = None,
    ) -> Tensor:
        x = x + self._drop(self.attention(self.attention_norm(x), cos, sin, prefix, cache, layer, view))
        return self._rest(x, told)

    def _rest(self, x: Tensor, told: Told | None) -> Tensor:
        if told is not None:
            x = x + self._drop(self.cross(x, told))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropout and self.training else x


class DualBlock(Block):
    """A block with a second attention, that looks along time: `(1 - gate) * first + gate * second` (CogVideo).

    With a gate of 0, as it begins, it is the block of an image model, whose weights it takes by the same names.
    """

    def __init__(
        self,
        attention: Attention,
        temporal: Attention,
        mlp: SwiGLU,
        width: int,
        dropout: float,
        cross: CrossAttention | None = None,
    ) -> None:
        super().__init__(attention, mlp, width, dropout, cross)
        self.temporal = temporal
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(
        self,
        x: Tensor,
        turns: list[tuple[Tensor, Tensor]],
        prefix: int,
        cache: Cache | None,
        layer: int,
        views: list[View],
        told: Told | None = None,
    ) -> Tensor:
        y = self.attention_norm(x)
        first = self.attention(y, *turns[0], prefix, cache, 2 * layer, views[0])
        second = self.temporal(y, *turns[1], prefix, cache, 2 * layer + 1, views[1])
        x = x + self._drop(torch.lerp(first, second, self.gate.to(first.dtype)))
        return self._rest(x, told)


class Sites(nn.Module):
    """Learned vectors for the place of the token to predict, so that wraps of the raster need not be guessed.

    Args:
        sizes: number of times, rows and columns that have vectors of their own; places beyond share the last.
    """

    def __init__(self, sizes: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.time, self.row, self.column = (nn.Embedding(size, width) for size in sizes)

    def forward(self, positions: Tensor) -> Tensor:
        tables = (self.time, self.row, self.column)
        places = (positions[..., i].clamp(0, table.num_embeddings - 1) for i, table in enumerate(tables))
        time, row, column = (table(place) for table, place in zip(tables, places, strict=True))
        return time + row + column


def _untimed(positions: Tensor) -> Tensor:
    """Places `(..., 3)` with those of the grid all at time 0, as an image model knows them."""
    return torch.cat([positions[..., :1].clamp_max(0), positions[..., 1:]], -1)


class Transformer(nn.Module):
    """Vectors in, vectors out, over a prefix seen in both directions and a causal rest.

    With `rope="1d"` and `sites=None` it is shaped as Qwen3 is.

    Args:
        width: size of the vectors.
        depth: number of blocks.
        heads: query heads; the head dimension is width / heads.
        kv_heads: heads of keys and values (fewer: grouped-query attention); None: as many as heads.
        mlp_ratio: hidden size of the feed-forward layers over width, rounded up to a multiple of 64.
        rope: "3d" turns by time, row and column of `Sequence.positions`; "1d" by the column's number.
        theta: base of the rotary frequencies; about the largest distance that matters.
        sites: sizes of the tables of next positions (`Sites`), or None for none.
        dropout: on the outputs of the layers and on the input.
        attention: backend (attention.py); "auto" suits.
        context_width: size of embedded context vectors that are projected into `Special.text` columns; 0: none.
        layout: which tokens of the grid see each other (layouts.py), all rows of a batch having the same places; None:
            all, as far as the prefix and the order allow.
        cross_attention: the columns of the prompt (`Sequence.text`) are no part of the sequence; each block attends to
            their vectors instead (Phenaki).
    """

    cannot_grow = ("width", "heads", "kv_heads", "mlp_ratio", "rope")  # several matrices lie in one (store.grow)
    raster = False  # each column sees those before it, in whichever order places stand there (pixelcnn.py does not)
    checkpointing = False  # whether what is inside of the blocks is computed again in the backward pass, not kept
    cache_dtype: torch.dtype | None = None  # None: that of the weights; lighter ones may have another (precision.py)

    def __init__(
        self,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        kv_heads: int | None = None,
        mlp_ratio: float = 8 / 3,
        rope: Literal["3d", "1d"] = "3d",
        theta: float = 100.0,
        sites: tuple[int, int, int] | None = (64, 64, 64),
        dropout: float = 0.0,
        attention: str = "auto",
        context_width: int = 0,
        layout: Layout | None = None,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        if width % heads or width // heads % 2:
            raise ValueError(f"width {width} must be a multiple of heads {heads}, by an even number")
        if heads % (kv_heads or heads):
            raise ValueError(f"heads {heads} must be a multiple of kv_heads {kv_heads}")
        if rope not in ("3d", "1d") or (rope == "3d" and width // heads < 6):
            raise ValueError(f"rope is 3d (with a head dimension of 6 or more) or 1d; got {rope} with {width // heads}")
        if attention not in CHOICES:
            raise ValueError(f"attention is one of {', '.join(CHOICES)}; got {attention}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout lies in [0, 1); got {dropout}")
        self.width, self.depth, self.heads, self.kv_heads = width, depth, heads, kv_heads
        self.mlp_ratio, self.rope, self.theta, self.dropout = mlp_ratio, rope, theta, dropout
        self.sites = tuple(sites) if sites else None
        self.attention, self.context_width, self.layout = attention, context_width, layout
        self.cross_attention = cross_attention
        self._axes = slice(0, 3) if rope == "3d" else slice(2, 3)  # that tell words apart
        head_width, hidden = width // heads, -int(-width * mlp_ratio // 64) * 64
        self.rotary = Rotary(head_width, 1 if rope == "1d" else 3, theta)
        self.site_tables = Sites(sites, width) if sites else None
        self.context = Linear(context_width, width) if context_width else None
        self.dual = layout is not None and layout.channels == 2
        if self.dual and rope != "3d":
            raise ValueError(f"{type(layout).__name__} tells times apart by rope=3d; got {rope}")
        kind = DualBlock if self.dual else Block

        def block() -> Block:
            each = (Attention(width, heads, kv_heads or heads, head_width, attention) for _ in range(1 + self.dual))
            cross = CrossAttention(width, heads, kv_heads or heads, head_width) if cross_attention else None
            return kind(*each, SwiGLU(width, hidden), width, dropout, cross)

        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.text_norm = RMSNorm(width) if cross_attention else None
        self.norm = RMSNorm(width)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:  # each block begins as the identity (a second attention waits behind its gate)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.mlp.out.weight)
            if block.cross is not None:
                nn.init.zeros_(block.cross.out.weight)

    def forward(self, x: Tensor, sequence: Sequence, cache: Cache | None = None) -> Tensor:
        """Hidden states `(B, L, width)`; those of column i predict the token of column i + 1.

        Args:
            x: `(B, L, width)` vectors of the sequence's ids, as `head.embed(sequence.ids)` gives them.
            sequence: where the tokens are; with a cache, the columns that follow those in it.
            cache: keys and values of earlier columns; is given those of these columns too.
        """
        if sequence.context is not None:
            x = self._place_context(x, sequence)
        if self.site_tables is not None:
            places = sequence.next_positions
            x = x + self.site_tables(_untimed(places) if self.dual else places)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        told, aside = [None] * self.depth, sequence.text if self.cross_attention else None
        if self.cross_attention:
            told, x, sequence = self._set_aside(x, sequence, cache)
        seen = cache.filled if cache is not None else 0
        if self.rope == "3d":
            cos, sin = self.rotary(sequence.positions)
        else:
            columns = torch.arange(seen, seen + x.shape[1], device=x.device)
            if sequence.segments is not None:
                columns = tables(sequence.segments, x.device).place
            cos, sin = self.rotary(columns[None, :, None])
        views = self._views(sequence, cache)
        turns = [self.rotary(_untimed(sequence.positions)), (cos, sin)] if self.dual else []
        for layer, block in enumerate(self.blocks):
            if self.dual:
                arguments = (x, turns, sequence.prefix, cache, layer, views, told[layer])
            else:
                arguments = (x, cos, sin, sequence.prefix, cache, layer, views[layer % len(views)], told[layer])
            again = self.checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
        x = self.norm(x)
        if aside is not None:  # their hidden states are asked for by nobody
            nothing = x.new_zeros(len(x), aside[1] - aside[0], self.width)
            x = torch.cat([x[:, : aside[0]], nothing, x[:, aside[0] :]], 1)
        if cache is not None:
            cache.advance(x.shape[1])
        return x

    def _set_aside(
        self, x: Tensor, sequence: Sequence, cache: Cache | None
    ) -> tuple[list[Told | None], Tensor, Sequence]:
        """What each block is told of the prompt (with a cache, also in later passes), and vectors and sequence without
        its columns."""
        if sequence.text is None:
            return (cache.told if cache is not None and cache.told else [None] * self.depth), x, sequence
        start, stop = sequence.text
        text, turns = self.text_norm(x[:, start:stop]), self.rotary(sequence.positions[:, start:stop, self._axes])
        told = [block.cross.tell(text, *turns) for block in self.blocks]
        if cache is not None:
            cache.told, cache.aside = told, stop - start
        return told, torch.cat([x[:, :start], x[:, stop:]], 1), sequence.without_text()

    def _views(self, sequence: Sequence, cache: Cache | None) -> list[View | None]:
        """The attention of each rule of the layout."""
        if sequence.segments is not None:
            if self.layout is not None or cache is not None:
                raise ValueError("packed rows are for training, without lm.layout; leave one of them out")
            return [Packed(sequence.segments, self.attention)]
        if self.layout is None:
            return [None]
        keys = sequence.positions[0]
        if keys.device.type == "cpu" and (sequence.positions != keys).any():
            raise ValueError("with lm.layout all rows of a batch have the same positions; these differ")
        if cache is not None:
            keys = cache.places = torch.cat([cache.places[: cache.filled], keys])
        return self.layout.views(sequence.next_positions[0], keys, sequence.prefix, self.attention)

    def _place_context(self, x: Tensor, sequence: Sequence) -> Tensor:
        if self.context is None:
            raise ValueError("the sequence has embedded text but the transformer no place for it; set lm.context_width")
        batch, length, width = sequence.context.shape
        slots = sequence.ids == Special.text
        if width != self.context_width or slots.sum() != batch * length:
            raise ValueError(
                f"the embedded text is {tuple(sequence.context.shape)}; expected a width of {self.context_width} "
                f"and one vector for each of the {int(slots.sum())} <text> tokens"
            )
        vectors = self.context(sequence.context).to(x.dtype)
        if sequence.context_mask is not None:  # a vector that does not count leaves the token's own
            own = x[slots].view(batch, length, -1)
            vectors = torch.where(sequence.context_mask[..., None], vectors, own)
        return x.masked_scatter(slots[..., None], vectors)

    def new_cache(self, batch: int, columns: int, dtype: torch.dtype | None = None) -> Cache:
        """An empty cache for `columns` columns of `batch` rows, where the weights are; dtype: by default that in which
        the model multiplies."""
        weight = self.norm.weight
        shape = (batch, self.kv_heads or self.heads, columns, self.width // self.heads)
        return Cache(self.depth * (1 + self.dual), shape, dtype or self.cache_dtype or weight.dtype, weight.device)
