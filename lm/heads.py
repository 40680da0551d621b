"""Token heads: how ids become vectors on the way in, and vectors ids on the way out.

A head has its `embed`, `loss` and `sample` side by side, and the transformer does not know which head it has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from reelm.lm.linear import Linear, linear
from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import SPECIAL, Vocabulary

ROWS_OF_LOGITS = 1 << 20  # number of logits that a CPU works on together in float32
LOGITS_AT_ONCE = 1 << 26  # beyond these many, logits are made in chunks, and again in the backward pass


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over large vocabularies, on CPUs a few rows at a time.

    The stock operations make several float32 tensors of the size of the logits; here these fit in a processor's cache,
    and only the logits and their gradient exist as wholes.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        norms, values, best = [], [], []
        rows = len(logits) if logits.is_cuda else max(ROWS_OF_LOGITS // logits.shape[-1], 1)
        for part, target in zip(logits.split(rows), targets.split(rows), strict=True):
            part = part.float()
            norms.append(part.logsumexp(-1))
            values.append(part.gather(-1, target[:, None]).squeeze(-1))
            best.append(part.argmax(-1))
        norm = torch.cat(norms)
        plain = norm - torch.cat(values)
        right = (torch.cat(best) == targets).float()
        ctx.save_for_backward(logits, targets, norm)
        ctx.rows = rows
        ctx.mark_non_differentiable(right)
        return plain, right

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        logits, targets, norm = ctx.saved_tensors
        out = torch.empty_like(logits)
        split = (t.split(ctx.rows) for t in (logits, targets, norm[:, None], grad[:, None], out))
        for part, target, part_norm, part_grad, part_out in zip(*split, strict=True):
            slope = (part.float() - part_norm).exp_()
            slope.scatter_add_(-1, target[:, None], slope.new_full((len(target), 1), -1.0))
            part_out.copy_(slope.mul_(part_grad))
        return out, None


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and correctness, `(N,)` float32 each, of logits `(N, V)`; the first has a gradient."""
    return _CrossEntropy.apply(logits, targets)


