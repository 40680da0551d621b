"""A transformer and its token head as one model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reelm.lm.heads import Head
from reelm.lm.masked import Masked
from reelm.lm.masked_diffusion import MaskedTokenDiffusion
from reelm.lm.sequence import Sequence
from reelm.lm.transformer import Transformer


class LanguageModel(nn.Module):
    """Predicts the tokens of a `Sequence`.

    Args:
        transformer: from vectors to vectors.
        head: from ids to vectors and back.
    """

    def __init__(self, transformer: Transformer, head: Head) -> None:
        super().__init__()
        if head.width != transformer.width:
            raise ValueError(f"the head is {head.width} wide, the transformer {transformer.width}; set both the same")
        if transformer.raster and isinstance(head, Masked | MaskedTokenDiffusion):
            names = type(head).__name__, type(transformer).__name__
            raise ValueError(
                f"{names[0]} predicts from all sides and {names[1]} sees what is earlier in the raster alone: "
                "choose another head, or an lm=... with attention"
            )
        self.transformer, self.head = transformer, head

    @property
    def visual(self) -> Head:
        """The head of video: of a model with sound a part of its head."""
        return getattr(self.head, "visual", self.head)

    def forward(self, sequence: Sequence) -> Tensor:
        """Hidden states `(B, L, width)`."""
        return self.transformer(self.head.vectors(sequence), sequence)

    def loss(
        self,
        sequence: Sequence,
        unprompted: Sequence | None = None,
        prompt_weight: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of what `sequence.loss` marks, cross-entropy where that are ids, and what to log.

        unprompted: the sequence without its prompt, where ids are to count `prompt_weight` times more for each nat that
            the prompt tells of them (`Weighting.prompt`).
        """
        if unprompted is None:
            return self.head.learn(self, sequence)
        hidden = self(sequence)
        with torch.no_grad():
            told = self.head.divergence(hidden, self(unprompted), sequence.ids, sequence.loss)
            weights = sequence.loss * (1 + prompt_weight * told)
        return self.head.loss(hidden, sequence.ids, weights)
