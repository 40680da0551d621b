"""A small untrained model of video and sound, and its tasks."""

import torch
from torch import nn

from reelm.engine.video_lm import VideoLM
from reelm.lm.audio_visual import AudioVisual
from reelm.lm.heads import Chained
from reelm.lm.language_model import LanguageModel
from reelm.lm.sampling import Sampling
from reelm.lm.transformer import Transformer
from reelm.lm.vocabulary import Vocabulary
from reelm.tasks.generation import Generation
from reelm.tasks.with_sound import WithSound
from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.magvit2 import MAGVIT2
from reelm.tokenizers.quantizers import FSQ, ResidualVQ
from reelm.tokenizers.text import SentencePieceText

CAPTIONS = ("a red star", "a blue circle bounces")
SHAPE, PER_FRAME, LATENTS, LEVELS, CODES = (9, 16, 16), 4, 18, 2, 8
RATE = 16_000
TASKS = {
    task.name: task
    for task in (
        Generation(),
        WithSound("v2a", told=("video",), asks=("audio",), prompted=False, marker=4),
        WithSound("a2v", told=("audio",), asks=("video",), prompted=False, marker=0),
        WithSound("t2av"),
        WithSound("av_continuation", first=(5,)),
    )
}
LOUD = [name for name in TASKS if name != "t2v"]
FAST = Sampling(guidance=1.0)


def sounding_model() -> VideoLM:
    torch.manual_seed(0)
    video = MAGVIT2(FSQ((4, 4)), (16, 16), ((1, 2, 2),), (1, 1), ((1, 3, 3), (3, 3, 3)), (4, 4, 4))
    audio = SoundStream(ResidualVQ(CODES, 4, LEVELS), widths=[8, 8], strides=[5], patch=200, dilations=[1])
    with torch.no_grad():  # codebooks begin as the first sound that they hear: here, whichever test comes first
        audio.encode(torch.rand(2, 2, RATE) - 0.5)
    text = SentencePieceText.train([f"{caption} {i}" for caption in CAPTIONS for i in range(20)], 400)
    vocabulary = Vocabulary(16, LEVELS * CODES, text.vocabulary)
    head = AudioVisual(vocabulary, 32, Chained(vocabulary, 32), LEVELS)
    lm = LanguageModel(Transformer(32, 2, 2, sites=(8, 8, 8)), head)
    for parameter in lm.parameters():  # a fresh model sees no context and predicts nothing
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return VideoLM(video, text, lm, TASKS, SHAPE, 8.0, FAST, audio=audio).eval()
