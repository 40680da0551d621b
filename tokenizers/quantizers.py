"""Quantizers behind one interface: latents `(B, D, T, H, W)` to codes and back.

Each has `dim` (D), `inputs` (channels that it asks of the encoder, in most D), `vocabulary` (number of codes), `digits`
(how many values each digit of an id has, the lowest digit first: its bits, channels or levels), `forward(z) ->
(quantized, ids, losses)` where gradients pass straight through and `losses` are unweighted named terms, and
`lookup(ids) -> latents`. `Continuous` stands in the same place and quantizes nothing: its vocabulary is None.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ as _FSQ
from vector_quantize_pytorch import ResidualVQ as _ResidualVQ


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
    logits = (z.float().T * (4.0 / temperature)).contiguous()  # (D, N): what follows runs along the samples
    per_sample = binary_entropy(logits).sum() / len(z)
    ones = logits.sigmoid()
    sides = torch.stack([1 - ones, ones], 1)  # (D, 2, N)
    batch = z.new_zeros((), dtype=torch.float32)
    for part in sides.split(group):
        # the mean over the samples of a product of two tables is a matrix product: it takes the tables of the group's
        # halves and spares that of the whole group, 2^bits numbers for each sample; 0.6 ms for 2,560 of 18 bits
        half = len(part) // 2
        with torch.autocast(z.device.type, enabled=False):
            mean = _joint(part[:half]) @ _joint(part[half:]).T / len(z)
        batch = batch - (mean * (mean + 1e-9).log()).sum()
    return per_sample, batch


def _joint(sides: Tensor) -> Tensor:
    """Probabilities `(2^bits, N)` of all values of independent bits, those of whose values are `(bits, 2, N)`."""
    joint = sides.new_ones(1, sides.shape[2])
    for bit in sides:
        joint = (bit.unsqueeze(1) * joint).flatten(0, 1)
    return joint


class LFQ(nn.Module):
    """Lookup-free quantization: each latent channel becomes its sign (MAGVIT-v2, section 3.1).

    Args:
        bits: latent channels; the vocabulary is 2^bits.
        temperature: of the soft assignment in the entropy terms; the paper's code uses 0.01, larger values give the
            batch term a gradient further away from 0.
    """

    def __init__(self, bits: int = 18, temperature: float = 0.01) -> None:
        super().__init__()
        self.bits = self.dim = self.inputs = bits
        self.vocabulary, self.digits = 2**bits, (2,) * bits
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
        self.levels = self.digits = tuple(levels)
        self.dim = self.inputs = len(levels)
        self.vocabulary = math.prod(levels)
        self.fsq = _FSQ(levels=list(levels))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        quantized, ids = self.fsq(z.float().movedim(1, -1).flatten(1, -2))
        shape = (z.shape[0], *z.shape[2:])
        return quantized.unflatten(1, shape[1:]).movedim(-1, 1), ids.long().reshape(shape), {}

    def lookup(self, ids: Tensor) -> Tensor:
        return self.fsq.indices_to_codes(ids.flatten(1)).unflatten(1, ids.shape[1:]).movedim(-1, 1)

    def nearest(self, quantized: Tensor) -> Tensor:
        """Ids of the codes nearest to latents that need not be codes; `forward` would bound them a second time."""
        half = torch.tensor([level // 2 for level in self.levels], device=quantized.device).view(-1, 1, 1, 1)
        top = torch.tensor([level - 1 for level in self.levels], device=quantized.device).view(-1, 1, 1, 1)
        level = (quantized * half + half).round().clamp(min=torch.zeros_like(top), max=top).long()
        places = torch.tensor([math.prod(self.levels[:i]) for i in range(self.dim)], device=quantized.device)
        return (level.movedim(1, -1) * places).sum(-1)


class ResidualVQ(nn.Module):
    """Vector quantization in levels, each of what those before it left over (SoundStream, arXiv:2107.03312, section
    III.C), with codes that follow the running mean of what they stand for (VQ-VAE, arXiv:1711.00937, appendix A.1).

    Ids have the levels as their last axis, `(B, T, ..., levels)`. `lookup` also takes the first levels alone.

    Args:
        codes: number of codes of a level.
        dim: latent channels.
        levels: how many.
        decay: of the running means.
        dead: a code that stands for fewer latents than this, in the running mean, is replaced by a latent.
        dropout: each training batch is quantized in a random number of the levels, so that what the first ones say can
            stand alone; the ids of the others are then 0.
        bypass: share of the items of a training batch that pass as they are, so that the networks around learn from
            their true latents too (Mimi, arXiv:2410.00037, section 3.3.2).
        cosine: codes and latents are compared on the unit sphere (arXiv:2110.04627, section 3.2); one level only.
    """

    def __init__(
        self,
        codes: int = 1024,
        dim: int = 64,
        levels: int = 4,
        decay: float = 0.99,
        dead: float = 0.1,
        dropout: bool = False,
        bypass: float = 0.0,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if codes < 2 or levels < 1:
            raise ValueError(f"{levels} levels of {codes} codes hold nothing; take 2 codes and 1 level or more")
        if cosine and levels > 1:
            raise ValueError(f"what a level leaves over has a length; levels={levels} asks for cosine=false")
        self.codes, self.dim, self.inputs, self.levels = codes, dim, dim, levels
        if not 0 <= bypass < 1:
            raise ValueError(f"bypass is a share from 0 to less than 1; got {bypass}")
        self.decay, self.dead, self.dropout, self.bypass, self.cosine = decay, dead, dropout, bypass, cosine
        self.vocabulary = codes
        self.vq = _ResidualVQ(
            dim=dim, codebook_size=codes, num_quantizers=levels, decay=decay, use_cosine_sim=cosine,
            threshold_ema_dead_code=dead, kmeans_init=True, rotation_trick=False, quantize_dropout=dropout,
        )  # fmt: skip

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        shape = (z.shape[0], *z.shape[2:])
        with torch.autocast(z.device.type, enabled=False):  # running means and distances are not for bfloat16
            z = z.float()
            quantized, ids, commitment = self.vq(z.movedim(1, -1).flatten(1, -2))
        quantized = quantized.detach().unflatten(1, shape[1:]).movedim(-1, 1)
        if self.training and self.bypass:
            passed = torch.rand(len(z), *[1] * (z.ndim - 1), device=z.device) < self.bypass
            quantized = torch.where(passed, z.detach(), quantized)
        quantized = z + (quantized - z).detach()  # the library's own gradient counts once for each level
        losses = {"commitment": commitment.sum()} if self.training else {}
        return quantized, ids.long().clamp_min(0).unflatten(1, shape[1:]), losses  # it calls dropped ids -1

    def lookup(self, ids: Tensor) -> Tensor:
        if not 1 <= ids.shape[-1] <= self.levels:
            raise ValueError(f"ids of {ids.shape[-1]} levels; this quantizer has {self.levels}, the last axis of ids")
        tables = self.vq.codebooks
        return sum(tables[level][ids[..., level]] for level in range(ids.shape[-1])).movedim(-1, 1)


class VQ(ResidualVQ):
    """`ResidualVQ` whose id numbers the codes of all levels, the first level highest, so that heads with sub-tokens can
    predict one level after the other; the arguments are its. One level is plain vector quantization."""

    def __init__(
        self,
        codes: int = 1024,
        dim: int = 8,
        levels: int = 1,
        decay: float = 0.99,
        cosine: bool = False,
        dead: float = 0.1,
    ) -> None:
        if codes**levels >= 2**63:
            raise ValueError(f"{levels} levels of {codes} codes cannot be numbered; take fewer")
        super().__init__(codes, dim, levels, decay, dead, cosine=cosine)
        self.vocabulary, self.digits = codes**levels, (codes,) * levels
        self.register_buffer("places", codes ** torch.arange(levels - 1, -1, -1), persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        quantized, ids, losses = super().forward(z)
        return quantized, (ids * self.places).sum(-1), losses

    def lookup(self, ids: Tensor) -> Tensor:
        return super().lookup(ids[..., None] // self.places % self.codes)


class Continuous(nn.Module):
    """No quantization: the latents are the tokens, `(B, T, H, W, D)` float32, as models that denoise them take them.

    Each channel of a token is shifted and scaled by its mean and standard deviation over what training has seen, so
    that tokens have about unit variance whatever scale the encoder has found; `lookup` undoes it. What the decoder sees
    is the encoder's own scale.

    Args:
        dim: latent channels; 8 in W.A.L.T (arXiv:2312.06662), which has the networks of MAGVIT-v2 with nothing in
            between.
        gaussian: the encoder gives mean and log-variance of a normal distribution, from which training draws (VAE,
            arXiv:1312.6114), and whose divergence from the standard one is the term `kl`, in nats a channel. Tokens are
            its means.
    """

    vocabulary = None
    slowest = 0.01  # the least weight of a batch in the running statistics; the first batches count alike

    def __init__(self, dim: int = 8, gaussian: bool = False) -> None:
        super().__init__()
        self.dim, self.gaussian = dim, gaussian
        self.inputs = 2 * dim if gaussian else dim
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        z, losses = z.float(), {}
        if self.gaussian:
            z, log_variance = z.chunk(2, 1)
        if self.training:
            self._follow(z.detach())
        tokens = ((z.detach() - self._shaped(self.mean)) / self._shaped(self._deviation)).movedim(1, -1)
        if self.gaussian and self.training:
            log_variance = log_variance.clamp(-30.0, 20.0)  # else a wild first step overflows
            losses["kl"] = 0.5 * (z.square() + log_variance.exp() - 1 - log_variance).mean()
            z = z + (0.5 * log_variance).exp() * torch.randn_like(z)
        return z, tokens, losses

    def lookup(self, tokens: Tensor) -> Tensor:
        return tokens.float().movedim(-1, 1) * self._shaped(self._deviation) + self._shaped(self.mean)

    @property
    def _deviation(self) -> Tensor:
        return self.variance.sqrt().clamp_min(1e-6)  # of a channel that never moves

    @staticmethod
    def _shaped(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1, 1)

    @torch.no_grad()
    def _follow(self, z: Tensor) -> None:
        """Counts a batch in: the variance is that of the mixture, so it holds how the mean has moved."""
        self.batches += 1
        weight = (1 / self.batches).clamp_min(self.slowest)
        variance, mean = torch.var_mean(z, (0, 2, 3, 4), correction=0)
        apart = mean - self.mean
        self.variance.lerp_(variance, weight)
        self.variance += weight * (1 - weight) * apart.square()
        self.mean += weight * apart
