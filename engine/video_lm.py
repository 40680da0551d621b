"""`VideoLM`: tokenizer, text model and language model joined. Where models of any kind are found and loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from reelm.data.clip import Clip
from reelm.engine import outside, store
from reelm.engine.video_diffusion import VideoDiffusion
from reelm.engine.video_model import VideoModel
from reelm.lm.language_model import LanguageModel
from reelm.lm.masked import Masked, MaskedSampling, fill
from reelm.lm.sampling import Sampling, generate, seeded
from reelm.lm.token_diffusion import TokenDenoising, TokenDiffusion, draw_latents
from reelm.tasks.packing import Packer
from reelm.tasks.task import Given, Task
from reelm.tokenizers.text import SentencePieceText, T5Text
from reelm.tokenizers.tokenizer import VideoTokenizer
from reelm.tokenizers.tokens import Tokens

BOX = Path(__file__).resolve().parents[1] / "pretrained"


class VideoLM(VideoModel):
    """A video language model.

    Args:
        tokenizer: of video; it stays frozen.
        text: the text model.
        lm: transformer and head.
        tasks: what the model was trained to do, by name.
        shape: frames, height and width of its clips. fps: their rate.
        sampling: how it samples where nothing else is asked for.
    """

    noun, part, kind = "video language model", "lm", Sampling

    def __init__(
        self,
        tokenizer: nn.Module,
        text: SentencePieceText | T5Text,
        lm: LanguageModel,
        tasks: Mapping[str, Task],
        shape: tuple[int, int, int] = (17, 64, 64),
        fps: float = 8.0,
        sampling: Sampling | TokenDenoising = Sampling(),
    ) -> None:
        super().__init__(tokenizer, text, tasks, shape, fps, sampling)
        self.lm = lm
        masked, continuous = (isinstance(lm.head, kind) for kind in (Masked, TokenDiffusion))
        self.packer = Packer(tokenizer, text, lm.head.vocabulary, masked, continuous)

    @torch.inference_mode()
    def generate(
        self,
        given: Given | str | list[str],
        task: str = "t2v",
        sampling: Sampling | TokenDenoising | None = None,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> Clip:
        """Clips for what is given: a prompt, several, or a `Given` with known pixels or a condition.

        seed: sample i draws with seed + i, so it does not depend on its neighbours as long as no prompt of the batch
            takes more text slots (a multiple of 8 word pieces) than its own. progress: called with tokens
            made and tokens asked.
        """
        given = self._given(given, task)
        sequence = self.packer.pack(given, self.task(task).marker)
        known = self.packer.known_in(sequence)
        where = Tokens.positions(self.packer.grid(given), self.device)[known.shape[1] :]
        masked = self.packer.masked
        sampling = self._sampling(sampling, Sampling if self.packer.space is None else TokenDenoising)
        if isinstance(sampling, MaskedSampling) and not masked:
            head = type(self.lm.head).__name__
            raise ValueError(f"sampler=masked needs a model with a masked head; this one's is {head}: leave it out")
        one_by_one = generate if self.packer.space is None else draw_latents
        made = (fill if masked else partial(one_by_one, positions=where))(
            self.lm.transformer,
            self.lm.head,
            sequence,
            sampling=sampling,
            unconditional=self.packer.without_prompt(sequence),
            generator=seeded(list(range(seed, seed + len(given))), self.device),
            callback=None if progress is None else lambda count, _: progress(count, len(where)),
        )
        tokens = torch.cat([known, made], 1).unflatten(1, self.packer.grid(given))
        if self.packer.space is None:
            video = self.tokenizer.decode(self.lm.head.vocabulary.from_visual(tokens))
        else:
            video = self.packer.space.decode(tokens.movedim(-1, 1))
        return Clip(video, given.fps, given.captions)


def find(name: str | Path) -> Path:
    """The folder of a model of the box ("zoetrope"), or the folder that the name is."""
    folder = Path(name)
    if not folder.is_dir() and (BOX / str(name)).is_dir():
        folder = BOX / str(name)
    if not folder.is_dir():
        boxed = sorted(path.name for path in BOX.iterdir() if path.is_dir()) if BOX.is_dir() else []
        raise FileNotFoundError(f"no model {name}: give a folder or one of the box: {', '.join(boxed) or '(empty)'}")
    return folder


def load(name: str | Path) -> VideoModel:
    """A model from the box by its name ("zoetrope"), or from a folder, which tells its kind by the part in it."""
    folder = find(name)
    kind = VideoDiffusion if (folder / VideoDiffusion.part).is_dir() else VideoLM
    return kind.from_pretrained(folder)


def load_tokenizer(name: str, trust: bool = False) -> tuple[VideoTokenizer, Path]:
    """The tokenizer of a model of the box, of a model's folder, or of its own folder, which may be one from outside
    (`outside.load`); and that folder. trust: TorchScript programs."""
    folder = store.part_of(find(name), "tokenizer")
    model = outside.load(folder, trust)
    if not isinstance(model, VideoTokenizer):
        raise ValueError(f"model={name} holds a {type(model).__name__}, which is no video tokenizer")
    return model, folder
