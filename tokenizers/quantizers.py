"""Quantizers behind one interface: latents `(B, D, T, H, W)` to codes and back.

Each has `dim` (D), `vocabulary` (number of codes), `forward(z) -> (quantized, ids, losses)` where gradients pass
straight through and `losses` are unweighted named terms, and `lookup(ids) -> latents`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ as _FSQ


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of Bernoulli(sigmoid(logits)), stable for large logits."""
    return F.softplus(logits) - logits * logits.sigmoid()


def lfq_entropy(z: Tensor, temperature: float, group: int = 9) -> tuple[Tensor, Tensor]:
    """The two entropy terms of lookup-free quantization (MAGVIT-v2, eq. 5), in nats, without a table of all codes.

    z: `(N, D)` latents. The softmax over {-1, 1}^D with logits 2 z.c / temperature factorises into independent bits
    with p(bit) = sigmoid(4 z / temperature), so the per-sample entropy is exactly a sum of D binary entropies. The
    entropy of the batch average does not factorise: it is taken over groups of at most `group` bits and added up, an
    upper bound on the joint entropy that is exact when D <= group.

    Returns (mean per-sample entropy, entropy of the batch average).
    """
    logits = 4.0 * z.float() / temperature
    per_sample = binary_entropy(logits).sum(-1).mean()
    batch = z.new_zeros((), dtype=torch.float32)
    for part in logits.split(group, dim=-1):
        p = part.sigmoid()
        joint = torch.ones_like(p[:, :1])
        for bit in range(p.shape[-1]):  # outer product, one bit at a time: (N, 2^bits), the first bit least significant
            joint = torch.cat([joint * (1 - p[:, bit : bit + 1]), joint * p[:, bit : bit + 1]], dim=-1)
        mean = joint.mean(0)
        batch = batch - (mean * (mean + 1e-9).log()).sum()
    return per_sample, batch


class LFQ(nn.Module):
    """Lookup-free quantization: each latent channel becomes its sign (MAGVIT-v2, section 3.1).

    Args:
        bits: latent channels; the vocabulary is 2^bits.
        temperature: of the soft assignment in the entropy terms; the paper's code uses 0.01, larger values give the
            batch term a gradient further away from 0.
    """

    def __init__(self, bits: int = 18, temperature: float = 0.01) -> None:
        super().__init__()
        self.bits = self.dim = bits
        self.vocabulary = 2**bits
        self.temperature = temperature
        self.register_buffer("powers", 2 ** torch.arange(bits), persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z = z.float()  # signs and entropies near zero are not to be decided in bfloat16
        quantized = torch.where(z > 0, 1.0, -1.0)
        ids = ((z > 0).movedim(1, -1) * self.powers).sum(-1)
        losses = {}
        if self.training:
            flat = z.movedim(1, -1).flatten(0, -2)
            losses["sample_entropy"], losses["batch_entropy"] = lfq_entropy(flat, self.temperature)
            losses["commitment"] = F.mse_loss(z, quantized)
        return z + (quantized - z).detach(), ids, losses

    def lookup(self, ids: Tensor) -> Tensor:
        bits = (ids.unsqueeze(-1) & self.powers) > 0
        return torch.where(bits, 1.0, -1.0).movedim(-1, 1)


class FSQ(nn.Module):
    """Finite scalar quantization: each channel is bounded and rounded to one of its levels (Mentzer et al. 2023)."""

    def __init__(self, levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.dim = len(levels)
        self.vocabulary = math.prod(levels)
        self.fsq = _FSQ(levels=list(levels))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        quantized, ids = self.fsq(z.float().movedim(1, -1).flatten(1, -2))
        shape = (z.shape[0], *z.shape[2:])
        return quantized.unflatten(1, shape[1:]).movedim(-1, 1), ids.long().reshape(shape), {}

    def lookup(self, ids: Tensor) -> Tensor:
        return self.fsq.indices_to_codes(ids.flatten(1)).unflatten(1, ids.shape[1:]).movedim(-1, 1)
