"""The sound that a model makes on Zoetrope, beside the judge's own error, chance and the ceiling of its codec."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.data.writing import write_contact_sheet
from reelm.data.zoetrope.dataset import Zoetrope
from reelm.engine.video_model import VideoModel
from reelm.engine.zoetrope_scoring import heard_right
from reelm.evaluation.zoetrope_hearing import Hearing, hear, picture, truth_of
from reelm.evaluation.zoetrope_judge import Tally
from reelm.tasks.task import Given

KINDS = ("generated", "ceiling", "judge", "chance")


class Ear:
    """Hears the clips of one task and scores them against the scenes."""

    def __init__(self, model: VideoModel, world: Zoetrope) -> None:
        self.model, self.world = model, world
        self.tallies = {kind: Tally() for kind in KINDS}
        self.heard: dict[int, tuple[Hearing, Hearing]] = {}
        self.pictures: list[tuple[Tensor, str]] = []
        self.given: Given | None = None

    def add(self, indices: list[int], given: Given, target: Clip, result: Clip) -> None:
        """Counts a batch in."""
        rate, audio = target.audio_rate, self.model.audio
        self.given = given
        ceiling = audio.decode(audio.encode(target.audio))[..., : target.audio.shape[-1]]
        for i, index in enumerate(indices):
            truth = truth_of(self.world.scene(index, target.frames, target.fps), target.frames / target.fps)
            made = hear(_stereo(result.audio[i]), rate)
            self.heard[index] = made, truth
            for kind, heard in (
                ("generated", made),
                ("ceiling", hear(_stereo(ceiling[i]), rate)),
                ("judge", hear(target.audio[i], rate)),
            ):
                self._note(kind, heard, truth)
            if index < 12:
                played, own = (_stereo(clip.audio[i]).cpu() for clip in (result, target))
                self.pictures.append((picture(played, own, rate, truth), target.captions[i]))

    def _note(self, kind: str, heard: Hearing, truth: Hearing) -> None:
        self.tallies[kind].note(heard_right(heard, truth, self.given), single=len(truth.voices) == 1)

    def scores(self) -> dict[str, dict[str, dict[str, float]]]:
        """Shares of what is right, by kind, scenes and attribute; chance is the scene of the next clip."""
        numbers = list(self.heard)
        for number, index in enumerate(numbers):
            self._note("chance", self.heard[index][0], self.heard[numbers[(number + 1) % len(numbers)]][1])
        return {kind: tally.shares() for kind, tally in self.tallies.items()}

    def sheet(self, path: Path) -> None:
        """Waveforms and levels over the truth."""
        videos = torch.stack([image for image, _ in self.pictures])
        write_contact_sheet(path, videos, columns=1, labels=[text for _, text in self.pictures], scale=2)


def _stereo(sound: Tensor) -> Tensor:
    return sound.expand(2, -1)
