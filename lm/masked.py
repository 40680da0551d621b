"""Masked token modelling: all tokens are predicted at once, seen from both sides, and settled over a few steps.

MaskGIT (arXiv:2202.04200) with the conditions of MAGVIT (COMMIT, arXiv:2212.05199, section 3.2): where a token is
hidden but some pixels of its place are known, the token of these pixels stands there instead of `<mask>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reelm.lm.heads import Head
from reelm.lm.sampling import Generators, Sampling, exponential, guide, sample_logits, with_twin
from reelm.lm.sequence import Sequence
from reelm.lm.vocabulary import Special, Vocabulary

MASK = int(Special.mask)
SCHEDULES: dict[str, Callable[[Tensor, int], Tensor]] = {  # share that is hidden, by progress from 0 to 1 and the total
    "cosine": lambda progress, total: (progress * math.pi / 2).cos(),
    "uniform": lambda progress, total: 1 - progress,
    "exponential": lambda progress, total: 1 - float(total) ** (progress - 1),
}


def check_schedule(schedule: str) -> None:
    """ValueError where there is no such schedule."""
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}; got {schedule}")


def counts(total: int, steps: int, schedule: str = "cosine") -> list[int]:
    """How many of `total` tokens are still hidden after each step: fewer each time, and none after the last.

    There are `steps` numbers, or `total` where that is less.
    """
    steps = min(steps, total)
    progress = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    hidden = (SCHEDULES[schedule](progress, total) * total).floor().tolist()
    left, before = [], total
    for step, wish in enumerate(hidden):
        before = max(min(int(wish), before - 1), steps - 1 - step)  # each step to come settles one token or more
        left.append(before)
    return left


@dataclass(frozen=True)
class MaskedSampling(Sampling):
    """How to choose tokens with a masked head.

    steps: passes through the transformer; for each frame where these are filled in one by one.
    schedule: how many tokens stay hidden after each step: cosine, uniform or exponential.
    noise: scale of the Gumbel noise on the confidence that decides which tokens stay, falling to 0 over the steps;
        0: the surest stay, very large: any.
    final_temperature: what the temperature moves to over the steps; None: it stays.
    by_frame: each latent frame is filled in before the next one is begun (Genie).
    """

    steps: int = 12
    schedule: str = "cosine"
    noise: float = 4.5
    final_temperature: float | None = None
    by_frame: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedule(self.schedule)
        if self.steps < 1:
            raise ValueError(f"steps is 1 or more; got {self.steps}")
        if not all(0 <= value < math.inf for value in (self.noise, self.final_temperature or 0)):
            raise ValueError(f"noise and final_temperature are 0 or more; got {self.noise}, {self.final_temperature}")

    def temperature_at(self, progress: float) -> float:
        last = self.temperature if self.final_temperature is None else self.final_temperature
        return self.temperature + (last - self.temperature) * progress

    def guidance_at(self, progress: float) -> float:
        return float(self.scale(torch.tensor(progress)))


class Masked(nn.Module):
    """Hides a random share of the tokens to make and learns to predict them from all others.

    The columns of `Sequence.interior` are COMMIT's conditions: hidden tokens in whose place they stand are refined, the
    other hidden ones are predicted from `<mask>`, those that stay are reconstructed.

    Args:
        vocabulary, width: as for all heads.
        codes: the head that embeds and scores codes, or a function of vocabulary and width that makes it.
        schedule: the hidden share is drawn as a step of this schedule: cosine (MaskGIT), uniform (Phenaki),
            exponential.
        least: smallest share that is hidden (Genie: 0.5).
        whole_frames: share of the samples in which whole latent frames are hidden (MMVG).
        refine, reconstruct: weights of these losses beside that of the masked tokens; reconstruct may be 0.
        actions: number of actions that may lead to a frame, the vector of which is added to those of its tokens
            (Genie); 0: there are none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        width: int,
        codes: Head | Callable[..., Head],
        schedule: str = "cosine",
        least: float = 0.0,
        whole_frames: float = 0.0,
        refine: float = 1.0,
        reconstruct: float = 1.0,
        actions: int = 0,
    ) -> None:
        super().__init__()
        check_schedule(schedule)
        if not (0 <= least <= 1 and 0 <= whole_frames <= 1):
            raise ValueError(f"least and whole_frames lie in [0, 1]; got {least} and {whole_frames}")
        if refine <= 0 or reconstruct < 0:
            raise ValueError(f"refine is above 0 and reconstruct 0 or more; got {refine} and {reconstruct}")
        self.vocabulary, self.width, self.schedule, self.least = vocabulary, width, schedule, least
        self.whole_frames, self.refine, self.reconstruct = whole_frames, refine, reconstruct
        self.codes = codes if isinstance(codes, Head) else codes(vocabulary=vocabulary, width=width)
        self.actions, self.acts = actions, None
        if actions:
            self.acts = nn.Embedding(actions, width)
            nn.init.normal_(self.acts.weight, std=0.02)
        self.condition = nn.Parameter(torch.randn(width) * 0.02)  # tells a condition from a token that is certain

    @property
    def size(self) -> int:
        return self.codes.size

    @property
    def offset(self) -> int:
        return self.codes.offset

    def embed(self, ids: Tensor) -> Tensor:
        """Vectors `(B, L, width)` of ids `(B, L)`."""
        return self.codes.embed(ids)

    def vectors(self, sequence: Sequence) -> Tensor:
        """Vectors `(B, L, width)` of a sequence's ids, with those of their actions, those of conditions marked."""
        x = self.embed(sequence.ids)
        if sequence.actions is not None:
            if self.acts is None:
                raise ValueError("the sequence has actions but the head no vectors for them; set head.actions")
            x = x + (sequence.actions >= 0)[..., None] * self.acts(sequence.actions.clamp_min(0))
        if sequence.interior is None:
            return x
        return x + (sequence.interior != MASK)[..., None] * self.condition

    def hide(self, sequence: Sequence) -> Tensor:
        """Which of the ids to predict, the same columns in each row, are hidden in a step of training.

        Returns `(B, L)` bool, one or more in each row.
        """
        (batch, length), device = sequence.ids.shape, sequence.ids.device
        columns = sequence.loss[0].nonzero()[:, 0]
        if not len(columns):
            raise ValueError("no id of this batch is to be predicted; its loss mask is empty")
        times, frame = sequence.positions[0, columns, 0].unique(return_inverse=True)
        share = SCHEDULES[self.schedule](torch.rand(batch, 1, device=device), len(columns))
        share = self.least + (1 - self.least) * share

        def some(units: int) -> Tensor:
            rank = torch.rand(batch, units, device=device).argsort(-1).argsort(-1)
            return rank < (share * units).ceil().clamp_min(1)

        hidden = some(len(columns))
        if self.whole_frames:
            whole = torch.rand(batch, 1, device=device) < self.whole_frames
            hidden = torch.where(whole, some(len(times))[:, frame], hidden)
        result = torch.zeros(batch, length, dtype=torch.bool, device=device)
        result[:, columns] = hidden
        return result

    def shown(self, sequence: Sequence, hidden: Tensor) -> Sequence:
        """What the transformer sees: conditions or `<mask>` in place of hidden ids, everything in both directions, and
        each column asks for its own place."""
        interior = torch.full_like(sequence.ids, MASK)
        if sequence.interior is not None:
            interior = torch.where(hidden, sequence.interior, interior)
        return sequence.replace(
            ids=torch.where(hidden, interior, sequence.ids),
            interior=interior,
            prefix=sequence.length,
            loss=None,
            next_positions=sequence.positions,
        )

    def loss(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `Head.loss`, but column i predicts its own id."""
        chosen = mask != 0
        return self.codes.mean_loss(hidden[chosen], ids[chosen], mask[chosen].float())

    def learn(self, states: Callable[[Sequence], Tensor], sequence: Sequence) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of the losses over all ids to predict, each with the weight of its kind; logged are the hidden ones."""
        hidden = self.hide(sequence)
        shown = self.shown(sequence, hidden)
        x = states(shown)
        weights = torch.where(shown.interior == MASK, 1.0, self.refine) * hidden * sequence.loss
        loss, metrics = self.loss(x, sequence.ids, weights)
        kept = sequence.loss * ~hidden
        if self.reconstruct and kept.any():
            extra, _ = self.loss(x, sequence.ids, kept)
            total, more = weights.sum(), self.reconstruct * kept.sum()
            loss = (total * loss + more * extra) / (total + more)
        return loss, metrics

    def sample(self, hidden: Tensor, sampler: Callable[[Tensor], Tensor]) -> Tensor:
        return self.codes.sample(hidden, sampler)


@torch.inference_mode()
def fill(
    transformer: nn.Module,
    head: Masked,
    sequence: Sequence,
    sampling: Sampling = MaskedSampling(),
    unconditional: Sequence | None = None,
    generator: Generators = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Fills in what a sequence's loss mask marks, the same columns in each row; nothing else changes.

    In each step all hidden tokens are drawn at once, and those stay that had the largest probability, or product of
    the probabilities of their parts, after noise.

    Args:
        sampling: a plain `Sampling` is taken with the defaults of `MaskedSampling`.
        unconditional, generator: as in `sampling.generate`.
        callback: called with the number of tokens settled and the `(B, N)` ids, `<mask>` where not, after each step.

    Returns the ids of the marked columns `(B, N)`.
    """
    if not isinstance(sampling, MaskedSampling):
        sampling = MaskedSampling(**vars(sampling))
    batch, columns = len(sequence), sequence.loss[0].nonzero()[:, 0]
    sequence = with_twin(sequence, unconditional, sampling.guidance)
    copies = len(sequence) // batch
    hidden = sequence.loss.clone()
    sequence = sequence.replace(ids=torch.where(hidden, MASK, sequence.ids))
    times = sequence.positions[0, columns, 0]
    groups = [columns[times == time] for time in times.unique()] if sampling.by_frame else [columns]
    done = 0
    for group in groups:
        unknown = group.expand(batch, -1)  # the columns of the group that are still to be settled
        left = counts(len(group), sampling.steps, sampling.schedule)
        for step, remain in enumerate(left):
            progress = (step + 1) / len(left)
            start = step / max(len(left) - 1, 1)
            shown = head.shown(sequence, hidden)
            x = transformer(head.vectors(shown), shown)
            x = x.gather(1, unknown.repeat(copies, 1)[..., None].expand(-1, -1, x.shape[-1]))
            ids, confidence = _draw(head, x, sampling, start, progress, generator)
            if sampling.noise:
                gumbel = -exponential(confidence, generator).clamp_min(1e-30).log()
                confidence = confidence + sampling.noise * (1 - progress) * gumbel
            order = confidence.argsort(-1, descending=True)
            settled, again = order.split([order.shape[1] - remain, remain], 1)
            places = unknown.gather(1, settled).repeat(copies, 1)
            sequence = sequence.replace(ids=sequence.ids.scatter(1, places, ids.gather(1, settled).repeat(copies, 1)))
            hidden.scatter_(1, places, False)
            unknown = unknown.gather(1, again)
            done += settled.shape[1]
            if callback is not None:
                callback(done, sequence.ids[:batch, columns])
    return sequence.ids[:batch, columns].clone()


def _draw(
    head: Masked, x: Tensor, sampling: MaskedSampling, start: float, progress: float, generator: Generators
) -> tuple[Tensor, Tensor]:
    """An id for each of the hidden states `(B, M, width)`, and its log-probability (of all its parts)."""
    confidence: list[Tensor] = []
    temperature = sampling.temperature_at(start)

    def sampler(logits: Tensor) -> Tensor:
        if sampling.guidance != 1:
            logits = guide(logits, sampling.guidance_at(progress))
        drawn = sample_logits(logits, temperature, sampling.top_k, sampling.top_p, generator)
        confidence.append(logits.float().log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1))
        return drawn

    ids = head.sample(x, sampler)
    return ids, torch.stack(confidence).sum(0)
