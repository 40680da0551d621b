"""Learning from a reward: the model makes several clips of what it is given, and those that are better than their
neighbours become more probable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reelm.data.clip import Clip
from reelm.engine.video_lm import VideoLM
from reelm.lm.audio_visual import AudioVisual
from reelm.lm.decoding import OneByOne
from reelm.lm.heads import Head
from reelm.lm.precision import lighten
from reelm.lm.sampling import Sampling
from reelm.tasks.task import Given, Task

AT_ONCE = 16  # samples whose activations are kept at a time; they are computed again in the backward pass

Reward = Callable[[Task, Given, Clip, Clip], Tensor]
"""From a task, what is given, the true clips and those that were made of it, to a number for each, `(B,)`."""


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """How much better each of `(B * samples,)` rewards is than the mean of its `samples` neighbours; exactly 0 where
    these are all alike."""
    groups = rewards.double().unflatten(0, (-1, samples))
    above = groups - groups.mean(1, keepdim=True)
    alike = (groups == groups[:, :1]).all(1, keepdim=True)
    return above.masked_fill(alike, 0.0).flatten().float()


@dataclass(frozen=True)
class Reinforcement:
    """Policy gradient with the mean of a group as baseline: REINFORCE as in GRPO (arXiv:2402.03300, section 4.1), with
    one update for each group, so that no ratio is needed, and neither divided by the spread of a group nor by the
    length of a sample alone (arXiv:2503.20783, section 3.2). What keeps the model near the data is the ordinary loss,
    to which this is added.

    reward: how good clips are.
    samples: made of what is given of each clip.
    weight: of this loss beside the ordinary one. It is the mean over samples and ids of advantage times negative
        log-likelihood, and advantages are in units of the reward.
    sampling: how clips are drawn. What cuts off improbable codes (`top_p`) draws from another distribution than the
        one that learns, if one near it; guidance would from one far away, so it is 1.
    """

    reward: Callable  # a `Reward`
    samples: int = 8
    weight: float = 10.0
    sampling: Sampling = Sampling(top_p=0.95, decoding=OneByOne())

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 2:
            raise ValueError(f"reward.samples={self.samples}; give 2 or more, which are compared with each other")
        if not self.weight > 0:
            raise ValueError(f"reward.weight={self.weight}; give a number above 0")
        way = self.sampling
        exact = isinstance(way, Sampling) and isinstance(way.decoding, OneByOne | None)
        if not exact or way.guidance != 1 or way.temperature != 1 or way.of_sound.temperature != 1:
            raise ValueError("reward.sampling draws codes one by one, with guidance=1 and temperature=1")

    def check(self, head: nn.Module) -> None:
        """ValueError where a head's clips cannot be learned from."""
        if not isinstance(head, Head | AudioVisual):
            raise ValueError(f"reward=... is for heads that predict token by token; {type(head).__name__} does not")

    def loss(self, model: VideoLM, clip: Clip, name: str) -> tuple[Tensor, Tensor]:
        """The loss for a batch of clips of the task `name`, and the mean reward."""
        task = model.task(name)
        if clip.video.is_meta:  # of stored tokens; what is known of these clips is then as the tokenizer shows it
            clip = clip.replace(video=model.tokenizer.decode(clip.tokens), tokens=None)
        given, target = task.split(clip)
        rows = [row for row in range(len(clip)) for _ in range(self.samples)]
        given, target = given[rows], Clip.stack([target[row] for row in rows])
        made, sound = self._draw(model, given, name)
        with torch.no_grad():
            rewards = torch.as_tensor(self.reward(task, given, target, made)).float()
        if rewards.shape != (len(rows),) or not rewards.isfinite().all():
            raise ValueError(f"the reward of {len(rows)} clips is a finite number each; it gave {rewards.tolist()}")
        gains = advantages(rewards, self.samples).to(model.device)
        telling = gains.nonzero()[:, 0].tolist()
        if not telling:
            return gains.sum(), rewards.mean()
        total = gains.new_zeros(())
        for part in self._parts(model.packer.alike(given[telling])):
            some = [telling[row] for row in part]
            with torch.no_grad():
                codes, heard = (None if drawn is None else drawn[some].clone() for drawn in (made.tokens, sound))
                sequence = model.packer.pack(given[some], task.marker, codes, sound=heard)
                weights = sequence.loss * gains[some, None]
                ids = sequence.loss[0].sum()  # of each sample
            sequence = sequence.replace(loss=weights)
            mean = checkpoint(lambda one: model.lm.loss(one)[0], sequence, use_reentrant=False)
            total = total + mean * weights.abs().sum() / ids  # the mean is over the sum of the weights' sizes
        return total / len(rows), rewards.mean()

    @staticmethod
    def _parts(groups: list[list[int]]) -> Iterator[list[int]]:
        """Samples that are scored together: with as many columns as they were drawn with, and few enough that what the
        backward pass needs of them fits where an ordinary batch does."""
        for rows in groups:
            yield from (rows[start : start + AT_ONCE] for start in range(0, len(rows), AT_ONCE))

    def _draw(self, model: VideoLM, given: Given, name: str) -> tuple[Clip, Tensor | None]:
        """Clips as the model makes them now, in the precision in which it learns."""
        seed = int(torch.randint(1 << 30, ()))
        kind, learning = model.device.type, model.lm.training
        half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.bfloat16
        model.lm.eval()
        try:
            lighten(model.lm, "bfloat16" if half else "float32")
            with torch.autocast(kind, enabled=False), torch.compiler.set_stance("force_eager"):
                return model.draw(given, name, self.sampling, seed)
        finally:
            lighten(model.lm, "float32")
            model.lm.train(learning)
