"""Attention to what is no part of the sequence: a prompt (Phenaki, arXiv:2210.02399, section 2.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelm.lm.linear import Linear
from reelm.lm.norm import RMSNorm, rms_norm
from reelm.lm.rotary import rotate

Told = tuple[Tensor, Tensor]
"""Keys and values `(B, kv_heads, N, D)` of one block."""


class CrossAttention(nn.Module):
    """Each column attends to all vectors of the prompt, the same for all columns.

    Keys are turned by their places in the prompt and queries are not, so that the order of words counts and the
    distance to them does not. A prompt that is left out is a row of `<pad>` vectors, which say nothing.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.norm = RMSNorm(width)
        self.query, self.kv = Linear(width, heads * head_width), Linear(width, 2 * kv_heads * head_width)
        self.query_gain = nn.Parameter(torch.ones(head_width))
        self.key_gain = nn.Parameter(torch.ones(head_width))
        self.out = Linear(heads * head_width, width)

    def tell(self, text: Tensor, cos: Tensor, sin: Tensor) -> Told:
        """Keys and values of a prompt's vectors `(B, N, width)`, whose places are told by rotary tables."""
        kv = self.kv(text).view(*text.shape[:2], 2 * self.kv_heads, self.head_width)
        k, v = kv.split(self.kv_heads, 2)
        k = rotate(rms_norm(k, self.key_gain), cos.to(k.dtype), sin.to(k.dtype))
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """What `(B, L, width)` columns find in the prompt."""
        k, v = told
        q = self.query(self.norm(x)).view(*x.shape[:2], self.heads, self.head_width)
        q = rms_norm(q, self.query_gain).transpose(1, 2).to(k.dtype)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))
