"""A small untrained model of all tasks, and what a user may hand it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reelm.data.clip import Clip
from reelm.data.writing import write_video
from reelm.engine.video_lm import VideoLM
from reelm.lm.heads import Chained
from reelm.lm.language_model import LanguageModel
from reelm.lm.sampling import Sampling
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.known_frames import KnownFrames, Loop
from reelm.tasks.painting import Painting
from reelm.tasks.stylization import Stylization
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import FSQ
from reelm.tokenizers.text import SentencePieceText

FAST = Sampling(guidance=1.0)
TASKS = {
    task.name: task
    for task in (
        Generation("t2v"), Generation("t2i", frames=1), Generation("unconditional", prompted=False),
        KnownFrames("i2v"), KnownFrames("continuation", first=(5,)), KnownFrames("interpolation", last=1),
        KnownFrames("backward", first=(0,), last=5, order="backward"), Loop(order="last_first"),
        KnownFrames("connection", first=(1,), last=1), Stylization(),
        Painting("inpainting", inside=True, marker=1), Painting("outpainting", inside=False, marker=2),
    )
}  # fmt: skip


def small_model() -> VideoLM:
    torch.manual_seed(0)
    tokenizer = MAGVIT2(FSQ((4, 4)), (16, 16), ((1, 2, 2),), (1, 1), ((1, 3, 3), (3, 3, 3)), (4, 4, 4))
    text = SentencePieceText.train(["a red star moves left", "a blue circle in neon style"] * 8, 400)
    lm = LanguageModel(Transformer(32, 1, 2, sites=(8, 8, 8)), Chained(Vocabulary(16, text=text.vocabulary), 32))
    return VideoLM(tokenizer, text, lm, TASKS, shape=(9, 32, 32), sampling=FAST).eval()


def material_in(folder: Path) -> Path:
    """A photo of odd size, a clip of another rate and shape, masks."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (77, 131, 3), dtype=np.uint8)).save(folder / "photo.jpg")
    video = torch.linspace(-1, 1, 50).view(1, 1, 50, 1, 1).expand(1, 3, 50, 48, 80).contiguous()
    write_video(folder / "clip.mp4", Clip(video, 25.0))
    mask = np.zeros((48, 80), dtype=np.uint8)
    mask[10:30, 30:50] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:20]).save(folder / "small.png")
    Image.fromarray(mask * 0).save(folder / "black.png")
    return folder
