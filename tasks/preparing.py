"""What has to be known of what is given, whatever model is told it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from reelm.tasks.task import Given
from reelm.tokenizers.text import MULTIPLE, SentencePieceText, T5Text, TextSlots


class Preparing:
    """What puts what is given into the form that a model takes, for one tokenizer and text model.

    Args:
        tokenizer: video tokenizer with `encode`, `grid`, `compression`.
        text: the text model.
    """

    def __init__(self, tokenizer: nn.Module, text: SentencePieceText | T5Text) -> None:
        self.tokenizer, self.text = tokenizer, text

    @property
    def text_length(self) -> TextSlots:
        """What counts the text slots that a caption takes."""
        return self.text.slots

    def slots(self, captions: Iterable[str]) -> int:
        """Text slots of a batch: enough for the longest of its prompts."""
        return max(map(self.text_length, captions), default=MULTIPLE)

    def alike(self, given: Given) -> list[list[int]]:
        """Numbers of the samples, together where each of them alone would become a sequence of the same length.

        What a sample becomes then does not depend on its neighbours: <pad> in the text of one is seen by it.
        """
        frames = [None] * len(given)
        if given.known is not None:
            pixels = given.known[:, 0].flatten(2)
            frames = torch.stack([pixels.all(-1), pixels.any(-1)], 1).expand(len(given), -1, -1).tolist()
        groups: dict[tuple[int, str], list[int]] = {}
        for row, caption in enumerate(given.captions):
            groups.setdefault((self.text_length(caption), str(frames[row])), []).append(row)
        return list(groups.values())

    def grid(self, given: Given) -> tuple[int, int, int]:
        """Token grid of what is to be made."""
        return self.tokenizer.grid(*given.shape)

    def prefix_frames(self, given: Given) -> int:
        """How many leading known frames are a prefix of the clip's tokens; those that fill no latent frame are not."""
        latents = self.known_latents(given)
        return 1 + (latents - 1) * self.tokenizer.compression[0] if latents else 0

    def known_latents(self, given: Given) -> int:
        """How many leading latent frames of the clip are known."""
        leading = given.leading
        return 1 + (leading - 1) // self.tokenizer.compression[0] if leading else 0

    def needs_pixels(self, given: Given) -> bool:
        """Whether more is known than a prefix of the clip's own tokens, which says it in tokens of other pixels."""
        beyond = given.known is not None and given.known[:, :, self.prefix_frames(given) :].any()
        return given.condition is not None or bool(beyond)
