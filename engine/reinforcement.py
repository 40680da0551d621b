"""Learning from a reward: the model makes several clips of what it is given, and those that are better than their
neighbours become more probable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.engine.video_lm import VideoLM
from reelm.lm.decoding import OneByOne
from reelm.lm.heads import Head
from reelm.lm.precision import lighten
from reelm.lm.sampling import Sampling
from reelm.tasks.task import Given, Task

Reward = Callable[[Task, Given, Clip, Clip], Tensor]
"""From a task, what is given, the true clips and those that were made of it, to a number for each, `(B,)`."""


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """How much better each of `(B * samples,)` rewards is than the mean of its `samples` neighbours, over the root of
    its mean square: 0 where nothing differs."""
    rewards = rewards.float().unflatten(0, (-1, samples))
    above = (rewards - rewards.mean(1, keepdim=True)).flatten()
    return above / above.square().mean().sqrt().clamp_min(1e-6)


@dataclass(frozen=True)
class Reinforcement:
    """Policy gradient with the mean of a group as baseline (REINFORCE as in GRPO, arXiv:2402.03300, section 4.1, with
    one update for each group, so that no ratio is needed, and without dividing by the spread of the group,
    arXiv:2503.20783, section 3.2). What keeps the model near the data is the ordinary loss, to which this is added.

    reward: how good clips are.
    samples: made of what is given of each clip.
    weight: of this loss beside the ordinary one.
    sampling: how clips are drawn. Guidance would draw from another distribution than the one that learns; leave it 1.
    """

    reward: Reward
    samples: int = 8
    weight: float = 1.0
    sampling: Sampling = Sampling(top_p=0.95, decoding=OneByOne())

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 2:
            raise ValueError(f"reward.samples={self.samples}; give 2 or more, which are compared with each other")
        if not isinstance(self.sampling, Sampling) or self.sampling.guidance != 1 or not self.sampling.temperature:
            raise ValueError("reward.sampling draws one code after the other, with guidance=1 and a temperature")

    def check(self, head: object) -> None:
        """ValueError where a head's clips cannot be learned from."""
        if not isinstance(head, Head) and not hasattr(head, "sound"):
            raise ValueError(f"reward=... is for heads that predict token by token; {type(head).__name__} does not")

    def loss(self, model: VideoLM, clip: Clip, name: str) -> tuple[Tensor, Tensor]:
        """The loss for a batch of clips of the task `name`, and the mean reward."""
        task = model.task(name)
        given, target = task.split(clip)
        rows = [row for row in range(len(clip)) for _ in range(self.samples)]
        given, target = given[rows], Clip.stack([target[row] for row in rows])
        made, sound = self._draw(model, given, name)
        rewards = self.reward(task, given, target, made)
        gains = advantages(rewards, self.samples).to(model.device)
        telling = gains.nonzero()[:, 0].tolist()
        if not telling:
            return gains.sum(), rewards.mean()
        codes, sound = (None if part is None else part[telling].clone() for part in (made.tokens, sound))
        with torch.no_grad():
            sequence = model.packer.pack(given[telling], task.marker, codes, sound=sound)
            sequence = sequence.replace(loss=sequence.loss * gains[telling, None])
        return model.lm.loss(sequence)[0], rewards.mean()

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