class Head(nn.Module):
    """What heads share: the vectors of the ids that they do not predict, and the loss over those they do.

    Args:
        vocabulary: the id space.
        width: size of the transformer's vectors.
        offset: first id to predict.
        size: number of ids to predict.
        embeds: whether it makes the vectors of ids.
    """

    def __init__(self, vocabulary: Vocabulary, width: int, offset: int, size: int, embeds: bool = True) -> None:
        super().__init__()
        if size < 1 or offset < 0 or offset + size > vocabulary.size:
            raise ValueError(f"ids {offset} to {offset + size - 1} are not all in a vocabulary of {vocabulary.size}")
        self.vocabulary, self.width, self.offset, self.size = vocabulary, width, offset, size
        if embeds:
            self.others = nn.Embedding(vocabulary.size - size, width)
            nn.init.normal_(self.others.weight, std=0.02)

    def embed(self, ids: Tensor) -> Tensor:
        """Vectors `(B, L, width)` of ids `(B, L)` from anywhere in the vocabulary."""
        codes = ids - self.offset
        ours = (codes >= 0) & (codes < self.size)
        others = torch.where(codes < 0, ids, ids - self.size).clamp(0, self.others.num_embeddings - 1)
        return torch.where(ours[..., None], self.embed_codes(codes.clamp(0, self.size - 1)), self.others(others))

    def vectors(self, sequence: Sequence) -> Tensor:
        """Vectors `(B, L, width)` of a sequence's ids."""
        return self.embed(sequence.ids)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Vectors of codes: ids counted from `offset`."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Scores `(..., V_k)` of each part of the next code."""
        raise NotImplementedError

    def split(self, codes: Tensor) -> tuple[Tensor, ...]:
        """The parts of codes that `logits` scores."""
        raise NotImplementedError

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Codes from their parts."""
        raise NotImplementedError

    def learn(self, states: Callable[[Sequence], Tensor], sequence: Sequence) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step of training, and what to log. `states`: the hidden states of what the transformer sees."""
        return self.loss(states(sequence), sequence.ids, sequence.loss)

    def loss(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the ids to predict, in nats an id, and what to log, which is without weights.

        Args:
            hidden: `(B, L, width)`; column i predicts the id of column i + 1.
            ids: `(B, L)`.
            mask: `(B, L)` bool or float: the ids to predict, or their weights; 0 where an id is not to be predicted.
                Ids of negative weight become less probable; the mean is over the weights' sizes.
        """
        chosen = mask[:, 1:] != 0
        return self.mean_loss(hidden[:, :-1][chosen], ids[:, 1:][chosen], mask[:, 1:][chosen].float())

    @torch.no_grad()
    def divergence(self, hidden: Tensor, other: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """How far two ways to predict the same ids are apart, from the hidden states of each: `(B, L)`, 0 where nothing
        is to be predicted.

        It is the Kullback-Leibler divergence of the second from the first, in nats, over a code's first part: over what
        may come, and not of what came.
        """
        chosen = mask[:, 1:] != 0
        both = [states[:, :-1][chosen] for states in (hidden, other)]
        rows = max(ROWS_OF_LOGITS // self.size_of_logits, 1)
        found = []
        for *states, codes in zip(*(x.split(rows) for x in (*both, ids[:, 1:][chosen] - self.offset)), strict=True):
            targets = self.split(codes)
            first, second = (self.logits_given(part, targets)[0].float().log_softmax(-1) for part in states)
            found.append((first.exp() * (first - second)).sum(-1).clamp_min(0))
        result = torch.zeros(ids.shape, device=ids.device)
        result[:, 1:][chosen] = torch.cat(found)
        return result

    def mean_loss(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """`loss` of ids `(N,)`, each predicted by a row of `hidden (N, width)`, with weights `(N,)` float."""
        targets = self.split(ids - self.offset)
        rows = max(LOGITS_AT_ONCE // self.size_of_logits, 1)
        if not len(hidden):
            raise ValueError("no id of this batch is to be predicted; its loss mask is empty")
        sums = []
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            arguments = (hidden[part], weights[part], *(target[part] for target in targets))
            sums.append(
                self._sums(*arguments)
                if len(hidden) <= rows or not torch.is_grad_enabled()
                else checkpoint(self._sums, *arguments, use_reentrant=False)
            )
        weighted, plain, right = torch.stack(sums).sum(0)
        logged = {"nll": plain.detach() / len(ids), "accuracy": right.detach() / len(ids)}
        return weighted / weights.abs().sum(), logged

    def _sums(self, hidden: Tensor, weights: Tensor, *targets: Tensor) -> Tensor:
        plain, right = zip(
            *(
                cross_entropy(logits, target)
                for logits, target in zip(self.logits_given(hidden, targets), targets, strict=True)
            ),
            strict=True,
        )
        whole = torch.stack(right).prod(0)  # a code is right when all its parts are
        return torch.stack([(weights * sum(plain)).sum(), sum(plain).sum().detach(), whole.sum()])

    def logits_given(self, hidden: Tensor, targets: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Scores of each part when those before it are known, as in training."""
        return self.logits(hidden)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Number of values of each part of a code."""
        return (self.size,)

    @property
    def size_of_logits(self) -> int:
        return sum(self.part_sizes)

    def sample(self, hidden: Tensor, sampler: Callable[[Tensor], Tensor]) -> Tensor:
        """Ids `(...)` drawn from the distribution after `hidden (..., width)`.

        Args:
            sampler: from logits `(N, ..., V)` to choices `(M, ...)`; with guidance, M is half of N (sampling.py).
        """
        return self.join(tuple(sampler(logits.float()) for logits in self.logits(hidden))) + self.offset


class Categorical(Head):
    """A full softmax over a range of ids.

    Args:
        offset, size: the range; by default that of the visual ids.
        bits: number of bits of a code where codes are bit patterns (lookup-free quantization), so that rare codes
            learn from those that share their bits; 0: none.
        tied: the same table for embedding and for scores.
    """

    signs: Tensor

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        offset: int = SPECIAL,
        size: int | None = None,
        bits: int = 0,
        tied: bool = False,
    ) -> None:
        super().__init__(vocabulary, width, offset, vocabulary.visual if size is None else size)
        if bits and 1 << bits != self.size:
            raise ValueError(f"{bits} bits make {1 << bits} codes, but the head predicts {self.size}; set head.bits=0")
        self.bits, self.tied = bits, tied
        self.table = nn.Embedding(self.size, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.scores = None if tied else Linear(width, self.size)
        if self.scores is not None:
            nn.init.zeros_(self.scores.weight)
        if bits:
            self.bit_vectors = nn.Parameter(torch.randn(bits, width) * 0.02)
            self.bit_scores = Linear(width, bits)
            nn.init.zeros_(self.bit_scores.weight)
            places = torch.arange(bits - 1, -1, -1)
            signs = (torch.arange(self.size)[:, None] >> places & 1) * 2.0 - 1.0
            self.register_buffer("signs", signs, persistent=False)  # (size, bits) in -1, 1

    def embed_codes(self, codes: Tensor) -> Tensor:
        vectors = self.table(codes)
        return vectors + self.signs[codes] @ self.bit_vectors if self.bits else vectors

    def logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        table = self.table.weight if self.scores is None else self.scores.weight
        if not self.bits:
            return (linear(hidden, table),)
        if hidden.numel() < table.numel():  # few rows: rather add up scores than tables
            return (linear(hidden, table) + linear(self.bit_scores(hidden), self.signs),)
        return (linear(hidden, table + self.signs @ self.bit_scores.weight),)

    def split(self, codes: Tensor) -> tuple[Tensor, ...]:
        return (codes,)

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0]


def whole_bits(vocabulary: Vocabulary) -> int:
    """Bits of a visual code; ValueError where the codes are not all that so many bits make."""
    bits = (vocabulary.visual - 1).bit_length()
    if 1 << bits != vocabulary.visual:
        raise ValueError(f"{vocabulary.visual} codes are not a power of two; use head=categorical")
    return bits


class Factorized(Head):
    """Codes of many bits as several sub-tokens (MAGVIT-v2, arXiv:2310.05737, section 3.2).

    The vectors of the sub-tokens are summed; the scores of the sub-tokens are independent of each other, so 2^18
    codes need two tables of 512 rows.

    Args:
        bits: bits of each sub-token, the highest first, which together number the codes; None: those of the
            vocabulary's visual codes in two halves.
        tied: the same tables for embedding and for scores, as in the paper.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        bits: tuple[int, ...] | None = None,
        offset: int = SPECIAL,
        tied: bool = True,
    ) -> None:
        if bits is None:
            whole = whole_bits(vocabulary)
            bits = (whole - whole // 2, whole // 2)
        bits = tuple(bits)
        super().__init__(vocabulary, width, offset, 1 << sum(bits))
        self.bits, self.tied = bits, tied
        self.tables = nn.ModuleList(nn.Embedding(1 << n, width) for n in bits)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.02)
        self.scores = None if tied else nn.ModuleList(Linear(width, 1 << n) for n in bits)
        for scores in self.scores or ():
            nn.init.zeros_(scores.weight)

    @property
    def part_sizes(self) -> tuple[int, ...]:
        return tuple(1 << n for n in self.bits)

    def embed_codes(self, codes: Tensor) -> Tensor:
        return sum(table(part) for table, part in zip(self.tables, self.split(codes), strict=True))

    def logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(hidden, module.weight) for module in self.scores or self.tables)

    def split(self, codes: Tensor) -> tuple[Tensor, ...]:
        parts = []
        for n in reversed(self.bits):
            parts.append(codes & ((1 << n) - 1))
            codes = codes >> n
        return tuple(reversed(parts))

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        codes = torch.zeros_like(parts[0])
        for n, part in zip(self.bits, parts, strict=True):
            codes = codes << n | part
        return codes


