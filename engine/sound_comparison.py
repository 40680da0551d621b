"""What an audio tokenizer keeps of a clip's sound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reelm.data.clip import Clip
from reelm.engine import store
from reelm.engine.loading import find
from reelm.evaluation.reconstruction import code_usage
from reelm.evaluation.sound import mel_distance, si_sdr, snr
from reelm.tokenizers.audio import SoundStream
from reelm.tokenizers.streaming import decode_stream, encode_stream


def load_audio_tokenizer(name: str) -> SoundStream:
    """The audio tokenizer of a model of the box, of a model's folder, or of its own folder."""
    model = store.load(store.part_of(find(name), "audio"))
    if not isinstance(model, SoundStream):
        raise ValueError(f"audio={name} holds a {type(model).__name__}, which is no audio tokenizer")
    return model


@torch.inference_mode()
def reconstruct(clip: Clip, tokenizer: SoundStream) -> tuple[Tensor, dict[str, Any]]:
    """The sound of a batch of one, at the tokenizer's rate, as its tokens tell it: `(1, channels, N)`, and figures."""
    count = round(clip.frames / clip.fps * tokenizer.rate)
    sound = tokenizer.mixed(clip.audio[:, :, :count])
    ids = torch.cat(list(encode_stream(tokenizer, [sound])), 1)  # streams bound the memory
    made = torch.cat(list(decode_stream(tokenizer, [ids])), 2)[:, :, : sound.shape[2]]
    usage = [code_usage(level, tokenizer.vocabulary) for level in ids.unbind(-1)]
    bits = ids[..., 0].numel() * sum(level["bits_per_token"] for level in usage)
    return made, {
        "snr": float(snr(made, sound)),
        "si_sdr": float(si_sdr(made, sound)),
        "mel_distance": float(mel_distance(made, sound, tokenizer.rate)),
        "tokens": ids.numel(),
        "bits": bits,
        "bits_per_second": bits / (sound.shape[2] / tokenizer.rate),
        "codes_used": [level["codes_used"] for level in usage],
        "fingerprint": store.fingerprint(tokenizer),
    }


def line(figures: dict[str, Any]) -> str:
    """The figures of a sound, for people."""
    f = figures
    return (
        f"sound: SNR {f['snr']:.1f} dB, SI-SDR {f['si_sdr']:.1f} dB, mel distance {f['mel_distance']:.1f} dB; "
        f"{f['tokens']:,} tokens, {f['bits_per_second']:,.0f} bits a second"
    )
