"""Passes of decoding with shapes that never change, so that torch can compile them: few kernels, and on GPUs one graph.

A pass reads `width` columns, of which the last may be of no use: what they leave in the cache is written over by the
next pass, and causal attention keeps it from the others. Keys and values are the cache's whole buffers, with a mask.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from reelm.lm.cache import Cache
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer


class _Buffers:
    """The cache of one layer as `Attention` sees it: whole, its new columns written by number."""

    def __init__(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        self.keys, self.values, self.columns = keys, values, columns

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.columns, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.columns, values.to(self.values.dtype))
        return self.keys, self.values


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])


class Passes:
    """What a transformer does in decoding, compiled; the same numbers to rounding.

    Args:
        backend: of `torch.compile`. On GPUs passes are captured as CUDA graphs.
    """

    def __init__(self, transformer: Transformer, backend: str = "inductor") -> None:
        if transformer.layout is not None or transformer.cross_attention:
            raise ValueError("passes with lm.layout or lm.cross_attention are not compiled; leave compile=true out")
        self.transformer = transformer
        graphs = backend == "inductor" and next(transformer.parameters()).is_cuda
        options = {"mode": "reduce-overhead"} if graphs else {}
        self._pass = torch.compile(self._columns, dynamic=False, fullgraph=True, backend=backend, **options)

    def _columns(
        self, x: Tensor, places: Tensor, following: Tensor, keys: list[Tensor], values: list[Tensor], start: Tensor
    ) -> Tensor:
        t = self.transformer
        columns = start + torch.arange(x.shape[1], device=x.device)
        if t.site_tables is not None:
            x = x + t.site_tables(following)
        cos, sin = t.rotary(places if t.rope == "3d" else columns[None, :, None])
        mask = torch.arange(keys[0].shape[2], device=x.device) <= columns[:, None]
        view = partial(_attend, mask=mask)
        for block, k, v in zip(t.blocks, keys, values, strict=True):
            x = block(x, cos, sin, 0, _Buffers(k, v, columns), 0, view)
        return t.norm(x)

    def fit(self, sequence: Sequence, cache: Cache, width: int) -> bool:
        """Whether these columns, filled up to `width`, can go this way: no prefix, and room for them."""
        return sequence.prefix == 0 and sequence.context is None and cache.length + width <= cache.columns

    def __call__(self, x: Tensor, sequence: Sequence, cache: Cache, width: int) -> Tensor:
        """`Transformer.forward` of `width` columns or fewer."""
        count = x.shape[1]
        x = F.pad(x, (0, 0, 0, width - count))
        places, following = (F.pad(t, (0, 0, 0, width - count)) for t in (sequence.positions, sequence.next_positions))
        start = torch.tensor(cache.length, device=x.device)
        hidden = self._pass(x, places, following, cache.keys, cache.values, start)
        cache.advance(count)
        return hidden[:, :count].clone()  # a graph's result is written over by the next pass