class Chained(Factorized):
    """Sub-tokens one after the other: each is predicted from the hidden state and the sub-tokens before it.

    Next-sub-token prediction as in Open-MAGVIT2 (arXiv:2409.04410, section 3.3), with a two-layer network in place of
    its transformer over two positions. Unlike `Factorized` it samples codes whose parts fit together.

    Args:
        bits: bits of each sub-token, the highest first; None: the vocabulary's visual codes in two, three to two.
        tied: the same tables for embedding and for scores.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        bits: tuple[int, ...] | None = None,
        offset: int = SPECIAL,
        tied: bool = False,
    ) -> None:
        if bits is None:
            whole = whole_bits(vocabulary)
            bits = (whole - whole * 2 // 5, whole * 2 // 5)
        super().__init__(vocabulary, width, bits, offset, tied)
        self.links = nn.ModuleList(
            nn.Sequential(Linear(2 * width, 2 * width), nn.SiLU(), Linear(2 * width, width)) for _ in self.bits[1:]
        )

    def _score(self, hidden: Tensor, k: int, before: tuple[Tensor, ...]) -> Tensor:
        """Scores of part k after the parts before it."""
        if k:
            known = sum(table(part) for table, part in zip(self.tables, before[:k], strict=False))
            known = known * self.width**0.5  # tables begin small, hidden states are of unit size
            hidden = hidden + self.links[k - 1](torch.cat([hidden, known.to(hidden.dtype)], -1))
        return linear(hidden, (self.scores or self.tables)[k].weight)

    def logits_given(self, hidden: Tensor, targets: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self._score(hidden, k, targets) for k in range(len(self.bits)))

    def logits(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """Scores along the most probable parts."""
        parts: tuple[Tensor, ...] = ()
        scores: tuple[Tensor, ...] = ()
        for k in range(len(self.bits)):
            scores += (self._score(hidden, k, parts),)
            parts += (scores[-1].argmax(-1),)
        return scores

    def sample(self, hidden: Tensor, sampler: Callable[[Tensor], Tensor]) -> Tensor:
        drawn: tuple[Tensor, ...] = ()
        for k in range(len(self.bits)):
            copies = len(hidden) // len(drawn[0]) if drawn else 1  # 2 with guidance: both halves go on from one choice
            before = tuple(torch.cat([part] * copies) for part in drawn)
            drawn += (sampler(self._score(hidden, k, before).float()),)
        return self.join(drawn) + self.offset
